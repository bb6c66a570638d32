"""FID and KID are the closed forms, the formulae pair by pair, and the values of the packages that others use."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from skimage import data

from training.evaluate.distributions import fid, frechet_distance, kid, polynomial_mmd
from training.evaluate.inception import InceptionFeatures, load_inception
from training.evaluate.metrics import MetricFiles, NotMeasuredError, find_metrics


def two_sets(count, other, size, seed=0):
    """Features of two correlated distributions, not negative, as those behind a ReLU."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(size, size)) / np.sqrt(size)
    first, second = (generator.normal(size=(rows, size)) for rows in (count, other))
    return np.maximum(first @ mixing, 0), np.maximum(0.7 * second @ mixing + 0.6, 0)


def covariance(size, seed, rank=None):
    factor = np.random.default_rng(seed).normal(size=(size, rank or 2 * size))
    return factor @ factor.T / factor.shape[1]


def test_distance_of_independent_numbers_is_that_of_their_means_and_deviations():
    mean, other = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    deviation, other_deviation = np.array([1.0, 3.0, 0.0]), np.array([2.0, 0.5, 0.25])
    expected = ((mean - other) ** 2).sum() + ((deviation - other_deviation) ** 2).sum()
    distance = frechet_distance(mean, np.diag(deviation**2), other, np.diag(other_deviation**2))
    assert distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 7, 40])
def test_distance_has_the_trace_of_scipys_matrix_root(size):
    first, second = covariance(size, 1), covariance(size, 2)
    mean, other = np.random.default_rng(3).normal(size=(2, size))
    expected = ((mean - other) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert frechet_distance(mean, first, other, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, second, mean, first) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean, first, mean, first) == pytest.approx(0, abs=1e-9)


def test_singular_covariances_need_no_constant_on_the_diagonal():
    """Two planes in space that share a line: turned into it, the distance is that of two small matrices."""
    mean = np.zeros(3)
    first, second = np.diag([4.0, 1.0, 0.0]), np.diag([9.0, 0.0, 25.0])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    expected = (2 - 3) ** 2 + 1 + 25
    assert frechet_distance(mean, turn @ first @ turn.T, mean, turn @ second @ turn.T) == pytest.approx(expected)


@pytest.mark.parametrize(("count", "other"), [(300, 200), (12, 9), (12, 200)])
def test_fid_of_features_is_that_of_their_means_and_covariances(count, other):
    x, y = two_sets(count, other, 40)
    statistics = [(z.mean(axis=0), np.cov(z, rowvar=False)) for z in (x, y)]
    assert fid(x, y) == pytest.approx(frechet_distance(*statistics[0], *statistics[1]), rel=1e-9)
    assert fid(x, x) == pytest.approx(0, abs=1e-9) and fid(x, y) > 1


def test_kid_is_the_formula_pair_by_pair():
    x, y = two_sets(9, 7, 5)

    def kernel(a, b):
        return (sum(a[i] * b[i] for i in range(5)) / 5 + 1) ** 3

    within = [np.mean([kernel(z[i], z[j]) for i, j in itertools.permutations(range(len(z)), 2)]) for z in (x, y)]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert polynomial_mmd(x, y) == pytest.approx(expected, rel=1e-12)
    assert kid(x, y) == pytest.approx(expected, rel=1e-12)


def test_kid_of_one_distribution_is_zero_on_average_and_also_below():
    """A biased estimate would be above zero each time."""
    generator = np.random.default_rng(0)
    values = [kid(*generator.normal(size=(2, 20, 8))) for _ in range(400)]
    assert min(values) < 0 < max(values)
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / 20)


