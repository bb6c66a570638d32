"""The small UNet that a one-step restorer brings along, as a MODEL of ComfyUI's."""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch
from torch import Tensor

from ..restoration.networks.dct_codec import BLOCK, CHANNELS, DCTCodec
from ..restoration.networks.small_unet import SmallUNetConfig
from ..restoration.restorer_file import RestorerFile, RestorerFileError, check_fit
from ..restoration.restorers import backbone_of, codec_of
from .dct_latent import guarded, plain


def make_model(file: RestorerFile, dtype: torch.dtype | None = None) -> Any:
    """The backbone of a restorer of the family codiff or sodiff as core's MODEL, under core's memory manager.

    Args:
        file: The restorer.
        dtype: Of the weights; None for what core would choose. Where the device cannot compute in it, they are cast.

    Raises:
        RestorerFileError: It has no backbone, or one that is not whole.
    """
    config = backbone_of(file.metadata, file.name)
    if config is None:
        raise RestorerFileError(f"{file.name}: expected a restorer with a backbone of its own, got one without.")
    settings = _ModelConfig(config, DCTLatentFormat(codec_of(file)))
    device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    kinds = settings.supported_inference_dtypes
    dtype = dtype or mm.unet_dtype(
        model_params=sum(value.numel() for value in file.part("unet").values()), supported_dtypes=kinds,
        weight_dtype=comfy.utils.weight_dtype(file.part("unet")),
    )  # fmt: skip
    settings.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, kinds), device=device)
    model = settings.get_model({})
    weights = _core_weights(model, file)
    # Looked up at each call: ComfyUI puts another class in its place when it starts.
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload_device)
    if not mm.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(weights, "", assign=patcher.is_dynamic())
    return patcher


class ResidualSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """Stable Diffusion's timesteps, but what the network returns is a residual of the latent: `remove_residual`."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """z - sqrt(1 - abar) F, where core's input is z sqrt(1 + sigma^2) and abar is 1 / (1 + sigma^2)."""
        sigma = comfy.model_sampling.reshape_sigma(sigma, model_output.ndim)
        return (model_input - model_output * sigma) / (sigma**2 + 1).sqrt()


class DCTLatentFormat(comfy.latent_formats.LatentFormat):
    """What core knows of the latent: nothing is scaled, and the previews are the picture at an eighth of its size."""

    latent_channels = CHANNELS

    def __init__(self, codec: DCTCodec) -> None:
        gray = codec.decode(torch.zeros(1, CHANNELS, 1, 1))
        colors = codec.decode(torch.eye(CHANNELS)[..., None, None]) - gray
        # Core shows (preview + 1) / 2.
        self.latent_rgb_factors = (2 * colors.mean(dim=(2, 3))).tolist()
        self.latent_rgb_factors_bias = (2 * gray.mean(dim=(0, 2, 3)) - 1).tolist()

    def process_in(self, latent: Tensor) -> Tensor:
        return plain(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return guarded(latent)


class DCTBackboneModel(comfy.model_base.BaseModel):
    """Core's UNet on DCT latents."""

    def __init__(self, model_config: _ModelConfig, device: torch.device | None = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device)
        self.model_sampling = ResidualSampling(model_config)
        self.backbone = model_config.backbone
        self.backbone.set_norms(self.diffusion_model)
        self.tile_multiple = self.backbone.size_multiple // BLOCK

    def apply_model(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().apply_model(plain(x), plain(t), *args, **kwargs)

    def memory_required(self, input_shape: Any, cond_shapes: Any = None) -> float:
        batch, _, rows, columns = input_shape
        return batch * self.backbone.activation_bytes(rows * BLOCK, columns * BLOCK, self.get_dtype_inference())


class _ModelConfig(comfy.supported_models_base.BASE):
    """How core makes the network."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {
        "beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012
    }  # fmt: skip

    def __init__(self, backbone: SmallUNetConfig, latent_format: DCTLatentFormat) -> None:
        super().__init__(backbone.core_arguments())
        self.backbone, self.latent_format = backbone, latent_format

    def get_model(self, state_dict: Any, prefix: str = "", device: torch.device | None = None) -> DCTBackboneModel:
        return DCTBackboneModel(self, device)


def _core_weights(model: DCTBackboneModel, file: RestorerFile) -> dict[str, Tensor]:
    """A file's `unet.` tensors by core's names."""
    expected, part = model.diffusion_model.state_dict(), file.part("unet")
    known = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    names = {ours: theirs for ours, theirs in known.items() if theirs in expected}
    check_fit(part, {ours: expected[theirs] for ours, theirs in names.items()}, file.name)
    return {names[key]: value for key, value in part.items()}
