"""What `evaluate` measures with: each metric against other code or published values; what is missing is named."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from shared import shared_path
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restoration.dists import DISTS
from training.degradation import compress
from training.evaluate.alexnet_lpips import AlexNetLPIPS
from training.evaluate.metrics import LABELS, ON_REQUEST, MetricFiles, NotMeasuredError, find_metrics
from training.evaluate.paper_metrics import gaussian_ssim, luma_psnr_b

CPU = torch.device("cpu")
PIXELS = ("psnr", "psnr_y", "ssim", "psnr_b", "bef")


def to_tensor(image):
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def pair():
    """A photograph, uint8 (161, 133, 3), whose sides are no multiples of 8, and its JPEG."""
    clean = np.ascontiguousarray(data.astronaut()[40:201, 100:233])
    return clean, compress(clean, 10)


@pytest.fixture
def no_pyiqa(monkeypatch):
    """As where the optional package is not installed."""
    monkeypatch.setitem(sys.modules, "pyiqa", None)


def by_name(metrics):
    return {metric.name: metric for metric in (*metrics.single, *metrics.sets)}


def matlab_luma(image):
    """Whole levels of uint8 RGB."""
    return np.round(image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16)


def blocking(channel):
    """Yim and Bovik's factor of one channel, by masks."""
    squares = [np.diff(channel, axis=axis) ** 2 for axis in (0, 1)]
    edges = [np.arange(1, channel.shape[axis]) % 8 == 0 for axis in (0, 1)]
    at = np.concatenate([squares[0][edges[0]].ravel(), squares[1][:, edges[1]].ravel()])
    inside = np.concatenate([squares[0][~edges[0]].ravel(), squares[1][:, ~edges[1]].ravel()])
    difference = at.mean() - inside.mean()
    return max(0.0, difference) * np.log2(8) / np.log2(min(channel.shape))


def decibels(error):
    return 10 * np.log10(255**2 / error)


def test_metrics_of_pixels_need_no_files_and_are_those_of_other_code(pair, no_pyiqa):
    clean, jpeg = pair
    metrics = find_metrics(MetricFiles(), CPU)
    measured = {metric.name: metric.measure(to_tensor(jpeg), to_tensor(clean)) for metric in metrics.single}
    assert tuple(measured) == PIXELS
    levels, reference = jpeg.astype(np.float64), clean.astype(np.float64)
    factors = [blocking(levels[..., channel]) for channel in range(3)]
    errors = [np.mean((levels - reference)[..., channel] ** 2) for channel in range(3)]
    weights = np.array([65.481, 128.553, 24.966]) / 255
    assert measured["psnr"] == pytest.approx(peak_signal_noise_ratio(clean, jpeg), abs=1e-4)
    assert measured["psnr_y"] == pytest.approx(decibels(np.mean(((levels - reference) @ weights) ** 2)), abs=1e-3)
    assert measured["ssim"] == pytest.approx(structural_similarity(clean, jpeg, channel_axis=2), abs=2e-6)
    assert measured["bef"] == pytest.approx(np.mean(factors), rel=1e-4)
    expected = np.mean([decibels(error + factor) for error, factor in zip(errors, factors, strict=True)])
    assert measured["psnr_b"] == pytest.approx(expected, abs=1e-3)
    found = by_name(metrics)
    assert [found[name].better for name in PIXELS] == ["higher"] * 4 + ["lower"]
    assert [found[name].reference for name in PIXELS] == [True] * 4 + [False]


