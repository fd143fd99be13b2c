"""Files that hold no weights: each is one line that names the file and says what it is; none runs code."""

import collections
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mpformer.model.weights.checkpoints import read
from mpformer.model.weights.loading import import_weights, load_checkpoint, load_weights
from mpformer.model.weights.tensorfile import read_tensors
from mpformer.types import RunError
from tests.model import weights_files as files
from tests.model.weights_files import LFS, TENSORS, cached_model, refused, shard, torch_bytes


def zip_bytes(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO(b""))
    return stream.getvalue()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


BROKEN = {
    "LFS pointer": (LFS, "is a Git LFS pointer, not the file itself (176035123 bytes): run `git lfs pull`"),
    "LFS pointer, cut": (LFS[:30], "is a Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "is a web page (HTML)"),
    "web page, odd": (b"\xef\xbb\xbf\n  <HTML>", "is a web page (HTML)"),
    "XML error of a bucket": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied',
        "is XML, such as the error message of a bucket",
    ),
    "empty": (b"", "is empty (0 bytes)"),
    "JSON": (b'{"error": "not found"}', "is text, not weights"),
    "message": (b"Access denied", "is text, not weights: 'Access denied'"),
    "text with umlauts": ("Zugriff verweigert für Öffentliche".encode(), "is text, not weights"),
    "one byte": (b"\x80", "is cut short or damaged"),
    "zeros": (bytes(4096), "is damaged, or no file of weights"),
    "gzip": (gzip.compress(torch_bytes(TENSORS)), "is a gzip archive: unpack it first"),
    "tar": (tar_bytes(), "is a tar archive: unpack it first"),
    "zip of a file": (zip_bytes(**{"model.pth": b"x"}), "is a zip archive, not a file of torch: unpack it"),
    "zip of nothing": (zip_bytes(), "it holds nothing"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is a PNG image"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
    "safetensors, cut in the header": (save(TENSORS)[:40], "is cut short or damaged"),
    "safetensors, cut in the data": (save(TENSORS)[:-3], "is cut short or damaged"),
    "safetensors, longer": (save(TENSORS) + b"xx", "is cut short or damaged"),
    "safetensors without tensors": (save({}), "holds no named tensors"),
    "torch, cut": (torch_bytes(TENSORS)[:-100], "is cut short or damaged"),
    "torch, cut to the start": (torch_bytes(TENSORS)[:64], "is cut short or damaged"),
    "old torch, cut": (torch_bytes(TENSORS, _use_new_zipfile_serialization=False)[:-9], "is cut short"),
    "torch of one tensor": (torch_bytes(torch.ones(3)), "holds no named tensors but a Tensor"),
    "torch of a list": (torch_bytes([torch.ones(3)]), "holds no named tensors but a list"),
    "torch of numbers": (torch_bytes({"epoch": 3}), "holds no named tensors"),
    "torch of sparse tensors": (
        torch_bytes({"a.w": torch.eye(3).to_sparse()}),
        "'a.w' is torch.sparse_coo on",
    ),
    "torch of a module": (torch_bytes(torch.nn.Linear(2, 2)), "it needs code to be read (torch.nn.modules"),
    "pickle of a path": (
        pickle.dumps({"a": collections.Counter()}),
        "it needs code to be read (collections.",
    ),
    "pickle of text": (pickle.dumps({"a": "b"}), "holds no named tensors"),
    "pickle of arrays, cut": (pickle.dumps({"a": np.ones(9)})[:-20], "is cut short or damaged"),
    "the same name twice": (torch_bytes({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}), "'a.b' twice"),
    "array": (b"\x93NUMPY\x01\x00" + bytes(99), "is a NumPy array"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_file_is_instead_is_said_wherever_it_is_given(kind, tmp_path):
    content, expected = BROKEN[kind]
    for suffix in (".safetensors", ".pth", ".pkl", ".bin"):  # names say nothing
        file = tmp_path / f"weights{suffix}"
        file.write_bytes(content)
        refused(lambda file=file: read_tensors(file), str(file), expected)
    file = tmp_path / "weights.pth"
    refused(lambda: import_weights(file, tmp_path / "out.safetensors"), str(file), expected)
    refused(lambda: load_weights(torch.nn.Linear(3, 2), file), str(file), expected)
    refused(lambda: load_checkpoint(file), str(file))
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", [k for k, (content, _) in BROKEN.items() if len(content) < 5000])
def test_a_hugging_face_folder_with_a_broken_file_names_it(kind, tmp_path):
    content, expected = BROKEN[kind]
    folder = files.write_folder(tmp_path / "hf", cached_model())
    (folder / "model.safetensors").write_bytes(content)
    refused(lambda: import_weights(folder, tmp_path / "out.safetensors"), "model.safetensors", expected)
    (folder / "config.json").write_bytes(content)
    refused(lambda: import_weights(folder, tmp_path / "out.safetensors"), str(folder / "config.json"))


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pth", ".model"])
def test_formats_are_told_from_the_content(options, suffix, tmp_path):
    arrays = {k: v.numpy() for k, v in TENSORS.items()}
    for content in (
        torch_bytes(TENSORS, **options),
        save(TENSORS),
        pickle.dumps(arrays),
        pickle.dumps(arrays, 2),
    ):
        (tmp_path / f"a{suffix}").write_bytes(content)
        assert files.same(read_tensors(tmp_path / f"a{suffix}"), TENSORS)


def test_arrays_of_odd_kinds(tmp_path):
    odd = {
        "big endian": np.arange(3, dtype=">f4"),
        "reversed": np.arange(3.0)[::-1],
        "column order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "number": np.array(5),
        "words": np.array(["a", "b"]),
        "objects": np.array([None, {}], dtype=object),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(odd))
    tensors = read_tensors(tmp_path / "a.pkl")
    assert set(tensors) == {"big endian", "reversed", "column order", "number"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), odd[name])


def test_a_dictionary_that_holds_itself_is_opened_once(tmp_path):
    content = dict(TENSORS)
    content |= {f"again {i}": content for i in range(20)}
    torch.save(content, tmp_path / "a.pth")
    assert files.same(read_tensors(tmp_path / "a.pth"), TENSORS)


@pytest.mark.parametrize(
    "stored",
    [
        lambda: np.core.multiarray._reconstruct,  # a function of NumPy alone
        lambda: np.dtype("f4"),
        lambda: {"a": np.dtype("f4"), "b": np.float32(3)},
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parts_of_arrays_are_no_arrays(stored, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(stored()))
    refused(lambda: read_tensors(tmp_path / "a.pkl"), "a.pkl: holds no named tensors")


def test_an_array_that_contradicts_itself_is_refused(tmp_path):
    array = np.arange(6, dtype=np.float32)
    data = pickle.dumps({"a": array}, 2)
    length = data.replace(b"K\x06\x85", b"K\x07\x85")  # a shape of 7
    assert length != data
    (tmp_path / "a.pkl").write_bytes(length)
    refused(
        lambda: read_tensors(tmp_path / "a.pkl"),
        "is cut short or damaged: an array of shape (7,) and 24 bytes",
    )


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": evil, "state_dict": TENSORS}])
def test_code_in_a_file_is_not_run(protocol, wrap, tmp_path):
    marker = tmp_path / "was-run"
    content = wrap(Evil(marker))
    plain = pickle.dumps(content, protocol)
    for data in (
        plain,
        torch_bytes(content, pickle_protocol=protocol),
        torch_bytes(content, pickle_protocol=protocol, _use_new_zipfile_serialization=False),
        zip_bytes(**{"archive/data.pkl": plain, "archive/version": b"3", "archive/byteorder": b"little"}),
    ):
        for suffix in (".pkl", ".pth", ".safetensors"):
            file = tmp_path / f"a{suffix}"
            file.write_bytes(data)
            line = refused(lambda file=file: import_weights(file, tmp_path / "out.safetensors"))
            if data is plain or protocol == 2:
                assert re.search(r"it needs code to be read \(\w+\.mkdir\)", line)
            assert not marker.exists()
    pickle.loads(plain)  # noqa: S301  (the file would have)
    assert marker.exists()


def test_places_that_are_no_files(tmp_path):
    for path, expected in (
        (tmp_path / "none.pth", "there is no such file"),
        (tmp_path, "no Hugging Face folder: config.json is missing; it is empty"),
    ):
        refused(lambda path=path: import_weights(path, tmp_path / "out.safetensors"), str(path), expected)
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone")
    refused(lambda: import_weights(tmp_path / "link.pth", tmp_path / "o.safetensors"), "target is missing")
    (tmp_path / "model_final.pkl").touch()
    refused(
        lambda: import_weights(tmp_path, tmp_path / "out.safetensors"), "it holds link.pth, model_final.pkl"
    )
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "weights.pth")
    refused(lambda: read_tensors(tmp_path / "pipe" / "weights.pth"), "is no file but a device")


def test_shards(tmp_path):
    folder = files.write_folder(tmp_path / "hf", cached_model())
    index = shard(folder)
    place, out = folder / "model.safetensors.index.json", tmp_path / "out.safetensors"
    assert import_weights(folder, out).reinitialized == ()
    assert files.same(load_file(out), cached_model().state_dict())
    out.unlink()

    def then(*expected):
        refused(lambda: import_weights(folder, out), *expected)
        assert not out.exists()

    whole = (folder / "model-2.safetensors").read_bytes()
    (folder / "model-2.safetensors").write_bytes(LFS)
    then(str(folder / "model-2.safetensors"), "is a Git LFS pointer")
    (folder / "model-2.safetensors").write_bytes(whole[:-5])
    then(str(folder / "model-2.safetensors"), "is cut short or damaged")
    (folder / "model-2.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    then(str(place), "tensors are in none of the shards")
    (folder / "model-2.safetensors").unlink()
    then(str(place), "the shard 'model-2.safetensors' with", "is missing in its folder")
    for broken, expected in (
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[1]", "an object with settings is expected"),
        ("{}", "weight_map: an object with a file for each tensor is expected"),
        (json.dumps({"weight_map": list(index["weight_map"])}), "weight_map"),
        (json.dumps({"weight_map": {"a": 1}}), "weight_map"),
        (json.dumps({"weight_map": {"a": "../../etc/passwd"}}), "is missing in its folder"),
        (json.dumps({"weight_map": {"a": ""}}), "is missing in its folder"),
        (json.dumps({"weight_map": {}}), "not all tensors"),
    ):
        place.write_text(broken)
        if expected != "not all tensors":
            then(str(place), expected)
        else:
            then(str(folder))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({}, "its header lacks settings and class table"),
        ({"format": "mpformer-9"}, "its header lacks settings and class table"),
        ({"config": None}, "its header lacks the settings"),
        ({"config": "{"}, "the settings in its header are not valid here"),
        ({"config": '{"model": {"backbone": 5}}'}, "the settings in its header are not valid here"),
        ({"config": '{"of": "the future"}'}, "the settings in its header are not valid here: of"),
        ({"classes": None}, "the class table in its header is not valid"),
        ({"classes": "["}, "the class table in its header is not valid"),
        ({"classes": "[]"}, "the class table in its header is not valid"),
        ({"classes": '{"classes": []}'}, "the class table in its header is not valid"),
        ({"classes": '{"classes": [{"name": "cat"}]}'}, "the class table in its header is not valid"),
    ],
)
def test_headers_that_are_none(header, expected, tmp_path):
    file = files.save_ours(cached_model(), tmp_path / "a.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        whole = opened.metadata()
    changed = {k: v for k, v in (whole | header).items() if v is not None} if header else {}
    save_file(cached_model().state_dict(), file, changed)
    refused(lambda: load_checkpoint(file), str(file), expected)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"sha256": []}', b'{"sha256": {"x": 1}}', LFS, b"[" * 99999]
)
def test_a_state_file_that_is_none_is_a_damaged_checkpoint(content, tmp_path):
    files.save_ours(cached_model(), tmp_path / "model.safetensors")
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        read(tmp_path)
    refused(lambda: load_checkpoint(tmp_path), "damaged")
