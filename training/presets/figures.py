"""What is known of each preset: whom it is for, what memory and time it takes, and where those numbers come from."""

from __future__ import annotations

from typing import NamedTuple

NOTES = {
    "a": "counted from the shapes of all tensors that are alive at once in a step; CUDA itself adds one or two GiB",
    "b": "the same, with its batch in four parts (--run.accumulate 4) or on four cards",
    "c": "at the images/s of the starters' own trainings, on two CPU cores (AMD EPYC)",
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
    ("cave", "paper"): Known("as published"),
    ("cave", "code"): Known("as the authors' code has it"),
    ("cave", "small"): Known("narrow, learns the quality alone: a CPU", rate=56, rate_from="c"),
    ("saipe", "paper"): Known("as published", memory=16 * 7.8, memory_from="a"),
    ("saipe", "small"): Known("narrow, small crops: a CPU"),
    ("codiff", "paper"): Known("as published", memory=22, memory_from="b"),
    ("codiff", "code"): Known("as the authors' code has it"),
    ("codiff", "24gb"): Known("as published, one card of 24 GB", memory=17.5, memory_from="a"),
    ("codiff", "12gb"): Known("as published, one card of 12 GB, slower", memory=7.4, memory_from="a"),
    ("codiff", "starter"): Known("small, from scratch, true to the picture", rate=30, rate_from="c"),
    ("sodiff", "paper"): Known("as published"),
    ("sodiff", "24gb"): Known("one card of 24 GB, SD 2.1's discriminator"),
    ("sodiff", "12gb"): Known("one card of 12 GB, the same, slower"),
    ("sodiff", "small"): Known("to compare settings with (ablate)"),
    ("sodiff", "starter"): Known("small, from scratch, sharp", rate=17, rate_from="c"),
    ("driftrec", "paper"): Known("as published"),
    ("driftrec", "starter"): Known("small: a CPU", rate=28, rate_from="c"),
    ("regression", "paper"): Known("as published"),
    ("regression", "starter"): Known("small: a CPU", rate=28, rate_from="c"),
    ("prior", "paper"): Known("as published (guided diffusion)"),
    ("prior", "starter"): Known("small: a CPU", rate=54_016 / 4500, rate_from="c"),
    ("quality", "paper"): Known("large crops"),
    ("quality", "starter"): Known("small crops: a CPU"),
}
"""Command and preset -> what is known. docs/benchmarks.md and weights/README.md have the measurements."""
