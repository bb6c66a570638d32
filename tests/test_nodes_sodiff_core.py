"""SODiff's prompt goes wherever core takes a prompt of Stable Diffusion 2.x, and text goes into One-Step Denoise."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.codiff_graphs import noise, relative, run
from tests.diffusers_reference import adapted, one_step
from tests.graphs import Graph, photo
from tests.reduced_sd21 import unet_lora_modules
from tests.sodiff_graphs import compressed, loaded, text_prompt

pytestmark = pytest.mark.comfyui


class Prompts:
    """A graph with the adapted MODEL, SAIPE's prompt of some pictures, and a text prompt."""

    def __init__(self, sodiff, images: int = 1) -> None:
        self.graph, self.comfy = Graph(), sodiff.comfy
        _, self.loader = loaded(self.graph, sodiff.base)
        image = torch.cat([compressed(photo(64, 64), 10)] * images)
        self.saipe = self.graph.add("SAIPEPrompt", restorer=[self.loader, 0], image=[self.graph.image(image), 0])
        self.text = self.graph.image(text_prompt())
        self.latent = noise(images, 4, 8, 8)

    def add(self, node: str, **inputs) -> str:
        return self.graph.add(node, **inputs)

    def output(self, node: str):
        self.graph.sink([node, 0])
        return run(self.comfy, self.graph).outputs(node)[0]

    def sampled(self, positive: list, steps: int = 2) -> torch.Tensor:
        """KSampler at CFG 3 against an emptied prompt."""
        negative = self.add("ConditioningZeroOut", conditioning=[self.text, 0])
        latent = self.graph.image({"samples": torch.zeros_like(self.latent)})
        settings = {
            "seed": 1,
            "steps": steps,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        }
        node = self.add(
            "KSampler",
            model=[self.loader, 1],
            positive=positive,
            negative=[negative, 0],
            latent_image=[latent, 0],
            **settings,
        )
        return self.output(node)["samples"]

    def denoised(self, conditioning: list, timestep: float = 400.0) -> torch.Tensor:
        latent = self.graph.image({"samples": self.latent})
        node = self.add(
            "OneStepDenoise",
            model=[self.loader, 1],
            conditioning=conditioning,
            latent=[latent, 0],
            timestep=timestep,
        )
        return self.output(node)["samples"]


def test_ksampler_takes_saipes_prompt(sodiff):
    """As a positive prompt, for a batch too: the result is that of the same tokens alone, not text's."""
    prompts = Prompts(sodiff, images=2)
    seen = prompts.sampled([prompts.saipe, 0])
    tokens = prompts.output(prompts.saipe)[0][0]
    same = prompts.sampled([prompts.graph.image([[tokens, {"pooled_output": None}]]), 0])
    assert seen.isfinite().all() and torch.equal(seen, same)
    assert relative(prompts.sampled([prompts.text, 0]), seen) > 1e-2


def test_average_is_a_dial_between_what_is_seen_and_what_is_said(sodiff):
    """Core's Conditioning (Average) in either order mixes the tokens, and One-Step Denoise and KSampler take it."""
    prompts = Prompts(sodiff)
    seen, said = prompts.output(prompts.saipe)[0][0], text_prompt()[0][0]
    ends = {"saipe": [prompts.saipe, 0], "text": [prompts.text, 0]}
    for to, other, expected in (
        ("saipe", "text", 0.75 * seen + 0.25 * said),
        ("text", "saipe", 0.75 * said + 0.25 * seen),
    ):
        mixed = prompts.add(
            "ConditioningAverage",
            conditioning_to=ends[to],
            conditioning_from=ends[other],
            conditioning_to_strength=0.75,
        )
        assert torch.allclose(prompts.output(mixed)[0][0], expected, atol=1e-5)
        assert relative(prompts.denoised([mixed, 0]), prompts.denoised(ends[to])) > 1e-4
        assert prompts.sampled([mixed, 0], steps=1).isfinite().all()


def test_concat_and_combine_take_it(sodiff):
    """Both prompts at once: as one of 154 tokens, and as two whose predictions core averages."""
    prompts = Prompts(sodiff)
    joined = prompts.add("ConditioningConcat", conditioning_to=[prompts.saipe, 0], conditioning_from=[prompts.text, 0])
    assert tuple(prompts.output(joined)[0][0].shape) == (1, 154, 1024)
    seen, said = (prompts.denoised([node, 0]) for node in (prompts.saipe, prompts.text))
    assert relative(prompts.denoised([joined, 0]), seen) > 1e-4
    both = prompts.add("ConditioningCombine", conditioning_1=[prompts.saipe, 0], conditioning_2=[prompts.text, 0])
    assert relative(prompts.denoised([both, 0]), (seen + said) / 2) < 1e-4


def test_text_goes_into_one_step_denoise(sodiff):
    """A text prompt with a timestep of its own: what diffusers and peft give for the same tokens."""
    prompts = Prompts(sodiff)
    result = prompts.denoised([prompts.text, 0], 333.3)
    unet = UNet2DConditionModel.from_pretrained(sodiff.base.folder / "unet")
    unet = adapted(unet, list(unet_lora_modules(unet)), sodiff.file, "unet_lora")
    assert relative(result, one_step(unet, prompts.latent, text_prompt()[0][0], [333.3])) < 1e-4


def test_controlnet_is_applied_to_it(sodiff):
    """Core's Apply ControlNet on SAIPE's prompt: the control model is asked with it and changes the result."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        seen: list = []  # noqa: RUF012

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.seen.append(cond["c_crossattn"].clone())
            return self.control_merge({"middle": [noise(1, 320, 4, 4, seed=5) * 2]}, None, None)

        def copy(self):
            return Control()

    prompts = Prompts(sodiff)
    hint = prompts.graph.image(photo(64, 64))
    control = prompts.graph.image(Control())
    applied = prompts.add(
        "ControlNetApply", conditioning=[prompts.saipe, 0], control_net=[control, 0], image=[hint, 0], strength=1.0
    )
    assert relative(prompts.denoised([applied, 0]), prompts.denoised([prompts.saipe, 0])) > 1e-3
    assert torch.equal(Control.seen[0], prompts.output(prompts.saipe)[0][0])
    assert prompts.sampled([applied, 0], steps=1).isfinite().all() and len(Control.seen) > 1
