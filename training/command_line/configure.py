"""From the command line of a training to its configuration: a preset, a file over it, and options over both."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from training.command_line.checks import config_error, put_in
from training.command_line.files import given_in_file, in_order_of_lines
from training.command_line.options import Option, given_in_options, split_options
from training.commands import COMMANDS

DEFAULT_PRESET = "paper"


@dataclass
class _Own:
    """The options that are not the configuration's."""

    preset: str = DEFAULT_PRESET
    config: Path | None = None
    dry_run: bool = False


def parse(command: str, arguments: Sequence[str]) -> tuple[bool, Any]:
    """The configuration from `--preset`, then `--config`, then the other options, each over the one before.

    Returns:
        Whether this is a dry run, and the configuration.

    Raises:
        ConfigError: Something is wrong in the file or among the options; all of it is named.
        SystemExit: Help was asked for, and printed.
    """
    presets = COMMANDS[command].presets()
    problems: list[str] = []
    own, others = _own_options(split_options(arguments), presets, problems)
    default = presets[own.preset]
    given = given_in_file(own.config, default, problems) if own.config is not None else []
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in arguments):
        _help(command, put_in(default, given, []), presets, arguments)
    given += given_in_options(others, default, problems, given)
    config = put_in(default, given, problems)
    if problems:
        raise config_error(in_order_of_lines(own.config, problems))
    return own.dry_run, config


def _own_options(
    options: Sequence[Option], presets: dict[str, Any], problems: list[str]
) -> tuple[_Own, list[Option]]:  # fmt: skip
    own, others = _Own(), []
    for option in options:
        word = option.words[0] if len(option.words) == 1 else None
        if option.name == "--preset":
            if word is not None and word in presets:
                own.preset = word
            else:
                problems.append(f"--preset: {wrong_preset(' '.join(option.words), presets)}")
        elif option.name == "--config":
            if word:
                own.config = Path(os.path.expanduser(word))
            else:
                problems.append(f"--config: expected the path of one YAML file, got {' '.join(option.words)!r}")
        elif option.name in ("--dry-run", "--dry_run"):
            own.dry_run = True
            problems += [f"--dry-run: expected nothing after it, got {word!r}" for word in option.words]
        elif not option.name and word in presets:
            problems.append(f"{word}: expected options, which begin with --; did you mean --preset {word}?")
        else:
            others.append(option)
    return own, others


def wrong_preset(name: str, presets: Iterable[str]) -> str:
    """What is said of a preset that there is not."""
    near = difflib.get_close_matches(name.lower(), list(presets), n=1, cutoff=0.5)
    return f"expected one of {', '.join(presets)}, got {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _help(command: str, default: Any, presets: dict[str, Any], arguments: Sequence[str]) -> None:
    """Print the options with what they are without being given, or what a shell needs to complete them."""
    import tyro

    tyro.cli(
        _line_type(default, presets), prog=f"python -m training {command}",
        args=[word for word in arguments if word in ("-h", "--help") or word.startswith("--tyro-")]
        + [word for word in arguments if word in ("bash", "zsh", "tcsh", "fish")],
        description=f"{COMMANDS[command].summary}. Repeating a command goes on where it stopped.",
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip


def _line_type(default: Any, presets: dict[str, Any]) -> Any:
    """The type of what a command line says: the options that choose the defaults, and those of the configuration."""
    import tyro

    rows = "; ".join(f"{name}: {row.run.images:,} images to {row.run.output}" for name, row in presets.items())
    preset = tyro.conf.arg(metavar="{" + ",".join(presets) + "}", help=f"Chooses the defaults. {rows}.")
    config = tyro.conf.arg(
        metavar="FILE.yaml", help="Changes the defaults: of `python -m training presets show`, or a run's config.yaml."
    )
    dry_run = tyro.conf.arg(help="Print what would be done, and write nothing.")
    return dataclasses.make_dataclass(
        "Line",
        [
            ("preset", Annotated[str, preset], DEFAULT_PRESET),
            ("config", Annotated[Path | None, config], None),
            ("dry_run", Annotated[bool, tyro.conf.FlagCreatePairsOff, dry_run], False),
            ("settings", Annotated[type(default), tyro.conf.arg(name="")], dataclasses.field(default=default)),
        ],
        frozen=True,
    )
