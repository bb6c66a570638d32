"""A cheap look at a JPEG's markers: nothing large is allocated for a file that lies, and errors say what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .sampling import Sampling, block_counts, component_ratios

MAX_PIXELS = 178_956_970
"""Largest picture that is opened, width times height: Pillow's own limit against decompression bombs."""

_SOI, _EOI, _SOS, _DHT, _COM, _JPEG_LS = 0xD8, 0xD9, 0xDA, 0xC4, 0xFE, 0xF7
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8), _SOI})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {_JPEG_LS}
_PROGRESSIVE = 0xC2
_UNSUPPORTED = {
    **dict.fromkeys((0xC3, 0xC5, 0xC6, 0xC7, _JPEG_LS), "a lossless or hierarchical JPEG"),
    **dict.fromkeys(range(0xC9, 0xD0), "an arithmetic-coded JPEG"),
}
_AS_PNG = "open it elsewhere and save it as PNG or as an ordinary JPEG"


class JPEGError(ValueError):
    """A file that cannot be used as a JPEG; the message is one sentence with the file's name and what to do."""


@dataclass(frozen=True)
class Header:
    """What the frame header promises: size in pixels, sampling factors per component, and the coding."""

    width: int
    height: int
    sampling: Sampling
    progressive: bool


def scan_header(data: bytes, name: str) -> Header:
    """Read and judge the frame header of a JPEG's bytes; `name` is for the error.

    Raises JPEGError for anything but an 8-bit Huffman-coded JPEG of 1 or 3 components, for a size of zero or above
    `MAX_PIXELS`, and for a size that so few bytes cannot hold: a scan spends at least one bit on a block (T.81, F.1.2).
    """
    _check_start(data, name)
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            return _judged(marker, data[start + 4 : end], len(data), name)
    raise JPEGError(f"{name} breaks off or is damaged before its picture begins: get a complete copy of the file")


def without_metadata(data: bytes, standard_tables: bytes) -> bytes:
    """The same JPEG without comments and APP segments, save those that tell the colour space (JFIF, Adobe).

    `standard_tables` are DHT segments, inserted where the file has none of its own (frames of Motion JPEG).
    """
    kept, coded = [bytes((0xFF, _SOI))], False
    for marker, start, end in _segments(data):
        if marker == _SOS:
            return b"".join([*kept, b"" if coded else standard_tables, data[start:]])
        coded |= marker == _DHT
        if marker != _COM and (not 0xE0 <= marker <= 0xEF or marker in (0xE0, 0xEE)):
            kept.append(data[start:end])
    return data


def huffman_tables(data: bytes) -> bytes:
    """The DHT segments of a JPEG."""
    return b"".join(data[start:end] for marker, start, end in _segments(data) if marker == _DHT)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment up to the first scan; bytes between segments are skipped as libjpeg does."""
    position = data.find(b"\xff", 2)
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker == _EOI:
            return
        if marker in (0x00, 0xFF) or marker in _STANDALONE:
            position = data.find(b"\xff", position + (1 if marker == 0xFF else 2))
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end < position + 4 or end > len(data):
            return
        yield marker, position, end
        if marker == _SOS:
            return
        position = data.find(b"\xff", end)


def _check_start(data: bytes, name: str) -> None:
    if not data:
        raise JPEGError(f"{name} is empty: choose a file that holds a JPEG")
    if data[:2] != bytes((0xFF, _SOI)):
        raise JPEGError(
            f"{name} is not a JPEG (it starts with {data[:4].hex(' ')}): load it with a general image loader"
        )


def _judged(marker: int, frame: bytes, size: int, name: str) -> Header:
    if marker in _UNSUPPORTED:
        raise JPEGError(f"{name} is {_UNSUPPORTED[marker]}, which is not supported: {_AS_PNG}")
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        raise JPEGError(f"{name} has a damaged frame header: get a complete copy of the file")
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if frame[0] != 8:
        raise JPEGError(f"{name} has {frame[0]} bits per sample where 8 were expected: {_AS_PNG}")
    if frame[5] not in (1, 3):
        kind = "CMYK or YCCK (4 components)" if frame[5] == 4 else f"a JPEG of {frame[5]} components"
        raise JPEGError(f"{name} is {kind} where color or grayscale was expected: convert it to RGB")
    sampling = tuple((frame[7 + 3 * i] >> 4, frame[7 + 3 * i] & 15) for i in range(frame[5]))
    if not width or not height:
        raise JPEGError(f"{name} states a size of {width}x{height} in its header: save it again with another program")
    _check_promise(width, height, sampling, size, name)
    if width * height > MAX_PIXELS:
        raise JPEGError(
            f"{name} is {width}x{height}, more than {MAX_PIXELS // 10**6} million pixels: crop or shrink it"
        )
    return Header(width, height, sampling, marker == _PROGRESSIVE)


def _check_promise(width: int, height: int, sampling: Sampling, size: int, name: str) -> None:
    if any(not 1 <= factor <= 4 for pair in sampling for factor in pair):
        raise JPEGError(f"{name} has impossible sampling factors {sampling}: get an undamaged copy of the file")
    try:
        ratios = component_ratios(sampling)
    except ValueError as error:
        raise JPEGError(f"{name}: {error}") from error
    blocks = sum(rows * columns for rows, columns in (block_counts(height, width, ratio) for ratio in ratios))
    if 8 * size < blocks:
        raise JPEGError(
            f"{name} promises {width}x{height} but holds only {size} bytes: get a complete copy of the file"
        )
