"""What dataclasses say of their fields, read from their source: the text below a field, or `Args:` of the class."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap

_ARGUMENT = re.compile(r"^    (\w+): (.*)$")


@functools.cache
def describe_class(kind: type) -> str:
    """The first paragraph of a class's documentation, on one line."""
    return _one_line((inspect.getdoc(kind) or "").split("\n\n")[0])


@functools.cache
def describe_fields(kind: type) -> dict[str, str]:
    """Field -> what it is, on one line. Fields that nothing is said of are left out."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    body = found.body if isinstance(found, ast.ClassDef) else []
    below = {
        field.target.id: _one_line(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip
    return {**_arguments(inspect.getdoc(kind) or ""), **below}


def _arguments(documentation: str) -> dict[str, str]:
    """The entries of the section `Args:`, whose further lines are indented more."""
    _, _, section = documentation.partition("\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if match := _ARGUMENT.match(line):
            name = match[1]
            found[name] = match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return {name: _one_line(text) for name, text in found.items()}


def _one_line(text: str) -> str:
    return " ".join(text.split())
