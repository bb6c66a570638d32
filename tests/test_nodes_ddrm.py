"""DDRMJPEGRestore through ComfyUI's own executor, with a prior of random weights."""

from __future__ import annotations

import io
import shutil
import sys
import time

import pytest
import torch
from PIL import Image
from torch import Tensor

from restoration.jpeg import JPEGError, read_jpeg
from tests.ddrm_graphs import CLASSES, PRIOR, SMALL, add_ddrm, write_priors
from tests.graphs import Graph, photo, save_jpeg
from tests.shared import shared_path

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def priors(comfy) -> None:
    write_priors(comfy.base / "models" / "jpeg_restorers")
    comfy.folder_paths.filename_list_cache.clear()


@pytest.fixture
def ddrm(fresh, priors):
    """The executor with empty caches, and priors in its models folder."""
    return fresh


def restore(comfy, name: str, **settings) -> Tensor:
    graph = Graph()
    node = add_ddrm(graph, [graph.add("LoadJPEG", image=name), 1], **settings)
    graph.sink([node, 0])
    result = comfy.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    return result.outputs(node)[0]


def refusal(comfy, graph: Graph) -> str:
    """The sentence that the node ends with; a good graph runs after it."""
    result = comfy.run(graph.prompt)
    assert not result.success and result.error_node == "DDRMJPEGRestore", (result.error, result.validation)
    assert result.error.startswith(("DDRMJPEGRestore: ", "ValueError: DDRMJPEGRestore: ")), result.error
    assert "\n" not in result.error and len(result.error) < 500
    save_jpeg(comfy, "good.jpg", photo(16, 16))
    assert restore(comfy, "good.jpg", samples=1).isfinite().all()
    return result.error


def test_whole_graph_from_file_to_saved_picture(ddrm):
    """LoadJPEG -> DDRMJPEGRestore -> SaveImage: any size, and the saved PNG compresses to the same coefficients."""
    path = save_jpeg(ddrm, "landscape.jpg", photo(75, 101), quality=10)
    graph = Graph()
    node = add_ddrm(graph, [graph.add("LoadJPEG", image="landscape.jpg"), 1])
    saved = graph.add("SaveImage", images=[node, 0], filename_prefix="ddrm")
    result = ddrm.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    restored = result.outputs(node)[0]
    assert restored.dtype == torch.float32 and restored.is_contiguous() and tuple(restored.shape) == (1, 75, 101, 3)
    file = ddrm.executor.history_result["outputs"][saved]["images"][0]["filename"]
    jpeg, buffer = read_jpeg(path), io.BytesIO()
    tables = [table.flatten().tolist() for table in jpeg.tables[:2]]
    Image.open(ddrm.base / "output" / file).save(buffer, "JPEG", qtables=tables, subsampling=2)
    again = read_jpeg(buffer.getvalue(), name="again.jpg")
    different = [
        float((one != other).float().mean())
        for one, other in zip(jpeg.coefficients.planes, again.coefficients.planes, strict=True)
    ]
    assert max(different) == 0


def test_turned_and_gray_files_come_out_upright(ddrm):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_jpeg(ddrm, "turned.jpg", photo(40, 64), quality=30, exif=exif)
    assert tuple(restore(ddrm, "turned.jpg").shape) == (1, 64, 40, 3)
    Image.fromarray((photo(24, 32)[0] * 255).byte().numpy()).convert("L").save(ddrm.base / "input" / "gray.jpg")
    assert tuple(restore(ddrm, "gray.jpg").shape) == (1, 24, 32, 3)


def test_a_batch_of_compress_to_jpeg(ddrm):
    """Two pictures of one size give two; each is what it is alone."""
    image = torch.cat([photo(32, 48), photo(32, 48).flip(1)])
    graph = Graph()
    compressed = graph.add("JPEGCompress", image=[graph.image(image), 0], quality=10, subsampling="4:2:0")
    node = add_ddrm(graph, [compressed, 1])
    single = graph.add("JPEGCompress", image=[graph.image(image[1:]), 0], quality=10, subsampling="4:2:0")
    alone = add_ddrm(graph, [single, 1])
    graph.sink([node, 0])
    graph.sink([alone, 0])
    result = ddrm.run(graph.prompt)
    assert result.success, (result.error, result.validation)
    batch = result.outputs(node)[0]
    assert tuple(batch.shape) == (2, 32, 48, 3) and torch.equal(batch[1:], result.outputs(alone)[0])


