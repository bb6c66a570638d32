"""What RestoreJPEG refuses, in words, through ComfyUI's own executor."""

from __future__ import annotations

import sys

import pytest
import torch

from tests import codiff_graphs, sodiff_graphs
from tests import restore_graphs as graphs
from tests.graphs import Graph, photo
from tests.restore_graphs import BY_FAMILY, CODIFF, FIXED, add_restore, jpeg_of, restored

pytestmark = pytest.mark.comfyui


def refusal(comfy, restorer: str, **inputs) -> str:
    """The sentence that the node ends with."""
    graph = Graph()
    links = {name: [graph.image(value), 0] if name in ("image", "jpeg") else value for name, value in inputs.items()}
    graph.sink([add_restore(graph, restorer, **links), 0])
    result = comfy.run(graph.prompt)
    assert not result.success and result.error_node == "RestoreJPEG", (result.error, result.validation)
    assert result.error.startswith(("RestoreJPEG: ", "ValueError: RestoreJPEG: ")) and "\n" not in result.error
    return result.error


@pytest.mark.parametrize("name", [sodiff_graphs.QUALITY, sodiff_graphs.FIRST_STAGE])
def test_restorers_that_restore_nothing_are_refused(restore, sodiff_files, name):
    message = refusal(restore, name, image=photo(16, 16))
    assert name in message and "codiff or sodiff or driftrec or regression or prior" in message


def test_nothing_to_restore_is_refused(restore):
    assert "neither" in refusal(restore, CODIFF)
    assert "JPEG_DATA of this pack" in refusal(restore, CODIFF, jpeg=[])
    message = refusal(restore, BY_FAMILY["prior"], image=photo(16, 16))
    assert "needs" not in message and "JPEG_DATA" in message and "an image alone" in message


def test_a_picture_that_is_no_jpeg_needs_its_pixels_and_another_restorer_than_a_prior(restore):
    no_jpeg = sys.modules[f"{restore.pack}.nodes.types"].NoJPEG("once.png")
    assert "once.png is no JPEG" in refusal(restore, CODIFF, jpeg=[no_jpeg])
    assert "once.png is no JPEG" in refusal(restore, BY_FAMILY["prior"], image=photo(24, 40), jpeg=[no_jpeg])


def test_pictures_and_files_that_do_not_belong_together_are_refused(restore):
    jpegs, image = jpeg_of(restore, 24, 32)
    assert "32x24" in refusal(restore, CODIFF, image=photo(32, 24), jpeg=jpegs)
    assert "one JPEG for each of the 3 images" in refusal(
        restore, CODIFF, image=image.expand(3, -1, -1, -1), jpeg=jpegs * 2
    )
    others, _ = jpeg_of(restore, 16, 32)
    assert "one size" in refusal(restore, CODIFF, jpeg=jpegs + others)


def test_a_quality_that_the_restorer_has_no_use_for_is_refused(restore):
    assert "199.5" in refusal(restore, FIXED, image=photo(32, 32), quality=20.0)
    assert torch.isfinite(restored(restore, FIXED, photo(32, 32))).all()


def test_adapters_say_what_to_connect(fresh, restorers, sodiff_files):
    """No MODEL, no VAE, and those of the checkpoint or of another restorer in place of the adapted ones."""
    name = codiff_graphs.RESTORER

    def refused(model: list | None, vae: list | None) -> str:
        graph = Graph()
        checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=sodiff_files.base.checkpoint.name)
        loaded = graphs.loader(graph, name, model=[checkpoint, 0], vae=[checkpoint, 2])
        nodes = {"checkpoint": checkpoint, "loaded": loaded, "small": graphs.loader(graph, CODIFF)}
        given = {
            key: [nodes[value[0]], value[1]] for key, value in (("model", model), ("vae", vae)) if value is not None
        }
        image = [graph.image(photo(32, 32)), 0]
        graph.sink([graph.add("RestoreJPEG", **graphs.SETTINGS, restorer=[loaded, 0], image=image, **given), 0])
        result = fresh.run(graph.prompt)
        assert not result.success and "RestoreJPEG: " in result.error and "\n" not in result.error
        return result.error

    assert "MODEL and VAE. Connect" in refused(None, None)
    assert "needs its VAE" in refused(["loaded", 1], None)
    assert "its own weights" in refused(["checkpoint", 0], ["loaded", 2])
    assert "prompts 1024 wide, got 32" in refused(["small", 1], ["loaded", 2])
    assert "4 latent channels" in refused(["loaded", 1], ["small", 2])
