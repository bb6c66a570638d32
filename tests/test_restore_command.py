"""`python -m training restore`: pictures of every kind by restorers of every family, resuming, and what is refused."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import jpeglib
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from restoration.diffusion.samplers import SAMPLERS
from restoration.jpeg import apply_orientation, read_jpeg, read_jpeg_and_pixels
from restoration.pipelines import restore_regression
from restoration.restorer_file import read_restorer
from restoration.restorers import build_restorer, load_weights
from tests.conftest import write_driftrec, write_regression
from tests.ddrm_graphs import write_prior
from tests.one_step_networks import write_tiny_codiff, write_tiny_sodiff
from tests.restore_folders import cut, files, levels, restore, save
from training.__main__ import main

EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.fixture(scope="module")
def restorers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random restorer of each family."""
    from tests.reduced_sd21 import write_quality, write_saipe

    folder = tmp_path_factory.mktemp("restorers")
    write_regression(folder / "regression.safetensors")
    write_driftrec(folder / "driftrec.safetensors")
    write_prior(folder / "prior.safetensors")
    write_tiny_codiff(folder / "codiff.safetensors")
    write_tiny_sodiff(folder / "sodiff.safetensors")
    write_quality(folder / "quality.safetensors")
    write_saipe(folder / "saipe.safetensors")
    return folder


@pytest.fixture
def regression(restorers: Path) -> Path:
    return restorers / "regression.safetensors"


def coefficients(data: bytes, tmp_path: Path) -> list[np.ndarray]:
    """What libjpeg reads of a JPEG."""
    path = tmp_path / "read.jpg"
    path.write_bytes(data)
    jpeg = jpeglib.read_dct(str(path))
    return [plane for plane in (jpeg.Y, jpeg.Cb, jpeg.Cr) if plane is not None]


