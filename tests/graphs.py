"""Graphs in ComfyUI's API format for tests, with nodes that feed tensors in and take anything out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from skimage import data
from torch import Tensor

RESTORER = "test-driftrec.safetensors"
_tensors: dict[str, Any] = {}


class TestSource:
    """Gives out a value that the test put aside."""

    __test__ = False
    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"key": ("STRING", {})}}

    def give(self, key: str) -> tuple[Any]:
        return (_tensors[key],)


class TestSink:
    """Makes ComfyUI run what is connected."""

    __test__ = False
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "take"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict:  # noqa: N802
        return {"required": {"value": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict) -> bool:  # noqa: N802
        return True

    def take(self, value: Any) -> dict:
        return {}


class Graph:
    """A prompt that grows node by node; each method returns the new node's id."""

    def __init__(self) -> None:
        import nodes

        nodes.NODE_CLASS_MAPPINGS.setdefault("TestSource", TestSource)
        nodes.NODE_CLASS_MAPPINGS.setdefault("TestSink", TestSink)
        self.prompt: dict[str, dict[str, Any]] = {}

    def add(self, node: str, **inputs: Any) -> str:
        number = str(len(self.prompt) + 1)
        self.prompt[number] = {"class_type": node, "inputs": inputs}
        return number

    def image(self, value: Any) -> str:
        key = str(len(_tensors))
        _tensors[key] = value
        return self.add("TestSource", key=key)

    def sink(self, link: list) -> str:
        return self.add("TestSink", value=link)

    def sample(self, image: list, restorer: str = RESTORER, dtype: str = "default", **settings: Any) -> str:
        """DriftRecSample with three steps and its restorer; `settings` are its inputs."""
        loader = self.add("LoadJPEGRestorer", restorer=restorer, dtype=dtype)
        inputs = {"sampler": "ode_2m", "steps": 3, "seed": 0, "samples": 1, "color": "mean"}
        return self.add("DriftRecSample", restorer=[loader, 0], image=image, **{**inputs, **settings})


def photo(height: int, width: int) -> Tensor:
    """A part of a photograph, or all of it at another scale: an IMAGE (1, height, width, 3)."""
    picture = Image.fromarray(data.astronaut())
    if max(height, width) <= 512:
        picture = picture.crop((100, 20, 100 + width, 20 + height))
    else:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    levels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return levels.view(1, height, width, 3).float() / 255


def save_jpeg(comfy: Any, name: str, image: Tensor, quality: int = 10, **options: Any) -> Path:
    """Put a JPEG into ComfyUI's input folder."""
    path = comfy.base / "input" / name
    levels = (image[0] * 255).round().byte().numpy()
    Image.fromarray(levels).save(path, "JPEG", quality=quality, **options)
    return path
