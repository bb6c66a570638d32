"""RestoreJPEG through ComfyUI's own executor: equal to the graphs of single nodes, any size, films, memory."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from PIL import Image

from restoration.jpeg import read_jpeg
from tests import codiff_graphs, sodiff_graphs
from tests import restore_graphs as graphs
from tests.codiff_graphs import run
from tests.graphs import Graph, photo
from tests.restore_graphs import BY_FAMILY, CODIFF, SODIFF, add_restore, add_single_nodes, jpeg_of, restored

pytestmark = pytest.mark.comfyui
FAMILIES = list(BY_FAMILY)


def levels(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round()


# --- the graphs of single nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_graph_of_single_nodes(restore, family):
    """The very functions: with the file to 1e-5, and without it, where a graph is rounded to 8 bits at its end, too."""
    jpegs, image = jpeg_of(restore, 96, 128)
    graph = Graph()
    links = {"image": [graph.image(image), 0], "jpeg": [graph.image(jpegs), 0]}
    node = add_restore(graph, BY_FAMILY[family], **links)
    singles = add_single_nodes(graph, family, links["image"], links["jpeg"])
    ends = [node, singles]
    if family != "prior":
        ends += [
            add_restore(graph, BY_FAMILY[family], image=links["image"]),
            add_single_nodes(graph, family, links["image"], None),
        ]
    for end in ends:
        graph.sink([end, 0])
    outputs = run(restore, graph).outputs
    one, expected, *free = (outputs(end)[0] for end in ends)
    assert (one - expected).abs().max() <= 1e-5 and (one - image).abs().mean() > 0.2 / 255
    if free:
        assert (free[0] - levels(free[1]) / 255).abs().max() <= 1e-5 and not torch.equal(free[0], one)


@pytest.mark.parametrize("quality", [5.0, 60.0])
def test_a_given_quality_moves_the_timestep_as_the_single_node_does(restore, quality):
    """Of SODiff; CODiff, which has no use for it, ignores it."""
    _, image = jpeg_of(restore, 64, 64)
    graph = Graph()
    source = [graph.image(image), 0]
    loaded = graphs.loader(graph, SODIFF)
    predicted = graph.add("QFTimestepPredict", restorer=[loaded, 0], image=source, quality=quality)
    node = add_restore(graph, SODIFF, image=source, quality=quality)
    graph.sink([predicted, 0])
    graph.sink([node, 0])
    timestep = run(restore, graph).outputs(predicted)[0]
    assert said(restore, node) == f"timestep {timestep:.1f}\nheld to no file"
    assert torch.equal(restored(restore, CODIFF, image, quality=quality), restored(restore, CODIFF, image))


def said(comfy, node: str) -> str:
    """The text on a node that has just run."""
    (text,) = comfy.executor.history_result["outputs"][node]["text"]
    return text


@pytest.mark.parametrize("family", ["codiff", "sodiff"])
def test_equals_the_graph_of_single_nodes_on_stable_diffusion(fresh, sodiff_files, family):
    """Adapters of the reduced base, with MODEL and VAE of Load JPEG Restorer."""
    name = codiff_graphs.RESTORER if family == "codiff" else sodiff_graphs.RESTORER
    _, image = jpeg_of(fresh, 64, 128)
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=sodiff_files.base.checkpoint.name)
    base = {"model": [checkpoint, 0], "vae": [checkpoint, 2]}
    source, loaded = [graph.image(image), 0], graphs.loader(graph, name, **base)
    inputs = {**graphs.SETTINGS, "restorer": [loaded, 0], "image": source, "model": [loaded, 1], "vae": [loaded, 2]}
    node = graph.add("RestoreJPEG", **inputs)
    singles = add_single_nodes(graph, family, source, None, name, **base)
    graph.sink([node, 0])
    graph.sink([singles, 0])
    outputs = run(fresh, graph).outputs
    assert (outputs(node)[0] - levels(outputs(singles)[0]) / 255).abs().max() <= 1e-5


def test_a_changed_model_takes_the_place_of_the_restorers_own(restore):
    """MODEL and VAE of the loader give what none give; a MODEL with a patch on it gives something else."""
    _, image = jpeg_of(restore, 32, 32)
    graph = Graph()
    source, loaded = [graph.image(image), 0], graphs.loader(graph, CODIFF)
    inputs = {**graphs.SETTINGS, "restorer": [loaded, 0], "image": source}
    node = graph.add("RestoreJPEG", **inputs, model=[loaded, 1], vae=[loaded, 2])
    graph.sink([node, 0])
    outputs = run(restore, graph).outputs
    assert torch.equal(outputs(node)[0], restored(restore, CODIFF, image))
    changed = outputs(loaded)[1].clone()
    changed.add_patches({"diffusion_model.out.2.bias": ("diff", (torch.full((192,), 0.1),))})
    inputs["model"] = [graph.image(changed), 0]
    other = graph.add("RestoreJPEG", **inputs)
    graph.sink([other, 0])
    assert not torch.equal(run(restore, graph).outputs(other)[0], outputs(node)[0])


@pytest.mark.parametrize("family", ["codiff", "sodiff"])
def test_half_precision_is_close_to_full(restore, family):
    """Networks in bf16 give nearly the picture of fp32; the latent keeps its precision."""
    _, image = jpeg_of(restore, 64, 64)
    graph, found = Graph(), []
    for dtype in ("fp32", "bf16"):
        loaded = graphs.loader(graph, BY_FAMILY[family], dtype)
        node = graph.add("RestoreJPEG", restorer=[loaded, 0], image=[graph.image(image), 0], **graphs.SETTINGS)
        graph.sink([node, 0])
        found.append(node)
    outputs = run(restore, graph).outputs
    full, half = (outputs(node)[0] for node in found)
    assert 0 < (half - full).abs().mean() < 0.2 * (full - image).abs().mean()


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 70), (33, 35)])
def test_any_size(restore, family, height, width):
    """Smaller than what any network sees, narrow and odd; gray, which comes back in colour, and alpha, as it came."""
    jpegs, image = jpeg_of(restore, height, width)
    alpha = torch.rand(1, height, width, 1, generator=torch.Generator().manual_seed(0))
    picture = torch.cat([image[..., :1], alpha], -1)
    result = restored(restore, BY_FAMILY[family], picture, jpegs if family == "prior" else None)
    assert tuple(result.shape) == (1, height, width, 4) and torch.equal(result[..., 3:], alpha)
    assert result.isfinite().all() and (levels(result[..., :3]) / 255 - result[..., :3]).abs().max() < 1e-6
    assert tuple(restored(restore, BY_FAMILY[family], jpegs=jpegs).shape) == (1, height, width, 3)


@pytest.mark.parametrize("family", ["codiff", "driftrec", "prior"])
def test_without_an_image_the_file_is_decoded_as_libjpeg_does_and_turned_upright(restore, family):
    exif = Image.Exif()
    exif[0x0112] = 6
    jpegs, image = jpeg_of(restore, 40, 64, quality=30, exif=exif)
    upright = image.transpose(1, 2).flip(2)
    name = BY_FAMILY[family]
    alone, both = restored(restore, name, jpegs=jpegs), restored(restore, name, upright, jpegs)
    assert tuple(alone.shape) == (1, 64, 40, 3) and (alone - both).abs().mean() < 0.3 / 255
    assert (restored(restore, name, jpegs=jpegs, strength=0.0, consistency=0.0) - upright).abs().max() < 3 / 255


@pytest.mark.parametrize("family", FAMILIES)
def test_strength(restore, family):
    """0 gives the input back bit by bit, whatever its levels; a half lies halfway."""
    jpegs, image = jpeg_of(restore, 32, 48)
    odd = (image + 0.3 / 255).clamp(0, 1)
    name, settings = BY_FAMILY[family], {"jpegs": jpegs, "consistency": 0.0}
    given = odd.clone()
    assert torch.equal(restored(restore, name, odd, strength=0.0, **settings), odd)
    held = restored(restore, name, odd, jpegs, strength=0.0)
    assert torch.equal(odd, given) and not torch.equal(held, odd), "an input is not to be written to"
    half, full = (restored(restore, name, image, strength=strength, **settings) for strength in (0.5, 1.0))
    assert (half - (image + full) / 2).abs().max() < 1.1 / 255 and (half - full).abs().mean() > 0.1 / 255


@pytest.mark.parametrize("family", FAMILIES)
def test_a_little_strength_gives_nearly_the_picture_that_came_in(restore, family):
    """Also where that is not what the file decodes to: priors, which restore the file, blend with the picture."""
    jpegs, image = jpeg_of(restore, 32, 48)
    darker = 0.9 * image
    result = restored(restore, BY_FAMILY[family], darker, jpegs, strength=0.001, consistency=0.0)
    assert (result - darker).abs().max() < 1.1 / 255


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_compresses_to_the_file_again(restore, family, tmp_path):
    """With JPEG_DATA, at any strength; without consistency it does not."""
    jpegs, image = jpeg_of(restore, 48, 64)
    name = BY_FAMILY[family]
    for settings in ({}, {"strength": 0.5}, {"strength": 0.0}):
        assert agreement(restored(restore, name, image, jpegs, **settings), jpegs[0], tmp_path) == 1
    assert agreement(restored(restore, name, image, jpegs, consistency=0.0), jpegs[0], tmp_path) < 1


def agreement(image: torch.Tensor, jpeg, folder) -> float:
    """The fraction of a file's coefficients that libjpeg makes again of an IMAGE."""
    tables = [table.flatten().tolist() for table in jpeg.tables[:2]]
    Image.fromarray(levels(image[0]).byte().numpy()).save(folder / "again.jpg", qtables=tables, subsampling=2)
    pairs = zip(jpeg.coefficients.planes, read_jpeg(folder / "again.jpg").coefficients.planes, strict=True)
    return float(torch.cat([(one == other).float().flatten() for one, other in pairs]).mean())


