"""Weights by name: of the catalogue, a hub, by URL; fetched once, with classes and test size."""

import hashlib
import json
import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import mpformer
from mpformer.cli.checkpoints import _origin
from mpformer.cli.main import main
from mpformer.config import Config, load_config
from mpformer.config import data as settings
from mpformer.config.shipped import experiments
from mpformer.model.weights.catalogue import NamedWeights, Release, named_weights
from mpformer.model.weights.loading import (
    checkpoint_metadata,
    load_checkpoint,
    load_weights,
    weights_file,
)
from mpformer.model.weights.named import Remote, is_remote
from mpformer.train.launch import _start_weights
from mpformer.train.worker import _build_model
from mpformer.types import ClassTable, InputError, RunError
from tests.model import weights_files as files
from tests.model.weights import hub_server
from tests.servers import closed_port

NAME = "small-coco-instance"


@pytest.fixture(scope="module")
def small():
    """A small model of COCO's 80 classes."""
    return files.small_model(names=named_weights()["mask2former-r50-coco-instance"].classes().names)


@pytest.fixture(scope="module")
def published(small, tmp_path_factory):
    """It as a Hugging Face folder and as a file of ours."""
    folder = tmp_path_factory.mktemp("published")
    files.write_folder(folder / "hf", small)
    files.save_ours(small, folder / "ours.safetensors")
    return folder


@pytest.fixture
def hub(published, monkeypatch, tmp_path):
    """A hub with the small model, which the catalogue has, too; an empty cache."""
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with hub_server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add_folder("owner/small", published / "hf")
        running.plain["ours.safetensors"] = (published / "ours.safetensors").read_bytes()
        small = NamedWeights(
            NAME,
            Release("Tests", "none", "nowhere"),
            "coco-instance-r50",
            {"AP": 43.7},
            repository="owner/small",
            settings=("data.test_resize={short: 64, long: 96}",),
        )
        everything = {**named_weights(), NAME: small}
        for module in ("model.weights.catalogue", "model.weights.named", "cli.checkpoints", "cli.weights"):
            monkeypatch.setattr(f"mpformer.{module}.named_weights", lambda: everything)
        yield running


# --- names ----------------------------------------------------------------------------------------


def test_a_name_is_weights_classes_and_test_size(hub, small):
    model = mpformer.load(NAME)
    assert not model.training
    assert files.same(dict(small.state_dict()), dict(model.state_dict()))
    assert model.classes.names[:3] == ("person", "bicycle", "car")
    assert [info.source_id for info in model.classes.classes][-2:] == [89, 90]  # COCO's ids, not 0 to 79
    assert model.settings.data.test_resize == settings.TestResize(short=64, long=96)
    assert model.settings.data.task == "instance"


def test_it_is_fetched_once_and_then_found_without_a_server(hub, tmp_path, caplog):
    first = weights_file(NAME)
    assert f"{NAME}: " in caplog.text
    asked = len(hub.requests)
    hub.fails = 503
    assert weights_file(NAME) == first
    assert len(hub.requests) == asked
    assert first.is_relative_to(tmp_path / "cache")
    left = {path.name for path in first.parent.iterdir()}
    assert left == {f"{NAME}.safetensors", ".lock"}  # the download itself is not kept beside it


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", NAME, "--data", "coco"],
        ["diagnose", NAME],
        ["predict", NAME, "image.jpg", "--out", "out"],
        ["weights", "export", NAME, "out"],
        ["train", "coco-tiny", f"train.init={NAME}"],
    ],
    ids=lambda command: command[0],
)
def test_without_a_network_it_is_one_line_in_seconds(hub, monkeypatch, capsys, command):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    start = time.monotonic()
    assert main(command) == 1
    assert time.monotonic() - start < 5
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "127.0.0.1 is not reachable: Connection refused" in line


def test_a_hub_s_repository_by_its_own_name(hub, small, caplog):
    commit, _ = hub.repositories["owner/small@main"]
    for text in ("hf:owner/small", f"hf:owner/small@{commit}"):
        model = mpformer.load(text)
        assert files.same(dict(small.state_dict()), dict(model.state_dict()))
        assert model.classes.names == small.classes.names
        assert [info.source_id for info in model.classes.classes] == list(range(80))
        assert model.settings.data.test_resize == settings.TestResize(short=800, long=1333)


def test_a_url_of_a_file_of_ours_is_used_as_it_is(hub, published):
    file = weights_file(f"{hub.url}/files/ours.safetensors?download=1")
    assert file.read_bytes() == (published / "ours.safetensors").read_bytes()
    assert file.name == "ours.safetensors"


