"""What each protocol goes through: conditions of the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from training.evaluate.options import EvaluateOptions
from training.evaluate.pictures import Condition

AS_GIVEN = Condition("as given", None)
_DOUBLE = ((30, 10), (10, 30), (None, 30), (30, 30), (50, 30), (30, 50))
"""First and second quality in DriftRec's Table IV."""


@dataclass(frozen=True)
class Protocol:
    """How a protocol is told in the report.

    Args:
        title: Its heading.
        about: A sentence on what is done, and whose protocol it is.
        plots: What is on the horizontal axis of its plots: `quality`, `rate`, `value` or nothing.
    """

    title: str
    about: str
    plots: str | None


PICTURE_PROTOCOLS = {
    "single": Protocol("JPEGs of each quality", "Pictures compressed once by libjpeg.", "quality"),
    "double": Protocol(
        "Compressed twice",
        "Compressed at the first quality, cut by 4 pixels, compressed at the second: two block grids that do not "
        "agree (DriftRec, Table IV).",
        None,
    ),
    "rate": Protocol(
        "Quality against bytes",
        "Means over the pictures against the mean size of their JPEGs, headers and all (DDRM-JPEG, Fig. 3).",
        "rate",
    ),
    "samplers": Protocol(
        "Samplers",
        "The same restorer, sampled in other ways (DriftRec, Table VI). Evaluations are of the network, for a whole "
        "picture: all its samples, and each once, in however many tiles it runs.",
        None,
    ),
    "averaging": Protocol(
        "Averages of samples",
        "Means of several restorations: closer to the original, and smoother (DriftRec, Fig. 7).",
        "value",
    ),
}
"""Protocols that measure restored pictures."""
ALSO_MEASURED = {"double": ("ssim_9",)}
"""Protocol -> metrics that its published figures are in, beside the usual ones."""


def conditions_of(protocol: str, options: EvaluateOptions) -> list[Condition]:
    """What happens to pictures in a protocol, in the order of its tables."""
    if options.degraded is not None:
        return [AS_GIVEN]
    if protocol == "double" and not options.qualities:
        return [_twice(first, second) for first, second in _DOUBLE]
    if protocol == "double":
        qualities = options.qualities_of(protocol)
        return [_twice(first, second) for first in qualities for second in qualities]
    return [Condition(str(quality), quality) for quality in options.qualities_of(protocol)]


def _twice(first: int | None, second: int) -> Condition:
    return Condition(str(second) if first is None else f"{first}/{second}", second, first)
