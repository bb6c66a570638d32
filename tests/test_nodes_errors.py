"""Bad input ends in one sentence from the node that met it, and ComfyUI goes on."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from restoration.restorer_file import METADATA_KEY, RestorerMetadata
from tests.conftest import write_driftrec
from tests.graphs import Graph, photo, save_jpeg
from tests.shared import shared_path

pytestmark = pytest.mark.comfyui


def refusal(comfy, graph: Graph, node: str) -> str:
    """The message of a graph that must fail in `node`: one line, and a good graph runs after it."""
    result = comfy.run(graph.prompt)
    assert not result.success
    details = [detail for details in result.validation.values() for detail in details]
    message = result.error if not details else details[0].partition(" - ")[2]
    assert message is not None and f"{node}: " in message and "\n" not in message.strip() and len(message) < 500, (
        message
    )
    if not details:
        assert result.error_node == node
    good = Graph()
    good.sink([good.sample([good.image(photo(8, 8)), 0], steps=1), 0])
    assert comfy.run(good.prompt).success, "ComfyUI no longer works after the error"
    return message


def load(comfy, name: str) -> str:
    graph = Graph()
    graph.sink([graph.add("LoadJPEG", image=name), 0])
    return refusal(comfy, graph, "LoadJPEG")


BROKEN = {
    "tm__cmyk-sample-no-icc.jpg": "CMYK",
    "syn__cut_at_50pct.jpg": "cut short",
    "vips__truncated.jpg": "cut short",
    "jd__MR4.jpg": "lossless",
    "syn__zero_height.jpg": "size of",
    "syn__huge_dims_65500x65500.jpg": "65500x65500",
    "ljt__testimgari.jpg": "arithmetic",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_jpegs(fresh, name):
    """CMYK, truncated, lossless, zero-sized, a and a huge promise."""
    shutil.copy(shared_path("data", "torture", name), fresh.base / "input" / name)
    message = load(fresh, name)
    assert BROKEN[name] in message and name in message


def test_12_bit_jpeg(fresh):
    """A frame header of 12 bits per sample; no decoder for it is built in anywhere here."""
    path = save_jpeg(fresh, "deep.jpg", photo(16, 16))
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xc0") + 4] = 12
    path.write_bytes(data)
    assert "12 bits" in load(fresh, "deep.jpg")


def test_gif_is_told_from_a_jpeg(fresh):
    """A GIF with the ending of a picture that the node takes."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(fresh.base / "input" / "upload.png", "GIF")
    assert "upload.png is not a JPEG" in load(fresh, "upload.png")


def test_missing_empty_and_outside_files(fresh):
    """No such file, an empty one, a folder, and paths that lead out of the input folder."""
    (fresh.base / "input" / "empty.jpg").write_bytes(b"")
    (fresh.base / "input" / "folder.jpg").mkdir(exist_ok=True)
    outside = fresh.base / "secret.jpg"
    shutil.copy(save_jpeg(fresh, "inside.jpg", photo(8, 8)), outside)
    assert "empty" in load(fresh, "empty.jpg")
    assert "folder" in load(fresh, "folder.jpg")
    for name in ("absent.jpg", "../secret.jpg", str(outside)):
        assert "no file" in load(fresh, name)


def bad_restorer(comfy, name: str) -> str:
    graph = Graph()
    graph.sink([graph.add("LoadJPEGRestorer", restorer=name, dtype="default"), 0])
    return refusal(comfy, graph, "LoadJPEGRestorer")


def models(comfy) -> Path:
    return comfy.base / "models" / "jpeg_restorers"


def test_restorer_that_is_cut(fresh):
    """Half a download, at any place: in the header, in the tensors."""
    data = write_driftrec(models(fresh) / "whole.safetensors").read_bytes()
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        (models(fresh) / "cut.safetensors").write_bytes(data[:length])
        assert "not a whole safetensors file" in bad_restorer(fresh, "cut.safetensors")


def test_foreign_safetensors(fresh):
    """Some LoRA that got into the folder."""
    save_file({"a": torch.zeros(2)}, models(fresh) / "foreign.safetensors")
    assert "not a JPEG restorer" in bad_restorer(fresh, "foreign.safetensors")


class Evil:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_renamed_pickle_is_never_unpickled(fresh):
    """A .ckpt renamed to .safetensors is refused, and nothing in it runs."""
    trace = fresh.base / "executed"
    (models(fresh) / "renamed.safetensors").write_bytes(pickle.dumps(Evil(trace)))
    assert "pickled checkpoints must be converted" in bad_restorer(fresh, "renamed.safetensors")
    assert not trace.exists()


