"""Which pictures are evaluated, and how a clean one becomes a JPEG."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from restoration.jpeg import JPEGData, apply_orientation, encode_with_pillow, read_jpeg_and_pixels
from restoration.pictures import read_picture
from training.data.pictures import IMAGE_EXTENSIONS
from training.data.shards import is_shards
from training.restore.plan import is_jpeg

_SHIFT = 4
"""How far the second block grid of a double JPEG is displaced, pixels: FBCNN's, which DriftRec compares with."""
_MOST_NAMED = 3


@dataclass(frozen=True)
class Source:
    """A picture by its path inside of the folder, with slashes, and the files that there are of it."""

    name: str
    clean: Path | None
    degraded: Path | None


@dataclass(frozen=True)
class Condition:
    """What happened to pictures before they are restored.

    Args:
        label: In tables: `10`, `30/10`, or `as given`.
        quality: Of the last compression, 1 to 100; None for pictures that are degraded already.
        first_quality: Of a compression before that, on another grid; None where there was none.
    """

    label: str
    quality: int | None
    first_quality: int | None = None


@dataclass(frozen=True)
class Degraded:
    """A picture as a restorer gets it.

    Args:
        pixels: (1, 3, H, W) in [0, 1], whole 8-bit levels.
        clean: What it should be, alike; None where nobody knows.
        jpeg: What its file holds, of JPEGs.
        file: The bytes of that file.
    """

    pixels: Tensor
    clean: Tensor | None
    jpeg: JPEGData | None
    file: bytes | None

    @property
    def bits_per_pixel(self) -> float | None:
        """Of the JPEG's file, headers and all."""
        return None if self.file is None else 8 * len(self.file) / (self.pixels.shape[-1] * self.pixels.shape[-2])


def find_sources(data: Path | None, degraded: Path | None, limit: int = 0, output: Path | None = None) -> list[Source]:
    """The pictures of a folder; of two folders, those of the second with their clean ones of the first.

    Files belong together when their paths without the ending are the same. What lies below one of these folders inside
    of another is none of the other's pictures: results of an earlier run are not measured.

    Args:
        data: Folder of clean pictures.
        degraded: Folder of pictures that are degraded already.
        limit: Take the first ones only; 0 takes all.
        output: Folder of the results.

    Raises:
        FileNotFoundError: A folder is missing, or has no pictures.
        ValueError: A degraded picture has no clean one, or more than one; or what is given is no folder for itself.
    """
    apart = [folder for folder in (data, degraded, output) if folder is not None]
    if degraded is None:
        assert data is not None
        sources = [Source(path.relative_to(data).as_posix(), path, None) for path in _pictures("--data", data, apart)]
    elif data is None:
        found = _pictures("--degraded", degraded, apart)
        sources = [Source(path.relative_to(degraded).as_posix(), None, path) for path in found]
    else:
        sources = _paired(data, degraded, apart)
    if output is not None:
        _check_output(output, data, degraded)
    return sources[: limit or None]


def _pictures(option: str, folder: Path, apart: Sequence[Path]) -> list[Path]:
    """All below a folder, sorted, without those below the folders inside of it that are something else."""
    if not folder.is_dir():
        there = folder.exists() or is_shards(folder)
        found = f"{folder} is no folder" if there else f"there is no folder {folder}"
        unpack = ", and unpack shards first" if is_shards(folder) else ""
        raise FileNotFoundError(f"{option}: {found}. Give a folder with pictures{unpack}.")
    inside = _inside(folder, apart)
    found = [
        path for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()
        and not any(Path(os.path.realpath(path.parent)).is_relative_to(other) for other in inside)
    ]  # fmt: skip
    if not found:
        left_out = f", {', '.join(map(str, inside))} left out" if inside else ""
        endings = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise FileNotFoundError(
            f"{option}: no picture in {folder}: expected files ending in {endings}, also in sub-folders{left_out}."
        )
    return found


def _inside(folder: Path, others: Sequence[Path]) -> list[Path]:
    """The real paths of those that lie inside of a folder, and are not the folder itself."""
    real = Path(os.path.realpath(folder))
    return [other for other in map(Path, map(os.path.realpath, others)) if other != real and real in other.parents]


