"""The small UNet's shape, in the words of diffusers and of ComfyUI: what is refused, what it costs."""

from __future__ import annotations

import json
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restoration.networks.small_unet import SmallUNetConfig
from tests.one_step_networks import TINY_UNET, TWO_LEVELS, diffusers_unet
from training.networks.backbone import make_unet

FOUR_LEVELS = SmallUNetConfig(
    widths=(32, 32, 64, 64), layers=1, attention=(False, True, False, False), head_dim=16, context_dim=24
)  # fmt: skip
SHAPES = {"one level": TINY_UNET, "two": TWO_LEVELS, "four": FOUR_LEVELS, "default": SmallUNetConfig()}
WITH_MIDDLE = SmallUNetConfig(widths=(64,), context_dim=32, middle_self_attention=True)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_json_knows_all_of_it(config: SmallUNetConfig) -> None:
    assert SmallUNetConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"widths": ()}, {"widths": (32,) * 5, "attention": (False,) * 5}, {"widths": (48,)}, {"widths": (2048,)},
        {"widths": (0,)}, {"widths": 32}, {"widths": (32.0,)}, {"widths": (True,)}, {"widths": (64, 96), "attention":
        (False, False)}, {"widths": (64,), "head_dim": 48}, {"attention": (False, True)}, {"attention": (1,)},
        {"layers": 0}, {"layers": 9}, {"layers": 1.0}, {"head_dim": 0}, {"context_dim": -1}, {"context_dim": 10**6},
        {"self_attention": "yes"}, {"self_attention": None}, {"norm_eps": 0.0},
        {"norm_eps": float("inf")}, {"norm_eps": "1"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_such_network_is_refused(changes: dict[str, Any]) -> None:
    """A file may be anybody's: neither endless networks, nor ones that only one of the libraries could build."""
    with pytest.raises(ValueError, match="small UNet: expected"):
        SmallUNetConfig(**changes)


@pytest.mark.parametrize("config", [*SHAPES.values(), WITH_MIDDLE], ids=[*SHAPES, "middle looks around"])
def test_both_libraries_build_the_same_tensors(comfy: Any, config: SmallUNetConfig) -> None:
    """Every tensor of diffusers' network has its place in ComfyUI's, of the same shape, and none of those is left."""
    import comfy.ops
    import comfy.utils
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    arguments = config.core_arguments()
    core = UNetModel(**arguments, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
    names = comfy.utils.unet_to_diffusers(arguments)
    theirs = {names[key]: tuple(value.shape) for key, value in make_unet(config).state_dict().items()}
    assert theirs == {key: tuple(value.shape) for key, value in core.items()}


def test_where_self_attention_is() -> None:
    """Without, each transformer's first attention reads the prompt, too, also in the middle: no time of the square."""

    def widths_read(config: SmallUNetConfig) -> list[set[int]]:
        state = {name: value for name, value in make_unet(config).state_dict().items() if "attn1.to_k" in name}
        return [{value.shape[1] for name, value in state.items() if ("mid" in name) == middle} for middle in (0, 1)]

    shape = {"widths": (64,), "attention": (True,), "context_dim": 32}
    assert widths_read(SmallUNetConfig(**shape)) == [{32}, {32}]
    assert widths_read(SmallUNetConfig(**shape, middle_self_attention=True)) == [{32}, {64}]
    assert widths_read(SmallUNetConfig(**shape, self_attention=True)) == [{64}, {64}]


def test_each_level_halves_the_size() -> None:
    assert [config.size_multiple for config in SHAPES.values()] == [8, 16, 64, 8]


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, lambda key=key: self._free(key))
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize(
    "config",
    [
        SmallUNetConfig(widths=(96,), context_dim=32),
        SmallUNetConfig(widths=(64,), attention=(True,), context_dim=32),
        SmallUNetConfig(widths=(160,), context_dim=32),
    ],
    ids=["starter narrowed", "attends", "starter"],
)
def test_memory_estimate_against_the_live_tensors(config: SmallUNetConfig) -> None:
    """What is asked of the memory manager is at least what an evaluation takes, and at most 60% more."""
    network = diffusers_unet(config).eval()
    latent, tokens = torch.randn(1, 192, 64, 64), torch.randn(1, 16, 32)
    with torch.inference_mode(), _Peak() as measured:
        network(latent, torch.tensor([300.0]), tokens)
    assert 1 <= config.activation_bytes(512, 512) / measured.peak <= 1.6
    assert config.activation_bytes(1024, 512) == 2 * config.activation_bytes(512, 512)
    assert config.activation_bytes(512, 512, torch.float16) * 2 == config.activation_bytes(512, 512)
