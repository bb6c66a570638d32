"""Training pairs from a folder of clean pictures: every item is a pure function of the seed and its index."""

from __future__ import annotations

import logging
import signal
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from training.degradation import Degradation, degrade

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises on files that are missing, truncated, broken or not pictures at all."""

logger = logging.getLogger(__name__)


def find_images(folder: str | Path) -> list[Path]:
    """All pictures below `folder`, sorted by path; an absent folder or one without pictures is an error."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the training pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file())
    if not paths:
        endings = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise FileNotFoundError(
            f"no picture found in {folder}: expected files ending in {endings}, also in sub-folders"
        )
    return paths


def scan_images(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Opens each file's header: the readable paths in their order, and the others with a reason."""
    good: list[Path] = []
    broken: list[tuple[Path, str]] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture.verify()
        except DECODE_ERRORS as error:
            broken.append((path, f"{type(error).__name__}: {error}"))
        else:
            good.append(path)
    return good, broken


def load_image(path: Path) -> np.ndarray:
    """Decodes a picture upright (EXIF orientation applied) to (H,W,3) uint8 RGB; transparency is dropped, not blended.

    Pictures of 16 bits a channel are scaled to 8.
    """
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):
            return np.repeat((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(picture.convert("RGB"))


class PairDataset(Dataset[dict[str, Any]]):
    """An endless sequence of training pairs over `paths`.

    Item `index` (0, 1, 2, ... over the whole run) depends on the seed and the index alone: the epoch `index // n`
    has its own permutation of the pictures, the index its own crop and degradation. Resuming therefore needs only the
    number of pictures seen, and the number of workers changes nothing.

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
    ) -> None:
        """`augmentation` "paper": square of 0.2 to 1 of the picture's area, resized to the crop (DriftRec); flips and
        rotations apply on top if asked for. "crop": a square at any offset, first shrunk by a factor drawn
        log-uniformly from `downscale` (1 to any number >= 1, limited by the picture's size). Pictures smaller than the
        crop are mirrored outwards. `cache_mb` bounds the decoded pictures kept by each worker.
        """
        if not paths:
            raise ValueError("PairDataset needs at least one picture, got none: see find_images and scan_images")
        if crop < 8 or seed < 0:
            raise ValueError(f"crop must be at least 8 pixels and seed not negative, got crop {crop} and seed {seed}")
        if augmentation not in ("paper", "crop"):
            raise ValueError(f"augmentation must be 'paper' or 'crop', got {augmentation!r}")
        if not 1.0 <= downscale[0] <= downscale[1]:
            raise ValueError(f"downscale must be (low, high) with 1 <= low <= high, got {downscale}")
        self.paths = list(paths)
        self.crop = crop
        self.degradation = degradation
        self.seed = seed
        self.augmentation = augmentation
        self.flips = flips
        self.rotations = rotations
        self.downscale = downscale
        self._cache = _PictureCache(int(cache_mb * 2**20))
        self._broken: set[int] = set()
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, picture = self._picture(index)
        rng = np.random.default_rng([self.seed, 1, index])
        window = self._augment(self._window(picture, self.crop + self.degradation.window, rng), rng)
        pair = degrade(window, self.degradation, rng, margin=self.degradation.margin)
        return {
            "clean": _to_tensor(pair.clean),
            "degraded": _to_tensor(pair.image),
            "quality": torch.tensor(float(pair.quality)),
            "index": index,
            "path": str(path),
        }

    def _picture(self, index: int) -> tuple[Path, np.ndarray]:
        """The picture of this index or, where that cannot be decoded, the next one of the epoch's permutation."""
        epoch, position = divmod(index, len(self.paths))
        if self._permutation[0] != epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.paths))
            self._permutation = (epoch, order)
        for step in range(len(self.paths)):
            number = int(self._permutation[1][(position + step) % len(self.paths)])
            if number not in self._broken:
                try:
                    return self.paths[number], self._cache.load(self.paths[number])
                except DECODE_ERRORS as error:
                    self._broken.add(number)
                    logger.warning("skipping %s, which cannot be decoded: %s", self.paths[number], error)
        raise RuntimeError(f"none of the {len(self.paths)} training pictures can be decoded, e.g. {self.paths[0]}")

    def _window(self, picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
        if self.augmentation == "paper":
            return _random_resized_crop(picture, side, rng)
        low, high = np.log(self.downscale)
        factor = float(np.exp(rng.uniform(low, high)))
        source = max(side, min(round(side * factor), *picture.shape[:2]))
        window = _random_crop(_pad_to(picture, source), source, rng)
        return window if source == side else _resize(window, side, Image.Resampling.LANCZOS)

    def _augment(self, window: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        flip, turns = int(rng.integers(2)), int(rng.integers(4))
        if self.flips and flip:
            window = window[:, ::-1]
        if self.rotations:
            window = np.rot90(window, turns)
        return np.ascontiguousarray(window)


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
    return DataLoader(
        dataset,
        batch_size=batch_per_rank,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_interrupts_to_the_trainer,
    )


def _leave_interrupts_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the trainer alone decides when to stop, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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


def _random_resized_crop(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """RandomResizedCrop(scale (0.2, 1), ratio 1, bilinear with antialiasing), a centred square if ten draws fail."""
    height, width = picture.shape[:2]
    for _ in range(10):
        source = round((height * width * rng.uniform(0.2, 1.0)) ** 0.5)
        if 0 < source <= min(height, width):
            return _resize(_random_crop(picture, source, rng), side, Image.Resampling.BILINEAR)
    source = min(height, width)
    top, left = (height - source) // 2, (width - source) // 2
    return _resize(picture[top : top + source, left : left + source], side, Image.Resampling.BILINEAR)


def _random_crop(picture: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(picture.shape[0] - side, endpoint=True)
    left = rng.integers(picture.shape[1] - side, endpoint=True)
    return picture[top : top + side, left : left + side]


def _pad_to(picture: np.ndarray, side: int) -> np.ndarray:
    missing = [max(0, side - length) for length in picture.shape[:2]]
    if not any(missing):
        return picture
    widths = [(count // 2, count - count // 2) for count in missing]
    return np.pad(picture, (*widths, (0, 0)), mode="symmetric")


def _resize(picture: np.ndarray, side: int, resampling: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((side, side), resampling))


def _to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32) / np.float32(255)).contiguous()