def test_a_picture_that_is_no_jpeg_is_restored_from_its_pixels(restore):
    """Load JPEG's JPEG_DATA of a PNG is connected, as in a folder of both: the node says that it is held to nothing."""
    no_jpeg = sys.modules[f"{restore.pack}.nodes.types"].NoJPEG("once.png")
    graph = Graph()
    source, nothing = graph.image(photo(24, 40)), graph.image([no_jpeg])
    node = add_restore(graph, CODIFF, image=[source, 0], jpeg=[nothing, 0])
    graph.sink([node, 0])
    result = run(restore, graph).outputs(node)[0]
    assert said(restore, node).endswith("held to no file")
    assert torch.equal(result, restored(restore, CODIFF, photo(24, 40)))


# --- frames of a film -------------------------------------------------------------------------------------------------


def frames(count: int = 3) -> torch.Tensor:
    """A picture that is compressed more and more, decoded."""
    picture = photo(64, 64)
    return torch.cat([sodiff_graphs.compressed(picture, 40 - 12 * number) for number in range(count)])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_frames_are_restored_to_equal_frames(restore, family):
    """Bit by bit, also where there is noise."""
    jpegs, image = jpeg_of(restore, 32, 48)
    result = restored(restore, BY_FAMILY[family], image.expand(3, -1, -1, -1), jpegs * 3, seed=5)
    assert len(result) == 3 and torch.equal(result[:1].expand_as(result), result)