def test_large_sets_are_compared_by_subsets_that_the_generator_chooses():
    x, y = two_sets(60, 50, 6)
    whole, same = kid(x, y), kid(x, y, subset_size=60)
    assert whole == same
    chosen = [kid(x, y, subsets=30, subset_size=20, generator=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert kid(x, y, subsets=30, subset_size=20) == kid(x, y, subsets=30, subset_size=20)
    assert np.mean(chosen) == pytest.approx(whole, rel=0.2)


def test_no_picture_is_twice_in_a_subset():
    """Then the mean over many subsets is that of the whole sets; a picture beside itself would add its own square."""
    x, y = 3 * np.eye(6), 3 * np.eye(6)[::-1] + 0.5
    values = [kid(x, y, subsets=1, subset_size=4, generator=np.random.default_rng(seed)) for seed in range(400)]
    assert np.mean(values) == pytest.approx(kid(x, y), abs=4 * np.std(values) / 20)


def test_sets_that_do_not_fit_are_refused():
    x, y = two_sets(5, 5, 4)
    for measure, name in ((fid, "FID"), (kid, "KID")):
        with pytest.raises(NotMeasuredError, match=f"{name}: expected sets of at least 2 pictures, got 1, 5"):
            measure(x[:1], y)
        with pytest.raises(ValueError, match=rf"{name}: expected features \(N, D\) and \(M, D\) of one network"):
            measure(x, y[:, :3])
        with pytest.raises(ValueError, match=f"{name}: features are not finite"):
            measure(np.where(x == x.max(), np.nan, x), y)
    with pytest.raises(ValueError, match="at least 1 subset of at least 2 pictures, got 5 of 1"):
        kid(x, y, subsets=5, subset_size=1)
    with pytest.raises(ValueError, match="no negative eigenvalue"):
        frechet_distance(np.zeros(2), np.diag([1.0, -1.0]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="expected a symmetric covariance of 2x2"):
        frechet_distance(np.zeros(2), np.array([[1.0, 2.0], [0.0, 1.0]]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="two means of equal length"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))


OTHERS = (4.753785965672481, 0.46152113747944)
"""FID and KID (one subset of all) of `two_sets(60, 60, 32)`: torch-fidelity 0.4.0 and pyiqa 0.1.16 agree on both.

pytorch-fid 0.3.0, which has no KID, has the same FID.
"""


def test_random_features_have_the_values_of_other_packages():
    x, y = two_sets(60, 60, 32)
    assert (fid(x, y), kid(x, y)) == pytest.approx(OTHERS, rel=1e-9)


def random_inception(seed=0):
    """Weights by torchvision's names with which no layer fades, and the statistics of norms differ."""
    generator = torch.Generator().manual_seed(seed)
    state = InceptionFeatures().network.state_dict()
    for name, tensor in state.items():
        if tensor.dim() == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif tensor.dim():
            tensor.normal_(0, 0.1, generator=generator)
    return state


def picture():
    return torch.from_numpy(np.ascontiguousarray(data.astronaut()[:200, 100:260])).permute(2, 0, 1)[None].float() / 255


PYTORCH_FID = (0.0, 0.01401234, 0.002117972, 1.253382, 0.405153)
"""The first four features, and the mean of all, of `picture` by pytorch-fid 0.3.0 with `random_inception`."""


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The file, and the network that was read from it."""
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file({**random_inception(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path, load_inception(path)


def test_features_are_pytorch_fids(inception):
    features = inception[1](picture())
    assert features.shape == (1, 2048)
    assert [*features[0, :4].tolist(), features.mean().item()] == pytest.approx(PYTORCH_FID, rel=1e-4, abs=1e-6)


def test_features_are_those_of_the_whole_picture_resized(inception):
    """Bilinear without antialiasing: what is between the places that are looked at does not count."""
    large = picture().repeat_interleave(4, dim=-1).repeat_interleave(4, dim=-2)
    other = large.clone()
    other[..., 2, :] = 1 - other[..., 2, :]
    resized = torch.nn.functional.interpolate(large, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(inception[1](large), inception[1](resized), rtol=1e-4, atol=1e-5)
    assert torch.equal(inception[1](large), inception[1](other))


def test_metrics_of_sets_share_one_network(inception):
    metrics = find_metrics(MetricFiles(inception=inception[0]), torch.device("cpu"), wanted=["fid", "kid"])
    distances = {metric.name: metric.distance for metric in metrics.sets}
    assert distances == {"fid": fid, "kid": kid} and not metrics.missing
    first, second = (metric.features for metric in metrics.sets)
    assert first is second
    seen = first(picture())
    assert seen.dtype == np.float64 and seen.tolist() == inception[1](picture())[0].double().tolist()
    with pytest.raises(ValueError, match=r"expected one picture \(1,3,H,W\)"):
        first(picture()[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda state: state.pop("Mixed_7c.branch_pool.conv.weight"), "Missing key"),
     (lambda state: state.update(extra=torch.zeros(3)), "Unexpected key"),
     (lambda state: state.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}), "size mismatch")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, change, words):
    state = InceptionFeatures().network.state_dict()
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors does not hold Inception-v3 of FID\. Give .*: .*{words}"):
        load_inception(tmp_path / "other.safetensors")
