"""DDRM from JPEG files to pictures: sizes, samples in batches, tiles, memory, progress, interruption, odd files."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor, nn

from restoration.compute import Compute
from restoration.diffusion.prior import DiffusionPrior, NoiseSchedule
from restoration.jpeg import JPEGData, JPEGError, read_jpeg
from restoration.jpeg.cells import QuantizationCells
from restoration.measurements import BitDepthMeasurement, PaperJPEGMeasurement
from restoration.prior_pipeline import MEASUREMENTS, DDRMSettings, restore_ddrm
from restoration.tiling import Tiler
from tests.shared import shared_path

FAST = {"steps": 3, "samples": 2}


class Smoother(nn.Module):
    """Predicts that the clean picture is a blur of the noisy one: convolutions that reach 2 pixels, nothing else."""

    def __init__(self, limit: int = 0, classes: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(size_multiple=4, classes=classes, out_channels=3)
        self.limit, self.calls = limit, []
        self.register_buffer("kernel", torch.full((3, 1, 5, 5), 1 / 25))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        self.calls.append((*x.shape, float(timesteps[0]), None if labels is None else labels.tolist()))
        if self.limit and x.shape[0] * x.shape[-1] * x.shape[-2] > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        abar = float(NoiseSchedule().alphas_cumprod()[int(timesteps[0])])
        blurred = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), self.kernel, groups=3)
        return (x - blurred) / (1 - abar) ** 0.5


class Positional(Smoother):
    """Predicts what depends on the place in its input: a ramp from its left to its right border."""

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x, timesteps) + torch.linspace(-0.5, 0.5, x.shape[-1])


def prior(network: nn.Module | None = None, **options) -> DiffusionPrior:
    return DiffusionPrior(network or Smoother(), NoiseSchedule(), **options)


def jpeg(height: int = 40, width: int = 56, quality: int = 10, **options) -> JPEGData:
    levels = np.ascontiguousarray(np.resize(data.astronaut(), (max(height, 512), max(width, 512), 3)))
    levels = levels[20 : 20 + height, 150 : 150 + width] if max(height, width) < 350 else levels[:height, :width]
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality, **options)
    return read_jpeg(buffer.getvalue(), name=f"{width}x{height}.jpg")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def agreement_in_8_bits(restored: Tensor, file: JPEGData) -> float:
    """The fraction of the file's coefficients that libjpeg makes again of the restored picture."""
    buffer = io.BytesIO()
    levels = (restored[0] * 255).round().byte().movedim(0, -1).numpy()
    tables = [table.flatten().tolist() for table in file.tables[:2]]
    Image.fromarray(levels).save(
        buffer, "JPEG", qtables=tables, subsampling={"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}[file.subsampling]
    )
    again = read_jpeg(buffer.getvalue(), name="again.jpg").coefficients.planes
    same = [(one == other).float().flatten() for one, other in zip(file.coefficients.planes, again, strict=True)]
    return float(torch.cat(same).mean())


@pytest.mark.parametrize("measurement", ["soft", "projection", "shift"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_the_result_compresses_to_the_file_again(measurement, subsampling):
    """An average of samples at quality 10: every coefficient, through libjpeg; not so without `consistency`."""
    file = jpeg(64, 96, subsampling=subsampling)
    settings = DDRMSettings(measurement=measurement, **FAST)
    assert agreement_in_8_bits(restore_ddrm(prior(), [file], settings), file) == 1.0
    free = restore_ddrm(prior(), [file], DDRMSettings(measurement=measurement, consistency=0.0, **FAST))
    assert agreement_in_8_bits(free, file) < 1.0


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 33), (16, 16), (50, 21)])
@pytest.mark.parametrize("measurement", ["soft", "projection", "shift"])
def test_any_size_comes_back_in_range_and_in_whole_levels(height, width, measurement):
    restored = restore_ddrm(prior(), [jpeg(height, width)], DDRMSettings(measurement=measurement, **FAST))
    assert restored.shape == (1, 3, height, width) and restored.dtype == torch.float32
    levels = restored * 255
    assert (levels - levels.round()).abs().max() < 1e-4 and levels.min() >= 0 and levels.max() <= 255