def test_slowly_changing_frames_keep_one_timestep(restore):
    """The mean of what they get alone; told otherwise, each keeps its own and is what it is alone."""
    images = frames()
    texts = {}
    for same in (True, False):
        graph = Graph()
        node = add_restore(graph, SODIFF, image=[graph.image(images), 0], same_for_batch=same)
        graph.sink([node, 0])
        result = run(restore, graph).outputs(node)[0]
        texts[same] = said(restore, node).splitlines()[0]
    alone = [restored(restore, SODIFF, image) for image in images.split(1)]
    assert torch.equal(result, torch.cat(alone))
    each = [float(step) for step in texts[False].removeprefix("timesteps ").split(", ")]
    assert len(set(each)) == 3 and max(each) - min(each) > 20
    assert float(texts[True].removeprefix("timestep ")) == pytest.approx(sum(each) / 3, abs=0.1)


@pytest.mark.parametrize("family", ["driftrec", "prior"])
def test_told_otherwise_the_seed_counts_up_from_frame_to_frame(restore, family):
    jpegs, image = jpeg_of(restore, 24, 32)
    name, settings = BY_FAMILY[family], {"consistency": 0.0}
    result = restored(
        restore, name, image.expand(2, -1, -1, -1), jpegs * 2, seed=2**64 - 1, same_for_batch=False, **settings
    )
    alone = [restored(restore, name, image, jpegs, seed=seed, **settings) for seed in (2**64 - 1, 0)]
    assert torch.equal(result, torch.cat(alone)) and not torch.equal(*alone)


