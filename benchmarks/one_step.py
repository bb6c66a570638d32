"""OneStepDenoise in ComfyUI against the bare network, and CODiff's whole chain against a plain diffusers pipeline.

On random weights: of the reduced SD 2.1 of the tests, or with --full of the sizes of SD 2.1-base. Times are medians of
runs that alternate between the two sides; the first run of each is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._common import heading

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Stages = dict[str, Callable[[], Any]]


def main(arguments: list[str]) -> None:
    """Print Markdown tables: the node's overhead, then the stages of both sides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks one_step", description=__doc__)
    parser.add_argument("--side", type=int, default=512, help="of the square image, pixels; a multiple of 32")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the networks of both sides")
    parser.add_argument("--full", action="store_true", help="networks of the full size (5 GB of memory in fp32)")
    parser.add_argument("--overhead-only", action="store_true", help="leave the whole chain out")
    options = parser.parse_args(arguments)
    sys.argv = sys.argv[:1]  # ComfyUI would read the rest
    from benchmarks._codiff import Comfy, Diffusers, make_files

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        files = make_files(Path(folder), full=options.full)
        comfy = Comfy(files, Path(folder), DTYPES[options.dtype])
        size = "full size" if options.full else "reduced"
        print(f"{heading(comfy.device)}, {options.dtype}, {size}, {options.side}x{options.side}, {options.runs} runs")
        image = torch.rand((1, options.side, options.side, 3), generator=torch.Generator().manual_seed(0))
        _overhead(comfy, image, options.runs)
        if not options.overhead_only:
            _chain(comfy, Diffusers(files, comfy.device, DTYPES[options.dtype]), image, options.runs)


def _overhead(comfy: Any, image: Tensor, runs: int) -> None:
    latent, prompt = comfy.encode(image), comfy.embed(image)
    node, bare = (lambda: comfy.denoise(latent, prompt)), comfy.bare_forward(latent, prompt)
    times = _alternating({"OneStepDenoise": node, "bare UNet forward": bare}, comfy.device, runs)
    print("\n| | ms |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values) * 1e3:.1f} |")
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    print(f"| ratio (at most 1.05 asked) | {statistics.median(ratios):.3f} |", flush=True)


def _chain(comfy: Any, plain: Any, image: Tensor, runs: int) -> None:
    rate = matrix_rate(comfy.device, comfy.dtype)
    print(f"\nmatrix rate of the device, 4096x4096, {str(comfy.dtype)[6:]}: {rate / 1e12:.2f} TFLOP/s")
    print("\n| | ms | TFLOP | of the matrix rate | peak memory, MB |\n|---|---|---|---|---|")
    totals = {}
    for side in (comfy, plain):
        stages = side.stages(image)
        work = {name: _flop(run) for name, run in plain.stages(image).items()}
        for name, run in stages.items():
            seconds = statistics.median(_alternating({name: run}, comfy.device, runs)[name])
            share = work[name] / seconds / rate
            print(
                f"| {side.name}, {name} | {seconds * 1e3:.1f} | {work[name] / 1e12:.3f} | {share:.0%} | |", flush=True
            )
        whole = {"all": lambda side=side: side.whole(image)}
        peak = _peak(whole["all"], comfy.device)
        totals[side.name] = (statistics.median(_alternating(whole, comfy.device, runs)["all"]), peak)
        print(f"| {side.name}, all | {totals[side.name][0] * 1e3:.1f} | | | {_megabytes(peak)} |", flush=True)
    (ours, memory), (theirs, their_memory) = totals.values()
    print(f"| ratio (at most 0.8 and 0.7 asked on a GPU) | {ours / theirs:.3f} | | | {_ratio(memory, their_memory)} |")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of three."""
    a = torch.randn((4096, 4096), device=device).to(dtype)
    a @ a
    best = min(_timed(lambda: a @ a, device) for _ in range(3))
    return 2 * 4096**3 / best


def _alternating(functions: Stages, device: torch.device, runs: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(runs):
        for name, function in functions.items():
            times[name].append(_timed(function, device))
    return times


def _timed(function: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _flop(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _peak(function: Callable[[], Any], device: torch.device) -> float | None:
    """Bytes allocated on a CUDA device at most, its weights included; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return float(torch.cuda.max_memory_allocated(device))


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours / theirs:.3f}"
