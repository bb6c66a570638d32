"""Which pictures are restored, under which names, and which share of them is whose: the same on every machine."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from restoration.pictures import picture_format
from training.restore.saving import PART, SUFFIXES

_PICTURE_ENDINGS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"}
)  # fmt: skip
_FORMAT_OF_ENDING = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_ENDINGS_NOT_WRITTEN = frozenset({
    ".apng", ".arw", ".avif", ".bmp", ".cr2", ".cr3", ".dib", ".dng", ".exr", ".gif", ".hdr", ".heic", ".heif", ".hif",
    ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpf", ".jpx", ".jxl", ".mpo", ".nef", ".orf", ".pbm", ".pcx", ".pdf",
    ".pgm", ".pnm", ".ppm", ".psd", ".qoi", ".raf", ".raw", ".rw2", ".svg", ".tga", ".tif", ".tiff", ".xcf",
})  # fmt: skip


@dataclass(frozen=True)
class PlannedPicture:
    """One picture: its number from 1, its path inside of IN with slashes, where it is, and where its result goes."""

    number: int
    name: str
    source: Path
    target: Path


@dataclass(frozen=True)
class Plan:
    """All pictures of IN, sorted by name, restored before or not, and how many other files lie among them."""

    pictures: tuple[PlannedPicture, ...]
    left_out: int = 0

    def share(self, index: int, count: int) -> list[PlannedPicture]:
        """What worker `index` of `count` restores, done or not: every `count`-th, so that workers need not talk."""
        return list(self.pictures[index::count])

    def missing(self) -> int:
        """How many results are not there."""
        return sum(not picture.target.exists() for picture in self.pictures)


def output_kind(source: Path, output: Path, kind: str | None) -> str:
    """The format of the results: what is asked for, else what OUT ends in where it names a file, else PNG.

    Raises:
        ValueError: The two contradict each other, or OUT names a file of a format that is not written.
    """
    if source.is_file() and not output.is_dir() and output.suffix.lower() in _ENDINGS_NOT_WRITTEN:
        raise ValueError(
            f"expected OUT to end in {', '.join(_FORMAT_OF_ENDING)}, or to be a folder, got {output.name}: results are "
            f"not written as {output.suffix}. Choose another ending."
        )
    named = _FORMAT_OF_ENDING.get(output.suffix.lower()) if _names_file(source, output) else None
    if kind is not None and named is not None and kind != named:
        raise ValueError(
            f"expected OUT to end in {SUFFIXES[kind]} with --format {kind}, got {output.name}. Change one of the two."
        )
    return kind or named or "png"


def make_plan(source: Path, output: Path, suffix: str) -> Plan:
    """All pictures of a folder and its sub-folders, or one file, told by their content, and where the results go.

    Results keep their path and their name up to its ending. Where several pictures of a folder would get the same name,
    each of them keeps its own ending as well: a.jpg and a.png become a.jpg.png and a.png.png.

    Args:
        source: A folder or a file.
        output: A folder, which may lie inside of `source`; for a file, a folder or a file.
        suffix: Of the results.

    Raises:
        FileNotFoundError: There is no `source`, or no picture in it.
        ValueError: Results would take the place of pictures.
    """
    if source.is_file():
        target = output if _names_file(source, output) else output / f"{source.stem}{suffix}"
        _check_one(source, target)
        return Plan((PlannedPicture(1, source.name, source, target),))
    _check_folders(source, output)
    found = sorted(_files(source, output))
    names = [name for name, is_picture in found if is_picture]
    if not names:
        raise FileNotFoundError(f"no picture in {source}: expected JPEG, PNG, WebP, BMP or TIFF, also in sub-folders.")
    targets = result_names(names, suffix)
    pictures = tuple(
        PlannedPicture(number, name, source / name, output / target)
        for number, (name, target) in enumerate(zip(names, targets, strict=True), 1)
    )
    _check_apart(source, output, pictures)
    return Plan(pictures, len(found) - len(names))


def result_names(names: list[str], suffix: str) -> list[str]:
    """The name of each result: with `suffix` for the ending, or behind it where others would get the same name."""
    whole: set[str] = set()
    while True:
        results = [name + suffix if name in whole else _with_suffix(name, suffix) for name in names]
        count = Counter(result.casefold() for result in results)  # some file systems do not tell a.png from A.png
        again = {name for name, result in zip(names, results, strict=True) if count[result.casefold()] > 1} - whole
        if not again:
            return results
        whole |= again


def _with_suffix(name: str, suffix: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{os.path.splitext(last)[0]}{suffix}"


def _names_file(source: Path, output: Path) -> bool:
    return source.is_file() and not output.is_dir() and output.suffix.lower() in _FORMAT_OF_ENDING


def _files(source: Path, output: Path) -> Iterator[tuple[str, bool]]:
    """The path of each file inside of `source`, and whether it is to be restored; without what lies in `output`."""
    apart = os.path.realpath(output)
    for root, folders, names in os.walk(source):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) != apart]
        for name in names:
            path = Path(root, name)
            if path.is_file() and not name.endswith(PART):
                yield path.relative_to(source).as_posix(), _is_picture(path)


def _is_picture(path: Path) -> bool:
    """By content; a file that is called a picture is to be restored, or named, all the same, unless it is hidden."""
    called = path.suffix.lower() in _PICTURE_ENDINGS and not path.name.startswith(".")
    return called or is_jpeg(path) or picture_format(path) is not None


def is_jpeg(path: Path) -> bool:
    """Whether a file begins as JPEGs do."""
    try:
        with open(path, "rb") as file:
            return file.read(3) == b"\xff\xd8\xff"
    except OSError:
        return False


def _check_one(source: Path, target: Path) -> None:
    if os.path.realpath(source) == os.path.realpath(target):
        raise ValueError(f"expected OUT to be another file than {source}, which it would replace. Give another OUT.")


def _check_folders(source: Path, output: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"there is no {source}: give the folder with the pictures, or one file.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"expected a folder for the results of a folder, got the file {output}. Give another OUT.")
    if os.path.realpath(source) == os.path.realpath(output):
        raise ValueError(f"expected OUT to be another folder than IN, got {output} for both. Give another OUT.")


def _check_apart(source: Path, output: Path, pictures: tuple[PlannedPicture, ...]) -> None:
    """Results must not lie where the next run looks for pictures, but for OUT itself, which it leaves out."""
    inside = Path(os.path.realpath(source))
    if not inside.is_relative_to(os.path.realpath(output)):
        return
    for picture in pictures:
        if Path(os.path.realpath(picture.target)).is_relative_to(inside):
            raise ValueError(
                f"the result of {picture.name} would lie inside of IN, as {picture.target}, and be restored again by "
                "the next run. Give an OUT that does not hold IN."
            )
