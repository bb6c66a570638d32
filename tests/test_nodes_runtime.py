"""Folders, types, memory: what the nodes ask of ComfyUI's managers."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.pipelines import Progress
from tests.conftest import write_driftrec
from tests.graphs import Graph, photo, save_jpeg
from tests.one_step_networks import write_tiny_codiff

pytestmark = pytest.mark.comfyui
SNAPSHOT = Path(__file__).with_name("node_schemas.json")


@pytest.fixture
def runtime(fresh) -> ModuleType:
    return sys.modules[f"{fresh.pack}.nodes.runtime"]


@pytest.fixture
def loading(fresh) -> ModuleType:
    return sys.modules[f"{fresh.pack}.nodes.loading"]


def schemas(comfy) -> dict:
    """What shared workflows rely on: ids, order and defaults of inputs, order and types of outputs."""
    found = {}
    for name, node in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if not getattr(node, "RELATIVE_PYTHON_MODULE", "").startswith("custom_nodes"):
            continue
        schema = node.GET_SCHEMA()
        inputs = [{"id": one.id, **described(one)} for one in schema.inputs]
        outputs = [{"type": one.get_io_type(), "name": one.display_name or one.id} for one in schema.outputs]
        found[name] = {"inputs": inputs, "outputs": outputs}
    return found


def described(one) -> dict:
    settings = one.as_dict()
    kept = ("default", "min", "max", "step", "control_after_generate", "image_upload", "image_folder")
    fields = {key: settings[key] for key in kept if key in settings}
    files = one.id in ("image", "restorer")
    options = {} if files or "options" not in settings else {"options": settings["options"]}
    return {"type": one.get_io_type(), "optional": bool(one.optional), **fields, **options}


def test_landed_schemas_never_change(fresh):
    """node_schemas.json is what has landed: inputs may be added at the end, options too; nothing else may change."""
    landed, present = json.loads(SNAPSHOT.read_text(encoding="utf-8")), json.loads(json.dumps(schemas(fresh)))
    assert set(landed) == set(present), "record new nodes in node_schemas.json; never remove one"
    for name, node in landed.items():
        assert present[name]["outputs"][: len(node["outputs"])] == node["outputs"], name
        for recorded, now in zip(node["inputs"], present[name]["inputs"], strict=False):
            options = now.pop("options", [])
            assert set(recorded.pop("options", [])) <= set(options), (name, now["id"])
            assert recorded == now, name
        assert len(present[name]["inputs"]) >= len(node["inputs"])
        added = present[name]["inputs"][len(node["inputs"]) :]
        assert all(one["optional"] for one in added), f"{name}: required inputs come before the optional widgets"


def test_everything_has_a_tooltip_and_a_help_page(fresh):
    """Nodes, inputs and outputs explain themselves; each node has a page that names all of its inputs."""
    pages = Path(__file__).resolve().parent.parent / "web" / "docs"
    for name in schemas(fresh):
        schema = fresh.nodes.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
        assert schema.description and schema.search_aliases and schema.display_name
        page = (pages / f"{name}.md").read_text(encoding="utf-8")
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, (name, socket.id)
            assert f"`{socket.display_name or socket.id}`" in page or f"`{socket.id}`" in page, (name, socket.id)


def test_models_folder_comes_before_the_shipped_weights(fresh, loading):
    """Both folders are searched, .safetensors only; a file of the same name in models/ wins."""
    paths, extensions = fresh.folder_paths.folder_names_and_paths["jpeg_restorers"]
    assert Path(paths[0]) == fresh.base / "models" / "jpeg_restorers"
    assert Path(paths[-1]) == Path(loading.SHIPPED_WEIGHTS) and extensions == {".safetensors"}
    (fresh.base / "models" / "jpeg_restorers" / "checkpoint.ckpt").write_bytes(b"pickle")
    assert "checkpoint.ckpt" not in loading.restorer_names()
    for shipped in Path(loading.SHIPPED_WEIGHTS).glob("*.safetensors"):
        assert shipped.name in loading.restorer_names()
        assert Path(loading.restorer_path(shipped.name)) == shipped


def test_networks_die_with_their_last_user(fresh, loading, tmp_path):
    """No global keeps a network; a file that has changed is loaded anew."""
    path = str(write_driftrec(tmp_path / "one.safetensors"))
    first = loading.load_restorer(path)
    assert loading.load_restorer(path) is first
    write_driftrec(tmp_path / "one.safetensors", width=12)
    assert loading.load_restorer(path) is not first
    network = weakref.ref(first.module)
    del first
    import gc

    gc.collect()
    assert network() is None


def test_a_restorer_is_shared_only_where_the_same_type_is_asked_for(fresh, loading, tmp_path, monkeypatch):
    """ComfyUI chooses bf16 for UNets, not for the networks beside them; fp32 that is asked for is fp32 in both."""
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "bf16_unet", True)
    path = str(write_tiny_codiff(tmp_path / "one.safetensors"))
    default, single = loading.load_restorer(path), loading.load_restorer(path, torch.float32)
    found = [one.backbone.model.model.get_dtype() for one in (default, single)]
    assert found == [torch.bfloat16, torch.float32] and default.dtype == single.dtype == torch.float32
    assert loading.load_restorer(path) is default and loading.load_restorer(path, torch.float32) is single


def test_default_type_follows_the_device(loading, monkeypatch):
    """fp16 where ComfyUI likes it, else bf16, else float32; always float32 on the CPU."""
    assert loading.default_dtype(torch.device("cpu")) == torch.float32
    answers = {"fp16": True, "bf16": True}
    monkeypatch.setattr(loading.mm, "should_use_fp16", lambda device: answers["fp16"])
    monkeypatch.setattr(loading.mm, "should_use_bf16", lambda device: answers["bf16"])
    assert loading.default_dtype(torch.device("cuda")) == torch.float16
    answers["fp16"] = False
    assert loading.default_dtype(torch.device("cuda")) == torch.bfloat16
    answers["bf16"] = False
    assert loading.default_dtype(torch.device("cuda")) == torch.float32


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage) -> None:
        key = storage.data_ptr()
        if key and key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)


@pytest.mark.parametrize(
    "config",
    [
        NCSNppConfig(width=32, channel_multipliers=(1, 2, 2, 2), attention_levels=(), patch_size=2),
        NCSNppConfig(width=32),
        NCSNppConfig(width=16, channel_multipliers=(1, 2, 4)),
        NCSNppConfig(width=32, channel_multipliers=(1, 1, 1), res_blocks=1),
    ],
    ids=["starter", "paper narrowed", "widening", "short"],
)
def test_memory_estimate_against_the_live_tensors(runtime, config):
    """What is asked of the memory manager is at least what an evaluation takes, and at most a third more."""
    side = 128 * config.patch_size
    network, image = NCSNpp(config).eval(), torch.rand(1, 6, side, side)
    with torch.inference_mode(), _Peak() as measured:
        network(image, torch.ones(1))
    assert 1 <= runtime.activation_bytes(config, side, side, torch.float32) / measured.peak < 1.33


def fake_restorer(device: str) -> SimpleNamespace:
    module = SimpleNamespace(network=SimpleNamespace(config=NCSNppConfig()))
    patcher = SimpleNamespace(load_device=torch.device(device))
    return SimpleNamespace(module=module, patcher=patcher, dtype=torch.float32)


def test_tile_is_chosen_to_fit_on_the_cpu_only(runtime, monkeypatch):
    """Without memory to spare the CPU takes smaller tiles at once; a GPU keeps the tile and may run out of memory."""
    loads = []
    monkeypatch.setattr(runtime.mm, "load_models_gpu", lambda patchers, memory_required: loads.append(memory_required))
    monkeypatch.setattr(runtime.mm, "get_free_memory", lambda device: 2 << 30)
    compute = runtime.prepare_compute(fake_restorer("cpu"), 4000, 6000, 1024, 64)
    assert compute.tiler.tile == 512 and compute.tiler.align == 64 and loads[-1] < 2 << 30
    assert runtime.prepare_compute(fake_restorer("cuda"), 4000, 6000, 1024, 64).tiler.tile == 1024
    assert loads[-1] > 2 << 30
    monkeypatch.setattr(runtime.mm, "get_free_memory", lambda device: 64 << 30)
    assert runtime.prepare_compute(fake_restorer("cpu"), 4000, 6000, 1024, 64).tiler.tile == 1024


def test_running_out_of_memory_halves_the_tile(fresh, runtime, monkeypatch):
    """A network that cannot take more than 128 pixels: the node releases memory and goes on with smaller tiles."""
    released = []
    monkeypatch.setattr(runtime.mm, "soft_empty_cache", lambda force=False: released.append(True))
    graph = Graph()
    sample = graph.sample([graph.image(photo(256, 320)), 0], steps=1, tile=512)
    graph.sink([sample, 0])
    loader = graph.prompt["2"]
    assert loader["class_type"] == "LoadJPEGRestorer"
    network_class = sys.modules[f"{fresh.pack}.restoration.networks.ncsnpp"].NCSNpp
    forward, sides = network_class.forward, []

    def limited(self, x, noise_level=None):
        sides.append(max(x.shape[-2:]))
        if sides[-1] > 128:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, x, noise_level)

    monkeypatch.setattr(network_class, "forward", limited)
    result = fresh.run(graph.prompt)
    assert result.success, result.error
    assert sides[0] == 320 and sides[-1] == 128 and len(released) >= 2


def test_preview_is_small_whatever_the_picture(runtime):
    """Previews are at most as large as ComfyUI shows them, never enlarged, in the picture's shape."""
    assert runtime.preview_picture(torch.rand(1, 3, 900, 1800), 512).size == (512, 256)
    assert runtime.preview_picture(torch.rand(1, 3, 1, 5000), 512).size == (512, 1)
    assert runtime.preview_picture(torch.rand(2, 3, 30, 40), 512).size == (40, 30)
    white = runtime.preview_picture(torch.full((1, 3, 4, 4), 1.7), 512)
    assert white.getpixel((0, 0)) == (255, 255, 255)


def test_previews_are_not_sent_too_often(runtime, monkeypatch):
    """A fast network does not spend its time on previews."""
    sent = []
    monkeypatch.setattr(
        runtime.comfy.utils.ProgressBar, "update_absolute", lambda self, value, preview=None: sent.append(preview)
    )
    report = runtime.ProgressReport()
    for index in range(20):
        report(Progress(index / 20, torch.zeros(1, 3, 8, 8)))
    assert len(sent) == 21 and sum(preview is not None for preview in sent) <= 2


@pytest.mark.slow
def test_24_megapixels_in_bounded_memory(fresh):
    """6000x4000 from the file to the result, held to the JPEG, in tiles: the process stays below 5 GB."""
    save_jpeg(fresh, "large.jpg", photo(4000, 6000), 20)
    graph = Graph()
    loader = graph.add("LoadJPEG", image="large.jpg")
    sample = graph.sample([loader, 0], steps=2, tile=512, jpeg=[loader, 1])
    graph.sink([sample, 0])
    result = fresh.run(graph.prompt)
    assert result.success, result.error
    assert tuple(result.outputs(sample)[0].shape) == (1, 4000, 6000, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"peak {peak / 2**30:.2f} GB")
    assert peak < 5 << 30
