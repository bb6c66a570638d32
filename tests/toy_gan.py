"""A generator and a critic of a few hundred weights, trained by the real loop; as a script, for `torchrun`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from restoration.restorer_file import RestorerMetadata
from training.commands import COMMANDS, Command
from training.configs.common import DataConfig, OptimizerConfig, RunConfig, ValidationConfig
from training.degradation import Degradation
from training.loop.session import Session
from training.trainers.task import TaskDefaults


@dataclass(frozen=True)
class ToyConfig:
    """What every command's configuration has, and the weight of the critic's opinion."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(crop=16, augmentation="crop", workers=0, degradation=Degradation(10, 60))
    )
    weight: float = 0.1
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, ema_decay=0.0)
    )
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=4e-3, weight_decay=0.0, betas=(0.5, 0.9))
    )
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(every=10**6, images=1, crop=16, qualities=(10,))
    )
    run: RunConfig = field(default_factory=lambda: RunConfig(images=32, batch=8, checkpoint_every=10**6))


class ToyGenerator(nn.Module):
    """A frozen layer, as a base model has many of, and trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Conv2d(3, 8, 3, padding=1)
        self.base.requires_grad_(False)
        self.body = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.body(self.base(images))


class ToyTask(TaskDefaults):
    """Squared error and softplus(-D(restored)); the critic tells restored from clean."""

    size_multiple = 8

    def __init__(self, config: ToyConfig) -> None:
        self.config, self.critic_optimizer = config, config.critic_optimizer
        with torch.random.fork_rng():
            torch.manual_seed(config.run.seed)
            self.model = ToyGenerator()
            self.critic = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.SiLU(), nn.Conv2d(8, 1, 1))
        self.restored: torch.Tensor | None = None

    def loss(self, model, batch, generator):
        restored = model(batch["degraded"])
        self.restored = restored.detach()
        opinion = F.softplus(-self.critic(restored)).mean()
        return F.mse_loss(restored, batch["clean"]) + self.config.weight * opinion

    def critic_loss(self, critic, batch, generator):
        assert self.restored is not None
        return F.softplus(critic(self.restored)).mean() + F.softplus(-critic(batch["clean"])).mean()

    def restore(self, degraded, seed):
        return self.model(degraded).clamp(0, 1)

    def measure(self, degraded, quality):
        return {"twice_quality": 2 * float(quality)}

    def metadata(self, training, license):
        return RestorerMetadata("regression", {"toy": True}, training=training, license=license)

    def tensors(self):
        return {f"regression.{key}": value for key, value in self.model.state_dict().items()}

    def load(self, tensors):
        self.model.load_state_dict({key.split(".", 1)[1]: value for key, value in tensors.items()})


TOY = Command("a toy", lambda: {"paper": ToyConfig()}, ToyTask)


if __name__ == "__main__":
    COMMANDS["toy"] = TOY
    pictures, output, accumulate = sys.argv[1:]
    Session(
        "toy",
        ToyConfig(
            data=DataConfig(
                train=Path(pictures), crop=16, augmentation="crop", workers=0, degradation=Degradation(10, 60)
            ),
            run=RunConfig(output=Path(output), images=32, batch=8, accumulate=int(accumulate)),
        ),
    ).train()