def test_measures_of_other_papers_are_those_of_other_code(pair):
    clean, jpeg = pair
    expected = structural_similarity(clean, jpeg, channel_axis=2, gaussian_weights=True, sigma=1.5,
                                     use_sample_covariance=False)  # fmt: skip
    assert gaussian_ssim(to_tensor(jpeg), to_tensor(clean)).item() == pytest.approx(expected, abs=2e-6)
    error = np.mean((jpeg.astype(np.float64) - clean) ** 2)
    expected = decibels(error + blocking(matlab_luma(jpeg)))
    assert luma_psnr_b(to_tensor(jpeg), to_tensor(clean)).item() == pytest.approx(expected, abs=1e-3)
    found = by_name(find_metrics(MetricFiles(), CPU, wanted=ON_REQUEST))
    window = structural_similarity(clean, jpeg, channel_axis=2, win_size=9)
    assert found["ssim_9"].measure(to_tensor(jpeg), to_tensor(clean)) == pytest.approx(window, abs=2e-6)
    batch = torch.cat([to_tensor(jpeg), to_tensor(clean)])
    assert gaussian_ssim(batch, batch.flip(0)).shape == (2,)
    with pytest.raises(ValueError, match="sides >= 11"):
        gaussian_ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_what_is_missing_is_named_with_what_to_give(no_pyiqa):
    metrics = find_metrics(MetricFiles(), CPU)
    reasons = {missing.label: missing.reason for missing in metrics.missing}
    assert not metrics.sets
    assert list(reasons) == [label for name, label in LABELS.items() if name not in (*PIXELS, *ON_REQUEST)]
    assert reasons["LPIPS (SqueezeNet)"] == "give --weights.lpips lpips_squeeze_f32.npz"
    assert "--weights.dists weights.pt" in reasons["DISTS"] and "--weights.vgg16 vgg16" in reasons["DISTS"]
    assert "--weights.niqe" in reasons["NIQE"] and "pip install pyiqa" in reasons["NIQE"]
    assert reasons["MUSIQ"] == reasons["CLIPIQA"] == "install pyiqa (pip install pyiqa)"
    assert reasons["FID"] == reasons["KID"] == "give --weights.inception pt_inception-2015-12-05-6726825d.pth"


def test_only_what_is_wanted_is_found_or_missing(no_pyiqa):
    metrics = find_metrics(MetricFiles(), CPU, wanted=["kid", "ssim_9", "psnr"])
    assert [metric.name for metric in metrics.single] == ["psnr", "ssim_9"]
    assert [missing.label for missing in metrics.missing] == ["KID"]
    also = find_metrics(MetricFiles(), CPU, also=["ssim_9"])
    assert [metric.name for metric in also.single] == ["psnr", "psnr_y", "ssim", "ssim_9", "psnr_b", "bef"]
    with pytest.raises(ValueError, match=r"--metrics: there is no metric musik\. Perhaps you meant musiq\. There are"):
        find_metrics(MetricFiles(), CPU, wanted=["psnr", "musik"])


def test_given_files_are_measured_with_and_wrong_ones_refused(pair, no_pyiqa, tmp_path):
    lpips = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    niqe = shared_path("weights", "niqe", "niqe_pris_params.npz")
    found = by_name(find_metrics(MetricFiles(lpips=lpips, niqe=niqe), CPU))
    assert tuple(found) == (*PIXELS, "lpips_squeeze", "niqe")
    assert not found["niqe"].reference
    photo = to_tensor(data.astronaut()[:200, :300])
    assert found["niqe"].measure(photo, None) == found["niqe"].measure(photo, 1 - photo)
    half = find_metrics(MetricFiles(lpips_alex=lpips, vgg16=lpips), CPU, wanted=["lpips_alex", "dists"])
    assert [missing.reason[:9] for missing in half.missing] == ["give both"] * 2
    for field, file in (("lpips", niqe), ("niqe", lpips), ("inception", lpips)):
        with pytest.raises(ValueError, match=file.name):
            find_metrics(MetricFiles(**{field: file}), CPU)
    with pytest.raises(ValueError, match=r"absent\.pth: there is no such file"):
        find_metrics(MetricFiles(inception=tmp_path / "absent.pth"), CPU)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("page.npz", b"<!doctype html><html>404</html>", "it is a web page"),
        ("page.pth", b"\n<html>404</html>", "it is a web page"),
        ("empty.npz", b"", "it is empty"),
        ("empty.pth", b"", "it is empty"),
        ("text.npz", b"Not Found", "it holds something else"),
        ("text.pth", b"Not Found", "it holds something else"),
        ("objects.npz", {"mu_pris_param": np.array([object()])}, "it holds something else"),
        ("words.npz", {"mu_pris_param": np.array(["word"])}, "can't convert"),
    ],
)
@pytest.mark.parametrize("field", ["lpips", "niqe", "inception"])
def test_files_that_hold_no_weights_are_named_and_not_to_be_trusted(field, name, content, said, tmp_path, no_pyiqa):
    """The advice of numpy and torch to load pickled objects all the same is not passed on: they may run any code."""
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.savez(tmp_path / name, **content)
    with pytest.raises(
        ValueError, match=rf"{name}: not a whole file of tensors \({said}.*\. Download it again"
    ) as caught:
        find_metrics(MetricFiles(**{field: tmp_path / name}), CPU)
    words = str(caught.value)
    assert "\n" not in words and not any(word in words.lower() for word in ("trust", "unsafe", "allow_pickle"))