# --- memory, progress, interruption -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["codiff", "sodiff"])
def test_tiles_change_little(restore, family):
    """A picture in tiles of 128 against the whole; another overlap gives another, equally close picture."""
    image = sodiff_graphs.compressed(photo(200, 280), 20)
    whole, tiles, others = (
        restored(restore, BY_FAMILY[family], image, tile=tile, overlap=overlap)
        for tile, overlap in ((512, 64), (128, 64), (128, 16))
    )
    change = (whole - image).abs().mean()
    assert 0 < (tiles - whole).abs().mean() < 0.4 * change and not torch.equal(tiles, others)


def test_tiles_are_those_of_the_single_node(restore):
    """Their side and overlap reach restorers that work on pixels, too."""
    image, graph = sodiff_graphs.compressed(photo(150, 200), 20), Graph()
    source, tiles = [graph.image(image), 0], {"tile": 128, "overlap": 32}
    node = add_restore(graph, BY_FAMILY["regression"], image=source, **tiles)
    single = graph.sample(source, BY_FAMILY["regression"], "fp32", **tiles)
    for end in (node, single):
        graph.sink([end, 0])
    outputs = run(restore, graph).outputs
    assert torch.equal(outputs(node)[0], outputs(single)[0])
    assert not torch.equal(outputs(node)[0], restored(restore, BY_FAMILY["regression"], image))


def test_one_step_takes_smaller_tiles_when_memory_runs_out(restore, monkeypatch):
    """Memory for 128 pixels: the network's shapes halve until they fit; no part of a failed attempt stays."""
    module, shapes = sys.modules[f"{restore.pack}.nodes.latent_model"], []
    denoise = module.denoise_once

    def limited(model, conditioning, latent, *others, **options):
        shapes.append(tuple(latent.shape[-2:]))
        if max(latent.shape[-2:]) > 16:
            raise torch.OutOfMemoryError("out of memory")
        return denoise(model, conditioning, latent, *others, **options)

    monkeypatch.setattr(module, "denoise_once", limited)
    assert restored(restore, CODIFF, photo(250, 300)).isfinite().all()
    assert shapes[0] == (32, 38) and shapes[-1] == (16, 16)


def loaded_restorer(comfy, name: str):
    """A restorer file as the nodes load it."""
    loading = sys.modules[f"{comfy.pack}.nodes.loading"]
    return loading.load_restorer(loading.restorer_path(name), torch.float32)


def test_little_memory_on_the_cpu_means_small_tiles_from_the_start(restore, monkeypatch):
    """There running out would end the program: the estimate, the largest of core's, decides."""
    latent_model, runtime = (sys.modules[f"{restore.pack}.nodes.{name}"] for name in ("latent_model", "runtime"))
    loaded = loaded_restorer(restore, CODIFF)
    model = latent_model.latent_model_of(loaded)
    unet = model.model.model.memory_required([1, 192, 1024, 1024])
    vae = model.vae.memory_used_decode((1, 192, 1, 1), torch.float32)
    assert model.memory_required(8192, 8192) == int(unet) > vae == model.memory_required(8, 8)
    monkeypatch.setattr(model, "memory_required", lambda height, width: height * width)
    monkeypatch.setattr(runtime.mm, "get_free_memory", lambda device: 512 * 512)
    assert model.compute((2000, 3000), 0, 64).tiler.tile == 512
    assert model.compute((2000, 3000), 400, 64).tiler.tile == 400
    assert model.compute((100, 100), 0, 64).tiler.tile == 1024


