"""Pictures that are no JPEG: told by their first bytes, decoded as training does, refused in one sentence."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngImageFile

from restoration.pictures import PictureError, picture_format, read_picture
from training.data.pictures import load_image

LEVELS = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
LOSSLESS = {"webp": {"lossless": True, "exact": True}}


def saved(folder: Path, ending: str, picture: Image.Image, name: str = "picture", **options) -> Path:
    path = folder / f"{name}.{ending}"
    picture.save(path, **LOSSLESS.get(ending, {}), **options)
    return path


def levels(path: Path) -> np.ndarray:
    image = read_picture(path)
    assert image.dtype == torch.float32 and image.shape[0] == 3
    return (image * 255).round().byte().movedim(0, -1).numpy()


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
def test_colours_are_the_files_and_transparency_is_dropped(tmp_path, ending):
    """The colours under transparent pixels stay as they are stored, as training loads them."""
    path = saved(tmp_path, ending, Image.fromarray(LEVELS))
    assert picture_format(path) == ending.upper()
    assert np.array_equal(levels(path), LEVELS[..., :3]) and np.array_equal(levels(path), load_image(path))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_other_kinds_of_pixels_are_as_training_loads_them(tmp_path, mode):
    path = saved(tmp_path, "tiff" if mode == "CMYK" else "png", Image.fromarray(LEVELS[..., :3]).convert(mode))
    assert np.array_equal(levels(path), load_image(path))


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bits_are_scaled_not_cut(tmp_path, ending):
    deep = np.random.default_rng(1).integers(0, 65536, (5, 7), dtype=np.uint16)
    path = saved(tmp_path, ending, Image.fromarray(deep))
    assert np.array_equal(levels(path)[..., 0], deep >> 8) and np.array_equal(levels(path), load_image(path))


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_pictures_are_turned_upright(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, ending, Image.fromarray(LEVELS[..., :3]), exif=exif.tobytes())
    assert np.array_equal(levels(path), np.rot90(LEVELS[..., :3], -1))


@pytest.mark.parametrize("ending", ["png", "webp", "tiff"])
def test_the_first_of_several_pictures_is_read(tmp_path, ending):
    first, second = (Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200))
    path = saved(tmp_path, ending, first, save_all=True, append_images=[second])
    assert (levels(path) == 10).all()


def test_what_is_in_the_file_counts_not_its_ending(tmp_path):
    picture = Image.fromarray(LEVELS[..., :3])
    png = saved(tmp_path, "png", picture).rename(tmp_path / "really_a_png.jpg")
    jpeg = tmp_path / "really_a_jpeg.png"
    picture.save(jpeg, "JPEG")
    assert picture_format(png) == "PNG" and picture_format(jpeg) is None
    for start in (b"", b"GIF89a", b"RIFF\0\0\0\0WAVE", b"\xff\xd8"):
        (tmp_path / "other.png").write_bytes(start)
        assert picture_format(tmp_path / "other.png") is None
    assert picture_format(tmp_path / "absent.png") is None
    with pytest.raises(PictureError, match=r"other\.png is no PNG, WebP, BMP or TIFF"):
        read_picture(tmp_path / "other.png")


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("permissive", [False, True])
def test_files_that_are_cut_are_refused(tmp_path, monkeypatch, ending, share, permissive):
    """Also where another pack has told Pillow to accept them for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", permissive)
    path = saved(tmp_path, ending, Image.fromarray(LEVELS[..., :3]))
    data = path.read_bytes()
    path.write_bytes(data[: max(12, int(len(data) * share))])
    with pytest.raises(
        PictureError, match=rf"picture\.{ending} is cut short or damaged \(.*\): get a complete copy"
    ) as said:
        read_picture(path)
    assert "\n" not in str(said.value) and " object at " not in str(said.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is permissive


def test_32_bits_and_huge_promises_are_refused(tmp_path, monkeypatch):
    path = saved(tmp_path, "tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(PictureError, match="32 bits a channel"):
        read_picture(path)
    monkeypatch.setattr("restoration.pictures.MAX_PIXELS", 599)
    buffer = io.BytesIO()
    Image.fromarray(LEVELS).save(buffer, "PNG")
    (tmp_path / "huge.png").write_bytes(buffer.getvalue())
    with pytest.raises(PictureError, match="30x20, more than"):
        read_picture(tmp_path / "huge.png")


def test_exif_that_cannot_be_read_does_not_matter(tmp_path):
    path = saved(tmp_path, "png", Image.fromarray(LEVELS[..., :3]), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(levels(path), LEVELS[..., :3])


def test_exif_that_cannot_be_written_anew_does_not_matter(tmp_path):
    """A resolution of one byte in place of a fraction, over which Pillow's own turning falls with a TypeError."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    odd = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")
    assert odd != exif.tobytes()
    path = saved(tmp_path, "png", Image.fromarray(LEVELS[..., :3]), exif=odd)
    assert np.array_equal(levels(path), np.rot90(LEVELS[..., :3], -1))
    assert np.array_equal(levels(path), load_image(path))


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AttributeError, OverflowError])
def test_whatever_a_broken_file_brings_is_one_sentence(tmp_path, monkeypatch, error):
    def fail(_):
        raise error("odd")

    path = saved(tmp_path, "png", Image.fromarray(LEVELS[..., :3]))
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(PictureError, match="is cut short or damaged"):
        read_picture(path)
