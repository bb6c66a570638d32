"""DriftRec checkpoints as the authors' training writes them, but narrow: imported, or refused in one sentence."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from shared import ROOT

from restoration.diffusion.prediction import Prediction, RegressionRestorer, ScoreDenoiser
from restoration.diffusion.sde import make_sde
from restoration.importers.driftrec import DriftRecCheckpointError, import_driftrec
from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.restorer_file import RestorerFileError, read_restorer
from training.configs.driftrec import DriftRecConfig, RegressionConfig
from training.trainers.score import DriftRecTask, RegressionTask

NETWORK = {"width": 8, "channel_multipliers": (1, 1, 1, 1, 2), "res_blocks": 1, "attention_levels": (4,)}
OPTIONS = {
    "backbone_name": "ncsnpp", "data_module_name": "imagefolder", "lr": 1e-4, "optimizer": "adamw", "ema_decay": 0.999,
    "nf": 8, "ch_mult": [1, 1, 1, 1, 2], "num_res_blocks": 1, "sde_n": 30, "gamma": 1.0, "sigma_min": 0.01,
    "sigma_max": 1, "random_resized_crop_scale": (0.2, 1.0), "data_dir": "/data", "random_post_crop": None,
}  # fmt: skip
SCORE_OPTIONS = {**OPTIONS, "sde_name": "ouve", "t_eps": 0.01, "linear_schedule": False}


def weights(config, seed):
    """Random weights in the order of the authors' module: its output layer is registered first."""
    state = NCSNpp(config, device="meta").state_dict()
    names = sorted(state, key=lambda key: not key.startswith("output_layer"))
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(state[key].shape, generator=generator) for key in names}


def lightning_checkpoint(config, options):
    """What Lightning 1.6 stores, with the state of the average as torch_ema 0.3 has it."""
    raw, averaged = weights(config, 1), weights(config, 2)
    return {
        "epoch": 7, "global_step": 1234, "pytorch-lightning_version": "1.6.5",
        "state_dict": {f"backbone.{key}": value for key, value in raw.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 8}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'valid_loss'}": {"best_model_score": torch.tensor(3.0)}},
        "optimizer_states": [{"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs", "hyper_parameters": dict(options),
        "ema": {"decay": 0.999, "num_updates": 9, "shadow_params": list(averaged.values()), "collected_params": None},
    }  # fmt: skip


@pytest.fixture(scope="module")
def score_checkpoint():
    return lightning_checkpoint(NCSNppConfig(**NETWORK), SCORE_OPTIONS)


def saved(tmp_path, checkpoint):
    path = tmp_path / "epoch=7-last.ckpt"
    torch.save(checkpoint, path)
    return path


def broken(tmp_path, checkpoint, change):
    checkpoint = copy.deepcopy(checkpoint)
    change(checkpoint)
    return saved(tmp_path, checkpoint)


def assert_equal(tensors, expected, part):
    assert tensors.keys() == {f"{part}.{key}" for key in expected}
    assert all(torch.equal(tensors[f"{part}.{key}"], value) for key, value in expected.items())


def test_the_averaged_weights_get_their_names_from_the_order_of_the_state_dict(tmp_path, score_checkpoint):
    metadata, tensors = import_driftrec(saved(tmp_path, score_checkpoint))
    assert_equal(tensors, weights(NCSNppConfig(**NETWORK), 2), "score")
    assert metadata.training == {
        "imported_from": "epoch=7-last.ckpt", "weights": "averaged", "epoch": 7, "global_step": 1234
    }  # fmt: skip
    assert metadata.license == "unknown"


def test_the_description_is_what_the_trainer_writes(tmp_path, score_checkpoint):
    metadata, _ = import_driftrec(saved(tmp_path, score_checkpoint))
    trained = DriftRecTask(DriftRecConfig(network=NCSNppConfig(**NETWORK))).metadata({}, "unknown")
    assert (metadata.family, metadata.config, metadata.base) == (trained.family, trained.config, trained.base)


@pytest.mark.parametrize(
    ("theirs", "ours", "gamma"), [("ouve", "ouve", 1.0), ("t2ve", "tsdve", 2.0), ("cosve", "cosve", 1.5)]
)
def test_the_sde_follows_the_options(tmp_path, score_checkpoint, theirs, ours, gamma):
    def change(checkpoint):
        checkpoint["hyper_parameters"] |= {"sde_name": theirs, "gamma": gamma, "sigma_min": 0.02, "t_eps": 0.03}

    metadata, _ = import_driftrec(broken(tmp_path, score_checkpoint, change))
    assert metadata.config["sde"] == {"name": ours, "sigma_min": 0.02, "sigma_max": 1.0, "gamma": gamma, "t_eps": 0.03}


def test_the_imported_score_is_the_authors_formula(tmp_path, score_checkpoint):
    """Their score is network([x_t, y]) / sigma; D = y + (x_t - y + sigma^2 score) / a."""
    metadata, tensors = import_driftrec(saved(tmp_path, score_checkpoint))
    network = NCSNpp(NCSNppConfig(**metadata.config["network"])).eval()
    network.load_state_dict({key.removeprefix("score."): value for key, value in tensors.items()})
    sde_config = {key: value for key, value in metadata.config["sde"].items() if key != "t_eps"}
    denoise = ScoreDenoiser(network, make_sde(**sde_config), Prediction(**metadata.config["prediction"]))
    x, y, t = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), 0.4
    with torch.no_grad():
        sigma = 0.01 * np.sqrt(100 ** (2 * t) - np.exp(-2 * t))
        score = network(torch.cat([x, y], dim=1), torch.tensor([sigma], dtype=torch.float32)) / sigma
        expected = y + (x - y + sigma**2 * score) / np.exp(-t)
        torch.testing.assert_close(denoise(x, y, t), expected, atol=1e-4, rtol=1e-4)