@pytest.mark.slow
def test_a_url_of_an_official_file_is_imported(hub):
    official = files.official()
    hub.plain["model_final.pkl"] = files.torch_bytes({"model": official})
    model = mpformer.load(f"{hub.url}/files/model_final.pkl")
    assert model.classes == ClassTable.numbered(3)
    key = "sem_seg_head.predictor.query_feat.weight"
    assert torch.equal(model.state_dict()["decoder.query_feat.weight"], official[key])


def test_what_is_no_weights_is_named_by_its_url_and_not_kept(hub, published):
    url = f"{hub.url}/files/page.pkl"
    hub.plain["page.pkl"] = b"<!doctype html><html>log in</html>"
    files.refused(lambda: mpformer.load(url), url, "is a web page")
    hub.plain["page.pkl"] = (published / "ours.safetensors").read_bytes()
    mpformer.load(url)  # not the page again


def test_the_digest_of_the_catalogue_is_checked_of_a_hub_s_file_too(hub, published, monkeypatch):
    everything = dict(named_weights())
    for module in ("catalogue", "named"):
        monkeypatch.setattr(f"mpformer.model.weights.{module}.named_weights", lambda: everything)

    def state(digest: str) -> None:
        everything[NAME] = replace(everything[NAME], sha256=digest)

    everything[NAME] = NamedWeights(
        NAME, Release("Tests", "none", "nowhere"), "coco-instance-r50", {"AP": 43.7}, repository="owner/small"
    )
    state("0" * 64)
    with pytest.raises(RunError, match=r"model\.safetensors: what came .* SHA256 begins with .*, not 0{16}"):
        weights_file(NAME)
    weights = (published / "hf" / "model.safetensors").read_bytes()
    state(hashlib.sha256(weights).hexdigest())
    assert weights_file(NAME).is_file()
    shards = {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "b"}}', "b": b""}
    hub.add("owner/small", shards)
    state("1" * 64)
    files.refused(lambda: weights_file(NAME), "its weights are in shards, and one file of a known SHA-256")


def test_the_classes_of_a_name_have_to_be_those_of_the_file(hub, tmp_path):
    hub.add_folder("owner/small", files.write_folder(tmp_path / "three", files.small_model()))
    files.refused(lambda: weights_file(NAME), NAME, "3 classes", "80")


# --- what is a name, and what a path ---------------------------------------------------------------


def test_a_file_or_folder_of_that_name_wins(hub, published, tmp_path):
    os.symlink(published / "ours.safetensors", tmp_path / NAME)
    assert not is_remote(NAME)
    assert weights_file(NAME) == (tmp_path / NAME).relative_to(tmp_path)
    (tmp_path / "mp-former-r50-coco-instance-12ep").mkdir()
    files.refused(
        lambda: weights_file("mp-former-r50-coco-instance-12ep"),
        "no checkpoint",
        "it hides the weights of that",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "mask2former-r50-coco-instanse",
            "nearest of `mpformer weights list`: mask2former-r50-coco-instance",
        ),
        ("hf:owner", "hf:OWNER/NAME or hf:OWNER/NAME@REVISION is expected"),
        ("ftp://host/file.pkl", "by http and https, not by ftp"),
        ("https:///file.pkl", "is no URL"),
        ("https://host/a b.pkl", "is no URL"),
        ("https://me:hunter2@host/file.pkl", "https://host/file.pkl: a URL of weights holds no password"),
    ],
)
def test_a_wrong_name_is_one_line(hub, text, expected, capsys):
    line = files.refused(lambda: mpformer.load(text), expected)
    assert "hunter2" not in line
    assert main(["diagnose", text]) == 2
    assert hub.requests == []


def test_a_secret_is_refused_before_a_run_has_a_folder(hub, tmp_path):
    from mpformer.train.launch import fit

    config = load_config("coco-tiny", [f"data.root={tmp_path}", f"storage={tmp_path}/runs"])
    secret = config.train.model_copy(update={"init": "https://me:hunter2@host/f"})
    files.refused(lambda: fit(config.model_copy(update={"train": secret})), "holds no password")
    assert not (tmp_path / "runs").exists()


def test_a_file_of_ours_that_names_code_is_refused(hub, tmp_path):
    model = files.small_model()
    config = Config.model_validate(
        {"data": {"dataset": {"format": "shutil:rmtree"}, "root": str(tmp_path)}}
    ).model_copy(update={"model": model.config})
    save_file(model.state_dict(), tmp_path / "evil.safetensors", checkpoint_metadata(config, model.classes))
    hub.plain["evil.safetensors"] = (tmp_path / "evil.safetensors").read_bytes()
    files.refused(
        lambda: mpformer.load(f"{hub.url}/files/evil.safetensors"), "data.dataset", "shutil:rmtree", "refused"
    )


