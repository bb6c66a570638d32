"""SODiff's part of a restorer file as networks: prompts, timesteps and qualities of images, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from restoration.calibration import Calibration
from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from restoration.networks.saipe import SAIPE
from restoration.networks.timestep_predictor import TimestepPredictor, expected_timestep
from restoration.pipelines import Compute, embed_with_saipe, predict_timesteps
from restoration.prompts import QualityEstimator, SAIPEPrompt
from restoration.restorer_file import RestorerFile, RestorerFileError, RestorerMetadata
from restoration.restorers import build_restorer, load_weights
from restoration.tiling import Tiler
from tests.reduced_sd21 import CALIBRATION, TINY_PREDICTOR, TINY_SAIPE, predictor_tensors, saipe_tensors

LORA = {"rank": 2, "alpha": 1.0}
CONFIG = {
    "saipe": TINY_SAIPE.to_dict(), "timestep_predictor": TINY_PREDICTOR.to_dict(), "timestep": None,
    "calibration": CALIBRATION, "context_dim": 1024, "unet_lora": LORA,
}  # fmt: skip
TABLE = Calibration(tuple(CALIBRATION["qualities"]), tuple(CALIBRATION["timesteps"]))


def images(count: int, height: int = 70, width: int = 100, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def predictor() -> TimestepPredictor:
    network = TimestepPredictor(TINY_PREDICTOR)
    network.load_state_dict(predictor_tensors(TINY_PREDICTOR, torch.Generator().manual_seed(0)))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompt() -> SAIPEPrompt:
    network = SAIPE(TINY_SAIPE)
    network.load_state_dict(saipe_tensors(TINY_SAIPE, torch.Generator().manual_seed(0)))
    return SAIPEPrompt(network).eval().requires_grad_(False)


def test_each_image_is_seen_on_its_own_and_progress_ends_at_one(prompt) -> None:
    """Prompts and reconstructions of a batch are those of its images; the reconstruction is clipped to [0, 1]."""
    heard = []
    tokens, seen = embed_with_saipe(prompt, images(3), on_progress=heard.append)
    assert tuple(tokens.shape) == (3, 77, 1024) and tuple(seen.shape) == (3, 3, 70, 100)
    alone, _ = embed_with_saipe(prompt, images(3)[1:2])
    assert torch.allclose(tokens[1:2], alone, atol=1e-5)
    assert [one.fraction for one in heard] == pytest.approx([1 / 3, 2 / 3, 1.0])
    reconstruction, _ = prompt.network(images(3))
    assert torch.allclose(seen, reconstruction.clamp(0, 1), atol=1e-5)
    far = images(1) * 0 + torch.tensor([0.0, 1.0, 0.5])[None, :, None, None]
    assert 0 <= float(embed_with_saipe(prompt, far)[1].min()) <= float(embed_with_saipe(prompt, far)[1].max()) <= 1


def test_timesteps_are_the_expectation_without_noise_in_tiles_too(predictor) -> None:
    quality, logits = predictor(images(2, 200, 300))
    timesteps, seen = predict_timesteps(predictor, images(2, 200, 300))
    assert timesteps is not None and timesteps.dtype == torch.float32
    weights = logits.double().softmax(-1)
    expected = (weights * torch.arange(1000, dtype=torch.float64)).sum(-1)
    assert torch.allclose(timesteps.double(), expected, atol=1e-2) and torch.allclose(seen, quality, atol=1e-3)
    tiled, _ = predict_timesteps(predictor, images(2, 200, 300), compute=Compute(tiler=Tiler(64)))
    assert tiled is not None and torch.allclose(tiled, timesteps, atol=1e-2)


def test_a_given_quality_moves_the_timestep_along_the_table(predictor) -> None:
    """By the table's difference, from what is seen: that quality itself moves nothing, -1 keeps what is seen."""
    photos = images(4, 64, 64)
    plain, seen = predict_timesteps(predictor, photos, calibration=TABLE)
    assert plain is not None
    wanted = torch.tensor([-1.0, 60.0, 10.0, float(seen[3])])
    moved, taken = predict_timesteps(predictor, photos, calibration=TABLE, quality=wanted)
    assert moved is not None
    x, y = CALIBRATION["qualities"], CALIBRATION["timesteps"]
    for i in (1, 2, 3):
        shift = _interpolated(float(wanted[i]), x, y) - _interpolated(float(seen[i]), x, y)
        assert float(moved[i]) == pytest.approx(min(max(float(plain[i]) + shift, 0), 999), abs=1e-2)
    assert moved[0] == plain[0] and moved[3] == pytest.approx(float(plain[3]), abs=1e-2)
    assert taken.tolist() == pytest.approx([float(seen[0]), 60.0, 10.0, float(seen[3])])


