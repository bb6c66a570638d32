"""`python -m training`: train the networks that the nodes load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_COMMANDS = {
    "driftrec": "train a DriftRec score network",
    "regression": "train its baseline: the same network, one evaluation",
    "convert": "turn the authors' checkpoints into restorer files",
}


def main() -> int:
    """Run one command; user errors end with one message and exit status 2."""
    if len(sys.argv) < 2 or sys.argv[1] not in _COMMANDS:
        known = "\n".join(f"  {name:<12}{text}" for name, text in _COMMANDS.items())
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
        if command == "convert":
            from training.convert import run as convert

            convert(arguments)
        else:
            _train(command, arguments)
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
    from training.configs import PRESETS

    presets = PRESETS[command]
    first = argparse.ArgumentParser(prog=f"python -m training {command}", add_help=False)
    first.add_argument("--preset", choices=list(presets), default="paper")
    first.add_argument("--config", type=Path)
    first.add_argument("--dry-run", action="store_true")
    known, rest = first.parse_known_args(arguments)
    default = presets[known.preset]
    if known.config is not None:
        default = read_config(known.config, default)
    rows = "; ".join(f"{name}: {row.run.images:,} images to {row.run.output}" for name, row in presets.items())
    description = (
        f"{_COMMANDS[command]}. --preset {{{','.join(presets)}}} chooses the defaults ({rows}), --config FILE.yaml "
        "changes them, --dry-run prints what would be done. Repeating a command goes on where it stopped."
    )
    config = tyro.cli(
        type(default), prog=f"python -m training {command}", description=description, default=default, args=rest,
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    return known.dry_run, config


if __name__ == "__main__":
    sys.exit(main())