# --- which weights ----------------------------------------------------------------------------------------------------


def test_the_raw_weights_come_from_the_state_dict(tmp_path, score_checkpoint):
    metadata, tensors = import_driftrec(saved(tmp_path, score_checkpoint), use_ema=False)
    assert_equal(tensors, weights(NCSNppConfig(**NETWORK), 1), "score")
    assert metadata.training["weights"] == "raw"


def test_a_checkpoint_of_the_validation_has_its_raw_weights_set_aside(tmp_path, score_checkpoint):
    """There the state_dict holds the averages already, and collected_params what it held before."""

    def change(checkpoint):
        state, ema = checkpoint["state_dict"], checkpoint["ema"]
        ema["collected_params"] = list(state.values())
        checkpoint["state_dict"] = dict(zip(state, ema["shadow_params"], strict=True))

    path = broken(tmp_path, score_checkpoint, change)
    for use_ema, seed in ((True, 2), (False, 1)):
        assert_equal(import_driftrec(path, use_ema=use_ema)[1], weights(NCSNppConfig(**NETWORK), seed), "score")


def test_collected_weights_left_over_from_an_earlier_validation_are_not_used(tmp_path, score_checkpoint):
    def change(checkpoint):
        checkpoint["ema"]["collected_params"] = list(weights(NCSNppConfig(**NETWORK), 3).values())

    _, tensors = import_driftrec(broken(tmp_path, score_checkpoint, change), use_ema=False)
    assert_equal(tensors, weights(NCSNppConfig(**NETWORK), 1), "score")