def _interpolated(value: float, x: list[float], y: list[float]) -> float:
    import numpy as np

    return float(np.interp(value, x, y))


def test_the_test_predictor_tells_qualities_apart(predictor) -> None:
    """What the graph tests rest on: of a photo, lower quality is seen lower and gets another timestep."""
    from skimage import data

    photo = torch.from_numpy(data.astronaut()[20:148, 100:228].copy()).movedim(-1, 0).float() / 255
    each = [read_jpeg_and_pixels(encode_with_pillow(photo, quality))[1] for quality in (5, 50, 90)]
    timesteps, qualities = predict_timesteps(predictor, torch.stack(each))
    assert timesteps is not None and qualities.diff().min() > 10 and float(timesteps[0] - timesteps[1]) > 50


def test_running_out_of_memory_makes_tiles_smaller_and_changes_nothing(predictor, monkeypatch) -> None:
    expected, _ = predict_timesteps(predictor, images(1, 512, 300))
    features, sizes, released = predictor._features, [], []

    def short(x: Tensor) -> Tensor:
        sizes.append(x.shape[-1] * x.shape[-2])
        if sizes[-1] > 250 * 250:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (simulated)")
        return features(x)

    monkeypatch.setattr(predictor, "_features", short)
    compute = Compute(tiler=Tiler(release=lambda: released.append(1)))
    timesteps, _ = predict_timesteps(predictor, images(1, 512, 300), compute=compute)
    assert expected is not None and timesteps is not None
    assert torch.allclose(timesteps, expected, atol=1e-2) and released and max(sizes) > 250 * 250


def test_interruptions_come_through(prompt, predictor) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    for function, network in ((embed_with_saipe, prompt), (predict_timesteps, predictor)):
        with pytest.raises(KeyboardInterrupt):
            function(network, images(1), compute=Compute(check=check))


@pytest.mark.parametrize(
    ("quality", "calibration", "said"),
    [
        ([50.0], None, "without a calibration"),
        ([50.0, 50.0, 50.0], TABLE, "2 images, or one for all, got 3"),
        ([-0.5], TABLE, r"got \[-0.5\]"),
        ([100.5], TABLE, r"got \[100.5\]"),
        ([float("nan")], TABLE, r"got \[nan\]"),
    ],
)
def test_qualities_that_cannot_be_taken(predictor, quality, calibration, said) -> None:
    with pytest.raises(ValueError, match=said):
        predict_timesteps(predictor, images(2), calibration=calibration, quality=torch.tensor(quality))


def file_of(family: str, config: dict, parts: dict[str, dict[str, Tensor]]) -> RestorerFile:
    tensors = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return RestorerFile(RestorerMetadata(family, config), tensors, "one.safetensors")


