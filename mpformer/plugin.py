"""Plug-ins: an object named `package.module:Name`, with options, wherever a setting names a kind.

A plug-in is a class, which is instantiated with its options, or, where its contract is to be called, a
function, which gets its options as keyword arguments at every call. It is imported from the folder that the
command runs in or from an installed package: on this machine processes inherit that folder
(`inherited_folder`), to other machines the module is sent (`modules_to_send`). Imports neither torch nor ray.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mpformer.types import InputError

REFERENCE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""What a reference looks like: `package.module:Name`."""

LIBRARIES = ("torch",)
"""Packages that mpformer itself is built on: their versions enter no run's identity."""

FOLDER_VARIABLE = "MPFORMER_PLUGIN_FOLDER"
"""Environment variable: the folder to import plug-ins from; the working folder if it is not set."""

_Contract = TypeVar("_Contract")


def is_reference(value: object) -> bool:
    """Whether a setting's value names a plug-in."""
    return isinstance(value, str) and re.match(REFERENCE, value) is not None


def is_library(reference: str) -> bool:
    """Whether a reference names a part of one of the `LIBRARIES`."""
    return re.split("[.:]", reference)[0] in LIBRARIES


def plugin_folder() -> str:
    """The folder that plug-ins are imported from, besides installed packages."""
    return os.environ.get(FOLDER_VARIABLE) or os.getcwd()


@contextlib.contextmanager
def inherited_folder() -> Iterator[None]:
    """Processes that are started meanwhile, and theirs, import plug-ins from this process's folder."""
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = plugin_folder()
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]


def modules_to_send(found: Iterable[str]) -> list[str]:
    """Paths of what the references need on other machines: the file of each top-level module, or the folder
    of each top-level package, that lies in the plug-in folder. Installed packages are expected there."""
    _make_importable()
    folder = Path(plugin_folder()).resolve()
    places: list[str] = []
    for name in sorted({re.split("[.:]", reference)[0] for reference in found}):
        if (spec := importlib.util.find_spec(name)) is not None:
            places += list(spec.submodule_search_locations or [str(spec.origin)] * spec.has_location)
    return [place for place in places if Path(place).resolve().parent == folder]


def load(reference: str, place: str) -> Any:
    """The object that a reference names. `place` begins the message of an `InputError`: no such module or
    name, or a module that cannot be imported."""
    module_name, _, name = reference.partition(":")
    _make_importable()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the plug-in's own code runs here and may raise anything
        raise _not_importable(error, reference, place) from error
    try:
        return getattr(module, name)
    except AttributeError:
        close = difflib.get_close_matches(name, [n for n in vars(module) if not n.startswith("_")], n=1)
        near = f"; nearest: {module_name}:{close[0]}" if close else ""
        raise InputError(f"{place}: module '{module_name}' has no '{name}'{near}") from None


def build(
    reference: str,
    options: Mapping[str, Any],
    contract: type[_Contract],
    place: str,
    *arguments: Any,
) -> _Contract:
    """The plug-in that a reference names, made with `arguments` and `options` and checked against a contract.

    contract: a Protocol, or a base class that the plug-in has to derive from; the plug-in needs the public
    methods that it defines, `__call__` included, each taking the same positional arguments. Raises
    `InputError` that begins with `place`, the setting's key.
    """
    found = load(reference, place)
    required = _methods(contract)
    what = f"{place}: {reference}"
    plugin: Any
    if inspect.isclass(found):
        if Protocol not in contract.__bases__ and not issubclass(found, contract):
            raise InputError(f"{what} is no subclass of {contract.__module__}.{contract.__name__}")
        defined = {name for base in found.__mro__ for name in vars(base)}
        if missing := next((name for name in required if name not in defined), None):
            method = _shown(missing, required[missing])
            raise InputError(f"{what} lacks the method {method} of {contract.__name__}")
        if abstract := sorted(getattr(found, "__abstractmethods__", ())):
            raise InputError(f"{what} lacks the methods of {contract.__name__}: {', '.join(abstract)}")
        _check_call(found, arguments, options, what)
        plugin = _instance(found, arguments, options, what)
    elif callable(found) and required.keys() == {"__call__"}:
        _check_call(found, required["__call__"], options, what)
        plugin = functools.partial(found, **options)
    else:
        expected = "class or function" if "__call__" in required else "class"
        raise InputError(f"{what} is no {expected}")
    for name, parameters in required.items():
        method = _shown(name, parameters)
        _check_call(getattr(plugin, name), parameters, {}, f"{what}: {method} of {contract.__name__}")
    return plugin


