"""Work in processes: results in order, errors as they are, and a killed process is told."""

from __future__ import annotations

import os
import signal
import time

import pytest

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
