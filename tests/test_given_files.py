"""Files that options name: what is no restorer is told with what to give in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from restoration.restorer_file import RestorerFileError
from tests.conftest import write_regression
from training.given_files import check_given, read_given


def refused(path: Path) -> str:
    with pytest.raises(RestorerFileError) as caught:
        read_given(path, "--cave")
    return str(caught.value)


def test_what_a_training_goes_on_from_is_told_with_its_restorer(tmp_path: Path) -> None:
    """Also before there is one; a checkpoint of others, beside any JSON, is told to be converted."""
    checkpoint, config = tmp_path / "checkpoint.pt", tmp_path / "config.json"
    checkpoint.write_bytes(b"PK\3\4")
    for content in (None, "{", "[1]", '{"model": "theirs"}', '{"command": null}'):
        if content is not None:
            config.write_text(content, encoding="utf-8")
        assert refused(checkpoint).startswith(f"--cave {checkpoint}: not a whole safetensors file")
    config.write_text(json.dumps({"command": "cave"}), encoding="utf-8")
    restorer = tmp_path / "cave.safetensors"
    told = f"--cave: {checkpoint} is what a training goes on from; give {restorer}"
    assert refused(checkpoint) == f"{told}, which is written when the training first measures, or stops."
    write_regression(restorer)
    assert refused(checkpoint) == f"{told}."


def test_a_folder_is_told_with_the_restorer_in_it(tmp_path: Path) -> None:
    """A training's own one before the best and the others."""
    assert refused(tmp_path) == f"--cave: {tmp_path} is a folder; give the path of a restorer file."
    for name in ("cave.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert refused(tmp_path).endswith(f"give the restorer file in it, e.g. {tmp_path / 'a.safetensors'}.")
    (tmp_path / "config.json").write_text(json.dumps({"command": "cave"}), encoding="utf-8")
    assert refused(tmp_path).endswith(f"give the restorer file in it, e.g. {tmp_path / 'cave.safetensors'}.")


def test_a_restorer_is_read_and_a_missing_one_named(tmp_path: Path) -> None:
    path = write_regression(tmp_path / "mine.safetensors")
    check_given(path, "--cave")
    assert read_given(path, "--cave").metadata.family == "regression"
    absent = tmp_path / "absent.safetensors"
    assert refused(absent) == f"--cave {absent}: there is no such file. Give the path of a restorer file."
