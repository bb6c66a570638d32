"""`python -m training prepare`: what a training needs of its pictures, made once before it."""

from __future__ import annotations

import difflib
import importlib

_KINDS = {
    "captions": ("captions of crops, for the first stage of SODiff", "training.prepare.captions"),
    "shards": ("a folder packed into tar files, which large sets are read faster from", "training.prepare.shards"),
    "index": ("what lies where in tar files of others, so that no run has to look", "training.prepare.indexes"),
}


def run(arguments: list[str]) -> int:
    """Prepare one thing, e.g. `captions --train FOLDER`.

    Returns:
        The exit status.

    Raises:
        ValueError: It cannot be done as asked; one sentence says why.
        FileNotFoundError: There are no pictures.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m training prepare KIND [options]\n")
        print("\n".join(f"  {name:<12}{summary}" for name, (summary, _) in _KINDS.items()))
        print("\nEach goes on where it stopped. python -m training prepare KIND --help lists its options.")
        return 0
    kind = arguments[0]
    if kind not in _KINDS:
        near = difflib.get_close_matches(kind, _KINDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected one of {', '.join(_KINDS)}, got {kind!r}.{hint}")
    importlib.import_module(_KINDS[kind][1]).run(arguments[1:])
    return 0
