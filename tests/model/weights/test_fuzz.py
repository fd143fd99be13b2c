"""Whatever the bytes and key trees of a file of weights are: one line, or the right tensors."""

import collections
import json
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from mpformer.model.weights.loading import import_weights, load_weights, read_metadata
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import InputError
from tests.model import weights_files as files
from tests.model.weights_files import LFS, TENSORS, cached_model, shard, torch_bytes

# fuzz: whatever the bytes and trees are, one line or the right tensors

FUZZ = settings(
    max_examples=300,
    derandomize=True,  # the same inputs every time
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


def one_line_or_result(call):
    """What a call returns; None where it refuses, in one line."""
    try:
        return call()
    except InputError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 2000
    return None


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


BASES = [
    save(TENSORS),
    torch_bytes({"model": TENSORS, "epoch": 3}),
    torch_bytes(TENSORS, _use_new_zipfile_serialization=False),
    pickle.dumps({"model": {k: v.numpy() for k, v in TENSORS.items()}}),
    pickle.dumps({k: v.numpy() for k, v in TENSORS.items()}, 2),
    LFS,
]

edits = st.lists(
    st.tuples(
        st.sampled_from(["set", "cut", "insert", "drop"]), st.integers(0, 1 << 20), st.binary(max_size=4)
    ),
    min_size=1,
    max_size=4,
)


def spoil(data: bytes, changes) -> bytes:
    for kind, at, new in changes:
        at %= len(data) + 1
        if kind == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        else:
            data = data[:at] + data[at + len(new) :]
    return data


@pytest.mark.slow
@FUZZ
@given(st.sampled_from(BASES), edits)
def test_fuzz_bytes(place, base, changes):
    (place / "a.pth").write_bytes(spoil(base, changes))
    tensors = one_line_or_result(lambda: read_tensors(place / "a.pth"))
    assert tensors is None or all(type(k) is str and isinstance(v, torch.Tensor) for k, v in tensors.items())


@pytest.mark.slow
@FUZZ
@given(st.binary(max_size=300))
def test_fuzz_any_bytes(place, data):
    (place / "b.pth").write_bytes(data)
    one_line_or_result(lambda: read_tensors(place / "b.pth"))


words = st.sampled_from(
    ["model", "module", "state_dict", "ema", "backbone", "decoder", "norm", "weight", "x", "", "."]
)
keys = st.one_of(
    words, st.lists(words, min_size=2, max_size=4).map(".".join), st.integers(0, 9), st.text(max_size=5)
)
leaves = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.sampled_from([torch.ones(2, 2), torch.ones(()), torch.zeros(0), torch.ones(2, dtype=torch.int8),
                     torch.full((2,), float("nan")), torch.ones(2, dtype=torch.complex64)]),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=5)),
    max_leaves=15,
)


@pytest.mark.slow
@FUZZ
@given(trees, st.sampled_from(["load", "import"]))
def test_fuzz_key_trees(place, tree, use):
    torch.save(tree, place / "c.pth")
    if use == "import":
        assert one_line_or_result(lambda: import_weights(place / "c.pth", place / "c.safetensors")) is None
        assert not (place / "c.safetensors").exists()
        return
    model = torch.nn.Sequential(collections.OrderedDict(norm=torch.nn.Linear(2, 2)))
    report = one_line_or_result(lambda: load_weights(model, place / "c.pth"))
    assert report is None or set(report.loaded) <= {"norm.weight", "norm.bias"}


jsons = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 10**12), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
SETTINGS = [
    *("model_type", "id2label", "backbone_config", "encoder_layers", "decoder_layers", "feature_size"),
    *("num_queries", "num_attention_heads", "encoder_feedforward_dim", "dim_feedforward", "dropout"),
    *("class_weight", "train_num_points", "oversample_ratio", "importance_sample_ratio", "pre_norm"),
    *("backbone_config.depths", "backbone_config.layer_type", "backbone_config.model_type"),
]


