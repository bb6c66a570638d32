"""`python -m training prepare captions`: captions of crops, for the first stage of SODiff."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from restoration.devices import accelerator_available
from training.data.captioner import DEFAULT_MODEL, DEFAULT_PROMPT, DTYPES, Captioner
from training.data.captions import (
    DEFAULT_NAME,
    CaptionedCrop,
    CaptionError,
    cut_crop,
    draw_crop,
    read_captions,
    whole_lines,
)
from training.data.pictures import DECODE_ERRORS, find_images, load_image, scan_images
from training.data.shards import is_shards
from training.degradation import compress

MakeCaptioner = Callable[[str, str, int, str, torch.device | None], Callable[[Sequence[Image.Image]], list[str]]]


@dataclass(frozen=True)
class CaptionSettings:
    """What all lines of a caption file have in common.

    Args:
        model: The vision-language model.
        prompt: Its question.
        max_new_tokens: Length of its answers.
        dtype: Of its weights.
        of: Whether it sees the compressed crop or the clean one.
        crop: Side of the squares, pixels.
        quality_min: Lowest JPEG quality.
        quality_max: Highest JPEG quality, included.
        seed: Of boxes and qualities.
    """

    model: str = DEFAULT_MODEL
    prompt: str = DEFAULT_PROMPT
    max_new_tokens: int = 96
    dtype: str = "auto"
    of: str = "degraded"
    crop: int = 512
    quality_min: int = 5
    quality_max: int = 95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.quality_min <= self.quality_max <= 100:
            raise CaptionError(
                f"--quality-min, --quality-max: expected 1 <= min <= max <= 100, got {self.quality_min} and "
                f"{self.quality_max}."
            )
        if self.crop < 8 or self.max_new_tokens < 1 or self.seed < 0:
            raise CaptionError(
                "expected --crop of at least 8, --max-new-tokens of at least 1 and --seed of at least 0, got "
                f"{self.crop}, {self.max_new_tokens} and {self.seed}."
            )


def run(arguments: list[str]) -> None:
    """Caption as the command line says.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
        FileNotFoundError: There are no pictures.
    """
    options = vars(_parser().parse_args(arguments))
    names = {field.name for field in dataclasses.fields(CaptionSettings)}
    settings = CaptionSettings(**{key: value for key, value in options.items() if key in names})
    if options["crops"] < 1 or options["batch"] < 1:
        raise CaptionError(f"expected --crops and --batch of at least 1, got {options['crops']}, {options['batch']}.")
    output = options.get("output", options["train"] / DEFAULT_NAME)
    write_captions(settings, options["train"], output, crops=options["crops"], batch=options["batch"])


def write_captions(
    settings: CaptionSettings, folder: Path, output: Path, *, crops: int = 1, batch: int = 8,
    make_captioner: MakeCaptioner = Captioner,
) -> None:  # fmt: skip
    """Caption the pictures of a folder into one file, each process its share; what the file has is not done again.

    Args:
        settings: What all captions have in common, kept beside the file; another setting is refused.
        folder: Of the pictures.
        output: The file, one line of JSON for each crop.
        crops: Of each picture. More of them, or more pictures, may be asked for later.
        batch: Crops at a time.
        make_captioner: What describes pictures.

    Raises:
        CaptionError: The file was written with other settings, or no caption can be made.
        FileNotFoundError: The folder has no pictures.
    """
    if is_shards(folder):
        raise CaptionError(
            f"--train: expected a folder, got {folder}. Caption the folder that the shards are made of: a .txt beside "
            "each picture is packed with it."
        )
    state = PartialState(cpu=not accelerator_available(), timeout=timedelta(days=30))  # shares end at different times
    paths, broken = scan_images(find_images(folder))
    if state.is_main_process:
        _check_same_settings(settings, output)
        _join(output)
        for path, reason in broken:
            print(f"skipped {path}, which cannot be read: {reason}", flush=True)
    state.wait_for_everyone()
    done = {(crop.path, crop.number) for crop in read_captions(output)} if output.exists() else set()
    wanted = [(path.relative_to(folder).as_posix(), number) for path in paths for number in range(crops)]
    missing = [crop for crop in wanted if crop not in done]
    share = missing[state.process_index :: state.num_processes]
    if state.is_main_process:
        print(f"{len(wanted) - len(missing)} of {len(wanted)} crops of {len(paths)} pictures have captions", flush=True)
    if share:
        captioner = make_captioner(
            settings.model, settings.prompt, settings.max_new_tokens, settings.dtype, state.device
        )
        part = output if state.num_processes == 1 else _part(output, state.process_index)
        _write_share(share, settings, folder, part, batch, captioner, show=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        _join(output)
        print(f"done: {output}; train on it with: python -m training saipe --data.train {folder} --captions {output}")


def _write_share(
    share: Sequence[tuple[str, int]], settings: CaptionSettings, folder: Path, part: Path, batch: int,
    captioner: Callable[[Sequence[Image.Image]], list[str]], *, show: bool,
) -> None:  # fmt: skip
    progress = tqdm(total=len(share), unit="crop", disable=not show, dynamic_ncols=True)
    crops = _degraded_crops(share, settings, folder, progress)
    with part.open("a", encoding="utf-8", errors="surrogateescape") as file, progress:
        while several := list(islice(crops, batch)):
            captions = captioner([picture for _, picture in several])
            for (crop, _), caption in zip(several, captions, strict=True):
                file.write(dataclasses.replace(crop, caption=caption).to_line())
            file.flush()
            progress.update(len(several))


def _degraded_crops(
    share: Sequence[tuple[str, int]], settings: CaptionSettings, folder: Path, progress: Any
) -> Iterator[tuple[CaptionedCrop, Image.Image]]:
    """Each crop, still without its caption, and what the model is shown of it."""
    last: tuple[str, np.ndarray] | None = None
    for path, number in share:
        try:
            picture = last[1] if last is not None and last[0] == path else load_image(folder / path)
        except DECODE_ERRORS as error:
            progress.write(f"skipped {path}, which cannot be decoded: {error}")
            progress.update(1)
            continue
        last = (path, picture)
        box, quality = draw_crop(
            path, number, picture.shape, settings.crop, (settings.quality_min, settings.quality_max), settings.seed
        )
        window = cut_crop(picture, box)
        shown = compress(window, quality) if settings.of == "degraded" else window
        yield CaptionedCrop(path, number, box, quality, "", settings.model), Image.fromarray(shown)


def _check_same_settings(settings: CaptionSettings, output: Path) -> None:
    """Compare with what was asked for when the file was begun; keep it where there is no caption yet."""
    beside = output.with_suffix(".settings.json")
    now = dataclasses.asdict(settings)
    if not any(file.exists() and whole_lines(file) for file in (output, *_parts(output))):
        output.parent.mkdir(parents=True, exist_ok=True)
        _replace(beside, json.dumps(now, indent=1))
        return
    if not beside.exists():
        raise CaptionError(f"{output} has captions of unknown settings: {beside.name} is missing. Give --output.")
    then = json.loads(beside.read_text(encoding="utf-8"))
    changed = [f"{key} was {then.get(key)!r}, is {value!r}" for key, value in now.items() if then.get(key) != value]
    if changed:
        raise CaptionError(
            f"{output} was begun with other settings ({', '.join(changed)}). Repeat those, or give another --output."
        )


def _part(output: Path, process: int) -> Path:
    return output.with_name(f"{output.name}.part-{process:03d}")


def _parts(output: Path) -> list[Path]:
    return sorted(output.parent.glob(f"{output.name}.part-[0-9][0-9][0-9]"))


def _join(output: Path) -> None:
    """Put what processes wrote for themselves into the one file, sorted, without lines that a kill cut."""
    files = [file for file in (output, *_parts(output)) if file.exists()]
    crops = {}
    for file in files:
        _replace(file, "".join(f"{line}\n" for line in whole_lines(file)))
        for crop in read_captions(file):
            crops.setdefault((crop.path, crop.number), crop)
    if files:
        _replace(output, "".join(crops[key].to_line() for key in sorted(crops)))
    for part in _parts(output):
        part.unlink()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".writing")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parser() -> argparse.ArgumentParser:
    captions = argparse.ArgumentParser(
        prog="python -m training prepare captions",
        description="Write captions of crops, for the first stage of SODiff. Repeating the command goes on where it "
        "stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = CaptionSettings()
    unsaid: dict[str, Any] = {"type": Path, "default": argparse.SUPPRESS}
    captions.add_argument("--train", required=True, metavar="FOLDER", help="the training pictures", **unsaid)
    captions.add_argument("--output", metavar="FILE", help=f"the file; by default {DEFAULT_NAME} in FOLDER", **unsaid)
    captions.add_argument("--model", default=default.model, help="a vision-language model: a folder or the hub's name")
    captions.add_argument("--prompt", default=default.prompt, help="its question")
    captions.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="length of its answers")
    captions.add_argument("--dtype", choices=list(DTYPES), default=default.dtype, help="of its weights")
    captions.add_argument("--of", choices=["degraded", "clean"], default=default.of, help="which crop it sees")
    captions.add_argument("--crops", type=int, default=1, help="of each picture")
    captions.add_argument("--crop", type=int, default=default.crop, help="their side, pixels")
    captions.add_argument("--quality-min", type=int, default=default.quality_min, help="lowest JPEG quality")
    captions.add_argument("--quality-max", type=int, default=default.quality_max, help="highest, included")
    captions.add_argument("--seed", type=int, default=default.seed, help="of boxes and qualities")
    captions.add_argument("--batch", type=int, default=8, help="crops at a time, in each process")
    return captions
