"""Which pictures `python -m training evaluate` takes, which are LIVE1's, and that their JPEGs are those of papers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import shared_path
from skimage import data

from tests.conftest import write_regression
from training.__main__ import main
from training.evaluate.metrics import MetricFiles, find_metrics
from training.evaluate.options import EvaluateOptions
from training.evaluate.pictures import Condition, Source, compressed, find_sources, fingerprint, read_clean
from training.evaluate.protocols import conditions_of
from training.evaluate.published import LIVE1, is_live1, published_rows

FAST = ("--metrics", "psnr", "--qualities", "10", "--device", "cpu")


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["training", "evaluate", *map(str, arguments)])
    return main()


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """A folder of two pictures, one of them in a folder of its own."""
    folder = tmp_path / "clean"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(data.astronaut()[:48, 200:264]).save(folder / "a.png")
    Image.fromarray(data.chelsea()[100:148, 100:164]).save(folder / "sub" / "b.png")
    return folder


def names(sources: list[Source]) -> list[str]:
    return [source.name for source in sources]


def test_results_inside_of_the_pictures_are_not_measured(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default --output is such a folder where the command runs among the pictures; it holds examples."""
    restorer = write_regression(tmp_path / "mine.safetensors")
    monkeypatch.chdir(clean)
    for _ in range(2):
        assert evaluate(monkeypatch, "--data", ".", "--restorer", restorer, *FAST) == 0
        found = json.loads(Path("evaluation/results.json").read_text(encoding="utf-8"))
        assert found["pictures"] == 2
    assert list(Path("evaluation").rglob("*.webp")), "examples are what would have been measured"


def test_folders_inside_of_each_other_are_told_apart(clean: Path) -> None:
    """Whatever they are called and linked to: each picture belongs to the innermost of the given folders."""
    for folder in ("jpegs", "results/examples"):
        (clean / folder).mkdir(parents=True)
        shutil.copy(clean / "a.png", clean / folder / "a.png")
    (clean.parent / "link").symlink_to(clean / "results", target_is_directory=True)
    assert names(find_sources(clean, None)) == ["a.png", "jpegs/a.png", "results/examples/a.png", "sub/b.png"]
    assert names(find_sources(clean, None, output=clean.parent / "link")) == ["a.png", "jpegs/a.png", "sub/b.png"]
    pairs = find_sources(clean, clean / "jpegs", output=clean / "results")
    assert [(source.clean, source.degraded) for source in pairs] == [(clean / "a.png", clean / "jpegs" / "a.png")]
    assert names(find_sources(clean, None, output=clean.parent)) == names(find_sources(clean, None))


