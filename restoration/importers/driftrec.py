"""DriftRec's own checkpoints: PyTorch Lightning files of its score networks and of its regression baseline.

Such a file is a zip of pickled containers and tensors. `state_dict` holds the trained weights as `backbone.NAME`,
`ema.shadow_params` their moving averages as a list without names in the order of `state_dict`, and `hyper_parameters`
the command-line options. No such checkpoint is published, so this follows what the training code writes.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.prediction import Prediction
from ..diffusion.sde import make_sde
from ..networks.ncsnpp import NCSNpp, NCSNppConfig
from ..restorer_file import RestorerFile, RestorerMetadata, load_part
from ._checkpoint import CheckpointError, kind, read_pickled

_SDE_NAMES = {"ouve": "ouve", "t2ve": "tsdve", "cosve": "cosve"}
_BACKBONE = "backbone."
_TRAINED_SIZE, _ATTENTION_SIZE = 256, 16


class DriftRecCheckpointError(CheckpointError):
    """A file is not a DriftRec checkpoint that can be used; the message says what is wrong."""


def import_driftrec(
    path: str | os.PathLike[str], *, use_ema: bool = True
) -> tuple[RestorerMetadata, dict[str, Tensor]]:
    """Read a checkpoint of the DriftRec authors' training code.

    Args:
        path: The `.ckpt` file. Only containers, numbers, strings and tensors are unpickled from it.
        use_ema: Take the averaged weights, as the authors do to restore pictures; otherwise the raw ones.

    Returns:
        The description of the restorer file (family `driftrec`, or `regression` for the baseline), and its tensors by
        their full names. The licence is `unknown`: the checkpoint does not tell.

    Raises:
        DriftRecCheckpointError: The file cannot be read safely, or lacks something.
        RestorerFileError: Its tensors do not fit the network that its options describe; the first of them are named.
    """
    name = Path(path).name
    checkpoint = _read(path)
    options, state = _section(checkpoint, "hyper_parameters", name), _backbone(checkpoint, name)
    network = _network_config(options, state, name)
    weights = _Weights(state, _section(checkpoint, "ema", name), name)
    metadata = _metadata(options, network, name)
    metadata.training.update(_provenance(checkpoint, name, use_ema=use_ema))
    part = "regression" if metadata.family == "regression" else "score"
    tensors = {f"{part}.{key}": value for key, value in (weights.averaged() if use_ema else weights.raw()).items()}
    load_part(NCSNpp(network, device="meta"), RestorerFile(metadata, tensors, name), part, assign=True)
    return metadata, tensors


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    return read_pickled(
        path, wanted="a DriftRec .ckpt file", content="a Lightning checkpoint", error=DriftRecCheckpointError
    )


def _section(checkpoint: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    section = checkpoint.get(key)
    if not isinstance(section, dict):
        raise DriftRecCheckpointError(
            f"{name}: expected a dictionary {key!r} in a DriftRec checkpoint, got "
            f"{kind(section)}. Give the .ckpt file that the authors' train.py wrote."
        )
    return section


def _backbone(checkpoint: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The network's tensors in the checkpoint's own order, which is that of the list of averages."""
    state = _section(checkpoint, "state_dict", name)
    foreign = [
        str(key) for key, value in state.items() if not (str(key).startswith(_BACKBONE) and torch.is_tensor(value))
    ]
    if foreign or not state:
        found = f"{foreign[0]!r} and {len(foreign) - 1} more" if foreign else "nothing"
        raise DriftRecCheckpointError(
            f"{name}: expected its state_dict to hold {_BACKBONE}* tensors only, got {found}."
        )
    return {key.removeprefix(_BACKBONE): value for key, value in state.items()}


