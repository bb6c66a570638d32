"""Pictures inside of tar files (WebDataset's shards), read where they lie, without unpacking.

A member is a path through its shard, e.g. `data/shards-007.tar/0000123_beach.png`. What lies where in a shard is read
once, from the index that `python -m training prepare` wrote beside it, or else from the headers in the tar itself.
"""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

Index = dict[str, tuple[int, int]]
"""Name of a member, as a path in POSIX form -> where its bytes begin in the shard, and how many they are."""

SEPARATOR = "::"
"""Between several patterns of shards, as in WebDataset."""
_ENDING = ".tar"
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_REMOTE = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]+:/")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS = 1_000_000
_READERS = 8
_OPEN_FILES = 32

logger = logging.getLogger(__name__)


class ShardError(ValueError):
    """Shards cannot be used as they are named; the message says what to do."""


def is_shards(source: str | Path) -> bool:
    """Whether it names shards and not a folder: tar files, several of them, or something out on the network."""
    text = str(source)
    named = text.endswith((_ENDING, *_PACKED)) or SEPARATOR in text or _REMOTE.match(text) is not None
    return named and not Path(source).is_dir()


def expand_shards(source: str | Path) -> list[Path]:
    """The shards that a pattern names, in its order: `a-{000..127}.tar`, `{a,b}.tar`, `folder/*.tar`, several of them
    with `::` between.

    Raises:
        ShardError: It is a URL, a pipe, or a compressed tar.
        FileNotFoundError: Shards are missing.
    """
    text = str(source)
    if _REMOTE.match(text):
        raise ShardError(
            f"{text}: shards are read from disks alone, for each picture of an epoch comes from another place. "
            "Download them, or mount their store as a folder, and give its path."
        )
    if packed := next((part for part in text.split(SEPARATOR) if part.endswith(_PACKED)), None):
        raise ShardError(f"{packed}: a compressed tar cannot be read from its middle. Unpack it to .tar: gunzip FILE.")
    paths = [Path(name) for part in text.split(SEPARATOR) for name in _expanded(os.path.expanduser(part))]
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        named = f"there is no file {missing[0]}" if missing else f"no file has a name like {text}"
        raise FileNotFoundError(f"{named} ({len(missing)} of {len(paths)} shards are missing): check {text}.")
    return paths


