"""`python -m training prepare shards IN OUT`: a folder of pictures as tar files, in WebDataset's layout."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from training.data.pictures import DECODE_ERRORS, find_images, opened, read_picture, upright_rgb
from training.data.shards import Index, ShardError, index_path, index_text, is_shards, read_beside
from training.files import replace_file, replace_text
from training.parallel import in_processes

MANIFEST = "shards.json"
"""Beside the shards: what they were made of, and how many pictures and bytes they hold."""
_BLOCK = 512
_LONGEST_STEM = 80


@dataclass(frozen=True)
class ShardSettings:
    """How pictures are packed.

    Args:
        encode: `copy` packs the files as they are; `png` and `webp` decode them and store them without loss, upright,
            in 8 bits a channel.
        shard_mb: Size of a shard by its pictures' files, MB.
        seed: Of the order in which they are packed.
    """

    encode: str = "copy"
    shard_mb: float = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shard_mb <= 0:
            raise ShardError(f"--shard-mb: expected a size above 0, got {self.shard_mb:g}.")
        if self.seed < 0:
            raise ShardError(f"--seed: expected at least 0, got {self.seed}.")


@dataclass(frozen=True)
class _Packing:
    """One shard to be written: each picture with the name of its member, without an ending."""

    shard: Path
    pictures: tuple[tuple[Path, str], ...]
    encode: str


def run(arguments: list[str]) -> None:
    """Pack as the command line says.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
        FileNotFoundError: There are no pictures.
    """
    options = _parser().parse_args(arguments)
    if options.jobs < 1:
        raise ShardError(f"--jobs: expected at least 1, got {options.jobs}.")
    settings = ShardSettings(options.encode, options.shard_mb, options.seed)
    write_shards(options.input, options.output, settings, jobs=options.jobs)


def write_shards(source: Path, output: Path, settings: ShardSettings, *, jobs: int = 1) -> None:
    """Pack a folder, in a random order, so that neighbours in a shard have nothing in common; what is there already is
    not written again. A `.txt` beside a picture goes along. Files that are no pictures are left out and named.

    Args:
        source: The folder.
        output: The folder for the shards; it gets `shards-000.tar`, an index beside each, and `shards.json`.
        settings: How they are packed.
        jobs: Processes.

    Raises:
        ShardError: `output` holds shards of something else, or `source` is shards already.
        FileNotFoundError: The folder has no pictures.
        OSError: The disk is full, or not writable; whole shards stay.
        UnreadableError: The disk does not give a picture.
    """
    if is_shards(source):
        raise ShardError(f"{source}: expected a folder, got shards. They can be trained on as they are.")
    plan = _planned(find_images(source), output, settings)
    described = _described(source, plan, settings)
    output.mkdir(parents=True, exist_ok=True)
    _check_same(output / MANIFEST, described)
    missing = [packing for packing in plan if not _is_done(packing.shard)]
    total, left = (sum(len(packing.pictures) for packing in several) for several in (plan, missing))
    print(f"{len(plan) - len(missing)} of {len(plan)} shards are there", flush=True)
    replace_text(output / MANIFEST, json.dumps(described, indent=1))
    with tqdm(total=total, initial=total - left, unit="picture", dynamic_ncols=True) as progress:
        for packed in in_processes(_write_shard, missing, jobs):
            progress.update(packed)
    _summarise(output, described, plan)


def _planned(paths: Sequence[Path], output: Path, settings: ShardSettings) -> list[_Packing]:
    """Which picture goes where: it follows from the files' names and sizes and the settings alone."""
    order = np.random.default_rng(settings.seed).permutation(len(paths))
    digits = len(str(len(paths) - 1))
    groups: list[list[tuple[Path, str]]] = []
    room = 0.0
    for place, number in enumerate(order):
        path = paths[int(number)]
        size = path.stat().st_size
        if not groups or size > room:
            groups.append([])
            room = settings.shard_mb * 2**20
        stem = re.sub(r"[^\w-]+", "_", path.stem)[:_LONGEST_STEM]
        groups[-1].append((path, f"{place:0{digits}d}_{stem}"))
        room -= size
    width = max(3, len(str(len(groups) - 1)))
    return [
        _Packing(output / f"shards-{number:0{width}d}.tar", tuple(group), settings.encode)
        for number, group in enumerate(groups)
    ]


