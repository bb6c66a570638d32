"""Pictures in tar files: found, read at their places, shuffled in windows; items stay functions of seed and index."""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training.data import shards
from training.data.captions import read_texts
from training.data.pairs import IndexSampler, PairDataset, epoch_order, make_loader
from training.data.pictures import find_images, load_image, scan_images
from training.data.reading import UnreadableError
from training.data.shards import ShardError, expand_shards, index_path, read_beside, scan_shard, shard_of
from training.degradation import PRESETS
from training.prepare.indexes import write_indexes


def picture_bytes(number: int, kind: str = "PNG") -> bytes:
    """A small picture that can be told from all others by its corner."""
    pixels = np.random.default_rng(number).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """Indexes are read anew, as in a new process."""
    monkeypatch.setattr(shards, "_INDEXES", {})


@pytest.fixture
def folder(tmp_path):
    """Twelve shards of five pictures each."""
    for shard in range(12):
        members = {f"{shard:02d}{number}.png": picture_bytes(5 * shard + number) for number in range(5)}
        write_tar(tmp_path / f"s-{shard:03d}.tar", members)
    return tmp_path


def dataset(source, **options):
    return PairDataset(find_images(source), 16, PRESETS["paper"], **options)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash to compare with")
@pytest.mark.parametrize(
    "pattern", ["a-{000..012}.tar", "{b,c}-{8..11}.tar", "{3..1}.tar", "{08..10}.tar", "x{p,q}{1..2}.tar", "plain.tar"]
)
def test_braces_expand_as_in_bash(pattern, tmp_path, monkeypatch):
    said = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True).stdout.split()
    monkeypatch.chdir(tmp_path)
    for name in said:
        Path(name).touch()
    assert [str(path) for path in expand_shards(pattern)] == said


def test_several_patterns_wildcards_and_folders(folder):
    several = expand_shards(f"{folder}/s-{{010..011}}.tar::{folder}/s-000.tar")
    assert [path.name for path in several] == ["s-010.tar", "s-011.tar", "s-000.tar"]
    assert expand_shards(f"{folder}/s-*.tar") == sorted(folder.glob("*.tar"))
    with pytest.raises(FileNotFoundError, match=r"holds 12 shard\(s\): give --data\.train '.*/\*\.tar'$"):
        find_images(folder)


def test_what_cannot_be_read_is_refused_with_what_to_do(folder):
    for source in ("https://somewhere/s-{000..003}.tar", "pipe:cat s.tar", "s3://bucket/s.tar"):
        with pytest.raises(ShardError, match="mount their store"):
            find_images(source)
        with pytest.raises(ShardError, match="mount their store"):
            find_images(Path(source))  # as options give it: one of the slashes is gone
    with pytest.raises(ShardError, match=r"Unpack it to \.tar"):
        find_images(f"{folder}/s.tar.gz")
    with pytest.raises(ShardError, match=r"expected \{000"):
        find_images(f"{folder}/s-{{000-011}}.tar")
    with pytest.raises(FileNotFoundError, match=r"s-012\.tar \(8 of 20 shards are missing\)"):
        find_images(f"{folder}/s-{{000..019}}.tar")
    with pytest.raises(FileNotFoundError, match="no file has a name like"):
        find_images(f"{folder}/t-*.tar")
    write_tar(folder / "text.tar", {"a.txt": b"x"})
    with pytest.raises(FileNotFoundError, match="no picture found in the 1 shards"):
        find_images(folder / "text.tar")


def test_members_are_the_pictures_that_were_packed(folder):
    paths = find_images(f"{folder}/s-{{000..011}}.tar")
    assert len(paths) == 60 and scan_images(paths) == (paths, [])
    assert shard_of(paths[7]) == str(folder / "s-001.tar") and shard_of(folder / "x.png") is None
    for number in (0, 7, 59):
        expected = np.array(Image.open(io.BytesIO(picture_bytes(number))))
        assert np.array_equal(load_image(paths[number]), expected)
    assert str(paths[7]) == str(folder / "s-001.tar" / "012.png")


