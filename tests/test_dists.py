"""DISTS equals its paper's formulae, restated with numpy and scipy on torchvision's VGG16; other files are refused."""

import re

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from scipy.signal import correlate2d
from shared import shared_path
from skimage import data

from restoration.dists import DISTS, load_dists, read_tensors
from training.degradation import compress


@pytest.fixture(scope="module")
def vgg16():
    """torchvision's VGG16 with random weights; the classifier, which DISTS leaves out, is made small."""
    with torch.device("meta"):
        network = torchvision.models.vgg16(weights=None)
    generator = torch.Generator().manual_seed(0)
    network.classifier = torch.nn.Sequential(torch.nn.Linear(1, 1))
    network.features.to_empty(device="cpu")
    for parameter in network.features.parameters():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.1
        parameter.data.normal_(0, scale, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights():
    return shared_path("weights", "dists", "weights.pt")


@pytest.fixture(scope="module")
def dists(vgg16, weights) -> DISTS:
    return load_dists(vgg16.state_dict(), weights)


@pytest.fixture(scope="module")
def pictures():
    """Two clean pictures, and the same as JPEGs, (2, 3, 45, 70): an odd side shows how pooling treats the border."""
    photo = data.astronaut()
    clean = [np.ascontiguousarray(photo[40:85, 100:170]), np.ascontiguousarray(photo[300:345, 200:270])]
    return tuple(torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 255
                 for images in (clean, [compress(image, 10) for image in clean]))  # fmt: skip


def hann_pooling(channel):
    """The root of the average of squares under a Hann window, at every other place; zeros outside."""
    window = np.outer(np.hanning(5)[1:-1], np.hanning(5)[1:-1])
    return np.sqrt(correlate2d(channel**2, window / window.sum(), mode="same")[::2, ::2] + 1e-12)


def feature_maps(vgg16, image):
    """The picture and the maps after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, float64 (C, h, w)."""
    layers = {index: layer.double() for index, layer in enumerate(vgg16.features)
              if isinstance(layer, torch.nn.Conv2d)}  # fmt: skip
    normalized = (image - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[
        :, None, None
    ]
    maps, x = [image], normalized
    for convolutions in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
        if len(maps) > 1:
            x = np.stack([hann_pooling(channel) for channel in x])
        for index in convolutions:
            x = np.maximum(layers[index](torch.from_numpy(x)[None])[0].detach().numpy(), 0)
        maps.append(x)
    return maps


def restated(vgg16, weights, image, reference):
    """1 - the sum over all channels of alpha l + beta s (paper, section 2.3), channel by channel in float64."""
    numbers = torch.load(weights, weights_only=True)
    alpha, beta = numbers["alpha"].double().flatten().numpy(), numbers["beta"].double().flatten().numpy()
    total, position = 0.0, 0
    for x_maps, y_maps in zip(feature_maps(vgg16, image), feature_maps(vgg16, reference), strict=True):
        for x, y in zip(x_maps, y_maps, strict=True):
            covariance = np.cov(x.ravel(), y.ravel(), bias=True)
            luminance = (2 * x.mean() * y.mean() + 1e-6) / (x.mean() ** 2 + y.mean() ** 2 + 1e-6)
            structure = (2 * covariance[0, 1] + 1e-6) / (covariance[0, 0] + covariance[1, 1] + 1e-6)
            total += alpha[position] * luminance + beta[position] * structure
            position += 1
    assert position == 1475
    return 1 - total / (alpha.sum() + beta.sum())


def test_the_distance_is_the_papers_formula_on_torchvisions_vgg16(dists, vgg16, weights, pictures):
    clean, jpeg = pictures
    copy = torchvision.models.vgg16(weights=None)
    copy.features.load_state_dict(vgg16.features.state_dict())
    expected = [restated(copy, weights, x.double().numpy(), y.double().numpy())
                for x, y in zip(jpeg, clean, strict=True)]  # fmt: skip
    assert min(expected) > 1e-3
    assert dists(jpeg, clean).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_equal_pictures_have_no_distance_and_the_order_does_not_matter(dists, pictures):
    clean, jpeg = pictures
    assert dists(clean, clean).abs().max() < 1e-6
    torch.testing.assert_close(dists(clean, jpeg), dists(jpeg, clean), rtol=0, atol=1e-6)


def test_a_stronger_compression_is_further_away(dists, pictures):
    clean, jpeg = pictures
    assert (dists(jpeg, clean) > 2 * dists(clean + (jpeg - clean) / 4, clean)).all()


def test_the_gradient_is_the_slope_of_the_distance(dists, pictures):
    clean, jpeg = pictures
    image = jpeg[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dists(image, clean[:1]).sum(), image)
    assert gradient.isfinite().all()
    direction = gradient / gradient.norm()
    step = 0.01
    slope = (dists(jpeg[:1] + step * direction, clean[:1]) - dists(jpeg[:1] - step * direction, clean[:1])) / (2 * step)
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.01)
    assert not any(parameter.requires_grad for parameter in dists.parameters())


def test_low_precision_around_it_does_not_reach_it(dists, pictures):
    clean, jpeg = pictures
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dists(jpeg, clean)
    assert torch.equal(inside, dists(jpeg, clean))


@pytest.mark.parametrize("shapes", [((1, 3, 32, 32), (1, 3, 32, 33)), ((1, 1, 32, 32),) * 2, ((1, 3, 32, 15),) * 2])
def test_other_pictures_are_refused(dists, shapes):
    with pytest.raises(ValueError, match=r"expected two batches of equal shape \(B,3,H,W\), sides >= 16"):
        dists(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_every_kind_of_file_gives_the_same(dists, vgg16, weights, pictures, tmp_path, suffix):
    path, tensors = tmp_path / f"vgg16{suffix}", vgg16.state_dict()
    if suffix == ".pth":
        torch.save(tensors, path)
    elif suffix == ".safetensors":
        save_file(tensors, path)
    else:
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    assert torch.equal(load_dists(path, weights)(*pictures), dists(*pictures))


def test_wrong_weights_of_vgg16_are_refused(vgg16, weights, tmp_path):
    whole = vgg16.state_dict()
    first, name = "features.0.weight", "features.28.weight"
    for changed, found in (
        ({key: value for key, value in whole.items() if key != name}, f"Missing key.*{re.escape(name)}"),
        ({**whole, first: whole[first][:, :1]}, f"size mismatch for {re.escape(first)}"),
        ({**whole, "features.30.weight": torch.ones(3)}, r"Unexpected key.*features\.30\.weight"),
    ):
        path = tmp_path / "vgg16.safetensors"
        save_file({key: value.contiguous() for key, value in changed.items()}, path)
        with pytest.raises(ValueError, match=f"(?s)vgg16.safetensors are not VGG16's weights.*{found}"):
            load_dists(path, weights)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(None, torch.ones(1475)), (torch.ones(1474), torch.ones(1475)), (torch.ones(1475), -torch.ones(1475)),
     (torch.ones(1475), torch.full((1475,), float("nan"))), (torch.ones(1475, dtype=torch.int64), torch.ones(1475))],
)  # fmt: skip
def test_wrong_weights_of_dists_are_refused(vgg16, tmp_path, alpha, beta):
    torch.save({key: value for key, value in (("alpha", alpha), ("beta", beta)) if value is not None},
               tmp_path / "weights.pt")  # fmt: skip
    with pytest.raises(ValueError, match=r"weights.pt: expected DISTS's own weights, (alpha|beta) of 1475 numbers"):
        load_dists(vgg16.state_dict(), tmp_path / "weights.pt")


class Pickled:
    pass


def test_files_that_are_missing_cut_or_pickled_are_refused_with_a_sentence(tmp_path):
    torch.save({"alpha": Pickled()}, tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    save_file({"alpha": torch.ones(1000)}, tmp_path / "cut.safetensors")
    np.savez(tmp_path / "cut.npz", alpha=np.ones(1000))
    torch.save({"alpha": torch.ones(1000)}, tmp_path / "cut.pt")
    np.savez(tmp_path / "objects.npz", alpha=np.array([Pickled()], dtype=object))
    for path in tmp_path.glob("cut.*"):
        path.write_bytes(path.read_bytes()[:-200])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.npz").write_text("Not Found", encoding="utf-8")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(
            ValueError, match=rf"{path.name}: (not a whole file of tensors|expected tensors by name).*\."
        ):
            read_tensors(path)
    with pytest.raises(ValueError, match=r"absent\.pt: there is no such file"):
        read_tensors(tmp_path / "absent.pt")
