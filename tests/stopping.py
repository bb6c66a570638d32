"""Stopping a training in the middle, as an impatient user does."""

from __future__ import annotations

import os
import signal

import pytest

import training.loop.trainer
from training.loop.session import Session


def stop_after(session: Session, images: int) -> None:
    """Train, with a SIGTERM sent to this process as soon as so many images are done."""
    step = training.loop.trainer.Trainer._step

    def counted(self, batches):
        statistics = step(self, batches)
        if self.images + self.run_config.batch == images:
            os.kill(os.getpid(), signal.SIGTERM)
        return statistics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop.trainer.Trainer, "_step", counted)
        session.train()