def test_another_hub_s_repository_is_another_one(hub, monkeypatch):
    here = Remote.parse("hf:owner/small").file
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    assert Remote.parse("hf:owner/small").file != here


# --- as a start of training -----------------------------------------------------------------------


def test_a_run_starts_from_a_name(hub, small, published):
    config = Config(model=small.config, train={"init": NAME})
    told = _start_weights(NAME)
    assert told == NAME  # each machine has a cache of its own
    assert _start_weights(str(published / "ours.safetensors")) == (published / "ours.safetensors").resolve()
    model, report = _build_model(SimpleNamespace(config=config, init=told), small.classes, begun=None)
    assert files.same(dict(small.state_dict()), dict(model.state_dict()))
    assert report.startswith(f"{NAME}\n")


def test_other_classes_are_said(hub, caplog):
    model = files.small_model(seed=3)  # cat, dog, bird
    before = {k: v.clone() for k, v in model.state_dict().items() if "class_embed" in k}
    report = load_weights(model, NAME)
    said = "it has 80 classes, the model 3: the class head is left as it was initialised"
    assert said in str(report).splitlines()
    assert said in caplog.text
    assert set(report.reinitialized) == set(before)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_other_names_of_as_many_classes_are_said_with_the_first_of_them(tmp_path, caplog):
    file = files.save_ours(files.small_model(names=("cat", "cow", "bird")), tmp_path / "a.safetensors")
    said = "its class 1 is 'cow', the model's is 'dog': the class head is left as it was initialised"
    assert said in load_weights(files.small_model(), file).notes
    assert said in caplog.text


# --- the catalogue --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named_weights())
def test_every_entry_is_complete(name):
    """Its recipe is there, has a figure for the task, and classes that the evaluation of its data can use."""
    weights = named_weights()[name]
    config = weights.config()
    main_metric = {"instance": "AP", "panoptic": "PQ", "semantic": "mIoU"}[config.data.task]
    assert next(iter(weights.figures)) == main_metric
    assert all(0 < value < 100 for value in weights.figures.values())
    assert bool(weights.file) != bool(weights.repository)
    remote = Remote.parse(name)
    assert remote is not None
    if weights.file:
        assert re.fullmatch(r"https://[\w./-]+\.(pkl|pth)", weights.url)
        if weights.release.md5_in_name:
            assert weights.md5_start is not None
            assert weights.url.endswith(f"_{weights.md5_start}.pkl")
    elif weights.revision != "main":
        assert re.fullmatch(r"[0-9a-f]{40}", weights.revision)
    assert len(weights.classes()) == CLASSES[config.data.dataset.name, config.data.task]


CLASSES = {
    ("coco", "instance"): 80,
    ("coco-panoptic", "panoptic"): 133,
    ("cityscapes", "instance"): 8,
    ("cityscapes", "panoptic"): 19,
    ("cityscapes", "semantic"): 19,
    ("ade20k-panoptic", "instance"): 100,
    ("ade20k-panoptic", "panoptic"): 150,
    ("ade20k-semantic", "semantic"): 150,
    ("ade20k-full", "semantic"): 847,
    ("mapillary-v1.2-panoptic", "panoptic"): 65,
    ("mapillary-v1.2-semantic", "semantic"): 65,
    ("coco-stuff-10k", "semantic"): 171,
}
"""As the papers give them."""


def test_names_say_what_they_stand_for():
    for name, weights in named_weights().items():
        task, data = weights.config().data.task, weights.config().data.dataset.name
        assert task in name or data in ("ade20k-full", "coco-stuff-10k") or name.endswith("-12ep"), name
        assert data.split("-")[0] in name, name
        if weights.file and weights.release.url.endswith("mask2former/"):
            folder, kind = weights.file.split("/")[:2]
            assert folder.split("_")[0] in name, name
            assert kind in name, name


def test_the_classes_of_coco_are_those_of_its_files(sample_data):
    file = sample_data / "coco_panoptic_sample" / "panoptic_coco_categories.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    listed = [(c["id"], c["name"], bool(c["isthing"])) for c in json.loads(file.read_text())]
    own = named_weights()["mask2former-r50-coco-panoptic"].classes()
    assert [(c.source_id, c.name, c.is_thing) for c in own.classes] == listed
    things = named_weights()["mask2former-r50-coco-instance"].classes()
    assert [(c.source_id, c.name, c.is_thing) for c in things.classes] == [c for c in listed if c[2]]


