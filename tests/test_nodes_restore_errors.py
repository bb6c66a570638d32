"""What RestoreJPEG refuses, in words, through ComfyUI's own executor."""

from __future__ import annotations

import sys

import pytest
import torch

from tests import codiff_graphs, sodiff_graphs
from tests import restore_graphs as graphs
from tests.codiff_graphs import run
from tests.ddrm_graphs import CLASSES, write_prior
from tests.graphs import Graph, photo
from tests.one_step_networks import write_tiny_codiff
from tests.restore_graphs import BY_FAMILY, CODIFF, FIXED, add_restore, jpeg_of, restored

pytestmark = pytest.mark.comfyui
SOCKETS = ("image", "jpeg", "model", "vae")


def refusal(comfy, restorer: str, **inputs) -> str:
    """The sentence that the node ends with."""
    graph = Graph()
    links = {name: [graph.image(value), 0] if name in SOCKETS else value for name, value in inputs.items()}
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


def test_a_picture_that_holds_no_numbers_is_not_blamed_on_the_network(restore):
    """The node that made it is; the second of two pictures is named."""
    jpegs, image = jpeg_of(restore, 24, 32)
    broken = torch.cat([image, image])
    broken[1, 3, 4, :2] = float("nan")
    for family in ("codiff", "regression", "prior"):
        message = refusal(restore, BY_FAMILY[family], image=broken, jpeg=jpegs * 2)
        assert "image 2 holds something that is no number (NaN) in 2 of its values. Look at the node" in message
    assert "image 2 holds" in refusal(restore, CODIFF, image=broken, strength=0.0)


def test_a_prior_restores_each_picture_from_its_own_file(restore):
    """One file for all would give one picture as often as there are images."""
    jpegs, image = jpeg_of(restore, 24, 32)
    message = refusal(restore, BY_FAMILY["prior"], image=image.expand(3, -1, -1, -1), jpeg=jpegs)
    assert "one JPEG for each of the 3 images, got 1" in message and "Connect the JPEG_DATA" in message


def test_a_prior_of_classes_is_sent_to_the_node_that_has_an_input_for_them(restore):
    """By the names that the user sees."""
    write_prior(restore.base / "models" / "jpeg_restorers" / CLASSES, classes=10)
    restore.folder_paths.filename_list_cache.clear()
    message = refusal(restore, CLASSES, jpeg=jpeg_of(restore, 24, 32)[0])
    schema = restore.nodes.NODE_CLASS_MAPPINGS["DDRMJPEGRestore"].GET_SCHEMA()
    assert f"Use {schema.display_name}, which has class_label" in message and CLASSES in message
    assert "class_label" in [one.id for one in schema.inputs]


def test_own_networks_of_another_restorer_are_refused(restore):
    """Of the same shape, so that they would run."""
    other = "test-small-codiff-other.safetensors"
    write_tiny_codiff(restore.base / "models" / "jpeg_restorers" / other, seed=1)
    restore.folder_paths.filename_list_cache.clear()
    graph = Graph()
    loader = graphs.loader(graph, other)
    graph.sink([loader, 0])
    _, model, vae = run(restore, graph).outputs(loader)
    connect = "Connect MODEL and VAE of the Load JPEG Restorer that this restorer comes from. LoRAs"
    for given, named in (({"model": model}, "the MODEL with"), ({"vae": vae}, "the VAE with")):
        message = refusal(restore, CODIFF, image=photo(32, 32), **given)
        assert f"expected {named} its own weights" in message and connect in message
    assert "the MODEL and the VAE with" in refusal(restore, CODIFF, image=photo(32, 32), model=model, vae=vae)


def test_adapters_say_what_to_connect(fresh, restorers, sodiff_files):
    """No MODEL, no VAE, and those of the checkpoint or of another restorer in place of the adapted ones."""
    name = codiff_graphs.RESTORER

    def result_of(model: list | None, vae: list | None, used: str = "loaded", lora: bool = False):
        graph = Graph()
        checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=sodiff_files.base.checkpoint.name)
        base = {"model": [checkpoint, 0], "vae": [checkpoint, 2]}
        nodes = {
            "checkpoint": checkpoint,
            "loaded": graphs.loader(graph, name, **base),
            "sodiff": graphs.loader(graph, sodiff_graphs.RESTORER, **base),
            "small": graphs.loader(graph, CODIFF),
        }
        nodes["both"] = graphs.loader(graph, name, model=[nodes["sodiff"], 1], vae=[checkpoint, 2])
        given = {
            key: [nodes[value[0]], value[1]] for key, value in (("model", model), ("vae", vae)) if value is not None
        }
        if lora:
            given["model"] = [add_user_patch(graph, given["model"]), 0]
        image = [graph.image(photo(32, 32)), 0]
        graph.sink([graph.add("RestoreJPEG", **graphs.SETTINGS, restorer=[nodes[used], 0], image=image, **given), 0])
        return fresh.run(graph.prompt)

    def refused(*given, **options) -> str:
        result = result_of(*given, **options)
        assert not result.success and "RestoreJPEG: " in result.error and "\n" not in result.error
        return result.error

    assert "MODEL and VAE. Connect" in refused(None, None)
    assert "needs its VAE" in refused(["loaded", 1], None)
    assert "its own weights" in refused(["checkpoint", 0], ["loaded", 2])
    assert "prompts 1024 wide, got 32" in refused(["small", 1], ["loaded", 2])
    assert "4 latent channels" in refused(["loaded", 1], ["small", 2])
    unadapted = refused(["loaded", 1], ["checkpoint", 2])
    assert "expected the VAE with its own weights" in unadapted and "those of Load Checkpoint to that" in unadapted
    for model in ("sodiff", "both"):
        assert "expected the MODEL with its own weights and no other" in refused([model, 1], ["loaded", 2])
    assert "expected the MODEL with" in refused(["checkpoint", 0], ["loaded", 2], lora=True)
    assert "expected the VAE with" in refused(["sodiff", 1], ["loaded", 2], used="sodiff")
    assert result_of(["loaded", 1], ["loaded", 2], lora=True).success
    assert result_of(["sodiff", 1], ["checkpoint", 2], used="sodiff").success


def add_user_patch(graph: Graph, model: list) -> str:
    """A MODEL with a change of the user's on top, as Load LoRA makes it."""

    class TestUserPatch:
        __test__ = False
        RETURN_TYPES = ("MODEL",)
        FUNCTION = "patch"
        CATEGORY = "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict:  # noqa: N802
            return {"required": {"model": ("MODEL", {})}}

        def patch(self, model):
            changed = model.clone()
            assert changed.add_patches({"diffusion_model.out.2.bias": ("diff", (torch.full((4,), 0.1),))})
            return (changed,)

    sys.modules["nodes"].NODE_CLASS_MAPPINGS.setdefault("TestUserPatch", TestUserPatch)
    return graph.add("TestUserPatch", model=model)
