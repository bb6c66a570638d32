"""`python -m training convert`: the authors' checkpoints as restorer files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from restoration.importers.codiff import import_cave, import_codiff
from restoration.importers.driftrec import import_driftrec
from restoration.importers.prior import import_prior
from restoration.restorer_file import RestorerMetadata, half, write_restorer

Imported = tuple[RestorerMetadata, dict[str, Tensor]]


@dataclass(frozen=True)
class Importer:
    """A kind of checkpoint.

    Args:
        summary: What people read in the list.
        add_options: Adds what this importer takes besides the options of all.
        load: Reads the checkpoint.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    load: Callable[[argparse.Namespace], Imported]


def run(arguments: list[str]) -> None:
    """Convert one checkpoint, e.g. `driftrec CKPT OUT.safetensors [--raw-weights] [--half] [--license TEXT]`.

    Raises:
        ValueError: The checkpoint cannot be used, or the name of the result has another ending; one sentence says why.
    """
    options = _parser().parse_args(arguments)
    output: Path = options.output
    if output.suffix != ".safetensors":
        raise ValueError(
            f"expected a result that ends in .safetensors, got {output.name}. Name it {output.stem}.safetensors."
        )
    metadata, tensors = IMPORTERS[options.kind].load(options)
    metadata = replace(metadata, license=options.license)
    write_restorer(output, metadata, half(tensors) if options.half else tensors)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    for assumption in metadata.training.get("assumed", []):
        print(f"The checkpoint does not say it; assumed: {assumption}")
    print(f"{output}: {metadata.family}, {parameters:,} parameters, {output.stat().st_size / 1e6:.1f} MB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training convert", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, importer in IMPORTERS.items():
        command = kinds.add_parser(kind, help=importer.summary, description=importer.summary)
        importer.add_options(command)
        command.add_argument("output", type=Path, metavar="OUT.safetensors", help="the restorer file to write")
        command.add_argument("--half", action="store_true", help="store the weights in half precision")
        command.add_argument("--license", default="unknown", help="licence of the weights, written into the file")
    return parser


def _driftrec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a .ckpt file of the authors' train.py")
    parser.add_argument(
        "--raw-weights", action="store_true", help="take the weights as they are, not their moving averages"
    )


def _driftrec(options: argparse.Namespace) -> Imported:
    return import_driftrec(options.checkpoint, use_ema=not options.raw_weights)


def _codiff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CODIFF.pkl", help="the authors' codiff.pkl")
    _cave_options(parser)


def _codiff(options: argparse.Namespace) -> Imported:
    return import_codiff(options.checkpoint, options.cave)


def _cave_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cave", type=Path, metavar="CAVE.pth", help="the authors' cave.pth")


def _cave(options: argparse.Namespace) -> Imported:
    return import_cave(options.cave)


def _prior_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="a file of guided diffusion or of DDPM, or a folder of diffusers"
    )
    parser.add_argument("--raw-weights", action="store_true", help="where the file holds moving averages as well")
    parser.add_argument(
        "--head-channels", type=int, help="channels of each attention head, for files of guided diffusion (default: 64)"
    )
    parser.add_argument("--image-size", type=int, help="side of the images that it was trained on, for single files")


def _prior(options: argparse.Namespace) -> Imported:
    return import_prior(
        options.checkpoint, use_ema=not options.raw_weights, head_channels=options.head_channels,
        image_size=options.image_size,
    )  # fmt: skip


IMPORTERS: dict[str, Importer] = {
    "driftrec": Importer("a PyTorch Lightning checkpoint of DriftRec or its baseline", _driftrec_options, _driftrec),
    "codiff": Importer("the two files of CODiff, its adapters and its prompt encoder", _codiff_options, _codiff),
    "prior": Importer("a diffusion model of pixels, as a prior for DDRM", _prior_options, _prior),
    "cave": Importer("CODiff's prompt encoder alone, with its decoder, to train on", _cave_options, _cave),
}
