"""The perceptual loss is what the configuration names; it is never another one, and never silently absent."""

import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage
from shared import shared_path
from skimage.color import rgb2ycbcr
from torchvision.transforms.functional import rgb_to_grayscale

from restoration.dists import load_dists
from restoration.lpips import load_lpips_squeeze
from training.configs.codiff import CoDiffLossConfig
from training.losses import EdgeAware, PerceptualConfig, make_perceptual, pixel_loss, sobel_edges

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


@pytest.mark.parametrize(("mse", "l1", "chroma"), [(2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 5.0), (2.0, 3.0, 5.0)])
def test_errors_of_pixels_are_the_weighted_sum(mse, l1, chroma):
    """Chroma by scikit-image's YCbCr, whose Cb and Cr span 224 of 255 levels."""
    restored, clean = pictures()
    error = (restored - clean).double().numpy()
    planes = [rgb2ycbcr(batch.double().numpy(), channel_axis=1)[:, 1:] / 224 for batch in (restored, clean)]
    expected = mse * (error**2).mean() + l1 * np.abs(error).mean() + chroma * ((planes[0] - planes[1]) ** 2).mean()
    loss = pixel_loss(restored, clean, CoDiffLossConfig(mse=mse, l1=l1, chroma=chroma))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_gray_errors_are_no_errors_of_chroma():
    """And the gradient of those that are goes back to the picture."""
    restored, clean = pictures()
    weights = CoDiffLossConfig(mse=0.0, chroma=1.0)
    assert float(pixel_loss(clean + 0.1 * restored[:, :1], clean, weights)) < 1e-9
    restored.requires_grad_()
    pixel_loss(restored, clean, weights).backward()
    assert restored.grad.sum(1).abs().max() < 1e-6 < restored.grad.abs().mean()


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


def test_edges_are_the_magnitude_of_scipys_two_derivatives_of_torchvisions_gray():
    images, _ = pictures()
    kernel = np.outer([1, 2, 1], [1, 0, -1])
    for image, edges in zip(rgb_to_grayscale(images)[:, 0].double().numpy(), sobel_edges(images), strict=True):
        gx, gy = (ndimage.convolve(image, weights, mode="constant", cval=0) for weights in (kernel, kernel.T))
        np.testing.assert_allclose(edges[0].numpy(), np.sqrt(gx**2 + gy**2 + 1e-6), rtol=0, atol=2e-6)


def test_edges_of_a_step_are_four_times_its_gray_and_not_clamped():
    red = torch.zeros(1, 3, 8, 10)
    red[:, 0, :, 5:] = 1
    edges = sobel_edges(red)
    assert edges.shape == (1, 1, 8, 10)
    torch.testing.assert_close(edges[0, 0, 1:-1, 1:-1].unique(), torch.tensor([1e-3, 4 * 0.2989]), rtol=1e-5, atol=0)
    torch.testing.assert_close(edges[0, 0, 1:-1, 4:6], torch.full((6, 2), 4 * 0.2989), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gray", [0.0, 0.5])
def test_gradients_of_edges_are_finite_where_a_picture_is_flat(gray):
    flat = torch.full((1, 3, 8, 8), gray, requires_grad=True)
    sobel_edges(flat).sum().backward()
    assert flat.grad.isfinite().all()
    assert float(flat.grad[..., 2:-2, 2:-2].abs().max()) < 1e-9  # away from the border nothing is steep


def test_edges_are_float32_under_autocast_and_of_pictures_in_half_precision():
    images, _ = pictures()
    with torch.autocast("cpu", torch.bfloat16):
        edges = sobel_edges(images)
    assert edges.dtype == torch.float32
    assert torch.equal(edges, sobel_edges(images))
    assert torch.equal(sobel_edges(images.half()), sobel_edges(images.half().float()))
    assert sobel_edges(images.half()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (3, 16, 16)])
def test_edges_of_what_is_no_picture_in_colour_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected pictures \(B,3,H,W\), got"):
        sobel_edges(torch.zeros(shape))


@pytest.mark.parametrize("kind", ["dists", "lpips"])
def test_edge_aware_is_the_distance_of_pictures_plus_that_of_their_edges_in_three_channels(
    kind, vgg16, dists_weights, tmp_path
):
    torch.save(vgg16, tmp_path / "vgg16.pth")
    lpips = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    named = {"vgg16": tmp_path / "vgg16.pth", "dists": dists_weights} if kind == "dists" else {"lpips": lpips}
    plain = make_perceptual(PerceptualConfig(kind, **named))
    module = make_perceptual(PerceptualConfig(kind, edges=True, **named))
    assert isinstance(module, EdgeAware)
    assert not isinstance(plain, EdgeAware)
    x, y = pictures()
    edges = plain(sobel_edges(x).repeat(1, 3, 1, 1), sobel_edges(y).repeat(1, 3, 1, 1))
    assert float(edges.min()) > 1e-3
    torch.testing.assert_close(module(x, y), plain(x, y) + edges, rtol=1e-6, atol=1e-7)
    assert not any(p.requires_grad for p in module.parameters())


def test_edge_aware_dists_teaches_a_flat_picture(vgg16, dists_weights, tmp_path):
    torch.save(vgg16, tmp_path / "vgg16.pth")
    module = make_perceptual(PerceptualConfig(vgg16=tmp_path / "vgg16.pth", dists=dists_weights, edges=True))
    flat = torch.full((2, 3, 32, 40), 0.5, requires_grad=True)
    module(flat, pictures()[1]).sum().backward()
    assert flat.grad.isfinite().all()
    assert flat.grad.any()


def test_no_distance_has_no_edges_either():
    assert make_perceptual(PerceptualConfig("none", edges=True)) is None
