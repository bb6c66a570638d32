"""JPEGConsistency, and the inputs of DriftRecSample that hold its result to the file, through ComfyUI's executor."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from PIL import Image

from restoration.jpeg import encode_with_pillow, read_jpeg
from tests.graphs import Graph, photo, save_jpeg
from tests.test_consistency_closed_loop import written_by_pillow

pytestmark = pytest.mark.comfyui


def blurred(image: torch.Tensor) -> torch.Tensor:
    pictures = image.movedim(-1, 1)
    return torch.nn.functional.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False).movedim(1, -1)


def run(comfy, graph: Graph):
    result = comfy.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    return result


def hold(comfy, image: torch.Tensor, jpeg, **settings):
    """The result, IMAGE and fraction of the node."""
    graph = Graph()
    inputs = {"strength": 1.0, "closed_loop": True, **settings}
    node = graph.add("JPEGConsistency", image=[graph.image(image), 0], jpeg=[graph.image(jpeg), 0], **inputs)
    graph.sink([node, 0])
    graph.sink([node, 1])
    result = run(comfy, graph)
    return result, *result.outputs(node)


def agrees(image: torch.Tensor, jpeg) -> bool:
    again = read_jpeg(written_by_pillow(image.movedim(-1, 1), jpeg)).coefficients.planes
    return all(torch.equal(a, b) for a, b in zip(again, jpeg.coefficients.planes, strict=True))


def file_of(comfy, image: torch.Tensor, quality: int = 20):
    """JPEG_DATA of the pack as ComfyUI has loaded it."""
    jpeg = sys.modules[f"{comfy.pack}.restoration.jpeg"]
    return jpeg.read_jpeg(encode_with_pillow(image[0].movedim(-1, 0), quality), name="cat.jpg")


def test_from_file_to_held_picture(fresh):
    """LoadJPEG of a turned file -> a restorer -> Hold to JPEG: Pillow writes the file's coefficients again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save_jpeg(fresh, "turned.jpg", photo(61, 96), quality=30, exif=exif)
    graph = Graph()
    jpeg = graph.add("LoadJPEG", image="turned.jpg")
    restored = graph.sample([jpeg, 0], restorer="test-regression.safetensors")
    node = graph.add("JPEGConsistency", image=[restored, 0], jpeg=[jpeg, 1], strength=1.0, closed_loop=True)
    graph.sink([node, 0])
    result = run(fresh, graph)
    image, fraction = result.outputs(node)
    assert fraction == 1 and tuple(image.shape) == (1, 96, 61, 3)
    assert image.dtype == torch.float32 and image.is_contiguous()
    stored = image.rot90(1, (1, 2))  # orientation 6 is shown turned by 90 degrees clockwise
    data = result.outputs(jpeg)[1][0]
    assert agrees(stored, data) and not agrees(result.outputs(restored)[0].rot90(1, (1, 2)), data)


def test_the_share_stands_on_the_node(fresh):
    jpeg = file_of(fresh, photo(40, 48))
    result, _, fraction = hold(fresh, blurred(photo(40, 48)), [jpeg])
    texts = [str(data) for _, data in result.events if "coefficients agree" in str(data)]
    assert fraction == 1 and texts and "100.0000 % of the coefficients agree after" in texts[0]
    _, _, part = hold(fresh, blurred(photo(40, 48)), [file_of(fresh, photo(40, 48), 80)], strength=0.2)
    assert 0.5 < part < 1


def test_alpha_batches_and_strength(fresh):
    """Alpha is returned as it came, images have a file each or share one, strength 0 changes nothing."""
    images = torch.cat([blurred(photo(40, 48)), blurred(photo(40, 48)).flip(2)])
    jpegs = [file_of(fresh, photo(40, 48)), file_of(fresh, photo(40, 48).flip(2))]
    alpha = torch.rand(2, 40, 48, 1, generator=torch.Generator().manual_seed(0))
    _, held, fraction = hold(fresh, torch.cat([images, alpha], -1), jpegs)
    assert torch.equal(held[..., 3:], alpha) and fraction == 1
    assert agrees(held[:1, ..., :3], jpegs[0]) and agrees(held[1:, ..., :3], jpegs[1])
    _, shared, _ = hold(fresh, images, jpegs[:1])
    assert torch.equal(shared[:1], held[:1, ..., :3])
    _, unmoved, _ = hold(fresh, images, jpegs, strength=0.0)
    assert torch.equal(unmoved, images)


def test_without_the_loop_levels_are_continuous(fresh):
    _, image, fraction = hold(fresh, blurred(photo(40, 48)), [file_of(fresh, photo(40, 48))], closed_loop=False)
    assert fraction > 0.99 and ((image * 255) - (image * 255).round()).abs().max() > 0.1