def _expanded(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        named = glob.has_magic(pattern) and not os.path.exists(pattern)
        yield from sorted(glob.glob(pattern)) if named else [pattern]
        return
    for choice in _choices(found[1], pattern):
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _choices(text: str, pattern: str) -> list[str]:
    """What stands in braces: numbers `first..last`, with the zeros of the longer one, or words with commas between."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if numbers is None and "," not in text:
        raise ShardError(f"{pattern}: expected {{000..127}} or {{a,b}} in braces, got {{{text}}}.")
    if numbers is None:
        return text.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if abs(last - first) >= _MOST_SHARDS:
        raise ShardError(f"{pattern}: expected fewer than {_MOST_SHARDS} shards, got {abs(last - first) + 1}.")
    padded = any(number.startswith("0") and len(number) > 1 for number in numbers.groups())
    width = max(map(len, numbers.groups())) if padded else 0
    return [str(number).zfill(width) for number in range(first, last + 1 if first <= last else last - 1,
                                                         1 if first <= last else -1)]  # fmt: skip


def find_members(source: str | Path, endings: Collection[str]) -> list[Path]:
    """The members of all shards whose names end in one of `endings`, shard by shard in their order there.

    Raises:
        ShardError: The shards cannot be read from.
        FileNotFoundError: Shards are missing, or hold no such member.
    """
    shards = expand_shards(source)
    with ThreadPoolExecutor(_READERS) as pool:  # for network file systems: time goes by waiting
        indexes = list(pool.map(_remembered, map(str, shards)))
    found = [
        shard / name
        for shard, index in zip(shards, indexes, strict=True)
        for name in index
        if _is_wanted(PurePosixPath(name), endings)
    ]
    if not found:
        raise FileNotFoundError(
            f"no picture found in the {len(shards)} shards {source}: expected members ending in "
            f"{', '.join(sorted(endings))}"
        )
    return found


def _is_wanted(name: PurePosixPath, endings: Collection[str]) -> bool:
    """Whether a member is one of those looked for, and lies inside of its shard, as no damaged or hostile one does."""
    inside = not name.is_absolute() and ".." not in name.parts
    return inside and name.suffix.lower() in endings and not name.name.startswith(".")


def shard_of(path: Path) -> str | None:
    """The shard that a path leads through; None for a file of its own."""
    split = _split(path)
    return None if split is None else split[0]


def open_member(path: Path) -> BinaryIO | None:
    """The bytes of a member as a file in memory; None for a path that leads through no shard.

    Raises:
        OSError: There is no such member, or its shard cannot be read or ends before it.
    """
    split = _split(path)
    if split is None:
        return None
    shard, name = split
    place = _remembered(shard).get(name)
    if place is None:
        raise FileNotFoundError(f"there is no {name} in {shard}")
    data = _FILES.read(shard, *place)
    if len(data) < place[1]:
        raise OSError(f"{shard} ends within {name}: {len(data)} of {place[1]} bytes are there")
    return io.BytesIO(data)


def read_beside(path: Path, suffix: str) -> bytes | None:
    """The bytes of what lies beside a picture under its name with another ending, in a folder or a shard; None where
    there is nothing.

    Raises:
        OSError: It cannot be read.
    """
    beside = path.with_suffix(suffix)
    split = _split(beside)
    if split is None:
        return beside.read_bytes() if beside.is_file() else None
    member = open_member(beside) if split[1] in _remembered(split[0]) else None
    return None if member is None else member.read()


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies: beside it."""
    return shard.with_suffix(".index.json")


def scan_shard(shard: Path) -> Index:
    """What lies where in a tar, from its headers; where it is cut or damaged, what comes before that.

    Raises:
        OSError: It cannot be opened.
    """
    index: Index = {}
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse() and member.offset_data + member.size <= size:
                    index[PurePosixPath(member.name).as_posix()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        logger.warning("%s is no whole tar file (%s): %d members of it are used", shard, error, len(index))
    return index


def index_text(index: Index, size: int, **further: Any) -> str:
    """The text of the file beside a shard: it is valid for a shard of `size` bytes alone. `further` goes along."""
    members = [[name, *place] for name, place in index.items()]
    return json.dumps({"version": 1, "bytes": size, **further, "members": members}, separators=(",", ":"))


def stored_index(shard: Path) -> Index | None:
    """The index that lies beside a shard; None where there is none that is valid for it."""
    beside = index_path(shard)
    if not beside.is_file():
        return None
    try:
        stored = json.loads(beside.read_text(encoding="utf-8"))
        if stored["bytes"] == shard.stat().st_size:
            return {name: (int(offset), int(size)) for name, offset, size in stored["members"]}
        logger.warning("%s belongs to another file than %s, which is scanned", beside.name, shard)
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be used (%s): %s is scanned", beside, error, shard.name)
    return None


_INDEXES: dict[str, Index] = {}


def _remembered(shard: str) -> Index:
    """The index of a shard, read once in each process."""
    index = _INDEXES.get(shard)
    if index is None:
        stored = stored_index(Path(shard))
        index = _INDEXES[shard] = scan_shard(Path(shard)) if stored is None else stored
    return index


def _split(path: Path) -> tuple[str, str] | None:
    """The shard of a path and the member's name in it; None for a file of its own."""
    if _ENDING not in str(path):
        return None
    for number, part in enumerate(path.parts[:-1], 1):
        if part.endswith(_ENDING):
            shard = str(Path(*path.parts[:number]))
            if shard in _INDEXES or os.path.isfile(shard):
                return shard, "/".join(path.parts[number:])
    return None


class _OpenFiles:
    """Files that are kept open for reading, in each process its own; the least recently used are closed first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Start anew, as a forked process must: a position in a file is shared with the parent."""
        self._lock = threading.Lock()
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """So many bytes, or fewer where the file ends.

        Raises:
            OSError: It cannot be opened or read.
        """
        with self._lock:
            file = self._files.pop(path, None) or open(path, "rb")  # noqa: SIM115
            try:
                file.seek(offset)
                data = file.read(size)
            except OSError:  # e.g. of a network disk that went away: a later call opens it anew
                file.close()
                raise
            self._files[path] = file
            if len(self._files) > self.limit:
                self._files.popitem(last=False)[1].close()
            return data


_FILES = _OpenFiles(_OPEN_FILES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_FILES.forget)
