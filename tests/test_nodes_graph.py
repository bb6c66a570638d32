"""The nodes in graphs, through ComfyUI's own executor."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfyui


def test_boot(fresh):
    print(fresh.pack)