def test_an_enlarged_picture_is_held_in_its_box_means(fresh):
    large = blurred(photo(40, 48)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    _, image, fraction = hold(fresh, large, [file_of(fresh, photo(40, 48))])
    means = torch.nn.functional.avg_pool2d(image.movedim(-1, 1), 2).mul(255).round().div(255).movedim(1, -1)
    assert fraction == 1 and tuple(image.shape) == (1, 80, 96, 3) and agrees(means, file_of(fresh, photo(40, 48)))


@pytest.mark.parametrize(
    ("height", "width", "complaint"),
    [
        (48, 40, r"JPEGConsistency: expected images of the JPEG's size, 48x40, got 40x48\. The picture looks turned"),
        (32, 48, r"JPEGConsistency: .* got 48x32\. Connect the picture that belongs to cat\.jpg"),
    ],
)
def test_pictures_of_another_size_are_refused(fresh, height, width, complaint):
    graph = Graph()
    jpeg = graph.image([file_of(fresh, photo(40, 48))])
    image = graph.image(photo(height, width))
    graph.sink([graph.add("JPEGConsistency", image=[image, 0], jpeg=[jpeg, 0], strength=1.0, closed_loop=True), 0])
    result = fresh.run(graph.prompt)
    assert not result.success
    with pytest.raises(ValueError, match=complaint):
        raise ValueError(str(result.error))


def test_what_is_no_number_is_refused(fresh):
    image = photo(40, 48).clone()
    image[0, 5, 6, 1] = float("nan")
    graph = Graph()
    jpeg = graph.image([file_of(fresh, photo(40, 48))])
    held = graph.add("JPEGConsistency", image=[graph.image(image), 0], jpeg=[jpeg, 0], strength=1.0, closed_loop=True)
    graph.sink([held, 0])
    result = fresh.run(graph.prompt)
    assert not result.success and "image 1 holds something that is no number" in str(result.error)


def test_driftrec_says_that_a_picture_is_turned(fresh):
    graph = Graph()
    jpeg = graph.image([file_of(fresh, photo(40, 48))])
    graph.sink(
        [graph.sample([graph.image(photo(48, 40)), 0], restorer="test-regression.safetensors", jpeg=[jpeg, 0]), 0]
    )
    result = fresh.run(graph.prompt)
    assert not result.success and "got 40x48. The picture looks turned" in str(result.error)


def test_a_png_that_is_no_jpeg_is_refused_with_a_remedy(fresh):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (90, 120, 40)).save(buffer, "PNG")
    (fresh.base / "input" / "plain.png").write_bytes(buffer.getvalue())
    graph = Graph()
    png = graph.add("LoadJPEG", image="plain.png")
    graph.sink([graph.add("JPEGConsistency", image=[png, 0], jpeg=[png, 1], strength=1.0, closed_loop=True), 0])
    result = fresh.run(graph.prompt)
    assert not result.success
    message = str(result.error)
    assert "plain.png is no JPEG" in message and "Compress to JPEG" in message


def test_progress_runs_over_images_and_an_interruption_stops_it(fresh):
    image, jpeg = torch.cat([blurred(photo(61, 83))] * 3), file_of(fresh, photo(61, 83))
    result, _, _ = hold(fresh, image, [jpeg])
    values = [value for value, _, _ in result.progress]
    assert values[0] == 0 and values == sorted(values) and values[-1] == result.progress[-1][1]
    graph = Graph()
    node = graph.add(
        "JPEGConsistency", image=[graph.image(image), 0], jpeg=[graph.image([jpeg]), 0], strength=1.0, closed_loop=True
    )
    graph.sink([node, 0])
    fresh.on_progress = lambda value, total, preview: fresh.interrupt()
    stopped = fresh.run(graph.prompt)
    fresh.on_progress = None
    assert stopped.interrupted and not stopped.success


@pytest.mark.parametrize("restorer", ["test-driftrec.safetensors", "test-regression.safetensors"])
def test_driftrec_gives_one_of_the_pictures_that_the_file_came_from(fresh, restorer):
    """By default with JPEG_DATA; consistency 0 is as without, closed_loop off is near, a part of it lies between."""
    jpeg = file_of(fresh, photo(40, 48), 40)
    graph = Graph()
    source, data = graph.image(blurred(photo(40, 48))), graph.image([jpeg])
    settings = ({}, {"closed_loop": False}, {"consistency": 0.5}, {"consistency": 0.0})
    nodes = [graph.sample([source, 0], restorer=restorer, jpeg=[data, 0], **one) for one in settings]
    nodes.append(graph.sample([source, 0], restorer=restorer))
    for node in nodes:
        graph.sink([node, 0])
    result = run(fresh, graph)
    held, rounded, half, none, free = (result.outputs(node)[0] for node in nodes)
    assert agrees(held, jpeg) and not agrees(rounded, jpeg) and not agrees(half, jpeg)
    assert torch.equal(none, free) and not torch.equal(half, free)