def test_adapters_take_the_tiles_that_they_were_published_with(restore, reduced, monkeypatch):
    """Those of OneStepDenoise where none are chosen; a chosen tile brings its own overlap, own networks take theirs."""
    single = restore.nodes.NODE_CLASS_MAPPINGS["OneStepDenoise"].GET_SCHEMA()
    usual = {one.id: one.default for one in single.inputs if one.id in ("tile", "overlap")}
    graph = Graph()
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=reduced.base.checkpoint.name)
    loaded = graphs.loader(graph, codiff_graphs.RESTORER, model=[checkpoint, 0], vae=[checkpoint, 2])
    graph.sink([loaded, 0])
    latent_model = sys.modules[f"{restore.pack}.nodes.latent_model"]
    monkeypatch.setattr(latent_model.CoreLatentModel, "memory_required", lambda self, height, width: 0)

    def tiles(model, tile: int, overlap: int) -> dict[str, int]:
        tiler = model.compute((2000, 3000), tile, overlap).tiler
        return {"tile": tiler.tile, "overlap": tiler.overlap}

    adapter = latent_model.latent_model_of(*run(restore, graph).outputs(loaded))
    assert tiles(adapter, 0, 64) == usual == {"tile": 768, "overlap": 256}
    assert tiles(adapter, 512, 64) == {"tile": 512, "overlap": 64} and tiles(adapter, 0, 320)["overlap"] == 320
    own = latent_model.latent_model_of(loaded_restorer(restore, CODIFF))
    assert tiles(own, 0, 64) == {"tile": 1024, "overlap": 64}


@pytest.mark.parametrize("family", ["codiff", "sodiff", "regression"])
def test_progress_and_previews_arrive(restore, family):
    """The bar starts at nothing, never falls, ends full, and carries small pictures."""
    jpegs, image = jpeg_of(restore, 150, 200)
    graph = Graph()
    links = {"image": [graph.image(image), 0], "jpeg": [graph.image(jpegs), 0]}
    graph.sink([add_restore(graph, BY_FAMILY[family], **links, tile=128), 0])
    result = run(restore, graph)
    values = [value for value, _, _ in result.progress]
    assert values[0] == 0 and values == sorted(values) and values[-1] == result.progress[-1][1]
    previews = [preview for _, _, preview in result.progress if preview is not None]
    assert previews and previews[0][1].size == (200, 150)


def test_progress_of_a_prior_reaches_its_end_where_it_is_blended(restore):
    jpegs, _ = jpeg_of(restore, 48, 64)
    graph = Graph()
    graph.sink([add_restore(graph, BY_FAMILY["prior"], jpeg=[graph.image(jpegs), 0], strength=0.5), 0])
    progress = run(restore, graph).progress
    values = [value for value, _, _ in progress]
    assert values[0] == 0 and values == sorted(values) and values[-1] == progress[-1][1]


@pytest.mark.parametrize("family", ["codiff", "driftrec"])
def test_interruption_stops_soon_and_the_next_prompt_runs(restore, family):
    graph = Graph()
    source = graph.image(photo(512, 512).repeat(8 if family == "codiff" else 1, 1, 1, 1))
    graph.sink([add_restore(graph, BY_FAMILY[family], image=[source, 0], tile=128, samples=64), 0])
    pressed = []

    def press(value, total, preview):
        if value > 0 and not pressed:
            pressed.append(time.perf_counter())
            restore.interrupt()

    restore.on_progress = press
    result = restore.run(graph.prompt)
    assert result.interrupted and not result.success and time.perf_counter() - pressed[0] < 3
    restore.on_progress = None
    assert restored(restore, BY_FAMILY[family], photo(16, 16)).isfinite().all()
