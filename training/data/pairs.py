"""Training pairs from clean pictures: every item is a pure function of the seed and its index."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from training.configs.common import DataConfig
from training.data.crops import CropSettings, draw_pair
from training.data.pictures import DECODE_ERRORS, load_image
from training.data.shards import shard_of
from training.degradation import Degradation, DegradedCrop

logger = logging.getLogger(__name__)


class PairDataset(Dataset[dict[str, Any]]):
    """An endless sequence of training pairs over `paths`.

    Item `index` (0, 1, 2, ... over the whole run) depends on the seed and the index alone: the epoch `index // n`
    has its own permutation of the pictures (`epoch_order`), the index its own crop and degradation. Resuming therefore
    needs only the number of pictures seen, and the number of workers changes nothing.

    Item: `clean` and `degraded` float32 (3,crop,crop) in [0,1], `quality` float32 scalar 0..100 (the last
    compression's), `index`, `path`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        crop: int,
        degradation: Degradation,
        *,
        seed: int = 0,
        augmentation: Literal["paper", "crop"] = "crop",
        flips: bool = True,
        rotations: bool = True,
        downscale: tuple[float, float] = (1.0, 1.0),
        cache_mb: float = 256,
        shuffle_shards: int = 16,
    ) -> None:
        """`paths` may lead through shards, of which `shuffle_shards` are shuffled together. What is done to a picture:
        see `CropSettings`. `cache_mb` bounds the decoded pictures kept by each worker.
        """
        if not paths:
            raise ValueError("PairDataset needs at least one picture, got none: see find_images and scan_images")
        if seed < 0 or shuffle_shards < 1:
            raise ValueError(
                f"seed must not be negative and shuffle_shards at least 1, got {seed} and {shuffle_shards}"
            )
        self.settings = CropSettings(crop, degradation, augmentation, flips, rotations, (downscale[0], downscale[1]))
        self.paths = list(paths)
        self.crop = crop
        self.degradation = degradation
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self._shards = _numbered_shards(self.paths)
        self._cache = _PictureCache(int(cache_mb * 2**20))
        self._broken: set[int] = set()
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(index, *self.pair(index))

    def _item(self, index: int, path: Path, pair: DegradedCrop) -> dict[str, Any]:
        return {
            "clean": to_tensor(pair.clean),
            "degraded": to_tensor(pair.image),
            "quality": torch.tensor(float(pair.quality)),
            "index": index,
            "path": str(path),
        }

    def pair(self, index: int) -> tuple[Path, DegradedCrop]:
        """What item `index` is made of: its picture's path, and the pair in 8 bits with all that was drawn for it."""
        path, picture = self.picture_of(index)
        return path, draw_pair(picture, self.settings_of(index), [self.seed, 1, index])

    def settings_of(self, index: int) -> CropSettings:
        """What is done to the picture of this index."""
        return self.settings

    def picture_of(self, index: int) -> tuple[Path, np.ndarray]:
        """The picture of this index, (H,W,3) uint8, or, where that cannot be decoded, the next one of its epoch.

        Raises:
            UnreadableError: The disk does not give it: that says nothing of the picture, and is not passed over.
            RuntimeError: None can be decoded.
        """
        number, picture = self._decoded(index)
        return self.paths[number], picture

    def _decoded(self, index: int) -> tuple[int, np.ndarray]:
        """The number of an index's picture among `paths`, and the picture."""
        epoch, position = divmod(index, len(self.paths))
        if self._permutation[0] != epoch:
            rng = np.random.default_rng([self.seed, 0, epoch])
            self._permutation = (epoch, epoch_order(len(self.paths), self._shards, self.shuffle_shards, rng))
        for step in range(len(self.paths)):
            number = int(self._permutation[1][(position + step) % len(self.paths)])
            if number not in self._broken:
                try:
                    return number, self._cache.load(self.paths[number])
                except DECODE_ERRORS as error:
                    self._broken.add(number)
                    logger.warning("skipping %s, which cannot be decoded: %s", self.paths[number], error)
        raise RuntimeError(f"none of the {len(self.paths)} training pictures can be decoded, e.g. {self.paths[0]}")


