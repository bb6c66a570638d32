"""The perceptual loss is what the configuration names; it is never another one, and never silently absent."""

import urllib.error

import pytest
import torch
import torchvision
from shared import shared_path

from restoration.dists import load_dists
from restoration.lpips import load_lpips_squeeze
from training.losses import PerceptualConfig, make_perceptual

DOWNLOAD = "torchvision.models._api.load_state_dict_from_url"


@pytest.fixture(scope="module")
def vgg16():
    """What torchvision's server would send, but for random features and a small classifier."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    generator = torch.Generator().manual_seed(0)
    features = {f"features.{key}": torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
                for key, value in shapes.items()}  # fmt: skip
    return {**features, "classifier.0.weight": torch.ones(2, 2)}


@pytest.fixture(scope="module")
def dists_weights():
    return shared_path("weights", "dists", "weights.pt")


def pictures():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 32, 40, generator=generator), torch.rand(2, 3, 32, 40, generator=generator)


def test_dists_takes_vgg16_from_its_file(vgg16, dists_weights, tmp_path):
    torch.save(vgg16, tmp_path / "vgg16.pth")
    module = make_perceptual(PerceptualConfig(vgg16=tmp_path / "vgg16.pth", dists=dists_weights))
    distances = module(*pictures())
    assert distances.shape == (2,)
    assert torch.equal(distances, load_dists(vgg16, dists_weights)(*pictures()))


def test_dists_without_a_file_asks_torchvision_for_its_vgg16(vgg16, dists_weights, monkeypatch):
    asked = []
    monkeypatch.setattr(DOWNLOAD, lambda url, *_, **__: asked.append(url) or vgg16)
    module = make_perceptual(PerceptualConfig(dists=dists_weights))
    assert asked == [torchvision.models.VGG16_Weights.IMAGENET1K_V1.url]
    assert torch.equal(module(*pictures()), load_dists(vgg16, dists_weights)(*pictures()))


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_is_one_sentence_with_the_ways_out(dists_weights, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(DOWNLOAD, fail)
    with pytest.raises(ValueError, match=r"cannot download them .*(no route|hash).*perceptual\.vgg16.*lpips"):
        make_perceptual(PerceptualConfig(dists=dists_weights))


def test_lpips_is_that_of_its_file():
    path = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    module = make_perceptual(PerceptualConfig("lpips", lpips=path))
    assert torch.equal(module(*pictures()), load_lpips_squeeze(path)(*pictures()))


def test_none_is_none_only_when_it_is_asked_for():
    assert make_perceptual(PerceptualConfig("none")) is None


@pytest.mark.parametrize("kind", ["dists", "lpips"])
def test_unnamed_and_missing_weights_are_an_error_that_names_the_choices(kind, tmp_path):
    other = {"dists": "lpips", "lpips": "dists"}[kind]
    for path, found in ((None, "none was given"), (tmp_path / "absent", "absent does not exist")):
        with pytest.raises(ValueError, match=rf"--loss\.perceptual\.{kind} must name .*{found}.*kind {other}.*none"):
            make_perceptual(PerceptualConfig(kind, **{kind: path}))


def test_a_named_vgg16_that_is_missing_is_not_downloaded_instead(dists_weights, monkeypatch, tmp_path):
    monkeypatch.setattr(DOWNLOAD, lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(ValueError, match=r"--loss\.perceptual\.vgg16 must name VGG16's weights, but .* does not exist"):
        make_perceptual(PerceptualConfig(vgg16=tmp_path / "absent.pth", dists=dists_weights))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match=r"perceptual\.weight: expected a number >= 0"):
        PerceptualConfig(weight=weight)
