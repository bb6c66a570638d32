"""Pictures for `python -m training check`, and how it is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from training.check.command import run

PHOTOS = {"astronaut": data.astronaut, "coffee": data.coffee, "chelsea": data.chelsea, "rocket": data.rocket}


def photo(name: str) -> np.ndarray:
    """A photograph at half its size, so that what it had of artefacts is gone."""
    picture = Image.fromarray(PHOTOS[name]())
    return np.asarray(picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS))


def save(pixels: np.ndarray, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def write_sound(folder: Path) -> Path:
    """A folder of pictures with nothing wrong."""
    for name in PHOTOS:
        save(photo(name), folder / f"{name}.png")
    return folder


def lines(capsys, level: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{level}: ")]


def check(*arguments: object, jobs: int = 1) -> int:
    return run([*(str(word) for word in arguments), "--jobs", str(jobs)])


def tiny(folder: Path, tmp_path: Path, *more: object) -> list[object]:
    return [
        *("regression", "--preset", "starter", "--data.train", folder, "--data.crop", 64),
        *("--run.output", tmp_path / "run"),
        *("--network.width", 8, "--network.channel-multipliers", 1, 2, "--validation.crop", 64, "--run.batch", 4),
        *("--output", tmp_path / "check", *more),
    ]  # fmt: skip
