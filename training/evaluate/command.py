"""`python -m training evaluate`: restorers on a folder of pictures, in figures, and in a report to look at."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from training.evaluate.examples import Examples, choosing_metric
from training.evaluate.finders import without_clean
from training.evaluate.metrics import Metrics, find_metrics
from training.evaluate.options import EvaluateOptions
from training.evaluate.pictures import Source, find_sources
from training.evaluate.protocols import ALSO_MEASURED, PICTURE_PROTOCOLS, conditions_of
from training.evaluate.published import published_rows, to_plain
from training.evaluate.report.page import to_html
from training.evaluate.results import MetricFacts, Results
from training.evaluate.runner import Part, Runner
from training.evaluate.seeing import seeing
from training.evaluate.seen_protocols import map_embeddings, measure_quality
from training.evaluate.store import Store
from training.evaluate.systems import RestorerOnDisk, check_system, read_restorers, systems_of
from training.evaluate.tables import to_text
from training.restore.families import DTYPES, NO_RESTORERS, Loading
from training.restore.settings import RestoreSettings
from training.restore.workers import choose_device, rank_of, wait_for_all_ranks

_WRITTEN = ("results.json", "results.csv", "report.html")
_DESCRIPTION = """Measure restorers on a folder of clean pictures (they are compressed first), or on pictures that are
degraded already. Prints a table and writes results.json, results.csv and report.html, which needs nothing beside it.
What was measured is kept: repeat the command to go on where it stopped, or to add restorers and qualities.

Examples:
  python -m training evaluate --data LIVE1 --restorer weights/starter-onestep-faithful.safetensors
  python -m training evaluate --data LIVE1 --restorer mine.safetensors --protocol single double --qualities 10 20 30
  python -m training evaluate --data clean --degraded photos --restorer mine.safetensors
  python -m training evaluate --data LIVE1 --restorer weights/starter-driftrec.safetensors --protocol samplers averaging
  torchrun --nproc_per_node=4 -m training evaluate --data DIV2K --restorer mine.safetensors
