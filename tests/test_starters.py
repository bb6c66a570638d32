"""The restorers that ship with the pack: they load, they are small, and they restore."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from shared import ROOT
from skimage import data

from restoration.jpeg import JPEGConstraint, encode_with_pillow, read_jpeg_and_pixels
from restoration.metrics import blockiness, psnr
from restoration.networks.timestep_predictor import TimestepPredictor
from restoration.one_step_pipeline import OneStepSettings, restore_one_step, see_images
from restoration.pipelines import DriftRecSettings, restore_driftrec, restore_regression
from restoration.prior_pipeline import DDRMSettings, restore_ddrm
from restoration.restorer_file import read_restorer
from restoration.restorers import build_restorer, load_weights
from training.degradation import compress
from training.networks.backbone import load_latent_model

WEIGHTS = ROOT / "weights"


def load(name: str):
    file = read_restorer(WEIGHTS / name)
    restorer = build_restorer(file.metadata, file.name)
    load_weights(restorer, file)
    return file.metadata, restorer.eval().requires_grad_(False)


FAMILIES = {
    "driftrec": "driftrec", "regression": "regression", "quality": "quality", "prior": "prior",
    "onestep-faithful": "codiff", "onestep-vivid": "sodiff",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_each_is_small_and_says_where_it_comes_from(name: str) -> None:
    path = WEIGHTS / f"starter-{name}.safetensors"
    metadata, _ = load(path.name)
    assert path.stat().st_size <= (4 if name == "quality" else 16) * 10**6
    assert metadata.family == FAMILIES[name] and metadata.license == "Apache-2.0" and metadata.base is None
    assert metadata.training["images"] >= 10_000 and metadata.training["date"] and metadata.training["data"]
    assert f"{metadata.training['images']:,} crops" in (WEIGHTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *("driftrec_restore", "ddrm_jpeg", "consistency"),
        *("restore_jpeg", "restore_folder", "codiff_starter", "sodiff_starter"),
    ],
)
def test_workflows_that_need_nothing_else_name_restorers_that_ship(name: str) -> None:
    """And their pictures under Templates are there."""
    graph = json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    (loader,) = [node for node in graph["nodes"] if node["type"] == "LoadJPEGRestorer"]
    assert (WEIGHTS / loader["widgets_values"][0]).is_file()
    assert (ROOT / "example_workflows" / f"{name}.jpg").is_file()


@pytest.mark.parametrize("quality", [10, 30])
def test_they_take_blocks_away_from_a_picture_that_they_have_not_seen(quality: int) -> None:
    clean = torch.from_numpy(data.astronaut()[:192, 96:320].copy()).permute(2, 0, 1)[None].float() / 255
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality), name="sample.jpg")
    with torch.inference_mode():
        regression = restore_regression(load("starter-regression.safetensors")[1], pixels[None])
        driftrec = restore_driftrec(
            load("starter-driftrec.safetensors")[1],
            pixels[None],
            DriftRecSettings(),
            constraints=[JPEGConstraint(jpeg)],
        )
    assert psnr(regression, clean) > psnr(pixels[None], clean) + 0.4
    assert blockiness(regression) < 0.7 * blockiness(pixels[None])
    assert blockiness(driftrec) < 0.7 * blockiness(pixels[None])


@pytest.mark.parametrize(("quality", "faithful", "vivid"), [(10, 0.6, 0.1), (30, 0.2, -0.6)])
def test_the_one_step_restorers_restore_what_they_have_not_seen(quality: int, faithful: float, vivid: float) -> None:
    """The faithful one in PSNR, the vivid one without losing much of it; both take blocks away."""
    clean = torch.from_numpy(data.astronaut()[:192, 96:320].copy()).permute(2, 0, 1)[None].float() / 255
    _, pixels = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality), name="sample.jpg")
    for name, gain in (("onestep-faithful", faithful), ("onestep-vivid", vivid)):
        _, restorer = load(f"starter-{name}.safetensors")
        model = load_latent_model(read_restorer(WEIGHTS / f"starter-{name}.safetensors"))
        with torch.inference_mode():
            seen = see_images(restorer, pixels[None], OneStepSettings())
            restored = restore_one_step(model, pixels[None], seen, OneStepSettings())
        assert psnr(restored, clean) > psnr(pixels[None], clean) + gain, name
        assert blockiness(restored) < 0.4 * blockiness(pixels[None]), name


@pytest.mark.parametrize("quality", [5, 10, 30])
def test_the_prior_restores_a_picture_that_it_has_not_seen(quality: int) -> None:
    """By DDRM, at half of the default's samples: closer to the original than the JPEG, with fewer blocks."""
    clean = torch.from_numpy(data.astronaut()[32:160, 160:288].copy()).permute(2, 0, 1)[None].float() / 255
    jpeg, pixels = read_jpeg_and_pixels(encode_with_pillow(clean[0], quality), name="sample.jpg")
    with torch.inference_mode():
        restored = restore_ddrm(load("starter-prior.safetensors")[1], [jpeg], DDRMSettings(samples=4))
    assert psnr(restored, clean) > psnr(pixels[None], clean) + 0.3
    assert blockiness(restored) < 0.7 * blockiness(pixels[None])


def test_the_quality_of_one_unseen_picture_is_right_within_8() -> None:
    """Mean over qualities 5 to 95, both decoders (a constant has 25)."""
    network = load("starter-quality.safetensors")[1].network
    clean, errors = data.astronaut(), []
    for quality in range(5, 100, 10):
        for decoder in ("pillow", "ffmpeg"):
            pixels = torch.from_numpy(compress(clean, quality, decoder=decoder)).permute(2, 0, 1)[None].float() / 255
            with torch.inference_mode():
                errors.append(abs(float(network(pixels)[0]) - quality))
    assert np.mean(errors) <= 8, errors


def test_half_precision_tells_the_same_quality() -> None:
    """Within 0.2 of single, on a small picture: processors are slow at it."""
    network = load("starter-quality.safetensors")[1].network
    low = TimestepPredictor(network.config, dtype=torch.float16).eval()
    low.load_state_dict(network.state_dict())
    pixels = torch.from_numpy(compress(data.astronaut()[:128, :128].copy(), 45)).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        assert float(low(pixels.half())[0]) == pytest.approx(float(network(pixels)[0]), abs=0.2)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "weights/README.md",
        "docs/driftrec.md",
        "docs/sodiff.md",
        "docs/ddrm.md",
        "docs/consistency.md",
        "docs/starter.md",
        "docs/tiling.md",
        "docs/restore_command.md",
        "docs/benchmarks.md",
    ],
)
def test_pages_have_no_gaps_and_their_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z_]+@", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (path.parent / Path(target)).exists(), target
