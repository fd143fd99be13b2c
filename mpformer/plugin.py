"""Plug-ins: an object named `package.module:Name`, with options, wherever a setting names a kind.

A plug-in is a class, which is instantiated with its options, or, where its contract is to be called, a
function, which gets its options as keyword arguments at every call. The folder that the command runs in is
importable, on the driver and on every worker. Imports neither torch nor ray.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpformer.types import InputError

REFERENCE = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""What a reference looks like: `package.module:Name`."""

FOLDER_VARIABLE = "MPFORMER_PLUGIN_FOLDER"
"""Environment variable: the folder to import plug-ins from; the working folder if it is not set."""

_Contract = TypeVar("_Contract")


def is_reference(value: object) -> bool:
    """Whether a setting's value names a plug-in."""
    return isinstance(value, str) and re.match(REFERENCE, value) is not None


def plugin_folder() -> str:
    """The folder that plug-ins are imported from, besides installed packages."""
    return os.environ.get(FOLDER_VARIABLE) or os.getcwd()


def load(reference: str, place: str) -> Any:
    """The object that a reference names. `place` begins the message of an `InputError`: no such module or
    name, or a module that cannot be imported."""
    module_name, _, name = reference.partition(":")
    _make_importable()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        if isinstance(error, ModuleNotFoundError) and _names(error.name, module_name):
            raise _no_module(reference, place) from None
        raise InputError(f"{place}: '{reference}' cannot be imported: {error}") from error
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

    contract: a Protocol or base class; the plug-in needs the public methods that it defines, `__call__`
    included, each taking the same positional arguments. Raises `InputError` that begins with `place`, the
    setting's key.
    """
    found = load(reference, place)
    required = _methods(contract)
    if inspect.isclass(found):
        _check_call(found, arguments, options, f"{place}: {reference}")
        plugin = found(*arguments, **options)
    elif callable(found) and required.keys() == {"__call__"}:
        _check_call(found, required["__call__"], options, f"{place}: {reference}")
        plugin = functools.partial(found, **options)
    else:
        raise InputError(f"{place}: {reference} is no class{' or function' * ('__call__' in required)}")
    for name, parameters in required.items():
        method = getattr(plugin, name, None)
        shown = f"{name}({', '.join(parameters)})".replace("__call__", "")
        if not callable(method):
            raise InputError(f"{place}: {reference} lacks the method {shown} of {contract.__name__}")
        _check_call(method, parameters, {}, f"{place}: {reference}: {shown} of {contract.__name__}")
    return plugin


def source_hash(reference: str, place: str) -> str:
    """Twelve hexadecimal digits of the file of the plug-in's module; the module itself is not imported.

    Raises `InputError` that begins with `place` where there is no such module.
    """
    module_name = reference.partition(":")[0]
    _make_importable()
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise _no_module(reference, place)
    if spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"{place}: '{reference}': a module with a source file is expected")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()[:12]


def _make_importable() -> None:
    """At the end of the search path, so that nothing in the folder stands in for an installed package."""
    if (folder := plugin_folder()) not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _names(missing: str | None, module_name: str) -> bool:
    """Whether the missing module is the plug-in's own, or a package around it."""
    return missing is not None and f"{module_name}.".startswith(f"{missing}.")


def _no_module(reference: str, place: str) -> InputError:
    module_name = reference.partition(":")[0]
    folder = Path(plugin_folder())
    close = difflib.get_close_matches(module_name, [p.stem for p in folder.glob("*.py")], n=1)
    near = f"; nearest: {close[0]}" if close else ""
    return InputError(
        f"{place}: '{reference}': no module '{module_name}' in {folder} or among installed packages{near}"
    )


def _methods(contract: type) -> dict[str, tuple[str, ...]]:
    """The methods that a contract itself asks for, each with the names of its positional parameters."""
    found: dict[str, tuple[str, ...]] = {}
    for name, member in vars(contract).items():
        if inspect.isfunction(member) and (name == "__call__" or not name.startswith("_")):
            parameters = list(inspect.signature(member).parameters.values())[1:]
            positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            found[name] = tuple(p.name for p in parameters if p.kind in positional)
    return found


def _check_call(function: Any, arguments: tuple[Any, ...], options: Mapping[str, Any], what: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin that does not tell
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        raise InputError(f"{what}: {error}; its signature is {signature}") from None
