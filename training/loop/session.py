"""From a configuration to a running training: pictures are found, the network is made, then the loop takes over."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from restoration.devices import accelerator_available
from training.command_line.files import to_yaml
from training.commands import COMMANDS
from training.configs.places import check_places
from training.data.pairs import to_tensor
from training.data.pictures import find_images, scan_images
from training.data.views import pairs_of
from training.given_files import read_given
from training.loop.briefing import changes, warnings
from training.loop.checkpoint import read_checkpoint
from training.loop.logs import import_wandb
from training.loop.progress import say
from training.loop.run_folder import RunFolder
from training.loop.same_run import check_same_run, held_out_before
from training.loop.trainer import Trainer
from training.loop.validation import Validation, split_pictures

_LOOKED_AT = 64
"""Crops that a task may fit its first weights to."""
_PATIENCE = datetime.timedelta(hours=2)
"""For how long processes wait for the first one, which validates alone, before they take it for dead."""


class Session:
    """One command, with everything checked before the first step.

    Args:
        command: One of `COMMANDS`.
        config: Its configuration: a dataclass with `data`, `optimizer`, `validation` and `run`.

    Raises:
        FileNotFoundError: A folder is missing or holds no picture.
        ValueError: No picture is readable, the file to start from does not fit, the configuration contradicts
            itself, or a package that it asks for is not installed.
        RunFolderError: The folder of the run holds another one.
    """

    def __init__(self, command: str, config: Any) -> None:
        self.command, self.config = command, config
        check_places(config)
        if config.run.wandb is not None:
            import_wandb()
        self.state = PartialState(cpu=not accelerator_available(), timeout=_PATIENCE)
        if self.state.is_main_process:
            check_same_run(config.run.output, command, config)
        self._say(f"looking at the pictures in {config.data.train} ...")
        self.training, self.broken = _readable(config.data.train)
        self.held_out: list[str] = []
        if config.data.validation is None:
            self._split()
        else:
            self.validation, broken = _readable(config.data.validation)
            self.broken += broken
        self.task = COMMANDS[command].make_task(config)
        check_crops(self.task.size_multiple, config)
        self.checkpoint = config.run.output / "checkpoint.pt"
        self.resuming = self.checkpoint.exists()
        if config.run.init_from is not None:
            self._start_from(config.run.init_from)

    def _split(self) -> None:
        """Set pictures aside for validation: those that this run set aside before, where it goes on."""
        source, paths = self.config.data.train, {}
        for path in self.training:
            base = next((base for base in (source, source.parent) if path.is_relative_to(base)), path.parent)
            paths[path.relative_to(base).as_posix()] = path
        before = [paths[name] for name in held_out_before(self.config.run.output) if name in paths]
        self.training, self.validation = split_pictures(self.training, self.config.validation.images, before)
        aside = {*before, *self.validation} - set(self.training)
        self.held_out = [name for name, path in paths.items() if path in aside]

    def _start_from(self, path: Path) -> None:
        if self.resuming:
            self._say(f"--run.init-from {path} is not used again: the run goes on from its checkpoint")
            return
        file = read_given(path, "--run.init-from")
        try:
            self.task.load(file.tensors)
        except ValueError as error:
            raise ValueError(f"--run.init-from {path}: {str(error).removeprefix(f'{path.name}: ')}") from error

    def describe(self, *, whole: bool = False) -> None:
        """Print what differs from a preset, or with `whole` all of the configuration; the parameters, the data that was
        found, where the run stands, and what should be known of it."""
        config, state = self.config, self.state
        self._say(to_yaml(config).rstrip() if whole else changes(self.command, config))
        self._say(f"network: {_counted(self.task.model)}")
        if self.task.critic is not None:
            self._say(f"critic: {_counted(self.task.critic)}")
        self._say(f"data: {len(self.training)} pictures to train on, {len(self.validation)} for validation, "
                  f"{len(self.broken)} skipped as unreadable")  # fmt: skip
        for path, reason in self.broken:
            self._say(f"  skipped {path}: {reason}")
        self._say(f"device: {state.device}, {state.num_processes} process(es); {torch.get_num_threads()} CPU threads")
        stands = "new"
        if self.resuming:
            stands = (
                f"goes on at {read_checkpoint(self.checkpoint, mapped=True)['images']} of {config.run.images} images"
            )
        self._say(f"run: {config.run.output} ({stands})")
        for text in warnings(self.command, self.task.model, self.training):
            self._say(f"note: {text}")

    def train(self) -> bool:
        """Train to the end, or until it is asked to stop; returns whether it came to the end."""
        config = self.config
        provenance = {"data": f"{len(self.training)} pictures", "device": _device_name(self.state.device)}
        folder = RunFolder(
            config.run.output, self.command, config, main=self.state.is_main_process, provenance=provenance,
            held_out=self.held_out,
        )  # fmt: skip
        try:
            return self._trained(folder)
        finally:
            folder.close()

    def _trained(self, folder: RunFolder) -> bool:
        config = self.config
        validation = Validation(config.validation, self.validation, self.task.size_multiple, folder.show, folder.say)
        self.task.take_validation(validation.pictures)
        dataset = self.task.dataset(self.training, self.validation) or pairs_of(config, self.training)
        if not self.resuming and config.run.init_from is None:
            pairs = [dataset.pair(index)[1] for index in range(_LOOKED_AT)]
            self.task.look(
                *(torch.stack([to_tensor(getattr(pair, side)) for pair in pairs]) for side in ("image", "clean"))
            )
        trainer = Trainer(
            self.task, dataset, config.data, config.optimizer, config.run, folder,
            lambda images, cut_short: validation(self.task, images, cut_short), config.validation.every,
        )  # fmt: skip
        trainer.train()
        finished = trainer.images >= config.run.images
        if finished:
            self._say(f"done: {folder.restorer} is ready; {self.task.what_next}")
        return finished

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            say(text)


def check_crops(multiple: int, config: Any) -> None:
    """Refuse crops that a network cannot take.

    Raises:
        ValueError: `data.crop` or `validation.crop` is no multiple of `multiple`.
    """
    for name, crop in (("data.crop", config.data.crop), ("validation.crop", config.validation.crop)):
        if crop < multiple or crop % multiple:
            raise ValueError(f"{name}: expected a multiple of {multiple}, which this network needs, got {crop}.")


def _counted(module: nn.Module) -> str:
    parameters = list(module.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    of_them = f", {trained:,} of them trained" if trained < total else ""
    return f"{total:,} parameters{of_them}, {total * 2 / 2**20:.1f} MiB in half precision"


def _readable(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    paths, broken = scan_images(find_images(folder))
    if not paths:
        raise ValueError(
            f"none of the {len(broken)} pictures in {folder} can be read, e.g. {broken[0][0]}: {broken[0][1]}"
        )
    return paths, broken


def _device_name(device: torch.device | None) -> str:
    if device is None:
        return "cpu"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