def test_a_picture_does_not_depend_on_its_batch():
    files, settings = [jpeg(quality=quality) for quality in (5, 10, 30)], DDRMSettings(seed=3, **FAST)
    together = restore_ddrm(prior(), files, settings)
    assert torch.equal(together[2:], restore_ddrm(prior(), files[2:], settings))


def test_the_seed_alone_decides():
    file, before = jpeg(), torch.get_rng_state()
    first, again, other = (
        restore_ddrm(prior(), [file], DDRMSettings(seed=seed, samples=1, steps=3, measurement="shift", consistency=0.0))
        for seed in (1, 1, 2**64 - 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
def test_the_number_of_samples_at_once_changes_nothing_but_the_calls(at_once):
    network = Smoother()
    found = restore_ddrm(prior(network), [jpeg()], DDRMSettings(steps=3, samples=5), samples_at_once=at_once)
    expected = restore_ddrm(prior(), [jpeg()], DDRMSettings(steps=3, samples=5), samples_at_once=1)
    assert (found - expected).abs().max() < 1e-5
    assert len(network.calls) == 3 * -(-5 // at_once) and network.calls[0][0] == min(at_once, 5)


def test_samples_are_averaged_after_clipping():
    """Against sampling one by one; the first sample does not depend on how many follow."""
    file, settings = jpeg(), {"steps": 3, "measurement": "shift", "consistency": 0.0}
    both = restore_ddrm(prior(), [file], DDRMSettings(samples=2, **settings))
    first = restore_ddrm(prior(), [file], DDRMSettings(samples=1, **settings))
    heard = []
    restore_ddrm(prior(), [file], DDRMSettings(samples=2, **settings), on_progress=heard.append)
    assert not torch.equal(both, first)
    finals = [one.preview for one in heard if one.preview is not None and one.fraction == heard[-1].fraction * 0.98 / 2]
    assert torch.allclose(finals[-1], first, atol=0.51 / 255)


def test_strength_blends_with_the_decoded_file_before_it_is_held_to_it():
    """0 is the file's decode, 1 what no strength gives, and in between levels lie in between."""
    source = jpeg(quality=30)
    free = {"consistency": 0.0, **FAST}
    none, half, full = (restore_ddrm(prior(), [source], DDRMSettings(strength=s, **free)) for s in (0.0, 0.5, 1.0))
    assert (none - QuantizationCells(source).decoded()).abs().max() < 0.6 / 255
    assert torch.equal(full, restore_ddrm(prior(), [source], DDRMSettings(**free)))
    assert (half - (none + full) / 2).abs().max() < 1.1 / 255 and not torch.equal(none, full)


def test_more_samples_come_closer_to_their_mean():
    file, settings = jpeg(), {"steps": 3, "measurement": "shift", "consistency": 0.0}
    many = restore_ddrm(prior(), [file], DDRMSettings(samples=64, seed=9, **settings))
    errors = [
        float((restore_ddrm(prior(), [file], DDRMSettings(samples=count, **settings)) - many).square().mean())
        for count in (1, 8)
    ]
    assert errors[1] < 0.4 * errors[0]


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measurement", ["soft", "projection", "shift"])
def test_tiles_equal_the_whole_where_the_network_reaches_little(measurement):
    """Convolutions that reach 2 pixels: with an overlap of 32 only the blend's faintest weights see a border."""
    file = jpeg(160, 200)
    settings = DDRMSettings(measurement=measurement, eta_b=0.4, steps=5, samples=1, consistency=0.0)
    whole, tiled = (
        restore_ddrm(prior(), [file], settings, compute=Compute(tiler=Tiler(tile, overlap=32))) for tile in (0, 96)
    )
    assert ((tiled - whole).abs() * 255).mean() < 0.2
    if measurement != "shift":  # which moves by whole steps, so that a hair decides
        assert (tiled - whole).abs().max() * 255 <= 3


def test_tiles_leave_no_seams_even_where_the_network_depends_on_the_place():
    """Each tile predicts a ramp; what is blended has no steps at the tiles' borders, only what the ramps add up to."""
    file, network = jpeg(96, 352, quality=90), Positional()
    settings = DDRMSettings(steps=4, samples=1, consistency=0.0, eta_b=0.0)
    compute = Compute(tiler=Tiler(128, overlap=64))
    flat = restore_ddrm(prior(), [file], settings, compute=compute)
    ramps = restore_ddrm(prior(network), [file], settings, compute=compute) - flat
    column = ramps.mean((0, 1, 2))
    assert column.max() - column.min() > 0.1, "the ramps have no effect, so this test shows nothing"
    assert column.diff().abs().max() < 0.15 * (column.max() - column.min())
    assert {call[2:4] for call in network.calls} == {(96, 128)}


def test_the_default_tile_is_the_priors():
    network = Smoother()
    restore_ddrm(prior(network, tile=64), [jpeg(80, 150)], DDRMSettings(steps=1, samples=1))
    assert {call[2:4] for call in network.calls} == {(64, 64)}


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_prior_sees_no_other_size_than_the_one_that_it_was_trained_on() -> None:
    """Also where smaller tiles would cover the picture; one that takes any size saves what would be computed twice."""
    sizes = []
    for own in (64, 0):
        network = Smoother()
        compute = Compute(tiler=Tiler(64, 16))
        restore_ddrm(prior(network, tile=own), [jpeg(64, 80)], DDRMSettings(**FAST), compute=compute)
        sizes.append({call[2:4] for call in network.calls})
    assert sizes == [{(64, 64)}, {(64, 48)}]


def test_fewer_samples_run_at_once_before_tiles_become_smaller():
    """Memory for two samples of a whole picture: 8 becomes 2, and the picture stays whole."""
    network, released = Smoother(limit=2 * 64 * 64), []
    tiler = Tiler(0, release=lambda: released.append(True))
    settings = DDRMSettings(steps=2, samples=8)
    found = restore_ddrm(prior(network), [jpeg(64, 64)], settings, compute=Compute(tiler=tiler), samples_at_once=8)
    assert [call[0] for call in network.calls] == [8, 4, *[2] * 8]
    assert {call[2:4] for call in network.calls} == {(64, 64)} and tiler.tile == 0 and len(released) == 2
    assert torch.equal(found, restore_ddrm(prior(), [jpeg(64, 64)], settings))


def test_then_tiles_become_smaller():
    """Memory for a tile of 128 pixels of one sample."""
    network = Smoother(limit=128 * 128)
    tiler = Tiler(0, overlap=32)
    settings = DDRMSettings(steps=2, samples=2)
    restore_ddrm(prior(network), [jpeg(256, 256)], settings, compute=Compute(tiler=tiler), samples_at_once=2)
    assert [call[0] for call in network.calls][:2] == [2, 1] and tiler.tile == 128
    assert network.calls[-1][:4] == (1, 3, 112, 112)  # nine tiles as small as they may be


def test_the_error_comes_out_where_nothing_helps():
    with pytest.raises(torch.OutOfMemoryError):
        restore_ddrm(prior(Smoother(limit=100)), [jpeg()], DDRMSettings(**FAST), samples_at_once=2)


def test_the_state_goes_to_main_memory_when_the_device_is_full(monkeypatch):
    """A device (here: one that takes no more than the network) whose memory the sampler's state does not fit into."""
    homes, shrunk = [], restore_ddrm.__globals__["_Picture"]._sampled

    def sampled(self, numbers, home):
        homes.append((len(numbers), home.type))
        if home.type != "cpu":
            raise torch.OutOfMemoryError("out of memory")
        self.compute = Compute(tiler=self.compute.tiler)
        return shrunk(self, numbers, home)

    monkeypatch.setattr(restore_ddrm.__globals__["_Picture"], "_sampled", sampled)
    compute = Compute(device=torch.device("meta"))
    restored = restore_ddrm(prior(), [jpeg()], DDRMSettings(**FAST), compute=compute, samples_at_once=2)
    assert homes == [(2, "meta"), (1, "meta"), (1, "cpu"), (1, "cpu")] and restored.isfinite().all()


# --- progress and interruption ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_progress_rises_to_one_with_previews_of_the_pictures_size(at_once):
    heard = []
    files = [jpeg(40, 150), jpeg(40, 150, quality=30)]
    settings = DDRMSettings(steps=4, samples=3)
    compute = Compute(tiler=Tiler(64, overlap=16))
    restore_ddrm(prior(), files, settings, compute=compute, samples_at_once=at_once, on_progress=heard.append)
    fractions = [progress.fraction for progress in heard]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and fractions.count(1.0) == 1
    previews = [progress.preview for progress in heard if progress.preview is not None]
    assert len(previews) >= 2 * 4 * -(-3 // at_once)
    assert {tuple(preview.shape) for preview in previews} == {(1, 3, 40, 150)}
    assert float(previews[-1].max()) <= 1 and float(previews[-1].min()) >= 0


def test_progress_never_falls_when_a_batch_starts_again():
    heard, network = [], Smoother()
    forward, calls = network.forward, []

    def failing(x, timesteps, labels=None):
        calls.append(len(x))
        if len(calls) == 3 and len(x) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(x, timesteps, labels)

    network.forward = failing
    settings = DDRMSettings(steps=4, samples=4)
    restore_ddrm(prior(network), [jpeg()], settings, samples_at_once=4, on_progress=heard.append)
    fractions = [progress.fraction for progress in heard]
    assert calls[:4] == [4, 4, 4, 2] and fractions == sorted(fractions)


def test_interruption_stops_at_the_next_tile():
    class StopError(Exception):
        pass

    network, checks = Smoother(), []

    def check() -> None:
        checks.append(True)
        if len(checks) == 2:
            raise StopError

    with pytest.raises(StopError):
        restore_ddrm(prior(network), [jpeg()], DDRMSettings(), compute=Compute(check=check))
    assert len(network.calls) == 2


# --- settings and sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measurement": "clamp"}, "measurement of soft, projection, shift, paper, got 'clamp'"),
        ({"samples": 0}, "at least 1 sample"),
        ({"steps": 0}, "1 to 300 steps"),
        ({"steps": 40, "start": 30}, "1 to 30 steps.*got 40"),
        ({"eta": 2.0}, "eta between 0 and 1"),
        ({"eta_b": 1.1}, "eta_b between 0 and 1"),
        ({"consistency": -0.1}, "consistency between 0 and 1"),
        ({"strength": 1.5}, "strength between 0 and 1"),
    ],
)
def test_settings_are_checked_in_words(options, said):
    with pytest.raises(ValueError, match=said):
        DDRMSettings(**options)


def test_a_start_beyond_the_training_is_refused_in_words():
    """285 is the first timestep of 20 from 300; the prior may be trained up to there."""
    restore_ddrm(prior(max_timestep=285), [jpeg()], DDRMSettings(samples=1))
    with pytest.raises(ValueError, match=r"timesteps up to 284.*start 300 with 20 steps begins at 285\. Lower start"):
        restore_ddrm(prior(max_timestep=284), [jpeg()], DDRMSettings(samples=1))


def test_classes_have_to_be_known():
    told = prior(network := Smoother(classes=10))
    restore_ddrm(told, [jpeg()], DDRMSettings(label=7, **FAST), samples_at_once=2)
    assert network.calls[0][-1] == [7, 7]
    for label, model, said in ((None, told, "trained on 10 classes"), (10, told, "0 to 9"), (3, prior(), "no classes")):
        with pytest.raises(ValueError, match=said):
            restore_ddrm(model, [jpeg()], DDRMSettings(label=label, **FAST))


def test_pictures_of_several_sizes_are_refused_in_words():
    with pytest.raises(ValueError, match=r"one size, got 56x40, 60x40"):
        restore_ddrm(prior(), [jpeg(40, 56), jpeg(40, 60)], DDRMSettings())
    with pytest.raises(ValueError, match="one size, got none"):
        restore_ddrm(prior(), [], DDRMSettings())


def test_a_network_that_returns_no_numbers_is_named_at_once():
    """After its first evaluation, not after all of them."""

    class Broken(Smoother):
        def forward(self, x, timesteps, labels=None):
            self.calls.append(x.shape)
            return x * float("nan")

    network = Broken()
    with pytest.raises(ValueError, match="no number"):
        restore_ddrm(prior(network), [jpeg()], DDRMSettings(steps=5))
    assert len(network.calls) == 1


def test_a_file_that_the_paper_cannot_stand_for_is_refused_before_any_is_restored():
    network, files = Smoother(), [jpeg(32, 32), jpeg(32, 32, subsampling="4:4:4")]
    with pytest.raises(ValueError, match="measurement soft"):
        restore_ddrm(prior(network), files, DDRMSettings(measurement="paper", **FAST))
    assert not network.calls


def test_other_measurements_are_restored_as_well():
    """Few bits a channel, and a clean picture that the authors' operator compresses."""
    clean = torch.from_numpy(data.astronaut()[20:84, 150:214] / 255).float().movedim(-1, 0)[None]
    bits = BitDepthMeasurement(clean, 3)
    restored = restore_ddrm(prior(), [bits], DDRMSettings(eta_b=0.4, **FAST))
    assert torch.allclose(BitDepthMeasurement(restored, 3).observed, bits.observed)
    simulated = restore_ddrm(prior(), [PaperJPEGMeasurement.simulate(clean, 10)], DDRMSettings(measurement="paper"))
    assert (simulated - clean).abs().mean() < 0.1


def test_paper_runs_on_the_files_that_it_knows_and_refuses_others():
    restored = restore_ddrm(prior(), [jpeg(64, 64)], DDRMSettings(measurement="paper", **FAST))
    assert restored.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="multiple of 16, got 56x40"):
        restore_ddrm(prior(), [jpeg()], DDRMSettings(measurement="paper", **FAST))


def torture_files() -> list:
    return sorted(path for path in shared_path("data", "torture").iterdir() if path.suffix not in (".md", ".tsv"))


def test_every_odd_file_is_restored_or_refused_in_words():
    """Files of other decoders' tests: what can be read is restored at its size, upright, and close to its decode."""
    restored = refused = 0
    for path in torture_files():
        try:
            file = read_jpeg(path)
        except JPEGError as error:
            assert path.name in str(error)
            refused += 1
            continue
        if file.width * file.height > 100_000:
            continue  # nothing odd about being large; tiles are tested above
        found = restore_ddrm(prior(), [file], DDRMSettings(steps=1, samples=1, closed_loop=False))
        assert found.shape[-2:] == (file.upright_height, file.upright_width) and found.isfinite().all(), path.name
        cells = QuantizationCells(file)  # damaged files hold coefficients far beyond any picture's
        reachable = min(cells.agreement(cells.decoded(), tolerance=1.0), 0.98)
        if min(file.width, file.height) >= 16:  # of a block that is filled in part one step corrects a part
            assert cells.agreement(found, tolerance=1.0) > reachable - 0.06, path.name
        restored += 1
    assert restored >= 38 and refused >= 25


def test_every_measurement_of_the_list_runs():
    for measurement in MEASUREMENTS:
        assert restore_ddrm(prior(), [jpeg(32, 32)], DDRMSettings(measurement=measurement, **FAST)).isfinite().all()
