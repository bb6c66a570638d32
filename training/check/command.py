"""`python -m training check`: look at a configuration, its data, its files, memory and disk before anything starts."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from training.check.findings import Finding
from training.commands import COMMANDS

_DESCRIPTION = """Check what a training would start with, and write a sheet of training pairs to look at. Every finding
is a line that says what to do. The options of COMMAND are those that it will be started with.

Examples:
  python -m training check regression --preset starter --data.train my_pictures
  python -m training check --data my_pictures

Exit status: 0 without problems, 1 with problems (with --strict: or warnings), 2 when it cannot be done as asked."""


def run(arguments: list[str]) -> int:
    """Check, and print what was found.

    Returns:
        The exit status: 0 without problems, 1 with problems.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    command = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if options.help:
        parser.print_help()
        return 0
    _check_asked(command, options, rest)
    findings: list[Finding] = []

    def tell(several: Iterable[Finding]) -> None:
        for finding in several:
            findings.append(finding)
            print(finding.line(), flush=True)

    if command is None:
        _check_data(_alone(Path(os.path.expanduser(options.data))), options, tell)
    else:
        _check_training(command, rest, options, tell)
    return _conclude(findings, options)


def _check_asked(command: str | None, options: argparse.Namespace, rest: list[str]) -> None:
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"It is one of {', '.join(COMMANDS)}."
        raise ValueError(f"expected a command that trains, got {command!r}. {hint}")
    if (command is None) == (options.data is None):
        raise ValueError(
            "expected a command that trains, with its options, or --data FOLDER alone, e.g. "
            "python -m training check regression --preset starter --data.train my_pictures."
        )
    if command is None and rest:
        raise ValueError(f"{rest[0]}: expected no options of a training without its command. Put the command before.")
    for name, least in (("jobs", 1), ("pairs", 0), ("limit", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(options, name)}.")


def _alone(data: Path) -> Any:
    """The configuration of a training on pictures of which nothing else is known."""
    from training.configs.driftrec import REGRESSION_PRESETS

    config = REGRESSION_PRESETS["starter"]
    return replace(config, data=replace(config.data, train=data, crop=256, cache_mb=0))


def _check_training(
    command: str, arguments: list[str], options: argparse.Namespace, tell: Callable[[Iterable[Finding]], None]
) -> None:  # fmt: skip
    from training.command_line.checks import ConfigError
    from training.command_line.configure import parse

    try:
        _, config = parse(command, arguments)
    except ConfigError as error:
        lines = str(error).splitlines()
        tell(Finding("problem", line.strip()) for line in (lines[1:] or lines))
        return
    from training.check.cost import check_writable
    from training.check.sizes import check_batch, check_place
    from training.check.weights import check_weights
    from training.loop.same_run import RunFolderError, check_same_run

    tell(check_weights(config))
    tell(check_writable(config.run.output))
    tell(check_place(config))
    try:
        check_same_run(config.run.output, command, config)
    except RunFolderError as error:
        tell([Finding("problem", str(error))])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    tell(check_batch(config, processes))
    _check_cost(command, config, processes, tell)
    _check_data(config, options, tell)


def _check_cost(command: str, config: Any, processes: int, tell: Callable[[Iterable[Finding]], None]) -> None:
    """Crops, memory and disk: of the network, or of what adapts a base, without loading that."""
    from training.check.cost import check_disk, check_free_disk, measure
    from training.check.memory import check_kept_pictures, check_known_memory, check_memory
    from training.check.sizes import ADAPTED_MULTIPLES, check_sides
    from training.check.weights import adapts_base

    if adapts_base(config):
        tell([*check_sides(ADAPTED_MULTIPLES[command], config), *check_known_memory(command, config)])
        tell([*check_kept_pictures(config, processes), *check_free_disk(config.run)])
        return
    try:
        task = COMMANDS[command].make_task(config)
    except (ValueError, FileNotFoundError) as error:
        tell([Finding("problem", str(error))])
        return
    if wrong := check_sides(task.size_multiple, config):
        tell(wrong)
        return
    cost = measure(task, config, processes)
    tell([*check_memory(cost.memory, command, config), *check_kept_pictures(config, processes)])
    tell(check_disk(cost, config.run))


def _check_data(
    config: Any, options: argparse.Namespace, tell: Callable[[Iterable[Finding]], None]
) -> None:  # fmt: skip
    from training.check.pictures import Expectation, judge, judge_overlap, look_at_all
    from training.data.pictures import find_images
    from training.loop.validation import split_pictures

    data = config.data
    sources = {"data.train": data.train, **({"data.validation": data.validation} if data.validation else {})}
    facts = {}
    for name, source in sources.items():
        try:
            paths = find_images(source, "--data" if options.data else f"--{name}")
        except (ValueError, FileNotFoundError) as error:
            tell([Finding("problem", f"{name}: {error}")])
            continue
        facts[name] = look_at_all(paths[: options.limit or None], options.jobs)
        side = data.crop + data.degradation.window if name == "data.train" else config.validation.crop
        tell(judge(name, facts[name], Expectation(side, options.quality)))
    train = [fact for fact in facts.get("data.train", []) if fact.reason is None]
    if "data.validation" in facts:
        tell(judge_overlap(train, facts["data.validation"], split=False))
    elif data.validation is None and train:
        kept, held_out = (set(part) for part in split_pictures([fact.path for fact in train], config.validation.images))
        if not kept & held_out:
            ours, theirs = ([fact for fact in train if fact.path in part] for part in (kept, held_out))
            tell(judge_overlap(ours, theirs, split=True))
    if train and options.pairs:
        _write_sheet(config, [fact.path for fact in train], options)


def _write_sheet(config: Any, paths: list[Path], options: argparse.Namespace) -> None:
    from training.check.sheet import write_sheet
    from training.data.views import pairs_of

    dataset = pairs_of(config, paths)
    print(f"look at {write_sheet(dataset, options.pairs, options.output)}: clean on the left, degraded on the right")


def _conclude(findings: list[Finding], options: argparse.Namespace) -> int:
    from training.files import replace_text

    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    options.output.mkdir(parents=True, exist_ok=True)
    report = options.output / "findings.json"
    replace_text(report, json.dumps([asdict(finding) for finding in findings], indent=1))
    named = ", with the names of all pictures" if any(finding.pictures for finding in findings) else ""
    print(f"{counts['problem']} problem(s), {counts['warning']} warning(s); they are in {report}{named}")
    return 1 if counts["problem"] or (options.strict and counts["warning"]) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training check", usage="%(prog)s [COMMAND] [options] [options of COMMAND]",
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        add_help=False,
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this message")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="check pictures alone: a folder, or shards")
    parser.add_argument("--output", type=Path, default=Path("runs/check"), metavar="FOLDER",
                        help="for the sheet and the findings (default: runs/check)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=12, help="on the sheet (default: 12; 0: no sheet)")
    parser.add_argument("--quality", type=float, default=75.0,
                        help="JPEGs below are no ground truth (default: 75)")  # fmt: skip
    parser.add_argument("--limit", type=int, default=0, help="look at so many pictures at most (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--strict", action="store_true", help="warnings count as problems")
    return parser
