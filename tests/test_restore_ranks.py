"""Several processes restore one folder: by `--jobs`, under torchrun, killed in the middle, and taken up again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import write_regression
from tests.restore_folders import cut, files, restore, save
from tests.shared import ROOT
from training.restore.workers import rank_of

PICTURES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in` with pictures, two of them in a sub-folder, a tiny restorer, and in `single` what one process makes."""
    base = tmp_path_factory.mktemp("restore")
    write_regression(base / "regression.safetensors")
    for number in range(PICTURES):
        sub = "sub/" if number in (5, 6) else ""
        save(base / "in" / f"{sub}{number:02d}.jpg", cut(56 + number, 48, left=100 + number))
    assert restore(base / "in", base / "single", base / "regression.safetensors") == 0
    return base


def command(folder: Path, output: Path, *options: str, ranks: int = 0) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    arguments = [str(folder / "in"), str(output), "--restorer", str(folder / "regression.safetensors")]
    return [sys.executable, *torchrun, "-m", "training", "restore", *arguments, "--device", "cpu", *options]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def assert_as_single(folder: Path, output: Path) -> None:
    """The same files, bit by bit, and nothing else, no `.part` either."""
    assert files(output) == files(folder / "single") and len(files(output)) == PICTURES
    for name in files(output):
        assert (output / name).read_bytes() == (folder / "single" / name).read_bytes(), name


def test_ranks_that_are_told_by_the_environment_do_their_share_without_talking(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """As on machines without torchrun: one after the other, the second first."""
    for rank, expected in ((1, 13), (0, 27), (2, PICTURES)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert restore(folder / "in", tmp_path / "out", folder / "regression.safetensors") == 0
        assert len(files(tmp_path / "out")) == expected
    assert_as_single(folder, tmp_path / "out")
    assert "14 restored, 0 there already" in capsys.readouterr().out


@pytest.mark.slow
def test_jobs_make_the_pictures_of_one_process(folder: Path, tmp_path: Path) -> None:
    broken = folder / "in" / "30 broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    try:
        done = subprocess.run(
            command(folder, tmp_path / "out", "--jobs", "2"), cwd=ROOT, env=environment(), capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
    finally:
        broken.unlink()
    assert done.returncode == 1, done.stderr[-3000:]
    assert f"{PICTURES} restored, 0 there already, 1 failed" in done.stdout and "30 broken.jpg was not" in done.stderr
    assert_as_single(folder, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finding a process of --jobs needs /proc")
def test_a_killed_job_is_reported_and_the_others_finish(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with subprocess.Popen(
        command(folder, output, "--jobs", "2"), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.kill(wait_for_worker(process.pid, output, "spawn_main"), signal.SIGKILL)
        said, errors = process.communicate(timeout=200)
    named = [line.split(": ")[1] for line in errors.splitlines() if "ended with status -9: repeat the command" in line]
    missing = {name.removesuffix(".png") for name in set(files(folder / "single")) - set(files(output))}
    assert process.returncode == 1 and 0 < len(missing) <= PICTURES / 2
    assert {name.removesuffix(".jpg was not restored") for name in named} == missing and len(named) == len(missing)
    assert f" {len(missing)} failed" in said
    assert restore(folder / "in", output, folder / "regression.safetensors") == 0
    assert_as_single(folder, output)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finding a rank of torchrun needs /proc")
def test_a_killed_rank_loses_nothing_and_any_number_of_ranks_finishes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with subprocess.Popen(
        command(folder, output, ranks=2), cwd=ROOT, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.kill(wait_for_worker(process.pid, output, "-m\0training"), signal.SIGKILL)
        process.communicate(timeout=200)
    assert process.returncode
    kept = {name: (output / name).stat().st_mtime_ns for name in files(output) if name.endswith(".png")}
    assert 0 < len(kept) < PICTURES
    done = subprocess.run(
        command(folder, output, ranks=2), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{PICTURES - len(kept)} restored, {len(kept)} there already, 0 failed" in done.stdout  # of both, said once
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept
    assert_as_single(folder, output)


def wait_for_worker(parent: int, output: Path, told_by: str) -> int:
    """A child that works, as soon as three pictures are done."""
    deadline = time.monotonic() + 120
    while len([name for name in files(output) if name.endswith(".png")]) < 3:
        assert time.monotonic() < deadline, "no picture was restored in two minutes"
        time.sleep(0.005)
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return next(int(child) for child in children if told_by in Path(f"/proc/{child}/cmdline").read_text())


@pytest.mark.parametrize(
    "told", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "-1"}]
)
def test_ranks_that_cannot_be_are_refused(told: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected RANK from 0 to WORLD_SIZE - 1"):
        rank_of(told)
