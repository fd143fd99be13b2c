"""A run that goes on from another's checkpoint: what it takes over, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from mpformer.config import Config, dump_yaml
from mpformer.data.records import Catalog, Record
from mpformer.model.architecture import build_model
from mpformer.model.weights import checkpoints
from mpformer.tracking.lineage import read_parent
from mpformer.tracking.progress import Follower
from mpformer.tracking.record import RecordWriter, read_metrics
from mpformer.train import checkpoint, extension
from mpformer.train.optim import build_optimizer
from mpformer.types import ClassTable, InputError

CLASSES = ClassTable.numbered(3)


def catalog(classes: ClassTable = CLASSES) -> Catalog:
    return Catalog("set train", classes, [Record(f"{i}", b"", 64, 64, ()) for i in range(8)], "")


def changed(config: Config, **settings) -> Config:
    """`train__length="9 steps"`: with these settings changed."""
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        section, *inner, last = key.split("__")
        node = tree[section]
        for name in inner:
            node = node[name]
        node[last] = value
    return Config.model_validate(tree)


@pytest.fixture
def parent(tmp_path, tiny_config) -> Path:
    """A run of four steps with checkpoints of step 2 and 4; the figures of step 2 are better."""
    run_dir = tmp_path / "first-0a1b2c3d-s0"
    run_dir.mkdir()
    config = changed(tiny_config, train__length="4 steps", train__keep={"best": "val/AP", "last": 2})
    (run_dir / "config.yaml").write_text(dump_yaml(config))
    model = build_model(config.model, CLASSES)
    optimizer = build_optimizer(model, config.train)
    writer = RecordWriter(run_dir, 0)
    for step, value in ((2, 30.0), (4, 20.0)):
        torch.nn.init.constant_(model.decoder.class_embed.bias, step)
        writer.add(step, {"train/loss": 9.0 - step, "val/AP": value})
        checkpoint.save(run_dir, step, model, optimizer, config, {"train_seconds": 1.5 * step, "skipped": []})
    writer.add(5, {"train/loss": 3.0})  # which no checkpoint covers
    return run_dir


def extended(config: Config, parent: Path | str, **settings) -> Config:
    return changed(config, train__length="9 steps", train__resume_from=str(parent), **settings)


def test_it_has_the_newest_checkpoint_the_record_and_its_parent_s_name(tmp_path, tiny_config, parent):
    run_dir = tmp_path / "second"
    config = extended(tiny_config, parent, train__lr=1e-5, train__ema=0.9, train__seed=0)
    begun = extension.begin(run_dir, config, catalog())
    assert (begun.step, begun.state["train_seconds"]) == (4, 6.0)
    assert checkpoints.latest(run_dir)[0] == begun
    shutil.rmtree(parent)  # it is not needed any more
    found, damaged = checkpoints.latest(run_dir)
    assert (found.path, damaged) == (run_dir / "checkpoints" / "step-00000004", [])
    assert read_metrics(run_dir) == [
        (2, {"train/loss": 7.0, "val/AP": 30.0}),
        (4, {"train/loss": 5.0, "val/AP": 20.0}),
    ]
    assert read_parent(run_dir).tags() == {"resumed_from": "first-0a1b2c3d-s0", "resumed_at_step": "4"}
    first_line = json.loads((run_dir / "metrics" / "0000.jsonl").read_text().splitlines()[0])
    assert (first_line["resumed_from"], first_line["resumed_at_step"]) == ("first-0a1b2c3d-s0", 4)


def test_whoever_follows_it_is_told_its_own_points_alone(tmp_path, tiny_config, parent):
    run_dir = tmp_path / "second"
    following = Follower("second s0", run_dir, 2)
    extension.begin(run_dir, extended(tiny_config, parent), catalog())
    RecordWriter(run_dir, 4).add(5, {"train/loss": 3.0})
    assert following.lines() == [
        "second s0  goes on from step 4 of first-0a1b2c3d-s0",
        "second s0  step 5  loss 3.000",
    ]
    assert [step for step, _ in read_metrics(run_dir)] == [2, 4, 5]


@pytest.mark.parametrize(
    ("place", "step"), [("{}", 4), ("{}@best", 2), ("{}@last", 4), ("{}/checkpoints/step-00000002", 2)]
)
def test_another_checkpoint_than_the_newest_is_asked_for(tmp_path, tiny_config, parent, place, step):
    config = extended(tiny_config, place.format(parent))
    assert extension.begin(tmp_path / "second", config, catalog()).step == step
    assert [s for s, _ in read_metrics(tmp_path / "second")] == [2, 4][: step // 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__decoder__queries": 7}, r"model\.decoder\.queries is 7 here and 6 in .*step-00000004: "),
        ({"model__loss__no_object_weight": 0.2}, r"model\.loss\.no_object_weight is 0\.2 here"),
        ({"train__batch_size": 4}, r"train\.batch_size is 4 here and 2 in "),
        ({"train__optimizer": "torch.optim:SGD"}, r"train\.optimizer"),
        ({"train__length": "4 steps"}, r"train\.length: 4 steps is 4 steps, and .* is already at step 4: "),
        ({"train__length": "1 epoch"}, r"train\.length: 1 epoch is 4 steps"),
        (
            {"train__resume_from": "{}x"},
            r"train\.resume_from: .*-s0x: no checkpoint: .*nearest: .*first-0a1b",
        ),
    ],
)
def test_what_cannot_go_on_is_refused_and_leaves_nothing(tmp_path, tiny_config, parent, settings, message):
    settings = {k: v.format(parent) if isinstance(v, str) else v for k, v in settings.items()}
    config = changed(extended(tiny_config, parent), **settings)
    with pytest.raises(InputError, match=message) as caught:
        extension.begin(tmp_path / "second", config, catalog())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "second").exists()


def test_the_pretrained_backbone_that_a_run_began_with_is_no_matter(tmp_path, tiny_config, parent):
    config = extended(tiny_config, parent, model__backbone__pretrained="default")
    assert extension.begin(tmp_path / "second", config, catalog()).step == 4


def test_other_classes_and_weights_without_a_run_are_refused(tmp_path, tiny_config, parent):
    with pytest.raises(InputError, match="class"):
        extension.begin(tmp_path / "second", extended(tiny_config, parent), catalog(ClassTable.numbered(4)))
    shutil.copytree(parent / "checkpoints" / "step-00000004", tmp_path / "alone")
    with pytest.raises(InputError, match=r"a checkpoint in the folder of one, is expected; train\.init"):
        extension.begin(tmp_path / "second", extended(tiny_config, tmp_path / "alone"), catalog())


def test_a_start_that_was_cut_off_begins_again(tmp_path, tiny_config, parent, monkeypatch):
    run_dir, config = tmp_path / "second", extended(tiny_config, parent)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            extension.begin(run_dir, config, catalog())
    assert checkpoints.complete(run_dir) == []
    assert extension.begin(run_dir, config, catalog()).step == 4
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]


def test_its_parent_is_part_of_its_identity():
    from mpformer.config import config_hash

    one, other = (Config.model_validate({"train": {"resume_from": place}}) for place in ("runs/a", "runs/b"))
    assert len({config_hash(one), config_hash(other), config_hash(Config())}) == 3
    assert yaml.safe_load(dump_yaml(one))["train"]["resume_from"] == "runs/a"
