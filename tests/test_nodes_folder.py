"""LoadJPEGFolder through ComfyUI's own executor: lists with names, a folder restored and saved, what is refused."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import restore_graphs as graphs
from tests.codiff_graphs import run
from tests.graphs import Graph, photo, save_jpeg
from tests.restore_graphs import CODIFF

pytestmark = pytest.mark.comfyui
WHOLE = {"subfolders": True, "start": 0, "count": 0, "broken": "skip"}
NAMES = ["beach", "day 2/Beach", "day 2/deep/tower", "day 2/scan", "zoo"]


@pytest.fixture
def folder(fresh) -> Path:
    """input/holiday: JPEGs of several sizes, in sub-folders too, one of them turned, a PNG, and what is no picture."""
    root = fresh.base / "input" / "holiday"
    for path in (root, root / "day 2" / "deep", root / ".hidden"):
        path.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    save_jpeg(fresh, "holiday/beach.jpg", photo(24, 40), 30)
    save_jpeg(fresh, "holiday/zoo.JPEG", photo(16, 24), 50)
    save_jpeg(fresh, "holiday/day 2/Beach.jpg", photo(40, 24), 60, exif=exif)
    save_jpeg(fresh, "holiday/day 2/deep/tower.jpe", photo(17, 33), 70)
    Image.fromarray((photo(20, 28)[0] * 255).byte().numpy()).save(root / "day 2" / "scan.png")
    (root / "notes.txt").write_text("none of these")
    for name in ("._beach.jpg", ".hidden/secret.jpg"):
        shutil.copy(root / "beach.jpg", root / name)
    yield root
    shutil.rmtree(root)


def loaded(comfy, name: str = "holiday", **settings) -> list[list]:
    """The four lists, and the text on the node as a fifth."""
    graph = Graph()
    node = graph.add("LoadJPEGFolder", folder=name, **{**WHOLE, **settings})
    graph.sink([node, 0])
    run(comfy, graph)
    outputs = asyncio.run(comfy.executor.caches.outputs.get(node)).outputs
    (text,) = comfy.executor.history_result["outputs"][node]["text"]
    return [*outputs, text.splitlines()]


def refusal(comfy, name: str = "holiday", **settings) -> str:
    """The sentence of the node, at validation or when it runs."""
    graph = Graph()
    graph.sink([graph.add("LoadJPEGFolder", folder=name, **{**WHOLE, **settings}), 0])
    result = comfy.run(graph.prompt)
    assert not result.success
    details = [detail for details in result.validation.values() for detail in details]
    said = result.error if not details else details[0]
    assert "LoadJPEGFolder: " in said and "\n" not in said, said
    return said


def test_every_picture_is_what_load_jpeg_gives(fresh, folder):
    """Pixels, JPEG_DATA, quality; and the name with its folders: in the order of the names."""
    images, jpegs, qualities, names, text = loaded(fresh)
    assert names == NAMES and text == ["5 pictures"]
    files = ["beach.jpg", "day 2/Beach.jpg", "day 2/deep/tower.jpe", "day 2/scan.png", "zoo.JPEG"]
    for index, file in enumerate(files):
        graph = Graph()
        single = graph.add("LoadJPEG", image=f"holiday/{file}")
        graph.sink([single, 0])
        image, jpeg, quality, _ = run(fresh, graph).outputs(single)
        assert torch.equal(images[index], image) and qualities[index] == quality
        assert type(jpegs[index][0]) is type(jpeg[0]) and jpegs[index][0].name == jpeg[0].name == Path(file).name
    assert [tuple(image.shape[1:3]) for image in images] == [(24, 40), (24, 40), (17, 33), (20, 28), (16, 24)]


def test_parts_of_a_folder(fresh, folder):
    """start and count cut the list of the names; sub-folders can be left out, or be the folder."""
    assert loaded(fresh, start=1, count=2)[3] == NAMES[1:3]
    assert loaded(fresh, start=4, count=99)[3] == NAMES[4:]
    assert loaded(fresh, subfolders=False)[3] == ["beach", "zoo"]
    assert loaded(fresh, "holiday/day 2")[3] == ["Beach", "deep/tower", "scan"]
    assert set(loaded(fresh, "")[3]) >= {f"holiday/{name}" for name in NAMES}


def test_a_folder_is_restored_and_saved_under_its_names(fresh, restorers, folder):
    """Load JPEG Folder -> Restore JPEG -> Save Image: one file for each, in its sub-folder, of its size."""
    graph = Graph()
    node = graph.add("LoadJPEGFolder", folder="holiday", **WHOLE)
    restore = graphs.add_restore(graph, CODIFF, image=[node, 0], jpeg=[node, 1])
    graph.add("SaveImage", images=[restore, 0], filename_prefix=[node, 3])
    run(fresh, graph)
    sizes = {}
    for name in NAMES:
        with Image.open(fresh.base / "output" / f"{name}_00001_.png") as saved:
            sizes[name] = saved.size
    assert list(sizes.values()) == [(40, 24), (40, 24), (33, 17), (28, 20), (24, 16)]
    images = asyncio.run(fresh.executor.caches.outputs.get(node)).outputs[0]
    restored = asyncio.run(fresh.executor.caches.outputs.get(restore)).outputs[0]
    alone = graphs.restored(fresh, CODIFF, images[3])
    assert torch.equal(restored[3], alone) and not torch.equal(alone, images[3])


def test_broken_files_are_left_out_and_named(fresh, folder):
    """The run goes on without them, and the node says which and why; told otherwise, the first one ends it."""
    (folder / "day 2" / "cut.jpg").write_bytes((folder / "beach.jpg").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    _images, _jpegs, _qualities, names, text = loaded(fresh)
    assert names == NAMES and text[0] == "5 pictures, 2 left out:"
    assert text[1].startswith("day 2/cut.jpg ") and text[2].startswith("empty.png is ")
    assert "day 2/cut.jpg " in refusal(fresh, broken="stop")
    (folder / "bad").mkdir()
    for number in range(12):
        (folder / "bad" / f"{number:02}.jpg").write_bytes(b"GIF89a")
    assert "none of the 12 files in 'bad'" in refusal(fresh, "holiday/bad")
    assert loaded(fresh)[4][-1] == "and 4 more"


@pytest.mark.parametrize("name", ["..", "../models", "holiday/../..", "/", str(Path.home())])
def test_folders_outside_are_refused(fresh, folder, name):
    """A shared workflow must not read what is not ComfyUI's input."""
    assert "outside" in refusal(fresh, name)


