"""LoadJPEG with pictures that are no JPEG: pixels, an estimated quality, and JPEG_DATA that nothing is held to."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.jpeg import encode_with_pillow, read_jpeg_and_pixels
from restoration.networks.timestep_predictor import TimestepPredictor, TimestepPredictorConfig
from restoration.restorer_file import read_restorer
from tests.codiff_graphs import run
from tests.graphs import Graph, photo, save_jpeg
from tests.shared import shared_path
from tests.sodiff_graphs import QUALITY
from tests.test_nodes_errors import refusal

pytestmark = pytest.mark.comfyui


@pytest.fixture
def files(sodiff) -> ModuleType:
    """The module of LoadJPEG."""
    return sys.modules[f"{sodiff.comfy.pack}.nodes.files"]


@pytest.fixture(autouse=True)
def small_estimator(files, monkeypatch) -> None:
    """The test's estimator in the place of the one that ships."""
    monkeypatch.setattr(files, "QUALITY_ESTIMATOR", QUALITY)


def compressed_once(quality: int, height: int = 160, width: int = 160) -> torch.Tensor:
    """(1, 3, H, W), a photo after JPEG compression, in whole 8-bit levels."""
    return read_jpeg_and_pixels(encode_with_pillow(photo(height, width)[0].movedim(-1, 0), quality))[1][None]


def put(sodiff, name: str, image: torch.Tensor) -> Path:
    path = sodiff.comfy.base / "input" / name
    Image.fromarray((image[0] * 255).round().byte().movedim(0, -1).numpy()).save(path)
    return path


def load(sodiff, name: str) -> list:
    graph = Graph()
    node = graph.add("LoadJPEG", image=name)
    graph.sink([node, 0])
    return run(sodiff.comfy, graph).outputs(node)


def estimated(sodiff, image: torch.Tensor) -> float:
    """The quality by the test's estimator in plain PyTorch."""
    file = read_restorer(sodiff.comfy.base / "models" / "jpeg_restorers" / QUALITY)
    network = TimestepPredictor(TimestepPredictorConfig(**file.metadata.config["timestep_predictor"]))
    network.load_state_dict(file.part("timestep"))
    with torch.no_grad():
        return float(network.eval()(image)[0])


@pytest.mark.parametrize("name", ["saved.png", "saved.bmp", "saved.tif"])
def test_a_picture_that_was_a_jpeg_before(sodiff, name):
    """Its pixels to the bit, and the quality that the estimator sees in them: lower for stronger compression."""
    qualities = {}
    for quality in (8, 75):
        image = compressed_once(quality)
        put(sodiff, name, image)
        pixels, data, qualities[quality], stem = load(sodiff, name)
        assert torch.equal(pixels, image.movedim(1, -1)) and pixels.is_contiguous() and stem == "saved"
        assert qualities[quality] == pytest.approx(estimated(sodiff, image), abs=1e-2)
        assert [type(one).__name__ for one in data] == ["NoJPEG"] and data[0].name == name
    assert qualities[8] < qualities[75]


def test_the_content_counts_not_the_ending(sodiff):
    """A PNG that is called .jpg is loaded as what it is; a JPEG that is called .png with all that it says."""
    shutil.copy(shared_path("data", "torture", "jd__jpg-size-6x6.jpg"), sodiff.comfy.base / "input" / "fake.jpg")
    pixels, data, quality, _ = load(sodiff, "fake.jpg")
    with Image.open(sodiff.comfy.base / "input" / "fake.jpg", formats=("PNG",)) as picture:
        assert np.array_equal((pixels[0] * 255).round().byte().numpy(), np.array(picture.convert("RGB")))
    assert type(data[0]).__name__ == "NoJPEG" and 0 <= quality <= 100
    shutil.move(save_jpeg(sodiff.comfy, "real.jpg", photo(24, 16), 20), sodiff.comfy.base / "input" / "real.png")
    pixels, data, quality, _ = load(sodiff, "real.png")
    assert (data[0].width, data[0].height, quality) == (16, 24, 20.0)