class _Weights:
    """The two sets of weights of a checkpoint, by name.

    A checkpoint written during validation has the averages in its state_dict and the raw weights in `collected_params`;
    that list also stays behind, outdated, when training goes on, so the state_dict decides.
    """

    def __init__(self, state: dict[str, Tensor], ema: dict[str, Any], name: str) -> None:
        self.state, self.ema, self.name = state, ema, name

    def averaged(self) -> dict[str, Tensor]:
        return self._named("shadow_params")

    def raw(self) -> dict[str, Tensor]:
        if self.ema.get("collected_params") is None:
            return self.state
        averaged = self.averaged()
        if any(not torch.equal(value, averaged[key]) for key, value in self.state.items()):
            return self.state
        return self._named("collected_params")

    def _named(self, key: str) -> dict[str, Tensor]:
        values = self.ema.get(key)
        if not isinstance(values, list) or not all(torch.is_tensor(value) for value in values):
            raise DriftRecCheckpointError(
                f"{self.name}: expected ema.{key} to be a list of tensors, got {kind(values)}."
            )
        if len(values) != len(self.state):
            raise DriftRecCheckpointError(
                f"{self.name}: expected ema.{key} to hold as many tensors as the state_dict, {len(self.state)}, got "
                f"{len(values)}, so they cannot be told apart. Use the raw weights instead."
            )
        wrong = [
            f"{name} is {tuple(value.shape)} instead of {tuple(self.state[name].shape)}"
            for name, value in zip(self.state, values, strict=True)
            if value.shape != self.state[name].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DriftRecCheckpointError(
                f"{self.name}: expected ema.{key} in the order of the state_dict, but {', '.join(wrong[:3])}{more}. "
                "Use the raw weights instead."
            )
        return dict(zip(self.state, values, strict=True))


def _network_config(options: dict[str, Any], state: dict[str, Tensor], name: str) -> NCSNppConfig:
    """The network of the checkpoint's options; input channels and conditioning are read from its tensors."""
    backbone = _option(options, "backbone_name", (str,), name)
    if backbone != "ncsnpp":
        raise DriftRecCheckpointError(
            f"{name}: expected the network 'ncsnpp', the only one known here, got {backbone!r}."
        )
    output = state.get("output_layer.weight")
    if output is None or output.dim() != 4:
        raise DriftRecCheckpointError(
            f"{name}: expected a four-dimensional tensor backbone.output_layer.weight, got none."
        )
    expected = (3, 3 if "discriminative_mode" in options else 6)
    if output.shape[:2] != expected:
        raise DriftRecCheckpointError(
            f"{name}: expected a network of {expected[1]} input and {expected[0]} output channels (RGB), got "
            f"{output.shape[1]} and {output.shape[0]}."
        )
    width, blocks = (_option(options, key, (int,), name) for key in ("nf", "num_res_blocks"))
    multipliers = _option(options, "ch_mult", (list, tuple), name)
    attention = tuple(level for level in range(len(multipliers)) if _TRAINED_SIZE >> level == _ATTENTION_SIZE)
    try:
        return NCSNppConfig(
            in_channels=expected[1],
            width=width,
            channel_multipliers=tuple(int(multiplier) for multiplier in multipliers),
            res_blocks=blocks,
            attention_levels=attention,
            conditional="all_modules.0.W" in state,
        )
    except (TypeError, ValueError) as error:
        raise DriftRecCheckpointError(f"{name}: its options describe no network ({error}).") from error


def _metadata(options: dict[str, Any], network: NCSNppConfig, name: str) -> RestorerMetadata:
    if "discriminative_mode" in options:
        mode = _option(options, "discriminative_mode", (str,), name)
        if mode != "direct":
            raise DriftRecCheckpointError(
                f"{name}: expected a baseline trained with --discriminative-mode direct, the paper's, got {mode!r}."
            )
        level = 1.0 if network.conditional else None
        return RestorerMetadata(
            "regression", {"network": network.to_dict(), "residual_scale": 0.0, "noise_level": level}
        )
    if not network.conditional:
        raise DriftRecCheckpointError(
            f"{name}: expected a score network that is told the noise level, got one without."
        )
    config = {
        "network": network.to_dict(),
        "sde": _sde_config(options, name),
        "prediction": asdict(Prediction("noise")),
    }
    return RestorerMetadata("driftrec", config)


def _sde_config(options: dict[str, Any], name: str) -> dict[str, Any]:
    sde = _option(options, "sde_name", (str,), name)
    if sde not in _SDE_NAMES:
        raise DriftRecCheckpointError(f"{name}: expected an SDE of {', '.join(_SDE_NAMES)}, got {sde!r}.")
    if sde == "ouve" and options.get("linear_schedule", False):
        raise DriftRecCheckpointError(
            f"{name}: expected the paper's exponential noise schedule, got one trained with --linear-schedule."
        )
    numbers = {key: float(_option(options, key, (int, float), name)) for key in ("sigma_min", "sigma_max", "gamma")}
    t_eps = float(_option(options, "t_eps", (int, float), name))
    try:
        make_sde(_SDE_NAMES[sde], **numbers)
    except ValueError as error:
        raise DriftRecCheckpointError(f"{name}: its options describe no SDE ({error})") from error
    return {"name": _SDE_NAMES[sde], **numbers, "t_eps": t_eps}


def _provenance(checkpoint: dict[str, Any], name: str, *, use_ema: bool) -> dict[str, Any]:
    counts = {key: checkpoint[key] for key in ("epoch", "global_step") if isinstance(checkpoint.get(key), int)}
    return {"imported_from": name, "weights": "averaged" if use_ema else "raw", **counts}


def _option(options: dict[str, Any], key: str, kinds: tuple[type, ...], name: str) -> Any:
    value = options.get(key)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        found = "none" if value is None else repr(value)
        raise DriftRecCheckpointError(f"{name}: expected hyper_parameters.{key} to be a {wanted}, got {found}.")
    return value