def test_weights_of_something_else_are_told_with_the_file_to_give(tmp_path, no_pyiqa):
    torch.save({"lin0.model.1.weight": torch.ones(1, 64, 1, 1)}, tmp_path / "alex.pth")
    words = r"alex\.pth does not hold the weights of LPIPS with SqueezeNet 1\.1\. Give lpips_squeeze_f32\.npz: "
    with pytest.raises(ValueError, match=words) as caught:
        find_metrics(MetricFiles(lpips=tmp_path / "alex.pth"), CPU)
    assert "\n" not in str(caught.value)


def test_blockiness_is_named_as_what_it_is_beside_driftrecs_table(pair):
    """torchjpeg, with which DriftRec measured, sums over the channels: of RGB three times our mean."""
    bef = by_name(find_metrics(MetricFiles(), CPU, wanted=["bef"]))["bef"]
    assert "mean of the RGB channels" in bef.variant and "sum of the channels, times 1e4" in bef.variant
    picture = pair[1].astype(np.float64) / 255
    torchjpegs = sum(blocking(picture[..., channel]) for channel in range(3))
    assert bef.measure(to_tensor(pair[1]), None) == pytest.approx(torchjpegs / 3 * 255**2, rel=1e-4)


def test_a_picture_that_says_nothing_is_left_out_with_a_sentence(pair):
    lpips = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    niqe = shared_path("weights", "niqe", "niqe_pris_params.npz")
    found = by_name(find_metrics(MetricFiles(lpips=lpips, niqe=niqe), CPU))
    small, photo = torch.zeros(1, 3, 6, 40), to_tensor(pair[0])
    for name in ("ssim", "psnr_b", "bef", "lpips_squeeze", "niqe"):
        with pytest.raises(NotMeasuredError, match=f"^{LABELS[name].split()[0]}"):
            found[name].measure(small, 1 - small)
    with pytest.raises(NotMeasuredError, match=r"^PSNR is inf: the picture equals the clean one"):
        found["psnr"].measure(photo, photo)
    with pytest.raises(NotMeasuredError, match=r"^NIQE: expected at least 4 blocks .* the rest is flat"):
        found["niqe"].measure(torch.full((1, 3, 300, 300), 0.5), None)


