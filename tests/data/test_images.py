"""Every kind of image file becomes RGB at its annotated size, or is named as what it is."""

import cv2
import numpy as np
import pytest
from PIL import Image

from mpformer.data.images import load_ids, load_image, load_reduced_image
from mpformer.data.records import Record
from mpformer.types import InputError
from tests.data.folders import photograph


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
        (b"<html>404</html>", "HTML, such as the error page of a download"),
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
