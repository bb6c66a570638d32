"""Figures and pictures of an evaluation that is repeated in the same folder are of what is asked for now."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import shared_path
from skimage import data

from tests.conftest import write_driftrec, write_regression
from training.__main__ import main
from training.evaluate import command, runner
from training.evaluate.digests import base_digest
from training.evaluate.distributions import fid, kid
from training.evaluate.examples import as_webp, shown_conditions
from training.evaluate.metrics import LABELS, Metric, Metrics, SetMetric
from training.evaluate.store import Key, Measurement, Store
from training.evaluate.systems import RestorerOnDisk, System, read_restorers

PLACES = {"a": (0, 200), "b": (100, 100), "c": (200, 100), "d": (300, 300)}
Evaluate = Callable[..., int]


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluate:
    """The command, which writes into `out`."""

    def run(*arguments: object) -> int:
        given = [*map(str, arguments), "--output", str(tmp_path / "out"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["training", "evaluate", *given])
        return main()

    return run


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "clean", "abcd")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return write_regression(tmp_path / "mine.safetensors")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each picture that was restored, the JPEG's own ones too."""
    found, real = [], runner.run_system
    monkeypatch.setattr(runner, "run_system", lambda *given, **more: found.append(given) or real(*given, **more))
    return found


def write_pictures(folder: Path, names: str, shift: int = 0) -> Path:
    folder.mkdir()
    for name in names:
        top, left = PLACES[name]
        Image.fromarray(data.astronaut()[top + shift : top + shift + 64, left : left + 64]).save(folder / f"{name}.png")
    return folder


def results_in(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


def mean_of(tmp_path: Path, metric: str, system: str = "mine") -> float:
    return next(row["means"][metric] for row in results_in(tmp_path)["rows"] if row["system"] == system)


def page_of(tmp_path: Path) -> str:
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def images_in(tmp_path: Path) -> list[str]:
    return re.findall(r'src="(data:image/webp[^"]*)"', page_of(tmp_path))


def shown_gains(tmp_path: Path, metric: str) -> dict[str, float]:
    """Picture -> difference to the JPEG, of the captions, each of which names this metric."""
    captions = [unescape(text) for text in re.findall("<figcaption>(.*?)</figcaption>", page_of(tmp_path))]
    parts = [re.fullmatch(rf"(\S+).*: {LABELS[metric]} ([\d.]+).* (higher|lower) than.*", text) for text in captions]
    assert all(parts) and parts, captions
    return {part[1]: float(part[2]) * (1 if part[3] == "higher" else -1) for part in parts if part}


def measured_gains(tmp_path: Path, metric: str) -> dict[str, float]:
    """The same, of the CSV."""
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "results.csv").read_text(encoding="utf-8"))))
    values = {(line["system"], line["picture"]): float(line[metric]) for line in lines}
    return {name: values["mine", name] - values["JPEG", name] for _, name in values}


def test_pictures_and_captions_are_of_this_run(evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path) -> None:
    """In one folder: other pictures, another metric, another number, other levels under the same name, a new metric."""
    other = write_pictures(tmp_path / "other", "bc", shift=20)
    fixed = ("--restorer", mine, "--qualities", 10)
    evaluate("--data", clean, *fixed, "--metrics", "psnr", "ssim", "--examples", 2)
    first = images_in(tmp_path)
    for asked, metrics, by, count in (
        ((clean,), ("psnr", "ssim"), "ssim", 3),
        ((other,), ("psnr", "ssim"), "psnr", 2),
        ((clean,), ("psnr", "bef"), "bef", 4),
    ):
        assert evaluate("--data", *asked, *fixed, "--metrics", *metrics, "--worst-by", by, "--examples", count) == 0
        shown, measured = shown_gains(tmp_path, by), measured_gains(tmp_path, by)
        assert len(shown) == count and set(shown) <= set(measured)
        assert shown == pytest.approx({name: measured[name] for name in shown}, abs=6e-3)
    evaluate("--data", clean, *fixed, "--metrics", "psnr", "ssim", "--examples", 2)
    assert images_in(tmp_path) == first and len(first) == 2 * 3
    write_regression(mine, seed=7)
    evaluate("--data", clean, *fixed, "--metrics", "psnr", "ssim", "--examples", 2)
    assert images_in(tmp_path)[1] != first[1]


def test_pictures_that_nobody_kept_are_restored_once_more(
    evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path, runs: list[object]
) -> None:
    arguments = ("--data", clean, "--restorer", mine, "--qualities", 10, "--metrics", "psnr", "--examples", 2)
    evaluate(*arguments)
    before = images_in(tmp_path)
    shutil.rmtree(tmp_path / "out" / "crops")
    runs.clear()
    assert evaluate(*arguments) == 0
    assert images_in(tmp_path) == before and len(runs) == 2


