"""OneStepDenoise honours what core's samplers honour: LoRA, hooks, ControlNet, wrappers, previews, interruption."""

from __future__ import annotations

import pytest
import torch

from tests.codiff_graphs import convolutional, denoised, loaded, noise, relative, run, step_of
from tests.graphs import Graph
from tests.reduced_sd21 import UNET, lora_tensors

pytestmark = pytest.mark.comfyui


def step(graph: Graph, model: list, conditioning: list, latent: torch.Tensor, **settings) -> str:
    source = graph.image({"samples": latent})
    node = graph.add(
        "OneStepDenoise", model=model, conditioning=conditioning, latent=[source, 0], timestep=499.0, **settings
    )
    graph.sink([node, 0])
    return node


def kohya_lora(names: list[str], rank: int = 2, alpha: float = 2.0, seed: int = 3) -> dict[str, torch.Tensor]:
    """A LoRA of some UNet layers as its trainers save them for ComfyUI."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        modules = dict(UNet2DConditionModel(**UNET).named_modules())
    pairs = lora_tensors({name: modules[name] for name in names}, rank, torch.Generator().manual_seed(seed))
    ends = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
    lora = {}
    for key, value in pairs.items():
        name, end = next((key.removesuffix(end), ends[end]) for end in ends if key.endswith(end))
        lora[f"lora_unet_{name.replace('.', '_')}{end}"] = value
        lora[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    return lora


LAYERS = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]


def with_lora(codiff, latent, prompt, *, before: bool) -> torch.Tensor:
    """A user's LoRA put on the MODEL before or after Load JPEG Restorer."""
    import comfy.sd

    lora, graph = kohya_lora(LAYERS), Graph()
    checkpoint, restorer = loaded(graph, codiff.base)
    graph.sink([checkpoint if before else restorer, 0 if before else 1])
    model = run(codiff.comfy, graph).outputs(checkpoint if before else restorer)[0 if before else 1]
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.8, 0)
    conditioning = graph.image([[prompt, {}]])
    if before:
        graph.prompt[restorer]["inputs"]["model"] = [graph.image(changed), 0]
        source = [restorer, 1]
    else:
        source = [graph.image(changed), 0]
    node = step(graph, source, [conditioning, 0], latent)
    return run(codiff.comfy, graph).outputs(node)[0]["samples"]


def test_a_users_lora_counts_wherever_it_is_connected(codiff):
    """Also on the convolution that the restorer replaces: the LoRA is added to the replaced weights."""
    latent, prompt = noise(1, 4, 8, 8) * 5, noise(1, 9, 1024, seed=1)
    plain = denoised(codiff, latent, prompt, 499.0)
    before, after = (with_lora(codiff, latent, prompt, before=before) for before in (True, False))
    assert relative(before, after) < 1e-5
    assert relative(before, plain) > 0.01


def test_hooked_loras_count(codiff):
    """A LoRA that is hooked to the prompt gives what the same LoRA on the model gives."""
    import comfy.hooks

    latent, prompt = noise(1, 4, 8, 8) * 5, noise(1, 9, 1024, seed=1)
    hooks = comfy.hooks.create_hook_lora(kohya_lora(LAYERS), 0.8, 0.0)
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    conditioning = graph.image(comfy.hooks.set_hooks_for_conditioning([[prompt, {}]], hooks))
    node = step(graph, [restorer, 1], [conditioning, 0], latent)
    hooked = run(codiff.comfy, graph).outputs(node)[0]["samples"]
    assert relative(hooked, with_lora(codiff, latent, prompt, before=False)) < 1e-5