def test_same_seed_same_bytes_and_another_seed_another_picture(ddrm):
    save_jpeg(ddrm, "seed.jpg", photo(32, 48))
    first = restore(ddrm, "seed.jpg", seed=7, samples=1)
    ddrm.forget()
    assert torch.equal(first, restore(ddrm, "seed.jpg", seed=7, samples=1))
    assert not torch.equal(first, restore(ddrm, "seed.jpg", seed=2**64 - 1, samples=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"measurement": "projection"},
        {"measurement": "shift"},
        {"measurement": "paper"},
        {"eta": 0.5},
        {"eta_b": 0.3},
        {"start": 900},
        {"consistency": 0.0},
        {"closed_loop": False},
        {"tile": 128, "overlap": 32},
        {"restorer": CLASSES, "class_label": 4},
        {"dtype": "bf16"},
    ],
    ids=str,
)
def test_every_setting_runs_and_makes_a_difference(ddrm, settings):
    """Each input of the node reaches the core."""
    save_jpeg(ddrm, "settings.jpg", photo(160, 160))
    assert not torch.equal(restore(ddrm, "settings.jpg", **settings), restore(ddrm, "settings.jpg", dtype="fp32"))


def test_tile_0_is_the_size_the_prior_was_trained_on(ddrm, monkeypatch):
    sides = []
    network = sys.modules[f"{ddrm.pack}.restoration.networks.adm_unet"].ADMUNet
    forward = network.forward

    def recorded(self, x, timesteps, labels=None):
        sides.append(tuple(x.shape[-2:]))
        return forward(self, x, timesteps, labels)

    monkeypatch.setattr(network, "forward", recorded)
    save_jpeg(ddrm, "wide.jpg", photo(64, 160))
    restore(ddrm, "wide.jpg", restorer=SMALL, start=100, samples=1, steps=1)
    assert set(sides) == {(64, 64)}
    sides.clear()
    restore(ddrm, "wide.jpg", restorer=SMALL, start=100, samples=1, steps=1, tile=128)
    assert set(sides) == {(64, 128)}


def test_progress_and_previews_arrive(ddrm):
    """The bar starts at nothing, never falls, ends full, and carries small pictures."""
    save_jpeg(ddrm, "large.jpg", photo(300, 400))
    graph = Graph()
    node = add_ddrm(graph, [graph.add("LoadJPEG", image="large.jpg"), 1], steps=3, tile=128)
    graph.sink([node, 0])
    result = ddrm.run(graph.prompt)
    assert result.success, result.error
    values = [value for value, _, _ in result.progress]
    assert values[0] == 0 and values == sorted(values) and values[-1] == result.progress[-1][1]
    previews = [preview for _, _, preview in result.progress if preview is not None]
    assert previews and previews[0][0] == "JPEG" and previews[0][1].size == (400, 300)


def test_interruption_stops_soon_and_the_next_prompt_runs(ddrm):
    save_jpeg(ddrm, "long.jpg", photo(512, 512))
    graph = Graph()
    node = add_ddrm(graph, [graph.add("LoadJPEG", image="long.jpg"), 1], steps=300, samples=64, tile=256)
    graph.sink([node, 0])
    pressed = []

    def press(value, total, preview):
        if value > 0 and not pressed:
            pressed.append(time.perf_counter())
            ddrm.interrupt()

    ddrm.on_progress = press
    result = ddrm.run(graph.prompt)
    assert result.interrupted and not result.success
    assert time.perf_counter() - pressed[0] < 3
    ddrm.on_progress = None
    save_jpeg(ddrm, "good.jpg", photo(16, 16))
    assert restore(ddrm, "good.jpg").isfinite().all()


def test_samples_at_once_follow_the_free_memory(ddrm, monkeypatch):
    """On the CPU one; on a GPU what fits beside the picture's state; never more than are wanted, never none."""
    runtime, loading = (sys.modules[f"{ddrm.pack}.nodes.{name}"] for name in ("runtime", "loading"))
    loaded = loading.load_restorer(loading.restorer_path(PRIOR))
    monkeypatch.setattr(runtime.mm, "load_models_gpu", lambda patchers, memory_required: None)
    monkeypatch.setattr(runtime.mm, "get_free_memory", lambda device: 1 << 40)
    assert runtime.prepare_prior(loaded, 512, 512, 8, 0, 64)[1] == 1
    monkeypatch.setattr(runtime.mm, "is_device_cpu", lambda device: False)
    one = loaded.module.network.activation_bytes(512, 512, loaded.dtype) + 10 * 12 * 512**2
    for free, expected in ((1 << 40, 8), (4 * one / 0.8 + 1, 4), (one / 10, 1)):
        monkeypatch.setattr(runtime.mm, "get_free_memory", lambda device, free=free: int(free))
        assert runtime.prepare_prior(loaded, 512, 512, 8, 0, 64)[1] == expected


