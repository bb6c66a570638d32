"""What a step frees is kept for the next one, where the allocator is glibc's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from shared import ROOT

COUNT_FAULTS = """
import resource, sys, torch
from training.loop.allocator import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(3):
    torch.zeros(2**23).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**23).add_(1)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument: str, **environment: str) -> tuple[bool, int]:
    """Pages that the system clears while ten tensors of 32 MB come and go."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, argument], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    was, count = done.stdout.split()
    return was == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_pages_are_not_given_back_and_taken_again() -> None:
    done, kept = faults("keep")
    if not done:
        pytest.skip("another allocator")
    _, usual = faults("leave")
    assert usual > 10_000  # 10 x 32 MB in pages of 4 kB are 80,000
    assert kept < usual / 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_settings_of_ones_own_are_left_alone() -> None:
    assert faults("keep", MALLOC_TOP_PAD_="65536")[0] is False