def epoch_order(count: int, shards: np.ndarray | None, together: int, rng: np.random.Generator) -> np.ndarray:
    """The order of an epoch: a permutation of `count` pictures.

    Without shards every order is as likely as any other. With them, the shards are shuffled and taken `together` at a
    time, whose pictures are shuffled among each other: all that is read for long comes from so many files.

    Args:
        count: Pictures.
        shards: The number of each picture's shard, from 0, (count,); None for pictures in files of their own.
        together: Shards that are shuffled with each other.
        rng: Of this epoch.
    """
    if shards is None:
        return rng.permutation(count)
    place = rng.permutation(int(shards.max()) + 1)
    return np.lexsort((rng.random(count), place[shards] // together))


def _numbered_shards(paths: Sequence[Path]) -> np.ndarray | None:
    """The number of each picture's shard; files of their own, among shards, count as one."""
    names = [shard_of(path) for path in paths]
    if not any(names):
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def pair_options(data: DataConfig, seed: int) -> dict[str, Any]:
    """What a configuration says of pairs, as arguments of `PairDataset`."""
    return {
        "crop": data.crop, "degradation": data.degradation, "seed": seed, "augmentation": data.augmentation,
        "flips": data.flips, "rotations": data.rotations, "downscale": data.downscale, "cache_mb": data.cache_mb,
        "shuffle_shards": data.shuffle_shards,
    }  # fmt: skip


class IndexSampler(Sampler[int]):
    """The global indices of one process, from `start` in whole global batches of `batch` until `stop` is reached.

    The last batch may go past `stop`. Global batch k holds start + k*batch ... start + (k+1)*batch - 1 however many
    processes (`world`) share it.
    """

    def __init__(self, start: int, stop: int, rank: int = 0, world: int = 1, batch: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..{world - 1}, got {rank}")
        if batch < 1 or batch % world:
            raise ValueError(f"the global batch ({batch}) must be a positive multiple of the processes ({world})")
        if not 0 <= start <= stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop, got {start} and {stop}")
        batches = -(-(stop - start) // batch)
        self._indices = range(start + rank, start + batches * batch, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def make_loader(
    dataset: PairDataset,
    sampler: Sampler[int],
    batch_per_rank: int,
    workers: int = 0,
    *,
    pin_memory: bool = False,
    prefetch: int = 4,
) -> DataLoader[dict[str, Any]]:
    """A loader of whole batches in the sampler's order; it draws nothing from torch's global random state."""
    if workers:
        atexit.unregister(_kill_leftovers)
        atexit.register(_kill_leftovers)
    return DataLoader(
        dataset,
        batch_size=batch_per_rank,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_stopping_to_the_trainer,
    )


def _leave_stopping_to_the_trainer(_: int) -> None:
    """Ctrl-C, and often SIGTERM, reach every process of a group; the trainer alone decides when to stop, and ends its
    workers by telling them. They also end when it is gone, as torch's workers look for their parent while they wait.
    A second SIGTERM ends a worker that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_the_next)


def _kill_leftovers() -> None:
    """At the end of the trainer: workers of loaders that an error has left behind. Python would send each the one
    SIGTERM that it ignores, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _end_at_the_next(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


class _PictureCache:
    """Decoded pictures, the least recently used leaving first; it travels to worker processes empty."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._pictures: OrderedDict[Path, np.ndarray] = OrderedDict()

    def load(self, path: Path) -> np.ndarray:
        picture = self._pictures.pop(path, None)
        if picture is None:
            picture = load_image(path)
            self.size += picture.nbytes
        self._pictures[path] = picture
        while self.size > self.capacity:
            self.size -= self._pictures.popitem(last=False)[1].nbytes
        return picture

    def __getstate__(self) -> int:
        return self.capacity

    def __setstate__(self, capacity: int) -> None:
        self.__init__(capacity)


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    """(3, H, W) in [0, 1] of (H, W, 3) bytes."""
    planes = np.empty((picture.shape[2], *picture.shape[:2]), np.float32)
    for channel in range(len(planes)):
        planes[channel] = picture[..., channel]
    planes /= np.float32(255)
    return torch.from_numpy(planes)
