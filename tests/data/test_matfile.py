"""MATLAB label maps: read as they are, and named as what they are not."""

import io

import numpy as np
import pytest
from scipy.io import savemat

from mpformer.data.matfile import load_stuff_map
from mpformer.types import InputError


def written(path, content):
    stream = io.BytesIO()
    savemat(stream, content, do_compression=True)
    path.write_bytes(stream.getvalue())
    return str(path)


def test_a_map_of_any_number_type(tmp_path):
    labels = np.random.default_rng(0).integers(0, 183, (5, 7))
    for kind in (np.uint8, np.uint16, np.int32, np.float64):
        found = load_stuff_map(written(tmp_path / "a.mat", {"S": labels.astype(kind)}))
        assert found.dtype == np.int32
        assert np.array_equal(found, labels)


@pytest.mark.parametrize(
    "value",
    [
        np.full((2, 3), -1.0),
        np.full((2, 3), 0.5),
        np.full((2, 3), np.nan),
        np.full((2, 3), 2**20),
        np.full((2, 3), 1j),
        np.zeros((2, 3, 4)),
        np.array([["a", "b"]], object),
        {"field": 1},
        "text",
        [],
    ],
)
def test_other_content_is_named(tmp_path, value):
    with pytest.raises(InputError, match=r"a\.mat: (the|no) label map 'S'"):
        load_stuff_map(written(tmp_path / "a.mat", {"S": value}))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html>", "HTML"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"MATLAB 5.0", "a MATLAB file"),
        (b"\0" * 200, "zeros"),
    ],
)
def test_other_files_are_named(tmp_path, content, expected):
    (tmp_path / "a.mat").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.mat: not a MATLAB file that can be read \(.*{expected}"):
        load_stuff_map(str(tmp_path / "a.mat"))


def test_a_file_that_nothing_protects_against_damage_is_refused(tmp_path):
    """Without checksums: on some damaged ones scipy's parser ends the process."""
    savemat(tmp_path / "a.mat", {"S": np.ones((5, 7), np.uint8)})
    with pytest.raises(InputError, match=r"not compressed.*save it compressed \(-v7\)"):
        load_stuff_map(str(tmp_path / "a.mat"))
