"""Work in processes: results in order, errors as they are, and a killed process is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shared import ROOT

from training.parallel import LostProcessError, in_processes


def square(number: int) -> int:
    if number == 7:
        raise ValueError("seven is refused")
    return number * number


def fall(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return number


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_errors_end_it(jobs: int) -> None:
    assert list(in_processes(square, range(7), jobs)) == [0, 1, 4, 9, 16, 25, 36]
    results = in_processes(square, range(200), jobs, 2)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    with pytest.raises(ValueError, match="seven is refused"):
        list(results)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL")
def test_a_killed_process_is_told_with_what_to_do() -> None:
    with pytest.raises(LostProcessError, match="lower --jobs"):
        list(in_processes(fall, range(20), 2))


def linger(number: int) -> int:
    print(os.getpid(), flush=True)
    time.sleep(60)
    return number


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(end: int) -> None:
    """Also in the middle of a thing: what a scheduler ends must not keep its cores and memory."""
    script = (
        "from tests.test_parallel import linger\nfrom training.parallel import in_processes\n"
        "if __name__ == '__main__':\n    list(in_processes(linger, range(2), 2))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        assert all(map(is_running, workers))
        parent.send_signal(end)
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))
