"""Compression of uint8 pictures in memory: JPEG by Pillow, decoded by Pillow or FFmpeg, and WebP."""

from __future__ import annotations

import io
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

Decoder = Literal["pillow", "ffmpeg"]
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
"""From 17 on PyAV starts threads, one for each core, to convert the colours of any picture; 16 has none."""


def check_image(image: np.ndarray) -> None:
    """Refuse what is no RGB picture (H,W,3) of 8 bits.

    Raises:
        ValueError: Shape or type are others.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an RGB picture (H,W,3) of dtype uint8, got {image.shape} of {image.dtype}")


def compress(
    image: np.ndarray,
    quality: int,
    subsampling: str = "4:2:0",
    decoder: Decoder = "pillow",
    *,
    grayscale: bool = False,
) -> np.ndarray:
    """Encodes (H,W,3) uint8 RGB as baseline JPEG with Pillow and decodes it again to the same shape.

    `decoder="ffmpeg"` gives the pixels ComfyUI's LoadImage shows: FFmpeg's MJPEG decoder, then swscale's yuvj to rgb24.
    """
    data = encode(image, quality, subsampling, grayscale=grayscale)
    if decoder == "pillow":
        return _decode_pillow(data)
    if decoder == "ffmpeg":
        return decode_ffmpeg(data)
    raise ValueError(f"decoder must be 'pillow' or 'ffmpeg', got {decoder!r}")


def encode(image: np.ndarray, quality: int, subsampling: str = "4:2:0", *, grayscale: bool = False) -> bytes:
    """The bytes of a baseline JPEG by Pillow with the standard tables (quality 0 to 100, 0 as libjpeg's 1)."""
    check_image(image)
    if subsampling not in SUBSAMPLINGS:
        raise ValueError(f"subsampling must be one of {SUBSAMPLINGS}, got {subsampling!r}")
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if grayscale:
        picture.convert("L").save(buffer, "JPEG", quality=quality)
    else:
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def compress_webp(image: np.ndarray, quality: int) -> np.ndarray:
    """Encodes (H,W,3) uint8 RGB as lossy WebP with Pillow (quality 0 to 100, always 4:2:0) and decodes it again."""
    check_image(image)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality)
    return _decode_pillow(buffer.getvalue())


def decode_ffmpeg(data: bytes) -> np.ndarray:
    """Decodes one JPEG with FFmpeg to (H,W,3) uint8 RGB; the same pixels as opening the file as a video."""
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    packet = av.Packet(data)
    frames = decoder.decode(packet) or decoder.decode(None)
    if not frames:
        raise ValueError(f"FFmpeg found no picture in these {len(data)} bytes: expected one complete JPEG")
    return frames[0].to_ndarray(format="rgb24", **_ONE_THREAD)


def _decode_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))
