"""JPEG to Latent: the latent of a file's coefficients, without its pixels, against SciPy and VAE Encode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.codiff_graphs import failure, run
from tests.graphs import Graph, photo, save_jpeg
from tests.starter_graphs import loaded, numbers, random_prompt, step, write
from tests.test_dct_codec import block_dct, pillow_ycbcr

pytestmark = pytest.mark.comfyui
LEVEL = 1 / 255


@pytest.fixture
def scale(fresh: Any) -> Tensor:
    """Of the restorer in ComfyUI's folder."""
    return write(fresh).tensors["codec.scale"].view(1, -1, 1, 1)


def calm(height: int, width: int) -> Tensor:
    """A photograph without black and white, so that decoders cut nothing off."""
    return (0.15 + 0.7 * photo(height, width)) * 255 // 1 / 255


def latents_of(fresh: Any, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """JPEG to Latent's and VAE Encode's latents of a file, what Load JPEG shows, and what VAE Decode gives back."""
    graph = Graph()
    source = graph.add("LoadJPEG", image=name)
    loader = loaded(graph)
    direct = graph.add("JPEGToLatent", jpeg=[source, 1], vae=[loader, 2])
    usual = graph.add("VAEEncode", pixels=[source, 0], vae=[loader, 2])
    picture = graph.add("VAEDecode", samples=[direct, 0], vae=[loader, 2])
    for node in (direct, usual, picture):
        graph.sink([node, 0])
    outputs = run(fresh, graph).outputs
    shown, back = outputs(source)[0], outputs(picture)[0]
    return numbers(outputs(direct)[0]), numbers(outputs(usual)[0]), shown, back


@pytest.mark.parametrize("subsampling", [0, 2], ids=["4:4:4", "4:2:0"])
@pytest.mark.parametrize("size", [(64, 96), (61, 91)], ids=str)
def test_against_scipy_and_vae_encode(fresh: Any, scale: Tensor, subsampling: int, size: tuple[int, int]) -> None:
    """The block DCT of what Pillow decodes, up to its rounding; VAE Encode's latent, up to that and RGB's rounding."""
    path = save_jpeg(fresh, "direct.jpg", calm(*size), quality=50, subsampling=subsampling)
    direct, usual, shown, back = latents_of(fresh, path.name)
    assert direct.shape == usual.shape and back.shape == shown.shape == (1, *size, 3)
    expected = block_dct(pillow_ycbcr(path.read_bytes()))
    whole = (direct * scale)[0].numpy()[:, : expected.shape[1], : expected.shape[2]]
    assert (whole - expected).std() < 0.4 * LEVEL
    inside = (slice(None), slice(None), slice(size[0] // 8), slice(size[1] // 8))
    assert 0 < float(((direct - usual) * scale)[inside].std()) < 0.6 * LEVEL
    assert float((back - shown).abs().mean()) < 0.5 * LEVEL


def test_gray(fresh: Any, scale: Tensor) -> None:
    path = fresh.base / "input" / "gray.jpg"
    Image.fromarray((calm(45, 70)[0, ..., 0] * 255).round().byte().numpy()).save(path, quality=70)
    direct, usual, shown, _ = latents_of(fresh, path.name)
    assert shown.shape == (1, 45, 70, 3) and not direct[:, 64:].any()
    expected = block_dct(pillow_ycbcr(path.read_bytes()))
    assert ((direct * scale)[0, :64, :5, :8].numpy() - expected).std() < 0.31 * LEVEL
    assert float(((direct - usual) * scale)[:, :, :5, :8].std()) < 0.31 * LEVEL


def test_turned_files_are_upright(fresh: Any, scale: Tensor) -> None:
    exif = Image.Exif()
    exif[274] = 6
    path = save_jpeg(fresh, "turned.jpg", calm(61, 91), quality=80, subsampling=0, exif=exif)
    direct, usual, shown, back = latents_of(fresh, path.name)
    assert shown.shape == back.shape == (1, 91, 61, 3) and direct.shape == (1, 192, 12, 8)
    assert float(((direct - usual) * scale)[:, :, :11, :7].std()) < 0.6 * LEVEL
    assert float((back - shown).abs().mean()) < 0.7 * LEVEL


def test_what_decoding_cuts_off_is_kept(fresh: Any, scale: Tensor) -> None:
    """At quality 5 a file holds colours beyond black and white; they are in the latent, not in the picture."""
    path = save_jpeg(fresh, "clipped.jpg", (photo(64, 64) > 0.5).float(), quality=5, subsampling=0)
    direct, usual, _, _ = latents_of(fresh, path.name)
    assert float(((direct - usual) * scale).abs().max()) > 20 * LEVEL


def test_a_batch_and_its_restoration(fresh: Any, scale: Tensor) -> None:
    """Compress to JPEG's JPEG_DATA of two images; One-Step Denoise takes the latent as it takes VAE Encode's."""
    graph = Graph()
    loader = loaded(graph)
    images = graph.image(torch.cat([calm(64, 96), calm(64, 96).flip(2)]))
    jpeg = graph.add("JPEGCompress", image=[images, 0], quality=20, subsampling="4:4:4")
    direct = graph.add("JPEGToLatent", jpeg=[jpeg, 1], vae=[loader, 2])
    usual = graph.add("VAEEncode", pixels=[jpeg, 0], vae=[loader, 2])
    nodes = []
    for latent in (direct, usual):
        restored = step(graph, loader, [latent, 0], random_prompt())
        nodes.append(graph.add("VAEDecode", samples=[restored, 0], vae=[loader, 2]))
        graph.sink([nodes[-1], 0])
    graph.sink([jpeg, 0])
    outputs = run(fresh, graph).outputs
    (one, other), before = (outputs(node)[0] for node in nodes), outputs(jpeg)[0]
    assert one.shape == other.shape == (2, 64, 96, 3)
    apart, changed = (float((one - picture).abs().mean()) for picture in (other, before))
    assert apart < 0.6 * LEVEL < 2 * LEVEL < changed


def test_other_vaes_and_pictures_are_refused(fresh: Any, scale: Tensor) -> None:
    """One sentence each: a VAE that takes no coefficients, a picture that is no JPEG, files of different sizes."""
    graph = Graph()
    save_jpeg(fresh, "one.jpg", photo(64, 64))
    source = graph.add("LoadJPEG", image="one.jpg")
    foreign = graph.image(object())
    graph.sink([graph.add("JPEGToLatent", jpeg=[source, 1], vae=[foreign, 0]), 0])
    message = failure(fresh, graph)
    assert (
        message.startswith("JPEGToLatent: expected the VAE of a restorer with a backbone") and "VAE Encode" in message
    )

    Image.new("RGB", (64, 64)).save(fresh.base / "input" / "no.png")
    graph = Graph()
    source = graph.add("LoadJPEG", image="no.png")
    graph.sink([graph.add("JPEGToLatent", jpeg=[source, 1], vae=[loaded(graph), 2]), 0])
    assert "no.png is no JPEG" in (message := failure(fresh, graph)) and "VAE Encode" in message

    graph = Graph()
    loader = loaded(graph)
    several = []
    for size in ((64, 64), (61, 91)):
        jpeg = graph.add("JPEGCompress", image=[graph.image(photo(*size)), 0], quality=20, subsampling="4:4:4")
        graph.sink([jpeg, 1])
        several += run(fresh, graph).outputs(jpeg)[1]
    graph.sink([graph.add("JPEGToLatent", jpeg=[graph.image(several), 0], vae=[loader, 2]), 0])
    assert "expected JPEGs of one size, got 91x61, 64x64" in failure(fresh, graph)