def test_wrong_shapes_are_mistakes_and_no_reason_to_leave_a_picture_out(pair):
    found = by_name(find_metrics(MetricFiles(), CPU, wanted=["psnr", "bef"]))
    photo = to_tensor(pair[0])
    for metric, arguments, words in (
        ("psnr", (photo, None), "PSNR: expected the clean picture as well"),
        ("psnr", (photo, photo[..., 1:]), "PSNR: expected the clean picture to have the same size"),
        ("bef", (torch.cat([photo, photo]), None), r"BEF: expected one picture \(1,3,H,W\), got \(2, 3,"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            found[metric].measure(*arguments)
        assert not isinstance(caught.value, NotMeasuredError)


def crops():
    """Two photographs (1,3,H,W), and their JPEGs of quality 10 and 30."""
    photo = data.astronaut()
    clean = [np.ascontiguousarray(photo[40:201, 100:233]), np.ascontiguousarray(photo[300:364, 200:281])]
    return [(to_tensor(compress(image, quality)), to_tensor(image))
            for image, quality in zip(clean, (10, 30), strict=True)]  # fmt: skip


LPIPS_SQUEEZE = (0.3458006978, 0.0660801902)
"""lpips 0.1.4, net="squeeze" with the same weights, normalize=True, of `crops`."""


def test_lpips_is_that_of_its_authors_package():
    path = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    metric = by_name(find_metrics(MetricFiles(lpips=path), CPU, wanted=["lpips_squeeze"]))["lpips_squeeze"]
    assert [metric.measure(*pair) for pair in crops()] == pytest.approx(LPIPS_SQUEEZE, rel=1e-4)


def random_features(network):
    """Weights by torchvision's names."""
    generator = torch.Generator().manual_seed(0)
    return {f"features.{name}": torch.empty_like(tensor).normal_(
                0, (2 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1, generator=generator)
            for name, tensor in network.features.state_dict().items()}  # fmt: skip


LPIPS_ALEX = (0.0067458851, 0.0062888721)
"""lpips 0.1.4 and pyiqa 0.1.16, net="alex" with the authors' heads on `random_features`, of `crops`."""


def test_lpips_with_alexnet_is_that_of_its_authors_package(tmp_path, no_pyiqa):
    heads = shared_path("weights", "lpips_heads", "v0.1", "alex.pth")
    alexnet = {**random_features(AlexNetLPIPS()), "classifier.1.weight": torch.zeros(2, 2)}
    torch.save(alexnet, tmp_path / "alexnet.pth")
    files = MetricFiles(lpips_alex=heads, alexnet=tmp_path / "alexnet.pth")
    metric = by_name(find_metrics(files, CPU, wanted=["lpips_alex"]))["lpips_alex"]
    assert [metric.measure(*pair) for pair in crops()] == pytest.approx(LPIPS_ALEX, rel=1e-4)
    assert metric.measure(crops()[0][0], crops()[0][0]) == 0
    smallest = crops()[0][0][..., :31, :31]
    assert metric.measure(smallest, 1 - smallest) > 0
    with pytest.raises(NotMeasuredError, match=r"LPIPS \(AlexNet\): expected two batches .* sides >= 31"):
        metric.measure(smallest[..., :30], smallest[..., :30])
    with pytest.raises(ValueError, match=r"alex\.pth and .*alexnet\.pth are not AlexNet and its heads"):
        find_metrics(MetricFiles(lpips_alex=tmp_path / "alexnet.pth", alexnet=heads), CPU, wanted=["lpips_alex"])


DISTS_VALUES = (0.0041992068, 0.0032905936)
"""pyiqa 0.1.16's DISTS with the authors' alpha and beta on `random_features`, of `crops`."""


def test_dists_is_pyiqas(tmp_path, no_pyiqa):
    weights = shared_path("weights", "dists", "weights.pt")
    torch.save(random_features(DISTS()), tmp_path / "vgg16.pth")
    metric = by_name(find_metrics(MetricFiles(dists=weights, vgg16=tmp_path / "vgg16.pth"), CPU))["dists"]
    assert [metric.measure(*pair) for pair in crops()] == pytest.approx(DISTS_VALUES, rel=1e-3)


NIQE_VALUES = {"bikes": 2.92718, "stream": 2.05673, "sailing1": 2.92824, "cemetry": 2.33823}
"""pyiqa 0.1.16's niqe() of the `studio_luma` of pictures of LIVE1, in whole levels, with the same model.

In flat blocks, which these have not got, it counts rounding errors as values: 0.06 more for skimage's astronaut, 0.2
more for its JPEG of quality 10. pyiqa's metric itself takes another luma, that of YIQ.
"""


@pytest.mark.parametrize("name", NIQE_VALUES)
def test_niqe_is_pyiqas(name):
    picture = Image.open(shared_path("data", "eval", "LIVE1") / f"{name}.webp").convert("RGB")
    files = MetricFiles(niqe=shared_path("weights", "niqe", "niqe_pris_params.npz"))
    metric = by_name(find_metrics(files, CPU, wanted=["niqe"]))["niqe"]
    assert metric.measure(to_tensor(np.array(picture)), None) == pytest.approx(NIQE_VALUES[name], abs=5e-4)


FBCNN_TABLE = {10: (25.69, 0.743, 24.20), 20: (28.06, 0.826, 26.49), 30: (29.37, 0.861, 27.84)}
"""PSNR, SSIM and PSNR-B of LIVE1's JPEGs of these qualities in colour (FBCNN, Jiang et al. 2021, Table 3)."""


@pytest.mark.parametrize("quality", [10, *(pytest.param(quality, marks=pytest.mark.slow) for quality in (20, 30))])
def test_live1_jpegs_have_the_published_values(quality):
    """4:2:0; its PSNR-B counts pairs of neighbours a little otherwise where sides are no multiples of 8."""
    metrics = by_name(find_metrics(MetricFiles(), CPU, wanted=["psnr", "ssim_gauss", "psnr_b_luma"]))
    values = []
    for path in sorted(shared_path("data", "eval", "LIVE1").glob("*.webp")):
        clean = np.array(Image.open(path).convert("RGB"))
        pair = to_tensor(compress(clean, quality)), to_tensor(clean)
        values.append([metrics[name].measure(*pair) for name in ("psnr", "ssim_gauss", "psnr_b_luma")])
    assert len(values) == 29
    mean = np.mean(values, axis=0)
    assert (np.abs(mean - FBCNN_TABLE[quality]) < (0.005, 0.0006, 0.01)).all()
