"""Damaged and odd files by the thousand: the only error that comes out is `InputError`, and nothing hangs.

Each test counts the inputs that it has tried; together they are at least 5,000.
"""

from __future__ import annotations

import copy
import faulthandler
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from mpformer import draw, filekind, lettering
from mpformer.ablation.tables import cells_of, markdown_table
from mpformer.config import Data
from mpformer.data.catalog import open_split
from mpformer.data.check import check, report_text
from mpformer.data.detect import detect
from mpformer.data.images import image_size, load_ids, load_image, load_index_map, read_image, used_bits
from mpformer.data.masks import record_masks
from mpformer.data.matfile import load_stuff_map
from mpformer.data.pictures import catalog_sheet, reduced
from mpformer.data.records import Record
from mpformer.evaluate.pages import file_stem
from mpformer.types import ClassInfo, ClassTable, InputError, printable
from tests.data.folders import CATEGORIES, SQUARE, annotation, coco_folder, photograph

pytestmark = pytest.mark.slow

INPUTS = {"bytes": 3000, "matlab": 200, "sizes": 150, "names": 500, "coco": 1000, "maps": 150, "masks": 150}
HANG = 60
"""Seconds after which one input is taken to hang: the process then ends with the stacks of its threads."""


@contextmanager
def watched() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def fuzz(kind: str, strategy: st.SearchStrategy[Any], body: Callable[[Any], None]) -> None:
    """Run `body` on the inputs of a kind; it has to get through each with no error but `InputError`."""
    tried = 0

    @settings(
        max_examples=INPUTS[kind],
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal tried
        tried += 1
        with watched():
            body(value)

    run()
    print(f"{kind}: {tried} inputs")
    assert tried >= INPUTS[kind]


def attempt(call: Callable[..., Any], *arguments: Any) -> None:
    reason = "done"
    try:
        call(*arguments)
    except InputError as error:
        reason = str(error)
    assert reason.encode()


def test_the_inputs_are_five_thousand():
    assert sum(INPUTS.values()) >= 5000


# --- bytes ----------------------------------------------------------------------------------------


def encoded_images() -> dict[str, bytes]:
    image = photograph(24, 32)
    deep = image.astype(np.uint16) * 257
    whole, first = Image.fromarray(image), image[..., 0]
    return {
        suffix + str(pixels.ndim): cv2.imencode(suffix, pixels)[1].tobytes()
        for suffix, pixels in [(".png", first), (".png", deep), (".tiff", deep), (".pgm", deep[..., 0])]
    } | {
        "png": saved(whole, "PNG"),
        "palette": saved(whole.quantize(16), "PNG"),
        "turned png": saved(whole, "PNG", exif=orientation(8)),
        "jpeg": saved(whole, "JPEG"),
        "turned jpeg": saved(whole, "JPEG", exif=orientation(6)),
        "progressive": saved(whole, "JPEG", progressive=True),
        "tiff": saved(whole, "TIFF"),
        "lzw": saved(whole, "TIFF", compression="tiff_lzw"),
        "webp": saved(whole, "WEBP"),
        "gif": saved(whole.quantize(16), "GIF"),
        "bmp": saved(whole, "BMP"),
        "jpeg 2000": saved(whole, "JPEG2000"),
    }


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def with_checksums(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that what is in its parts is looked at."""
    if not data.startswith(filekind.PNG):
        return data
    fixed, position = bytearray(data), len(filekind.PNG)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        fixed[end : end + 4] = zlib.crc32(fixed[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(fixed)


CHANGES = st.tuples(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    st.one_of(st.none(), st.floats(0, 1)),
    st.binary(max_size=12),
    st.booleans(),
    st.booleans(),
)
"""Bytes that change, by their place in the file; where it is cut; what is put in; whether at the front, where
headers are; and whether the checksums of a PNG are mended."""


def changed(data: bytes, changes: Any) -> bytes:
    places, cut, extra, front, mended = changes
    result = bytearray(data)
    for place, value in places:
        span = min(len(result), 200) if front else len(result)
        result[min(int(place * span), len(result) - 1)] = value
    if cut is not None:
        result = result[: int(cut * len(result))]
    middle = len(result) // 2
    result[middle:middle] = extra
    return with_checksums(bytes(result)) if mended else bytes(result)


def test_bytes(tmp_path):
    originals = encoded_images()
    for data in originals.values():
        assert read_image(data).dtype == np.uint8  # what is changed below is right as it is
    path = tmp_path / "changed"

    def body(value: tuple[str, Any]) -> None:
        data = changed(originals[value[0]], value[1])
        path.write_bytes(data)
        record = Record("1", str(path), 32, 24, (), data, bits=12)
        for call in (load_image, load_ids):
            attempt(call, record)
        attempt(used_bits, record, data)
        attempt(image_size, str(path))
        attempt(load_index_map, data, "map")

    fuzz("bytes", st.tuples(st.sampled_from(sorted(originals)), CHANGES), body)


def test_matlab_files(tmp_path):
    stream = io.BytesIO()
    content = {"S": np.arange(60, dtype=np.uint8).reshape(6, 10), "names": ["a", "b"]}
    savemat(stream, content, do_compression=True)
    original, path = stream.getvalue(), tmp_path / "a.mat"
    path.write_bytes(original)
    assert load_stuff_map(str(path)).sum() == 59 * 30

    def body(changes: Any) -> None:
        path.write_bytes(changed(original, changes))
        attempt(load_stuff_map, str(path))

    fuzz("matlab", CHANGES, body)


# --- pictures -------------------------------------------------------------------------------------

SIDE = st.one_of(st.integers(1, 40), st.sampled_from([1, 2, 479, 480, 481, 65_500, 65_536, 70_000]))


def test_sizes():
    classes = ClassTable((ClassInfo("x", 0), ClassInfo("सेब", 1)))

    def body(sides: tuple[int, int, int]) -> None:
        height, width, columns = sides
        if height * width > 200_000:
            height, width = height, max(1, 200_000 // height)
        image = np.zeros((height, width, 3), np.uint8)
        masks = [np.ones((height, width), bool), np.zeros((height, width), bool)]
        drawn = draw.overlay(image, masks, [0, 1], classes, [0.5, None])
        sheet = draw.side_by_side([drawn, image], ["a", "सेब"], columns=columns)
        assert sheet.shape[0] * sheet.shape[1] < 1 << 27
        read = read_image(draw.encode_jpeg(sheet))
        assert max(read.shape) <= 65_500
        assert draw.decode_png(draw.encode_png(drawn)).shape == drawn.shape

    fuzz("sizes", st.tuples(SIDE, SIDE, st.integers(1, 2)), body)


NAME = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(codec=None), max_size=20),
    st.text(st.sampled_from("a|\\\n\r\t<>&$_[]{}\"'\x00\x7f\u202e\u2028\ud800\udcff汽हिไ😀ء"), max_size=12),
    st.text(min_size=150, max_size=400),
)


def test_names(tmp_path):
    image, mask = np.zeros((60, 90, 3), np.uint8), np.ones((60, 90), bool)

    def body(name: str) -> None:
        classes = ClassTable((ClassInfo(name, 0),))
        shown = classes.names[0]
        assert "\n" not in shown
        assert ClassTable.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes
        drawn = draw.overlay(image, [mask], [0], classes, [0.5])
        draw.side_by_side([drawn], [name])
        lettering.plot_text(name).encode()
        stem = file_stem(Record(name, "", 1, 1, ()).image_id)
        (tmp_path / f"01-{stem}.jpg").write_bytes(b"")
        (tmp_path / f"01-{stem}.jpg").unlink()
        [_, _, line] = markdown_table([["name", "n"], [name, "1"]])
        assert line.count("\n") == 0
        line.encode()
        if "\\" not in name:
            assert cells_of(line) == [printable(name).strip(), "1"]

    fuzz("names", NAME, body)


# --- data sets ------------------------------------------------------------------------------------

VALUE = st.one_of(
    st.sampled_from([None, True, "", "a", -1, 0, 1, 2**31, 2**70, 1e308, float("nan"), float("inf"), [], {}]),
    st.sampled_from(
        [SQUARE, [SQUARE], [[]], [[1, 2]], {"size": [40, 60], "counts": [2400]}, "../x.png", "\ud800"]
    ),
    st.sampled_from(
        [{"size": [40, 60], "counts": "x"}, {"size": 3, "counts": None}, [[["a"]]], "1", "1.0", [1] * 99]
    ),
    st.text(max_size=8),
    st.floats(width=32),
)
EDIT = st.tuples(st.floats(0, 1), st.sampled_from(["replace", "delete", "double", "rename"]), VALUE)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a JSON tree."""
    if isinstance(tree, dict | list):
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        return [(tree, key) for key in keys] + [p for key in keys for p in places(tree[key])]
    return []


def edited(tree: Any, edits: list[tuple[float, str, Any]]) -> Any:
    tree = copy.deepcopy(tree)
    for at, how, value in edits:
        if not (found := places(tree)):
            break
        container, key = found[min(int(at * len(found)), len(found) - 1)]
        if how == "replace":
            container[key] = copy.deepcopy(value)
        elif how == "delete":
            del container[key]
        elif how == "double" and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif isinstance(container, dict):
            container[str(value)] = container.pop(key)
    return tree


def checked(data: Data) -> None:
    """What `data check` does, pictures included."""
    report_text(check(data)).encode()
    catalog_sheet(open_split(data.model_copy(update={"on_bad_sample": "skip"}), "train"), count=2)


def test_coco_trees(tmp_path):
    data = coco_folder(tmp_path, images=2)
    crowd = annotation(21, 1, iscrowd=1, segmentation={"size": [40, 60], "counts": [100, 50, 2250]})
    tree = json.loads((tmp_path / "train.json").read_text()) | {"categories": CATEGORIES}
    tree["annotations"].append(crowd)
    (tmp_path / "train.json").write_text(json.dumps(tree))
    assert report_text(check(data)).count("2 images, 2 objects and 1 crowds") == 2

    def body(value: tuple[list[Any], float | None]) -> None:
        edits, cut = value
        text = json.dumps(edited(tree, edits))
        (tmp_path / "train.json").write_text(text if cut is None else text[: int(cut * len(text))])
        attempt(checked, data)
        attempt(detect, tmp_path)

    cuts = st.one_of(st.none(), st.none(), st.none(), st.floats(0, 1))
    fuzz("coco", st.tuples(st.lists(EDIT, min_size=1, max_size=3), cuts), body)


def label_folder(root: Path) -> Data:
    place = {"images": "images", "labels": "labels"}
    tree = {
        "format": "label_maps",
        "name": "maps",
        "train": place,
        "val": place,
        "image_suffix": ".png",
        "classes": [{"id": 0, "name": "x"}, {"id": 1, "name": "y", "thing": True}],
        "ignore": [255],
    }
    return Data(root=str(root), dataset=tree, task="semantic")


FILE_NAME = st.one_of(
    st.just("a"),
    st.text(st.characters(codec=None, exclude_characters="/\0"), min_size=1, max_size=12),
    st.binary(min_size=1, max_size=12).map(os.fsdecode),
)


def name_of_file(name: str) -> str:
    """A name that a file system takes, and is not a folder's own."""
    data = name.encode("utf-8", "surrogateescape" if is_bytes(name) else "surrogatepass")
    return os.fsdecode(data.replace(b"/", b"_").replace(b"\0", b"_"))


def is_bytes(name: str) -> bool:
    return not any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in name)


def test_label_map_folders(tmp_path):
    image = cv2.imencode(".png", photograph())[1].tobytes()
    labels = cv2.imencode(".png", np.tile(np.array([0, 1, 255], np.uint8), (40, 20)))[1].tobytes()
    root = tmp_path / "maps"

    def body(value: tuple[str, Any]) -> None:
        name, changes = value
        shutil.rmtree(root, ignore_errors=True)
        for folder, content in (("images", image), ("labels", changed(labels, changes))):
            (root / folder).mkdir(parents=True)
            (root / folder / f"{name_of_file(name)}.png").write_bytes(content)
        attempt(checked, label_folder(root))

    fuzz("maps", st.tuples(FILE_NAME, CHANGES), body)


def test_mask_file_folders(tmp_path):
    image = cv2.imencode(".png", photograph())[1].tobytes()
    mask = cv2.imencode(".png", np.repeat(np.array([[0] * 20 + [255] * 40], np.uint8), 40, 0))[1].tobytes()
    root = tmp_path / "masks"
    place = {"images": "*/images/*.png", "masks": "../masks/*.png"}
    tree = {
        "format": "mask_files",
        "train": place,
        "val": place,
        "classes": [{"id": 1, "name": "x", "thing": True}],
    }

    def body(value: tuple[str, Any]) -> None:
        name, changes = value
        shutil.rmtree(root, ignore_errors=True)
        for folder, content in (("images", image), ("masks", changed(mask, changes))):
            (root / "one" / folder).mkdir(parents=True)
            (root / "one" / folder / f"{name_of_file(name)}.png").write_bytes(content)
        attempt(checked, Data(root=str(root), dataset=tree))

    fuzz("masks", st.tuples(FILE_NAME, CHANGES), body)


def test_a_reduced_record_has_the_masks_of_the_whole(tmp_path):
    """What the sheets of `checked` draw, against the masks at full size."""
    [record, *_] = open_split(coco_folder(tmp_path, images=1), "train").records
    image, masks = reduced(record, 1000)
    assert np.array_equal(image, load_image(record))
    assert np.array_equal(np.stack(masks), record_masks(record))
    image, masks = reduced(record, 30)
    assert (image.shape, masks[0].shape) == ((20, 30, 3), (20, 30))
    assert abs(masks[0].mean() - record_masks(record)[0].mean()) < 0.03
