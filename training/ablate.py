"""`python -m training ablate sodiff`: SODiff's second stage once as it is, and once without each of its parts.

All from one configuration, with a table of what each gave: the switches of the paper's Tables 2, 3 and 4.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from restoration.restorer_file import read_metadata
from training.configs.sodiff import SODiffConfig

FIXED_TIMESTEP = 199.0
"""Where the paper does without its predictor it does not say at which timestep; its authors' HAODiff has this one."""
FULL = "full"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        summary: What is left out.
        change: From the full configuration, and a SAIPE that was trained without alignment or None, to that row's.
    """

    summary: str
    change: Callable[[SODiffConfig, Path | None], SODiffConfig]


def _loss(config: SODiffConfig, **changes: Any) -> SODiffConfig:
    return replace(config, loss=replace(config.loss, **changes))


def _without_alignment(config: SODiffConfig, unaligned: Path | None) -> SODiffConfig:
    if unaligned is None:
        raise ValueError(
            "ablate: the row no-alignment needs a first stage that was trained without alignment. Train one (python -m "
            "training saipe --align none) and give it as --unaligned, or leave the row out of --rows."
        )
    return replace(config, saipe=unaligned)


ROWS = {
    FULL: Row("everything", lambda config, _: config),
    "no-alignment": Row("SAIPE's alignment with text (Table 2)", _without_alignment),
    "no-predictor": Row(
        f"the timestep predictor: always {FIXED_TIMESTEP:g} (Table 3)",
        lambda config, _: replace(config, timestep=FIXED_TIMESTEP),
    ),
    "no-quality": Row("the loss of the quality, L_QF (Table 3)", lambda config, _: _loss(config, quality=0.0)),
    "no-edges": Row(
        "DISTS of the edges, not that of the pictures",
        lambda config, _: _loss(config, perceptual=replace(config.loss.perceptual, edges=False)),
    ),
    "no-perceptual": Row(
        "edge-aware DISTS as a whole (Table 4)",
        lambda config, _: _loss(config, perceptual=replace(config.loss.perceptual, kind="none")),
    ),
    "no-adversarial": Row(
        "the discriminator (Table 4)",
        lambda config, _: _loss(config, adversarial=replace(config.loss.adversarial, discriminator="none")),
    ),
}


def run(arguments: list[str]) -> None:
    """Train every row and print the table; repeating the command goes on where it stopped.

    Raises:
        ValueError: A row is unknown, or needs what was not given.
    """
    own, others = _parse(arguments)
    from training.command_line.configure import parse

    dry_run, config = parse("sodiff", others)
    configs = variants(config, own.rows, own.unaligned)
    for name, variant in configs.items():
        print(f"== {name}: without {ROWS[name].summary}" if name != FULL else f"== {name}", flush=True)
        if not _train(variant, dry_run=dry_run):
            return
    if dry_run:
        print("dry run: nothing was written")
        return
    if not PartialState().is_main_process:
        return
    text = table({name: variant.run.output / "sodiff.safetensors" for name, variant in configs.items()})
    _write(config.run.output / "ablation.md", text)
    print(text)


def _train(config: SODiffConfig, *, dry_run: bool) -> bool:
    """One row; returns whether it came to its end. Nothing of it stays in memory."""
    from training.loop.session import Session

    session = Session("sodiff", config)
    session.describe()
    finished = dry_run or session.train()
    del session
    gc.collect()  # mixed precision leaves cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return finished


def variants(config: SODiffConfig, rows: list[str], unaligned: Path | None) -> dict[str, SODiffConfig]:
    """The configuration of each row, its run in a folder of the row's name inside of that of the full one's.

    Raises:
        ValueError: A row needs what was not given, or is the same as the full one.
    """
    changed = {}
    for name in rows:
        variant = ROWS[name].change(config, unaligned)
        if name != FULL and (variant == config or _is_idle(name, config)):
            raise ValueError(f"ablate: the configuration has nothing that {name} could leave out. Change --rows.")
        changed[name] = replace(variant, run=replace(variant.run, output=config.run.output / name))
    return changed


def _is_idle(name: str, config: SODiffConfig) -> bool:
    """Whether what a row leaves out has no effect in this configuration."""
    without_edges = config.loss.perceptual.kind == "none"
    return (name == "no-edges" and without_edges) or (name == "no-quality" and config.timestep is not None)


def table(files: dict[str, Path]) -> str:
    """The figures of the exported files as a Markdown table, one row a file, and a list of what each left out."""
    figures = {name: read_metadata(path).training["metrics"] for name, path in files.items()}
    columns = sorted({key for row in figures.values() for key in row if not key.startswith("jpeg_")}, key=_order)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in figures.items():
        cells = (f"{row[key]:.4g}" if key in row else "" for key in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    explained = (f"- {name}: without {ROWS[name].summary}" for name in files if name != FULL)
    return "\n".join([*lines, "", *explained])


def _order(column: str) -> tuple[str, int]:
    measure, _, quality = column.partition("/qf")
    return measure, int(quality) if quality.isdigit() else 0


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", suffix=".part") as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)  # temporary files are private
    os.replace(file.name, path)


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    rows = "\n".join(f"  {name:<16}{row.summary}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="python -m training ablate", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train SODiff's second stage once as it is, and once for each thing that it can do without.\n"
        "Further options are those of `python -m training sodiff`; their preset and data hold for all rows.",
        epilog=f"rows, and what each leaves out:\n{rows}",
    )  # fmt: skip
    parser.add_argument("method", choices=["sodiff"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--unaligned", type=Path, help="a first stage of `saipe --align none`, for no-alignment")
    return parser.parse_known_args(arguments)
