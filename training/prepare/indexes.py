"""`python -m training prepare index SHARDS`: what lies where in tar files, written beside them once."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from training.data.shards import expand_shards, index_path, index_text, scan_shard, stored_index
from training.files import replace_text

_READERS = 8


def run(arguments: list[str]) -> None:
    """Write the indexes that are missing.

    Raises:
        ValueError: The shards cannot be used.
        FileNotFoundError: Shards are missing.
    """
    parser = argparse.ArgumentParser(prog="python -m training prepare index", description=__doc__)
    parser.add_argument("shards", metavar="SHARDS", help='in quotes: "folder/shards-{000..127}.tar"')
    write_indexes(parser.parse_args(arguments).shards)


def write_indexes(source: str | Path) -> None:
    """Write the index of each shard that has no valid one, as `training.data.shards` reads it.

    Args:
        source: The shards, as `expand_shards` takes them.

    Raises:
        ShardError: The shards cannot be used.
        FileNotFoundError: Shards are missing.
        OSError: Their folder cannot be written to.
    """
    shards = expand_shards(source)
    with ThreadPoolExecutor(_READERS) as pool:
        members = list(tqdm(pool.map(_index, shards), total=len(shards), unit="shard", dynamic_ncols=True))
    print(f"done: {sum(members)} members in {len(shards)} shards")


def _index(shard: Path) -> int:
    index = stored_index(shard)
    if index is None:
        index = scan_shard(shard)
        replace_text(index_path(shard), index_text(index, shard.stat().st_size))
    return len(index)
