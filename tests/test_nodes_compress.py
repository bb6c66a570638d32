"""JPEGCompress against Pillow, and its JPEG_DATA."""

from __future__ import annotations

import pytest
import torch

from restoration.jpeg import decode, decode_pixels, encode_with_pillow, read_jpeg
from tests.graphs import Graph, photo

pytestmark = pytest.mark.comfyui


def compress(comfy, image: torch.Tensor, **settings):
    """IMAGE and JPEG_DATA of JPEGCompress."""
    graph = Graph()
    inputs = {"quality": 10, "subsampling": "4:2:0", **settings}
    node = graph.add("JPEGCompress", image=[graph.image(image), 0], **inputs)
    graph.sink([node, 0])
    result = comfy.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    return result.outputs(node)


def by_pillow(image: torch.Tensor, quality: int, subsampling: str) -> torch.Tensor:
    return decode_pixels(encode_with_pillow(image[0].movedim(-1, 0), quality, subsampling)).movedim(0, -1)[None]


def error(image: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (image - reference).abs() * 255
    return float(difference.mean())


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4", "gray"])
@pytest.mark.parametrize("quality", [5, 40, 95])
def test_pixels_are_pillows(fresh, quality, subsampling):
    """Pillow's picture, but for the rare coefficient on the edge between two cells, which rounds the other way."""
    image = photo(157, 213)
    compressed, _ = compress(fresh, image, quality=quality, subsampling=subsampling)
    difference = (compressed - by_pillow(image, quality, subsampling)).abs() * 255
    assert difference.mean() < 0.5 and (difference > 3.5).float().mean() < 0.005


@pytest.mark.parametrize("subsampling", ["4:4:0", "4:1:1"])
def test_samplings_that_pillow_does_not_write(fresh, subsampling):
    """They give a picture near the 4:4:4 one, whose JPEG_DATA names the sampling."""
    image = photo(61, 83)
    compressed, data = compress(fresh, image, quality=90, subsampling=subsampling)
    assert data[0].subsampling == subsampling
    assert error(compressed, by_pillow(image, 90, "4:4:4")) < 4


def test_data_is_that_of_the_file(fresh):
    """JPEG_DATA equals what is read from Pillow's file of the same picture: tables exactly, coefficients almost all."""
    image = photo(48, 64)
    _, (data,) = compress(fresh, image, quality=30)
    file = read_jpeg(encode_with_pillow(image[0].movedim(-1, 0), 30, "4:2:0"))
    assert (data.quality.quality, data.quality.exact, data.orientation) == (30.0, True, 1)
    assert (data.width, data.height, data.subsampling) == (64, 48, file.subsampling)
    for plane, table, expected, expected_table in zip(
        data.coefficients.planes, data.tables, file.coefficients.planes, file.tables, strict=True
    ):
        assert torch.equal(table, expected_table)
        assert (plane != expected).float().mean() < 0.001


def test_batches_give_one_jpeg_each(fresh):
    """Each image of a batch is compressed as if alone, and its JPEG_DATA decodes to it."""
    batch = torch.cat([photo(40, 50), photo(40, 50).flip(1)])
    compressed, data = compress(fresh, batch)
    assert len(data) == 2 and data[0].name != data[1].name
    for index, jpeg in enumerate(data):
        assert torch.equal(compressed[index : index + 1], compress(fresh, batch[index : index + 1])[0])
        assert torch.equal(decode(jpeg.coefficients)[0].movedim(0, -1), compressed[index])


def test_second_compression_on_a_shifted_grid(fresh):
    """As Pillow's files one after the other, cropped in between; JPEG_DATA is of the second."""
    image = photo(96, 112)
    compressed, (data,) = compress(fresh, image, quality=20, second_quality=70, shift_x=3, shift_y=5)
    larger = torch.nn.functional.pad(image.movedim(-1, 1), (3, 0, 5, 0), mode="replicate").movedim(1, -1)
    expected = by_pillow(by_pillow(larger, 20, "4:2:0")[:, 5:, 3:], 70, "4:2:0")
    assert error(compressed, expected) < 0.5
    assert data.quality.quality == 70 and compressed.shape == image.shape
    without_shift = compress(fresh, image, quality=20, second_quality=70)[0]
    assert error(without_shift, compressed) > 1


def test_alpha_and_gray(fresh):
    """Alpha comes back as it was; one channel becomes gray with three."""
    alpha = torch.rand(1, 20, 30, 1, generator=torch.Generator().manual_seed(0))
    compressed, _ = compress(fresh, torch.cat([photo(20, 30), alpha], -1))
    assert torch.equal(compressed[..., 3:], alpha)
    assert torch.equal(compressed[..., :3], compress(fresh, photo(20, 30))[0])
    gray, _ = compress(fresh, photo(20, 30)[..., :1], subsampling="gray")
    assert gray.shape[-1] == 3 and torch.equal(gray[..., 0], gray[..., 2])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (17, 9)])
def test_small_sizes(fresh, height, width):
    """From one pixel on."""
    compressed, (data,) = compress(fresh, photo(height, width))
    assert compressed.shape == (1, height, width, 3) and (data.width, data.height) == (width, height)


def test_its_data_constrains_a_restoration(fresh):
    """JPEGCompress -> DriftRecSample with its IMAGE and JPEG_DATA, a batch of two."""
    graph = Graph()
    source = graph.image(torch.cat([photo(40, 48), photo(40, 48).flip(2)]))
    compressed = graph.add("JPEGCompress", image=[source, 0], quality=20, subsampling="4:2:0")
    restored = graph.sample([compressed, 0], jpeg=[compressed, 1])
    graph.sink([restored, 0])
    result = fresh.run(graph.prompt)
    assert result.success, result.error
    assert error(result.outputs(restored)[0], result.outputs(compressed)[0]) > 0
