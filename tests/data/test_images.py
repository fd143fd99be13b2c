"""Every kind of image file becomes RGB at its annotated size, or is named as what it is."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from mpformer.config import Data
from mpformer.data import images, pack
from mpformer.data.catalog import open_split
from mpformer.data.check import check, report_text
from mpformer.data.images import (
    image_size,
    load_ids,
    load_image,
    load_index_map,
    load_reduced_image,
    read_image,
    used_bits,
)
from mpformer.data.records import Record
from mpformer.types import InputError
from tests.data.folders import coco_folder, photograph


def record(path, width=60, height=40):
    return Record("7", str(path), width, height, ())


def close(found, expected, tolerance):
    return np.abs(found.astype(int) - expected.astype(int)).mean() < tolerance


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_rgb(tmp_path, suffix):
    image = photograph()
    Image.fromarray(image).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(load_image(record(tmp_path / f"a.{suffix}")), image)


def test_encoded_bytes_instead_of_a_path():
    image = photograph()
    data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    assert np.array_equal(load_image(Record("7", data, 60, 40, ())), image)


def test_grey_rgba_palette_and_16_bit(tmp_path):
    image = photograph()
    grey = image[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    assert close(load_image(record(tmp_path / "grey.jpg")), np.stack([grey] * 3, 2), 1)
    alpha = np.full((40, 60, 1), 3, np.uint8)
    Image.fromarray(np.concatenate([image, alpha], 2)).save(tmp_path / "rgba.png")
    assert np.array_equal(load_image(record(tmp_path / "rgba.png")), image)
    palette = Image.fromarray(image).quantize(64)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(load_image(record(tmp_path / "palette.png")), np.array(palette.convert("RGB")))
    cv2.imwrite(str(tmp_path / "deep.png"), image[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(load_image(record(tmp_path / "deep.png")), image)


def test_cmyk(tmp_path):
    image = Image.fromarray(photograph()).convert("CMYK")
    image.save(tmp_path / "cmyk.jpg", quality=100, subsampling=0)
    assert close(load_image(record(tmp_path / "cmyk.jpg")), np.array(image.convert("RGB")), 2)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(photograph(seed=s)).quantize(256) for s in (1, 2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    expected = np.array(Image.open(tmp_path / "a.gif").convert("RGB"))
    assert close(load_image(record(tmp_path / "a.gif")), expected, 1)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_rotation_is_applied(tmp_path, orientation):
    stored = photograph(48, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    # the definition of the EXIF orientations: what is done to the stored rows and columns
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    height, width = turned.shape[:2]
    assert close(load_image(record(tmp_path / "a.jpg", width, height)), turned, 2)


def test_exif_rotation_is_left_out_where_the_annotations_are_of_the_stored_image(tmp_path):
    stored = photograph(48, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    assert close(load_image(record(tmp_path / "a.jpg", 64, 48)), stored, 2)


def jpeg():
    return cv2.imencode(".jpg", photograph(200, 300))[1].tobytes()


def png():
    return cv2.imencode(".png", photograph(200, 300))[1].tobytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "a web page .HTML., such as the error page of a download"),
        (b"\x00\x01\x02\x03\x04", "not an image"),
        (jpeg()[:-200], "truncated"),
        (jpeg()[:-2], "truncated"),
        (jpeg()[:300], "not an image|truncated"),
        (png()[: len(png()) // 2], "truncated"),
        (jpeg(), "the image is 300x200, but its annotations say 60x40 "),
    ],
)
def test_bad_files_are_named(tmp_path, content, expected):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        load_image(record(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_trailing_bytes_after_a_whole_jpeg_do_no_harm(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg() + b"\x00" * 16)
    assert load_image(record(path, 300, 200)).shape == (200, 300, 3)


def test_a_jpeg_decoded_smaller_is_still_checked(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    for factor, size in ((2, (100, 150)), (4, (50, 75))):
        image, used = load_reduced_image(record(path, 300, 200), factor)
        assert (image.shape[:2], used) == (size, factor)
    with pytest.raises(InputError, match="the image is 300x200, but its annotations say 320x200 "):
        load_reduced_image(record(path, 320, 200), 4)
    path.write_bytes(png())
    image, used = load_reduced_image(record(path, 300, 200), 4)
    assert (image.shape, used) == ((200, 300, 3), 1)


def test_missing_file_and_folder_instead_of_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_image(record(tmp_path / "a.jpg"))
    with pytest.raises(InputError, match="cannot be read"):
        load_image(record(tmp_path))


def test_panoptic_ids(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[3, 4] = (1, 2, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ids = load_ids(Record("7", "", 60, 40, (), label_map=str(tmp_path / "a.png")))
    assert ids[3, 4] == 1 + 256 * 2 + 65536 * 60
    assert np.count_nonzero(ids) == 1
    with pytest.raises(InputError, match="label map is 60x40, but its image is 61x40"):
        load_ids(Record("7", "", 61, 40, (), label_map=str(tmp_path / "a.png")))


# --- bits, channels, kinds ------------------------------------------------------------------------


def tiff(pixels: np.ndarray, form: int = 1, extra: int = 0) -> bytes:
    """A TIFF of one strip by hand: `form` 1 unsigned, 2 signed, 3 floating-point; `extra` 2 alpha."""
    pixels = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    colour = channels >= 3
    lists = {
        256: [width],
        257: [height],
        258: [8 * pixels.itemsize] * channels,
        259: [1],
        262: [2 if colour else 1],
        277: [channels],
        278: [height],
        279: [pixels.nbytes],
        339: [form] * channels,
    }
    if channels > (3 if colour else 1):
        lists[338] = [extra] * (channels - (3 if colour else 1))
    start = 8 + 2 + 12 * (len(lists) + 1) + 4
    values = {
        tag: struct.pack(f"<{len(v)}{'I' if tag in (256, 257, 279) else 'H'}", *v) for tag, v in lists.items()
    }
    far = {tag: v for tag, v in values.items() if len(v) > 4}
    values[273] = struct.pack("<I", start + sum(map(len, far.values())))
    entries, offset = b"", start
    for tag in sorted(values):
        kind = 4 if tag in (256, 257, 273, 279) else 3
        count = len(values[tag]) // (4 if kind == 4 else 2)
        entries += struct.pack("<HHI", tag, kind, count)
        entries += struct.pack("<I", offset) if tag in far else values[tag].ljust(4, b"\0")
        offset += len(far.get(tag, b""))
    body = b"".join(far[tag] for tag in sorted(far))
    head = b"II*\0" + struct.pack("<IH", 8, len(values))
    return head + entries + b"\0\0\0\0" + body + pixels.tobytes()


def deep(seed: int, bits: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (40, 60, *channels)).astype(np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_bits_in_use_of_16_bit_files(suffix, channels):
    pixels = deep(1, 12, *channels)
    data = (
        tiff(pixels)
        if suffix == ".tif"
        else cv2.imencode(suffix, pixels[..., ::-1] if channels else pixels)[1].tobytes()
    )
    rgb = pixels if channels else np.repeat(pixels[..., None], 3, 2)
    assert np.array_equal(load_image(Record("1", data, 60, 40, (), bits=12)), rgb // 16)
    assert np.array_equal(load_image(Record("1", data, 60, 40, ())), rgb // 256)
    assert np.array_equal(load_image(Record("1", data, 60, 40, (), bits=10)), np.minimum(rgb // 4, 255))
    assert np.array_equal(read_image(data, 12), rgb // 16)
    assert used_bits(Record("1", data, 60, 40, ()), data) == 12


def test_files_of_8_bits_have_no_bits_in_use(tmp_path):
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        file = tmp_path / f"a{suffix}"
        Image.fromarray(photograph()).save(file)
        assert used_bits(record(file), file.read_bytes()) is None
    dark = cv2.imencode(".png", np.full((40, 60), 3, np.uint16))[1].tobytes()
    assert used_bits(Record("1", dark, 60, 40, ()), dark) == 8


def test_the_setting_reaches_every_record(tmp_path):
    data = coco_folder(tmp_path, images=1)
    pixels = deep(2, 12)
    cv2.imwrite(str(tmp_path / "images" / "1.png"), pixels)
    expected = np.repeat((pixels // 16)[..., None], 3, 2)
    for task in ("instance", "semantic"):
        chosen = data.model_copy(update={"bits": 12, "task": task})
        assert np.array_equal(load_image(open_split(chosen, "train").records[0]), expected)
    packed = {"bits": 12, "root": str(tmp_path / "packed")}
    pack.pack(chosen, packed["root"])
    for bits in (None, 12):  # shards remember it
        shards = Data(root=packed["root"], dataset={"format": "packed"}, bits=bits)
        assert np.array_equal(load_image(open_split(shards, "train").records[0]), expected)
        assert "fewer bits" not in report_text(check(shards))  # they are not dark
    assert "fewer bits" in report_text(check(data))
    with pytest.raises(InputError, match="'bits' differs"):
        pack.pack(data, packed["root"])


@pytest.mark.parametrize(
    ("pixels", "form", "expected"),
    [
        (deep(0, 16, 5), 1, "5 channels, 16-bit unsigned"),
        (deep(0, 8, 5).astype(np.uint8), 1, "5 channels, 8-bit unsigned"),
        (deep(0, 8, 2).astype(np.uint8), 1, "2 channels, 8-bit unsigned"),
        (deep(0, 16).view(np.int16), 2, "1 channel, 16-bit signed"),
        (deep(0, 16).astype(np.uint32), 1, "1 channel, 32-bit unsigned"),
        (deep(0, 16).astype(np.float32), 3, "1 channel, 32-bit floating-point"),
        (deep(0, 16, 3).astype(np.float32), 3, "3 channels, 32-bit floating-point"),
        (deep(0, 16).astype(np.float64), 3, "1 channel, 64-bit floating-point"),
    ],
)
def test_other_channels_and_depths_are_named(pixels, form, expected, capfd):
    with pytest.raises(InputError, match=f"{expected}; 1, 3 or 4 channels of 8 or 16 bits are expected"):
        read_image(tiff(pixels, form))
    assert capfd.readouterr() == ("", "")


def test_tiffs_that_are_pictures():
    rgb = deep(3, 16, 3)
    assert np.array_equal(read_image(tiff(rgb)), rgb // 256)
    small = (rgb // 256).astype(np.uint8)
    assert np.array_equal(read_image(tiff(small)), small)
    with_alpha = np.concatenate([small[..., :1], np.full((40, 60, 1), 255, np.uint8)], 2)
    assert np.array_equal(read_image(tiff(with_alpha, extra=2)), np.repeat(small[..., :1], 3, 2))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"<!DOCTYPE html><title>404</title>", "HTML"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"<?xml version='1.0'?><svg/>", "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X", "AppleDouble"),
        (b"PK\x03\x04rest", "a ZIP archive"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
        (b"\0" * 128 + b"DICM", "a DICOM file"),
        (b"\0" * 64, "64 bytes of zeros"),
        (b"II*\0\xff\xff", "a TIFF image with a damaged header"),
        (b"hello", "unknown; the first bytes are 68 65 6c"),
    ],
)
def test_what_is_no_image_is_called_what_it_is(tmp_path, content, expected):
    (tmp_path / "a.jpg").write_bytes(content)
    for call in (lambda p: load_image(record(p)), lambda p: image_size(str(p))):
        with pytest.raises(InputError, match=expected) as error:
            call(tmp_path / "a.jpg")
        assert str(error.value).startswith(str(tmp_path / "a.jpg"))


def test_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    """A header alone, without the pixels that it promises: decoding would fail otherwise."""
    whole = photograph()
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)
    for suffix in (".png", ".jpg", ".bmp", ".webp", ".tiff"):
        data = cv2.imencode(suffix, whole)[1].tobytes()
        with pytest.raises(InputError, match="60x40 pixels; at most"):
            read_image(data)
        monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60)
        assert read_image(data).shape == (40, 60, 3)
        monkeypatch.setattr(images, "MAX_PIXELS", 40 * 60 - 1)


def test_the_size_of_an_image_beyond_pillows_limit(tmp_path, monkeypatch):
    for suffix in ("png", "jpg", "bmp", "tif", "webp", "gif"):
        Image.fromarray(photograph()).save(tmp_path / f"a.{suffix}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # it refuses 200, and warns from 100 on
    for suffix in ("png", "jpg", "bmp", "tif", "webp", "gif"):
        assert image_size(str(tmp_path / f"a.{suffix}")) == (40, 60)
        assert read_image(str(tmp_path / f"a.{suffix}")).shape == (40, 60, 3)
    indexed = tmp_path / "indexed.png"
    Image.fromarray(photograph()).quantize(9).save(indexed)
    assert load_index_map(str(indexed), "a").max() < 9


@pytest.mark.parametrize(
    ("options", "kind"), [({}, b"VP8 "), ({"lossless": True}, b"VP8L"), ({"exif": 6}, b"VP8X")]
)
def test_the_size_of_a_webp(tmp_path, options, kind):
    if "exif" in options:
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    Image.fromarray(photograph()).save(tmp_path / "a.webp", **options)
    assert (tmp_path / "a.webp").read_bytes()[12:16] == kind
    assert image_size(str(tmp_path / "a.webp")) == read_image(str(tmp_path / "a.webp")).shape[:2]


def test_a_png_with_a_wrong_checksum_is_damaged(capfd):
    data = bytearray(cv2.imencode(".png", photograph())[1].tobytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(InputError, match="checksum of its part b'IDAT' at byte 33 is wrong"):
        read_image(bytes(data))
    assert capfd.readouterr() == ("", "")


# --- maps -----------------------------------------------------------------------------------------


def ids_of(data: bytes) -> np.ndarray:
    return load_ids(Record("1", b"", 60, 40, (), data))


def test_id_maps_of_other_channels_are_refused():
    ids = deep(5, 8).astype(np.uint8)
    for pixels, expected in (
        (deep(4, 9), "grey, 16-bit"),
        (ids, "grey, 8-bit"),
        (deep(4, 9, 3), "colour, 16-bit"),
    ):
        with pytest.raises(InputError, match=f"the id map is {expected}; 3 channels of 8 bits are expected"):
            ids_of(cv2.imencode(".png", pixels)[1].tobytes())
    grey_alpha = io.BytesIO()
    Image.fromarray(np.stack([ids, ids], 2)).save(grey_alpha, "PNG")
    with pytest.raises(InputError, match="the id map is grey"):
        ids_of(grey_alpha.getvalue())
    with pytest.raises(InputError, match="a JPEG does not keep the values"):
        ids_of(cv2.imencode(".jpg", photograph())[1].tobytes())
    assert not ids_of(cv2.imencode(".png", np.zeros((40, 60), np.uint8))[1].tobytes()).any()


def test_id_maps_in_rgb_rgba_and_with_a_palette():
    rgb = deep(6, 2, 3).astype(np.uint8) % 3
    expected = rgb.astype(int) @ [1, 256, 65536]
    alpha = np.concatenate([rgb, deep(7, 8, 1).astype(np.uint8)], 2)
    colours, index = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    palette = Image.fromarray(index.reshape(40, 60).astype(np.uint8))
    palette.putpalette(colours.ravel().tolist())
    for image in (Image.fromarray(rgb), Image.fromarray(alpha), palette):
        stream = io.BytesIO()
        image.save(stream, "PNG")
        assert np.array_equal(ids_of(stream.getvalue()), expected)


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, written by hand."""
    height, width = values.shape
    flat = np.unpackbits(values[..., None].astype(np.uint8), axis=2)[..., -bits:].reshape(height, -1)
    lines = b"".join(b"\0" + np.packbits(line).tobytes() for line in flat)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(lines),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_label_maps_of_few_bits_hold_their_values(bits):
    values = deep(8, bits)
    data = grey_png(values, bits)
    assert np.asarray(Image.open(io.BytesIO(data))).shape == values.shape  # a PNG to others, too
    assert np.array_equal(load_index_map(data, "a"), values)


def test_label_maps_of_other_numbers():
    values = deep(9, 15)
    for kind, form in ((np.int32, 2), (np.uint32, 1), (np.int16, 2)):
        assert np.array_equal(load_index_map(tiff(values.astype(kind), form), "a"), values)
    for wrong, form in (
        (values.astype(np.float32), 3),
        (-values.astype(np.int32), 2),
        (values.astype(np.int32) + 65536, 2),
    ):
        with pytest.raises(InputError, match=r"a: .*; whole numbers in 0\.\.65535 are expected"):
            load_index_map(tiff(wrong, form), "a")
    with pytest.raises(InputError, match="a JPEG does not keep"):
        load_index_map(cv2.imencode(".jpg", photograph())[1].tobytes(), "a")