@pytest.mark.slow
@settings(FUZZ, max_examples=200)
@given(st.dictionaries(st.sampled_from(SETTINGS), jsons, min_size=1, max_size=3), st.booleans())
def test_fuzz_settings(place, changes, remove):
    folder = place / "hf"
    if not folder.exists():
        files.write_folder(folder, cached_model())
        (folder / "config.json").rename(folder / "whole.json")
    content = json.loads((folder / "whole.json").read_text())
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = content
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
            if remove:
                del section[last]
    (folder / "config.json").write_text(json.dumps(content))
    report = one_line_or_result(lambda: import_weights(folder, place / "d.safetensors"))
    assert report is None or report.reinitialized == ()


@pytest.mark.slow
@settings(FUZZ, max_examples=200)
@given(
    st.sampled_from(["config.json", "model.safetensors.index.json"]),
    edits,
    st.binary(max_size=40),
    st.booleans(),
)
def test_fuzz_json_files(place, name, changes, other, replace):
    folder = place / "shards"
    if not folder.exists():
        files.write_folder(folder, cached_model())
        shard(folder)
        files.copy_of(folder, place / "whole")
    data = (place / "whole" / name).read_bytes()
    (folder / name).write_bytes(other if replace else spoil(data, changes))
    try:
        report = one_line_or_result(lambda: import_weights(folder, place / "e.safetensors"))
        assert report is None or report.reinitialized == ()
    finally:
        (folder / name).write_bytes(data)


@pytest.mark.slow
@FUZZ
@given(st.dictionaries(st.sampled_from(["format", "config", "classes"]), st.text(max_size=30)), jsons, jsons)
def test_fuzz_headers(place, raw, config, classes):
    header = {"format": "mpformer-1", "config": json.dumps(config), "classes": json.dumps(classes), **raw}
    save_file(TENSORS, place / "f.safetensors", {k: v for k, v in header.items() if "\0" not in v})
    one_line_or_result(lambda: read_metadata(place / "f.safetensors"))


FAULTS = ["drop", "rename", "reshape", "integers", "nan", "empty", "wrap", "number", "extra"]


def spoil_tensor(tensors, name, fault):
    value = tensors.pop(name)
    if fault == "rename":
        tensors[name.replace("weight", "wieght").replace("bias", "baias")] = value
    elif fault == "wrap":
        tensors[f"module.{name}"] = value
    elif fault == "extra":
        tensors |= {name: value, f"{name}_extra": value.clone()}
    elif fault != "drop":
        tensors[name] = {
            "reshape": value.flatten()[None],
            "integers": torch.zeros(value.shape, dtype=torch.int8),
            "nan": torch.full(value.shape, float("nan")),
            "empty": value.flatten()[:0],
            "number": torch.tensor(1.0),
        }[fault]


faults = st.lists(st.tuples(st.sampled_from(FAULTS), st.integers(0, 10**6)), min_size=1, max_size=4)


@pytest.mark.slow
@settings(FUZZ, max_examples=50)
@given(faults, st.sampled_from(["", "model.", "module.model.", "odd."]), st.booleans())
def test_fuzz_models(place, changes, prefix, as_start):
    """A model with faults in single tensors is the whole model, or is refused and changes nothing."""
    folder, model = place / "models", cached_model()
    if not folder.exists():
        files.write_folder(folder, model)
        (folder / "model.safetensors").rename(folder / "whole")
    tensors = dict(model.state_dict()) if as_start else load_file(folder / "whole")
    for fault, number in changes:
        spoil_tensor(tensors, list(tensors)[number % len(tensors)], fault)
    save_file({prefix + k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
    (place / "g.safetensors").unlink(missing_ok=True)
    wanted = model.state_dict()
    if not as_start:
        one_line_or_result(lambda: import_weights(folder, place / "g.safetensors"))
        if (place / "g.safetensors").exists():
            assert files.same(load_file(place / "g.safetensors"), wanted)
        return
    start = files.small_model(seed=1)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    report = one_line_or_result(lambda: load_weights(start, folder / "model.safetensors"))
    for name, tensor in start.state_dict().items():
        source = wanted if report is not None and name in report.loaded else before
        assert torch.equal(tensor, source[name]), name