# --- the baseline -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("conditional", "noise_level"), [(False, None), (True, 1.0)])
def test_the_baseline_becomes_a_regression_restorer(tmp_path, conditional, noise_level):
    config = NCSNppConfig(**NETWORK, in_channels=3, conditional=conditional)
    path = saved(tmp_path, lightning_checkpoint(config, {**OPTIONS, "discriminative_mode": "direct"}))
    metadata, tensors = import_driftrec(path)
    trained = RegressionTask(RegressionConfig(network=config)).metadata({}, "unknown")
    assert (metadata.family, metadata.config) == (trained.family, trained.config)
    assert metadata.config["noise_level"] == noise_level
    assert_equal(tensors, weights(config, 2), "regression")
    network = NCSNpp(NCSNppConfig(**metadata.config["network"]))
    network.load_state_dict({key.removeprefix("regression."): value for key, value in tensors.items()})
    restorer = RegressionRestorer(network, metadata.config["residual_scale"], metadata.config["noise_level"])
    image = torch.rand(1, 3, 32, 32)
    expected = network(image, torch.ones(1) if conditional else None)
    torch.testing.assert_close(restorer(image), expected)


@pytest.mark.parametrize("mode", ["residual", "mask"])
def test_another_kind_of_baseline_is_refused(tmp_path, mode):
    config = NCSNppConfig(**NETWORK, in_channels=3, conditional=False)
    path = saved(tmp_path, lightning_checkpoint(config, {**OPTIONS, "discriminative_mode": mode}))
    with pytest.raises(DriftRecCheckpointError, match=f"--discriminative-mode direct, the paper's, got '{mode}'"):
        import_driftrec(path)


# --- refusals ---------------------------------------------------------------------------------------------------------


def drop(key):
    def change(checkpoint):
        del checkpoint["state_dict"][key]

    return change


def set_option(key, value):
    def change(checkpoint):
        checkpoint["hyper_parameters"][key] = value

    return change


def add_tensor(checkpoint):
    checkpoint["state_dict"]["backbone.all_modules.99.weight"] = torch.zeros(2)


def reshape_tensor(checkpoint):
    checkpoint["state_dict"]["backbone.all_modules.1.bias"] = torch.zeros(5)
    checkpoint["ema"]["shadow_params"][4] = torch.zeros(5)


def shorten_list(checkpoint):
    checkpoint["ema"]["shadow_params"].pop()


def turn_list(checkpoint):
    values = checkpoint["ema"]["shadow_params"]
    checkpoint["ema"]["shadow_params"] = [*values[2:], *values[:2]]


def drop_and_shorten(checkpoint):
    del checkpoint["state_dict"]["backbone.all_modules.3.weight"]
    del checkpoint["ema"]["shadow_params"][7]


def foreign_module(checkpoint):
    checkpoint["state_dict"]["generator.weight"] = torch.zeros(2)


def extra_everywhere(checkpoint):
    add_tensor(checkpoint)
    checkpoint["ema"]["shadow_params"].append(torch.zeros(2))


