"""`python -m training`: train the networks that the nodes load."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from training.commands import COMMANDS

_SUMMARIES = {
    **{name: command.summary for name, command in COMMANDS.items()},
    "ablate": "train a method without each of its parts in turn, and compare",
    "convert": "turn the authors' checkpoints into restorer files",
    "prepare": "make once what a training needs beside its pictures: captions",
    "restore": "restore a folder of pictures with a restorer file",
}


def main() -> int:
    """Run one command; user errors end with one message and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] not in _SUMMARIES:
        known = "\n".join(f"  {name:<12}{text}" for name, text in _SUMMARIES.items())
        asked_for_help = len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help")
        print("usage: python -m training COMMAND [--preset NAME] [--config FILE.yaml] [--dry-run] [options]\n")
        print(known)
        print("\npython -m training COMMAND --help lists its options.")
        if not asked_for_help:
            print(f"\nexpected a command of the list, got {sys.argv[1]!r}.", file=sys.stderr)
        return 0 if asked_for_help else 2
    command, arguments = sys.argv[1], sys.argv[2:]
    try:
        return _run(command, arguments)
    except KeyboardInterrupt:
        print(f"training {command}: stopped; repeat the command to go on from the last checkpoint", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"training {command}: {error}. Install what the trainer needs: pip install -e '.[training]'",
            file=sys.stderr,
        )
        return 2


def _run(command: str, arguments: list[str]) -> int:
    from training.checkpoint import CheckpointError
    from training.loop import TrainingStoppedError
    from training.run_folder import RunFolderError

    try:
        if command in COMMANDS:
            _train(command, arguments)
        elif command == "ablate":
            from training.ablate import run as ablate

            ablate(arguments)
        elif command == "prepare":
            from training.prepare import run as prepare

            prepare(arguments)
        elif command == "restore":
            from training.restore.command import run as restore

            return restore(arguments)
        else:
            from training.convert import run as convert

            convert(arguments)
    except (ValueError, FileNotFoundError, CheckpointError, TrainingStoppedError, RunFolderError) as error:
        print(f"training {command}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(command: str, arguments: list[str]) -> None:
    dry_run, config = parse(command, arguments)
    from training.session import Session

    session = Session(command, config)
    session.describe()
    if dry_run:
        print("dry run: nothing was written")
    else:
        session.train()


def parse(command: str, arguments: list[str]) -> tuple[bool, Any]:
    """The configuration from `--preset`, then `--config`, then the other options, each over the one before.

    Returns:
        Whether this is a dry run, and the configuration.
    """
    import tyro

    from training.config_files import read_config

    presets = COMMANDS[command].presets()
    first = argparse.ArgumentParser(prog=f"python -m training {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(presets), default="paper")
    first.add_argument("--config", type=Path)
    known, _ = first.parse_known_args(arguments)
    default = presets[known.preset]
    if known.config is not None:
        default = read_config(known.config, default)
    line = tyro.cli(
        _line_type(default, presets), prog=f"python -m training {command}", args=arguments,
        description=f"{COMMANDS[command].summary}. Repeating a command goes on where it stopped.",
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    return line.dry_run, line.settings


def _line_type(default: Any, presets: dict[str, Any]) -> Any:
    """The type of what a command line says: the options that choose the defaults, and those of the configuration."""
    import tyro

    rows = "; ".join(f"{name}: {row.run.images:,} images to {row.run.output}" for name, row in presets.items())
    preset = tyro.conf.arg(metavar="{" + ",".join(presets) + "}", help=f"Chooses the defaults. {rows}.")
    config = tyro.conf.arg(metavar="FILE.yaml", help="Changes the defaults, e.g. a run's config.yaml.")
    dry_run = tyro.conf.arg(help="Print what would be done, and write nothing.")
    return dataclasses.make_dataclass(
        "Line",
        [
            ("preset", Annotated[str, preset], "paper"),
            ("config", Annotated[Path | None, config], None),
            ("dry_run", Annotated[bool, tyro.conf.FlagCreatePairsOff, dry_run], False),
            ("settings", Annotated[type(default), tyro.conf.arg(name="")], dataclasses.field(default=default)),
        ],
        frozen=True,
    )


if __name__ == "__main__":
    sys.exit(main())
