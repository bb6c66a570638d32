"""CODiff on random weights for the benchmark: in ComfyUI by the pack's nodes, and as a plain diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restoration.diffusion.one_step import alphas_cumprod_sd, predict_x0
from restoration.networks.cave import CaVE, CaVEConfig, cave_tokens
from restoration.restorer_file import RestorerFile, read_restorer
from tests import reduced_sd21
from tests.comfyui_inprocess import ComfyUI
from tests.graphs import Graph
from tools.setup_env import comfyui_dir

SCALE = 0.18215
TIMESTEP = 499


@dataclass(frozen=True)
class Files:
    """What both sides load: the base model, and the restorer."""

    base: reduced_sd21.ReducedBase
    restorer: RestorerFile
    unet: dict[str, Any]
    vae: dict[str, Any]


def make_files(folder: Path, *, full: bool) -> Files:
    """The reduced base of the tests, or one of SD 2.1-base's size, and a restorer of the paper's widths for it."""
    base = reduced_sd21.full_base(folder) if full else reduced_sd21.reduced_base()
    path = folder / "models" / "jpeg_restorers" / "benchmark.safetensors"
    reduced_sd21.write_codiff(path, base, cave_widths=CaVEConfig().widths, rank=16, alpha=8.0)
    configs = [json.loads((base.folder / part / "config.json").read_text()) for part in ("unet", "vae")]
    return Files(base, read_restorer(path), *configs)


class Comfy:
    """The nodes in a real ComfyUI, called as its executor calls them."""

    name = "ComfyUI"

    def __init__(self, files: Files, folder: Path, dtype: torch.dtype) -> None:
        comfy = ComfyUI(comfyui_dir(), folder)
        self.dtype, self.nodes = dtype, comfy.nodes.NODE_CLASS_MAPPINGS
        comfy.folder_paths.add_model_folder_path("checkpoints", str(files.base.checkpoint.parent))
        comfy.folder_paths.add_model_folder_path("vae", str(files.base.vae.parent))
        graph = Graph()
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=files.base.checkpoint.name)
        vae = graph.add("VAELoader", vae_name=files.base.vae.name)
        loader = graph.add(
            "LoadJPEGRestorer", restorer=files.restorer.name, dtype=names[dtype], model=[checkpoint, 0], vae=[vae, 0]
        )
        graph.sink([loader, 0])
        run = comfy.run(graph.prompt)
        assert run.success, run.error
        self.restorer, self.model, self.vae = run.outputs(loader)
        self.device = self.model.load_device

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """VAE Encode."""
        return self.nodes["VAEEncode"]().encode(self.vae, image)[0]

    def embed(self, image: Tensor) -> Any:
        """CaVE Prompt."""
        return self.nodes["CaVEEmbed"].execute(self.restorer, image).result[0]

    def denoise(self, latent: dict[str, Tensor], prompt: Any) -> dict[str, Tensor]:
        """One-Step Denoise."""
        return self.nodes["OneStepDenoise"].execute(self.model, prompt, latent, -1.0).result[0]

    def decode(self, latent: dict[str, Tensor]) -> Tensor:
        """VAE Decode."""
        return self.nodes["VAEDecode"]().decode(self.vae, latent)[0]

    def bare_forward(self, latent: dict[str, Tensor], prompt: Any) -> Callable[[], Tensor]:
        """The UNet that the node runs, on its own."""
        self.denoise(latent, prompt)  # it is on its device now, with the LoRA in its weights
        network = self.model.model
        dtype = network.get_dtype_inference()
        x = (latent["samples"] * SCALE).to(self.device, dtype)
        context = prompt[0][0].to(self.device, dtype)
        t = torch.tensor([float(TIMESTEP)], device=self.device)
        return lambda: network.diffusion_model(x, t, context=context, transformer_options={})

    def stages(self, image: Tensor) -> dict[str, Callable[[], Any]]:
        """Each part of the chain on its own."""
        latent, prompt = self.encode(image), self.embed(image)
        return {
            "encode": lambda: self.encode(image),
            "CaVE": lambda: self.embed(image),
            "UNet": lambda: self.denoise(latent, prompt),
            "decode": lambda: self.decode(latent),
        }

    def whole(self, image: Tensor) -> Tensor:
        """From image to image."""
        return self.decode(self.denoise(self.encode(image), self.embed(image)))


class Diffusers:
    """The same chain as the authors have it: diffusers' networks with peft's LoRA beside their weights."""

    name = "diffusers"

    def __init__(self, files: Files, device: torch.device, dtype: torch.dtype) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        self.device, self.dtype = device, dtype
        unet = UNet2DConditionModel.from_pretrained(files.base.folder / "unet")
        vae = AutoencoderKL.from_pretrained(files.base.folder / "vae")
        targets = {
            "unet_lora": (unet, reduced_sd21.unet_lora_modules(unet)),
            "vae_lora": (vae, reduced_sd21.vae_lora_modules(vae)),
        }
        for part, (module, names) in targets.items():
            lora = files.restorer.metadata.config[part]
            config = LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=list(names))
            inject_adapter_in_model(config, module)
            set_peft_model_state_dict(module, files.restorer.part(part))
        self.unet, self.vae = unet.eval().to(device, dtype), vae.eval().to(device, dtype)
        self.cave = CaVE(CaVEConfig(**files.restorer.metadata.config["cave"]), decoder=False).eval().to(device)
        self.cave.load_state_dict(files.restorer.part("prompt"))
        projection = files.restorer.part("projection")
        self.projection = torch.nn.Linear(*reversed(projection["weight"].shape)).to(device)
        self.projection.load_state_dict(projection)

    def stages(self, image: Tensor) -> dict[str, Callable[[], Any]]:
        """Each part of the chain on its own."""
        pixels = self._pixels(image)
        latent, prompt = self._encode(pixels), self._embed(pixels)
        return {
            "encode": lambda: self._encode(pixels),
            "CaVE": lambda: self._embed(pixels),
            "UNet": lambda: self._denoise(latent, prompt),
            "decode": lambda: self._decode(latent),
        }

    def whole(self, image: Tensor) -> Tensor:
        """From image to image."""
        pixels = self._pixels(image)
        return self._decode(self._denoise(self._encode(pixels), self._embed(pixels))).cpu()

    def _pixels(self, image: Tensor) -> Tensor:
        return image.movedim(-1, 1).to(self.device)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode((pixels * 2 - 1).to(self.dtype)).latent_dist.mode() * SCALE

    def _embed(self, pixels: Tensor) -> Tensor:
        return self.projection(cave_tokens(self.cave.encode(pixels))).to(self.dtype)

    def _denoise(self, latent: Tensor, prompt: Tensor) -> Tensor:
        eps = self.unet(latent, TIMESTEP, encoder_hidden_states=prompt).sample
        return predict_x0(latent, eps, alphas_cumprod_sd()[TIMESTEP])

    def _decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode((latent / SCALE).to(self.dtype)).sample.float().clamp(-1, 1) / 2 + 0.5