def _described(source: Path, plan: Sequence[_Packing], settings: ShardSettings) -> dict[str, object]:
    """What the shards are made of; two plans are the same where their digests are."""
    digest = hashlib.sha256()
    for packing in plan:
        for path, name in packing.pictures:
            line = f"{packing.shard.name} {name} {path.relative_to(source).as_posix()} {path.stat().st_size}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return {"version": 1, **asdict(settings), "digest": digest.hexdigest(), "shards": len(plan)}


def _check_same(manifest: Path, described: dict[str, object]) -> None:
    if not manifest.exists():
        if found := next(manifest.parent.glob("shards-*.tar"), None):
            raise ShardError(f"{manifest.parent} holds shards of another origin, e.g. {found.name}. Give another OUT.")
        return
    then = json.loads(manifest.read_text(encoding="utf-8"))
    changed = [key for key, value in described.items() if then.get(key) != value]
    if changed:
        reason = "of other pictures" if changed == ["digest"] else f"packed otherwise ({', '.join(changed)} differ)"
        raise ShardError(f"{manifest.parent} holds shards {reason}. Give another OUT, or remove that folder.")


def _is_done(shard: Path) -> bool:
    return shard.exists() and index_path(shard).exists()


def _write_shard(packing: _Packing) -> int:
    """Write one shard and its index; returns how many pictures it was planned for."""
    index: Index = {}
    left_out: list[tuple[str, str]] = []

    def write(file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path, name in packing.pictures:
                try:
                    data, ending = _packed(path, packing.encode)
                except DECODE_ERRORS as error:
                    left_out.append((str(path), str(error)))
                    continue
                _add(tar, f"{name}{ending}", data, index)
                if (caption := read_beside(path, ".txt")) is not None:
                    _add(tar, f"{name}.txt", caption, index)

    replace_file(packing.shard, write, flush=True)
    size = packing.shard.stat().st_size
    replace_text(index_path(packing.shard), index_text(index, size, left_out=left_out))
    return len(packing.pictures)


def _packed(path: Path, encode: str) -> tuple[bytes, str]:
    """The bytes of a member and its ending."""
    data = read_picture(path)
    if encode == "copy":
        with opened(data) as picture:
            picture.verify()
        return data, path.suffix.lower()
    with opened(data) as picture:
        pixels = Image.fromarray(upright_rgb(picture))
    buffer = io.BytesIO()
    pixels.save(buffer, encode.upper(), **({"lossless": True} if encode == "webp" else {}))
    return buffer.getvalue(), f".{encode}"


def _add(tar: tarfile.TarFile, name: str, data: bytes, index: Index) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    index[name] = (tar.offset - -(-len(data) // _BLOCK) * _BLOCK, len(data))


def _summarise(output: Path, described: dict[str, object], plan: Sequence[_Packing]) -> None:
    indexes = [json.loads(index_path(packing.shard).read_text(encoding="utf-8")) for packing in plan]
    left_out = [entry for index in indexes for entry in index["left_out"]]
    pictures = sum(len(packing.pictures) for packing in plan) - len(left_out)
    totals = {"pictures": pictures, "bytes": sum(index["bytes"] for index in indexes), "left_out": left_out}
    replace_text(output / MANIFEST, json.dumps({**described, **totals}, indent=1))
    for name, reason in left_out:
        print(f"left out {name}, which cannot be read: {reason}")
    last = plan[-1].shard.stem.removeprefix("shards-")
    pattern = output / f"shards-{{{'0' * len(last)}..{last}}}.tar"
    print(f"done: {pictures} pictures in {len(plan)} shards; train on them with --data.train '{pattern}'", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training prepare shards",
        description="Pack a folder of pictures into tar files (WebDataset's shards). Repeating the command goes on "
        "where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = ShardSettings()
    parser.add_argument("input", type=Path, metavar="IN", help="the folder of pictures, with its sub-folders")
    parser.add_argument("output", type=Path, metavar="OUT", help="the folder for the shards")
    parser.add_argument("--encode", choices=["copy", "png", "webp"], default=default.encode,
                        help="copy: the files as they are; png, webp: pixels without loss")  # fmt: skip
    parser.add_argument("--shard-mb", type=float, default=default.shard_mb, help="size of a shard, MB")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the order of the pictures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return parser
