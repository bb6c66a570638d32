"""Where a run lies beside its pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def check_places(config: Any) -> None:
    """Refuse a run inside of a folder of pictures, which its samples would be taken for.

    Args:
        config: Of a training.

    Raises:
        ValueError: `run.output` lies in `data.train` or `data.validation`, or is one of them.
    """
    output = Path(os.path.realpath(config.run.output))
    for name in ("train", "validation"):
        folder = getattr(config.data, name)
        if folder is not None and folder.is_dir() and output.is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"run.output: {config.run.output} lies in data.{name} ({folder}), whose pictures the run's samples "
                "would be taken for. Give --run.output a folder elsewhere."
            )