def encoded_as(picture: Image.Image, jpeg: Path) -> bytes:
    """A picture, encoded by Pillow with the tables of a JPEG of 4:2:0."""
    with Image.open(jpeg) as like:
        tables = like.quantization
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", qtables=tables, subsampling="4:2:0")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("regression", []),
        ("driftrec", ["--steps", "2", "--sampler", "sde_2m", "--seed", "3", "--samples", "2"]),
        ("prior", ["--steps", "2", "--samples", "2"]),
        ("codiff", ["--tile", "32", "--overlap", "16"]),
        ("sodiff", ["--quality", "5"]),
    ],
)
def test_every_family_restores_a_jpeg_to_a_picture_that_the_file_could_have_come_from(
    family: str, options: list[str], restorers: Path, tmp_path: Path
) -> None:
    """Pillow encodes the result with the file's own tables to the very coefficients of the file."""
    jpeg = save(tmp_path / "in" / "a.jpg", cut(48, 40))
    assert restore(tmp_path / "in", tmp_path / "out", restorers / f"{family}.safetensors", *options) == 0
    with Image.open(tmp_path / "out" / "a.png") as restored:
        assert restored.format == "PNG" and restored.mode == "RGB" and restored.size == (48, 40)
        assert np.abs(np.asarray(restored).astype(int) - levels(jpeg)).max() > 0
        ours = coefficients(encoded_as(restored, jpeg), tmp_path)
    for found, expected in zip(ours, coefficients(jpeg.read_bytes(), tmp_path), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_pictures_are_restored_upright_by_the_function_of_the_core(regression: Path, tmp_path: Path) -> None:
    """Without the hold on the file it is the network's own answer, of a turned JPEG and of a PNG."""
    jpeg = save(tmp_path / "in" / "a.jpg", exif=EXIF)
    png = save(tmp_path / "in" / "sub" / "b.png")
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--no-consistency") == 0
    file = read_restorer(regression)
    model = build_restorer(file.metadata, file.name)
    load_weights(model, file)
    upright = ImageOps.exif_transpose(Image.open(jpeg))
    for source, result in ((upright, "a.png"), (Image.open(png), "sub/b.png")):
        image = torch.from_numpy(np.array(source)).movedim(-1, 0)[None].float() / 255
        with torch.no_grad():
            expected = restore_regression(model, image, color="mean")
        found = levels(tmp_path / "out" / result)
        np.testing.assert_array_equal(found, (expected[0] * 255).round().byte().movedim(0, -1).numpy())
    assert upright.size == (24, 40)


@pytest.mark.parametrize("family", ["regression", "driftrec", "prior", "codiff", "sodiff"])
def test_strength_0_gives_the_decoded_jpeg_back(family: str, restorers: Path, tmp_path: Path) -> None:
    jpeg = save(tmp_path / "a.jpg")
    output, restorer = tmp_path / "b.png", restorers / f"{family}.safetensors"
    assert restore(jpeg, output, restorer, "--strength", "0", "--no-consistency") == 0
    np.testing.assert_array_equal(levels(output), levels(jpeg))


@pytest.mark.parametrize(("family", "options"), [("regression", []), ("prior", ["--steps", "1"]), ("codiff", [])])
def test_strength_leads_from_the_jpeg_to_the_restoration(
    family: str, options: list[str], restorers: Path, tmp_path: Path
) -> None:
    """Half of it is the mean of both, up to rounding; the prior's JPEG is our own decode, which differs by a level."""
    jpeg, found = save(tmp_path / "a.jpg"), {}
    for strength in ("0.5", "1"):
        output, restorer = tmp_path / f"{strength}.png", restorers / f"{family}.safetensors"
        assert restore(jpeg, output, restorer, "--strength", strength, "--no-consistency", *options) == 0
        found[strength] = levels(output).astype(float)
    assert np.abs(found["1"] - levels(jpeg)).max() > (2 if family == "prior" else 8)
    assert np.abs(found["0.5"] - (found["1"] + levels(jpeg)) / 2).max() <= (1.5 if family == "prior" else 0.5)


def test_a_quality_of_ones_own_changes_what_sodiff_makes(restorers: Path, tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", cut(48, 48))
    for name, options in {"seen": [], "low": ["--quality", "5"], "again": ["--quality", "5"]}.items():
        output = tmp_path / f"{name}.png"
        assert restore(tmp_path / "a.jpg", output, restorers / "sodiff.safetensors", "--no-consistency", *options) == 0
    low = levels(tmp_path / "low.png")
    assert not np.array_equal(levels(tmp_path / "seen.png"), low)
    np.testing.assert_array_equal(levels(tmp_path / "again.png"), low)


def test_gray_stays_gray_and_agrees_with_its_file(regression: Path, tmp_path: Path) -> None:
    jpeg = save(tmp_path / "in" / "a.jpg", cut().convert("L"))
    save(tmp_path / "in" / "b.png", cut().convert("L"))
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 0
    with Image.open(tmp_path / "out" / "a.png") as restored:
        assert restored.mode == "L" and not np.array_equal(np.asarray(restored), levels(jpeg))
        buffer = io.BytesIO()
        with Image.open(jpeg) as like:
            restored.save(buffer, "JPEG", qtables=like.quantization)
    (ours,), (theirs,) = (coefficients(data, tmp_path) for data in (buffer.getvalue(), jpeg.read_bytes()))
    np.testing.assert_array_equal(ours, theirs)
    assert Image.open(tmp_path / "out" / "b.png").mode == "L"


def test_a_second_run_does_what_is_missing_and_overwrite_does_all(regression: Path, tmp_path: Path, capsys) -> None:
    for name in ("a.jpg", "b.jpg", "deep/er/c.jpg"):
        save(tmp_path / "in" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"mine")
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 0
    assert files(tmp_path / "out") == ["a.png", "b.png", "deep/er/c.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"mine"
    said = capsys.readouterr().out
    assert "3 pictures, 1 of them restored already" in said and "2 restored, 1 there already, 0 failed" in said
    assert "[3/3] deep/er/c.jpg: 40x24, 4:2:0, quality 20; " in said and "b.jpg" not in said
    assert restore(tmp_path / "in", tmp_path / "out", regression, "--overwrite") == 0
    assert levels(tmp_path / "out" / "b.png").shape == (24, 40, 3)


def test_what_a_killed_run_left_behind_is_replaced(regression: Path, tmp_path: Path, monkeypatch) -> None:
    """The file that was being written stays as a `.part`, under no picture's name; the next run removes it."""
    import training.restore.saving

    def killed(*_):
        raise KeyboardInterrupt

    save(tmp_path / "in" / "a.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(training.restore.saving.os, "replace", killed)
        patch.setattr(training.restore.saving.Path, "unlink", lambda *_, **__: None)  # SIGKILL cleans nothing up
        assert restore(tmp_path / "in", tmp_path / "out", regression) == 130
    (left,) = files(tmp_path / "out")
    assert left.startswith(".") and left.endswith(".part")
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 0
    assert files(tmp_path / "out") == ["a.png"]


def test_results_inside_of_the_folder_are_not_restored_again(regression: Path, tmp_path: Path, capsys) -> None:
    save(tmp_path / "in" / "a.jpg")
    output = tmp_path / "in" / "restored"
    for _ in range(2):
        assert restore(tmp_path / "in", output, regression) == 0
    assert files(tmp_path / "in") == ["a.jpg", "restored/a.png"]
    assert "0 restored, 1 there already, 0 failed" in capsys.readouterr().out


def test_broken_files_are_named_others_left_out_and_the_rest_goes_on(
    regression: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Through the program itself: exit status 1, and the reason on the error stream."""
    folder, whole = tmp_path / "in", save(tmp_path / "in" / "z.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpeg").write_bytes(b"")
    (folder / "jpeg in disguise.png").write_bytes(whole)
    (folder / "no ending").write_bytes(whole)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._z.jpg").write_bytes(b"\x00\x05\x16\x07 what macOS leaves behind")
    arguments = [str(folder), str(tmp_path / "out"), "--restorer", str(regression), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training", "restore", *arguments])
    assert main() == 1
    said = capsys.readouterr()
    assert "3 restored, 0 there already, 2 failed, 2 other files left out" in said.out
    assert files(tmp_path / "out") == ["jpeg in disguise.png", "no ending.png", "z.png"]
    assert "training restore: cut.jpg was not restored: it is cut short or damaged" in said.err
    assert "empty.jpeg was not restored: it is empty" in said.err and "notes" not in said.out + said.err


def test_a_prior_restores_jpegs_and_names_the_others(restorers: Path, tmp_path: Path, capsys) -> None:
    save(tmp_path / "in" / "a.jpg")
    save(tmp_path / "in" / "b.png")
    options = ["--steps", "1", "--samples", "1"]
    assert restore(tmp_path / "in", tmp_path / "out", restorers / "prior.safetensors", *options) == 1
    assert files(tmp_path / "out") == ["a.png"] and "b.png was not restored: it is no JPEG" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("quality", [], "tells the quality of pictures and restores none"),
        ("saipe", [], "first stage of SODiff alone"),
        ("regression", ["--steps", "3", "--seed", "1"], "no --seed, --steps"),
        ("codiff", ["--quality", "10"], "no --quality"),
        ("codiff", ["--dtype", "bf16"], "Leave --dtype out"),
        ("driftrec", ["--class-label", "1"], "no --class-label"),
        ("regression", ["--base", "somewhere"], "needs no base model"),
        ("regression", ["--jpeg-quality", "90"], "which is lossless"),
        ("regression", ["--format", "jpeg", "--jpeg-quality", "0"], "from 1 to 100, got 0"),
        ("regression", ["--strength", "1.5"], "from 0 to 1, got 1.5"),
        ("driftrec", ["--steps", "0"], "--steps of at least 1, got 0"),
        ("sodiff", ["--quality", "101"], "from 0 to 100, got 101"),
        ("regression", ["--jobs", "0"], "--jobs of at least 1"),
        pytest.param(
            "regression", ["--device", "cuda"], "torch finds none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_a_sentence(
    family: str, options: list[str], sentence: str, restorers: Path, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.jpg")
    with pytest.raises(ValueError, match=sentence):
        restore(tmp_path / "in", tmp_path / "out", restorers / f"{family}.safetensors", *options)
    assert not (tmp_path / "out").exists()


def test_user_errors_end_with_status_2(regression: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    arguments = [str(tmp_path / "absent"), str(tmp_path / "out"), "--restorer", str(regression)]
    monkeypatch.setattr(sys, "argv", ["training", "restore", *arguments])
    assert main() == 2
    assert "training restore: there is no" in capsys.readouterr().err


def test_a_full_disk_ends_the_run(regression: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Each further picture would fail as well, after the time that its restoration takes."""
    import errno

    import training.restore.workers as workers

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "in" / name)
    monkeypatch.setattr(workers, "write_whole", full)
    assert restore(tmp_path / "in", tmp_path / "out", regression) == 1
    said = capsys.readouterr()
    assert "takes no more (No space left on device): make room" in said.err and "b.jpg" not in said.out


def test_the_list_of_samplers_is_that_of_the_core() -> None:
    from typing import get_args

    from training.restore.settings import Sampler

    assert list(get_args(Sampler)) == list(SAMPLERS)


def test_the_orientations_of_the_test_are_those_of_the_core(tmp_path: Path) -> None:
    """What the tests above take from Pillow is what the core does with the same file."""
    jpeg = save(tmp_path / "a.jpg", exif=EXIF)
    data, pixels = read_jpeg_and_pixels(jpeg)
    assert data.orientation == read_jpeg(jpeg).orientation == 6
    upright = (apply_orientation(pixels, 6) * 255).round().byte().movedim(0, -1).numpy()
    np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(Image.open(jpeg))))
