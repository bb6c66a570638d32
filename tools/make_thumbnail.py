"""Make the pictures that ComfyUI shows under Templates anew, of the workflows that run from the pack alone.

`.venv/bin/python tools/make_thumbnail.py [NAME ...]`, to be repeated when the starter weights have changed.
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

WORKFLOWS = ("restore_jpeg", "driftrec_restore", "ddrm_jpeg", "consistency", "codiff_starter", "sodiff_starter")
FACE = (144, 0, 352, 208)


def main() -> None:
    """Restore a part of the sample in ComfyUI with each workflow; save it, half as it was and half restored."""
    demo.DEMO.mkdir(exist_ok=True)
    path = demo.DEMO / "thumbnail.jpg"
    face = demo.sample_picture().crop(FACE)
    face.save(path, "JPEG", quality=demo.SAMPLE_QUALITY, subsampling="4:2:0")
    with ComfyUIServer() as server:
        for name in sys.argv[1:] or WORKFLOWS:
            workflow = ROOT / "example_workflows" / f"{name}.json"
            with Image.open(demo.restore(server, path, workflow)) as restored, Image.open(path) as before:
                thumbnail = split_thumbnail(before, restored)
            save(thumbnail, workflow.with_suffix(".jpg"))
            if name == "restore_jpeg":
                save(several(thumbnail), workflow.with_name("restore_folder.jpg"))


def several(thumbnail: Image.Image) -> Image.Image:
    """A folder of them: three by three."""
    small = thumbnail.resize((thumbnail.width // 3 - 8, thumbnail.height // 3 - 8), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", thumbnail.size, (24, 24, 24))
    for row in range(3):
        for column in range(3):
            sheet.paste(small, (column * thumbnail.width // 3 + 4, row * thumbnail.height // 3 + 4))
    return sheet


def save(picture: Image.Image, target: Path) -> None:
    """Write a small JPEG, and say so."""
    picture.save(target, "JPEG", quality=90, subsampling="4:4:4", optimize=True)
    print(f"Wrote {target.relative_to(ROOT)}, {target.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
