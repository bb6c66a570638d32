"""CODiff's files, as the authors' training writes them, with random weights: imported, or refused in one sentence.

Tensors of the UNet's size are one number each that is repeated, which costs nothing to save.
"""

import collections
import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from shared import ROOT, shared_path
from torch import nn

from restoration.importers.codiff import CODiffCheckpointError, import_cave, import_codiff
from restoration.networks.cave import CaVE, CaVEConfig
from restoration.networks.sd21_layers import codiff_unet_targets, codiff_vae_targets
from restoration.restorer_file import read_restorer

SMALL = CaVEConfig((4, 6, 8, 10), 2)
SECTIONS = {
    "default_encoder": ("unet_lora_encoder_modules", ("down_blocks", "conv_in")),
    "default_decoder": ("unet_lora_decoder_modules", ("up_blocks", "conv_out")),
    "default_others": ("unet_lora_others_modules", ("mid_block",)),
}


class Numbers:
    """Tensors that each are one random number, repeated."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape):
        return torch.randn((), generator=self.generator).expand(shape)


def adapters(targets, adapter, rank, number):
    state = {}
    for name, (out, *rest) in targets.items():
        state[f"{name}.lora_A.{adapter}.weight"] = number(rank, *rest)
        state[f"{name}.lora_B.{adapter}.weight"] = number(out, rank, *(1 for _ in rest[1:]))
    return state


def codiff_checkpoint(width=10, rank=16):
    """What save_model of the authors' training stores, the repetitions in the VAE's list included."""
    number, unet, vae = Numbers(0), codiff_unet_targets(), list(codiff_vae_targets())
    checkpoint = {
        "vae_lora_encoder_modules": [*vae, *vae, "quant_conv"], "rank_unet": rank, "rank_vae": rank,
        "state_dict_unet": {
            "conv_in.base_layer.weight": number(320, 4, 3, 3), "conv_in.base_layer.bias": number(320)
        },
        "state_dict_vae": adapters(codiff_vae_targets(), "default_encoder", rank, number),
        "proj": nn.Linear(width, 1024).state_dict(),
    }  # fmt: skip
    for adapter, (section, starts) in SECTIONS.items():
        part = {name: shape for name, shape in unet.items() if name.split(".")[0] in starts}
        checkpoint[section] = list(part)
        checkpoint["state_dict_unet"] |= adapters(part, adapter, rank, number)
    return checkpoint


def cave_checkpoint(config=SMALL):
    network, generator = CaVE(config), torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.normal_(generator=generator)
    return network.state_dict()


@pytest.fixture(scope="module")
def codiff():
    return codiff_checkpoint()


@pytest.fixture(scope="module")
def cave():
    return cave_checkpoint()


def saved(folder, codiff=None, cave=None):
    paths = folder / "codiff.pkl", folder / "cave.pth"
    if codiff is not None:
        torch.save(codiff, paths[0])
    if cave is not None:
        torch.save(cave, paths[1], _use_new_zipfile_serialization=False)
    return paths


def changed(checkpoint, change):
    checkpoint = {key: copy.copy(value) for key, value in checkpoint.items()}
    change(checkpoint)
    return checkpoint


# --- values -----------------------------------------------------------------------------------------------------------


def test_every_adapter_gets_its_plain_name_and_keeps_its_numbers(tmp_path, codiff, cave):
    _, tensors = import_codiff(*saved(tmp_path, codiff, cave))
    for section, part in (("state_dict_unet", "unet_lora"), ("state_dict_vae", "vae_lora")):
        expected = {}
        for key, value in codiff[section].items():
            if ".base_layer." not in key:
                module, _, rest = key.partition(".lora_")
                expected[f"{part}.{module}.lora_{rest[0]}.weight"] = value
        found = {key: value for key, value in tensors.items() if key.startswith(f"{part}.")}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert sum(key.startswith("unet_lora.") for key in tensors) == 516
    assert sum(key.startswith("vae_lora.") for key in tensors) == 64
    assert sum(value.numel() for key, value in tensors.items() if key.startswith("unet_lora.")) == 16_222_848
    assert sum(value.numel() for key, value in tensors.items() if key.startswith("vae_lora.")) == 1_477_424


def test_the_trained_input_layer_the_projection_and_the_encoder_are_taken_over(tmp_path, codiff, cave):
    _, tensors = import_codiff(*saved(tmp_path, codiff, cave))
    rest = {key: value for key, value in tensors.items() if not key.startswith(("unet_lora.", "vae_lora."))}
    expected = {f"prompt.{key}": cave[key] for key in CaVE(SMALL, decoder=False, device="meta").state_dict()}
    expected |= {f"projection.{key}": codiff["proj"][key] for key in ("weight", "bias")}
    for key in ("weight", "bias"):
        expected[f"unet.conv_in.{key}"] = codiff["state_dict_unet"][f"conv_in.base_layer.{key}"]
    assert rest.keys() == expected.keys()
    assert all(torch.equal(rest[key], value) for key, value in expected.items())
    network = CaVE(SMALL, decoder=False)
    network.load_state_dict({key[7:]: value for key, value in rest.items() if key.startswith("prompt.")})


def test_the_description_tells_pefts_hidden_alpha_and_the_rank_of_the_file(tmp_path, cave):
    metadata, _ = import_codiff(*saved(tmp_path, codiff_checkpoint(rank=4), cave))
    lora = {"rank": 4, "alpha": 8.0}
    assert metadata.config == {
        "cave": {"widths": [4, 6, 8, 10], "blocks": 2}, "context_dim": 1024, "timestep": 499.0,
        "unet_lora": lora, "vae_lora": lora,
    }  # fmt: skip
    assert (metadata.family, metadata.base, metadata.license) == ("codiff", "sd2.1-base", "unknown")
    assert metadata.training == {"imported_from": "codiff.pkl", "prompt_imported_from": "cave.pth"}


def test_alpha_is_what_peft_takes_when_it_is_not_told():
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig(r=16).lora_alpha == 8


@pytest.mark.parametrize("is_zip", [False, True])
def test_cave_alone_keeps_its_decoder(tmp_path, cave, is_zip):
    path = tmp_path / "G.pth"
    torch.save(cave, path, _use_new_zipfile_serialization=is_zip)
    metadata, tensors = import_cave(path)
    assert (metadata.family, metadata.base) == ("cave", None)
    assert metadata.config == {"cave": SMALL.to_dict()}
    assert tensors.keys() == {f"prompt.{key}" for key in cave}
    assert all(torch.equal(tensors[f"prompt.{key}"], value) for key, value in cave.items())


def test_the_published_sizes_are_recognised(tmp_path):
    shapes = {key: value.shape for key, value in CaVE(CaVEConfig(), device="meta").state_dict().items()}
    number = Numbers(2)
    state = {key: number(*shape) if shape else torch.tensor(7) for key, shape in shapes.items()}
    metadata, tensors = import_codiff(*saved(tmp_path, codiff_checkpoint(width=512), state))
    assert metadata.config["cave"] == CaVEConfig().to_dict()
    encoder_and_head, statistics = 27_739_776 + 19_408_385, 2 * 4 * (64 + 128 + 256 + 512 + 512)
    rest = 16_222_848 + 1_477_424 + 11_840 + 525_312
    found = sum(value.numel() for key, value in tensors.items() if "num_batches" not in key)
    assert found == encoder_and_head + statistics + rest


def test_the_published_layout_is_accepted(tmp_path):
    """The keys, shapes and lists that the authors' module code gives."""
    published = json.loads(shared_path("facts", "keys", "lora.json").read_text())
    number, checkpoint = Numbers(3), codiff_checkpoint()
    for key, section in (("le", "encoder"), ("ld", "decoder"), ("lo", "others")):
        checkpoint[f"unet_lora_{section}_modules"] = published[key]
    checkpoint["vae_lora_encoder_modules"] = published["lvraw"]
    assert len(published["lvraw"]) == 65
    base = {"conv_in.base_layer.weight": [320, 4, 3, 3], "conv_in.base_layer.bias": [320]}
    checkpoint["state_dict_unet"] = {key: number(*shape) for key, shape in [*published["unet"], *base.items()]}
    assert set(published["sd"]) == set(checkpoint["state_dict_unet"])
    checkpoint["state_dict_vae"] = {key: number(*shape) for key, shape in published["vae"]}
    metadata, tensors = import_codiff(*saved(tmp_path, checkpoint, cave_checkpoint()))
    assert metadata.config["unet_lora"]["rank"] == 16
    key = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A"
    assert torch.equal(
        tensors[f"unet_lora.{key}.weight"], checkpoint["state_dict_unet"][f"{key}.default_decoder.weight"]
    )