def test_what_is_no_folder_of_pictures_is_refused_with_what_to_give(clean: Path, tmp_path: Path) -> None:
    """Not with what a training needs; members of shards cannot be read here."""
    (tmp_path / "x.tar").touch()
    (tmp_path / "empty" / "results").mkdir(parents=True)
    shutil.copy(clean / "a.png", tmp_path / "empty" / "results")
    for data_folder, degraded, words in (
        (tmp_path / "none", None, r"^--data: there is no folder .*none\. Give a folder with pictures\.$"),
        (tmp_path / "x.tar", None, r"^--data: .*x\.tar is no folder\. Give .*, and unpack shards first\.$"),
        (clean / "a.png", None, r"^--data: .*a\.png is no folder\. Give a folder with pictures\.$"),
        (None, tmp_path / "none", r"^--degraded: there is no folder .*none\."),
        (clean, tmp_path / "x.tar", r"^--degraded: .*x\.tar is no folder\."),
        (tmp_path / "empty", None, r"^--data: no picture in .*empty: expected files ending in .*results left out\.$"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            find_sources(data_folder, degraded, output=tmp_path / "empty" / "results")
    with pytest.raises(ValueError, match=r"^expected --output to be another folder than --data, got .* for both\.$"):
        find_sources(clean, None, output=clean / "sub" / "..")


@pytest.fixture(scope="module")
def live1() -> list[Source]:
    return find_sources(shared_path("data", "eval", "LIVE1"), None)


def test_live1_is_known_by_its_levels(live1: list[Source], tmp_path: Path) -> None:
    """Under other names, too; not where a picture was shrunk or compressed, is missing, or is there twice."""
    assert {Path(source.name).stem: fingerprint(read_clean(source.clean)) for source in live1 if source.clean} == LIVE1
    renamed = [Source(f"{number}.png", source.clean, None) for number, source in enumerate(live1)]
    assert is_live1(renamed) and not is_live1(live1[:-1]) and not is_live1([*live1[:-1], live1[0]])
    picture = Image.open(live1[0].clean or "").convert("RGB")
    picture.save(tmp_path / "same.png")
    picture.resize((384, 256)).save(tmp_path / "shrunk.png")
    picture.save(tmp_path / "compressed.jpg", quality=95)
    for name, same in (("same.png", True), ("shrunk.png", False), ("compressed.jpg", False)):
        assert is_live1([Source(live1[0].name, tmp_path / name, None), *live1[1:]]) is same


def test_published_figures_stand_beside_ours_for_the_same_pictures_alone(live1: list[Source]) -> None:
    rows = published_rows("single", live1, "4:2:0")
    jpeg = next(row for row in rows if (row.method, row.condition) == ("JPEG", "10"))
    assert jpeg.values["lpips_alex"] == 0.3013 and len({row.method for row in rows}) == 5
    assert published_rows("double", live1, "4:2:0")[0].values["psnr"] == 25.4
    assert not published_rows("single", live1[1:], "4:2:0")
    assert not published_rows("single", live1, "4:4:4")
    assert not published_rows("rate", live1, "4:2:0")
    given = [Source(source.name, source.clean, source.clean) for source in live1]
    assert not published_rows("single", given, "4:2:0")


def test_a_picture_that_cannot_be_read_does_not_hide_what_was_published(
    live1: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was measured counts: LIVE1 beside a broken file, and no LIVE1 where one of its own is broken."""
    for source in live1:
        assert source.clean is not None
        shutil.copy(source.clean, tmp_path / source.name)
    (tmp_path / "broken.png").write_bytes(b"")
    arguments = ("--data", tmp_path, "--output", tmp_path / "out", "--examples", 0, "--device", "cpu")

    def published() -> list[dict]:
        evaluate(monkeypatch, *arguments, "--metrics", "psnr", "--qualities", 10)
        return json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))["published"]["single"]

    assert published()
    (tmp_path / live1[0].name).write_bytes(b"")
    (tmp_path / "broken.png").unlink()
    assert not published()


def as_it_is(clean: torch.Tensor) -> torch.Tensor:
    return clean


def jpegs_of(
    live1: list[Source], condition: Condition, names: Sequence[str], prepared: Callable = as_it_is
) -> np.ndarray:
    """The means of metrics of LIVE1's JPEGs."""
    metrics = {metric.name: metric for metric in find_metrics(MetricFiles(), torch.device("cpu"), wanted=names).single}
    values = []
    for source in live1:
        assert source.clean is not None
        degraded = compressed(prepared(read_clean(source.clean)), condition, "4:2:0", source.name)
        values.append([metrics[name].measure(degraded.pixels, degraded.clean) for name in names])
    assert len(values) == 29
    return np.mean(values, axis=0)


DOUBLE = conditions_of("double", EvaluateOptions(data=Path(), protocol=("double",)))


@pytest.mark.parametrize(
    "condition", [pytest.param(condition, id=condition.label, marks=() if number == 0 else pytest.mark.slow)
                  for number, condition in enumerate(DOUBLE)]
)  # fmt: skip
def test_doubly_compressed_jpegs_have_driftrecs_figures(live1: list[Source], condition: Condition) -> None:
    """The displacement, the order of the two qualities, the window of SSIM and the variant of PSNR-B are Table IV's.

    Printed with two digits of SSIM and one of dB; ours are within 0.08 dB.
    """
    (row,) = [row for row in published_rows("double", live1, "4:2:0")
              if (row.method, row.condition) == ("JPEG", condition.label)]  # fmt: skip
    expected = np.array([row.values[name] for name in ("ssim_9", "psnr", "psnr_b")])
    found = jpegs_of(live1, condition, ("ssim_9", "psnr", "psnr_b"))
    assert (np.abs(found - expected) < (0.0065, 0.1, 0.1)).all(), (found, expected)


def whole_blocks(clean: torch.Tensor) -> torch.Tensor:
    """Resized to multiples of 8, as CODiff's evaluation does."""
    picture = Image.fromarray((clean[0] * 255).round().byte().permute(1, 2, 0).numpy())
    size = (picture.width // 8 * 8, picture.height // 8 * 8)
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255


CODIFF = ("lpips_alex", "dists", "musiq", "maniqa", "clipiqa")


@pytest.mark.slow
@pytest.mark.parametrize("quality", [5, 10, 20])
def test_jpegs_have_codiffs_figures(live1: list[Source], quality: int) -> None:
    """The five metrics are the variants of CODiff's Table 1, which needs pyiqa with all of their weights."""
    missing = find_metrics(MetricFiles(), torch.device("cpu"), wanted=CODIFF).missing
    if missing:
        pytest.skip("; ".join(f"{metric.label} is not at hand: {metric.reason}" for metric in missing))
    (row,) = [row for row in published_rows("single", live1, "4:2:0")
              if (row.method, row.condition) == ("JPEG", str(quality))]  # fmt: skip
    found = jpegs_of(live1, Condition(str(quality), quality), CODIFF, whole_blocks)
    assert found == pytest.approx([row.values[name] for name in CODIFF], rel=0.01)