def shared(reference: str, options: Mapping[str, Any], contract: type[_Contract], place: str) -> _Contract:
    """As `build`, but made once per process for the same reference and options: for plug-ins without state
    that are used for every sample or step."""
    key = (reference, json.dumps(options, sort_keys=True), contract)
    if key not in _made:
        _made[key] = build(reference, options, contract, place)
    return _made[key]


_made: dict[tuple[str, str, type], Any] = {}


def source_hash(reference: str, place: str) -> str:
    """Twelve hexadecimal digits of the file of the plug-in's module; the module itself is not imported.

    Raises `InputError` that begins with `place` where there is no such module.
    """
    module_name = reference.partition(":")[0]
    _make_importable()
    try:
        spec = importlib.util.find_spec(module_name)
    except (Exception, SystemExit) as error:  # the packages around the module are imported
        raise _not_importable(error, reference, place) from error
    if spec is None:
        raise _no_module(reference, place)
    if spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"{place}: '{reference}': a module with a source file is expected")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]


def _make_importable() -> None:
    """At the end of the search path, so that nothing in the folder shadows an installed package."""
    if (folder := plugin_folder()) not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _names(missing: str | None, module_name: str) -> bool:
    """Whether the missing module is the plug-in's own, or a package around it."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _not_importable(error: BaseException, reference: str, place: str) -> InputError:
    if isinstance(error, ModuleNotFoundError) and _names(error.name, reference.partition(":")[0]):
        return _no_module(reference, place)
    return InputError(f"{place}: '{reference}' cannot be imported: {described(error)}")


def described(error: BaseException) -> str:
    """An exception of a plug-in's own code in a few words: its class and message."""
    return f"{type(error).__name__}: {error}"


def _instance(found: type, arguments: tuple[Any, ...], options: Mapping[str, Any], what: str) -> Any:
    try:
        return found(*arguments, **options)
    except InputError:
        raise
    except Exception as error:  # the plug-in's own code may raise anything
        if found.__module__.split(".")[0] == __name__.split(".")[0]:
            raise  # of the package's own classes: no plug-in's fault
        reason = str(error) if isinstance(error, ValueError) else described(error)
        raise InputError(f"{what}: {reason}") from error


def _no_module(reference: str, place: str) -> InputError:
    module_name = reference.partition(":")[0]
    folder = Path(plugin_folder())
    close = difflib.get_close_matches(module_name, [p.stem for p in folder.glob("*.py")], n=1)
    near = f"; nearest: {close[0]}" if close else ""
    return InputError(
        f"{place}: '{reference}': no module '{module_name}' in {folder} or among installed packages{near}"
    )


def _methods(contract: type) -> dict[str, tuple[str, ...]]:
    """The methods that a contract itself defines, each with the names of its positional parameters."""
    found: dict[str, tuple[str, ...]] = {}
    for name, member in vars(contract).items():
        if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
            parameters = list(inspect.signature(member).parameters.values())[1:]
            positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            found[name] = tuple(p.name for p in parameters if p.kind in positional)
    return found


def _shown(name: str, parameters: tuple[str, ...]) -> str:
    """A method as messages name it: 'place(height, width, random)', or only '(value)' of `__call__`."""
    return f"{name.replace('__call__', '')}({', '.join(parameters)})"


def _check_call(function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], what: str) -> None:
    if not callable(function):
        raise InputError(f"{what}: a method is expected, not {function!r}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise InputError(f"{what}: {error}; its signature is {signature}") from None
