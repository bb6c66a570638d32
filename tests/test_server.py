"""A real ComfyUI server with this pack: the example workflow through comfy-cli, pages, interruption, and its end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restoration.jpeg import read_jpeg
from tests.conftest import write_driftrec, write_regression
from tests.ddrm_graphs import write_prior
from tests.graphs import photo
from tests.one_step_networks import write_tiny_codiff, write_tiny_sodiff
from tests.reduced_sd21 import reduced_base, write_codiff, write_sodiff
from tools import comfyui_server, demo
from tools.comfyui_server import NODES, PACK, ComfyUIServer, ServerError, run_workflow
from tools.pictures import before_after, most_changed, split_thumbnail
from tools.setup_env import PYTHON, ROOT

pytestmark = pytest.mark.comfyui
WORKFLOW = ROOT / "example_workflows" / "driftrec_restore.json"
CODIFF = ROOT / "example_workflows" / "codiff_sd21.json"
SODIFF = ROOT / "example_workflows" / "sodiff_sd21.json"
DDRM = ROOT / "example_workflows" / "ddrm_jpeg.json"
CONSISTENCY = ROOT / "example_workflows" / "consistency.json"
RESTORE = ROOT / "example_workflows" / "restore_jpeg.json"
FOLDER = ROOT / "example_workflows" / "restore_folder.json"
CODIFF_STARTER = ROOT / "example_workflows" / "codiff_starter.json"
SODIFF_STARTER = ROOT / "example_workflows" / "sodiff_starter.json"


def files_of(comfyui: Path) -> set[str]:
    """What ComfyUI's users leave in its folder."""
    folders = [comfyui / name for name in ("input", "output", "temp", "user", "models", "custom_nodes")]
    return {str(path) for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def files_before(comfyui_folder: Path) -> set[str]:
    return files_of(comfyui_folder)


@pytest.fixture(scope="module")
def server(comfyui_folder: Path, files_before: set[str]) -> Iterator[ComfyUIServer]:
    """ComfyUI with this pack; small restorers and a reduced SD 2.1, of random weights, in the places of real ones."""
    with ComfyUIServer(comfyui_folder) as running:
        models = running.base / "models"
        write_driftrec(models / "jpeg_restorers" / "starter-driftrec.safetensors")
        write_regression(models / "jpeg_restorers" / "starter-regression.safetensors")
        write_prior(models / "jpeg_restorers" / "starter-prior.safetensors")
        write_tiny_codiff(models / "jpeg_restorers" / "starter-onestep-faithful.safetensors")
        write_tiny_sodiff(models / "jpeg_restorers" / "starter-onestep-vivid.safetensors")
        base = reduced_base()
        write_codiff(models / "jpeg_restorers" / "codiff.safetensors", base)
        write_sodiff(models / "jpeg_restorers" / "sodiff.safetensors", base)
        (models / "checkpoints").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base.checkpoint, models / "checkpoints" / "v2-1_512-ema-pruned.safetensors")
        yield running


def save(path: Path, image: torch.Tensor, quality: int = 10) -> Path:
    Image.fromarray((image[0] * 255).round().byte().numpy()).save(path, "JPEG", quality=quality)
    return path


def test_example_workflow_through_comfy_cli(server, tmp_path):
    """`comfy run` on the file that artists open: the saved picture has the photo's size and another content."""
    restored = demo.restore(server, save(tmp_path / "holiday.JPG", photo(72, 100)))
    before, after = Image.open(tmp_path / "holiday.JPG"), Image.open(restored)
    assert after.size == before.size == (100, 72)
    assert np.abs(np.asarray(before, float) - np.asarray(after, float)).mean() > 1


@pytest.mark.parametrize("workflow", [CODIFF, SODIFF], ids=lambda path: path.stem)
def test_workflows_of_sd21_through_comfy_cli(server, tmp_path, workflow):
    """The templates as artists open them: a picture trimmed to multiples of 8, in the JPEG's mean colours."""
    shutil.copy(save(tmp_path / "photo.jpg", photo(75, 100)), server.input / "photo.jpg")
    before = {path.name for path in server.output.glob("*.png")}
    run_workflow(server, workflow)
    (name,) = {path.name for path in server.output.glob("*.png")} - before
    restored, source = Image.open(server.output / name), Image.open(tmp_path / "photo.jpg")
    assert restored.size == (96, 72)
    assert np.allclose(np.asarray(restored).mean((0, 1)), np.asarray(source).mean((0, 1)), atol=8)


