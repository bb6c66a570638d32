"""What is known of each preset: whom it is for, what memory and time it takes, and where those numbers come from."""

from __future__ import annotations

from typing import NamedTuple

NOTES = {
    "a": "counted from the shapes of all tensors that are alive at once in a step; CUDA itself adds one or two GiB",
    "b": "as a, but of one of four cards, or with --run.accumulate 4",
    "c": "counted in the same way, with Stable Diffusion's shapes and the losses' networks; not tried on such a card",
    "d": "at the images/s of the starters' own trainings, on two CPU cores (AMD EPYC)",
}
"""Mark -> where a number comes from."""


class Known(NamedTuple):
    """What is known of a preset; None where nobody counted or measured.

    Args:
        purpose: Whom or what it is for.
        memory: GiB of one device, for the preset as it is.
        memory_from: The mark of its source.
        rate: Images a second.
        rate_from: The mark of its source.
    """

    purpose: str
    memory: float | None = None
    memory_from: str = ""
    rate: float | None = None
    rate_from: str = ""


KNOWN: dict[tuple[str, str], Known] = {
    ("cave", "paper"): Known("as published", 86.7, "a"),
    ("cave", "code"): Known("as the authors' code has it", 86.7, "a"),
    ("cave", "small"): Known("narrow, learns the quality alone: a CPU", 0.24, "a", 56, "d"),
    ("saipe", "paper"): Known("as published", 124, "a"),
    ("saipe", "small"): Known("narrow, small crops: a CPU", 0.15, "a"),
    ("codiff", "paper"): Known("as published", 22, "b"),
    ("codiff", "code"): Known("as the authors' code has it"),
    ("codiff", "24gb"): Known("as published, one card of 24 GB", 19.8, "c"),
    ("codiff", "12gb"): Known("as published, one card of 12 GB, slower", 8.5, "c"),
    ("codiff", "starter"): Known("small, from scratch, true to the picture", 0.13, "a", 30, "d"),
    ("sodiff", "paper"): Known("as published"),
    ("sodiff", "24gb"): Known("one card of 24 GB, SD 2.1's discriminator", 11.2, "c"),
    ("sodiff", "12gb"): Known("one card of 12 GB, the same, slower", 7.5, "c"),
    ("sodiff", "small"): Known("to compare settings with (ablate)"),
    ("sodiff", "starter"): Known("small, from scratch, sharp", 0.51, "a", 17, "d"),
    ("driftrec", "paper"): Known("as published", 77.5, "a"),
    ("driftrec", "starter"): Known("small: a CPU", 0.22, "a", 28, "d"),
    ("regression", "paper"): Known("as published", 77.4, "a"),
    ("regression", "starter"): Known("small: a CPU", 0.21, "a", 28, "d"),
    ("prior", "paper"): Known("as published (guided diffusion)", 1393, "a"),
    ("prior", "starter"): Known("small: a CPU", 0.22, "a", 54_016 / 4500, "d"),
    ("quality", "paper"): Known("large crops", 0.72, "a"),
    ("quality", "starter"): Known("small crops: a CPU", 0.19, "a"),
}
"""Command and preset -> what is known. docs/benchmarks.md and weights/README.md have the measurements."""