def test_figures_of_other_weights_are_not_taken_over(
    evaluate: Evaluate, clean: Path, tmp_path: Path, runs: list[object]
) -> None:
    """LPIPS with heads twice as large is twice as large; back with the first file nothing is measured."""
    own = shared_path("weights", "lpips_squeeze", "lpips_squeeze_f32.npz")
    weights = dict(np.load(own))
    np.savez(tmp_path / "twice.npz", **{name: 2 * value if "lin" in name else value for name, value in weights.items()})
    fixed = ("--data", clean, "--limit", 1, "--qualities", 10, "--metrics", "lpips_squeeze", "--weights.lpips")
    found, variants = [], []
    for file in (own, tmp_path / "twice.npz", own):
        evaluate(*fixed, file)
        found.append(mean_of(tmp_path, "lpips_squeeze", "JPEG"))
        variants.append(results_in(tmp_path)["metrics"][0]["variant"])
    assert found[1] == pytest.approx(2 * found[0], rel=1e-4) and found[2] == found[0] and len(runs) == 2
    assert variants[0] == variants[2] != variants[1] and re.search(r", weights [0-9a-f]{8}$", variants[0])


def test_another_version_or_device_measures_anew_and_old_lines_are_passed_over(
    evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path, runs: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--data", clean, "--restorer", mine, "--qualities", 10, "--metrics", "psnr")
    file = tmp_path / "out" / "measurements.jsonl"
    file.parent.mkdir()
    old = {"system": "JPEG", "condition": "10", "subsampling": "4:2:0", "picture": "a.png", "fingerprint": "x",
           "values": {"psnr": 1.0}, "seconds": 0.0, "bits_per_pixel": 1.0, "evaluations": None}  # fmt: skip
    file.write_bytes(json.dumps(old).encode() + b'\n[1]\n\xff\n{"version": 7}\n')
    (file.parent / "metrics.json").write_text('{"psnr": "another variant"}', encoding="utf-8")
    assert evaluate(*arguments) == 0 and len(runs) == 8
    assert evaluate(*arguments) == 0 and len(runs) == 8
    assert json.loads(file.read_bytes().splitlines()[-1])["version"].endswith(", cpu")
    monkeypatch.setattr(runner, "pack_version", lambda: "99")
    assert evaluate(*arguments) == 0 and len(runs) == 16


def test_a_base_counts_by_its_files_and_only_where_it_is_used(tmp_path: Path, mine: Path) -> None:
    restorer = read_restorers([mine])[0]
    system = System("mine", restorer)
    assert system.identity("fp32", None) == system.identity("fp32", "base")
    metadata = type(restorer.metadata)(**{**vars(restorer.metadata), "base": "sd21"})
    adapter = System("mine", RestorerOnDisk(mine, "mine", metadata, restorer.digest))
    (tmp_path / "base" / "unet").mkdir(parents=True)
    digests = [base_digest(str(tmp_path / "base"))]
    for size in (3, 4):
        (tmp_path / "base" / "unet" / "model.safetensors").write_bytes(bytes(size))
        digests.append(base_digest(str(tmp_path / "base")))
    assert len({adapter.identity("fp32", digest) for digest in digests}) == 3
    assert base_digest("someone/sd21") == "someone/sd21" and base_digest(None) is None


def fake(name: str, calls: list[str] | None = None) -> Metric:
    def measure(picture: torch.Tensor, clean: torch.Tensor | None) -> float:
        if calls is not None:
            calls.append(name)
        return float(picture.mean())

    return Metric(name, LABELS[name], "fake", "higher", 3, False, measure)


def sets(seen: list[int]) -> tuple[SetMetric, ...]:
    """FID and KID of four features, which are cheap."""

    def features(picture: torch.Tensor) -> np.ndarray:
        seen.append(1)
        return picture.double()[0, :, ::8, ::8].mean(dim=-1).flatten()[:4].numpy()

    return tuple(
        SetMetric(name, LABELS[name], "fake", "lower", 2, features, distance, "fake")
        for name, distance in (("fid", fid), ("kid", kid))
    )


def test_figures_of_several_processes_add_up(tmp_path: Path) -> None:
    """One process measured LPIPS, another one PSNR alone, later: the files are read one after the other."""
    key = Key("s", "10", "4:2:0", "a.png", "f", "1, cpu")
    both = Metrics((fake("psnr"), fake("lpips_alex")), (), ())
    Store(tmp_path, both, 0).add(Measurement(key, {"psnr": 1.0, "lpips_alex": 0.5}))
    Store(tmp_path, Metrics((fake("psnr"),), (), ()), 1).add(Measurement(key, {"psnr": 1.0}))
    found = Store(tmp_path, both, 0).get(key)
    assert found is not None and found.values == {"psnr": 1.0, "lpips_alex": 0.5}


def test_only_what_is_missing_is_measured_and_only_what_is_asked_for_reported(
    evaluate: Evaluate, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for names in (("psnr",), ("psnr", "ssim"), ("ssim",)):
        metrics = Metrics(tuple(fake(name, calls) for name in names), (), ())
        monkeypatch.setattr(command, "find_metrics", lambda *_, metrics=metrics, **__: metrics)
        evaluate("--data", clean, "--qualities", 10)
        assert set(results_in(tmp_path)["rows"][0]["means"]) == set(names)
    assert calls == ["psnr"] * 4 + ["ssim"] * 4


def test_features_that_a_kill_left_out_are_seen_again_and_those_of_one_network_kept_once(
    evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(command, "find_metrics", lambda *_, **__: Metrics((fake("psnr"),), sets(seen), ()))
    odd = clean / os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(clean / "a.png", odd)
    except OSError:
        pytest.skip("this file system knows no such names")
    arguments = ("--data", clean, "--restorer", mine, "--qualities", 10)
    assert evaluate(*arguments) == 0
    before, files = results_in(tmp_path)["rows"], list((tmp_path / "out" / "features").iterdir())
    assert len(files) == len(seen) == 3 * 5 and {"fid", "kid"} < set(before[0]["means"])
    next(path for path in files if path.stem.endswith("-clean")).unlink()
    assert evaluate(*arguments) == 0 and len(seen) == 3 * 5 + 1
    assert [row["means"] for row in results_in(tmp_path)["rows"]] == [row["means"] for row in before]
    assert evaluate(*arguments, "--limit", 1) == 0
    missing = {gone["label"]: gone["reason"] for gone in results_in(tmp_path)["not_measured"]}
    assert set(missing) == {"FID", "KID"} and "2 pictures" in missing["FID"]


def test_metrics_without_a_figure_are_named_with_the_reason(evaluate: Evaluate, clean: Path, tmp_path: Path) -> None:
    Image.fromarray(data.astronaut()[:6, :40]).save(clean / "small.png")
    arguments = ("--data", clean, "--qualities", 10, "--metrics", "psnr", "ssim")
    for _ in range(2):  # the second time of what was stored
        evaluate(*arguments)
        (missing,) = results_in(tmp_path)["not_measured"]
        assert missing["label"] == "SSIM" and "none for 1 of 5 results, e.g. small.png: " in missing["reason"]
        assert "7" in missing["reason"]
    evaluate("--degraded", clean, "--metrics", "psnr", "bef")
    missing = results_in(tmp_path)["not_measured"]
    assert {"label": "PSNR", "reason": "it compares with clean pictures: give --data"} in missing


def test_evaluations_do_not_depend_on_tiles(evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path) -> None:
    drift = write_driftrec(tmp_path / "drift.safetensors")
    evaluate("--data", clean, "--limit", 1, "--restorer", drift, mine, "--steps", 3, "--samples", 2, "--tile", 32,
             "--qualities", 10, "--metrics", "psnr")  # fmt: skip
    found = {row["system"]: row["evaluations"] for row in results_in(tmp_path)["rows"]}
    assert found == {"JPEG": None, "drift": 3 * 2, "mine": 1}


def test_restorers_of_one_name_are_told_apart_also_from_the_jpeg(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("p/x/m.safetensors", "q/x/m.safetensors", "q/JPEG.safetensors", "q/n.st")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_regression(path)
    assert [restorer.label for restorer in read_restorers([*paths, paths[0]])] == ["p/x/m", "q/x/m", "q/JPEG", "n"]
    twin = write_regression(tmp_path / "q" / "n.safetensors", seed=3)
    labels = [restorer.label for restorer in read_restorers([paths[3], twin])]
    assert len(set(labels)) == 2 and all(re.fullmatch("n [0-9a-f]{8}", label) for label in labels)


def test_pictures_of_the_report_are_whole_and_their_number_bounded(
    evaluate: Evaluate, clean: Path, mine: Path, tmp_path: Path
) -> None:
    """No rounding of WebP's lies over what is compared; conditions without pictures are named."""
    image = torch.from_numpy(data.astronaut()[:400, :300].copy()).permute(2, 0, 1)[None] / 255
    decoded = np.array(Image.open(io.BytesIO(as_webp(image))))
    assert np.array_equal(decoded, data.astronaut()[40:360, :300])
    labels = [str(number) for number in range(11)]
    assert shown_conditions(labels, 1, 4) == ["0", "2", "4", "6", "8", "10"]
    assert shown_conditions(labels, 8, 4) == ["0", "10"] and shown_conditions(labels[:2], 100, 4) == ["0"]
    assert shown_conditions([], 1, 4) == []
    evaluate("--data", clean, "--limit", 1, "--restorer", mine, "--metrics", "psnr", "--qualities", *range(10, 90, 10))
    page = page_of(tmp_path)
    assert page.count("<details") == 6 and "There are none for: 30, 60." in page
