"""How training crops become JPEGs: what may be drawn (`law`), the codecs, and the drawing itself (`chain`)."""

from training.degradation.chain import DegradedCrop, degrade
from training.degradation.codecs import SUBSAMPLINGS, Decoder, compress, compress_webp, decode_ffmpeg, encode
from training.degradation.law import MAX_SHIFT, PRESETS, QUALITY_LAWS, Degradation, QualityLaw

__all__ = [
    "MAX_SHIFT",
    "PRESETS",
    "QUALITY_LAWS",
    "SUBSAMPLINGS",
    "Decoder",
    "Degradation",
    "DegradedCrop",
    "QualityLaw",
    "compress",
    "compress_webp",
    "decode_ffmpeg",
    "degrade",
    "encode",
]
