"""A setting that is text is what is written, in commands and in files, whatever YAML would read there."""

import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpformer.ablation.cost import PlanOptions
from mpformer.ablation.spec import load_study
from mpformer.config import Config, dump_yaml, load_config
from mpformer.config.texts import declared
from mpformer.config.yamlfile import quoted, read_settings, read_yaml
from mpformer.types import InputError

FOLDERS = [
    *(
        "set #2",
        "2024",
        "2024-01-15",
        "2024-13-45",
        "007",
        "1e5",
        "yes",
        "no",
        "null",
        "~",
        "*a",
        "&a",
        "[x]",
    ),
    *("a: b", "{x}", "@x", "trailing ", " leading", "0x1F", "1:30", "1_000", "- x", "? x", "!!int 3", "`x`"),
    *(
        "'quoted'",
        '"quoted"',
        "%x",
        "|",
        ">",
        "=",
        "<<",
        "a=b",
        "größe",
        "a\nb",
        ".inf",
        "0x_",
        "-x",
        "$HOME",
    ),
]
UNQUOTED = [
    f for f in FOLDERS if f not in {"a\nb", "trailing ", " leading"} and f[0] not in "*&[{@-?!`'\"%|>"
]
UNQUOTED = [f for f in UNQUOTED if f not in ("set #2", "a: b")]
"""Those that a YAML file may have without quotes."""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {root: folder, dataset: {train: {images: a, annotations: b}}}\n")
    return path


@pytest.mark.parametrize("name", FOLDERS)
def test_text_of_the_command_line_is_taken_as_it_is(recipe, name):
    config = load_config(recipe, [f"data.root={name}", f"data.dataset.train.images={name}", f"name={name}"])
    assert config.data.root == config.data.dataset.train.images == config.name == name
    dumped = recipe.with_name("dumped.yaml")
    dumped.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(dumped) == config


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=200, deadline=None)
def test_any_text_of_the_command_line(text):
    assert load_config("coco-tiny", [f"data.root={text}"]).data.root == text
    assert load_config("coco-tiny", [f"train.init={text}"]).train.init == (None if text == "null" else text)


def test_null_is_none_where_text_may_be_left_out(recipe):
    config = load_config(recipe, ["train.init=null", "tracking.mlflow=null", "data.root=null"])
    assert (config.train.init, config.tracking.mlflow, config.data.root) == (None, None, "null")
    assert load_config(recipe, ["train.init=./null"]).train.init == "./null"


@pytest.mark.parametrize("key", ["data.root", "train.init", "name"])
def test_empty_text_is_refused(recipe, key):
    with pytest.raises(InputError, match=f"setting '{key}=': text is expected after '='"):
        load_config(recipe, [f"{key}="])


@pytest.mark.parametrize("name", UNQUOTED)
def test_text_of_a_file_is_what_is_written(tmp_path, name):
    """In a recipe, in its base, in a data-set file, and in a list of sections."""
    assert len(UNQUOTED) > 15
    (tmp_path / "base.yaml").write_text(f"data: {{root: folder}}\ntracking: {{mlflow: {name}}}\n", "utf-8")
    (tmp_path / "set.yaml").write_text(
        textwrap.dedent(
            f"""\
            format: label_maps
            train: {{images: {name}, labels: b}}
            val: {{images: a, labels: {name}}}
            classes: [{{name: {name}, id: 007}}]
            """
        ),
        "utf-8",
    )
    recipe = tmp_path / "recipe.yaml"
    text = f"base: base.yaml\nname: {name}\ndata: {{task: semantic, dataset: set.yaml, root: {name}}}\n"
    recipe.write_text(text, "utf-8")
    config = load_config(recipe)
    data = config.data.dataset
    assert (
        config.name
        == config.data.root
        == data.train.images
        == data.val.labels
        == data.classes[0].name
        == name
    )
    assert data.classes[0].id == 7
    assert config.tracking.mlflow == (None if name in ("null", "~") else name)


