"""How pictures are turned by their EXIF data, whatever state that is in."""

from __future__ import annotations

from PIL import Image

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF's orientation -> what turns a picture upright."""


def upright(picture: Image.Image) -> Image.Image:
    """Turned as EXIF says; as it is where it has EXIF data that cannot be read. The EXIF data is left as it is.

    Args:
        picture: Loaded; EXIF may come after the pixels.
    """
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # of broken EXIF, Pillow lets through whatever comes
        return picture
    return picture if turn is None else picture.transpose(turn)
