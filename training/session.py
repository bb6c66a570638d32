"""From a configuration to a running training: pictures are found, the network is made, then the loop takes over."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from restoration.devices import accelerator_available
from restoration.restorer_file import read_restorer
from training.config_files import to_yaml
from training.configs import DriftRecConfig, RegressionConfig
from training.data import PairDataset, find_images, scan_images
from training.loop import Trainer
from training.run_folder import RunFolder
from training.trainers.score import DriftRecTask, RegressionTask
from training.trainers.task import Task
from training.validation import Validation, split_pictures


class Session:
    """One command, with everything checked before the first step.

    Args:
        command: `driftrec` or `regression`.
        config: Its configuration.

    Raises:
        FileNotFoundError: A folder is missing or holds no picture.
        ValueError: No picture is readable, or the configuration contradicts itself.
    """

    def __init__(self, command: str, config: DriftRecConfig | RegressionConfig) -> None:
        self.command, self.config = command, config
        _check_crops(config)
        self.state = PartialState(cpu=not accelerator_available())
        self._say(f"looking at the pictures in {config.data.train} ...")
        self.training, self.broken = _readable(config.data.train)
        if config.data.validation is None:
            self.training, self.validation = split_pictures(self.training, config.validation.images)
        else:
            self.validation, broken = _readable(config.data.validation)
            self.broken += broken
        self.task = _make_task(config)
        self.resuming = (config.run.output / "checkpoint.pt").exists()
        if config.run.init_from is not None and not self.resuming:
            self.task.load(read_restorer(config.run.init_from).tensors)

    def describe(self) -> None:
        """Print the resolved configuration, the parameters and the data that was found."""
        parameters = sum(parameter.numel() for parameter in self.task.model.parameters())
        self._say(to_yaml(self.config).rstrip())
        self._say(f"network: {parameters:,} parameters, {parameters * 2 / 2**20:.1f} MiB in half precision")
        self._say(f"data: {len(self.training)} pictures to train on, {len(self.validation)} for validation, "
                  f"{len(self.broken)} skipped as unreadable")  # fmt: skip
        for path, reason in self.broken:
            self._say(f"  skipped {path}: {reason}")
        device = self.state.device
        self._say(f"device: {device}, {self.state.num_processes} process(es); {torch.get_num_threads()} CPU threads")
        self._say(f"run: {self.config.run.output} ({'goes on' if self.resuming else 'new'})")

    def train(self) -> None:
        """Train to the end."""
        config = self.config
        data = config.data
        dataset = PairDataset(
            self.training,
            data.crop,
            data.degradation,
            seed=config.run.seed,
            augmentation=data.augmentation,
            flips=data.flips,
            rotations=data.rotations,
            downscale=data.downscale,
            cache_mb=data.cache_mb,
        )
        provenance = {"data": f"{len(self.training)} pictures", "device": _device_name(self.state.device)}
        folder = RunFolder(
            config.run.output, self.command, config, main=self.state.is_main_process, provenance=provenance
        )
        validation = Validation(
            config.validation, self.validation, config.network.size_multiple, folder.show, folder.say
        )
        trainer = Trainer(
            self.task, dataset, data, config.optimizer, config.run, folder,
            lambda images: validation(self.task, images), config.validation.every,
        )  # fmt: skip
        trainer.train()
        if trainer.images >= config.run.images:
            self._say(f"done: {folder.restorer} is ready; copy it into ComfyUI/models/jpeg_restorers")

    def _say(self, text: str) -> None:
        if self.state.is_main_process:
            print(text, flush=True)


def _check_crops(config: DriftRecConfig | RegressionConfig) -> None:
    multiple = config.network.size_multiple
    for name, crop in (("data.crop", config.data.crop), ("validation.crop", config.validation.crop)):
        if crop < multiple or crop % multiple:
            raise ValueError(f"{name}: expected a multiple of {multiple}, which this network needs, got {crop}.")


def _make_task(config: DriftRecConfig | RegressionConfig) -> Task:
    return DriftRecTask(config) if isinstance(config, DriftRecConfig) else RegressionTask(config)


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
