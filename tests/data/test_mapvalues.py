"""Label maps whose values or channels are not class ids: what the message says that they are."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from mpformer.config import LabelMaps
from mpformer.data.images import load_index_map
from mpformer.data.mapvalues import unknown_values
from mpformer.types import InputError
from tests.data.folders import photograph


def told(values, classes=("ground", "disk", "ring"), ignore=(255,), first=0, encoding="classes"):
    """The message on the values of a map; the classes have the ids from `first` on."""
    place = {"images": "images", "labels": "labels"}
    entries = [{"id": first + i, "name": name} for i, name in enumerate(classes)]
    tree = {"train": place, "val": place, "classes": entries, "ignore": ignore, "encoding": encoding}
    values = sorted(values)
    known = {first + i for i in range(len(classes))} | set(ignore)
    return unknown_values([v for v in values if v not in known], values, LabelMaps.model_validate(tree))


def test_all_unknown_values_are_named():
    assert told({0, 7}) == "the value 7 is neither a class nor among those to ignore"
    assert told({0, 1, 7, 9}) == "the values 7, 9 are neither classes nor among those to ignore"
    names = [str(i) for i in range(10)]
    text = told({0, *range(11, 18)}, classes=names)
    assert text == "7 values (11, 12, 13, 14, 15, ...) are neither classes nor among those to ignore"


@pytest.mark.parametrize(
    ("values", "factor"),
    [
        ({0, 127, 254}, "127"),
        ({0, 127, 255}, "127.5, rounded"),
        ({0, 128, 255}, "127.5, rounded"),
        ({0, 127}, "127"),
        ({0, 100, 200}, "100"),
        ({0, 127, 254, 255}, "127"),
        ({0, 257, 514}, "257"),
        ({0, 257, 514, 65535}, "257"),
        ({0, 514}, "257"),
        ({0, 32767, 65534}, "32767"),
    ],
)
def test_the_factor_of_class_ids(values, factor):
    assert f"probably class ids times {factor}:" in told(values)


def test_the_factor_where_0_is_no_class_and_of_many_classes():
    assert "class ids times 255:" in told({0, 255}, classes=("obj",), ignore=(), first=1)
    names = [str(i) for i in range(21)]
    assert "class ids times 12:" in told({0, 36, 240}, classes=names)
    for values in ({0, 30}, {0, 2, 44}, {0, 23, 31}):  # nothing tells which class 30 would be
        assert "times" not in told(values, classes=names)


def test_one_value_255():
    assert "; 255 is probably 'obj': write its id" in told({0, 255}, ("ground", "obj"), ())
    assert "255 is probably 'ring', or a value to ignore (`data.dataset.ignore=[255]`)" in told(
        {0, 1, 255}, ignore=()
    )
    assert "255 often stands for pixels without a class" in told({0, 255}, ignore=())
    assert "255 often stands for pixels without a class" in told({0, 1, 2, 255}, ignore=())
    assert "0 often stands for pixels without a class" in told({0, 1, 2}, first=1)


def test_ids_that_begin_at_one_and_other_encodings():
    assert "probably class ids plus 1" in told({1, 2, 3})
    assert "`data.dataset.encoding=cityscapes_instances`" in told({0, 1001, 2000, 2013})
    assert "`data.dataset.encoding=mapillary_instances`" in told({0, 257, 258, 513})
    assert "encoding" not in told({0, 5000})
    assert told({7001}, encoding="cityscapes_instances").endswith("among those to ignore")


def jpeg(pixels):
    return cv2.imdecode(cv2.imencode(".jpg", pixels)[1], cv2.IMREAD_UNCHANGED)


def test_many_values_in_between():
    pixels = np.kron(np.random.default_rng(0).integers(0, 3, (8, 8)), np.ones((9, 9))).astype(np.uint8)
    names = [str(i) for i in range(201)]
    place = {"images": "images", "labels": "labels"}
    entries = [{"id": i, "name": names[i]} for i in (0, 100, 200)]
    dataset = LabelMaps.model_validate({"train": place, "val": place, "classes": entries})
    smooth = cv2.resize(pixels * 100, (100, 100), interpolation=cv2.INTER_LINEAR)
    for spoiled in (jpeg(pixels * 100), smooth):
        values = np.unique(spoiled).tolist()
        unknown = [v for v in values if v not in (0, 100, 200)]
        assert f"{len(unknown)} values (" in unknown_values(unknown, values, dataset)
        assert "as of a map that was saved as JPEG or resized" in unknown_values(unknown, values, dataset)
    assert "as of a picture, of numbers of objects, or of a map" in told(set(range(40)))


# --- channels -------------------------------------------------------------------------------------


def encoded(pixels, kind="png", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


VALUES = np.random.default_rng(1).integers(0, 5, (40, 60)).astype(np.uint8)
GREY = np.stack([VALUES] * 3, -1)
ALPHA = np.full((40, 60, 1), 255, np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        encoded(GREY),
        encoded(np.concatenate([GREY, ALPHA], -1)),
        encoded(np.concatenate([VALUES[..., None], ALPHA], -1)),
        encoded(GREY, "bmp"),
        encoded(GREY, "tiff"),
    ],
    ids=["rgb", "rgba", "grey-alpha", "bmp", "tiff"],
)
def test_equal_colour_channels_are_a_grey_map(data):
    found = load_index_map(data, "a")
    assert found.dtype == np.uint8
    assert np.array_equal(found, VALUES)


def test_equal_colour_channels_of_16_bits():
    deep = VALUES.astype(np.uint16) * 300
    data = cv2.imencode(".png", np.stack([deep] * 3, -1))[1].tobytes()
    assert np.array_equal(load_index_map(data, "a"), deep)


def palette(kind):
    """A map whose palette has the greys 9, 8, 7, ...: its colours are other values than its indices."""
    image = Image.fromarray(VALUES, "P")
    image.putpalette([9 - i // 3 for i in range(30)])
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_a_palette_is_never_taken_for_grey_values():
    assert np.array_equal(load_index_map(palette("png"), "a"), VALUES)
    for kind in ("tiff", "gif"):
        with pytest.raises(
            InputError, match="a: one value per pixel is expected, not 3 channels, in a kind of"
        ):
            load_index_map(palette(kind), "a")
    with pytest.raises(InputError, match="one value per pixel"):
        load_index_map(encoded(GREY * 40, "webp"), "a")


def colours(number):
    table = np.random.default_rng(2).integers(0, 256, (number, 3)).astype(np.uint8)
    table[0] = (255, 0, 10)
    return table[VALUES % number]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (colours(2), r"not 3 channels: it is a colour-coded map of 2 colours, R, G, B .*\(255, 0, 10\)"),
        (colours(5), r"map of 5 colours, R, G, B (\(\d+, \d+, \d+\), ){3}\.\.\.; write the id"),
        (np.concatenate([colours(2), ALPHA], -1), "not 4 channels: it is a colour-coded map of 2 colours"),
        (photograph(), r"with \d{4} different colours it is a picture"),
        (GREY * np.array([0, 1, 0], np.uint8), "only green is not 0: save that channel alone"),
        (GREY * np.array([1, 0, 0], np.uint8), "only red is not 0"),
        (np.concatenate([GREY, ALPHA - 1], -1), "grey with transparency"),
        (np.concatenate([GREY * 0, VALUES[..., None]], -1), "grey with transparency"),
    ],
    ids=["two", "five", "alpha", "photograph", "green", "red", "transparent", "in-alpha"],
)
def test_other_channels_are_called_what_they_are(pixels, expected):
    with pytest.raises(InputError, match=f"^a: one value per pixel is expected, .*{expected}"):
        load_index_map(encoded(pixels), "a")


def test_channels_of_floats_are_refused():
    data = cv2.imencode(".tiff", np.zeros((40, 60, 3), np.float32))[1].tobytes()
    with pytest.raises(InputError, match="not 3 channels of float32: save the class ids alone"):
        load_index_map(data, "a")