def test_a_folder_beside_the_input_folder_is_outside(fresh, folder):
    """Its name begins as the input folder's."""
    beside = fresh.base / "input-2"
    beside.mkdir(exist_ok=True)
    assert "outside" in refusal(fresh, "../input-2")


def test_what_is_not_there_is_refused(fresh, folder):
    assert "no folder 'holidays'" in refusal(fresh, "holidays")
    assert "no folder" in refusal(fresh, "holiday/beach.jpg")
    assert "less than 5" in refusal(fresh, start=5)
    (folder / "none").mkdir()
    assert "no JPEG or other picture in the folder 'none'" in refusal(fresh, "holiday/none")
    assert "subfolders" in refusal(fresh, "holiday/none", subfolders=False)


def test_changed_files_are_loaded_again_and_unchanged_ones_are_not(fresh, folder):
    """By name, time and size."""
    graph = Graph()
    node = graph.add("LoadJPEGFolder", folder="holiday", **WHOLE)
    graph.sink([node, 0])

    def cached() -> bool:
        return any(name == "execution_cached" and node in data["nodes"] for name, data in run(fresh, graph).events)

    assert not cached() and cached()
    state = os.stat(folder / "zoo.JPEG")
    os.utime(folder / "zoo.JPEG", ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))
    assert not cached() and cached()
    save_jpeg(fresh, "holiday/new.jpg", photo(8, 8))
    assert not cached() and cached()
    (folder / "new.jpg").unlink()
    assert not cached()


def test_links_to_folders_are_followed_at_the_top_only(fresh, folder, tmp_path):
    """A linked folder can be named; a loop of links below does not run for ever."""
    shutil.copy(folder / "beach.jpg", tmp_path / "far.jpg")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    assert loaded(fresh)[3] == NAMES and loaded(fresh, "holiday/linked")[3] == ["far"]
