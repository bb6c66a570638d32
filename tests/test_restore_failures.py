"""What `restore` does where something fails: places, processes, networks; what it says, and what it does not hide."""

from __future__ import annotations

import errno
import multiprocessing
import os
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from restoration.restorer_file import read_restorer, write_restorer
from tests.conftest import write_regression
from tests.one_step_networks import write_tiny_codiff
from tests.restore_folders import files, restore, save
from training.__main__ import main
from training.restore import families, saving, workers
from training.restore.plan import PlannedPicture
from training.restore.saving import OutputFormat, check_writable
from training.restore.settings import RestoreSettings
from training.restore.workers import Tally, Work


@pytest.fixture(scope="module")
def regression(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_regression(tmp_path_factory.mktemp("restorers") / "regression.safetensors")


def fails(error: BaseException):
    """A function that does."""

    def failing(*_, **__):
        raise error

    return failing


def refused(source: Path, output: Path, restorer: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of the program itself; that a network is loaded fails the test."""
    arguments = [str(source), str(output), "--restorer", str(restorer), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(workers, "load_restorer", fails(AssertionError("a network was loaded")))
        patch.setattr(sys, "argv", ["training", "restore", *arguments])
        return main()


def test_a_place_that_cannot_be_written_to_is_refused_before_a_network_is_loaded(
    regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Below a file, where a file is, and where files cannot be made though the folder is there."""
    source = save(tmp_path / "in" / "a.jpg")
    (tmp_path / "file").write_text("kept")
    sentence = "training restore: expected a folder that can be written to, got {} ({}). Give another OUT"
    for given, output in ((source.parent, tmp_path / "file" / "out"), (source, tmp_path / "file")):
        assert refused(given, output, regression, monkeypatch) == 2
        said = capsys.readouterr().err
        assert said.startswith(sentence.format(output, "Not a directory" if given != source else "File exists"))
        assert said.count("\n") == 1
    with monkeypatch.context() as patch:
        patch.setattr(saving.tempfile, "TemporaryFile", fails(PermissionError(errno.EACCES, "Permission denied")))
        assert refused(source.parent, tmp_path / "out", regression, monkeypatch) == 2
    assert sentence.format(tmp_path / "out", "Permission denied") in capsys.readouterr().err
    assert files(tmp_path) == ["file", "in/a.jpg"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(regression: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    save(tmp_path / "in" / "a.jpg")
    (tmp_path / "out").mkdir(mode=0o555)
    assert refused(tmp_path / "in", tmp_path / "out", regression, monkeypatch) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_trying_a_place_leaves_nothing_but_the_folder_and_is_not_needed_where_nothing_is_missing(
    regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    check_writable(tmp_path / "deep" / "er")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"] and files(tmp_path) == []
    save(tmp_path / "in" / "a.jpg")
    save(tmp_path / "out" / "a.png")
    monkeypatch.setattr(saving.tempfile, "TemporaryFile", fails(PermissionError(errno.EACCES, "Permission denied")))
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 0
    assert "0 restored, 1 there already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS])
def test_a_place_that_can_no_longer_be_written_to_ends_the_run(
    number: int, regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Each further picture would be restored in vain."""
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "in" / name)
    monkeypatch.setattr(workers, "write_whole", fails(OSError(number, "as the system says it")))
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 1
    said = capsys.readouterr()
    assert "out cannot be written to (as the system says it): see to its permissions" in said.err
    assert "make room" not in said.err and "b.jpg" not in said.out


def test_a_file_in_place_of_a_folder_of_results_ends_the_run(regression: Path, tmp_path: Path, capsys) -> None:
    """The system's own words, of a real writing."""
    for name in ("sub/a.jpg", "sub/b.jpg"):
        save(tmp_path / "in" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").write_text("kept")
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 1
    said = capsys.readouterr()
    assert "sub cannot be written to (File exists)" in said.err and "b.jpg" not in said.out


@pytest.mark.parametrize(
    "error", [TypeError("a mistake"), AttributeError("a mistake"), KeyError("a mistake"), ZeroDivisionError()]
)
def test_mistakes_of_the_program_are_not_taken_for_broken_pictures(
    error: Exception, regression: Path, tmp_path: Path, monkeypatch
) -> None:
    """They come with their traceback, so that they can be reported."""
    save(tmp_path / "in" / "a.jpg")
    monkeypatch.setattr(families, "restore_regression", fails(error))
    with pytest.raises(type(error)):
        restore(tmp_path / "in", tmp_path / "out", regression)


@pytest.mark.parametrize("error", [TypeError("of Pillow"), LookupError("of Pillow"), struct.error("of Pillow")])
def test_what_reading_raises_names_the_picture(
    error: Exception, regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Pillow raises nearly anything on damaged metadata."""
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "in" / name)
    read = workers.read_source
    monkeypatch.setattr(
        workers, "read_source", lambda path, **how: fails(error)() if path.stem == "a" else read(path, **how)
    )
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 1
    assert "a.jpg was not restored: " in capsys.readouterr().err and files(tmp_path / "out") == ["b.png"]


@pytest.mark.parametrize("error", [ValueError("too odd"), RuntimeError("out of memory"), MemoryError("out of memory")])
def test_what_a_picture_may_be_to_blame_for_names_it(
    error: Exception, regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    save(tmp_path / "in" / "a.jpg")
    monkeypatch.setattr(families, "restore_regression", fails(error))
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 1
    assert f"a.jpg was not restored: {error}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "options", "advice"),
    [
        ("regression", [], "in single precision, returned something that is no number: get the --restorer again"),
        ("regression", ["--dtype", "bf16"], "in half precision, returned something that is no number: give --dtype fp"),
        ("codiff", [], "in single precision, returned something that is no number: get the --restorer again"),
    ],
)
def test_a_result_that_is_no_number_comes_with_advice_for_the_command_line(
    family: str, options: list[str], advice: str, tmp_path: Path, capsys
) -> None:
    """Not with that for the nodes; no weight of the network is a number."""
    path = tmp_path / "restorer.safetensors"
    {"regression": write_regression, "codiff": write_tiny_codiff}[family](path)
    file = read_restorer(path)
    part = "regression." if family == "regression" else "unet."
    broken = {key: value * torch.nan if key.startswith(part) else value for key, value in file.tensors.items()}
    write_restorer(path, file.metadata, broken)
    save(tmp_path / "in" / "a.jpg")
    assert restore(tmp_path / "in", tmp_path / "out", path, *options) == 1
    said = capsys.readouterr().err
    assert advice in said and "Load the restorer" not in said


def work(**changes) -> Work:
    as_usual = Work(Path("restorer"), None, RestoreSettings(), None, OutputFormat(), "cpu", False, True, 4)
    return replace(as_usual, **changes)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("within_a_message", [False, True])
def test_the_pictures_of_a_killed_process_are_named_but_for_those_with_a_result(
    within_a_message: bool, overwrite: bool, tmp_path: Path
) -> None:
    """It told of the first; the second, written just before, or by an earlier run, is there already."""
    pictures = [PlannedPicture(n, f"{n}.jpg", tmp_path / f"{n}.jpg", tmp_path / f"{n}.png") for n in range(1, 5)]
    for picture in pictures[:2]:
        picture.target.write_bytes(b"whole")
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = SimpleNamespace(join=lambda: None, exitcode=-9)
    running = {ours: workers._Job(process, list(pictures))}  # type: ignore[arg-type]
    theirs.send(Tally(done=1))
    if within_a_message:
        os.write(theirs.fileno(), struct.pack("!i", 100) + b"cut short")
    theirs.close()
    told = [workers._received(work(overwrite=overwrite), ours, running) for _ in range(2)]
    tally = sum(told, Tally())
    assert not running and tally.done == 1 and tally.skipped == (0 if overwrite else 1)
    assert [name for name, _ in tally.failed] == (["2.jpg"] if overwrite else []) + ["3.jpg", "4.jpg"]
    assert all("ended with status -9: repeat the command" in reason for _, reason in tally.failed)


def test_a_process_that_came_to_its_end_has_nothing_left(tmp_path: Path) -> None:
    picture = PlannedPicture(1, "1.jpg", tmp_path / "1.jpg", tmp_path / "1.png")
    ours, theirs = multiprocessing.Pipe(duplex=False)
    running = {ours: workers._Job(SimpleNamespace(join=lambda: None, exitcode=0), [picture])}  # type: ignore[arg-type]
    theirs.send(Tally(failed=[("1.jpg", "it is damaged")]))
    theirs.close()
    assert workers._received(work(), ours, running) == Tally(failed=[("1.jpg", "it is damaged")])
    assert workers._received(work(), ours, running) == Tally() and not running
