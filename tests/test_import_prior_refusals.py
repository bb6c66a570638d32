"""Files and folders that are no priors, or not whole: each is refused in one sentence that names it."""

import json
from dataclasses import replace

import pytest
import torch
from prior_networks import NARROW_ADM, NARROW_DDPM, as_folder, diffusers_adm, diffusers_ddpm
from safetensors.torch import load_file, save_file

from restoration.importers.prior import PriorCheckpointError, import_prior
from restoration.networks.adm_unet import ADMUNet
from restoration.networks.ddpm_unet import DDPMUNet


@pytest.fixture(scope="module")
def states():
    return {"adm": ADMUNet(NARROW_ADM).state_dict(), "ddpm": DDPMUNet(NARROW_DDPM).state_dict()}


def saved(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def refusal(path, match, **options):
    with pytest.raises(PriorCheckpointError, match=match) as caught:
        import_prior(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{path.name}: ")
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- single files -----------------------------------------------------------------------------------------------------


def drop(*keys):
    return lambda state: {key: value for key, value in state.items() if key not in keys}


def drop_stem(stem):
    return lambda state: {key: value for key, value in state.items() if not key.startswith(stem)}


def put(key, value):
    return lambda state: {**state, key: value}


FILES = [
    ("adm", drop("middle_block.1.norm.weight"), "missing: middle_block.1.norm.weight"),
    (
        "adm",
        drop("input_blocks.3.0.in_layers.2.weight"),
        "a tensor input_blocks.3.0.in_layers.2.weight of 4 .*got none",
    ),
    ("adm", drop("output_blocks.7.0.out_layers.3.bias"), "missing: output_blocks.7.0.out_layers.3.bias"),
    ("adm", put("surplus.weight", torch.zeros(1)), "unexpected: surplus.weight"),
    ("adm", put("out.0.weight", torch.zeros(7)), r"of another shape: out.0.weight is \(7,\) instead of \(32,\)"),
    ("adm", put("out.0.weight", torch.zeros(32, dtype=torch.int64)), "of another type: out.0.weight is torch.int64"),
    ("adm", put("out.0.weight", [1.0]), "tensors only, got others: out.0.weight is a list"),
    ("adm", drop_stem("output_blocks.7."), "4 levels of 1 blocks in its input_blocks and output_blocks"),
    ("adm", drop_stem("output_blocks."), "without a way up, e.g. a classifier"),
    ("adm", put("input_blocks.0.0.weight", torch.zeros(32, 6, 3, 3)), "3 input and 3 or 6 output .* got 6 and 6"),
    ("adm", put("out.2.weight", torch.zeros(1, 32, 3, 3)), "3 input and 3 or 6 output channels, got 3 and 1"),
    ("adm", put("input_blocks.2.0.op.weight", torch.zeros(1)), "resamples by convolutions"),
    ("adm", put("input_blocks.1.0.emb_layers.1.weight", torch.zeros(32, 128)), "adds its timestep instead of scaling"),
    ("adm", put("time_embed.0.weight", torch.zeros(5)), "time_embed.0.weight of 2 dimensions, got one of 1"),
    ("adm", put("time_embed.0.weight", torch.zeros(128, 0)), "no network that is known here"),
    ("ddpm", drop("down.1.block.0.conv1.weight"), "a tensor down.1.block.0.conv1.weight of 4 dimensions, got none"),
    ("ddpm", drop("up.3.block.2.norm2.bias"), "missing: up.3.block.2.norm2.bias"),
    ("ddpm", drop_stem("up."), "missing: up.0.block.0.conv1.bias.* and [0-9]+ more"),
    ("ddpm", drop_stem("down."), "no network that is known here"),
    ("ddpm", put("conv_in.weight", torch.zeros(32, 4, 3, 3)), "3 input and 3 output channels, got 4 and 3"),
    ("ddpm", put("conv_out.weight", torch.zeros(3, 32, 1, 1)), r"conv_out.weight is \(3, 32, 1, 1\) instead of"),
]


@pytest.mark.parametrize(("kind", "change", "message"), FILES)
def test_a_broken_file_is_refused_in_one_sentence(tmp_path, states, kind, change, message):
    options = {"head_channels": 32} if kind == "adm" else {}
    refusal(saved(tmp_path, change(states[kind])), message, **options)


def test_heads_that_do_not_divide_the_channels_are_refused(tmp_path):
    """Without a word it is 64, which this narrow network's heads of 32 contradict."""
    state = ADMUNet(replace(NARROW_ADM, attention_levels=(2,), head_channels=32)).state_dict()
    refusal(saved(tmp_path, state), "heads of 64 divide, got 96 at level 2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "a dict of 0 entries"),
        ({"a": 1, "b": {"c": 2}}, r"a dict of 2 entries \(a, b, c\)"),
        ([1, 2], "a list without a network"),
        (torch.zeros(3), "a Tensor without a network"),
        ({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}}, "a latent diffusion model"),
        ({"encoder.down.0.block.0.norm1.weight": torch.zeros(1)}, "an autoencoder"),
        ({"unet.conv_in.weight": torch.zeros(1)}, "it needs no conversion"),
        ({1: 2, ("a",): 3}, "a dict of 2 entries"),
    ],
)
def test_another_file_is_named(tmp_path, content, message):
    text = refusal(saved(tmp_path, content), message)
    assert "expected a checkpoint of guided diffusion or of DDPM, or a folder of diffusers" in text