def _check_output(output: Path, data: Path | None, degraded: Path | None) -> None:
    for option, folder in (("--data", data), ("--degraded", degraded)):
        if folder is not None and os.path.realpath(folder) == os.path.realpath(output):
            raise ValueError(f"expected --output to be another folder than {option}, got {output} for both.")


def _paired(data: Path, degraded: Path, apart: Sequence[Path]) -> list[Source]:
    clean: dict[str, list[Path]] = {}
    for path in _pictures("--data", data, apart):
        clean.setdefault(_key(path, data), []).append(path)
    sources, alone = [], []
    for path in _pictures("--degraded", degraded, apart):
        found = clean.get(_key(path, degraded), [])
        if len(found) == 1:
            sources.append(Source(path.relative_to(degraded).as_posix(), found[0], path))
        else:
            alone.append(f"{path.relative_to(degraded).as_posix()} has {len(found) or 'none'}")
    if alone:
        more = f", and {len(alone) - _MOST_NAMED} more" if len(alone) > _MOST_NAMED else ""
        raise ValueError(
            f"expected one clean picture of the same name in {data} for each picture in {degraded}, but "
            f"{', '.join(alone[:_MOST_NAMED])}{more}. Rename or remove them."
        )
    return sources


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def read_clean(path: Path) -> Tensor:
    """A picture (1, 3, H, W) in [0, 1], upright; JPEGs by libjpeg.

    Raises:
        ValueError: It is damaged, or no picture.
        OSError: It cannot be read.
    """
    if not is_jpeg(path):
        return read_picture(path)[None]
    jpeg, pixels = read_jpeg_and_pixels(path)
    return apply_orientation(pixels, jpeg.orientation)[None]


def read_degraded(source: Source) -> Degraded:
    """A picture that is degraded already, beside its clean one where there is one.

    Raises:
        ValueError: A file is damaged, or the two differ in size.
        OSError: A file cannot be read.
    """
    assert source.degraded is not None
    clean = None if source.clean is None else read_clean(source.clean)
    file = source.degraded.read_bytes() if is_jpeg(source.degraded) else None
    if file is None:
        degraded = Degraded(read_picture(source.degraded)[None], clean, None, None)
    else:
        jpeg, pixels = read_jpeg_and_pixels(file, name=source.name)
        degraded = Degraded(apply_orientation(pixels, jpeg.orientation)[None], clean, jpeg, file)
    if clean is not None and clean.shape != degraded.pixels.shape:
        sizes = [f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in (degraded.pixels, clean)]
        raise ValueError(
            f"{source.name} is {sizes[0]}, its clean picture {sizes[1]}: give pictures of one size, not resized ones"
        )
    return degraded


def compressed(clean: Tensor, condition: Condition, subsampling: str, name: str) -> Degraded:
    """A clean picture (1, 3, H, W) as libjpeg compresses it, once or twice.

    For the second time it is cut 4 pixels further right and down, and the clean picture with it.

    Raises:
        ValueError: The picture is too small for that.
    """
    assert condition.quality is not None
    if condition.first_quality is not None:
        if min(clean.shape[-2:]) <= _SHIFT:
            raise ValueError(f"{name} is too small to be compressed twice: remove it")
        first = encode_with_pillow(clean[0], condition.first_quality, subsampling)
        whole = read_jpeg_and_pixels(first, name=name)[1][None]
        source, clean = (picture[..., _SHIFT:, _SHIFT:] for picture in (whole, clean))
    else:
        source = clean
    file = encode_with_pillow(source[0], condition.quality, subsampling)
    jpeg, pixels = read_jpeg_and_pixels(file, name=name)
    return Degraded(pixels[None], clean, jpeg, file)


def fingerprint(picture: Tensor) -> str:
    """A short name of a picture's levels, so that figures of another picture are not taken for its own."""
    levels = (picture * 255).round().to(torch.uint8).contiguous().numpy()
    return hashlib.blake2b(levels.tobytes() + str(levels.shape).encode(), digest_size=8).hexdigest()
