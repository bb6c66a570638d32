"""The JPEG format: quantization tables, a codec in torch, files, and images held to them."""

from .cells import QuantizationCells
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
from .consistency import ConsistencyResult, JPEGConstraint, make_consistent
from .file import (
    JPEGData,
    apply_orientation,
    decode_pixels,
    encode_with_pillow,
    jpeg_data_from,
    read_jpeg,
    read_jpeg_and_pixels,
    undo_orientation,
)
from .header import MAX_PIXELS, JPEGError
from .sampling import SUBSAMPLINGS, sampling_factors, subsampling_name
from .tables import STANDARD_CHROMA, STANDARD_LUMA, QualityEstimate, estimate_quality, tables_for_quality

__all__ = [
    "MAX_PIXELS",
    "STANDARD_CHROMA",
    "STANDARD_LUMA",
    "SUBSAMPLINGS",
    "Coefficients",
    "ConsistencyResult",
    "JPEGConstraint",
    "JPEGData",
    "JPEGError",
    "QualityEstimate",
    "QuantizationCells",
    "apply_orientation",
    "dct_to_image",
    "decode",
    "decode_pixels",
    "encode",
    "encode_with_pillow",
    "estimate_quality",
    "forward_dct",
    "image_to_dct",
    "inverse_dct",
    "jpeg_data_from",
    "make_consistent",
    "quantize",
    "read_jpeg",
    "read_jpeg_and_pixels",
    "rgb_to_ycbcr",
    "round_trip",
    "sampling_factors",
    "subsampling_name",
    "tables_for_quality",
    "undo_orientation",
    "ycbcr_to_rgb",
]