def test_files_of_all_three_families_are_built(prompt, predictor) -> None:
    """sodiff with a predictor or a fixed timestep, saipe, quality: the weights are where they belong."""
    saipe, seen = prompt.network.state_dict(), predictor.state_dict()
    whole = _built(file_of("sodiff", CONFIG, {"prompt": saipe, "timestep": seen}))
    assert isinstance(whole, SAIPEPrompt) and whole.timestep is None and whole.calibration == TABLE
    assert whole.predictor is not None
    assert torch.equal(predict_timesteps(whole.predictor, images(1))[0], predict_timesteps(predictor, images(1))[0])
    assert torch.equal(embed_with_saipe(whole, images(1))[0], embed_with_saipe(prompt, images(1))[0])
    fixed = {**CONFIG, "timestep_predictor": None, "timestep": 250.5, "calibration": None}
    assert _built(file_of("sodiff", fixed, {"prompt": saipe})).timestep == 250.5
    first = _built(file_of("saipe", {"saipe": CONFIG["saipe"]}, {"prompt": saipe}))
    assert first.predictor is None and first.timestep is None
    alone = {"timestep_predictor": {**TINY_PREDICTOR.to_dict(), "timesteps": 0}}
    tensors = {key: value for key, value in seen.items() if not key.startswith("timestep_head")}
    estimator = _built(file_of("quality", alone, {"timestep": tensors}))
    assert isinstance(estimator, QualityEstimator)
    timesteps, quality = predict_timesteps(estimator.network, images(2))
    assert timesteps is None and torch.allclose(quality, predictor(images(2))[0], atol=1e-4)
    assert torch.equal(estimator(images(2)), estimator.network(images(2))[0])


def _built(file: RestorerFile):
    restorer = build_restorer(file.metadata, file.name)
    load_weights(restorer, file)
    return restorer.eval().requires_grad_(False)


def test_the_predictor_computes_in_single_precision_whatever_the_prompt_does(predictor) -> None:
    """bfloat16 would lose what tells high qualities apart; also where a file in half precision is assigned."""
    timesteps, _ = predict_timesteps(predictor, images(1))
    assert timesteps is not None
    built = build_restorer(RestorerMetadata("sodiff", CONFIG), "one.safetensors", dtype=torch.bfloat16)
    types = {parameter.dtype for parameter in built.predictor.parameters()}
    assert types == {torch.float32} and {p.dtype for p in built.network.parameters()} == {torch.bfloat16}
    halves = {part: {key: value.half() for key, value in network.state_dict().items()}
              for part, network in (("prompt", built.network), ("timestep", predictor))}  # fmt: skip
    load_weights(built, file_of("sodiff", CONFIG, halves), assign=True)
    assert {parameter.dtype for parameter in built.predictor.parameters()} == {torch.float32}
    of_half = predict_timesteps(built.predictor.eval(), images(1))[0]
    assert of_half is not None and of_half.tolist() == pytest.approx(timesteps.tolist(), abs=5)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("sodiff", {"timestep_predictor": None}),
        ("sodiff", {"timestep_predictor": None, "timestep": float("nan")}),
        ("sodiff", {"timestep_predictor": None, "timestep": 10**400}),
        ("sodiff", {"tells_quality": "yes"}),
        ("sodiff", {"timestep_predictor": {"timesteps": 0}}),
        ("sodiff", {"timestep_predictor": {"timesteps": 1001}}),
        ("sodiff", {"timestep_predictor": {"width": 10**9}}),
        ("sodiff", {"calibration": {"qualities": [10.0, 5.0], "timesteps": [1.0, 2.0]}}),
        ("sodiff", {"calibration": {"qualities": ["5"], "timesteps": [1.0]}}),
        ("sodiff", {"calibration": [1, 2]}),
        ("sodiff", {"context_dim": 1023}),
        ("sodiff", {"saipe": {"dim": 10**9}}),
        ("saipe", {"saipe": {"down_depths": [10**9]}}),
        ("saipe", {"saipe": None}),
        ("quality", {}),  # has timesteps
        ("quality", {"timestep_predictor": None}),
    ],
)
def test_descriptions_of_no_restorer_are_refused_before_anything_is_built(family, config) -> None:
    with pytest.raises(RestorerFileError, match="configuration is not valid"):
        build_restorer(RestorerMetadata(family, {**CONFIG, **config}), "one.safetensors")


def test_expected_timestep_of_sharp_logits_is_their_peak() -> None:
    """The measure that the graph tests use: a bell at 123.4 has its mean there."""
    steps = torch.arange(1000.0)
    assert float(expected_timestep(-((steps - 123.4) ** 2)[None] / 800)) == pytest.approx(123.4, abs=1e-2)