def test_published_figures_are_those_of_the_recipes_that_name_them():
    """Two places of the checkout that state the same figure of the papers."""
    for name, figure in (("mask2former-r50-coco-instance", 43.7), ("maskformer-r50-coco-panoptic", 46.5)):
        weights = named_weights()[name]
        text = (experiments() / "recipes" / f"{weights.recipe}.yaml").read_text()
        assert f"{figure} " in text.partition("\nmodel:")[0].partition("\nbase:")[0]
        assert figure in weights.figures.values()


def test_the_list_has_every_name_its_source_licence_and_figure(hub, capsys):
    weights_file(NAME)
    assert main(["weights", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, weights in named_weights().items():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        assert weights.source in line
        assert all(f"{metric} {value}" in line for metric, value in weights.figures.items())
        assert "in the cache" not in line
    assert sum("CC BY-NC 4.0" in line for line in lines) >= 2
    [cached] = [line for line in lines if "in the cache" in line]
    assert cached.split()[0] == NAME


# --- the one command that shows a published figure again ---------------------------------------------


def test_evaluate_takes_a_name_and_shows_the_published_figure_beside_its_own(
    hub, sample_data, capsys, tmp_path
):
    """On real annotations, which have COCO's ids; the figures are those of the same weights from a file."""
    coco = sample_data / "tiny_coco"
    if not coco.is_dir():
        pytest.skip(f"no {coco}")
    options = ["evaluate.limit=2", "evaluate.pictures=1", "evaluate.layers=false"]
    assert main(["evaluate", NAME, "--data", str(coco), *options]) == 0
    out = capsys.readouterr().out
    figures = dict(re.findall(r"^((?:published )?AP) +([\d.]+)$", out, re.MULTILINE))
    assert figures["published AP"] == "43.70"
    # results go where the user is, not into the cache
    pages = list(tmp_path.glob(f"runs/{NAME}/pictures/*/*.html"))
    assert len(pages) == 1
    assert not list((tmp_path / "cache").rglob("*.html"))

    # the hub's own name tells names, but neither ids nor this test size
    sizes = "data.test_resize={short: 64, long: 96}"
    assert main(["evaluate", "hf:owner/small", "--data", str(coco), *options, sizes]) == 0
    again = capsys.readouterr().out
    assert "classes: those of coco val, in their order" in again
    assert dict(re.findall(r"^(AP) +([\d.]+)$", again, re.MULTILINE)) == {"AP": figures["AP"]}


def test_models_of_one_last_name_have_pages_of_their_own(hub, published):
    """Of two owners, two commits and a URL; that of the catalogue keeps its name."""
    hub.add_folder("other/small", published / "hf")
    commit, _ = hub.repositories["owner/small@main"]
    hub.plain["small.safetensors"] = (published / "ours.safetensors").read_bytes()
    texts = [
        "hf:owner/small",
        "hf:other/small",
        f"hf:owner/small@{commit}",
        f"{hub.url}/files/small.safetensors",
    ]
    origins = [_origin(text) for text in [*texts, NAME]]
    assert len({origin.folder for origin in origins}) == 5
    assert all(re.fullmatch(r"small-[0-9a-f]{6}", origin.name) for origin in origins[:4])
    assert (origins[4].name, origins[4].folder.as_posix()) == (NAME, f"runs/{NAME}")


def test_files_of_one_stem_have_pages_of_their_own(published, tmp_path):
    for name in ("a.safetensors", "a.best"):
        (tmp_path / name).write_bytes((published / "ours.safetensors").read_bytes())
    pages = [
        _origin(str(tmp_path / name)).pictures("evaluate", "coco val", "", False).name
        for name in ("a.safetensors", "a.best")
    ]
    assert pages == ["evaluate-a-coco-val", "evaluate-a.best-coco-val"]


def test_classes_that_differ_are_not_taken_over(sample_data, capsys, tmp_path):
    file = files.save_ours(files.small_model(), tmp_path / "three.safetensors")
    coco = sample_data / "tiny_coco"
    if not coco.is_dir():
        pytest.skip(f"no {coco}")
    assert main(["evaluate", str(file), "--data", str(coco)]) == 2
    assert "need the same category table" in capsys.readouterr().err


def test_a_damaged_file_in_the_cache_is_named(hub):
    file = weights_file(NAME)
    file.write_bytes(file.read_bytes()[:1000])
    files.refused(lambda: load_checkpoint(NAME), str(file), "cut short or damaged")


def test_a_cache_that_cannot_be_written_is_one_line(hub, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPFORMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"the cache cannot be written.*MPFORMER_CACHE"):
        weights_file(NAME)


def test_an_unknown_name_is_an_error_of_the_input():
    with pytest.raises(InputError, match="no checkpoint"):
        mpformer.load("nothing-like-it")
