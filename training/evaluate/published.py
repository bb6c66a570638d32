"""Figures of the papers that this pack follows, beside which ours may be put: same pictures, same compression.

Sources: CODiff (Guo et al. 2025), Table 1; SODiff (arXiv 2508.07346), Table 1; DriftRec (Welker et al. 2024), Table IV.
CODiff's evaluation compresses with libjpeg, 4:2:0, and measures by pyiqa: LPIPS with AlexNet, DISTS, MUSIQ (koniq10k),
MANIQA (KonIQ), CLIPIQA (RN50). Its pictures are resized to multiples of 8 first, which six of LIVE1's are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.evaluate.pictures import Source, fingerprint, read_clean

_PERCEPTUAL = ("lpips_alex", "dists", "musiq", "maniqa", "clipiqa")
_DOUBLE = ("ssim_9", "psnr", "psnr_b")


@dataclass(frozen=True)
class PublishedRow:
    """Figures of one method under one condition, by the names of this pack's metrics."""

    protocol: str
    condition: str
    method: str
    source: str
    values: dict[str, float]


LIVE1 = {
    "bikes": "b2db441b7fef5ca1", "building2": "6aba42d90e5ea26a", "buildings": "3b27728371d2438d",
    "caps": "08d7bd3c8134f62b", "carnivaldolls": "5c21c31e9c6e55d8", "cemetry": "1281a3ea98ea6ea4",
    "churchandcapitol": "dd076d199177476a", "coinsinfountain": "fcd56a7fb5802f82", "dancers": "9c7ddb2a4b06c05c",
    "flowersonih35": "1b7dcb894cfa5164", "house": "fbea5ce26f863801", "lighthouse2": "692589b8cd602fb9",
    "lighthouse3": "6cf2e0eccb071994", "manfishing": "fae582b1e130cedc", "monarch": "c07c4ff37de1d749",
    "ocean": "790c446d86cb83b8", "paintedhouse": "a4210e780c2762d4", "parrots": "5ce07522eb599498",
    "plane": "8f2ca82c5c1150a0", "rapids": "40299bd74248cce5", "sailing1": "b2588534beaaebf0",
    "sailing2": "0e17388e23bfaf19", "sailing3": "e5af078637a02517", "sailing4": "e18511c79af4a5a6",
    "statue": "0dfbc4a1668f3b34", "stream": "17f888e456a4cf81", "studentsculpture": "3918ef2625ab02f1",
    "woman": "ecb2ef6fd9f0e2a2", "womanhat": "99dad4f533eee2f5",
}  # fmt: skip
"""The 29 pictures of LIVE1: name -> `fingerprint` of the levels."""

_TABLE_1 = {
    "JPEG": ("CODiff, Table 1", {
        "5": (0.4384, 0.3242, 40.33, 0.2294, 0.1716), "10": (0.3013, 0.2387, 53.88, 0.3509, 0.2737),
        "20": (0.1799, 0.1653, 64.12, 0.4411, 0.5542),
    }),
    "CODiff": ("CODiff, Table 1", {
        "5": (0.2062, 0.1121, 73.16, 0.5321, 0.7212), "10": (0.1428, 0.0867, 74.39, 0.5438, 0.7559),
        "20": (0.1101, 0.0692, 74.34, 0.5323, 0.7565),
    }),
    "SODiff": ("SODiff, Table 1", {
        "5": (0.2229, 0.1173, 72.88, 0.4957, 0.7087), "10": (0.1605, 0.0938, 73.84, 0.5192, 0.7323),
        "20": (0.1237, 0.0763, 74.11, 0.5272, 0.7587),
    }),
    "FBCNN": ("CODiff, Table 1", {
        "5": (0.3736, 0.2353, 63.56, 0.3425, 0.2763), "10": (0.2503, 0.1785, 71.00, 0.4207, 0.4767),
        "20": (0.1583, 0.1319, 73.96, 0.4551, 0.5535),
    }),
    "OSEDiff, retrained": ("CODiff, Table 1", {
        "5": (0.2675, 0.1653, 65.51, 0.3417, 0.5623), "10": (0.1749, 0.1164, 71.23, 0.3963, 0.7022),
        "20": (0.1270, 0.0856, 72.70, 0.4219, 0.7260),
    }),
}  # fmt: skip
_TABLE_4 = {
    "JPEG": {
        "30/10": (0.76, 25.4, 23.6), "10/30": (0.76, 25.6, 25.0), "30": (0.88, 29.4, 27.4),
        "30/30": (0.85, 28.0, 26.6), "50/30": (0.86, 28.6, 26.9), "30/50": (0.86, 28.6, 27.7),
    },
    "FBCNN": {
        "30/10": (0.82, 27.5, 27.2), "10/30": (0.79, 26.4, 26.4), "30": (0.91, 31.4, 30.8),
        "30/30": (0.88, 29.9, 29.5), "50/30": (0.90, 30.7, 30.1), "30/50": (0.89, 30.1, 29.9),
    },
    "QGAC": {
        "30/10": (0.82, 27.4, 27.2), "10/30": (0.79, 26.4, 26.4), "30": (0.91, 31.2, 30.7),
        "30/30": (0.88, 29.7, 29.4), "50/30": (0.90, 30.4, 30.0), "30/50": (0.89, 30.0, 29.7),
    },
    "DriftRec, regression": {
        "30/10": (0.81, 26.8, 26.6), "10/30": (0.78, 26.0, 25.9), "30": (0.91, 29.7, 29.3),
        "30/30": (0.88, 28.8, 28.6), "50/30": (0.89, 29.4, 29.0), "30/50": (0.89, 29.1, 28.9),
    },
    "DriftRec, OUVE": {
        "30/10": (0.71, 24.9, 24.8), "10/30": (0.73, 25.3, 25.3), "30": (0.84, 28.4, 28.3),
        "30/30": (0.81, 27.5, 27.5), "50/30": (0.83, 27.9, 27.9), "30/50": (0.83, 28.1, 28.1),
    },
}  # fmt: skip


def is_live1(sources: Sequence[Source]) -> bool:
    """Whether these are LIVE1's 29 pictures, level by level, whatever their names: no shrunk or recompressed copies."""
    if len(sources) != len(LIVE1) or any(source.clean is None for source in sources):
        return False
    try:
        marks = {fingerprint(read_clean(source.clean)) for source in sources if source.clean is not None}
    except (ValueError, OSError):
        return False
    return marks == set(LIVE1.values())


def published_rows(protocol: str, sources: Sequence[Source], subsampling: str) -> list[PublishedRow]:
    """What papers found in the same protocol on the same pictures; none where nobody did.

    Args:
        protocol: `single` or `double` have such rows.
        sources: The pictures that were measured, all of them compressed here.
        subsampling: The papers' is 4:2:0.
    """
    compressed_here = all(source.degraded is None for source in sources)
    if protocol not in ("single", "double") or subsampling != "4:2:0" or not compressed_here or not is_live1(sources):
        return []
    if protocol == "single":
        return [
            PublishedRow(protocol, condition, method, source, dict(zip(_PERCEPTUAL, values, strict=True)))
            for method, (source, table) in _TABLE_1.items()
            for condition, values in table.items()
        ]
    return [
        PublishedRow(protocol, condition, method, "DriftRec, Table IV", dict(zip(_DOUBLE, values, strict=True)))
        for method, table in _TABLE_4.items()
        for condition, values in table.items()
    ]


def to_plain(row: PublishedRow) -> dict[str, Any]:
    """For the report and the JSON."""
    return {"condition": row.condition, "method": row.method, "source": row.source, "values": row.values}
