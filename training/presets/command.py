"""`python -m training presets`: the list, one preset as a commented file, a command's schema."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import sys
from typing import Any

from training.command_line.configure import DEFAULT_PRESET, wrong_preset
from training.commands import COMMANDS

_DESCRIPTION = """Without arguments: all presets of all commands, with images, batch, memory and time.

  show COMMAND [PRESET] > my.yaml      one preset (paper, if none is named) as a file to edit, every field explained
  schema COMMAND > COMMAND.schema.json what may be in such a file, for editors that complete and check YAML"""


def run(arguments: list[str]) -> int:
    """Print what was asked for.

    Raises:
        ValueError: There is no such command or preset; the nearest names are given.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # files are UTF-8 wherever they are written
    if options.what is None:
        from training.presets.table import make_table

        print(make_table())
    elif options.what == "show":
        print(_shown(options.names), end="")
    elif options.what == "schema":
        print(_schema(options.names))
    else:
        raise ValueError(_unknown(options.what, options.names))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training presets", description=_DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", nargs="?", metavar="{show,schema}")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a command and, after show, a preset")
    return parser


def _unknown(what: str, names: list[str]) -> str:
    near = difflib.get_close_matches(what.lower(), ("show", "schema"), n=1, cutoff=0.5)
    meant = f"show {' '.join([what, *names])}" if what in COMMANDS else near[0] if near else None
    return f"expected show, schema or nothing, got {what!r}" + (f"; did you mean {meant}?" if meant else ".")


def _shown(names: list[str]) -> str:
    from training.presets.commented import to_commented_yaml

    command, preset = _found(names)
    return to_commented_yaml(command, preset, COMMANDS[command].presets()[preset])


def _schema(names: list[str]) -> str:
    from training.presets.schema import make_schema

    if len(names) != 1:
        raise ValueError(f"expected one command after schema, got {' '.join(names) or 'none'}. {_commands()}")
    command = _command(names[0])
    return json.dumps(make_schema(command, COMMANDS[command].presets()[DEFAULT_PRESET]), indent=1, ensure_ascii=False)


def _found(names: list[str]) -> tuple[str, str]:
    """Command and preset; a preset's name alone will do where only one command has it."""
    if len(names) == 1 and names[0] not in COMMANDS:
        having = [command for command, row in COMMANDS.items() if names[0] in row.presets()]
        if len(having) == 1:
            return having[0], names[0]
        if having:
            named = ", ".join(f"show {command} {names[0]}" for command in having)
            raise ValueError(f"the preset {names[0]} is one of {len(having)} commands: {named}.")
    if not 1 <= len(names) <= 2:
        raise ValueError(f"expected a command and a preset after show, got {' '.join(names) or 'none'}. {_commands()}")
    command = _command(names[0])
    presets: dict[str, Any] = COMMANDS[command].presets()
    preset = names[1] if len(names) == 2 else DEFAULT_PRESET
    if preset not in presets:
        raise ValueError(f"{command}: {wrong_preset(preset, presets)}")
    return command, preset


def _command(name: str) -> str:
    if name in COMMANDS:
        return name
    near = difflib.get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
    raise ValueError(f"expected a command, got {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} {_commands()}")


def _commands() -> str:
    return f"Commands with presets: {', '.join(COMMANDS)}."
