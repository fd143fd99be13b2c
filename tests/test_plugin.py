"""Plug-ins: how they are found, checked against a contract, and enter a run's identity."""

import datetime
import sys
from typing import Annotated, Literal, Protocol

import pytest
from pydantic import Discriminator, Tag, TypeAdapter

from mpformer import plugin
from mpformer.config import Config, identity_settings, run_name
from mpformer.config.plugins import BY_NAME, PLUGIN_TAG, Plugin, kind, references
from mpformer.config.section import Section
from mpformer.types import InputError

SOURCE = """
class Doubled:
    def __init__(self, offset=0):
        self.offset = offset

    def __call__(self, value):
        return 2 * value + self.offset

class TooFew:
    def __call__(self):
        return 0

class Silent:
    pass

class Demanding(Doubled):
    def __init__(self, offset=0):
        self.offset = {}[offset]

class Uncallable:
    __call__ = None

def tripled(value, offset=0):
    return 3 * value + offset

constant = 3
"""


class Change(Protocol):
    def __call__(self, value: float) -> float: ...


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of plug-ins, forgotten afterwards."""
    monkeypatch.delenv(plugin.FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "changes.py").write_text(SOURCE)
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("changes", "broken")]:
        del sys.modules[name]


def test_a_class_is_made_with_its_options_and_a_function_called_with_them(folder):
    doubled = plugin.build("changes:Doubled", {"offset": 1}, Change, "key")
    tripled = plugin.build("changes:tripled", {"offset": 1}, Change, "key")
    assert (doubled(5), tripled(5)) == (11, 16)


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("change:Doubled", {}, "key: 'change:Doubled': no module 'change' in .*; nearest: changes"),
        ("changes:Double", {}, "key: module 'changes' has no 'Double'; nearest: changes:Doubled"),
        ("changes:Doubled", {"offst": 1}, "key: changes:Doubled: .*'offst'; its signature is .offset=0."),
        ("changes:tripled", {"offst": 1}, "key: changes:tripled: .*'offst'; its signature is "),
        ("changes:TooFew", {}, r"key: changes:TooFew: \(value\) of Change: too many positional"),
        ("changes:Silent", {}, r"key: changes:Silent lacks the method \(value\) of Change"),
        ("changes:constant", {}, "key: changes:constant is no class or function"),
        ("changes:Demanding", {}, "key: changes:Demanding: KeyError: 0"),
        ("changes:Uncallable", {}, r"key: changes:Uncallable: \(value\) of Change: a method is expected"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_the_setting(folder, reference, options, message):
    with pytest.raises(InputError, match=message):
        plugin.build(reference, options, Change, "key")


def test_a_module_that_cannot_be_imported_is_told_apart_from_one_that_is_not_there(folder):
    (folder / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(InputError, match=r"'broken:Name' cannot be imported: .*Error: .*'no_such"):
        plugin.load("broken:Name", "key")


def test_the_hash_follows_the_source_and_imports_nothing(folder):
    first = plugin.source_hash("changes:Doubled", "key")
    assert "changes" not in sys.modules
    assert plugin.source_hash("changes:tripled", "key") == first
    (folder / "changes.py").write_text(SOURCE + "\n# another version\n")
    assert plugin.source_hash("changes:Doubled", "key") != first
    with pytest.raises(InputError, match="nowhere"):
        plugin.source_hash("nowhere.there:Name", "key")


def test_a_run_is_another_with_another_name_other_options_or_another_source(folder):
    def name(kind="changes:tripled", **options):
        schedule = {"kind": kind, "options": options}
        return run_name(Config.model_validate({"train": {"schedule": schedule}}))

    names = {name(), name("changes:Doubled"), name(offset=1), name(offset=2)}
    before = name()
    (folder / "changes.py").write_text(SOURCE + "\n# another version\n")
    assert len(names | {name(), name(offset=1)}) == 6
    (folder / "changes.py").write_text(SOURCE)
    assert name() == before


def test_the_version_of_torch_enters_no_identity():
    config = Config.model_validate({"train": {"optimizer": "torch.optim:SGD"}})
    assert identity_settings(config)["train.optimizer.kind"] == "torch.optim:SGD"
    assert not any(key.endswith(".source") for key in identity_settings(config))


def test_a_module_that_leaves_the_process_is_one_error(folder):
    (folder / "broken.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match="'broken:Name' cannot be imported: SystemExit: 3"):
        plugin.load("broken:Name", "key")


def test_a_package_that_cannot_be_imported_has_no_hash(folder):
    (folder / "broken").mkdir()
    (folder / "broken" / "__init__.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(InputError, match=r"'broken.part:Name' cannot be imported: RuntimeError: not today"):
        plugin.source_hash("broken.part:Name", "key")


class Point(Section):
    kind: Literal["point"] = "point"
    ratio: float = 0.2


class Shift(Section):
    kind: Literal["shift"] = "shift"


Noise = Annotated[
    Annotated[Point, Tag("point")] | Annotated[Shift, Tag("shift")] | Annotated[Plugin, Tag(PLUGIN_TAG)],
    Discriminator(kind),
]


class Settings(Section):
    noise: tuple[Noise, ...] = (Point(),)
    attention: Annotated[Literal["masked", "cross"] | Plugin, BY_NAME] = "masked"


def test_settings_take_plug_ins_beside_their_own_kinds():
    given = {"noise": [{"kind": "shift"}, {"kind": "a.b:C", "options": {"x": 1}}], "attention": "a:B"}
    settings = Settings.model_validate(given)
    assert settings.noise == (Shift(), Plugin(kind="a.b:C", options={"x": 1}))
    assert settings.attention == Plugin(kind="a:B")
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings
    assert list(references(settings)) == [("noise.1", "a.b:C"), ("attention", "a:B")]
    assert list(references(Settings())) == []


def test_options_are_plain_values():
    with pytest.raises(ValueError, match="options"):
        Plugin.model_validate({"kind": "a:B", "options": {"day": datetime.date(2024, 1, 1)}})


def test_a_kind_that_is_neither_is_an_error_that_lists_plug_ins():
    with pytest.raises(ValueError, match=r"'point', 'shift', 'package.module:Name'"):
        TypeAdapter(Noise).validate_python({"kind": "poit"})
