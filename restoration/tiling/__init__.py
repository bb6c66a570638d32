"""Large pictures in parts: blended tiles, windows that change nothing, and the tiles that others published with."""

from .exact import tile_count, tiled_exactly
from .gaussian import LatentTile, gaussian_weights, latent_tiles
from .grid import TileGrid, crop_to, pad_to_multiple, padded_window
from .statistics import SharedStatistics, sample_of
from .tiler import MINIMUM_TILE, Tiler, is_out_of_memory_error, tiled

__all__ = [
    "MINIMUM_TILE",
    "LatentTile",
    "SharedStatistics",
    "TileGrid",
    "Tiler",
    "crop_to",
    "gaussian_weights",
    "is_out_of_memory_error",
    "latent_tiles",
    "pad_to_multiple",
    "padded_window",
    "sample_of",
    "tile_count",
    "tiled",
    "tiled_exactly",
]
