"""What `python -m training evaluate` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.evaluate.metrics import MetricFiles
from training.restore.settings import Sampler, unsaid

ProtocolName = Literal["single", "double", "rate", "samplers", "averaging", "quality", "embeddings"]
DEFAULT_QUALITIES: dict[str, tuple[int, ...]] = {
    "single": (5, 10, 20, 40),
    "rate": (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95),
    "samplers": (10,),
    "averaging": (10,),
    "quality": tuple(range(5, 100, 5)),
    "embeddings": (5, 10, 20, 40, 80),
}
"""Protocol -> JPEG qualities where none are given. `double` has the pairs of DriftRec's Table IV."""
_Names = Annotated[tuple[str, ...], unsaid(metavar="METRIC")]


@dataclass(frozen=True)
class SystemSettings:
    """How restorers run, where it is not what suits them.

    Args:
        steps: Evaluations of the network for each sample; for driftrec (default: 10) and prior (default: 20).
        samples: Restorations that are averaged; for driftrec (default: 1) and prior (default: 8).
        sampler: How the diffusion runs backwards; for driftrec (default: ode_2m).
        seed: Of the noise. The same seed gives the same figures.
        tile: Side in pixels of the tiles in which large pictures run, 0 for whole pictures (default: 1024, or as the
            restorer was trained).
        consistency: Hold results to their JPEG, as Restore JPEG does; published figures are without.
    """

    steps: Annotated[int | None, unsaid(metavar="NUMBER")] = None
    samples: Annotated[int | None, unsaid(metavar="NUMBER")] = None
    sampler: Annotated[
        Sampler | None, unsaid(metavar="{ode_2m,sde_2m,ode_1,sde_1,euler_maruyama,euler_heun,rk45}")
    ] = None  # fmt: skip
    seed: int = 0
    tile: Annotated[int | None, unsaid(metavar="PIXELS")] = None
    consistency: bool = False


@dataclass(frozen=True)
class EvaluateOptions:
    """What the command line says.

    Args:
        data: Folder of clean pictures, with its sub-folders: they are compressed, restored and compared. Lossless ones;
            JPEGs are taken as they are.
        degraded: Folder of pictures that are degraded already. With --data they are compared with the picture of the
            same name there; without, only by metrics that need no original.
        restorer: Restorer files; one or more. Without, the compressed pictures alone are measured.
        output: Folder for the results. Repeating the command goes on where it stopped.
        protocol: What is measured; one or more. single: JPEGs of each quality. double: compressed twice, the second
            time on another grid (DriftRec, Table IV). rate: quality against bytes (DDRM-JPEG, Fig. 3). samplers:
            samplers and steps of driftrec (Table VI). averaging: means of several samples (Fig. 7). quality: how well
            restorers tell the JPEG's quality (CODiff, Fig. 7). embeddings: what prompts make of qualities (CODiff,
            Fig. 4; SODiff, Fig. 3).
        qualities: JPEG qualities, 1 to 100 (default: 5 10 20 40 for single; the others have their own).
        trained_qualities: For the protocol quality: qualities that were trained on; the others are marked as unseen.
        subsampling: Of the chroma.
        limit: Use the first pictures only; 0 takes all.
        settings: How restorers run.
        base: For restorers that adapt Stable Diffusion 2.1-base: its folder in diffusers' layout, or its name on the
            Hugging Face hub.
        metrics: Names of those to measure (default: all that can be). The others are not reported as missing.
        files: Where the weights of metrics are.
        worst_by: The metric that chooses the worst pictures for the report (default: LPIPS where measured, else PSNR).
        examples: Pictures in the report for each restorer and condition: half of them the worst, half the first.
        device: auto takes a GPU where there is one.
        dtype: Precision of the networks. auto is fp16 on CUDA GPUs and fp32 elsewhere.
    """

    restorer: Annotated[tuple[Path, ...], unsaid(metavar="FILE")] = ()
    data: Annotated[Path | None, unsaid(metavar="FOLDER")] = None
    degraded: Annotated[Path | None, unsaid(metavar="FOLDER")] = None
    output: Path = Path("evaluation")
    protocol: tuple[ProtocolName, ...] = ("single",)
    qualities: Annotated[tuple[int, ...], unsaid(metavar="QUALITY")] = ()
    trained_qualities: Annotated[tuple[int, ...], unsaid(metavar="QUALITY")] = ()
    subsampling: Literal["4:2:0", "4:2:2", "4:4:4"] = "4:2:0"
    limit: int = 0
    settings: Annotated[SystemSettings, tyro.conf.arg(name="")] = field(default_factory=SystemSettings)
    base: Annotated[str | None, unsaid(metavar="PATH")] = None
    metrics: _Names = ()
    files: Annotated[MetricFiles, tyro.conf.arg(name="weights")] = field(default_factory=MetricFiles)
    worst_by: Annotated[str | None, unsaid(metavar="METRIC")] = None
    examples: int = 4
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: Options contradict each other, or a number is out of range.
        """
        if self.data is None and self.degraded is None:
            raise ValueError("expected --data FOLDER with clean pictures, or --degraded FOLDER, got neither.")
        if not self.protocol:
            raise ValueError("expected at least one --protocol, got none.")
        if self.degraded is not None and self.protocol != ("single",):
            raise ValueError(
                f"--degraded: its pictures are measured as they are, so only the protocol single fits, got "
                f"{', '.join(self.protocol)}. Leave --protocol out, or give clean pictures with --data."
            )
        _check_qualities("--qualities", self.qualities)
        _check_qualities("--trained-qualities", self.trained_qualities)
        for name, least in {"limit": 0, "examples": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"expected --{name} of at least {least}, got {getattr(self, name)}.")

    def qualities_of(self, protocol: str) -> tuple[int, ...]:
        """The JPEG qualities that a protocol goes through, each once, in their order."""
        return tuple(dict.fromkeys(self.qualities or DEFAULT_QUALITIES[protocol]))


def _check_qualities(option: str, qualities: Sequence[int]) -> None:
    wrong = [quality for quality in qualities if not 1 <= quality <= 100]
    if wrong:
        raise ValueError(f"{option}: expected JPEG qualities from 1 to 100, got {', '.join(map(str, wrong))}.")