@pytest.mark.parametrize(
    "workflow", [RESTORE, DDRM, CONSISTENCY, CODIFF_STARTER, SODIFF_STARTER], ids=lambda path: path.stem
)
def test_workflows_that_hold_to_the_jpeg_through_comfy_cli(server, tmp_path, workflow):
    """The templates as artists open them: the saved picture, compressed as the photo was, is the photo's file again."""
    shutil.copy(save(tmp_path / "photo.jpg", photo(75, 100)), server.input / "photo.jpg")
    before = {path.name for path in server.output.glob("*.png")}
    run_workflow(server, workflow)
    (name,) = {path.name for path in server.output.glob("*.png")} - before
    jpeg = read_jpeg(tmp_path / "photo.jpg")
    tables = [table.flatten().tolist() for table in jpeg.tables[:2]]
    Image.open(server.output / name).save(tmp_path / "again.jpg", "JPEG", qtables=tables, subsampling=2)
    pairs = zip(jpeg.coefficients.planes, read_jpeg(tmp_path / "again.jpg").coefficients.planes, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_workflow_of_a_folder_through_comfy_cli(server):
    """The template as artists open it: each picture of the folder under its name, in its sub-folder, of its size."""
    sizes = {"beach.jpg": (24, 40), "day 2/beach.jpg": (17, 33), "day 2/zoo.JPG": (40, 24)}
    (server.input / "jpegs" / "day 2").mkdir(parents=True)
    for name, size in sizes.items():
        save(server.input / "jpegs" / name, photo(*size))
    (server.input / "jpegs" / "broken.jpg").write_bytes(b"GIF89a")
    run_workflow(server, FOLDER)
    for name, (height, width) in sizes.items():
        saved = server.output / Path(name).with_suffix("")
        assert Image.open(saved.with_name(f"{saved.name}_00001_.png")).size == (width, height)
    assert not list(server.output.rglob("broken*"))
    for path in server.output.glob("beach*.png"):
        path.unlink()


def test_comfy_cli_reports_what_the_node_said(server, tmp_path):
    """A file that is no JPEG, and one that is not there: the node's sentence, and the server goes on."""
    (server.input / "photo.jpg").write_bytes(b"GIF89a")
    with pytest.raises(ServerError, match=r"^LoadJPEG: photo\.jpg is not a JPEG"):
        run_workflow(server, WORKFLOW)
    (server.input / "photo.jpg").unlink()
    with pytest.raises(ServerError, match=r"^LoadJPEG: there is no file 'photo\.jpg'"):
        run_workflow(server, WORKFLOW)
    assert demo.restore(server, save(tmp_path / "good.jpg", photo(16, 16))).is_file()


def test_template_and_help_pages_are_served(server):
    """The workflow is listed under Templates with its picture; each node's help page is where the editor looks."""
    listed = json.loads(server.get("/api/workflow_templates"))
    assert list(listed) == [PACK]
    assert sorted(listed[PACK]) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    served = json.loads(server.get(f"/api/workflow_templates/{PACK}/driftrec_restore.json"))
    assert served == json.loads(WORKFLOW.read_text(encoding="utf-8"))
    for node in NODES:
        page = server.get(f"/extensions/{PACK}/docs/{node}.md").decode()
        assert page == (ROOT / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")


def test_thumbnail_is_a_small_square(server):
    """What ComfyUI shows beside the template's name; made by tools/make_thumbnail.py."""
    thumbnail = WORKFLOW.with_suffix(".jpg")
    assert Image.open(thumbnail).size == (512, 512) and thumbnail.stat().st_size < 200_000


def test_interrupt_by_http(server):
    """POST /interrupt stops a long restoration at once, and the next one runs."""
    save(server.input / "long.jpg", photo(512, 512))
    sample = {"sampler": "ode_2m", "steps": 1000, "seed": 0, "samples": 64, "color": "mean"}
    prompt = {
        "1": {"class_type": "LoadJPEG", "inputs": {"image": "long.jpg"}},
        "2": {
            "class_type": "LoadJPEGRestorer",
            "inputs": {"restorer": "starter-driftrec.safetensors", "dtype": "default"},
        },
        "3": {"class_type": "DriftRecSample", "inputs": {"restorer": ["2", 0], "image": ["1", 0], **sample}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "never"}},
    }
    number = server.post("/prompt", {"prompt": prompt, "client_id": str(uuid.uuid4())})["prompt_id"]
    wait_for(lambda: len(json.loads(server.get("/queue"))["queue_running"]) == 1)
    time.sleep(1.5)  # into the sampling
    started = time.monotonic()
    server.post("/interrupt", {"prompt_id": number})
    wait_for(lambda: number in json.loads(server.get("/history")))
    assert time.monotonic() - started < 5
    messages = json.loads(server.get(f"/history/{number}"))[number]["status"]["messages"]
    assert messages[-1][0] == "execution_interrupted"
    prompt["3"]["inputs"].update(steps=1, samples=1)
    number = server.post("/prompt", {"prompt": prompt})["prompt_id"]
    wait_for(lambda: number in json.loads(server.get("/history")))
    assert json.loads(server.get(f"/history/{number}"))[number]["status"]["status_str"] == "success"


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_nothing_is_written_into_comfyuis_own_folders(server, files_before):
    """Uploads, results and settings of the server stay in its own folder."""
    assert files_of(server.comfyui) == files_before


@pytest.mark.parametrize("path", sorted(WORKFLOW.parent.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_file_is_sound(server, path):
    """Each link joins existing slots of equal types, and widget values fit the widgets of the nodes, in order."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, out, target, into, kind in graph["links"]:
        assert link in nodes[source]["outputs"][out]["links"] and nodes[source]["outputs"][out]["type"] == kind
        assert nodes[target]["inputs"][into]["link"] == link and nodes[target]["inputs"][into]["type"] == kind
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(link[0] for link in graph["links"])
    for node in graph["nodes"]:
        if node["type"] in NODES:
            check_widgets(node, json.loads(server.get(f"/object_info/{node['type']}"))[node["type"]])


def check_widgets(node: dict, info: dict) -> None:
    values, names = (
        list(node["widgets_values"]),
        [*info["input_order"]["required"], *info["input_order"].get("optional", [])],
    )
    definitions = {**info["input"]["required"], **info["input"].get("optional", {})}
    for name in names:
        kind, settings = definitions[name]
        if kind in ("INT", "FLOAT"):
            value = values.pop(0)
            expected = {"samples": 4}.get(name, settings["default"])  # the graph averages, for starters are grainy
            assert settings["min"] <= value <= settings["max"] and value == expected, name
        elif kind == "BOOLEAN":
            assert values.pop(0) == settings["default"], name
        elif kind == "COMBO":
            value = values.pop(0)
            assert name == "image" or value in settings["options"], name
        elif kind == "STRING":
            assert isinstance(values.pop(0), str), name
        if settings.get("control_after_generate"):
            assert values.pop(0) == "fixed"
        if settings.get("image_upload"):
            assert values.pop(0) == "image"
    assert not values, f"{node['type']} has more values than widgets: {values}"
    assert {one["name"] for one in node["inputs"]} == set(names)


def test_demo_writes_its_pictures(server, tmp_path, monkeypatch, capsys):
    """The sample, and a photo of one's own: both pictures, and a table, longer for the sample."""
    monkeypatch.setattr(demo, "ComfyUIServer", lambda: nullcontext(server))
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 0
    said = capsys.readouterr().out
    assert "512x512" in said and "quality 10" in said and all(word in said for word in ("PSNR", "SSIM", "blockiness"))
    assert Image.open(tmp_path / "demo" / "restored.png").size == (512, 512)
    assert Image.open(tmp_path / "demo" / "before_after.png").width > 1024
    assert read_jpeg(tmp_path / "demo" / "sample.jpg").quality.quality == 10
    own = save(tmp_path / "own.jpeg", photo(40, 60), quality=55)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--image", str(own)])
    assert demo.main() == 0
    said = capsys.readouterr().out
    assert "60x40" in said and "quality 55" in said and "PSNR" not in said
    assert Image.open(tmp_path / "demo" / "restored.png").size == (60, 40)


def test_demo_says_how_long_it_took_and_how_well_the_result_agrees(server, tmp_path, monkeypatch, capsys):
    """With a restorer of one's own, which is felt: the seconds are those of the picture, not those of the start."""
    monkeypatch.setattr(demo, "ComfyUIServer", lambda: nullcontext(server))
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    own, results = save(tmp_path / "own.jpeg", photo(48, 64), quality=20), []
    other = write_tiny_codiff(tmp_path / "other.safetensors", seed=5)
    for more in ([], ["--restorer", str(other)]):
        monkeypatch.setattr(sys, "argv", ["demo.py", "--image", str(own), *more])
        started = time.monotonic()
        assert demo.main() == 0
        took, said = time.monotonic() - started, capsys.readouterr().out
        results.append(np.asarray(Image.open(tmp_path / "demo" / "restored.png")))
        seconds = float(re.search(r"Restored in ([\d.]+) s", said)[1])
        assert 0 <= seconds < took / 2 and re.search(r"agreement +100 % ", said) and re.search(r"quality +20 ", said)
    assert not np.array_equal(*results)


def test_demo_refuses_a_restorer_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--restorer", str(tmp_path / "none.safetensors")])
    assert demo.main() == 2 and "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["picture.png", "absent.jpg"])
def test_demo_refuses_what_is_no_jpeg(name, tmp_path, monkeypatch, capsys):
    """One sentence and exit status 2, before anything is started."""
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--image", str(tmp_path / name)])
    assert demo.main() == 2
    said = capsys.readouterr().err
    assert name in said and "must be a JPEG" in said and said.count("\n") == 1


def test_comparison_finds_the_place_that_changed():
    """The zoomed detail is where the pictures differ; also for a picture of one pixel."""
    before = Image.new("RGB", (300, 200))
    after = before.copy()
    after.paste((255, 255, 255), (200, 50, 240, 90))
    left, top, right, bottom = most_changed(before, after)
    assert left <= 200 and top <= 50 and right >= 240 and bottom >= 90
    assert before_after(before, after).width > 600
    dot = Image.new("RGB", (1, 1))
    assert before_after(dot, dot).height > 0 and split_thumbnail(dot, dot).size == (512, 512)


PROGRAM = """
import signal
import time
from tools.comfyui_server import ComfyUIServer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
class Told(ComfyUIServer):
    def _start(self):
        super()._start()
        print(self._process.pid, self.base, flush=True)
with Told():
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_what_was_started(comfyui_folder, number):
    """Ctrl-C, or a polite kill, while ComfyUI starts: its process and its folder are gone."""
    environment = {**os.environ, "COMFYUI_DIR": str(comfyui_folder)}
    process = subprocess.Popen(
        [str(PYTHON), "-c", PROGRAM],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    child, base = process.stdout.readline().split()
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode != 0 and not Path(base).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(child), 0)


def test_pack_that_does_not_import_is_an_error_with_the_log(comfyui_folder, monkeypatch):
    """ComfyUI only logs a failed import and runs on; here it is an error that shows the log."""

    def install(target: Path) -> None:
        target.mkdir()
        (target / "__init__.py").write_text("raise RuntimeError('the pack is broken')\n")

    monkeypatch.setattr(comfyui_server, "_install_pack", install)
    with pytest.raises(ServerError, match=r"(?s)without LoadJPEG.*the pack is broken"), ComfyUIServer(comfyui_folder):
        pass


def test_pack_is_copied_where_links_are_not_allowed(tmp_path, monkeypatch):
    """Windows without developer mode: all parts that ComfyUI needs are there, and nothing large."""

    def refused(self, *_args, **_settings):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    comfyui_server._install_pack(tmp_path / PACK)
    for part in ("__init__.py", "nodes/extension.py", "restoration/pipelines.py", "web/docs/LoadJPEG.md"):
        assert (tmp_path / PACK / part).read_bytes() == (ROOT / part).read_bytes()
    assert not (tmp_path / PACK / "tests").exists()