def test_running_out_of_memory_takes_fewer_samples_then_smaller_tiles(ddrm, monkeypatch):
    """Memory for one sample of 128 pixels: the node goes on until that is what it asks for."""
    runtime = sys.modules[f"{ddrm.pack}.nodes.runtime"]
    prepare, shapes, released = runtime.prepare_prior, [], []
    node_module = sys.modules[f"{ddrm.pack}.nodes.ddrm"]
    monkeypatch.setattr(node_module, "prepare_prior", lambda *given: (prepare(*given)[0], 4))
    monkeypatch.setattr(runtime.mm, "soft_empty_cache", lambda force=False: released.append(True))
    network = sys.modules[f"{ddrm.pack}.restoration.networks.adm_unet"].ADMUNet
    forward = network.forward

    def limited(self, x, timesteps, labels=None):
        shapes.append(tuple(x.shape))
        if x.shape[0] > 1 or max(x.shape[-2:]) > 128:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x, timesteps, labels)

    monkeypatch.setattr(network, "forward", limited)
    save_jpeg(ddrm, "memory.jpg", photo(256, 256))
    assert restore(ddrm, "memory.jpg", samples=4).isfinite().all()
    assert [shape[0] for shape in shapes[:3]] == [4, 2, 1] and shapes[-1] == (1, 3, 128, 128) and len(released) >= 3


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_png_is_refused_with_what_to_do(ddrm):
    """Nothing is known of it beyond its pixels: compress it here, or take another restorer."""
    Image.fromarray((photo(24, 24)[0] * 255).byte().numpy()).save(ddrm.base / "input" / "once.png")
    graph = Graph()
    graph.sink([add_ddrm(graph, [graph.add("LoadJPEG", image="once.png"), 1]), 0])
    message = refusal(ddrm, graph)
    assert "once.png is no JPEG" in message and "Compress to JPEG" in message and "DriftRec" in message


def test_jpegs_of_several_sizes_are_refused(ddrm):
    graph = Graph()
    jpegs = [read_of(ddrm, height, 32) for height in (16, 24)]
    graph.sink([add_ddrm(graph, [graph.image(jpegs), 0]), 0])
    assert "one size" in (message := refusal(ddrm, graph)) and "32x16, 32x24" in message


def read_of(comfy, height: int, width: int):
    """JPEGData as the pack in ComfyUI knows it."""
    path = save_jpeg(comfy, f"{width}x{height}.jpg", photo(height, width))
    return sys.modules[f"{comfy.pack}.restoration.jpeg"].read_jpeg(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"restorer": "test-driftrec.safetensors"}, "family prior, got driftrec"),
        ({"restorer": SMALL, "steps": 20}, "timesteps up to 200"),
        ({"restorer": CLASSES}, "trained on 10 classes"),
        ({"restorer": CLASSES, "class_label": 10}, "0 to 9"),
        ({"class_label": 3}, "no classes"),
        ({"steps": 50, "start": 40}, "1 to 40 steps"),
        ({"measurement": "paper"}, "multiple of 16, got 40x24"),
        ({"eta_b": -0.5}, "eta_b between 0 and 1, got -0.5"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(ddrm, settings, said):
    save_jpeg(ddrm, "refused.jpg", photo(24, 40))
    graph = Graph()
    graph.sink([add_ddrm(graph, [graph.add("LoadJPEG", image="refused.jpg"), 1], **settings), 0])
    assert said in refusal(ddrm, graph)


def test_what_is_no_jpeg_data_is_refused(ddrm):
    for nothing in ([torch.zeros(1)], []):
        graph = Graph()
        graph.sink([add_ddrm(graph, [graph.image(nothing), 0]), 0])
        assert "JPEG_DATA of this pack" in refusal(ddrm, graph)


def test_every_odd_file_works_or_is_explained(ddrm):
    """LoadJPEG and the node on files of other decoders' tests: a picture of the right size, or a sentence."""
    restored = refused = 0
    for path in sorted(shared_path("data", "torture").iterdir()):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"):
            continue
        try:
            jpeg = read_jpeg(path)
        except JPEGError:
            jpeg = None
        shutil.copy(path, ddrm.base / "input" / path.name)
        graph = Graph()
        node = add_ddrm(graph, [graph.add("LoadJPEG", image=path.name), 1], steps=1, samples=1)
        graph.sink([node, 0])
        result = ddrm.run(graph.prompt)
        if jpeg is None:
            said = result.error or str(result.validation)
            assert not result.success and said.partition(": ")[0] in ("LoadJPEG", "DDRMJPEGRestore"), (path.name, said)
            assert path.name in said
            refused += 1
            continue
        assert result.success, (path.name, result.error)
        assert tuple(result.outputs(node)[0].shape) == (1, jpeg.upright_height, jpeg.upright_width, 3), path.name
        restored += 1
    assert restored >= 55 and refused >= 20
