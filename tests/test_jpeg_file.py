"""JPEG files are read without loss, and what cannot be read is refused in one sentence that names the file."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from restoration.jpeg import (
    Coefficients,
    JPEGError,
    QualityEstimate,
    apply_orientation,
    decode,
    decode_pixels,
    encode,
    encode_with_pillow,
    jpeg_data_from,
    read_jpeg,
    read_jpeg_and_pixels,
    tables_for_quality,
    undo_orientation,
)
from restoration.jpeg.header import huffman_tables

SOF, HEIGHT, WIDTH, COMPONENTS = 0xC0, 5, 7, 9  # offsets count from the frame header's 0xFF


def picture(height: int = 45, width: int = 61) -> np.ndarray:
    """A smooth colour picture with an edge, so that orientation and colour mistakes show."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack((4 * x, 5 * y, 128 + 60 * np.sin(x / 9)), -1).clip(0, 255)
    pixels[: height // 3, : width // 4] = (250, 20, 20)
    return pixels.astype(np.uint8)


def jpeg_bytes(pixels: np.ndarray | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture() if pixels is None else pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(bytes((0xFF, SOF))) + offset
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("name", ["4:4:4", "4:2:2", "4:2:0"])
def test_what_a_file_says_about_itself(tmp_path: Path, name: str, progressive: bool) -> None:
    path = tmp_path / "Über uns.jpeg"
    path.write_bytes(jpeg_bytes(quality=37, subsampling=name, progressive=progressive))
    data = read_jpeg(path)
    assert (data.width, data.height, data.orientation, data.name) == (61, 45, 1, "Über uns.jpeg")
    assert (data.subsampling, data.color_space, data.progressive) == (name, "ycbcr", progressive)
    assert data.quality == QualityEstimate(37.0, exact=True)
    assert torch.equal(data.tables[0][0].long(), tables_for_quality(37)[0])
    assert all(plane.dtype == torch.int16 for plane in data.coefficients.planes)


def test_progressive_and_restart_files_hold_the_same_coefficients() -> None:
    plain, *others = (
        read_jpeg(jpeg_bytes(quality=60, **options)).coefficients.planes
        for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True})
    )
    for planes in others:
        assert all(torch.equal(a, b) for a, b in zip(planes, plain, strict=True))


def test_path_string_and_bytes_are_the_same_file(tmp_path: Path) -> None:
    data = jpeg_bytes(quality=50)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for source in (path, str(path), data):
        assert torch.equal(read_jpeg(source).coefficients.planes[0], read_jpeg(path).coefficients.planes[0])
    assert read_jpeg(data, name="from the clipboard").name == "from the clipboard"


def test_pixels_are_pillows_and_codec_agrees_with_them() -> None:
    data = jpeg_bytes(quality=80, subsampling=2)
    jpeg, pixels = read_jpeg_and_pixels(data)
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert torch.equal((pixels * 255).round().byte(), reference) and torch.equal(pixels, decode_pixels(data))
    assert ((decode(jpeg.coefficients)[0] - pixels).abs() * 255).max() < 3.01


def test_gray_files_have_one_component_and_three_equal_channels() -> None:
    jpeg, pixels = read_jpeg_and_pixels(jpeg_bytes(picture()[..., 0], quality=70))
    assert (jpeg.subsampling, jpeg.color_space, len(jpeg.tables)) == ("gray", "gray", 1)
    assert jpeg.quality == QualityEstimate(70.0, exact=True)
    assert pixels.shape == (3, 45, 61) and torch.equal(pixels[0], pixels[2])


def test_rgb_files_are_recognized_and_decoded_without_the_matrix() -> None:
    jpeg, pixels = read_jpeg_and_pixels(jpeg_bytes(quality=90, keep_rgb=True))
    assert (jpeg.color_space, jpeg.subsampling) == ("rgb", "4:4:4")
    assert jpeg.quality == QualityEstimate(90.0, exact=True)
    assert ((decode(jpeg.coefficients)[0] - pixels).abs() * 255).max() < 1.01


def test_motion_jpeg_frames_without_huffman_tables_are_read() -> None:
    data = jpeg_bytes(quality=50)
    tables = huffman_tables(data)
    assert tables
    frame = data
    for _ in range(4):
        start = frame.index(b"\xff\xc4")
        frame = frame[:start] + frame[start + 2 + int.from_bytes(frame[start + 2 : start + 4], "big") :]
    assert huffman_tables(frame) == b""
    assert torch.equal(read_jpeg(frame).coefficients.planes[0], read_jpeg(data).coefficients.planes[0])