def test_what_is_laid_over_a_text_is_not_lost(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {root: 007}\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: base.yaml\ndata: {root: other}\n")
    assert load_config(recipe).data.root == "other"
    assert load_config(recipe, ["data.root=1e3"]).data.root == "1e3"


def test_lists_and_mappings_of_the_command_line_are_yaml(recipe):
    config = load_config(
        recipe,
        [
            "data.dataset={format: label_maps, train: {images: 1e5, labels: no}, "
            "val: {images: a, labels: 'x'}, classes: [{name: yes, id: 1}]}",
            "model.pilot.layers=[2]",
            "train.optimizer={kind: torch.optim:SGD, options: {nesterov: yes}}",
            "evaluate.metrics=[a.b:C]",
        ],
    )
    data = config.data.dataset
    assert (data.train.images, data.train.labels, data.classes[0].name) == ("1e5", "no", "yes")
    assert config.model.pilot.layers == (2,)
    assert config.train.optimizer.options == {"nesterov": True}, "a plug-in's options are values"
    assert config.evaluate.metrics[0].kind == "a.b:C"


@pytest.mark.parametrize("name", ["set #2.yaml", "2024", "*a.yaml", "null"])
def test_the_name_of_a_data_set_file_is_text(tmp_path, monkeypatch, recipe, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("train: {images: a, annotations: b}\n")
    assert load_config(recipe, [f"data.dataset={name}"]).data.dataset.train.images == "a"
    if name != "null":
        recipe.write_text(f"data: {{dataset: {quoted(name)}}}\n")
        assert load_config(recipe).data.dataset.train.images == "a"


@pytest.mark.parametrize("root", ["*a", "@x", "a: b"])
def test_text_that_needs_quotes_in_a_file_is_told_so(tmp_path, root):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data:\n  root: {root}\n")
    with pytest.raises(InputError, match=r"recipe\.yaml:2: not valid YAML: .*written in quotes"):
        load_config(recipe)


@pytest.mark.parametrize("name", FOLDERS)
def test_quoted_text_is_read_back(tmp_path, name):
    path = tmp_path / "file.yaml"
    path.write_text(f"data: {{root: {quoted(name)}, dataset: {{format: packed}}}}\n", "utf-8")
    assert load_config(path).data.root == name


def test_a_key_is_text_and_a_list_is_none(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("2024: a\nno: {007: b}\n")
    assert read_settings(path).tree == {"2024": "a", "no": {"007": "b"}}
    assert read_yaml(path).tree == {2024: "a", False: {7: "b"}}, "that of a plug-in is YAML"
    path.write_text("a: &a {7: b, no: c}\nd: {<<: *a, no: e}\n")
    assert read_settings(path).tree["d"] == {"7": "b", "no": "e"}
    path.write_text("[a]: b\n")
    with pytest.raises(InputError, match=r"file\.yaml:1: .*a name is expected"):
        read_yaml(path)


def test_the_types_of_a_setting_are_those_of_all_members_of_its_unions():
    assert str in declared(Config, ["data", "dataset", "train"]), "a packed set's folder"
    assert str in declared(Config, ["data", "dataset", "classes", "0", "name"])
    assert declared(Config, ["train", "lr"]) == [float]
    assert declared(Config, ["train", "optimizer", "options", "x", "y"]) == []
    assert declared(Config, ["nothing", "such"]) == []


STUDY = """\
title: 2024-01-15
base: 007
columns: {val/AP: {title: 1e5}}
baseline: 2024
rows:
  2024: {settings: {data.root: 2024-01-15, data: {dataset: {train: {images: no, annotations: b}}}}}
  no: {title: yes, settings: {data.root: 1e5}}
profiles_from: 2025
"""


def test_a_study_and_its_profiles_are_read_as_written(tmp_path):
    (tmp_path / "007").write_text("train: {batch_size: 4}\n")
    (tmp_path / "008").write_text("train: {batch_size: 2}\n")
    profiles = "mini: {base: 008, settings: {train.init: 0x1F}, replace: {data.root: {1e5: '7'}}}\n"
    (tmp_path / "2025").write_text(profiles + "2026: {replace: {train.batch_size: {4: 8}}}\n")
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    study = load_study(path)
    assert (study.file.title, study.file.columns["val/AP"].title) == ("2024-01-15", "1e5")
    assert study.title("no") == "yes"
    first, second = study.runs["2024", ""], study.runs["no", ""]
    assert (first.data.root, first.data.dataset.train.images) == ("2024-01-15", "no")
    assert (second.data.root, second.train.batch_size) == ("1e5", 4)
    assert [trial.config.name for trial in study.trials("2024")] == ["2024"]
    assert load_study(path, ["profile=2026"]).profile == "2026"

    path.write_text(STUDY.replace("2024-01-15, data:", "1e5, data:"))
    mini = load_study(path, ["profile=mini", "plan.costs=set #2/costs.yaml", "plan.gpus=3"])
    assert (mini.base.train.batch_size, mini.base.train.init) == (2, "0x1F")
    assert mini.runs["no", ""].data.root == "7"
    options = PlanOptions.read(mini.options)
    assert (options.costs, options.gpus) == ("set #2/costs.yaml", 3)