def test_hidden_members_other_files_and_ways_out_of_the_shard_are_left_out(tmp_path):
    data = picture_bytes(0)
    (tmp_path / "out.png").write_bytes(data)
    names = ["a/deep.png", "./here.PNG", "._mac.png", "b.json", str(tmp_path / "out.png"), "../out.png", "c.jpeg"]
    path = write_tar(tmp_path / "odd.tar", dict.fromkeys(names, data))
    assert [str(found.relative_to(path)) for found in find_images(path)] == ["a/deep.png", "here.PNG", "c.jpeg"]


def test_the_index_in_the_file_beside_is_used_while_it_belongs_to_the_shard(folder, caplog):
    write_indexes(f"{folder}/s-*.tar")
    shard = folder / "s-003.tar"
    stored = json.loads(index_path(shard).read_text())
    assert {name: (offset, size) for name, offset, size in stored["members"]} == scan_shard(shard)
    raw = shard.read_bytes()
    for name, offset, size in stored["members"]:
        with tarfile.open(shard) as tar:
            assert raw[offset : offset + size] == tar.extractfile(name).read()
    stored["members"] = stored["members"][:2]
    index_path(shard).write_text(json.dumps(stored))
    assert len(find_images(shard)) == 2, "it was read, not the shard"
    shards._INDEXES.clear()
    shard.write_bytes(raw + bytes(10240))
    with caplog.at_level(logging.WARNING):
        assert len(find_images(shard)) == 5
    assert "belongs to another file" in caplog.text


def test_a_cut_shard_gives_what_comes_before_the_cut(folder, caplog):
    shard = folder / "s-000.tar"
    places = list(scan_shard(shard).values())
    shard.write_bytes(shard.read_bytes()[: places[3][0] + 100])
    with caplog.at_level(logging.WARNING):
        assert len(find_images(shard)) == 3
    assert "s-000.tar" in caplog.text
    for path in find_images(shard):
        load_image(path)


def test_broken_members_are_named_once_and_replaced(tmp_path, caplog):
    good = {f"{number}.png": picture_bytes(number) for number in range(4)}
    shard = write_tar(tmp_path / "a.tar", {"bad.png": b"no picture", **good})
    first, second = dataset(shard), dataset(shard)
    with caplog.at_level(logging.WARNING):
        seen = [first[index]["path"] for index in range(20)]
    assert str(shard / "bad.png") not in seen and len(caplog.records) == 1 and "bad.png" in caplog.text
    assert [second[index]["path"] for index in reversed(range(20))] == seen[::-1]


