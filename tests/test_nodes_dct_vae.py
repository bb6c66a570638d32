"""The DCT codec as ComfyUI's VAE: lossless through core's nodes, whole pictures of any size, no latent resized."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from restoration.networks.dct_codec import DCTCodec
from restoration.tiling import pad_to_multiple
from tests.codiff_graphs import failure, run
from tests.graphs import Graph, photo
from tests.starter_graphs import encoded, loaded, numbers, outcome, random_prompt, step, write

pytestmark = pytest.mark.comfyui
TILES = {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
CORE_LATENT_NODES: dict[str, dict[str, Any]] = {
    "LatentFromBatch": {"batch_index": 0, "length": 1},
    "RepeatLatentBatch": {"amount": 2},
}


@pytest.fixture
def starter(fresh: Any) -> Any:
    write(fresh)
    return fresh


def decoded(graph: Graph, latent: list, node: str = "VAEDecode", **settings: int) -> str:
    return graph.add(node, samples=latent, vae=["1", 2], **settings)


@pytest.mark.parametrize("size", [(64, 96), (61, 91), (8, 8), (1, 1), (200, 3)], ids=str)
@pytest.mark.parametrize("tiled", ["no", "encode", "decode", "both"])
def test_core_nodes_give_the_picture_back(starter: Any, size: tuple[int, int], tiled: str) -> None:
    """Exact to 1e-5 and at its own size, also where that is no multiple of 8, tiled or not."""
    graph = Graph()
    images = torch.rand(2, *size, 3, generator=torch.Generator().manual_seed(1))
    encode = ("VAEEncodeTiled", TILES) if tiled in ("encode", "both") else ("VAEEncode", {})
    decode = ("VAEDecodeTiled", TILES) if tiled in ("decode", "both") else ("VAEDecode", {})
    latent = encoded(graph, loaded(graph), images, encode[0], **encode[1])
    picture = decoded(graph, [latent, 0], decode[0], **decode[1])
    for node in (latent, picture):
        graph.sink([node, 0])
    outputs = run(starter, graph).outputs
    assert numbers(outputs(latent)[0]).shape == (2, 192, -(-size[0] // 8), -(-size[1] // 8))
    assert outputs(picture)[0].shape == images.shape and outputs(picture)[0].is_contiguous()
    assert float((outputs(picture)[0] - images).abs().max()) < 1e-5


def test_latents_are_the_codecs(starter: Any) -> None:
    """With the scale of the file, of the picture extended at the bottom and right: JPEG's grid stays in phase."""
    file, graph, image = write(starter), Graph(), photo(61, 91)
    latent = numbers(outcome(starter, graph, encoded(graph, loaded(graph), image)))
    codec = DCTCodec()
    codec.scale.copy_(file.tensors["codec.scale"])
    expected = codec.encode(pad_to_multiple(image.movedim(-1, 1), 8)[0])
    assert torch.allclose(latent, expected, atol=1e-5)
    inside = codec.encode(image[:, :56, :88].movedim(-1, 1))
    assert torch.allclose(latent[..., :7, :11], inside, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_gray_and_alpha(starter: Any, channels: int) -> None:
    """Gray is encoded as gray, alpha is left out."""
    graph, image = Graph(), torch.rand(1, 16, 24, channels, generator=torch.Generator().manual_seed(2))
    latent = encoded(graph, loaded(graph), image)
    picture = outcome(starter, graph, decoded(graph, [latent, 0]))
    expected = image[..., :1].expand(-1, -1, -1, 3) if channels < 3 else image[..., :3]
    assert picture.shape == (1, 16, 24, 3) and float((picture - expected).abs().max()) < 1e-5


def test_large_pictures_go_strip_by_strip(starter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a strip is on the device at once, and nothing changes by it."""
    module, rows = sys.modules[f"{starter.pack}.nodes.dct_vae"], []
    monkeypatch.setattr(module, "_STRIP", 40 * 16)
    codec_class = sys.modules[f"{starter.pack}.restoration.networks.dct_codec"].DCTCodec
    original = codec_class.encode
    monkeypatch.setattr(codec_class, "encode", lambda self, x: (rows.append(x.shape[2]), original(self, x))[1])
    graph, images = Graph(), torch.cat([photo(61, 40), photo(61, 40).flip(1)])
    latent = encoded(graph, loaded(graph), images)
    picture = outcome(starter, graph, decoded(graph, [latent, 0]))
    assert rows == [16, 16, 16, 16] * 2 and float((picture - images).abs().max()) < 1e-5


@pytest.mark.parametrize("restored", [False, True], ids=["encoded", "restored"])
@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "bislerp"])
def test_latent_upscaling_is_refused(starter: Any, method: str, restored: bool) -> None:
    """By both of core's nodes and all of their methods, with a sentence that says what to do."""
    for node, settings in (
        ("LatentUpscale", {"width": 256, "height": 256, "crop": "disabled"}),
        ("LatentUpscaleBy", {"scale_by": 1.5}),
    ):
        graph = Graph()
        latent = encoded(graph, loaded(graph), photo(72, 64))
        if restored:
            latent = step(graph, "1", [latent, 0], random_prompt())
        graph.sink([graph.add(node, samples=[latent, 0], upscale_method=method, **settings), 0])
        message = failure(starter, graph)
        assert message.startswith("this latent holds the DCT coefficients of 8x8 blocks and cannot be resized.")
        assert "after VAE Decode, or before VAE Encode" in message


@pytest.mark.parametrize(
    ("node", "settings"),
    [("LatentRotate", {"rotation": "90 degrees"}), ("LatentFlip", {"flip_method": "y-axis: horizontally"})],
)
def test_turning_is_refused(starter: Any, node: str, settings: dict[str, str]) -> None:
    """It would put the blocks elsewhere, and leave each as it was."""
    graph = Graph()
    latent = encoded(graph, loaded(graph), photo(72, 64))
    graph.sink([graph.add(node, samples=[latent, 0], **settings), 0])
    assert "cannot be rotated or flipped" in failure(starter, graph)


@pytest.mark.parametrize("node", CORE_LATENT_NODES)
def test_other_latent_nodes_work(starter: Any, node: str) -> None:
    """And what they give still knows its picture's size, and still refuses to be resized."""
    graph, image = Graph(), photo(61, 91)
    latent = encoded(graph, loaded(graph), image)
    changed = graph.add(node, samples=[latent, 0], **CORE_LATENT_NODES[node])
    picture = outcome(starter, graph, decoded(graph, [changed, 0]))
    assert picture.shape[1:] == (61, 91, 3) and float((picture - image).abs().max()) < 1e-5
    scaled = graph.add("LatentUpscaleBy", samples=[changed, 0], upscale_method="bilinear", scale_by=2.0)
    graph.sink([scaled, 0])
    assert "cannot be resized" in failure(starter, graph)


def test_blocks_can_be_composed_and_cut(starter: Any) -> None:
    """LatentComposite and LatentCrop move whole blocks, which is what happens to the pictures, then."""
    graph, image, other = Graph(), photo(101, 91), photo(24, 32).flip(1)
    latent = encoded(graph, loaded(graph), image)
    small = encoded(graph, "1", other)
    composed = graph.add("LatentComposite", samples_to=[latent, 0], samples_from=[small, 0], x=16, y=8, feather=0)
    crop = graph.add("LatentCrop", samples=[composed, 0], width=64, height=72, x=8, y=8)
    whole, part = decoded(graph, [composed, 0]), decoded(graph, [crop, 0])
    for node in (whole, part):
        graph.sink([node, 0])
    outputs = run(starter, graph).outputs
    expected = image.clone()
    expected[:, 8:32, 16:48] = other
    assert float((outputs(whole)[0] - expected).abs().max()) < 1e-5
    assert outputs(part)[0].shape == (1, 72, 64, 3)
    assert float((outputs(part)[0] - expected[:, 8:80, 8:72]).abs().max()) < 1e-5


def test_saved_latents_come_back(starter: Any) -> None:
    """Through SaveLatent and LoadLatent: the same numbers; only the picture's size is not in the file."""
    import nodes

    assert {"SaveLatent", "LoadLatent"} <= nodes.NODE_CLASS_MAPPINGS.keys()
    graph, image = Graph(), photo(61, 91)
    latent = encoded(graph, loaded(graph), image)
    graph.add("SaveLatent", samples=[latent, 0], filename_prefix="dct")
    graph.sink([latent, 0])
    before = numbers(run(starter, graph).outputs(latent)[0])
    (saved,) = (starter.base / "output").glob("dct_*.latent")
    shutil.move(saved, starter.base / "input" / "dct.latent")
    graph = Graph()
    loaded(graph)
    again = graph.add("LoadLatent", latent="dct.latent")
    picture = decoded(graph, [again, 0])
    for node in (again, picture):
        graph.sink([node, 0])
    outputs = run(starter, graph).outputs
    assert torch.equal(outputs(again)[0]["samples"], before)
    assert outputs(picture)[0].shape == (1, 64, 96, 3)
    assert float((outputs(picture)[0][:, :61, :91] - image).abs().max()) < 1e-5


def test_a_mask_keeps_the_rest(starter: Any) -> None:
    """With Set Latent Noise Mask, One-Step Denoise restores the masked half alone."""
    graph, image = Graph(), photo(64, 96)
    mask = torch.zeros(1, 64, 96)
    mask[..., :48] = 1
    latent = encoded(graph, loaded(graph), image)
    masked = graph.add("SetLatentNoiseMask", samples=[latent, 0], mask=[graph.image(mask), 0])
    restored = step(graph, "1", [masked, 0], random_prompt())
    picture = outcome(starter, graph, decoded(graph, [restored, 0]))
    changed = (picture - image).abs().mean(dim=(0, 1, 3))
    assert float(changed[:40].min()) > 0.001 and float(changed[56:].max()) < 1e-5


def test_foreign_latents_are_refused(starter: Any) -> None:
    graph = Graph()
    loaded(graph)
    for node, settings in (("VAEDecode", {}), ("VAEDecodeTiled", TILES)):
        foreign = graph.image({"samples": torch.zeros(1, 4, 8, 8)})
        graph.sink([decoded(graph, [foreign, 0], node, **settings), 0])
        assert "expected a latent of this VAE, (batch, 192, height, width), got (1, 4, 8, 8)" in failure(starter, graph)
        graph.prompt = {"1": graph.prompt["1"]}


def test_the_latent_is_a_tensor_like_any_other(starter: Any) -> None:
    """Arithmetic, copies and parts of it stay what they are; networks get an ordinary one."""
    import copy
    import pickle

    module = sys.modules[f"{starter.pack}.nodes.dct_latent"]
    numbers_of = torch.randn(2, 192, 3, 4)
    latent = module.guarded(numbers_of, (20, 30))
    same = [
        latent + 0,
        latent.clone(),
        copy.deepcopy(latent),
        pickle.loads(pickle.dumps(latent)),
        torch.lerp(latent, numbers_of, 0.5),
    ]
    for one in same:
        assert type(one) is module.DCTLatent and one.picture_size == (20, 30)
        assert torch.equal(module.plain(one), numbers_of)
    assert torch.cat([latent, latent]).picture_size == (20, 30)
    assert latent[:, :, :2].picture_size is None and latent.mean().picture_size is None
    assert torch.cat([latent, module.guarded(numbers_of, (21, 30))]).picture_size is None
    assert type(module.plain(latent)) is Tensor and type(module.plain(numbers_of)) is Tensor
    assert latent.is_nested is False and latent.shape == (2, 192, 3, 4) and latent.numpy().shape == latent.shape
