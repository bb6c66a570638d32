"""The weights file: what is written is read back, a failed write changes nothing, all else is refused in words."""

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.restorer_file import (
    FAMILIES,
    RestorerFile,
    RestorerFileError,
    RestorerMetadata,
    half,
    load_part,
    read_metadata,
    read_restorer,
    write_restorer,
)

METADATA = RestorerMetadata(
    "driftrec",
    {"network": {"width": 8, "channel_multipliers": [1, 2]}, "sde": {"gamma": 1.5}},
    base=None,
    training={"images": 1000, "psnr": 31.25, "note": "Grüße"},
    license="CC0-1.0",
)
VALID = {"family": "driftrec", "config": {}, "base": None, "training": {}, "license": "x", "version": 1}


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "score.a.weight": torch.randn(3, 4, generator=draw),
        "score.b": torch.randn(5, generator=draw).to(torch.bfloat16),
        "score.count": torch.tensor([7, 8]),
        "scores.other": torch.randn(2, generator=draw).half(),
    }


@pytest.fixture
def path(tmp_path, tensors):
    write_restorer(tmp_path / "x.safetensors", METADATA, tensors)
    return tmp_path / "x.safetensors"


def described(tmp_path, text):
    """A safetensors file with that text as its description, whatever it is."""
    file = tmp_path / "odd.safetensors"
    save_file({"score.a": torch.zeros(2)}, file, metadata={"jpeg_restorer": text})
    return file


# --- round trip -------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(path, tensors):
    file = read_restorer(path)
    assert (file.metadata, file.name) == (METADATA, "x.safetensors")
    assert file.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        assert file.tensors[key].dtype == value.dtype
        assert torch.equal(file.tensors[key], value)
    assert read_metadata(path) == METADATA


def test_it_is_a_plain_safetensors_file_with_one_json_description(path):
    with safe_open(path, framework="pt") as file:
        assert file.metadata().keys() == {"jpeg_restorer"}
        fields = json.loads(file.metadata()["jpeg_restorer"])
    assert fields["family"] == "driftrec"
    assert fields["version"] == 1


def test_a_part_is_found_by_its_whole_prefix(path):
    assert read_restorer(path).part("score").keys() == {"a.weight", "b", "count"}


def test_tensors_in_any_layout_are_written(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    write_restorer(
        tmp_path / "y.safetensors", METADATA, {"score.t": base.t(), "score.s": base[:, ::2].requires_grad_()}
    )
    file = read_restorer(tmp_path / "y.safetensors")
    assert torch.equal(file.tensors["score.t"], base.t())
    assert torch.equal(file.tensors["score.s"], base[:, ::2])


def test_folders_are_made_and_others_may_read(tmp_path, tensors):
    target = tmp_path / "new" / "folder" / "x.safetensors"
    write_restorer(target, METADATA, tensors)
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o644
    assert os.listdir(target.parent) == ["x.safetensors"]


# --- a write that fails -----------------------------------------------------------------------------------------------


class FailingMapping(dict):
    def items(self):
        yield from list(super().items())[:1]
        raise OSError("no space left on device")


@pytest.mark.parametrize("there_before", [True, False])
def test_an_exception_while_writing_leaves_no_file_and_the_old_one_whole(tmp_path, tensors, there_before):
    target = tmp_path / "x.safetensors"
    if there_before:
        write_restorer(target, METADATA, tensors)
    before = target.read_bytes() if there_before else None
    with pytest.raises(OSError, match="no space left"):
        write_restorer(target, METADATA, FailingMapping(tensors))
    assert os.listdir(tmp_path) == (["x.safetensors"] if there_before else [])
    assert (target.read_bytes() if there_before else None) == before


def test_an_exception_inside_the_save_leaves_no_file(tmp_path, tensors, monkeypatch):
    def save_half(whole, file, metadata):
        with open(file, "wb") as stream:
            stream.write(b"begun")
        raise KeyboardInterrupt

    monkeypatch.setattr("restoration.restorer_file.save_file", save_half)
    with pytest.raises(KeyboardInterrupt):
        write_restorer(tmp_path / "x.safetensors", METADATA, tensors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (RestorerMetadata("vae", {}), f"unknown family 'vae', expected one of {', '.join(FAMILIES)}"),
        (RestorerMetadata("driftrec", [1]), "lacks a valid config"),
        (RestorerMetadata("driftrec", {}, license=None), "lacks a valid license"),
        (RestorerMetadata("driftrec", {}, training={"files": "x" * (1 << 20)}), "over the limit of 1048576"),
    ],
)
def test_a_description_that_could_not_be_read_back_is_not_written(tmp_path, tensors, metadata, message):
    with pytest.raises(RestorerFileError, match=message):
        write_restorer(tmp_path / "x.safetensors", metadata, tensors)
    assert os.listdir(tmp_path) == []


# --- files that are refused -------------------------------------------------------------------------------------------


def assert_refused(path, message):
    for read in (read_metadata, read_restorer):
        with pytest.raises(RestorerFileError, match=message) as caught:
            read(path)
        text = str(caught.value)
        assert text.startswith(f"{path.name}: ")
        assert "\n" not in text
        assert str(path.parent) not in text


@pytest.mark.parametrize("kept", [0, 3, 8, 40, -1, -20])
def test_a_cut_file_is_refused(path, kept):
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert_refused(path, "not a whole safetensors file .* Download or export it again")


def test_a_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"more")
    assert_refused(path, "not a whole safetensors file")


