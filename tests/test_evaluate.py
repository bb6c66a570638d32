"""`python -m training evaluate`: figures against Pillow and scikit-image, going on, pairs, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restoration.jpeg import read_jpeg_and_pixels
from restoration.restorer_file import read_restorer
from tests.conftest import write_driftrec, write_regression
from tests.ddrm_graphs import write_prior
from tests.one_step_networks import write_tiny_codiff
from training.__main__ import main
from training.evaluate import runner
from training.restore.families import Loading, load_restorer
from training.restore.settings import RestoreSettings

QUALITIES = (10, 30)
FAST = ("--metrics", "psnr", "ssim", "bef", "--device", "cpu", "--examples", "2")


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *map(str, arguments)])
    return main()


def pictures() -> dict[str, np.ndarray]:
    """Three pieces of photographs, of two sizes."""
    astronaut, cat = data.astronaut(), data.chelsea()
    return {"a.png": astronaut[:48, 200:264], "b.png": cat[100:148, 100:164], "sub/c.png": cat[40:93, 200:261]}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = tmp_path / "clean"
    for name, levels in pictures().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels).save(folder / name)
    return folder


@pytest.fixture
def regression(tmp_path: Path) -> Path:
    return write_regression(tmp_path / "mine.safetensors")


def rows_of(output: Path) -> dict[tuple[str, str], dict]:
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return {(row["condition"], row["system"]): row for row in found["rows"]}


def compressed(levels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def decoded(file: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(file)))


def restored_by(path: Path, file: bytes) -> np.ndarray:
    """By the function that `python -m training restore` calls."""
    restore = load_restorer(read_restorer(path), Loading(RestoreSettings(consistency=False), torch.device("cpu")))
    jpeg, pixels = read_jpeg_and_pixels(file)
    with torch.inference_mode():
        image = restore(pixels[None], jpeg, None)
    return (image[0] * 255).round().byte().permute(1, 2, 0).numpy()


def test_figures_are_the_means_of_what_other_programs_find(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Compressed by Pillow, measured by scikit-image, the bytes counted: the JPEG's rows and the restorer's."""
    output = tmp_path / "out"
    arguments = ("--data", clean, "--restorer", regression, "--output", output, "--qualities", *QUALITIES, *FAST)
    assert evaluate(monkeypatch, *arguments) == 0
    rows, levels = rows_of(output), list(pictures().values())
    for quality in QUALITIES:
        files = [compressed(picture, quality) for picture in levels]
        outcomes = {"JPEG": [decoded(file) for file in files], "mine": [restored_by(regression, f) for f in files]}
        rate = np.mean([8 * len(file) / picture[..., 0].size for file, picture in zip(files, levels, strict=True)])
        for system, images in outcomes.items():
            row = rows[str(quality), system]
            psnr = np.mean([peak_signal_noise_ratio(*pair) for pair in zip(levels, images, strict=True)])
            ssim = np.mean([structural_similarity(*pair, channel_axis=2) for pair in zip(levels, images, strict=True)])
            assert row["means"]["psnr"] == pytest.approx(psnr, abs=1e-3)
            assert row["means"]["ssim"] == pytest.approx(ssim, abs=1e-4)
            assert row["bits_per_pixel"] == pytest.approx(rate) and row["pictures"] == 3
    shown = capsys.readouterr().out
    assert (
        f"{rows['10', 'mine']['means']['psnr']:.3f}" in shown or f"{rows['10', 'mine']['means']['psnr']:.2f}" in shown
    )
    lines = list(csv.DictReader(io.StringIO((output / "results.csv").read_text(encoding="utf-8"))))
    assert len(lines) == 2 * 2 * 3
    mean = np.mean([float(line["psnr"]) for line in lines if (line["condition"], line["system"]) == ("10", "mine")])
    assert mean == pytest.approx(rows["10", "mine"]["means"]["psnr"])


