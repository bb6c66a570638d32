"""One evaluation of a core MODEL at timesteps that are not rounded, in tiles where memory asks for them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.model_management as mm
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..restoration.tiling import (
    LatentTile,
    SharedStatistics,
    gaussian_weights,
    is_out_of_memory_error,
    latent_tiles,
    sample_of,
)
from .backbone import DCTBackboneModel, ResidualSampling
from .dct_latent import plain

TILINGS = ("auto", "always", "never")
_KEY = "jpeg_restorer"
_SMALLEST_TILE = 32
_DOWNSAMPLING = 8
_SHARE_OF_MEMORY = 0.8
_MOST_PREVIEWS = 20
_SAMPLED_WINDOW = 16
"""Latent pixels along the windows that the statistics of norms are taken from."""
_UNCHANGED = "Connect the MODEL output of Load JPEG Restorer, without a node that changes its sampling."


@dataclass(frozen=True)
class Tiling:
    """When and how a latent is split.

    Args:
        mode: One of `TILINGS`: auto splits where the whole would not fit into memory, and when it runs out.
        tile: Side of the tiles in latent pixels.
        overlap: What neighbours share, latent pixels.
    """

    mode: str = "auto"
    tile: int = 96
    overlap: int = 32

    def __post_init__(self) -> None:
        if self.mode not in TILINGS:
            raise ValueError(f"expected a tiling of {', '.join(TILINGS)}, got {self.mode!r}.")
        latent_tiles(1, 1, self.tile, self.overlap)

    def halved(self) -> Tiling | None:
        """The next smaller one, or None."""
        tile = self.tile // 2
        return Tiling(self.mode, tile, min(self.overlap, tile // 4)) if tile >= _SMALLEST_TILE else None


def denoise_once(
    model: Any, conditioning: Any, latent: Tensor, timesteps: Tensor, tiling: Tiling, *, previews: bool = True
) -> Tensor:
    """x0 of a latent (B, C, H, W), read as noisy at `timesteps` (B,), by one evaluation through core's sampling.

    Everything that core's samplers honour is honoured: weight patches, hooks, ControlNet, offloading, previews,
    interruption.
    """
    sampling, latent = unrounded(_sampling_of(model)), plain(latent)
    sigma = sampling.sigma(timesteps)
    clone = model.clone()
    clone.add_object_patch("model_sampling", sampling)
    evaluation = _Evaluation(clone, tiling, previews)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, evaluation.apply)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, evaluation.prepare)

    def sample(network: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
        each = sigma.to(x)
        return network(x * (1 + each.view(-1, 1, 1, 1) ** 2).sqrt(), each, **extra_args)

    guider = comfy.samplers.CFGGuider(clone)
    guider.inner_set_conds({"positive": conditioning})
    schedule = torch.stack([sigma.max(), sigma.new_zeros(())])
    sampler = comfy.samplers.KSAMPLER(sample)
    return guider.sample(torch.zeros_like(latent), latent, sampler, schedule, disable_pbar=True, seed=0)


def unrounded(sampling: Any) -> Any:
    """A copy of a model's sampling object whose `timestep` is the exact inverse of `sigma`; core's rounds.

    Raises:
        ValueError: The model has no schedule of discrete timesteps.
    """
    discrete = comfy.model_sampling.ModelSamplingDiscrete
    if not isinstance(sampling, discrete) or type(sampling).timestep is not discrete.timestep:
        raise ValueError(
            f"expected a model with Stable Diffusion's discrete timesteps, got {type(sampling).__name__}. {_UNCHANGED}"
        )
    exact = copy.deepcopy(sampling)
    exact.__class__ = type(f"Unrounded{type(sampling).__name__}", (_Unrounded, type(sampling)), {})
    return exact


def _sampling_of(model: Any) -> Any:
    sampling = model.get_model_object("model_sampling")
    if isinstance(model.model, DCTBackboneModel) and not isinstance(sampling, ResidualSampling):
        raise ValueError(
            f"expected a restorer's own model as it is, which predicts residuals, got one with the sampling "
            f"{type(sampling).__name__}. {_UNCHANGED}"
        )
    return sampling


class _Unrounded:
    log_sigmas: Tensor

    def timestep(self, sigma: Tensor) -> Tensor:
        logs = self.log_sigmas.to(sigma.device)
        log_sigma = sigma.log().clamp(logs[0], logs[-1])
        high = torch.searchsorted(logs, log_sigma).clamp(1, len(logs) - 1)
        low = high - 1
        return low + (log_sigma - logs[low]) / (logs[high] - logs[low])


class _Evaluation:
    """The network on a whole latent or on parts of it, remembering what fits."""

    def __init__(self, model: Any, tiling: Tiling, previews: bool) -> None:
        self.model, self.previews = model, previews
        self.tiling: Tiling | None = tiling if tiling.mode == "always" else None
        self.wanted = tiling

    def prepare(self, prepare: Callable[..., Any], model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        """Core's preparation, with the memory of what runs at once instead of all."""
        if self.wanted.mode == "auto" and not _fits(model, shape):
            one_by_one = len(shape) == 4 and shape[0] > 1 and _fits(model, (1, *shape[1:]))
            self.tiling = Tiling("auto", max(shape[2:]), 0) if one_by_one else self.wanted
        if self.tiling is not None:
            shape = (1, shape[1], min(shape[2], self.tiling.tile), min(shape[3], self.tiling.tile))
        return prepare(model, shape, *args, **kwargs)

    def apply(
        self, apply: Callable[..., Tensor], x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None,
        control: Any = None, transformer_options: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Core's `apply_model`, which returns x0, in tiles; in smaller ones when memory runs out."""
        inputs = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **kwargs}
        call = partial(_call, apply, transformer_options or {})
        while True:
            try:
                return self._run(call, x, t, inputs)
            except Exception as error:
                smaller = self._smaller(x)
                if smaller is None or not (is_out_of_memory_error(error) or mm.is_oom(error)):
                    raise
            # Outside the handler the traceback, which keeps the failed attempt's tensors alive, is gone.
            self.tiling = smaller
            mm.soft_empty_cache()
            logging.warning("OneStepDenoise: out of memory; trying tiles of %d latent pixels.", smaller.tile)

    def _smaller(self, x: Tensor) -> Tiling | None:
        """What to try next: images one by one, then the tiles that are wanted, then smaller ones."""
        if self.wanted.mode == "never":
            return None
        longest = max(x.shape[-2:])
        if self.tiling is None and len(x) > 1:
            return Tiling(self.wanted.mode, longest, 0)
        smaller = self.wanted if self.tiling is None or self.tiling.tile > self.wanted.tile else self.tiling.halved()
        while smaller is not None and smaller.tile >= longest:
            smaller = smaller.halved()
        return smaller

    def _run(self, call: Callable[..., Tensor], x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Tensor:
        parts = list(self._parts(x, aligned=inputs["control"] is not None))
        report = latent_preview.prepare_callback(self.model, len(parts)) if self.previews else _silent
        each = math.ceil(len(parts) / _MOST_PREVIEWS)  # a preview takes time that grows with the whole latent
        if len(parts) == 1:
            x0 = call(x, t, inputs)
            report(0, x0, x, 1)
            return x0
        blended = torch.zeros_like(x, dtype=torch.float32)
        total = torch.zeros_like(blended[:, :1])
        evaluate, present = call, None
        for number, (items, tile) in enumerate(parts):
            mm.throw_exception_if_processing_interrupted()
            if items != present:
                evaluate, present = self._evaluating(call, x, t, inputs, items), items
            window = (items, slice(None), tile.rows, tile.columns)
            x0 = evaluate(x[window], t[items], _Cut(items, tile, x)(inputs))
            weights = gaussian_weights(tile.height, tile.width).to(blended)
            blended[window] += x0.float() * weights
            total[window] += weights
            if (number + 1) % each == 0 or number + 1 == len(parts):
                report(number, torch.where(total > 0, blended / total.clamp(min=1e-30), x), x, len(parts))
        return blended / total

    def _evaluating(
        self, call: Callable[..., Tensor], x: Tensor, t: Tensor, inputs: dict[str, Any], items: slice
    ) -> Callable[..., Tensor]:
        """The network on tiles of one image; of a restorer's own, with the norms' statistics from the whole image.

        An adapted Stable Diffusion is tiled as it was published.
        """
        model, tiling = self.model.model, self.tiling
        shared = isinstance(model, DCTBackboneModel) and not inputs["control"]
        if tiling is None or tiling.tile >= max(x.shape[-2:]) or not shared:
            return call
        align = model.tile_multiple
        side = tiling.tile // align * align
        sample = sample_of(x[items], (side, side), align, _SAMPLED_WINDOW)
        whole = LatentTile(0, 0, x.shape[2], x.shape[3])
        statistics = SharedStatistics(model.diffusion_model)
        statistics.measure(lambda latent: call(latent, t[items], _Cut(items, whole, x)(inputs)), sample)
        return partial(statistics.apply, call)

    def _parts(self, x: Tensor, *, aligned: bool) -> Iterator[tuple[slice, LatentTile]]:
        height, width = x.shape[-2:]
        if self.tiling is None:
            yield slice(0, len(x)), LatentTile(0, 0, height, width)
            return
        align = _DOWNSAMPLING if aligned else getattr(self.model.model, "tile_multiple", 1)
        tile = self.tiling.tile // align * align
        overlap = -(-self.tiling.overlap // align) * align
        for item in range(len(x)):
            for window in latent_tiles(height, width, tile, min(overlap, tile // 2 // align * align), align):
                yield slice(item, item + 1), window


def _silent(*_: Any) -> None:
    """Where others report."""


def _call(
    apply: Callable[..., Tensor], transformer_options: dict[str, Any], x: Tensor, t: Tensor, inputs: dict[str, Any]
) -> Tensor:
    first = (inputs["c_concat"], inputs["c_crossattn"], inputs["control"])
    others = {key: value for key, value in inputs.items() if key not in ("c_concat", "c_crossattn", "control")}
    return apply(x, t, *first, transformer_options, **others)


class _Cut:
    """The part of the network's other inputs that belongs to a tile: control residuals, prompts of its images."""

    def __init__(self, items: slice, tile: LatentTile, x: Tensor) -> None:
        self.items, self.tile = items, tile
        self.batch, self.height, self.width = x.shape[0], x.shape[2], x.shape[3]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, tuple | list):
            return type(value)(self(item) for item in value)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value

    def _tensor(self, value: Tensor) -> Tensor:
        if value.dim() > 0 and value.shape[0] == self.batch:
            value = value[self.items]
        if value.dim() == 4:
            factor = round(self.height / value.shape[2]), round(self.width / value.shape[3])
            if factor[0] == factor[1] and -(-self.height // factor[0]) == value.shape[2]:
                return self._window(value, factor[0])
        return value

    def _window(self, value: Tensor, factor: int) -> Tensor:
        tile = self.tile
        rows = slice(tile.top // factor, -(-(tile.top + tile.height) // factor))
        columns = slice(tile.left // factor, -(-(tile.left + tile.width) // factor))
        return value[:, :, rows, columns]


def _fits(model: Any, shape: Any) -> bool:
    device = model.load_device
    if mm.is_device_cpu(device):
        memory = mm.get_free_memory(device)
    else:
        memory = mm.get_total_memory(device) - mm.extra_reserved_memory()
    return model.model.memory_required(list(shape)) <= _SHARE_OF_MEMORY * memory
