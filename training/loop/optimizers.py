"""A network together with its optimiser: what happens to either in a step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from training.configs.common import OptimizerConfig, RunConfig
from training.loop.checkpoint import CheckpointError, load_trained_state, trained_state
from training.loop.sharding import share_gradients, spread_frozen


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or its variant with 8-bit states.

    Raises:
        ValueError: `eight_bit` is asked for where bitsandbytes cannot be imported, `fused` where the device has no such
            kernel, or both.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay
    }  # fmt: skip
    if config.fused:
        return _fused(parameters, config, settings)
    if not config.eight_bit:
        return torch.optim.AdamW(parameters, **settings)
    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"optimizer.eight_bit: bitsandbytes cannot be imported ({error}). "
            "Run `pip install bitsandbytes`, or leave the option off."
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _fused(parameters: list[nn.Parameter], config: OptimizerConfig, settings: dict[str, Any]) -> torch.optim.Optimizer:
    if config.eight_bit:
        raise ValueError("optimizer.fused, optimizer.eight_bit: there is no such variant. Leave one of the two off.")
    probe = torch.zeros(1, device=parameters[0].device, dtype=parameters[0].dtype)
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()  # it is the first step that asks for the kernel
    except RuntimeError as error:
        raise ValueError(
            f"optimizer.fused: there is no such kernel for this device ({str(error).strip()}). Leave the option off."
        ) from error
    return torch.optim.AdamW(parameters, fused=True, **settings)


def learning_rate(config: OptimizerConfig, images: int, batch: int, total: int) -> float:
    """The learning rate of the step that begins after so many images of a run of `total`."""
    rise = min(1.0, (images + batch) / config.warmup_images) if config.warmup_images else 1.0
    if config.schedule == "constant":
        return config.learning_rate * rise
    return config.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, images / total))))


class Learner:
    """A network, the parameters of it that are trained, and their optimiser.

    Args:
        module: The network, already on its device.
        config: Optimiser settings.
        store_frozen: Whether its checkpoints hold its frozen weights as well.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, store_frozen: bool = False) -> None:
        self.module, self.config, self.store_frozen = module, config, store_frozen
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, config)
        self.wrapped: Any = module
        self.spread = False
        self.skipped = 0  # steps in a row, for gradients that are no numbers

    def state_dict(self) -> dict[str, Any]:
        """The weights as `model`, the optimiser as `optimizer`."""
        model = self.module.state_dict() if self.store_frozen else trained_state(self.module)
        return {"model": model, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state, with this configuration's settings of the optimiser.

        Raises:
            CheckpointError: It belongs to another network.
        """
        load_trained_state(self.module, state["model"])
        try:
            self.optimizer.load_state_dict(self._with_own_settings(state["optimizer"]))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint's optimiser does not fit this network ({error}). Give --run.output another folder."
            ) from error

    def _with_own_settings(self, stored: dict[str, Any]) -> dict[str, Any]:
        present = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**then, **{key: value for key, value in now.items() if key not in ("params", "lr")}}
            for now, then in zip(present, stored["param_groups"], strict=True)
        ]
        return {**stored, "param_groups": groups}

    def prepare(self, accelerator: Accelerator, run: RunConfig, blocks: Sequence[nn.Module] = ()) -> None:
        """Wrap the network for mixed precision and several processes, and as `run` has it.

        Args:
            accelerator: Knows the device and the processes.
            run: Its `compile`, `channels_last` and `fsdp` are looked at.
            blocks: With `fsdp`: modules whose frozen weights are spread over the processes.

        Raises:
            ValueError: This torch cannot spread them.
        """
        if run.channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.spread = run.fsdp and accelerator.num_processes > 1
        if self.spread:
            spread_frozen(blocks)
        wrapped: nn.Module = accelerator.prepare_model(self.module, evaluation_mode=self.spread)
        self.wrapped = torch.compile(wrapped) if run.compile else wrapped

    def begin(self, rate: float) -> None:
        """Before a step: training mode, no gradients, the learning rate."""
        self.wrapped.train()
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, scaler: Any) -> float:
        """Clip the gradients and take the step; not one whose gradients are no numbers, as fp16's may be.

        Args:
            scaler: The GradScaler of fp16, or None; the caller updates it.

        Returns:
            The norm of the gradient before it was clipped.
        """
        if self.spread:
            share_gradients(self.parameters)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        limit = self.config.gradient_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            return norm
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()
        return norm

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """For the time being no parameter takes a gradient."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
