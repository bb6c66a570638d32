"""Restore a JPEG in a real ComfyUI with the example workflow: `make demo [IMAGE=photo.jpg] [RESTORER=file]`.

Writes demo/restored.png and demo/before_after.png.
"""

# ruff: noqa: E402 - run as a file, it has to find the repository first
from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restoration.jpeg import JPEGData, JPEGError, apply_orientation, make_consistent, read_jpeg_and_pixels
from restoration.metrics import blockiness, psnr, ssim
from tools.comfyui_server import ComfyUIServer, ServerError, run_workflow
from tools.pictures import before_after

DEMO = ROOT / "demo"
WORKFLOW = ROOT / "example_workflows" / "restore_jpeg.json"
SAMPLE_QUALITY = 10
_WARM_UP = (192, 64, 256, 128)


def sample_picture() -> Image.Image:
    """The bundled sample: an astronaut, photographed by NASA, in the public domain; it comes with scikit-image."""
    from skimage import data

    return Image.fromarray(data.astronaut())


def make_sample() -> tuple[Path, Tensor]:
    """The sample as demo/sample.jpg, and its clean picture (1, 3, H, W)."""
    path = DEMO / "sample.jpg"
    clean = sample_picture()
    clean.save(path, "JPEG", quality=SAMPLE_QUALITY, subsampling="4:2:0")
    return path, to_tensor(clean)


def workflow_for(file_name: str, folder: Path, workflow: Path = WORKFLOW, restorer: str | None = None) -> Path:
    """A copy of an example workflow that loads another file, and another restorer where one is named."""
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    values = {"LoadJPEG": file_name} | ({} if restorer is None else {"LoadJPEGRestorer": restorer})
    for kind, value in values.items():
        (loader,) = [node for node in graph["nodes"] if node["type"] == kind]
        loader["widgets_values"][0] = value
    path = folder / workflow.name
    path.write_text(json.dumps(graph), encoding="utf-8")
    return path


def restore(server: ComfyUIServer, jpeg: Path, workflow: Path = WORKFLOW, restorer: str | None = None) -> Path:
    """Run an example workflow on a JPEG; returns the picture that SaveImage wrote.

    Raises:
        ServerError: It failed; the message is what the node said.
    """
    name = f"photo{jpeg.suffix.lower()}"
    shutil.copy(jpeg, server.input / name)
    run_workflow(server, workflow_for(name, server.base, workflow, restorer))
    saved = sorted(server.output.glob("*.png"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise ServerError(f"the workflow ended well, but SaveImage wrote nothing to {server.output}.")
    return saved[-1]


def seconds_of_last_run(server: ComfyUIServer) -> float:
    """How long ComfyUI worked on the last workflow, from loading the picture to saving the result."""
    (last,) = json.loads(server.get("/history?max_items=1")).values()
    times = {kind: data["timestamp"] for kind, data in last["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1000


def warm_up(server: ComfyUIServer, restorer: Path | None) -> str | None:
    """Restore a small part of the sample, so that the weights are loaded; returns the name that a restorer got."""
    name = None if restorer is None else restorer.name
    if restorer is not None:
        models = server.base / "models" / "jpeg_restorers"
        models.mkdir(parents=True, exist_ok=True)
        shutil.copy(restorer, models / restorer.name)
    path = server.base / "warm_up.jpg"
    sample_picture().crop(_WARM_UP).save(path, "JPEG", quality=SAMPLE_QUALITY)
    restore(server, path, restorer=name).unlink()
    return name


def to_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0)[None].float() / 255


def to_picture(image: Tensor) -> Image.Image:
    """The picture of (1, 3, H, W) in [0, 1]."""
    return Image.fromarray((image[0] * 255).round().byte().movedim(0, -1).contiguous().numpy())


def table(before: Tensor, after: Tensor, clean: Tensor | None, jpeg: JPEGData) -> list[str]:
    """Lines with quality and agreement, PSNR and SSIM, where the clean picture is known, and blockiness."""
    rows = []
    if clean is not None:
        rows += [("PSNR, dB", "{:.2f}", psnr, "higher is better"), ("SSIM", "{:.4f}", ssim, "higher is better")]
    if min(before.shape[-2:]) > 8:
        rows += [("blockiness", "{:.2f}", lambda image, _: 1e4 * blockiness(image), "x 1e-4, lower is better")]
    kind = "" if jpeg.quality.exact else "about "
    lines = [
        f"{'':12}{'before':>10}{'after':>10}",
        f"{'quality':12}{kind + f'{jpeg.quality.quality:.0f}':>10}{'':10}   read off the file",
    ]
    for name, shape, measure, remark in rows:
        values = [shape.format(float(measure(image, clean))) for image in (before, after)]
        lines.append(f"{name:12}{values[0]:>10}{values[1]:>10}   {remark}")
    share = math.floor(make_consistent(after, [jpeg], strength=0.0).fraction * 1e6) / 1e4  # 100 means all of them
    said = "the file's own coefficients, if it is compressed again as the file was"
    return [*lines, f"{'agreement':12}{'':10}{f'{share:g} %':>10}   {said}"]


def describe(path: Path, jpeg: JPEGData) -> str:
    """One line about a file: size, sampling, quality."""
    kind = "" if jpeg.quality.exact else "about "
    return (
        f"{path.name}: {jpeg.width}x{jpeg.height}, {path.stat().st_size / 1024:.0f} kB, {jpeg.subsampling}, "
        f"quality {kind}{jpeg.quality.quality:.0f}"
    )


def demo(image: Path | None, restorer: Path | None = None) -> None:
    """All of it.

    Raises:
        JPEGError: The image is not a JPEG that can be used.
        ServerError: ComfyUI or a node failed.
    """
    started = time.perf_counter()
    DEMO.mkdir(exist_ok=True)
    path, clean = (image, None) if image else make_sample()
    jpeg, pixels = read_jpeg_and_pixels(path)
    before = apply_orientation(pixels, jpeg.orientation)[None]
    print(describe(path, jpeg), "\nStarting ComfyUI, loading the restorer ...", flush=True)
    with ComfyUIServer() as server:
        name = warm_up(server, restorer)
        print(f"Ready after {time.perf_counter() - started:.1f} s. Restoring ...", flush=True)
        shutil.copyfile(restore(server, path, restorer=name), DEMO / "restored.png")
        seconds = seconds_of_last_run(server)
    after = to_tensor(Image.open(DEMO / "restored.png"))
    before_after(to_picture(before), to_picture(after)).save(DEMO / "before_after.png")
    print("\n".join(table(before, after, clean, jpeg)))
    print(f"Restored in {seconds:.1f} s from loaded weights; {time.perf_counter() - started:.1f} s in all.")
    for name in ("restored.png", "before_after.png"):
        print(f"Wrote {DEMO / name}")


def main() -> int:
    """The command line; returns the exit status: 2 for a file that cannot be used, 1 for a failure, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Restore a JPEG in a real ComfyUI.")
    parser.add_argument("--image", type=Path, help="a JPEG; by default a sample")
    parser.add_argument("--restorer", type=Path, help="a restorer file; by default the starter that takes one step")
    given = parser.parse_args()
    if given.restorer is not None and not given.restorer.is_file():
        print(f"demo: RESTORER must be a restorer file, there is none at {given.restorer}.", file=sys.stderr)
        return 2
    try:
        demo(given.image, given.restorer)
    except JPEGError as error:
        print(f"demo: IMAGE must be a JPEG that can be read: {error}.", file=sys.stderr)
        return 2
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
