"""All that touches ComfyUI's managers: devices, memory, progress, interruption."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial

import comfy.model_management as mm
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.cli_args import args
from PIL import Image
from server import PromptServer
from torch import Tensor

from ..restoration.networks.cave import CaVE
from ..restoration.networks.ncsnpp import NCSNppConfig
from ..restoration.networks.saipe import SAIPE
from ..restoration.networks.timestep_predictor import TimestepPredictor
from ..restoration.pipelines import Compute, Progress
from ..restoration.tiling import Tiler, is_out_of_memory_error
from .types import Restorer

_JPEG_GRID = 16
_SMALLEST_CHOSEN_TILE = 256
_TILE_OF_ANY_SIZE = 1024
_PROGRESS_UNITS = 1000
_SHARE_FOR_SAMPLES = 0.8  # of the free memory
_STATE_COPIES = 10  # float32 pictures that a sampler and its measurement hold for each sample
_SECONDS_BETWEEN_PREVIEWS = 0.3


def activation_bytes(config: NCSNppConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """About how much memory one evaluation of an NCSN++ takes besides its weights, for one image of that size.

    What the way down keeps for the way up, and the widest place on it: seven maps inside a block that also takes
    the skip, or five of the level below while it is upsampled. 2 to 10% above the sum of live tensors that was measured
    for seven configurations (tests/test_nodes_runtime.py).
    """
    multipliers = config.channel_multipliers
    below = (*multipliers[1:], 0)
    kept = sum((config.res_blocks + 1) * width / 4**level for level, width in enumerate(multipliers))
    working = max(max(7 * multipliers[level], 5 * below[level]) / 4**level for level in range(len(multipliers)))
    pixels = math.ceil(height / config.patch_size) * math.ceil(width / config.patch_size)
    return int((kept + working) * config.width * pixels * dtype.itemsize)


def prepare_compute(restorer: Restorer, height: int, width: int, tile: int, overlap: int) -> Compute:
    """Bring a restorer to its device and say how images of that size are run there.

    Args:
        restorer: What runs.
        height: Of the images.
        width: Of the images.
        tile: Side of the tiles in pixels, 0 for whole images. Halved when memory runs out; on the CPU, where that would
            end the program, until it fits from the start.
        overlap: Of neighbouring tiles, pixels.
    """
    config = restorer.module.network.config
    compute, _ = _prepare_tiles(
        restorer, partial(activation_bytes, config, dtype=restorer.dtype), (height, width), tile, overlap
    )
    return compute


def prepare_prior(
    restorer: Restorer, height: int, width: int, samples: int, tile: int, overlap: int
) -> tuple[Compute, int]:
    """Bring a prior to its device; says how images of that size are run there and how many samples of one at once.

    Args:
        restorer: Of the family prior.
        height: Of the images.
        width: Of the images.
        samples: That are wanted.
        tile: Side of the tiles in pixels, 0 for the size that the prior was trained on, or `_TILE_OF_ANY_SIZE` where it
            takes any. Halved when memory runs out.
        overlap: Of neighbouring tiles, pixels.
    """
    prior = restorer.module
    bytes_of = partial(prior.network.activation_bytes, dtype=restorer.dtype)
    compute, needed = _prepare_tiles(
        restorer, bytes_of, (height, width), tile or prior.tile or _TILE_OF_ANY_SIZE, overlap
    )
    if mm.is_device_cpu(compute.device):
        return compute, 1
    state = _STATE_COPIES * 3 * torch.float32.itemsize * height * width
    fitting = int(_SHARE_FOR_SAMPLES * mm.get_free_memory(compute.device)) // (needed + state)
    return compute, max(1, min(samples, fitting))


def prepare_exact(
    restorer: Restorer, network: CaVE | TimestepPredictor, shape: torch.Size, tile: int, dtype: torch.dtype
) -> Compute:  # fmt: skip
    """Bring a network to its device whose tiles, of side `tile` or 0 for none, change nothing but memory and time.

    Args:
        restorer: What holds the network.
        network: What runs.
        shape: Of the images, (B, 3, H, W).
        tile: Side of the tiles in pixels. Halved when memory runs out.
        dtype: In which the network computes.
    """
    halo = 2 * network.config.halo
    height, width = (min(side, tile + halo if tile else side) for side in shape[-2:])
    mm.load_models_gpu([restorer.patcher], memory_required=network.activation_bytes(height, width, dtype))
    tiler = Tiler(tile, is_out_of_memory=is_out_of_memory, release=mm.soft_empty_cache)
    return Compute(restorer.patcher.load_device, tiler, mm.throw_exception_if_processing_interrupted)


def prepare_whole(restorer: Restorer, network: SAIPE, shape: torch.Size) -> Compute:
    """Bring a network to its device that looks at each image (B, 3, H, W) as a whole."""
    needed = network.activation_bytes(shape[-2], shape[-1], restorer.dtype)
    mm.load_models_gpu([restorer.patcher], memory_required=needed)
    return Compute(restorer.patcher.load_device, check=mm.throw_exception_if_processing_interrupted)


def show_text(node_id: str | None, text: str) -> None:
    """Put text on a node in the editor, as core's Get Image Size does; nothing where no editor listens."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id:
        server.send_progress_text(text, node_id)


