"""Checkpoints: bit-equal going on, atomic, damage found, nothing lost on a full disk."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpformer.config import Plugin, Train
from mpformer.model.architecture import build_model
from mpformer.model.weights import checkpoints
from mpformer.model.weights.loading import (
    checkpoint_metadata,
    load_checkpoint,
    load_weights,
    normalized_as,
)
from mpformer.train import checkpoint
from mpformer.train.optim import build_optimizer
from mpformer.train.step import train_step
from mpformer.train.timing import Timers
from mpformer.types import PIXEL_MEAN, PIXEL_STD, InputError, RunError
from tests.train.conftest import make_batch

STATE = {"train_seconds": 1.5, "skipped": ["a line"]}


def _start(config, seed=0):
    torch.manual_seed(seed)
    model = build_model(config.model, 3).train()
    return model, build_optimizer(model, config.train)


def _step(model, optimizer, config, number):
    batch = make_batch([2, 1], first=2 * number)
    return train_step(model, optimizer, batch, config, Timers(), classes=3)


@pytest.mark.parametrize(
    "optimizer",
    [
        "adamw",
        *(
            pytest.param(optimizer, marks=pytest.mark.slow)
            for optimizer in (
                "torch.optim:AdamW",  # its step number stays on the host
                Plugin(kind="torch.optim:SGD", options={"momentum": 0.9, "nesterov": True}),
                "torch.optim:NAdam",
                "torch.optim:Adafactor",
                "tests.plugins.optimizers:NumberedSGD",  # numbers in its state
            )
        ),
    ],
    ids=lambda o: o if isinstance(o, str) else o.kind,
)
def test_going_on_from_a_checkpoint_is_bit_equal(tmp_path, tiny_config, optimizer):
    train = {**tiny_config.train.model_dump(), "optimizer": optimizer}
    tiny_config = tiny_config.model_copy(update={"train": Train.model_validate(train)})
    model, optimizer = _start(tiny_config)
    for number in range(2):
        _step(model, optimizer, tiny_config, number)
    checkpoint.save(tmp_path, 2, model, optimizer, tiny_config, STATE)
    for number in range(2, 4):
        _step(model, optimizer, tiny_config, number)

    other, other_optimizer = _start(tiny_config, seed=99)
    found, damaged = checkpoints.latest(tmp_path)
    assert (found.step, damaged, found.state["skipped"]) == (2, [], ["a line"])
    checkpoint.restore(found, other, other_optimizer)
    for number in range(2, 4):
        _step(other, other_optimizer, tiny_config, number)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_newest_are_kept_and_the_file_alone_is_a_model(tmp_path, tiny_config):
    model, optimizer = _start(tiny_config)
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, model, optimizer, tiny_config, STATE)
    assert [p.name for p in checkpoints.complete(tmp_path)] == ["step-00000003", "step-00000004"]
    loaded, config = load_checkpoint(tmp_path)
    # with the normalisation of its images, which belongs to its weights
    assert config == tiny_config.model_copy(
        update={"model": tiny_config.model.with_backbone(mean=PIXEL_MEAN, std=PIXEL_STD)}
    )
    assert loaded.classes == model.classes
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(image).heads[-1].mask_logits, model(image).heads[-1].mask_logits)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, tiny_config, file):
    model, optimizer = _start(tiny_config)
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizer, tiny_config, STATE)
    broken = tmp_path / "checkpoints" / "step-00000002" / file
    broken.write_bytes(broken.read_bytes()[:-7])
    found, damaged = checkpoints.latest(tmp_path)
    assert found.step == 1
    assert len(damaged) == 1
    assert "step-00000002" in damaged[0]


def test_evaluation_reads_the_checkpoint_that_training_would_go_on_from(tmp_path, tiny_config, caplog):
    model, optimizer = _start(tiny_config)
    saved = []
    for step in (1, 2):
        torch.nn.init.constant_(model.decoder.class_embed.bias, step)
        saved.append(checkpoint.save(tmp_path, step, model, optimizer, tiny_config, STATE).path)
    optimizer_file = saved[1] / "optimizer.safetensors"
    optimizer_file.write_bytes(optimizer_file.read_bytes()[:-1])  # the weights themselves are intact
    loaded, _ = load_checkpoint(tmp_path)
    assert (loaded.decoder.class_embed.bias == checkpoints.latest(tmp_path)[0].step).all()
    assert "step-00000002" in caplog.text

    with pytest.raises(InputError, match=r"step-00000002.*damaged"):
        load_checkpoint(saved[1])  # asked for by name: no other is taken instead
    (saved[0] / "state.json").unlink()
    with pytest.raises(InputError, match="no undamaged checkpoint"):
        load_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, tiny_config, monkeypatch):
    model, optimizer = _start(tiny_config)
    checkpoint.save(tmp_path, 1, model, optimizer, tiny_config, STATE)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"step-00000002.*No space left"):
        checkpoint.save(tmp_path, 2, model, optimizer, tiny_config, STATE)
    monkeypatch.undo()
    assert checkpoints.latest(tmp_path)[0].step == 1
    checkpoint.save(tmp_path, 2, model, optimizer, tiny_config, STATE)
    assert checkpoints.latest(tmp_path)[0].step == 2
    assert not list((tmp_path / "checkpoints").glob(".partial*"))


def test_no_pickle_anywhere(tmp_path, tiny_config):
    model, optimizer = _start(tiny_config)
    _step(model, optimizer, tiny_config, 0)
    saved = checkpoint.save(tmp_path, 1, model, optimizer, tiny_config, STATE)
    for file in saved.path.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            # it begins with the length of its JSON header
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        json.loads(content)


def test_weights_of_another_model_are_refused(tmp_path, tiny_config):
    model, optimizer = _start(tiny_config)
    saved = checkpoint.save(tmp_path, 1, model, optimizer, tiny_config, STATE)
    other = build_model(tiny_config.model, 5)
    with pytest.raises(InputError, match="another model"):
        checkpoint.restore(saved, other, build_optimizer(other, tiny_config.train))
    report = load_weights(other, saved.path)
    assert set(report.reinitialized) == {
        "decoder.class_embed.weight",
        "decoder.class_embed.bias",
        "decoder.pilot_embed.weight",
    }


@pytest.mark.parametrize("content", [None, b"not safetensors at all"])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, content):
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_run_keeps_the_normalisation_that_its_weights_were_trained_with(tmp_path, tiny_config):
    own = tiny_config.model.with_backbone(mean=(127.5,) * 3, std=(127.5,) * 3)
    model, optimizer = _start(tiny_config.model_copy(update={"model": own}))
    file = checkpoint.save(tmp_path, 1, model, optimizer, tiny_config, STATE).path / checkpoints.MODEL_FILE
    again = build_model(normalized_as(file, tiny_config.model), model.classes)
    assert again.pixel_mean.flatten().tolist() == again.pixel_std.flatten().tolist() == [127.5] * 3
    assert load_checkpoint(file)[0].pixel_mean.flatten().tolist() == [127.5] * 3
    # a file from before it was noted: whatever the backbone's weights, it was ImageNet's
    old = tmp_path / "old.safetensors"
    header = checkpoint_metadata(tiny_config, model.classes)
    save_file(model.state_dict(), old, header)
    pretrained = tiny_config.model.with_backbone(name="tf_efficientnet_lite0", pretrained="in1k")
    assert normalized_as(old, pretrained).backbone.pretrained is None
    assert build_model(normalized_as(old, tiny_config.model), 2).config.backbone.mean == PIXEL_MEAN