def test_the_report_needs_nothing_beside_it_and_shows_the_pictures(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="draws the report's plots: pip install matplotlib")
    output = tmp_path / "out"
    evaluate(monkeypatch, "--data", clean, "--restorer", regression, "--output", output, "--qualities", *QUALITIES,
             *FAST)  # fmt: skip
    page = (output / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=(?!["']?(?:data:|#))""", page)
    assert "http" not in re.sub(r"http://www\.w3\.org/[^\"]*", "", page)
    assert page.count("class=slider>") == 2 * 2 and page.count("<svg") == 3
    assert "(one of those improved least): PSNR " in page and "seconds per picture" in page
    assert page.count("data:image/webp;base64,") == 4 * 3


def test_repeating_the_command_measures_only_what_is_missing(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Stopped after four measurements; then gone on with; then nothing is left; then only a new quality and picture."""
    output, loads, calls = tmp_path / "out", [], []
    real_load, real_run = runner.load_system, runner.run_system
    monkeypatch.setattr(
        runner, "load_system", lambda system, loading: loads.append(system) or real_load(system, loading)
    )

    def stopping(*arguments: object, **settings: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real_run(*arguments, **settings)

    monkeypatch.setattr(runner, "run_system", stopping)
    arguments = ["--data", clean, "--restorer", regression, "--output", output, *FAST, "--qualities"]
    assert evaluate(monkeypatch, *arguments, 10) == 130
    assert "training evaluate: stopped; repeat the command to go on" in capsys.readouterr().err
    with (output / "measurements.jsonl").open("ab") as file:
        file.write(b'{"system": "cut by a ki')
    assert evaluate(monkeypatch, *arguments, 10) == 0
    assert len(calls) == 5 + 2
    loads.clear()
    assert evaluate(monkeypatch, *arguments, 10) == 0
    assert len(calls) == 7 and not loads
    Image.fromarray(pictures()["a.png"][::-1].copy()).save(clean / "d.png")
    assert evaluate(monkeypatch, *arguments, 10, 20) == 0
    assert len(calls) == 7 + 2 * (1 + 4)
    fresh = tmp_path / "fresh"
    assert evaluate(monkeypatch, *["--data", clean, "--restorer", regression, "--output", fresh, *FAST],
                    "--qualities", 10, 20) == 0  # fmt: skip
    assert [row["means"] for row in rows_of(output).values()] == [row["means"] for row in rows_of(fresh).values()]


def test_another_restorer_or_setting_or_picture_is_measured_anew(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same names: figures of other weights, of held results, or of a changed picture are not taken over."""
    output = tmp_path / "out"
    arguments = ["--data", clean, "--restorer", regression, "--output", output, "--qualities", 10, *FAST]
    evaluate(monkeypatch, *arguments)
    first = rows_of(output)["10", "mine"]["means"]["psnr"]
    evaluate(monkeypatch, *arguments, "--consistency")
    held = rows_of(output)["10", "mine"]["means"]["psnr"]
    write_regression(regression, seed=5)
    evaluate(monkeypatch, *arguments)
    other = rows_of(output)["10", "mine"]["means"]["psnr"]
    Image.fromarray(pictures()["b.png"]).resize((64, 48)).rotate(180).save(clean / "a.png")
    evaluate(monkeypatch, *arguments)
    assert len({first, held, other, rows_of(output)["10", "mine"]["means"]["psnr"]}) == 4


def test_pairs_of_folders_and_degraded_pictures_alone(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs give the very figures of compressing here; alone, only what needs no original is measured."""
    degraded = tmp_path / "degraded"
    for name, levels in pictures().items():
        target = (degraded / name).with_suffix(".jpg")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(compressed(levels, 10))
    common = ["--restorer", regression, *FAST]
    evaluate(monkeypatch, "--data", clean, "--qualities", 10, "--output", tmp_path / "one", *common)
    evaluate(monkeypatch, "--data", clean, "--degraded", degraded, "--output", tmp_path / "two", *common)
    here, pairs = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for system in ("JPEG", "mine"):
        assert pairs["as given", system]["means"] == pytest.approx(here["10", system]["means"])
    evaluate(monkeypatch, "--degraded", degraded, "--output", tmp_path / "three", *common)
    alone = rows_of(tmp_path / "three")["as given", "mine"]["means"]
    assert alone == pytest.approx({"bef": here["10", "mine"]["means"]["bef"]})


def test_compressed_twice_on_two_grids(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DriftRec's Table IV: cut by four pixels between the two; the JPEG alone needs no restorer."""
    output = tmp_path / "out"
    evaluate(monkeypatch, "--data", clean, "--protocol", "double", "--output", output, *FAST)
    rows, found = rows_of(output), []
    assert [condition for condition, _ in rows] == ["30/10", "10/30", "30", "30/30", "50/30", "30/50"]
    for levels in pictures().values():
        first = decoded(compressed(levels, 50))[4:, 4:]
        found.append(peak_signal_noise_ratio(levels[4:, 4:], decoded(compressed(first, 30))))
    assert rows["50/30", "JPEG"]["means"]["psnr"] == pytest.approx(np.mean(found), abs=1e-3)


def test_samplers_and_averages(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sampler with the evaluations that it takes; averages of more samples come closer to the original."""
    restorer, output = write_driftrec(tmp_path / "drift.safetensors"), tmp_path / "out"
    evaluate(monkeypatch, "--data", clean, "--limit", 1, "--restorer", restorer, "--steps", 2, "--output", output,
             "--protocol", "samplers", "averaging", *FAST)  # fmt: skip
    rows = rows_of(output)
    evaluations = {system.removeprefix("drift, "): row["evaluations"] for (_, system), row in rows.items()}
    assert evaluations["euler_maruyama 100"] == 100 and evaluations["euler_heun 100"] == 200
    assert evaluations["ode_2m 5"] == 5 and evaluations["rk45"] > 5 and evaluations["JPEG"] is None
    assert evaluations["4 averaged"] == 2 * 4
    psnr = [rows["10", f"drift, {count} averaged"]["means"]["psnr"] for count in (1, 4, 16)]
    assert psnr == sorted(psnr) and psnr[2] > psnr[0]


def test_pictures_that_cannot_be_read_are_named_and_left_out(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (clean / "broken.png").write_bytes((clean / "a.png").read_bytes()[:200])
    output = tmp_path / "out"
    assert evaluate(monkeypatch, "--data", clean, "--restorer", regression, "--output", output, "--qualities", 10,
                    *FAST) == 1  # fmt: skip
    assert rows_of(output)["10", "mine"]["pictures"] == 3
    assert "broken.png" in capsys.readouterr().out
    assert "broken.png" in (output / "report.html").read_text(encoding="utf-8")


def test_priors_and_one_step_restorers_run(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The families that need the file, or have networks of several kinds, against what `training restore` calls."""
    prior, codiff = write_prior(tmp_path / "prior.safetensors"), write_tiny_codiff(tmp_path / "codiff.safetensors")
    output = tmp_path / "out"
    evaluate(monkeypatch, "--data", clean, "--restorer", prior, codiff, "--steps", 2, "--samples", 1, "--qualities",
             10, "--output", output, *FAST)  # fmt: skip
    expected = [
        peak_signal_noise_ratio(levels, restored_by(codiff, compressed(levels, 10))) for levels in pictures().values()
    ]
    rows = rows_of(output)
    assert rows["10", "codiff"]["means"]["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert rows["10", "prior"]["evaluations"] == 2


def test_two_ranks_share_the_pictures_and_find_the_same(
    clean: Path, regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun each rank measures its share, the first one puts all together."""
    arguments = ["--data", clean, "--restorer", regression, "--qualities", 10, *FAST, "--output"]
    evaluate(monkeypatch, *arguments, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "training"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([*command, "evaluate", *map(str, arguments), str(tmp_path / "two")], env=environment,
                          capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert {key: row["means"] for key, row in one.items()} == {key: row["means"] for key, row in two.items()}
    shares = [sum(1 for _ in path.open()) for path in sorted((tmp_path / "two").glob("measurements*.jsonl"))]
    assert sorted(shares) == [2, 4]