class ProgressReport:
    """Shows on the node how far it is, with small previews; called with the core's `Progress`.

    ComfyUI hears of it at once when it is made, and of the end when the last image is done.
    """

    def __init__(self) -> None:
        self.bar = comfy.utils.ProgressBar(_PROGRESS_UNITS)
        self.bar.update_absolute(0)
        self._last_preview = 0.0

    def __call__(self, progress: Progress) -> None:
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        preview = None
        if progress.preview is not None and now - self._last_preview >= _SECONDS_BETWEEN_PREVIEWS:
            self._last_preview = now
            preview = ("JPEG", preview_picture(progress.preview, args.preview_size), args.preview_size)
        self.bar.update_absolute(round(progress.fraction * _PROGRESS_UNITS), preview=preview)


def preview_picture(picture: Tensor, size: int) -> Image.Image:
    """The first picture of (B, 3, H, W) in [0, 1], no side longer than `size`."""
    small = picture[:1].detach().float()
    shrink = max(small.shape[-2:]) / size
    if shrink > 1:
        sides = [max(1, round(side / shrink)) for side in small.shape[-2:]]
        small = F.interpolate(small, size=sides, mode="area")
    levels = (small[0].clamp(0, 1) * 255).round().byte().movedim(0, -1)
    return Image.fromarray(levels.cpu().contiguous().numpy())


def each_chunk(function: Callable[[Tensor], Tensor], pictures: Tensor, pixels: int) -> list[Tensor]:
    """`function` on parts of a batch (B, C, H, W), each at least a picture and about `pixels` pixels; interruptible."""
    length = max(1, pixels // (pictures.shape[-2] * pictures.shape[-1]))
    results = []
    for chunk in pictures.split(length):
        mm.throw_exception_if_processing_interrupted()
        results.append(function(chunk))
    return results


def image_device() -> torch.device:
    """Where ComfyUI wants images between nodes."""
    return mm.intermediate_device()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says, in PyTorch's words or in ComfyUI's, that memory ran out."""
    return is_out_of_memory_error(error) or mm.is_oom(error)


def _prepare_tiles(
    restorer: Restorer, bytes_of: Callable[[int, int], int], size: tuple[int, int], tile: int, overlap: int
) -> tuple[Compute, int]:
    """Bring a restorer to its device; how images of that (height, width) are run there, and what a tile takes."""
    align = math.lcm(_JPEG_GRID, restorer.module.network.config.size_multiple)
    device = restorer.patcher.load_device
    tile = fitting_tile(bytes_of, device, size, tile)
    needed = _tile_bytes(bytes_of, size, tile)
    mm.load_models_gpu([restorer.patcher], memory_required=needed)
    tiler = Tiler(tile, overlap, align, is_out_of_memory=is_out_of_memory, release=mm.soft_empty_cache)
    return Compute(device, tiler, mm.throw_exception_if_processing_interrupted), needed


def _tile_bytes(bytes_of: Callable[[int, int], int], size: tuple[int, int], tile: int) -> int:
    height, width = (min(side, tile or side) for side in size)
    return bytes_of(height, width)


def fitting_tile(
    bytes_of: Callable[[int, int], int], device: torch.device, size: tuple[int, int], tile: int
) -> int:  # fmt: skip
    """The side of tiles; on the CPU, where too little memory would end the program, halved until they fit.

    Args:
        bytes_of: What a tile of a height and width takes.
        device: Where it runs.
        size: Height and width of the images.
        tile: Side that is wanted, pixels, 0 for whole images.
    """
    if not mm.is_device_cpu(device):
        return tile
    free = mm.get_free_memory(device)
    while _tile_bytes(bytes_of, size, tile) > free:
        smaller = (tile or max(size)) // 2
        if smaller < _SMALLEST_CHOSEN_TILE:
            break
        tile = smaller
        logging.info("JPEG Restorer: tiles of %d pixels, to fit into %.1f GB of free memory.", tile, free / 2**30)
    return tile
