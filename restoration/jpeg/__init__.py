"""The JPEG format: quantization tables and a codec in torch."""

from .codec import (
    Coefficients,
    dct_to_image,
    decode,
    encode,
    forward_dct,
    image_to_dct,
    inverse_dct,
    quantize,
    rgb_to_ycbcr,
    round_trip,
    ycbcr_to_rgb,
)
from .sampling import SUBSAMPLINGS, sampling_factors, subsampling_name
from .tables import STANDARD_CHROMA, STANDARD_LUMA, QualityEstimate, estimate_quality, tables_for_quality

__all__ = [
    "STANDARD_CHROMA",
    "STANDARD_LUMA",
    "SUBSAMPLINGS",
    "Coefficients",
    "QualityEstimate",
    "dct_to_image",
    "decode",
    "encode",
    "estimate_quality",
    "forward_dct",
    "image_to_dct",
    "inverse_dct",
    "quantize",
    "rgb_to_ycbcr",
    "round_trip",
    "sampling_factors",
    "subsampling_name",
    "tables_for_quality",
    "ycbcr_to_rgb",
]
