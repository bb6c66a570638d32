"""Run one benchmark by name, or list them: `python -m benchmarks [NAME [arguments]]`.

A benchmark is a module beside this one with a function `main(arguments: list[str]) -> None`; its entry in the list is
the first line of its docstring, read without importing it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path


def available() -> dict[str, str]:
    """Names of the benchmarks and the first line of each docstring."""
    modules = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: _first_line(path) for path in modules}


def main(arguments: list[str]) -> int:
    """Run `arguments[0]` with the rest, or print the list; the exit status."""
    benchmarks = available()
    if arguments and arguments[0] in benchmarks:
        importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
        return 0
    width = max(map(len, benchmarks), default=0)
    print("python -m benchmarks NAME, where NAME is one of:")
    for name, line in benchmarks.items():
        print(f"  {name:{width}}  {line}")
    asked_for_list = not arguments or arguments[0] in ("-h", "--help")
    if not asked_for_list:
        print(f"There is no benchmark {arguments[0]!r}: choose one of the list.", file=sys.stderr)
    return 0 if asked_for_list else 2


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
