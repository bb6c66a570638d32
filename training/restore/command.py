"""`python -m training restore IN OUT --restorer FILE`: restore a folder of pictures, or one, without ComfyUI."""

from __future__ import annotations

import io
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from restoration.restorer_file import read_metadata
from training.given_files import check_given
from training.restore.families import DTYPES, Loading, check_family
from training.restore.plan import Plan, make_plan, output_kind
from training.restore.saving import NoRoomError, OutputFormat, check_writable
from training.restore.settings import RestoreSettings, unsaid
from training.restore.workers import (
    Tally,
    Work,
    choose_device,
    over_all_ranks,
    rank_of,
    restore_in_processes,
    restore_share,
)

_DESCRIPTION = """Restore the JPEGs of a folder and its sub-folders, or one file. The results go to another folder,
under the same names. PNG, WebP, BMP and TIFF files, which may have been JPEGs once, are restored as well. What is there
already is left alone: repeat the command to go on where it stopped.

Examples:
  python -m training restore photos restored --restorer weights/starter-driftrec.safetensors
  python -m training restore old.jpg old_restored.png --restorer weights/starter-driftrec.safetensors
  torchrun --nproc_per_node=4 -m training restore photos restored --restorer FILE

Exit status: 0 when all pictures have a result, 1 when some have not (each is named), 2 when it cannot be done as asked,
130 when it was stopped with Ctrl-C."""


@dataclass(frozen=True)
class RestoreOptions:
    """What the command line says.

    Args:
        input: A folder, or one file. Pictures are told by their content, whatever their ending.
        output: The folder for the results, made where it is missing; it may lie inside of IN. For one file also the
            result itself, e.g. restored.png.
        restorer: The restorer file, of the family driftrec, regression, prior (JPEGs only), codiff or sodiff. Those in
            the folder weights come with this pack.
        settings: How pictures are restored.
        base: For restorers that adapt Stable Diffusion 2.1-base: its folder in diffusers' layout, or its name on the
            Hugging Face hub.
        format: Of the results. png and webp are lossless. By default what OUT ends in, where that is a file, else png.
        jpeg_quality: Of the results with --format jpeg, 1 to 100 (default: 95); colours are not subsampled.
        device: auto takes a GPU where there is one.
        dtype: Precision of the networks. auto is fp16 on CUDA GPUs and fp32 elsewhere.
        overwrite: Restore all pictures, also those that have a result.
        jobs: Processes on this machine. On the CPU each gets its share of the threads, and each needs the memory of
            one; GPUs are given out in turn.
        metadata: Whether EXIF, XMP, colour profile and resolution are carried over.
    """

    input: Annotated[Path, tyro.conf.Positional, unsaid(metavar="IN")]
    output: Annotated[Path, tyro.conf.Positional, unsaid(metavar="OUT")]
    restorer: Annotated[Path, unsaid(metavar="FILE")]
    settings: Annotated[RestoreSettings, tyro.conf.arg(name="")] = field(default_factory=RestoreSettings)
    base: Annotated[str | None, unsaid(metavar="PATH")] = None
    format: Annotated[Literal["png", "webp", "jpeg"] | None, unsaid(metavar="{png,webp,jpeg}")] = None
    jpeg_quality: Annotated[int | None, unsaid(metavar="QUALITY")] = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    overwrite: Annotated[bool, unsaid()] = False
    jobs: int = 1
    metadata: Annotated[
        bool, unsaid(help="Do not carry over EXIF, XMP, colour profile and resolution. Without this they are.")
    ] = True


def run(arguments: list[str]) -> int:
    """Restore, and say what came of it.

    Returns:
        The exit status: 0 when every picture has a result, 1 when some have not, 130 for Ctrl-C.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
        FileNotFoundError: There are no pictures.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names may hold what a terminal cannot show
    options = tyro.cli(
        RestoreOptions, prog="python -m training restore", description=_DESCRIPTION, args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip
    try:
        return restore(options)
    except KeyboardInterrupt:
        print("training restore: stopped; repeat the command to go on", file=sys.stderr)
        return 130
    except NoRoomError as error:
        print(f"training restore: {error}", file=sys.stderr)
        return 1


def restore(options: RestoreOptions) -> int:
    """As `run`, for options that were parsed."""
    started = time.perf_counter()
    rank, ranks, local_rank = rank_of(os.environ)
    plan, work = _planned(options)
    if rank == 0:
        _describe(options, plan)
    share = plan.share(rank, ranks)
    jobs = max(1, min(options.jobs, len(share)))
    first = local_rank * jobs
    results = restore_in_processes(work, share, jobs, first) if jobs > 1 else restore_share(work, share, first)
    tally = sum(results, Tally())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        tally = over_all_ranks(tally)
    if rank == 0 or "TORCHELASTIC_RUN_ID" not in os.environ:
        _conclude(tally, plan, time.perf_counter() - started)
    return 1 if tally.failed else 0


def _planned(options: RestoreOptions) -> tuple[Plan, Work]:
    if options.jobs < 1:
        raise ValueError(f"expected --jobs of at least 1, got {options.jobs}.")
    loading = Loading(options.settings, choose_device(options.device, 0), DTYPES.get(options.dtype), options.base)
    check_given(options.restorer, "--restorer")
    check_family(read_metadata(options.restorer), options.restorer.name, loading)
    kind = output_kind(options.input, options.output, options.format)
    if options.jpeg_quality is not None and kind != "jpeg":
        raise ValueError(f"expected no --jpeg-quality for {kind}, which is lossless. Leave it out, or --format jpeg.")
    form = OutputFormat(kind) if options.jpeg_quality is None else OutputFormat(kind, options.jpeg_quality)
    plan = make_plan(options.input, options.output, form.suffix)
    if options.overwrite or plan.missing():
        check_writable(options.output if options.input.is_dir() else plan.pictures[0].target.parent)
    work = Work(
        options.restorer, options.base, options.settings, loading.dtype, form, options.device,
        options.overwrite, options.metadata, len(plan.pictures),
    )  # fmt: skip
    return plan, work


def _describe(options: RestoreOptions, plan: Plan) -> None:
    there = len(plan.pictures) - plan.missing()
    state = f", {there} of them restored already" if there and not options.overwrite else ""
    print(f"{options.restorer.name}: {_count(len(plan.pictures), 'picture')}{state}", flush=True)


def _conclude(tally: Tally, plan: Plan, seconds: float) -> None:
    others = f", {_count(plan.left_out, 'other file')} left out" if plan.left_out else ""
    print(
        f"{tally.done} restored, {tally.skipped} there already, {len(tally.failed)} failed{others}; {seconds:.1f} s",
        flush=True,
    )
    for name, reason in tally.failed:
        print(f"training restore: {name} was not restored: {reason}", file=sys.stderr)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