def rewritten(comfy, name: str, **changes) -> str:
    """A copy of a restorer whose description is changed."""
    source = write_driftrec(models(comfy) / "whole.safetensors")
    fields = {**json.loads(_description(source)), **changes}
    save_file(load_file(source), models(comfy) / name, metadata={METADATA_KEY: json.dumps(fields)})
    return name


def _description(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()[METADATA_KEY]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "sorcery"}, "unknown family"),
        ({"family": "prior"}, "configuration is not valid"),
        ({"version": 99}, "newer version"),
        ({"config": {}}, "configuration is not valid"),
        ({"config": {"network": {"width": "wide"}}}, "configuration is not valid"),
        ({"config": {"network": {"res_blocks": 10**9}}}, "configuration is not valid"),
    ],
)
def test_descriptions_that_do_not_fit(fresh, changes, said):
    """Another family, a newer format, a configuration that is empty or nonsense."""
    assert said in bad_restorer(fresh, rewritten(fresh, "changed.safetensors", **changes))


def test_tensors_that_do_not_fit(fresh):
    """The description of one network with the tensors of another."""
    source = write_driftrec(models(fresh) / "whole.safetensors")
    tensors = load_file(source)
    dropped = sorted(tensors)[0]
    del tensors[dropped]
    save_file(tensors, models(fresh) / "gap.safetensors", metadata={METADATA_KEY: _description(source)})
    assert "missing" in bad_restorer(fresh, "gap.safetensors")


def test_missing_restorer(fresh):
    """A workflow from someone else that names a file which is not here, and paths that lead out of the folder."""
    for name in ("absent.safetensors", "../../../input/inside.jpg", "/etc/passwd"):
        assert "no restorer" in bad_restorer(fresh, name)


def sample(comfy, image, jpeg=None, restorer=None) -> str:
    graph = Graph()
    inputs = {"sampler": "ode_2m", "steps": 1, "seed": 0, "samples": 1, "color": "mean"}
    if restorer is None:
        source = graph.add("LoadJPEGRestorer", restorer="test-driftrec.safetensors", dtype="default")
    else:
        source = graph.image(restorer)
    if jpeg is not None:
        inputs["jpeg"] = [graph.image(jpeg), 0]
    graph.sink([graph.add("DriftRecSample", restorer=[source, 0], image=[graph.image(image), 0], **inputs), 0])
    return refusal(comfy, graph, "DriftRecSample")


def test_images_that_are_none(fresh):
    """An empty batch, five channels, a mask."""
    for shape in ((0, 8, 8, 3), (1, 8, 8, 5), (1, 8, 8), (1, 0, 8, 3)):
        assert str(shape) in sample(fresh, torch.zeros(shape))


def loaded(comfy, name: str) -> list:
    graph = Graph()
    jpeg = graph.add("LoadJPEG", image=name)
    graph.sink([jpeg, 0])
    return comfy.run(graph.prompt).outputs(jpeg)[1]


def test_jpeg_data_of_another_picture(fresh):
    """Another size, a turned picture, another number of images, something else altogether."""
    save_jpeg(fresh, "small.jpg", photo(16, 24))
    data = loaded(fresh, "small.jpg")
    assert "size, 24x16, got 40x16" in sample(fresh, torch.zeros(1, 16, 40, 3), data)
    assert "looks turned" in sample(fresh, torch.zeros(1, 24, 16, 3), data)
    assert "each of the 3 images" in sample(fresh, torch.zeros(3, 16, 24, 3), data * 2)
    assert "JPEG_DATA of this pack" in sample(fresh, torch.zeros(1, 16, 24, 3), ["nonsense"])


def test_restorer_of_another_family(fresh):
    """A family that a later version loads is refused by this node with the family's name."""
    import sys

    types = sys.modules[f"{fresh.pack}.nodes.types"]
    metadata, source = RestorerMetadata("prior", {}), types.Source("prior.safetensors", 0, 0)
    other = types.Restorer("prior.safetensors", metadata, torch.nn.Identity(), None, torch.float32, source)
    assert "got prior (prior.safetensors)" in sample(fresh, torch.zeros(1, 8, 8, 3), restorer=other)
    assert "got str" in sample(fresh, torch.zeros(1, 8, 8, 3), restorer="no restorer")