def test_large_metadata_does_not_hinder(tmp_path: Path) -> None:
    """jpeglib takes 50 markers at most; a profile in many chunks has more."""
    plain = jpeg_bytes(quality=50)
    data = plain[:2] + b"".join(b"\xff\xe2\x00\x10ICC_PROFILE\0" + bytes((i, 90)) for i in range(1, 91)) + plain[2:]
    assert torch.equal(read_jpeg(data).coefficients.planes[1], read_jpeg(plain).coefficients.planes[1])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_exifs_and_can_be_undone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg_bytes(quality=90, exif=exif.tobytes())
    jpeg, pixels = read_jpeg_and_pixels(data)
    assert jpeg.orientation == orientation and pixels.shape == (3, 45, 61)
    upright = torch.from_numpy(np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))).permute(2, 0, 1)
    turned = apply_orientation(pixels, orientation)
    assert torch.equal((turned * 255).round().byte(), upright)
    assert torch.equal(undo_orientation(turned, orientation), pixels)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\x05\0", b"Exif\0\0"])
def test_broken_exif_means_no_orientation(exif: bytes) -> None:
    assert read_jpeg(jpeg_bytes(exif=exif)).orientation == 1


def test_an_orientation_outside_exif_is_refused() -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        apply_orientation(torch.zeros(3, 2, 2), 9)


def test_a_compression_in_memory_is_like_one_from_a_file() -> None:
    images = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255
    made = jpeg_data_from(encode(images, tables_for_quality(40), "4:2:0"), "made.jpg")
    read = read_jpeg(encode_with_pillow(images[0], 40, "4:2:0"), name="made.jpg")
    assert (made.quality, made.subsampling, made.name) == (read.quality, read.subsampling, read.name)
    for ours, theirs in zip(made.coefficients.planes, read.coefficients.planes, strict=True):
        assert ours.dtype == theirs.dtype and (ours != theirs).float().mean() < 0.01
    assert all(torch.equal(a, b) for a, b in zip(made.tables, read.tables, strict=True))


def test_one_picture_of_a_batch() -> None:
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    batch = encode(images, tables_for_quality(torch.tensor([20, 40, 60])), "4:4:4")
    with pytest.raises(ValueError, match="one picture"):
        jpeg_data_from(batch, "batch.jpg")
    assert [jpeg_data_from(batch[i], "x").quality.quality for i in range(3)] == [20, 40, 60]
    assert isinstance(batch[-1], Coefficients) and torch.equal(decode(batch[-1])[0], decode(batch)[2])
    with pytest.raises(IndexError):
        batch[3]


@pytest.mark.parametrize("name", ["4:4:4", "4:2:2", "4:2:0", "gray"])
def test_pillow_encodes_what_is_asked(name: str) -> None:
    jpeg = read_jpeg(encode_with_pillow(torch.rand(3, 20, 30), 55, name))
    assert (jpeg.subsampling, jpeg.quality.quality, jpeg.width, jpeg.height) == (name, 55, 30, 20)


def test_pillow_cannot_encode_other_samplings_or_shapes() -> None:
    with pytest.raises(ValueError, match="4:4:0"):
        encode_with_pillow(torch.rand(3, 8, 8), 50, "4:4:0")
    with pytest.raises(ValueError, match="one RGB image"):
        encode_with_pillow(torch.rand(1, 3, 8, 8), 50)


def cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(buffer, "JPEG")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "is empty": b"",
    "is not a JPEG": png(),
    "breaks off": jpeg_bytes()[:40],
    "cut short": jpeg_bytes(quality=95)[:-200],
    "CMYK": cmyk(),
    "12 bits": patched(jpeg_bytes(), 4, b"\x0c"),
    "arithmetic": patched(jpeg_bytes(), 0, b"\xff\xc9"),
    "lossless": patched(jpeg_bytes(), 0, b"\xff\xc3"),
    "61x0": patched(jpeg_bytes(), HEIGHT, b"\0\0"),
    "promises 65500x65500 but holds only": patched(jpeg_bytes(), HEIGHT, b"\xff\xdc\xff\xdc"),
    "components": patched(jpeg_bytes(), COMPONENTS, b"\x02"),
    "sampling factors": patched(jpeg_bytes(), COMPONENTS + 2, b"\x50"),
    "fractional": patched(jpeg_bytes(), COMPONENTS + 2, b"\x31\x01\x02\x21"),
}


@pytest.mark.parametrize("function", [read_jpeg, decode_pixels])
@pytest.mark.parametrize("complaint", BROKEN)
def test_each_broken_kind_is_refused_in_one_sentence(tmp_path: Path, complaint: str, function: object) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(BROKEN[complaint])
    with pytest.raises(JPEGError, match=complaint) as caught:
        function(path)  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith("holiday.jpg") and ": " in message and "\n" not in message and "<_io" not in message


def test_too_many_pixels_are_refused_before_anything_is_allocated() -> None:
    """Enough bytes for the promise, but a size above the limit."""
    data = patched(jpeg_bytes(picture(16, 16)[..., 0]), HEIGHT, b"\x40\x00\x40\x00") + bytes(600_000)
    with pytest.raises(JPEGError, match="million pixels"):
        read_jpeg(data)


def test_missing_files_and_folders_are_refused_with_their_path(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(JPEGError, match="check the path"):
            read_jpeg(path)


def test_no_temporary_files_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read_jpeg(jpeg_bytes())
    assert os.listdir(tmp_path) == []
