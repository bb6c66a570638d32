"""`restore` on odd and broken JPEGs of other decoders: each is restored or named, and the run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import write_regression
from tests.restore_folders import files, restore
from tests.shared import shared_path

MEGAPIXELS = 0.06


def link(folder: Path, *, large: bool) -> int:
    """A folder of links to the pictures of one size, and to the files that are none; returns how many pictures."""
    folder.mkdir()
    count = 0
    for path in sorted(shared_path("data", "torture").iterdir()):
        if path.suffix in (".md", ".tsv"):
            (folder / path.name).symlink_to(path)
        elif _is_large(path) == large:
            (folder / path.name).symlink_to(path)
            count += 1
    return count


def _is_large(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return MEGAPIXELS * 1e6 < picture.width * picture.height < 1e8
    except (OSError, Image.DecompressionBombError):
        return False


@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_file_is_restored_or_named(large: bool, tmp_path: Path, capsys) -> None:
    """Whatever its metadata; what is restored can be opened, and is upright."""
    count = link(tmp_path / "in", large=large)
    restorer = write_regression(tmp_path / "regression.safetensors")
    status = restore(tmp_path / "in", tmp_path / "out", restorer, "--no-consistency", "--tile", "128")
    said = capsys.readouterr()
    named = {line.split(" was not restored: ")[0] for line in said.err.splitlines() if " was not restored: " in line}
    results = files(tmp_path / "out")
    assert status == (1 if named else 0) and len(named) + len(results) == count >= (20 if large else 50)
    assert f"{len(results)} restored, 0 there already, {len(named)} failed, 2 other files left out" in said.out
    for name in results:
        assert name.endswith(".png")
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()
            assert picture.getexif().get(0x0112, 1) == 1
