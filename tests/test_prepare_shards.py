"""Folders packed into shards: nothing is lost or changed, a stop costs one shard at most, and mistakes are refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data import shards
from training.data.pictures import find_images, load_image
from training.data.shards import ShardError, index_path, scan_shard, stored_index
from training.prepare import run
from training.prepare.shards import ShardSettings, write_shards


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(shards, "_INDEXES", {})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eleven pictures of noise with odd names, one turned by its EXIF tag, one of 16 bits, and two that are none."""
    folder = tmp_path / "pictures"
    (folder / "sub.dir").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["a.b.png", "ä ö.png", "sub.dir/a.png", "c.webp", "d.PNG", "e.bmp", "f.png", "g.png"]
    for number, name in enumerate(names):
        pixels = rng.integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(turned).save(folder / "turned.jpg", quality=90, exif=exif)
    Image.fromarray(rng.integers(0, 2**16, (33, 44), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(turned).convert("L").save(folder / "gray.jpeg")
    (folder / "a.b.txt").write_text("noise")
    (folder / "text.png").write_text("no picture")
    whole = (folder / "f.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def packed(output: Path) -> list[Path]:
    return find_images(f"{output}/shards-*.tar")


def originals(pictures: Path) -> list[Path]:
    return [path for path in find_images(pictures) if path.name not in ("text.png", "cut.png")]


def as_set(paths: list[Path]) -> set[bytes]:
    return {repr(load_image(path).shape).encode() + load_image(path).tobytes() for path in paths}


def test_copies_are_the_files_themselves(pictures: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    write_shards(pictures, output, ShardSettings(shard_mb=0.02))
    members = {}
    for shard in sorted(output.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    texts = {name: members.pop(name) for name in list(members) if name.endswith(".txt")}
    assert sorted(members.values()) == sorted(path.read_bytes() for path in originals(pictures))
    assert all((name.count(".") == 1 and name.isascii()) or "ä" in name for name in members), "the key ends at the dot"
    assert list(texts.values()) == [b"noise"] and next(iter(texts)).removesuffix("txt") + "png" in members
    said = capsys.readouterr().out
    assert "text.png, which cannot be read" in said and "cut.png" in said and "11 pictures in" in said
    assert len(list(output.glob("*.tar"))) > 3
    manifest = json.loads((output / "shards.json").read_text())
    sizes = [shard.stat().st_size for shard in output.glob("*.tar")]
    assert (manifest["pictures"], manifest["shards"], manifest["bytes"]) == (11, len(sizes), sum(sizes))
    assert as_set(packed(output)) == as_set(originals(pictures))


@pytest.mark.parametrize("encode", ["png", "webp"])
def test_re_encoded_pictures_have_the_same_pixels(pictures: Path, tmp_path: Path, encode: str) -> None:
    write_shards(pictures, tmp_path / "out", ShardSettings(encode=encode))
    paths = packed(tmp_path / "out")
    assert {path.suffix for path in paths} == {f".{encode}"} and len(paths) == 11
    assert as_set(paths) == as_set(originals(pictures))


def test_shards_are_filled_up_to_their_size_in_a_random_order(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), number).save(buffer, "PNG")
        (folder / f"{number:02d}.png").write_bytes(buffer.getvalue().ljust(1000, b"\0"))
    write_shards(folder, tmp_path / "out", ShardSettings(shard_mb=10_000 / 2**20))
    contents = [[name for name in scan_shard(shard)] for shard in sorted((tmp_path / "out").glob("*.tar"))]
    assert [len(names) for names in contents] == [10, 10, 10, 10]
    order = [int(name.split("_")[1].split(".")[0]) for names in contents for name in names]
    assert sorted(order) == list(range(40)) and order != sorted(order)
    assert [int(name.split("_")[0]) for names in contents for name in names] == list(range(40))


def test_a_repeated_command_makes_up_for_what_is_missing(pictures: Path, tmp_path: Path, capsys) -> None:
    output, settings = tmp_path / "out", ShardSettings(shard_mb=0.02)
    write_shards(pictures, output, settings)
    whole = {path: path.read_bytes() for path in output.glob("shards-*")}
    times = {path: path.stat().st_mtime_ns for path in whole}
    assert all(stored_index(path) == scan_shard(path) for path in whole if path.suffix == ".tar")
    (output / "shards-001.tar").unlink()  # as if it had been killed there
    (output / "shards-001.tar.part").write_bytes(b"half")
    index_path(output / "shards-002.tar").unlink()
    (output / "shards.json").write_text(
        json.dumps({k: v for k, v in json.loads((output / "shards.json").read_text()).items() if k != "pictures"})
    )
    write_shards(pictures, output, settings, jobs=2)
    assert {path: path.read_bytes() for path in output.glob("shards-*")} == whole
    again = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {f"shards-{number}{ending}" for number in ("001", "002") for ending in (".tar", ".index.json")}
    assert "text.png, which cannot be read" in capsys.readouterr().out
    assert json.loads((output / "shards.json").read_text())["pictures"] == 11


def test_shards_of_something_else_are_not_mixed(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_shards(pictures, output, ShardSettings())
    with pytest.raises(ShardError, match=r"packed otherwise .*encode"):
        write_shards(pictures, output, ShardSettings(encode="png"))
    (pictures / "g.png").unlink()
    with pytest.raises(ShardError, match="of other pictures"):
        write_shards(pictures, output, ShardSettings())
    (output / "shards.json").unlink()
    with pytest.raises(ShardError, match="of another origin"):
        write_shards(pictures, output, ShardSettings())
    with pytest.raises(ShardError, match="expected a folder, got shards"):
        write_shards(output / "shards-000.tar", tmp_path / "other", ShardSettings())


def test_a_full_disk_leaves_whole_shards_alone(pictures: Path, tmp_path: Path, monkeypatch) -> None:
    from training.prepare import shards as packing

    written = []

    def add(tar, name, data, index, add=packing._add):
        if len(written) == 8:
            raise OSError(28, "No space left on device")
        written.append(name)
        add(tar, name, data, index)

    monkeypatch.setattr(packing, "_add", add)
    with pytest.raises(OSError, match="No space"):
        write_shards(pictures, tmp_path / "out", ShardSettings(shard_mb=0.02))
    assert not list((tmp_path / "out").glob("*.part"))
    there = sorted((tmp_path / "out").glob("*.tar"))
    assert there and all(stored_index(shard) == scan_shard(shard) for shard in there)


def test_the_command_line_says_what_it_can_do(pictures: Path, tmp_path: Path, capsys) -> None:
    assert run(["shards", str(pictures), str(tmp_path / "out"), "--jobs", "1"]) == 0
    assert "--data.train" in capsys.readouterr().out
    index_path(tmp_path / "out" / "shards-000.tar").unlink()
    assert run(["index", f"{tmp_path}/out/shards-{{000..000}}.tar"]) == 0
    assert stored_index(tmp_path / "out" / "shards-000.tar") == scan_shard(tmp_path / "out" / "shards-000.tar")
    assert run([]) == 0
    assert "captions" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Did you mean shards"):
        run(["shard"])
    with pytest.raises(ShardError, match=r"^--shard-mb: expected a size above 0, got 0\.$"):
        run(["shards", str(pictures), str(tmp_path / "out"), "--shard-mb", "0"])
