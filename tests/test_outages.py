"""What a disk does not give is waited for and told, and never taken for a broken picture; what is broken is."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from skimage import data

from training.check.facts import look_at
from training.data.pairs import IndexSampler, PairDataset, make_loader
from training.data.pictures import DECODE_ERRORS, find_images, load_image, scan_images
from training.data.reading import UnreadableError
from training.degradation import PRESETS
from training.failures import explain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        Image.fromarray(data.astronaut()[number : number + 60, 50:120]).save(root / f"picture{number}.png")
    return root


def dataset(folder, crop=32, **options):
    return PairDataset(find_images(folder), crop, PRESETS["wide"], **options)


def test_the_scan_reads_headers_alone(folder, tmp_path, monkeypatch):
    """A set of 100 GB is not read before the first step: what comes after a header is looked at in its turn."""
    cut = tmp_path / "cut.png"
    cut.write_bytes((folder / "picture0.png").read_bytes()[:2000])
    header = tmp_path / "header.png"
    header.write_bytes(cut.read_bytes()[:20])
    good, broken = scan_images([cut, header])
    assert good == [cut] and [path for path, _ in broken] == [header]
    read = []
    monkeypatch.setattr(PngImageFile, "verify", lambda self: read.append(self))
    monkeypatch.setattr(PngImageFile, "load", lambda self: read.append(self))
    assert scan_images([cut])[0] == [cut] and read == []


class Disk:
    """Gives no file of some names, for so many attempts."""

    def __init__(self, monkeypatch, number, attempts, names=""):
        self.number, self.left, self.names, self.waited = number, attempts, names, []
        self.read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: self.give(path))
        monkeypatch.setattr("time.sleep", self.waited.append)

    def give(self, path):
        if self.left > 0 and self.names in str(path):
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), str(path))
        return self.read(path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT])
def test_a_short_outage_of_the_disk_costs_no_picture(folder, monkeypatch, number):
    items, expected = dataset(folder, cache_mb=0), [dataset(folder)[index]["path"] for index in range(12)]
    disk = Disk(monkeypatch, number, 2)
    assert [items[index]["path"] for index in range(12)] == expected
    assert len(disk.waited) == 2 and 0 < sum(disk.waited) < 5 and not items._broken


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EIO, r"picture2\.png cannot be read \(Input/output error\), 4 times in a row: its disk or network"),
        (errno.ENOENT, r"picture2\.png is gone, though its folder is there\."),
        (errno.EACCES, r"picture2\.png: there is no permission to read it\."),
    ],
)
def test_a_picture_that_the_disk_does_not_give_ends_the_run_with_a_sentence(folder, monkeypatch, number, said):
    """Nothing is wrong with it: to pass it over, as broken ones are, would lose it, and in an outage the whole set."""
    Disk(monkeypatch, number, 10**6, "picture2")
    items = dataset(folder, cache_mb=0)
    with pytest.raises(UnreadableError, match=said + ".*repeat the command, which goes on where it stopped"):
        [items[index] for index in range(12)]
    assert not items._broken


def test_the_sentence_comes_through_a_worker_as_it_is(folder, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes((folder / "picture1.png").read_bytes())
    items = PairDataset([picture], 32, PRESETS["wide"])
    picture.unlink()
    with pytest.raises(UnreadableError) as caught:
        list(make_loader(items, IndexSampler(0, 4), 4, 1))
    sentence, status = explain(caught.value, "regression", trains=True)
    assert status > 0 and sentence.startswith(f"{picture} is gone") and "Traceback" not in sentence


def test_the_scan_names_what_may_not_be_read(folder, monkeypatch):
    def refuse(path, opened=Image.open):
        if path.name == "picture1.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(Image, "open", refuse)
    good, ((path, reason),) = scan_images(find_images(folder))
    assert path.name == "picture1.png" and "there is no permission to read it" in reason and len(good) == 5


def test_the_scan_does_not_take_an_outage_for_broken_pictures(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableError, match="cannot be read"):
        scan_images(find_images(folder))


def turned_picture(path, *, odd=False):
    """Levels, and a file of them to be turned; an odd one has a resolution of one byte in place of a fraction, over
    which Pillow falls when it writes the rest of the EXIF data anew."""
    levels = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = exif.tobytes()
    fraction, byte = b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01"
    assert fraction in data
    data = data.replace(fraction, byte) if odd else data
    Image.fromarray(levels).convert("RGB").save(path, "PNG", exif=data)
    return levels


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error])
def test_a_picture_whose_exif_cannot_be_read_is_used_unturned(tmp_path, monkeypatch, error):
    def fail(_):
        raise error("odd")

    levels = turned_picture(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png")[..., 0], np.rot90(levels, -1))
    monkeypatch.setattr(PngImageFile, "getexif", fail)
    assert np.array_equal(load_image(tmp_path / "a.png")[..., 0], levels)
    assert look_at(tmp_path / "a.png").reason is None


def test_exif_that_cannot_be_written_anew_does_not_matter(tmp_path):
    levels = turned_picture(tmp_path / "a.png", odd=True)
    with Image.open(tmp_path / "a.png") as picture, pytest.raises(TypeError):
        ImageOps.exif_transpose(picture)
    assert np.array_equal(load_image(tmp_path / "a.png")[..., 0], np.rot90(levels, -1))
    assert look_at(tmp_path / "a.png").reason is None


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error])
def test_whatever_decoding_raises_is_a_broken_picture_and_want_of_memory_is_not(folder, monkeypatch, error):
    path = folder / "picture1.png"

    def fail(_):
        raise error("odd")

    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(DECODE_ERRORS, match=f"{error.__name__}: .*odd"):
        load_image(path)
    assert "odd" in look_at(path).reason
    error = MemoryError
    with pytest.raises(MemoryError):
        load_image(path)