"""


def run(arguments: list[str]) -> int:
    """Evaluate, print the tables and write the report.

    Returns:
        The exit status: 0 when everything was measured, 1 when pictures had to be left out (each is named), 130 for
        Ctrl-C.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
        FileNotFoundError: There are no pictures.
    """
    options = tyro.cli(
        EvaluateOptions, prog="python -m training evaluate", description=_DESCRIPTION, args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip
    try:
        results = evaluate(options, f"python -m training evaluate {shlex.join(arguments)}")
    except KeyboardInterrupt:
        keeps = any(protocol in PICTURE_PROTOCOLS for protocol in options.protocol)
        print(f"training evaluate: stopped{'; repeat the command to go on' if keeps else ''}", file=sys.stderr)
        return 130
    return 1 if results is not None and results.left_out else 0


def evaluate(options: EvaluateOptions, command: str = "") -> Results | None:
    """As `run`, for options that were parsed; `command` is named in the report.

    Returns:
        What was found; None in all processes of a torchrun but the first.

    Raises:
        ValueError, FileNotFoundError: As `run`.
    """
    options.check()
    rank, ranks, local_rank = rank_of(os.environ)
    device = choose_device(options.device, local_rank)
    loading = Loading(RestoreSettings(), device, DTYPES.get(options.dtype), options.base)
    sources = find_sources(options.data, options.degraded, options.limit, options.output)
    restorers = read_restorers(options.restorer)
    parts = _parts(options, restorers, loading)
    metrics = _metrics(options, device) if parts else Metrics((), (), ())
    if rank == 0:
        print(f"{_count(len(sources), 'picture')}, {_count(len(restorers), 'restorer')}, on {device}", flush=True)
    runner = _runner(options, parts, sources[rank::ranks], metrics, loading, rank)
    runner.run(parts)
    if ranks > 1:
        wait_for_all_ranks()
        if rank:
            return None
        runner = _runner(options, parts, sources, metrics, loading, rank)
        runner.run(parts)  # nothing is left to measure
    results = _results(options, command, restorers, sources, metrics, device)
    _add_rows(results, runner, parts, options.subsampling)
    if "quality" in options.protocol:
        results.quality, results.told = measure_quality(options, restorers, sources, device, runner.left_out)
    if "embeddings" in options.protocol:
        results.embeddings = map_embeddings(options, restorers, sources, device, runner.left_out)
    results.left_out += runner.left_out.items()
    results.missing += runner.not_measured()
    _write(options.output, results, parts, runner)
    print(f"\n{to_text(results)}\n\n{_where(options.output)}", flush=True)
    return results


def _runner(
    options: EvaluateOptions, parts: Sequence[Part], sources: Sequence[Source], metrics: Metrics, loading: Loading,
    rank: int,
) -> Runner:  # fmt: skip
    chooses = choosing_metric(metrics.single, options.worst_by) if parts else None
    store = Store(options.output, metrics, rank)
    examples = Examples(options.output, options.examples, chooses)
    return Runner(sources, options.subsampling, metrics, store, examples, loading)


def _add_rows(results: Results, runner: Runner, parts: Sequence[Part], subsampling: str) -> None:
    measured = [source for source in runner.sources if source.name not in runner.left_out]
    for part in parts:
        results.rows += runner.rows(part)
        results.lines += runner.lines(part)
        published = published_rows(part.protocol, measured, subsampling)
        results.published[part.protocol] = [to_plain(row) for row in published]


def _parts(options: EvaluateOptions, restorers: Sequence[RestorerOnDisk], loading: Loading) -> list[Part]:
    """The work of all protocols, checked before any of it begins. Files that only tell something of pictures are left
    to the protocols that ask for that."""
    asking = [protocol for protocol in ("quality", "embeddings") if protocol in options.protocol]
    for protocol in asking:
        seeing(protocol, restorers)
    able = [restorer for restorer in restorers if restorer.metadata.family not in NO_RESTORERS]
    restoring = able if asking and able else restorers
    parts = [
        Part(protocol, systems_of(protocol, restoring, options.settings), conditions_of(protocol, options))
        for protocol in dict.fromkeys(options.protocol) if protocol in PICTURE_PROTOCOLS
    ]  # fmt: skip
    for part in parts:
        for system in part.systems:
            check_system(system, loading)
    return parts


def _metrics(options: EvaluateOptions, device: torch.device) -> Metrics:
    """What can be measured; without clean pictures only what needs none."""
    also = [name for protocol in options.protocol for name in ALSO_MEASURED.get(protocol, ())]
    metrics = find_metrics(options.files, device, wanted=options.metrics or None, also=() if options.metrics else also)
    return metrics if options.data is not None else without_clean(metrics)


def _results(
    options: EvaluateOptions, command: str, restorers: Sequence[RestorerOnDisk], sources: Sequence[Source],
    metrics: Metrics, device: torch.device,
) -> Results:  # fmt: skip
    folder = options.degraded or options.data
    facts = {
        "date": datetime.date.today().isoformat(), "device": _device_name(device), "torch": torch.__version__,
        "data": folder.resolve().name if folder else "", "pictures": len(sources), "command": command,
        "subsampling": options.subsampling, "settings": dataclasses.asdict(options.settings),
    }  # fmt: skip
    described = [
        {"label": restorer.label, "file": restorer.path.name, "family": restorer.metadata.family,
         "license": restorer.metadata.license, "sha256": restorer.digest, "training": restorer.metadata.training}
        for restorer in restorers
    ]  # fmt: skip
    named = [MetricFacts(metric.name, metric.label, metric.variant, metric.better, metric.digits)
             for metric in (*metrics.single, *metrics.sets)]  # fmt: skip
    return Results(facts, described, named, list(metrics.missing))


def _write(folder: Path, results: Results, parts: Sequence[Part], runner: Runner) -> None:
    """All three files, each whole or not at all."""
    systems = {system.label: system for part in parts for system in part.systems}
    texts = (
        json.dumps(_finite(results.to_json()), indent=1, allow_nan=False),
        results.to_csv(),
        to_html(results, lambda row: runner.examples_of(systems[row.system], row.condition)),
    )
    for name, text in zip(_WRITTEN, texts, strict=True):
        temporary = folder / f"{name}.part"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, folder / name)


def _finite(value: Any) -> Any:
    """JSON has no numbers beyond all bounds, and none that are none: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _where(folder: Path) -> str:
    names = ", ".join(_WRITTEN)
    return f"Wrote {names} to {folder}. Open {folder / 'report.html'} in a browser."


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {platform.machine()}, {torch.get_num_threads()} threads"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