class Foreign:
    """Something that a pickle can hold and that would run code when it is loaded."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


@pytest.mark.parametrize("part", [None, "folder"])
def test_a_pickle_with_foreign_objects_is_refused_and_never_run(tmp_path, states, capsys, part):
    if part:
        as_folder(tmp_path / "x", diffusers_ddpm(NARROW_DDPM))
        (tmp_path / "x" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save({"a": Foreign()}, tmp_path / "x" / "diffusion_pytorch_model.bin")
        path = tmp_path / "x"
    else:
        path = saved(tmp_path, {**states["ddpm"], "foreign": Foreign()})
    with pytest.raises(PriorCheckpointError, match="tensors and plain values only") as caught:
        import_prior(path)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 cut", b"\x08\0\0\0\0\0\0\0{}"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    refusal(path, "x")


def test_a_missing_and_a_cut_file_are_refused(tmp_path, states):
    refusal(tmp_path / "absent.ckpt", "there is no such file")
    refusal(tmp_path / "absent.safetensors", "there is no such file")
    path = saved(tmp_path, states["ddpm"])
    path.write_bytes(path.read_bytes()[:50_000])
    refusal(path, "not a whole checkpoint")


def test_head_channels_and_image_size_are_for_those_that_do_not_tell(tmp_path, states):
    refusal(saved(tmp_path, states["ddpm"]), "no head_channels for DDPM", head_channels=64)
    path = as_folder(tmp_path / "x", diffusers_ddpm(NARROW_DDPM))
    refusal(path, "no image_size, because the folder's config.json says it, got 64", image_size=64)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    return {"adm": diffusers_adm(replace(NARROW_ADM, head_channels=32)), "ddpm": diffusers_ddpm(NARROW_DDPM)}


def changed(folder, file="config.json", **fields):
    path = folder / file
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))
    return folder


CONFIGS = [
    ("ddpm", {"in_channels": 4}, "in_channels 4 instead of 3"),
    ("ddpm", {"_class_name": "UNet2DConditionModel"}, "_class_name 'UNet2DConditionModel' instead of 'UNet2DModel'"),
    ("ddpm", {"time_embedding_type": "fourier"}, "time_embedding_type 'fourier' instead of 'positional'"),
    ("ddpm", {"norm_eps": 1e-5, "freq_shift": 0}, "freq_shift 0 instead of 1, norm_eps 1e-05 instead of 1e-06"),
    ("ddpm", {"norm_num_groups": 16}, "norm_num_groups 16 instead of 32"),
    ("ddpm", {"downsample_padding": 1}, "downsample_padding 1 instead of 0"),
    ("ddpm", {"flip_sin_to_cos": True}, "flip_sin_to_cos True instead of False"),
    ("ddpm", {"attention_head_dim": 8}, "attention_head_dim 8 instead of None"),
    ("ddpm", {"act_fn": "gelu"}, "act_fn 'gelu' instead of 'silu' or 'swish'"),
    ("ddpm", {"out_channels": 6}, "out_channels 6 instead of 3"),
    ("ddpm", {"down_block_types": ["DownBlock2D"] * 4 + ["SkipDownBlock2D"]}, "SkipDownBlock2D"),
    ("ddpm", {"down_block_types": ["DownBlock2D"] * 5}, "at the same levels"),
    ("ddpm", {"block_out_channels": [32, 32]}, "at the same levels"),
    ("ddpm", {"block_out_channels": [32, 32, 64, 64, 100_000]}, "5 levels of up to 100000 channels"),
    ("ddpm", {"layers_per_block": 10**9}, "a usable network"),
    ("ddpm", {"block_out_channels": []}, "describe no network"),
    ("ddpm", {"block_out_channels": [0, 1, 2, 3, 4]}, "describe no network"),
    ("ddpm", {"block_out_channels": "wide"}, "describe no network"),
    ("ddpm", {"layers_per_block": 0}, "describe no network"),
    ("ddpm", {"layers_per_block": 3}, "missing: down_blocks.0.resnets.2.conv1.bias"),
    ("ddpm", {"sample_size": "large"}, "sample_size 'large' instead of pixels"),
    ("ddpm", {"time_embedding_dim": 64}, "time_embedding_dim 64 instead of 128"),
    ("ddpm", {"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift 'spatial' instead of 'default'"),
    ("adm", {"downsample_type": "conv"}, "downsample_type 'conv' instead of 'resnet'"),
    ("adm", {"attn_norm_num_groups": None}, "attn_norm_num_groups None instead of 32"),
    ("adm", {"attention_head_dim": None}, "attention_head_dim None instead of a number"),
    ("adm", {"attention_head_dim": 48}, "heads of 48 divide"),
    ("adm", {"freq_shift": 1}, "freq_shift 1 instead of 0"),
    ("adm", {"class_embed_type": "timestep"}, "class_embed_type 'timestep' instead of None"),
    ("adm", {"num_class_embeds": 10}, "missing: class_embedding.weight"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), CONFIGS, ids=[str(fields)[:40] for _, fields, _ in CONFIGS])
def test_another_network_is_refused_by_its_fields(tmp_path, models, kind, fields, message):
    refusal(changed(as_folder(tmp_path / "theirs", models[kind]), **fields), message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type 'epsilon', the only one known here, got 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'linear', .* got 'squaredcos_cap_v2'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas None"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr False"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "describes no schedule"),
        ({"num_train_timesteps": "many"}, "describes no schedule"),
    ],
)
def test_another_schedule_is_refused(tmp_path, models, fields, message):
    refusal(changed(as_folder(tmp_path / "theirs", models["ddpm"]), "scheduler_config.json", **fields), message)


def test_latent_pipelines_are_refused(tmp_path, models):
    path = as_folder(tmp_path / "ldm", models["ddpm"], pipeline=True)
    (path / "vqvae").mkdir()
    for part in (path, path / "unet"):
        refusal(part, "works on pixels, got one on the latents of a vqvae")
    (path / "vqvae").rmdir()
    refusal(changed(path, "model_index.json", vae=["diffusers", "AutoencoderKL"]), "latents of a vae")


def test_incomplete_folders_are_refused(tmp_path, models):
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "a folder of diffusers with a config.json")
    path = as_folder(tmp_path / "theirs", models["ddpm"])
    weights = path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({**state, "surplus": torch.zeros(1)}, weights)
    refusal(path, "unexpected: surplus")
    save_file(drop("up_blocks.0.resnets.0.norm1.bias")(state), weights)
    refusal(path, "missing: up_blocks.0.resnets.0.norm1.bias")
    save_file({**state, "conv_in.bias": torch.zeros(3)}, weights)
    refusal(path, r"conv_in.bias is \(3,\) instead of \(32,\)")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(PriorCheckpointError, match="not a whole safetensors file"):
        import_prior(path)
    weights.unlink()
    refusal(path, "expected diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin beside its config.json")


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_a_broken_config_is_refused(tmp_path, models, text):
    path = as_folder(tmp_path / "theirs", models["ddpm"])
    (path / "config.json").write_text(text, encoding="latin-1")
    refusal(path, "config.json")


def test_weights_of_diffusers_without_their_config_are_refused(tmp_path, models):
    path = as_folder(tmp_path / "theirs", models["ddpm"])
    (path / "config.json").unlink()
    refusal(path / "diffusion_pytorch_model.safetensors", "the config.json of diffusers beside these weights")