def test_tensors_saved_on_a_graphics_card_arrive_on_the_cpu(tmp_path, codiff, cave, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    paths = saved(tmp_path, codiff, cave)
    assert b"cuda:0" in paths[1].read_bytes()
    _, tensors = import_codiff(*paths)
    assert {value.device.type for value in tensors.values()} == {"cpu"}
    assert torch.equal(tensors["prompt.m_head.weight"], cave["m_head.weight"])


# --- refusals ---------------------------------------------------------------------------------------------------------


def drop(section, key):
    return lambda checkpoint: checkpoint[section].pop(key)


def put(section, key, value):
    return lambda checkpoint: checkpoint[section].update({key: value})


def put_section(key, value):
    return lambda checkpoint: checkpoint.update({key: value})


def drop_many(checkpoint):
    for key in [key for key in checkpoint["state_dict_unet"] if "mid_block" in key]:
        del checkpoint["state_dict_unet"][key]


def swap_adapters(checkpoint):
    state = checkpoint["state_dict_unet"]
    state["conv_out.lora_A.default_encoder.weight"] = state.pop("conv_out.lora_A.default_decoder.weight")


def unlist(checkpoint):
    checkpoint["unet_lora_decoder_modules"].remove("conv_out")


def list_more(checkpoint):
    checkpoint["vae_lora_encoder_modules"] = [*checkpoint["vae_lora_encoder_modules"], "decoder.conv_in"]


Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default_others.weight"
CODIFF_REFUSALS = [
    (lambda checkpoint: checkpoint.pop("proj"), "sections of CODiff's codiff.pkl, but missing: proj"),
    (lambda checkpoint: checkpoint.update(optimizer={}), "unexpected: optimizer"),
    (put_section("rank_vae", "16"), "rank_vae is a str"),
    (put_section("rank_unet", 0), "rank_unet is 0"),
    (put_section("state_dict_vae", [1]), "state_dict_vae is a list"),
    (unlist, "unet_lora_decoder_modules to list the 148 layers .* but missing: conv_out"),
    (list_more, "vae_lora_encoder_modules to list the 32 layers .* but unexpected: decoder.conv_in"),
    (put_section("unet_lora_others_modules", [3]), r"missing: mid_block.* and 13 more; unexpected: 3"),
    (drop("state_dict_unet", Q), f"missing: {Q}"),
    (drop_many, "missing: mid_block.* and 29 more"),
    (swap_adapters, "missing: conv_out.lora_A.default_decoder.weight; unexpected: conv_out.lora_A.default_encoder"),
    (drop("state_dict_unet", "conv_in.base_layer.bias"), "missing: conv_in.base_layer.bias"),
    (drop("state_dict_vae", "quant_conv.lora_B.default_encoder.weight"), "state_dict_vae .* missing: quant_conv"),
    (put("state_dict_vae", "decoder.conv_in.lora_A.default_encoder.weight", torch.ones(1)), "unexpected: decoder"),
    (put("state_dict_unet", Q, torch.ones(16, 640)), r"of another shape: .* is \(16, 640\) instead of \(16, 1280\)"),
    (put_section("rank_unet", 8), r"rank 8 .* of another shape: .* and 513 more"),
    (put("state_dict_unet", Q, [1.0]), "of another type: .* is a list"),
    (put("state_dict_unet", Q, torch.ones((16, 1280), dtype=torch.int64)), "of another type: .* is torch.int64"),
    (put("state_dict_unet", Q, torch.ones(16, 1280).to_sparse()), "of another type"),
    (put("proj", "weight", torch.ones(1024, 512)), r"proj .* is \(1024, 512\) instead of \(1024, 10\)"),
    (drop("proj", "bias"), "proj .* missing: bias"),
]


@pytest.mark.parametrize(("change", "message"), CODIFF_REFUSALS)
def test_a_broken_codiff_is_refused_in_one_sentence(tmp_path, codiff, cave, change, message):
    with pytest.raises(CODiffCheckpointError, match=message) as caught:
        import_codiff(*saved(tmp_path, changed(codiff, change), cave))
    text = str(caught.value)
    assert text.startswith("codiff.pkl: ") and text.endswith(".")
    assert "\n" not in text
    assert len(text) < 600


def fbcnn(checkpoint):
    """Its elder sibling: strides of 2 and no norms, otherwise the same names."""
    for key in list(checkpoint):
        if ".res.1." in key:
            del checkpoint[key]
    checkpoint["m_down2.2.weight"] = checkpoint["m_down2.2.weight"][..., :2, :2].clone()


CAVE_REFUSALS = [
    (lambda state: state.pop("m_up2.1.res.1.running_var"), "missing: m_up2.1.res.1.running_var"),
    (lambda state: state.update({"to_gamma_3.0.weight": torch.ones(3)}), "unexpected: to_gamma_3.0.weight"),
    (lambda state: state.update({"m_tail.weight": torch.ones(3, 4, 1, 1)}),
     r"of another shape: m_tail.weight is \(3, 4, 1, 1\) instead of \(3, 4, 3, 3\)"),
    (fbcnn, r"missing: .* and 87 more; of another shape: m_down2.2.weight is \(8, 6, 2, 2\) instead of \(8, 6, 4, 4\)"),
    (lambda state: state.pop("m_head.weight"),
     r"the state dict of CaVE, with m_body_encoder.\* .* without m_head.weight"),
    (lambda state: state.update({"m_head.weight": 3}), "without m_head.weight"),
    (lambda state: state.clear(), r"of 0 entries without m_head.weight, m_down1.0.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CAVE_REFUSALS)
def test_a_broken_cave_is_refused_in_one_sentence(tmp_path, codiff, cave, change, message):
    codiff_path, cave_path = saved(tmp_path, codiff, changed(cave, change))
    for read in (lambda: import_codiff(codiff_path, cave_path), lambda: import_cave(cave_path)):
        with pytest.raises(CODiffCheckpointError, match=message) as caught:
            read()
        text = str(caught.value)
        assert text.startswith("cave.pth: ") and text.endswith(".")
        assert "\n" not in text
        assert len(text) < 600


def test_files_in_the_wrong_order_are_refused(tmp_path, codiff, cave):
    with pytest.raises(CODiffCheckpointError, match=r"codiff\.pkl first and their cave\.pth second"):
        import_codiff(*reversed(saved(tmp_path, codiff, cave)))


class Foreign:
    """Something that a pickle can hold and that would run code when it is loaded."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


@pytest.mark.parametrize("part", ["codiff", "cave"])
def test_a_pickle_with_code_is_refused_and_never_run(tmp_path, codiff, cave, part, capsys):
    files = {"codiff": codiff, "cave": cave}
    files[part] = changed(files[part], lambda checkpoint: checkpoint.update(more=Foreign()))
    with pytest.raises(CODiffCheckpointError, match=r"tensors and plain values only.*it asks for print\)") as caught:
        import_codiff(*saved(tmp_path, **files))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert capsys.readouterr().out == ""


PAGE = b"<!DOCTYPE html><html><body>Quota exceeded</body></html>"


@pytest.mark.parametrize("content", [b"", PAGE, b"PK\x03\x04 cut", pickle.dumps({"proj": 1}), pickle.dumps(Foreign())])
@pytest.mark.parametrize("index", [0, 1])
def test_a_file_of_another_kind_is_refused(tmp_path, codiff, cave, content, index, capsys):
    paths = saved(tmp_path, codiff, cave)
    paths[index].write_bytes(content)
    with pytest.raises(CODiffCheckpointError, match=r"not a whole checkpoint \(.+\)") as caught:
        import_codiff(*paths)
    text = str(caught.value)
    assert text.startswith(paths[index].name)
    assert "\n" not in text
    assert "weights_only" not in text
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("index", [0, 1])
def test_a_cut_a_listed_and_a_missing_file_are_refused(tmp_path, codiff, cave, index):
    paths = saved(tmp_path, codiff, cave)
    for length in (10, 1000, len(paths[index].read_bytes()) - 100):
        paths[index].write_bytes(paths[index].read_bytes()[:length])
        with pytest.raises(CODiffCheckpointError, match="not a whole checkpoint"):
            import_codiff(*paths)
    torch.save([1, 2], paths[index])
    with pytest.raises(CODiffCheckpointError, match="a dictionary, got a list"):
        import_codiff(*paths)
    paths[index].unlink()
    with pytest.raises(CODiffCheckpointError, match=f"{paths[index].name}: there is no such file"):
        import_codiff(*paths)


def test_flipped_bytes_are_refused_or_change_only_numbers(tmp_path, cave):
    """No damage makes anything but this module's own refusal."""
    path = saved(tmp_path, cave=cave)[1]
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    outcomes = collections.Counter()
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[int(torch.randint(len(whole) // 3, (), generator=generator))] ^= 0x5A
        path.write_bytes(bytes(damaged))
        try:
            outcomes[len(import_cave(path)[1])] += 1
        except CODiffCheckpointError:
            outcomes["refused"] += 1
    assert set(outcomes) == {"refused", len(cave)}


# --- the command ------------------------------------------------------------------------------------------------------


def convert(*arguments):
    command = [sys.executable, "-m", "training", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_command_writes_a_codiff_restorer(tmp_path, codiff, cave):
    paths, out = saved(tmp_path, codiff, cave), tmp_path / "codiff.safetensors"
    done = convert("codiff", *paths, out, "--half", "--license", "MIT")
    assert done.returncode == 0, done.stderr
    assert "codiff" in done.stdout
    file = read_restorer(out)
    metadata, tensors = import_codiff(*paths)
    assert file.metadata.license == "MIT"
    assert (file.metadata.config, file.metadata.base) == (metadata.config, "sd2.1-base")
    assert file.tensors.keys() == tensors.keys()
    assert all(torch.equal(file.tensors[key], value.to(file.tensors[key].dtype)) for key, value in tensors.items())


def test_the_command_writes_a_cave_restorer(tmp_path, cave):
    from training.convert import run

    path, out = saved(tmp_path, cave=cave)[1], tmp_path / "cave.safetensors"
    run(["cave", str(path), str(out)])
    file = read_restorer(out)
    assert file.metadata.family == "cave"
    assert all(torch.equal(file.tensors[f"prompt.{key}"], value) for key, value in cave.items())


def test_a_refusal_by_the_command_is_one_line_and_exit_status_2(tmp_path, cave):
    path = saved(tmp_path, cave=cave)[1]
    done = convert("codiff", tmp_path / "absent.pkl", path, tmp_path / "out.safetensors")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "training convert: absent.pkl: there is no such file. Give the path of CODiff's codiff.pkl."
    ]
    assert not (tmp_path / "out.safetensors").exists()
