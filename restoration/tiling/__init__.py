"""Large pictures in parts: blended tiles, windows that change nothing, and the tiles that others published with."""

from .exact import tile_count, tiled_exactly
from .gaussian import LatentTile, gaussian_weights, latent_tiles
from .tiler import MINIMUM_TILE, TileGrid, Tiler, crop_to, is_out_of_memory_error, pad_to_multiple, tiled

__all__ = [
    "MINIMUM_TILE",
    "LatentTile",
    "TileGrid",
    "Tiler",
    "crop_to",
    "gaussian_weights",
    "is_out_of_memory_error",
    "latent_tiles",
    "pad_to_multiple",
    "tile_count",
    "tiled",
    "tiled_exactly",
]
