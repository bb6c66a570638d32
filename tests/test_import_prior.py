"""Published files and folders of priors, but narrow: imported with diffusers' outputs, or refused in one sentence."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from prior_networks import (
    NARROW_ADM,
    NARROW_DDPM,
    as_folder,
    diffusers_adm,
    diffusers_ddpm,
    randomized,
    rebuilt,
    with_earlier_names,
)
from safetensors.torch import load_file, save_file
from shared import ROOT

from restoration.importers.prior import PriorCheckpointError, import_prior
from restoration.networks.adm_unet import ADMUNet, ADMUNetConfig
from restoration.networks.ddpm_unet import DDPMUNet, DDPMUNetConfig
from restoration.restorer_file import read_restorer
from restoration.restorers import build_restorer, load_weights

LINEAR = {"kind": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "steps": 1000}
SCHEDULER = {"beta_start": 1e-4, "beta_end": 2e-2, "variance_type": "fixed_small"}


@pytest.fixture(scope="module")
def adm():
    return randomized(ADMUNet(NARROW_ADM), 3)


@pytest.fixture(scope="module")
def ddpm():
    return randomized(DDPMUNet(NARROW_DDPM), 4)


def saved(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def assert_equal(tensors, state):
    assert tensors.keys() == {f"unet.{key}" for key in state}
    assert all(torch.equal(tensors[f"unet.{key}"], value) for key, value in state.items())


# --- files of guided diffusion ----------------------------------------------------------------------------------------

ADM_CONFIGS = {
    "several levels": replace(NARROW_ADM, width=64),
    "classes": replace(NARROW_ADM, width=64, classes=11, out_channels=3),
    "half as wide first": ADMUNetConfig(
        width=64, channel_multipliers=(0.5, 1, 2), res_blocks=3, attention_levels=(1, 2), classes=3, image_size=32
    ),
    "no attention on the way": ADMUNetConfig(
        width=32, channel_multipliers=(1, 2), res_blocks=2, attention_levels=(), image_size=16
    ),
    "a third more": ADMUNetConfig(
        width=96, channel_multipliers=(1, 4 / 3, 2), res_blocks=1, attention_levels=(2,), image_size=32
    ),
    "one level": ADMUNetConfig(width=64, channel_multipliers=(1,), attention_levels=(0,), image_size=8),
}


@pytest.mark.parametrize("config", ADM_CONFIGS.values(), ids=ADM_CONFIGS)
def test_a_file_of_guided_diffusion_tells_its_configuration(tmp_path, config):
    network = randomized(ADMUNet(config))
    metadata, tensors = import_prior(saved(tmp_path, network.state_dict()))
    assert metadata.family == "prior"
    assert metadata.license == "unknown"
    assert metadata.config == {
        "network": {"architecture": "adm", **config.to_dict()},
        "schedule": LINEAR, "max_timestep": 999, "tile": config.image_size,
    }  # fmt: skip
    assert_equal(tensors, network.state_dict())
    assert metadata.training["imported_from"] == "model.pt"
    assert metadata.training["assumed"][:2] == [
        "attention heads of 64 channels", f"images of {config.image_size}x{config.image_size}"
    ]  # fmt: skip


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4)])
def test_the_published_configurations_are_found(multipliers):
    """At full width, without memory: what import_prior reads of the shapes of 256x256 and 512x512 files."""
    from restoration.importers._published import PublishedShapes

    levels = tuple(range(len(multipliers)))[-3:]
    config = ADMUNetConfig(
        channel_multipliers=multipliers, attention_levels=levels, classes=1000, image_size=256 << (len(multipliers) - 6)
    )
    state = ADMUNet(config, device="meta").state_dict()
    assert PublishedShapes(state, "x.pt", PriorCheckpointError).adm(None, None)[0] == config
    state = DDPMUNet(DDPMUNetConfig(), device="meta").state_dict()
    assert PublishedShapes(state, "x.ckpt", PriorCheckpointError).ddpm(None, None)[0] == DDPMUNetConfig()


def test_what_the_file_does_not_tell_can_be_told(tmp_path, adm):
    metadata, _ = import_prior(saved(tmp_path, adm.state_dict()), head_channels=32, image_size=96)
    assert metadata.config["network"]["head_channels"] == 32
    assert metadata.config["network"]["image_size"] == metadata.config["tile"] == 96
    assert metadata.training["assumed"] == ["the linear schedule of 1000 steps from 0.0001 to 0.02"]


def test_half_precision_is_kept(tmp_path, adm):
    state = {key: value.half() for key, value in adm.state_dict().items()}
    _, tensors = import_prior(saved(tmp_path, state), head_channels=32)
    assert_equal(tensors, state)


@pytest.mark.parametrize(
    ("width", "multipliers", "blocks", "reason"),
    [(192, (1, 2, 3, 4), 3, "64x64_diffusion.pt"), (256, (1, 1, 2, 3, 4), 2, "128x128_diffusion.pt")],
)
def test_published_files_of_another_design_are_not_misread(width, multipliers, blocks, reason):
    """Their shapes would fit, but their attention orders or divides its channels otherwise."""
    from restoration.importers._published import PublishedShapes

    config = ADMUNetConfig(width=width, channel_multipliers=multipliers, res_blocks=blocks, attention_levels=(2, 3))
    shapes = PublishedShapes(ADMUNet(config, device="meta").state_dict(), "x.pt", PriorCheckpointError)
    with pytest.raises(PriorCheckpointError, match=reason):
        shapes.adm(None, None)


# --- files of DDPM ----------------------------------------------------------------------------------------------------


def test_a_file_of_ddpm_tells_its_configuration(tmp_path, ddpm):
    metadata, tensors = import_prior(saved(tmp_path, ddpm.state_dict(), "celeba_hq.ckpt"))
    assert metadata.config == {
        "network": {"architecture": "ddpm", **NARROW_DDPM.to_dict()},
        "schedule": LINEAR, "max_timestep": 999, "tile": 256,
    }  # fmt: skip
    assert_equal(tensors, ddpm.state_dict())
    assert metadata.training["weights"] == "the file's"


@pytest.mark.parametrize(
    "config",
    [
        DDPMUNetConfig(width=64, channel_multipliers=(1, 1.5), res_blocks=1, attention_levels=(), image_size=16),
        DDPMUNetConfig(width=32, channel_multipliers=(1, 2, 2, 2), attention_levels=(1,), image_size=32),  # CIFAR-10's
    ],
)
def test_other_files_of_ddpm(tmp_path, config):
    metadata, _ = import_prior(saved(tmp_path, DDPMUNet(config).state_dict()))
    assert metadata.config["network"] == {"architecture": "ddpm", **config.to_dict()}


def test_checkpoints_of_ddims_training_hold_raw_and_averaged_weights(tmp_path, ddpm):
    """[model behind DataParallel, optimizer, epoch, step, averages]."""
    raw, averaged = ddpm.state_dict(), {key: value + 1 for key, value in ddpm.state_dict().items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    states = [{f"module.{key}": value for key, value in raw.items()}, optimizer, 4, 5000, averaged]
    path = saved(tmp_path, states, "ckpt.pth")
    for use_ema, expected, kind in ((True, averaged, "averaged"), (False, raw, "raw")):
        metadata, tensors = import_prior(path, use_ema=use_ema)
        assert_equal(tensors, expected)
        assert metadata.training["weights"] == kind
    metadata, tensors = import_prior(saved(tmp_path, states[:4]))
    assert_equal(tensors, raw)
    assert metadata.training["weights"] == "raw"


@pytest.mark.parametrize(("key", "kind"), [("ema", "averaged"), ("state_dict", "raw"), ("model", "raw")])
def test_a_state_dict_may_be_wrapped(tmp_path, ddpm, key, kind):
    metadata, tensors = import_prior(saved(tmp_path, {key: ddpm.state_dict(), "step": 12}))
    assert_equal(tensors, ddpm.state_dict())
    assert metadata.training["weights"] == kind


def test_averages_are_not_passed_for_raw_weights(tmp_path, ddpm):
    with pytest.raises(PriorCheckpointError, match="raw weights, got averaged ones only"):
        import_prior(saved(tmp_path, {"ema": ddpm.state_dict()}), use_ema=False)


def test_a_safetensors_file_under_the_published_names(tmp_path, ddpm):
    save_file(ddpm.state_dict(), tmp_path / "x.safetensors")
    assert_equal(import_prior(tmp_path / "x.safetensors")[1], ddpm.state_dict())


# --- folders of diffusers ---------------------------------------------------------------------------------------------

FOLDERS = {
    "ddpm": NARROW_DDPM,
    "ddpm, uneven": DDPMUNetConfig(width=64, channel_multipliers=(1, 1.5), res_blocks=1, attention_levels=(1,)),
    "adm": replace(NARROW_ADM, width=64, head_channels=16, res_blocks=2),
    "adm, classes": replace(NARROW_ADM, head_channels=32, classes=5, image_size=None),
    "adm, noise alone": replace(NARROW_ADM, width=16, head_channels=16, norm_groups=8, out_channels=3, dropout=0.1),
    "adm, no attention": replace(NARROW_ADM, attention_levels=(), middle_attention=False, head_channels=32),
}


@pytest.mark.parametrize("config", FOLDERS.values(), ids=FOLDERS)
@torch.no_grad()
def test_an_imported_folder_predicts_what_diffusers_predicts(tmp_path, config):
    is_adm = isinstance(config, ADMUNetConfig)
    reference = randomized(diffusers_adm(config) if is_adm else diffusers_ddpm(config))
    reference.register_to_config(dropout=config.dropout)
    metadata, tensors = import_prior(as_folder(tmp_path / "ddpm-256", reference, scheduler=SCHEDULER))
    assert metadata.config == {
        "network": {"architecture": "adm" if is_adm else "ddpm", **config.to_dict()},
        "schedule": LINEAR, "max_timestep": 999, "tile": config.image_size or 0,
    }  # fmt: skip
    assert metadata.training == {"imported_from": "ddpm-256", "assumed": []}
    x, timesteps = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([5, 640])
    labels = torch.tensor([0, 4]) if config.classes else None
    expected = reference(x, timesteps, labels).sample
    actual = rebuilt(metadata, tensors)(x, timesteps, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def reference():
    return randomized(diffusers_ddpm(NARROW_DDPM))


@pytest.fixture
def folder(tmp_path, reference):
    return as_folder(tmp_path / "ddpm-ema-church-256", reference, scheduler=SCHEDULER)


@pytest.fixture(scope="module")
def expected(reference, tmp_path_factory):
    return import_prior(as_folder(tmp_path_factory.mktemp("flat"), reference, scheduler=SCHEDULER))


def test_pipelines_and_their_parts_are_found(tmp_path, reference, expected):
    pipeline = as_folder(tmp_path / "pipeline", reference, pipeline=True, scheduler=SCHEDULER | {"beta_end": 0.01})
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    for path in (pipeline, pipeline / "unet", weights):
        metadata, tensors = import_prior(path)
        assert metadata.config["schedule"] == LINEAR | {"beta_end": 0.01}
        assert all(torch.equal(tensors[key], value) for key, value in expected[1].items())


def test_the_layout_that_diffusers_wrote_in_2022(folder, expected):
    """google/ddpm-*: a pickled file, attention under other names, and a config.json without the later fields."""
    with_earlier_names(folder)
    config = json.loads((folder / "config.json").read_text())
    later = ("downsample_type", "upsample_type", "resnet_time_scale_shift", "num_class_embeds", "class_embed_type",
             "attn_norm_num_groups", "add_attention", "dropout", "mid_block_type")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key not in later}))
    (folder / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDPMScheduler", "beta_schedule": "linear", "trained_betas": None})
    )
    metadata, tensors = import_prior(folder)
    assert metadata.config == expected[0].config
    assert tensors.keys() == expected[1].keys()
    assert all(torch.equal(tensors[key], value) for key, value in expected[1].items())


def test_attention_as_1x1_convolutions_and_half_precision(folder, expected):
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = {key: value.half() for key, value in load_file(weights).items()}
    state |= {key: value[:, :, None, None] for key, value in state.items() if ".to_" in key and value.dim() == 2}
    weights.unlink()
    save_file(state, folder / "diffusion_pytorch_model.fp16.safetensors")
    _, tensors = import_prior(folder)
    assert all(torch.equal(tensors[key], value.half()) for key, value in expected[1].items())


def test_a_folder_without_a_scheduler_is_taken_for_linear(folder):
    (folder / "scheduler_config.json").unlink()
    metadata, _ = import_prior(folder)
    assert metadata.config["schedule"] == LINEAR
    assert metadata.training["assumed"] == ["the linear schedule of 1000 steps from 0.0001 to 0.02"]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_restorer_file(tmp_path, adm):
    path, out = saved(tmp_path, adm.state_dict(), "ema_0.9999_100000.pt"), tmp_path / "prior.safetensors"
    command = [sys.executable, "-m", "training", "convert", "prior", path, out, "--head-channels", "32", "--half"]
    done = subprocess.run(
        [*map(str, command), "--license", "MIT"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "prior, " in done.stdout
    assert "assumed: images of 64x64" in done.stdout
    assert "heads" not in done.stdout
    file = read_restorer(out)
    assert file.metadata.license == "MIT"
    assert file.tensors["unet.input_blocks.1.0.in_layers.2.weight"].dtype == torch.float16
    prior = build_restorer(file.metadata, file.name)
    load_weights(prior, file)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = adm(x, torch.tensor([10]))[:, :3]
        assert (prior.eval()(x, 10) - theirs).abs().mean() < 0.1 * theirs.abs().mean()


@torch.no_grad()
def test_the_command_converts_a_folder(folder, reference, tmp_path, capsys):
    from training.convert import run

    run(["prior", str(folder), str(tmp_path / "out.safetensors")])
    assert "prior, " in capsys.readouterr().out
    file = read_restorer(tmp_path / "out.safetensors")
    assert file.metadata.license == "unknown"
    assert file.metadata.training["imported_from"] == "ddpm-ema-church-256"
    prior = build_restorer(file.metadata, file.name)
    load_weights(prior, file)
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.eval()(x, 500), reference(x, 500).sample, rtol=1e-4, atol=1e-4)
