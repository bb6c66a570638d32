"""The nodes in graphs, through ComfyUI's own executor: what an artist gets, with restorers of random weights."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.jpeg import JPEGError, image_to_dct, undo_orientation
from tests.graphs import Graph, photo, save_jpeg

pytestmark = pytest.mark.comfyui


def run(comfy, graph: Graph):
    """Run a graph that must succeed."""
    result = comfy.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    return result


def restore(comfy, image: torch.Tensor, **settings) -> torch.Tensor:
    """DriftRecSample on an IMAGE (B, H, W, C), by default three steps of the test restorer."""
    graph = Graph()
    source = graph.image(image)
    sample = graph.sample([source, 0], **settings)
    graph.sink([sample, 0])
    return run(comfy, graph).outputs(sample)[0]


def levels(image: torch.Tensor) -> torch.Tensor:
    return (image * 255).round()


def test_whole_graph_from_file_to_saved_picture(fresh):
    """LoadJPEG -> DriftRecSample with JPEG_DATA -> SaveImage: the PNG on disk is what the socket carries."""
    save_jpeg(fresh, "landscape.jpg", photo(90, 120), quality=10)
    graph = Graph()
    jpeg = graph.add("LoadJPEG", image="landscape.jpg")
    sample = graph.sample([jpeg, 0], jpeg=[jpeg, 1])
    saved = graph.add("SaveImage", images=[sample, 0], filename_prefix="restored")
    graph.add("PreviewImage", images=[sample, 0])
    result = run(fresh, graph)
    image, data, quality, name = result.outputs(jpeg)
    assert (tuple(image.shape), data[0].width, data[0].height) == ((1, 90, 120, 3), 120, 90)
    assert (quality, name) == (10.0, "landscape")
    restored = result.outputs(sample)[0]
    assert restored.dtype == torch.float32 and restored.is_contiguous() and tuple(restored.shape) == (1, 90, 120, 3)
    assert (restored - image).abs().mean() > 1 / 255, "the restorer changed nothing, so this test shows nothing"
    file = fresh.executor.history_result["outputs"][saved]["images"][0]["filename"]
    on_disk = np.asarray(Image.open(fresh.base / "output" / file))
    assert np.array_equal(on_disk, levels(restored[0]).byte().numpy())


def test_loaded_pixels_are_pillows_and_upright(fresh):
    """IMAGE is Pillow's decode, turned as EXIF says; JPEG_DATA keeps the orientation and the size as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save_jpeg(fresh, "turned.jpg", photo(40, 64), quality=30, exif=exif)
    graph = Graph()
    jpeg = graph.add("LoadJPEG", image="turned.jpg")
    graph.sink([jpeg, 0])
    image, data, *_ = run(fresh, graph).outputs(jpeg)
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB").transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(levels(image[0]).byte().numpy(), expected)
    assert (data[0].orientation, data[0].width, data[0].height) == (6, 64, 40)


def test_file_is_read_again_when_its_content_changes(fresh):
    """A file that is overwritten under the same name is loaded anew; an unchanged one comes from the cache."""
    graph = Graph()
    save_jpeg(fresh, "same.jpg", photo(16, 16), quality=20)
    jpeg = graph.add("LoadJPEG", image="same.jpg")
    graph.sink([jpeg, 2])
    assert run(fresh, graph).outputs(jpeg)[2] == 20
    assert any(name == "execution_cached" and jpeg in data["nodes"] for name, data in run(fresh, graph).events)
    save_jpeg(fresh, "same.jpg", photo(16, 16), quality=60)
    assert run(fresh, graph).outputs(jpeg)[2] == 60


def test_only_pictures_are_offered(fresh):
    """The list of LoadJPEG shows files with the endings of JPEGs and other pictures, in any case, and nothing else."""
    for name in ("a.JPG", "b.jpeg", "c.jfif", "d.mpo", "e.jpe"):
        save_jpeg(fresh, name, photo(8, 8))
    (fresh.base / "input" / "notes.txt").write_text("no picture")
    others = ("f.png", "g.PNG", "h.webp", "i.bmp", "j.tif", "k.tiff")
    for name in others:
        Image.new("RGB", (8, 8)).save(fresh.base / "input" / name)
    options = fresh.nodes.NODE_CLASS_MAPPINGS["LoadJPEG"].INPUT_TYPES()["required"]["image"][1]["options"]
    assert {"a.JPG", "b.jpeg", "c.jfif", "d.mpo", "e.jpe", *others} <= set(options)
    assert "notes.txt" not in options


