"""CODiff's part of a restorer file as networks: the prompt, the LoRA, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from restoration.adapters import read_lora
from restoration.networks.cave import CaVEConfig, cells
from restoration.pipelines import Compute, Progress, embed_with_cave
from restoration.prompts import CaVEPrompt, averaging
from restoration.restorer_file import RestorerFile, RestorerFileError, RestorerMetadata
from restoration.restorers import build_restorer
from restoration.tiling import Tiler

CONFIG = {
    "cave": {"widths": [8, 8, 16, 32], "blocks": 1},
    "context_dim": 48,
    "timestep": 499.0,
    "unet_lora": {"rank": 2, "alpha": 1.0},
}


def prompt(seed: int = 0) -> CaVEPrompt:
    model = CaVEPrompt(CaVEConfig((8, 8, 16, 32), 1), 48, 499.0)
    generator = torch.Generator().manual_seed(seed)
    model.network.initialize(generator)
    for parameter in model.projection.parameters():
        parameter.data.normal_(generator=generator)
    return model.eval().requires_grad_(False)


def file_with(tensors: dict[str, torch.Tensor], **config) -> RestorerFile:
    return RestorerFile(RestorerMetadata("codiff", {**CONFIG, **config}, base="sd2.1-base"), tensors, "one.safetensors")


def test_each_image_of_a_batch_is_seen_on_its_own_and_progress_ends_at_one() -> None:
    model, heard = prompt(), []
    images = torch.rand(3, 3, 70, 100, generator=torch.Generator().manual_seed(1))
    compute = Compute(tiler=Tiler(32))
    tokens, quality = embed_with_cave(model, images, compute=compute, on_progress=heard.append)
    rows, columns = cells(70, 100)
    assert tuple(tokens.shape) == (3, rows * columns, 48) and tuple(quality.shape) == (3,)
    alone, _ = embed_with_cave(model, images[1:2])
    assert torch.allclose(tokens[1:2], alone, atol=1e-5)
    assert isinstance(heard[-1], Progress) and heard[-1].fraction == 1.0
    fractions = [one.fraction for one in heard]
    assert fractions == sorted(fractions) and len(fractions) > 9


def test_running_out_of_memory_makes_tiles_smaller_and_changes_nothing(monkeypatch) -> None:
    model, image = prompt(), torch.rand(1, 3, 512, 300, generator=torch.Generator().manual_seed(1))
    expected, _ = embed_with_cave(model, image)
    head, seen = model.network.m_head.forward, []

    def short(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[-1] * x.shape[-2])
        if seen[-1] > 200 * 200:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (simulated)")
        return head(x)

    monkeypatch.setattr(model.network.m_head, "forward", short)
    released = []
    tokens, _ = embed_with_cave(model, image, compute=Compute(tiler=Tiler(release=lambda: released.append(1))))
    assert torch.allclose(tokens, expected, atol=1e-5) and released and max(seen) > 200 * 200
    monkeypatch.setattr(model.network.m_head, "forward", lambda x: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        embed_with_cave(model, image)


def test_an_interruption_comes_through() -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_with_cave(prompt(), torch.rand(1, 3, 64, 64), compute=Compute(check=check))


def test_no_number_is_an_error() -> None:
    model = prompt()
    model.projection.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="no number"):
        embed_with_cave(model, torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3)])
def test_the_loras_change_is_the_product_of_its_matrices(shape: tuple[int, ...]) -> None:
    """alpha / rank times B A, for a convolution applied one after the other."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, *shape[1:], generator=generator)
    up = torch.randn(shape[0], 2, *(1,) * (len(shape) - 2), generator=generator)
    lora = read_lora(file_with({"unet_lora.a.lora_A.weight": down, "unet_lora.a.lora_B.weight": up}), "unet_lora")
    assert lora.shape("a") == shape and lora.delta("a").shape == shape
    if len(shape) == 2:
        x = torch.randn(4, 5, generator=generator)
        expected = 0.5 * (x @ down.T) @ up.T
        assert torch.allclose(x @ lora.delta("a").T, expected, atol=1e-5)
    else:
        x = torch.randn(1, 5, 8, 8, generator=generator)
        expected = 0.5 * torch.conv2d(torch.conv2d(x, down), up)
        assert torch.allclose(torch.conv2d(x, lora.delta("a")), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        ({}, {}, "unet_lora is empty"),
        ({"unet_lora.a.lora_A.weight": torch.zeros(2, 5)}, {}, "got \\(2, 5\\) and none"),
        (
            {"unet_lora.a.lora_A.weight": torch.zeros(3, 5), "unet_lora.a.lora_B.weight": torch.zeros(6, 3)},
            {},
            "rank 2",
        ),
        ({}, {"unet_lora": {"rank": "2", "alpha": 1}}, "rank and alpha"),
        ({}, {"unet_lora": None}, "rank and alpha"),
    ],
)
def test_a_lora_that_is_not_whole_is_refused(tensors, config, expected) -> None:
    with pytest.raises(RestorerFileError, match=expected):
        read_lora(file_with(tensors, **config), "unet_lora")


@pytest.mark.parametrize(
    "config",
    [
        {"timestep": 1000.0},
        {"timestep": float("nan")},
        {"context_dim": 1 << 20},
        {"context_dim": "1024"},
        {"cave": {"widths": [8, 8, 8], "blocks": 1}},
        {"cave": {"widths": [8, 8, 8, 1 << 20], "blocks": 1}},
        {"cave": {"widths": [8, 8, 8, 8], "blocks": 10**9}},
        {"cave": {"depth": 3}},
        {"cave": None},
    ],
)
def test_descriptions_of_no_restorer_are_refused_before_anything_is_built(config) -> None:
    with pytest.raises(RestorerFileError, match="configuration is not valid"):
        build_restorer(file_with({}, **config).metadata, "one.safetensors")


def test_a_first_stage_alone_restores_nothing() -> None:
    metadata = replace(file_with({}).metadata, family="cave")
    with pytest.raises(RestorerFileError, match=r"training codiff --cave one\.safetensors"):
        build_restorer(metadata, "one.safetensors")


@pytest.mark.parametrize(("length", "parts"), [(46, 19), (31, 13), (5, 5), (7, 1), (100, 99)])
def test_averages_of_neighbours_are_those_of_adaptive_pooling(length: int, parts: int) -> None:
    """Against torch's own, which Apple's devices lack where the sizes do not divide each other."""
    values = torch.rand(1, 2, 1, length, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.adaptive_avg_pool2d(values, (1, parts))
    torch.testing.assert_close(values @ averaging(length, parts).T, expected)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 4), (31, 46), (1, 300), (400, 2)])
def test_larger_pictures_have_no_more_tokens_than_are_wanted(rows: int, columns: int) -> None:
    """In the shape of the picture; smaller ones keep a token for each cell."""
    model = CaVEPrompt(CaVEConfig((8, 8, 16, 32), 1), 48, 499.0, 16).eval()
    features = torch.rand(2, 32, rows, columns, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model(features)
        every = model.projection(features.flatten(2).transpose(1, 2))
    assert len(tokens[0]) == rows * columns if rows * columns <= 16 else 8 <= len(tokens[0]) <= 16
    torch.testing.assert_close(tokens.mean(dim=1), every.mean(dim=1), atol=0.02, rtol=0)
    if rows * columns <= 16:
        assert torch.equal(tokens, every)
