"""What a file says besides its pixels, made fit for the restored picture: EXIF, XMP, colour profile, resolution."""

from __future__ import annotations

import math
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

_ORIENTATION, _EXIF_IFD, _GPS_IFD = 0x0112, 0x8769, 0x8825
_EXIF_WIDTH, _EXIF_HEIGHT = 0xA002, 0xA003
_LAYOUT = frozenset({
    *range(254, 260), 262, 263, 266, 273, *range(277, 282), 284, 317, *range(320, 326), 330, 338, 339, 347, 512, 513,
    514, 529, 530, 531, 532, 700, 34377, 34675,
})  # fmt: skip
"""Tags that say how a TIFF holds its pixels, or hold XMP, ICC or Photoshop's data: none is true of another file."""
_POINTERS = re.compile(rb"hdrgm:|Container:Directory|MicroVideoOffset|HasExtendedXMP")
"""XMP of files that hold more than one picture, or a film, or further XMP behind it: it points at what is not kept."""
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>))[0-9]")
_PROFILE_HEADER = 128
METADATA_FAILURES = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, struct.error
)  # fmt: skip
"""What Pillow raises on metadata that are damaged."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Carried:
    """What is written beside the pixels.

    Args:
        exif: Empty, or from `Exif\\0\\0` on; the orientation is 1, sizes are those of the restored picture.
        icc: The colour profile, or empty.
        xmp: Or empty; the orientation is 1.
        dpi: Pixels an inch, across and down, or None.
        notes: What could not be carried over, one remark each.
    """

    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_gray_profile(self) -> bool:
        """Whether the profile describes gray pictures."""
        return self.icc[16:20] == b"GRAY"


def read_carried(picture: Image.Image, size: tuple[int, int], *, gray: bool) -> Carried:
    """What an opened file says besides its pixels, for an upright picture.

    Broken parts are left out with a note; nothing is raised.

    Args:
        picture: Opened by Pillow, its file still open. Its EXIF data are changed, so that it counts as upright.
        size: Width and height of the upright picture.
        gray: Whether it has no colours.
    """
    notes: list[str] = []
    return Carried(
        exif=_attempted(lambda: _exif(picture, size, notes), b"", "EXIF", notes),
        icc=_attempted(lambda: _profile(picture, gray), b"", "ICC profile", notes),
        xmp=_attempted(lambda: _xmp(picture), b"", "XMP", notes),
        dpi=_attempted(lambda: _resolution(picture), None, "resolution", notes),
        notes=tuple(notes),
    )


def _attempted(read: Callable[[], _T], nothing: _T, what: str, notes: list[str]) -> _T:
    """What is read; `nothing` and a note where that fails, and a note where Pillow warns."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = read()
        except METADATA_FAILURES as error:
            notes.append(f"without its {what} ({_first_line(error)})")
            return nothing
    if warned:
        notes.append(f"its {what} is damaged in part ({_first_line(warned[0].message)})")
    return found


def _first_line(error: Exception | Warning | str) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()).rstrip(".") if lines else type(error).__name__


def _exif(picture: Image.Image, size: tuple[int, int], notes: list[str]) -> bytes:
    exif = picture.getexif()
    for tag in _LAYOUT.intersection(exif):
        del exif[tag]
    if not len(exif):
        return b""
    exif[_ORIENTATION] = 1
    details = exif.get_ifd(_EXIF_IFD)
    for tag, side in zip((_EXIF_WIDTH, _EXIF_HEIGHT), size, strict=True):
        if tag in details:
            details[tag] = side
    try:
        return exif.tobytes()
    except METADATA_FAILURES:
        notes.append(f"without the damaged EXIF tags {', '.join(map(str, _remove_damaged(exif)))}")
        return exif.tobytes()


def _remove_damaged(exif: Image.Exif) -> list[int]:
    """Take those tags out of EXIF data that cannot be written, and say which."""
    removed = []
    for group in (None, _EXIF_IFD, _GPS_IFD):
        tags = exif if group is None else exif.get_ifd(group)
        for tag, value in list(tags.items()):
            if tag in (_EXIF_IFD, _GPS_IFD):
                continue
            alone = Image.Exif()
            alone[tag if group is None else group] = value if group is None else {tag: value}
            try:
                alone.tobytes()
            except METADATA_FAILURES:
                del tags[tag]
                removed.append(tag)
    return removed


def _profile(picture: Image.Image, gray: bool) -> bytes:
    profile = picture.info.get("icc_profile") or b""
    if not profile:
        return b""
    if len(profile) < _PROFILE_HEADER or profile[36:40] != b"acsp":
        raise ValueError("it is no colour profile")
    space = profile[16:20]
    if space != b"RGB " and not (gray and space == b"GRAY"):
        raise ValueError(f"it is for {space.decode('ascii', 'replace').strip()}")
    return profile


def _xmp(picture: Image.Image) -> bytes:
    xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    if found := _POINTERS.search(xmp):
        raise ValueError(f"{found[0].decode()} speaks of other parts of the file, which are not kept")
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp.rstrip(b"\0"))


def _resolution(picture: Image.Image) -> tuple[float, float] | None:
    across, down = (float(value) for value in picture.info.get("dpi", (0, 0)))
    if not all(math.isfinite(value) and 1 <= value <= 65535 for value in (across, down)):
        return None
    return across, down