@pytest.mark.parametrize(("height", "width"), [(1, 1), (33, 35), (7, 300), (16, 16)])
def test_any_size(fresh, height, width):
    """Images smaller than the network's own grid, odd and narrow ones keep their size."""
    restored = restore(fresh, torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0)), steps=2)
    assert tuple(restored.shape) == (1, height, width, 3)
    assert restored.min() >= 0 and restored.max() <= 1 and bool(restored.isfinite().all())


def test_tiles_share_the_noise_of_the_whole(fresh):
    """1000x700 in tiles of 256: another seed changes the picture as it does without tiles, and tiles leave no seams."""
    image = photo(700, 1000)
    whole, tiles = (
        [restore(fresh, image, tile=tile, overlap=64, steps=1, seed=seed) for seed in (0, 1)] for tile in (0, 256)
    )
    by_noise = torch.stack([(first - second).flatten() for first, second in (whole, tiles)])
    assert torch.corrcoef(by_noise)[0, 1] > 0.9
    error = tiles[0] - whole[0]
    steps = error.diff(dim=2).abs().mean(dim=(0, 1, 3))
    borders = [x - 1 for x in (192, 256, 384, 448, 576, 640, 752, 832)]  # where tiles begin and end
    assert steps[borders].mean() < 1.2 * steps.mean()


def test_same_seed_same_bytes_and_another_seed_another_picture(fresh):
    """The seed decides everything."""
    image = photo(48, 64)
    first = restore(fresh, image, seed=7)
    fresh.forget()
    assert torch.equal(first, restore(fresh, image, seed=7))
    assert not torch.equal(first, restore(fresh, image, seed=8))
    assert not torch.equal(first, restore(fresh, image, seed=2**64 - 1))


@pytest.mark.parametrize("restorer", ["test-driftrec.safetensors", "test-regression.safetensors"])
def test_an_image_does_not_depend_on_its_batch(fresh, restorer):
    """A batch of three gives what its images give alone."""
    image = torch.cat([photo(40, 56), photo(40, 56).flip(1), photo(40, 56).flip(2)])
    batch = restore(fresh, image, restorer=restorer)
    alone = torch.cat([restore(fresh, one, restorer=restorer) for one in image.split(1)])
    assert torch.equal(batch, alone)


def test_alpha_is_returned_as_it_came(fresh):
    """RGBA: colours are restored as if alone, alpha passes untouched, also values between 8-bit levels."""
    colors = photo(32, 32)
    alpha = torch.rand(1, 32, 32, 1, generator=torch.Generator().manual_seed(1))
    restored = restore(fresh, torch.cat([colors, alpha], -1))
    assert torch.equal(restored[..., 3:], alpha)
    assert torch.equal(restored[..., :3], restore(fresh, colors))


def test_gray_channel_gives_color(fresh):
    """One channel, which some nodes make, is restored as gray."""
    gray = photo(24, 24)[..., :1]
    assert torch.equal(restore(fresh, gray), restore(fresh, gray.expand(-1, -1, -1, 3)))


@pytest.mark.parametrize("sampler", ["sde_2m", "ode_1", "sde_1", "euler_maruyama", "euler_heun", "rk45"])
def test_every_sampler_runs(fresh, sampler):
    """Each entry of the list works on the node."""
    assert restore(fresh, photo(24, 24), sampler=sampler, tolerance=0.05).isfinite().all()


@pytest.mark.parametrize("color", ["none", "adain", "wavelet"])
def test_every_color_correction_runs(fresh, color):
    """Each entry of the list works on the node, and makes a difference to the default."""
    assert not torch.equal(restore(fresh, photo(24, 24), color=color), restore(fresh, photo(24, 24)))


def test_half_precision_is_close_to_full(fresh):
    """fp16 and bf16 stay near fp32; the network's own weights and the maths around it keep their types."""
    full = restore(fresh, photo(32, 32), dtype="fp32")
    for dtype, tolerance in (("fp16", 1.0), ("bf16", 4.0)):
        error = levels(restore(fresh, photo(32, 32), dtype=dtype)) - levels(full)
        assert error.abs().max() > 0 and error.abs().mean() < tolerance, dtype


