"""`python -m training`: train the networks that the nodes load."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from training.commands import COMMANDS
from training.failures import explain


class _Other(NamedTuple):
    """A command that trains nothing itself.

    Args:
        summary: What people read in the list.
        module: Where its `run` is, which takes the arguments and returns the exit status or None.
    """

    summary: str
    module: str


_OTHERS = {
    "prepare": _Other("make once what a training needs: captions, shards", "training.prepare.command"),
    "check": _Other("look at data, configuration, memory and disk before a training", "training.check.command"),
    "convert": _Other("turn the authors' checkpoints into restorer files", "training.convert"),
    "evaluate": _Other("measure restorer files on pictures, with a report", "training.evaluate.command"),
    "restore": _Other("restore a folder of pictures with a restorer file", "training.restore.command"),
    "presets": _Other("list the presets, write one as a file to edit", "training.presets.command"),
    "ablate": _Other("train a method without each of its parts in turn, and compare", "training.ablate"),
}
_SECTIONS = {
    "before a training": ("prepare", "check"),
    "train": tuple(COMMANDS),
    "afterwards": ("convert", "evaluate", "restore"),
    "besides": ("presets", "ablate"),
}


def main() -> int:
    """Run one command; what goes wrong ends with one message and an exit status above 0."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a file on Windows, signs that its encoding lacks are "?"
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, *rest = arguments
    if command not in COMMANDS and command not in _OTHERS:
        print(_unknown(command), file=sys.stderr)
        return 2
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        goes_on = (
            "; repeat the command: it goes on from its last checkpoint, if there is one" if command in COMMANDS else ""
        )
        print(f"training {command}: stopped{goes_on}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `python -m training presets | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        ending = explain(error, command, trains=command in COMMANDS or command == "ablate")
        if ending is None:
            raise
        print(f"training {command}: {ending.sentence}", file=sys.stderr)
        return ending.status


def _overview() -> str:
    summaries = {name: row.summary for name, row in (COMMANDS | _OTHERS).items()}
    lines = ["usage: python -m training COMMAND [--preset NAME] [--config FILE.yaml] [--dry-run] [options]"]
    for section, names in _SECTIONS.items():
        lines += ["", f"{section}:", *(f"  {name:<12}{summaries[name]}" for name in names)]
    return "\n".join([*lines, "", "python -m training COMMAND --help lists its options."])


def _unknown(command: str) -> str:
    known = [name for names in _SECTIONS.values() for name in names]
    near = difflib.get_close_matches(command.lower(), known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(known)}."
    return (
        f"training: expected a command of the list, got {command!r}. {hint} `python -m training` says what each does."
    )


def _run(command: str, arguments: list[str]) -> int:
    if command in COMMANDS:
        _train(command, arguments)
        return 0
    run: Callable[[list[str]], int | None] = importlib.import_module(_OTHERS[command].module).run
    return run(arguments) or 0


def _train(command: str, arguments: list[str]) -> None:
    from training.command_line.configure import parse

    dry_run, config = parse(command, arguments)
    from restoration.devices import accelerator_available
    from training.loop.allocator import keep_freed_memory
    from training.loop.session import Session

    if not accelerator_available():
        keep_freed_memory()
    session = Session(command, config)
    session.describe(whole=dry_run)
    if dry_run:
        print("dry run: nothing was written")
    else:
        session.train()


if __name__ == "__main__":
    sys.exit(main())