def control(function):
    """A control model: `function` of the latent gives the residuals; it notes the times that it is asked for."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list = []

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.seen.append((tuple(x_noisy.shape), float(t[0])))
            return self.control_merge(function(x_noisy), None, None)

        def copy(self):
            return self

    return Control()


def test_controlnet_is_honoured_and_sees_the_timestep(codiff):
    """A control model is asked once, for the whole latent at the step's own noise level, and changes the result."""
    latent, prompt = noise(1, 4, 8, 8) * 5, noise(1, 9, 1024, seed=1)
    asked = control(lambda x: {"middle": [noise(1, 320, 4, 4, seed=5) * 2]})
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    conditioning = graph.image([[prompt, {"control": asked, "control_apply_to_uncond": True}]])
    node = step(graph, [restorer, 1], [conditioning, 0], latent)
    controlled = run(codiff.comfy, graph).outputs(node)[0]["samples"]
    assert relative(controlled, denoised(codiff, latent, prompt, 499.0)) > 0.01
    ((shape, sigma),) = asked.seen
    assert shape == (1, 4, 8, 8)
    assert sigma == pytest.approx(((1 - 0.27766943) / 0.27766943) ** 0.5, rel=1e-5)


def test_control_residuals_are_cut_like_the_tiles(codiff):
    """Tiled with a control model equals whole: residuals at full and at an eighth of the size are cut on the grid."""
    full, eighth = noise(1, 4, 75, 110, seed=7), noise(1, 4, 10, 14, seed=8)
    model = convolutional(codiff)
    original = model.object_patches["diffusion_model"].forward

    def forward(x, timesteps, context=None, control=None, **kwargs):
        coarse = control["output"][1].repeat_interleave(8, 2).repeat_interleave(8, 3)
        coarse = coarse[..., : x.shape[-2], : x.shape[-1]]
        return original(x, timesteps) + control["output"][0] + coarse

    model.object_patches["diffusion_model"].forward = forward
    asked = control(lambda x: {"output": [full.clone(), eighth.clone()]})
    results = []
    for tiling in ("never", "always"):
        graph = Graph()
        prompt = graph.image([[noise(1, 4, 1024), {"control": asked}]])
        source = graph.image(model)
        node = step(graph, [source, 0], [prompt, 0], noise(1, 4, 75, 110) * 5, tiling=tiling, tile=384, overlap=192)
        results.append(run(codiff.comfy, graph).outputs(node)[0]["samples"])
    assert relative(results[1], results[0]) < 5e-3


def test_model_function_wrappers_stay_in_the_way(codiff):
    """What other packs put around the network sees the call, and may change its result."""
    latent, prompt = noise(1, 4, 8, 8) * 5, noise(1, 9, 1024, seed=1)
    graph = Graph()
    _, restorer = loaded(graph, codiff.base)
    graph.sink([restorer, 1])
    model = run(codiff.comfy, graph).outputs(restorer)[1].clone()
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * 2)
    conditioning = graph.image([[prompt, {}]])
    node = step(graph, [graph.image(model), 0], [conditioning, 0], latent)
    doubled = run(codiff.comfy, graph).outputs(node)[0]["samples"]
    assert relative(doubled, 2 * denoised(codiff, latent, prompt, 499.0)) < 1e-5


def test_tiles_are_previewed_and_can_be_interrupted(codiff, monkeypatch):
    """Each tile moves the bar on and shows a preview; an interruption after one leaves ComfyUI usable."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(latent_preview, "default_preview_method", LatentPreviewMethod.Latent2RGB)
    model, latent = convolutional(codiff), noise(1, 4, 112, 120) * 5
    _, result = step_of(codiff, model, latent, tiling="always")
    assert result.progress[-1][:2] == (4, 4)
    assert result.progress[-1][2] is not None, "no preview"
    calls = []
    original = model.object_patches["diffusion_model"].forward

    def interrupting(x, *args, **kwargs):
        calls.append(1)
        codiff.comfy.interrupt()
        return original(x, *args, **kwargs)

    model.object_patches["diffusion_model"].forward = interrupting
    graph = Graph()
    sources = [graph.image(v) for v in (model, [[noise(1, 4, 1024), {}]], {"samples": latent})]
    links = dict(zip(("model", "conditioning", "latent"), ([s, 0] for s in sources), strict=True))
    graph.sink([graph.add("OneStepDenoise", **links, timestep=1.0, tiling="always"), 0])
    stopped = codiff.comfy.run(graph.prompt)
    assert stopped.interrupted and len(calls) == 1
    model.object_patches["diffusion_model"].forward = original
    step_of(codiff, model, latent)