class Foreign:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_a_renamed_pickle_is_refused_with_the_way_to_convert_it_and_never_run(tmp_path, capsys):
    for index, save in enumerate((torch.save, lambda value, file: file.write_bytes(pickle.dumps(value)))):
        file = tmp_path / f"pickle{index}.safetensors"
        save({"w": Foreign()}, file)
        assert_refused(file, "pickled checkpoints must be converted first: python -m training convert")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_something_else_is_refused(tmp_path, metadata):
    save_file({"score.a": torch.zeros(2)}, tmp_path / "lora.safetensors", metadata=metadata)
    assert_refused(
        tmp_path / "lora.safetensors", "a safetensors file, but not a JPEG restorer .* Choose a file made by"
    )


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert_refused(tmp_path / "absent.safetensors", "there is no such file")
    (tmp_path / "folder.safetensors").mkdir()
    assert_refused(tmp_path / "folder.safetensors", "there is no such file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"written by a newer version of this pack \(format 2, known is 1\). Update the pack"),
        ({"version": 0}, "lacks a valid version"),
        ({"version": True}, "lacks a valid version"),
        ({"version": "1"}, "lacks a valid version"),
        ({"version": 1.0}, "lacks a valid version"),
        ({"family": "vae"}, "unknown family 'vae', expected one of cave"),
        ({"family": ["driftrec"]}, "lacks a valid family"),
        ({"config": "{}"}, "lacks a valid config"),
        ({"base": 3}, "lacks a valid base"),
        ({"training": None}, "lacks a valid training"),
        ({"license": None, "config": []}, "lacks a valid config, license"),
    ],
)
def test_a_description_with_wrong_values_is_refused(tmp_path, changes, message):
    assert_refused(described(tmp_path, json.dumps({**VALID, **changes})), message)


@pytest.mark.parametrize("key", list(VALID))
def test_a_description_without_one_of_its_fields_is_refused(tmp_path, key):
    fields = {name: value for name, value in VALID.items() if name != key}
    assert_refused(described(tmp_path, json.dumps(fields)), f"lacks a valid {key}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"family": "driftrec"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[1, 2]", "is no JSON object"),
        ("null", "is no JSON object"),
        (json.dumps({**VALID, "license": "x" * (1 << 20)}), "characters long, over the limit of 1048576"),
    ],
)
def test_a_description_that_is_no_description_is_refused(tmp_path, text, message):
    assert_refused(described(tmp_path, text), message)


def test_fields_of_a_later_minor_version_are_passed_over(tmp_path):
    metadata = read_metadata(described(tmp_path, json.dumps({**VALID, "thumbnail": "..."})))
    assert metadata == RestorerMetadata("driftrec", {}, license="x")


# --- into a network ---------------------------------------------------------------------------------------------------


def restorer(network, **changes):
    state = {f"score.{key}": value.clone() for key, value in network.state_dict().items()}
    state |= {f"score.{key}": value for key, value in changes.items() if value is not None}
    for key in [key for key, value in changes.items() if value is None]:
        del state[f"score.{key}"]
    return RestorerFile(METADATA, state, "x.safetensors")


@pytest.mark.parametrize("assign", [False, True])
def test_a_part_that_fits_is_loaded(assign):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_part(target, restorer(source), "score", assign=assign)
    assert torch.equal(source.weight, target.weight)
    assert torch.equal(source.bias, target.bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, r"\(missing: bias\)"),
        ({"scale": torch.zeros(1)}, r"\(unexpected: scale\)"),
        ({"weight": torch.zeros(3, 2)}, r"\(of another shape: weight is \(3, 2\) instead of \(2, 3\)\)"),
        (
            {"bias": None, "weight": torch.zeros(6), **{name: torch.zeros(1) for name in "abcde"}},
            r"\(missing: bias; unexpected: a, b, c and 2 more; of another shape: weight is \(6,\) instead of",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(changes, message):
    target = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(RestorerFileError, match="x.safetensors: its tensors do not fit the network.*" + message):
        load_part(target, restorer(nn.Linear(3, 2), **changes), "score")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


# --- half precision ---------------------------------------------------------------------------------------------------


def test_half_precision_halves_matrices_and_leaves_the_rest():
    tensors = {"w": torch.rand(4, 4), "b": torch.rand(4), "n": torch.tensor([1]), "bf": torch.rand(2, 2).bfloat16()}
    halved = half(tensors)
    kinds = {key: value.dtype for key, value in halved.items()}
    assert kinds == {"w": torch.float16, "b": torch.float32, "n": torch.int64, "bf": torch.float16}
    torch.testing.assert_close(halved["w"].float(), tensors["w"], atol=3e-4, rtol=0)


@torch.no_grad()
def test_a_halved_network_still_knows_the_noise_level():
    """Rounded noise frequencies shift the phases of the embedding at small sigma and change the output by 10%."""
    config = NCSNppConfig(width=16, channel_multipliers=(1, 2), attention_levels=())
    network, halved = NCSNpp(config), NCSNpp(config)
    draw = torch.Generator().manual_seed(0)
    network.initialize(draw)
    for key, parameter in network.named_parameters():
        if key != "all_modules.0.W":
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    halved.load_state_dict(half(network.state_dict()))
    x = torch.rand(2, 6, 16, 16, generator=draw)
    for sigma in (0.006, 0.05, 0.5):
        level = torch.full((2,), sigma)
        expected = network(x, level)
        assert (halved(x, level) - expected).abs().mean() < 0.01 * expected.abs().mean()