REFUSALS = [
    (shorten_list, "ema.shadow_params to hold as many tensors as the state_dict"),
    (turn_list, r"in the order of the state_dict, but output_layer.weight is .* instead of \(3, 6, 1, 1\)"),
    (drop("backbone.all_modules.3.weight"), "to hold as many tensors as the state_dict"),
    (drop_and_shorten, "missing: all_modules.3.weight"),
    (extra_everywhere, "unexpected: all_modules.99.weight"),
    (reshape_tensor, r"of another shape: all_modules.1.bias is \(5,\) instead of \(32,\)"),
    (foreign_module, "generator.weight"),
    (set_option("nf", 16), r"of another shape: .* instead of .* and \d+ more"),
    (set_option("nf", None), "hyper_parameters.nf to be a int, got none"),
    (set_option("nf", 6), "describe no network"),
    (set_option("ch_mult", [1, 1, "x"]), "describe no network"),
    (set_option("backbone_name", "dcunet"), "'ncsnpp', the only one known here, got 'dcunet'"),
    (set_option("sde_name", "vp"), "an SDE of ouve, t2ve, cosve, got 'vp'"),
    (set_option("linear_schedule", True), "exponential noise schedule"),
    (set_option("sigma_min", 2.0), "describe no SDE"),
    (set_option("gamma", "1"), "hyper_parameters.gamma to be a int or float, got '1'"),
    (set_option("discriminative_mode", "direct"), "3 input and 3 output channels .* got 6 and 3"),
    (lambda checkpoint: checkpoint.pop("ema"), "expected a dictionary 'ema' .* got none"),
    (lambda checkpoint: checkpoint.pop("state_dict"), "expected a dictionary 'state_dict' .* got none"),
    (lambda checkpoint: checkpoint["state_dict"].clear(), "backbone.* tensors only, got nothing"),
    (lambda checkpoint: checkpoint.update(hyper_parameters=[1]), "expected a dictionary 'hyper_parameters' .* a list"),
    (lambda checkpoint: checkpoint["ema"].update(shadow_params=None), "to be a list of tensors, got none"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS)
def test_a_broken_checkpoint_is_refused_in_one_sentence(tmp_path, score_checkpoint, change, message):
    with pytest.raises((DriftRecCheckpointError, RestorerFileError), match=message) as caught:
        import_driftrec(broken(tmp_path, score_checkpoint, change))
    text = str(caught.value)
    assert text.startswith("epoch=7-last.ckpt: ")
    assert "\n" not in text
    assert len(text) < 500


class Foreign:
    """Something that a pickle can hold and that would run code when it is loaded."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


def test_a_pickle_with_foreign_objects_is_refused_and_never_run(tmp_path, score_checkpoint, capsys):
    path = broken(tmp_path, score_checkpoint, lambda checkpoint: checkpoint.update(callbacks=Foreign()))
    with pytest.raises(DriftRecCheckpointError, match="tensors and plain values only") as caught:
        import_driftrec(path)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(DriftRecCheckpointError) as caught:
        import_driftrec(path)
    assert str(caught.value).startswith("x.ckpt: ")
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_refused(tmp_path, score_checkpoint):
    path = saved(tmp_path, score_checkpoint)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(DriftRecCheckpointError, match="not a whole checkpoint"):
        import_driftrec(path)


def test_a_list_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(DriftRecCheckpointError, match="a dictionary, got a list"):
        import_driftrec(saved(tmp_path, [1, 2]))
    with pytest.raises(DriftRecCheckpointError, match="there is no such file"):
        import_driftrec(tmp_path / "absent.ckpt")


# --- the command ------------------------------------------------------------------------------------------------------


def convert(*arguments):
    command = [sys.executable, "-m", "training", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_command_writes_a_restorer_file(tmp_path, score_checkpoint):
    path, out = saved(tmp_path, score_checkpoint), tmp_path / "out.safetensors"
    done = convert("driftrec", path, out, "--license", "CC0-1.0", "--raw-weights")
    assert done.returncode == 0, done.stderr
    assert "driftrec" in done.stdout
    file = read_restorer(out)
    assert file.metadata.license == "CC0-1.0"
    assert_equal(file.tensors, weights(NCSNppConfig(**NETWORK), 1), "score")


def test_the_command_halves_and_refuses(tmp_path, score_checkpoint, capsys):
    from training.convert import run

    path, out = saved(tmp_path, score_checkpoint), tmp_path / "out.safetensors"
    run(["driftrec", str(path), str(out), "--half"])
    assert read_restorer(out).tensors["score.all_modules.3.weight"].dtype == torch.float16
    with pytest.raises(ValueError, match=r"ends in \.safetensors, got out\.ckpt"):
        run(["driftrec", str(path), str(tmp_path / "out.ckpt")])
    with pytest.raises(SystemExit):
        run(["elsewhere", str(path), str(out)])
    assert "driftrec" in capsys.readouterr().err


def test_a_refusal_by_the_command_is_one_line_and_exit_status_2(tmp_path):
    done = convert("driftrec", tmp_path / "absent.ckpt", tmp_path / "out.safetensors")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "training convert: absent.ckpt: there is no such file. Give the path of a DriftRec .ckpt file."
    ]