def test_a_shard_that_goes_away_ends_the_run_with_a_sentence(folder, monkeypatch):
    """Passing over its pictures would lose them for the run, and give every process another order."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    items = dataset(f"{folder}/s-{{000..001}}.tar")
    (folder / "s-001.tar").unlink()
    with pytest.raises(UnreadableError, match=r"s-001\.tar is gone, though its folder is there\. .*repeat the command"):
        [items[index] for index in range(20)]


def test_a_shard_is_opened_anew_after_an_outage(folder, monkeypatch):
    """What was kept open is of no use when a network disk comes back, and no picture counts as broken for it."""
    files = shards._OpenFiles(3)
    monkeypatch.setattr(shards, "_FILES", files)
    items = dataset(f"{folder}/s-{{000..001}}.tar", cache_mb=0)
    expected = [items[index]["path"] for index in range(10)]
    kept = {name: stale(file) for name, file in files._files.items()}
    files._files.update(kept)
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert [items[index]["path"] for index in range(10)] == expected
    assert len(waited) == len(kept) == 2 and not items._broken


def stale(file):
    """A file whose server has forgotten it."""

    class Stale(io.BytesIO):
        def seek(self, *_):
            raise OSError(errno.ESTALE, "Stale file handle")

    file.close()
    return Stale()


def test_an_epoch_shows_each_picture_once_and_reads_few_shards_at_a_time(folder):
    items = dataset(f"{folder}/s-*.tar", shuffle_shards=4)
    epochs = [[items.picture_of(60 * epoch + step)[0] for step in range(60)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(items.paths)
        windows = [{shard_of(path) for path in epoch[start : start + 20]} for start in (0, 20, 40)]
        assert [len(window) for window in windows] == [4, 4, 4]
        changes = sum(shard_of(a) != shard_of(b) for a, b in itertools.pairwise(epoch))
        assert changes > 30, "within a window, shards are mixed"
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({frozenset(map(shard_of, epoch[:20])) for epoch in epochs}) > 1, "other shards meet in other epochs"


def test_with_all_shards_together_every_picture_is_as_likely_at_every_place():
    shard = np.repeat(np.arange(4), [1, 5, 2, 4])
    orders = np.array([epoch_order(12, shard, 4, np.random.default_rng(seed)) for seed in range(4000)])
    counts = np.array([np.bincount(column, minlength=12) for column in orders.T])
    assert abs(counts - 4000 / 12).max() < 5 * (4000 / 12) ** 0.5
    assert np.array_equal(epoch_order(12, None, 4, np.random.default_rng(3)), np.random.default_rng(3).permutation(12))


def test_items_do_not_depend_on_workers_resuming_or_the_order_of_asking(folder):
    source = f"{folder}/s-{{000..011}}.tar"
    alone = list(make_loader(dataset(source), IndexSampler(40, 72), 8))
    for workers in (1, 2):
        several = list(make_loader(dataset(source), IndexSampler(40, 72), 8, workers))
        for one, other in zip(alone, several, strict=True):
            assert one["path"] == other["path"] and torch.equal(one["degraded"], other["degraded"])
    items = dataset(source)
    for index in (71, 40, 55):
        batch, place = divmod(index - 40, 8)
        assert torch.equal(items[index]["degraded"], alone[batch]["degraded"][place])


def test_a_spawned_process_reads_the_same(folder):
    items = dataset(f"{folder}/s-*.tar")
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.map(items.__getitem__, [9])[0]
    assert torch.equal(other["degraded"], items[9]["degraded"])


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    files = shards._OpenFiles(3)
    monkeypatch.setattr(shards, "_FILES", files)
    for shard in range(6):
        write_tar(tmp_path / f"{shard}.tar", {"a.png": picture_bytes(shard)})
    opened = []
    for path in find_images(f"{tmp_path}/*.tar"):
        load_image(path)
        opened += [file for file in files._files.values() if file not in opened]
        assert len(files._files) <= 3
    assert [file.closed for file in opened] == [True] * 3 + [False] * 3


def test_captions_in_shards_lie_beside_their_pictures(tmp_path):
    members = {"a.png": picture_bytes(0), "a.txt": b"A red  hat.\n", "b.png": picture_bytes(1), "b.txt": b" "}
    shard = write_tar(tmp_path / "a.tar", members)
    assert read_texts(find_images(shard)) == {shard / "a.png": "A red hat."}
    assert read_beside(shard / "b.png", ".json") is None


def test_a_training_learns_from_shards(folder, tmp_path):
    from training.command_line.configure import parse
    from training.loop.session import Session

    arguments = ["--data.train", f"{folder}/s-{{000..011}}.tar", "--data.crop", "16", "--data.workers", "0"]
    arguments += ["--run.output", str(tmp_path / "run"), "--run.images", "8", "--run.batch", "4"]
    arguments += ["--network.width", "8", "--network.channel-multipliers", "1", "2", "--validation.crop", "16"]
    arguments += ["--validation.images", "1", "--validation.qualities", "10"]
    assert Session("regression", parse("regression", ["--preset", "starter", *arguments])[1]).train()
    assert (tmp_path / "run" / "regression.safetensors").exists()