def test_its_pixels_are_restored_but_not_held_to_a_file(sodiff):
    """DriftRec restores the picture; with its JPEG_DATA connected it says why not."""
    put(sodiff, "plain.png", compressed_once(10, 24, 24))
    graph = Graph()
    loader = graph.add("LoadJPEG", image="plain.png")
    node = graph.sample([loader, 0])
    graph.sink([node, 0])
    assert run(sodiff.comfy, graph).outputs(node)[0].isfinite().all()
    graph = Graph()
    loader = graph.add("LoadJPEG", image="plain.png")
    graph.sink([graph.sample([loader, 0], jpeg=[loader, 1]), 0])
    message = refusal(sodiff.comfy, graph, "DriftRecSample")
    assert "plain.png is no JPEG" in message and "Disconnect jpeg" in message and "Compress to JPEG" in message


def test_compressing_it_anew_gives_something_to_hold_to(sodiff):
    """Compress to JPEG after it: its JPEG_DATA and its IMAGE belong together."""
    put(sodiff, "plain.png", compressed_once(10, 24, 24))
    graph = Graph()
    loader = graph.add("LoadJPEG", image="plain.png")
    again = graph.add("JPEGCompress", image=[loader, 0], quality=30, subsampling="4:2:0")
    node = graph.sample([again, 0], jpeg=[again, 1])
    graph.sink([node, 0])
    assert run(sodiff.comfy, graph).outputs(node)[0].isfinite().all()


def test_damaged_pictures_are_refused(sodiff):
    """A PNG that is cut, and one that starts as a JPEG but is none: each in one sentence from the node."""
    path = put(sodiff, "cut.png", compressed_once(10, 40, 40))
    path.write_bytes(path.read_bytes()[:200])
    graph = Graph()
    graph.sink([graph.add("LoadJPEG", image="cut.png"), 0])
    assert "cut.png is cut short or damaged" in refusal(sodiff.comfy, graph, "LoadJPEG")
    (sodiff.comfy.base / "input" / "start.png").write_bytes(b"\xff\xd8" + path.read_bytes())
    graph = Graph()
    graph.sink([graph.add("LoadJPEG", image="start.png"), 0])
    assert "start.png" in refusal(sodiff.comfy, graph, "LoadJPEG")


def test_the_estimator_that_ships_is_asked(sodiff, files, monkeypatch):
    """Nothing else chosen: the pack's own file, which is right within 10 about a photo that was saved again."""
    monkeypatch.undo()
    assert files.QUALITY_ESTIMATOR == "starter-quality.safetensors"
    assert Path(files.restorer_path(files.QUALITY_ESTIMATOR)).parent.name == "weights"
    for quality in (10, 50, 90):
        put(sodiff, "plain.png", compressed_once(quality, 256, 256))
        assert load(sodiff, "plain.png")[2] == pytest.approx(quality, abs=10)


def test_without_its_estimator_the_message_says_so(sodiff, files, monkeypatch):
    """The file that ships is gone: what is missing, and what to do; JPEGs load all the same."""
    monkeypatch.setattr(files, "QUALITY_ESTIMATOR", "absent-quality.safetensors")
    put(sodiff, "plain.png", compressed_once(10, 24, 24))
    graph = Graph()
    graph.sink([graph.add("LoadJPEG", image="plain.png"), 2])
    message = refusal(sodiff.comfy, graph, "LoadJPEG")
    assert "absent-quality.safetensors" in message and "missing from the pack's weights folder" in message
    save_jpeg(sodiff.comfy, "ordinary.jpg", photo(16, 16), 35)
    assert load(sodiff, "ordinary.jpg")[2] == 35


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (1100, 40)])
def test_pictures_of_any_size(sodiff, height, width):
    """Smaller than a block of JPEG, narrow, and larger than the tiles in which the estimator looks at it."""
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    put(sodiff, "any.png", image)
    pixels, _, quality, _ = load(sodiff, "any.png")
    assert tuple(pixels.shape) == (1, height, width, 3) and 0 <= quality <= 100
    assert quality == pytest.approx(estimated(sodiff, pixels.movedim(-1, 1)), abs=1e-2)
