"""From ComfyUI's IMAGE (B, H, W, C) to the core's pictures (B, 3, H, W) and back; alpha stays aside."""

from __future__ import annotations

import torch
from torch import Tensor

_LAYOUTS = {1: "gray", 2: "gray and alpha", 3: "RGB", 4: "RGB and alpha"}


def split_image(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """The colours of an IMAGE as (B, 3, H, W) float32 in [0, 1], and its alpha (B, H, W, 1) or None.

    Gray gives three equal channels. RGB that is in range already is not copied: the pictures are a view, not to be
    written to.

    Raises:
        ValueError: It is no batch of pictures with 1 to 4 channels, or it is empty.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in _LAYOUTS or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"expected a batch of at least one image (batch, height, width, 1 to 4 channels), got {shape}. Connect "
            "the IMAGE output of a node that loads or makes pictures."
        )
    channels = image.shape[-1]
    colors, alpha = (image[..., :-1], image[..., -1:]) if channels in (2, 4) else (image, None)
    if colors.shape[-1] == 3 and colors.dtype == torch.float32 and _in_range(colors):
        return colors.movedim(-1, 1), alpha
    planes = colors.movedim(-1, 1).float().clamp(0, 1)
    return planes.expand(-1, 3, -1, -1).contiguous(), alpha


def join_image(pictures: Tensor, alpha: Tensor | None, device: torch.device) -> Tensor:
    """An IMAGE, contiguous float32 on `device`, of pictures (B, 3, H, W) and the alpha that `split_image` set aside.

    Pictures that lie in memory as an IMAGE does, as restorations of such pictures do, are not copied.
    """
    image = pictures.movedim(1, -1).to(device, torch.float32)
    if alpha is not None:
        image = torch.cat([image, alpha.to(image)], dim=-1)
    return image.contiguous()


def _in_range(colors: Tensor) -> bool:
    """Whether clamping would change nothing; False where something is no number."""
    low, high = torch.aminmax(colors)
    return bool((low >= 0) & (high <= 1))
