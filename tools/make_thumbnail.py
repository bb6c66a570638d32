"""Make example_workflows/driftrec_restore.jpg anew, the picture that ComfyUI shows under Templates.

`.venv/bin/python tools/make_thumbnail.py`, to be repeated when the starter weights have changed.
"""

# ruff: noqa: E402 - run as a file, it has to find the repository first
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image

from tools import demo
from tools.comfyui_server import ComfyUIServer
from tools.pictures import split_thumbnail

FACE = (150, 10, 350, 210)


def main() -> None:
    """Restore the demo's sample in ComfyUI and save a part of it, half as it was and half restored."""
    demo.DEMO.mkdir(exist_ok=True)
    path, _ = demo.make_sample()
    with ComfyUIServer() as server, Image.open(demo.restore(server, path)) as restored, Image.open(path) as before:
        thumbnail = split_thumbnail(before.crop(FACE), restored.crop(FACE))
    target = demo.WORKFLOW.with_suffix(".jpg")
    thumbnail.save(target, "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    print(f"Wrote {target.relative_to(ROOT)}, {target.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