def violation(image: torch.Tensor, jpeg) -> float:
    """How far coefficients of an upright IMAGE lie outside of the JPEG's cells: the mean, in steps of the tables."""
    stored = undo_orientation(image.movedim(-1, 1), jpeg.orientation)
    blocks = image_to_dct(stored, jpeg.coefficients.sampling, round_to_8bit=False)
    outside = [
        ((block / table.float()[:, None, None] - plane.float()).abs() - 0.5).clamp(min=0).mean()
        for block, plane, table in zip(blocks, jpeg.coefficients.planes, jpeg.tables, strict=True)
    ]
    return float(torch.stack(outside).mean())


@pytest.mark.parametrize("restorer", ["test-driftrec.safetensors", "test-regression.safetensors"])
def test_jpeg_keeps_the_result_inside_the_file(fresh, restorer):
    """With JPEG_DATA the result stays in the quantisation cells, also of a turned file; without, it does not."""
    exif = Image.Exif()
    exif[0x0112] = 8
    save_jpeg(fresh, "clamped.jpg", photo(48, 80), quality=30, exif=exif)
    graph = Graph()
    jpeg = graph.add("LoadJPEG", image="clamped.jpg")
    free = graph.sample([jpeg, 0], restorer=restorer)
    held = graph.sample([jpeg, 0], restorer=restorer, jpeg=[jpeg, 1])
    graph.sink([free, 0])
    graph.sink([held, 0])
    result = run(fresh, graph)
    data = result.outputs(jpeg)[1][0]
    outside = violation(result.outputs(held)[0], data)
    assert outside < 0.01 and outside < 0.1 * violation(result.outputs(free)[0], data)


def test_progress_and_previews_arrive(fresh):
    """The bar starts at nothing, never falls, ends full, and carries small pictures."""
    result_of = Graph()
    sample = result_of.sample([result_of.image(photo(400, 600)), 0], steps=4, tile=256)
    result_of.sink([sample, 0])
    result = run(fresh, result_of)
    values = [value for value, _, _ in result.progress]
    assert values[0] == 0 and values == sorted(values) and values[-1] == result.progress[-1][1]
    previews = [preview for _, _, preview in result.progress if preview is not None]
    assert previews and previews[0][0] == "JPEG" and max(previews[0][1].size) == previews[0][2] == 512
    buffer = io.BytesIO()
    previews[0][1].save(buffer, "JPEG")


def test_interruption_stops_soon_and_the_next_prompt_runs(fresh):
    """Interrupting a restoration of minutes stops it within moments; ComfyUI stays usable."""
    graph = Graph()
    sample = graph.sample([graph.image(photo(512, 512)), 0], steps=1000, tile=256)
    graph.sink([sample, 0])
    pressed = []

    def press(value, total, preview):
        if value > 0 and not pressed:
            pressed.append(time.perf_counter())
            fresh.interrupt()

    fresh.on_progress = press
    result = fresh.run(graph.prompt)
    assert result.interrupted and not result.success
    assert time.perf_counter() - pressed[0] < 3
    fresh.on_progress = None
    assert restore(fresh, photo(16, 16)).isfinite().all()


def test_two_loaders_of_one_file_share_its_network(fresh):
    """The same file and type is in memory once; another type is another network; nothing outlives its last user."""
    graph = Graph()
    first = graph.add("LoadJPEGRestorer", restorer="test-driftrec.safetensors", dtype="default")
    second = graph.add("LoadJPEGRestorer", restorer="test-driftrec.safetensors", dtype="fp32")
    third = graph.add("LoadJPEGRestorer", restorer="test-driftrec.safetensors", dtype="bf16")
    for node in (first, second, third):
        graph.sink([node, 0])
    outputs = run(fresh, graph).outputs
    one, two, three = (outputs(node)[0] for node in (first, second, third))
    assert one.module is two.module and one.module is not three.module
    assert outputs(first)[1:] == [None, None]


def test_sockets_for_a_base_model_pass_through(fresh):
    """Restorers without a base hand on the MODEL and VAE that they are given."""
    model, vae = object(), object()
    node = fresh.nodes.NODE_CLASS_MAPPINGS["LoadJPEGRestorer"]
    result = node.execute("test-driftrec.safetensors", "default", model, vae).result
    assert result[1] is model and result[2] is vae


def test_errors_of_the_core_are_value_errors():
    """What the nodes prefix with their names."""
    assert issubclass(JPEGError, ValueError)
