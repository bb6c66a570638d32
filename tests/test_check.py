"""`python -m training check`: planted faults are found and named, and sound pictures are not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import shared_path
from skimage import data

from tests.checking import PHOTOS, check, lines, photo, save, tiny, write_sound
from training.check.command import run
from training.check.duplicates import find_duplicates
from training.check.facts import PictureFacts, find_grid, fingerprint, look_at
from training.check.pictures import Expectation, judge, look_at_all
from training.data.crops import CropSettings, draw_pair
from training.data.pictures import DECODE_ERRORS, load_image
from training.data.views import View, see
from training.degradation import Degradation, compress


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "sound")


def test_every_fault_is_found_and_named_and_nothing_else(sound: Path, tmp_path: Path, capsys) -> None:
    save(photo("coffee")[:100, :40], sound / "small.png")
    (sound / "broken.png").write_text("no picture")
    whole = (sound / "rocket.png").read_bytes()
    (sound / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(photo("astronaut")[::-1], sound / "poor.jpg", quality=30)
    save(compress(photo("coffee")[:, ::-1].copy(), 15), sound / "was_jpeg.png")
    save(np.asarray(Image.fromarray(photo("chelsea")).resize((180, 120))), sound / "again.jpg", quality=92)
    assert check(*tiny(sound, tmp_path, "--pairs", 2)) == 0
    found = {Path(name).name: entry["text"] for entry in json.loads((tmp_path / "check" / "findings.json").read_text())
             for name in entry["pictures"]}  # fmt: skip
    assert set(found) == {"small.png", "broken.png", "cut.png", "poor.jpg", "was_jpeg.png", "chelsea.png"} or set(
        found
    ) == {"small.png", "broken.png", "cut.png", "poor.jpg", "was_jpeg.png", "again.jpg"}
    printed = lines(capsys, "warning")
    expected = ["cannot be decoded", "below 79 pixels", "below 75, down to 30", "had been JPEGs", "there already"]
    for words in expected:
        assert sum(words in line for line in printed) == 1, words
    assert any("few" in line for line in printed) and len(printed) == len(expected) + 1
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--strict")) == 1


def test_sound_pictures_pass_and_pairs_of_the_sheet_can_be_made_again(sound: Path, tmp_path: Path, capsys) -> None:
    assert check(*tiny(sound, tmp_path, "--pairs", 5, "--run.seed", 3)) == 0
    assert [line for line in lines(capsys, "warning") if "few" not in line] == []
    check_made_again(tmp_path / "check", 5, side=64, times=3)


def test_pairs_of_which_the_network_sees_a_view_can_be_made_again(sound: Path, tmp_path: Path) -> None:
    """Only shrunk ones are cut out of the whole crop: which, and how, is in the file."""
    options = ["--data.crop", 160, "--view.side", 64, "--view.resized", 0.4, "--view.misaligned", 0.5]
    options += ["--view.uncompressed", 0.4, "--run.output", tmp_path / "run", "--output", tmp_path / "check"]
    check("quality", "--preset", "starter", "--data.train", sound, "--pairs", 12, *options)
    pairs = check_made_again(tmp_path / "check", 12, side=64, times=3)
    assert {80} < {entry["crop"] for entry in pairs} <= {80, 96, 112, 128, 144, 160}
    views = [entry["drawn"]["view"] for entry in pairs]
    assert {view["kind"] for view in views} == {"aligned", "misaligned", "resized"}
    assert {view["uncompressed"] for view in views} == {True, False}


def check_made_again(folder: Path, count: int, *, side: int, times: int) -> list[dict]:
    """Whether all pairs follow from `pairs.json` alone, and are on the sheet, so many times as large."""
    sheet = np.asarray(Image.open(folder / "pairs.png"))
    recipe = json.loads((folder / "pairs.json").read_text())
    made = {**recipe["settings"], "degradation": Degradation(**recipe["settings"]["degradation"])}
    settings = CropSettings(**{key: tuple(v) if isinstance(v, list) else v for key, v in made.items()})
    assert len(recipe["pairs"]) == count
    for entry in recipe["pairs"]:
        pair = draw_pair(
            load_image(Path(entry["path"])), replace(settings, crop=entry["crop"]), [recipe["seed"], 1, entry["index"]]
        )
        clean, image, drawn = pair.clean, pair.image, dict(entry["drawn"])
        if "view" in drawn:
            view = View(**drawn.pop("view"))
            clean, image = (see(part, view, entry["side"]) for part in (clean, image))
            image = clean if view.uncompressed else image
        assert clean.shape == image.shape == (side, side, 3) and entry["side"] == side
        both = [part.repeat(times, 0).repeat(times, 1) for part in (clean, image)]
        assert is_within(np.concatenate([both[0], np.full((times * side, 6, 3), 255, np.uint8), both[1]], 1), sheet)
        assert json.loads(json.dumps(pair.description)) == drawn
    return recipe["pairs"]


def is_within(part: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture shows another, found by its first row."""
    rows = np.lib.stride_tricks.sliding_window_view(picture, (part.shape[1], 3), axis=(1, 2))[:, :, 0]
    for top, left in np.argwhere((rows.transpose(0, 1, 2, 3) == part[0]).all(axis=(2, 3))):
        if np.array_equal(picture[top : top + part.shape[0], left : left + part.shape[1]], part):
            return True
    return False


def test_pictures_alone_and_shards(sound: Path, tmp_path: Path, capsys) -> None:
    from training.prepare.shards import ShardSettings, write_shards

    write_shards(sound, tmp_path / "shards", ShardSettings())
    for source in (sound, tmp_path / "shards" / "shards-{000..000}.tar"):
        assert check("--data", source, "--output", tmp_path / "check", "--pairs", 1) == 0
        assert "4 pictures of" in capsys.readouterr().out
        assert (tmp_path / "check" / "pairs.png").exists()


def test_several_processes_see_the_same_in_the_same_order(sound: Path) -> None:
    paths = sorted(sound.iterdir()) * 10
    assert look_at_all(paths, 2) == look_at_all(paths, 1)


def test_a_leak_between_training_and_validation_is_told(sound: Path, tmp_path: Path, capsys) -> None:
    held_out = tmp_path / "held_out"
    save(photo("rocket"), held_out / "rocket_again.jpg", quality=95)
    save(data.immunohistochemistry()[::2, ::2], held_out / "cells.png")
    check(*tiny(sound, tmp_path, "--pairs", 0, "--data.validation", held_out))
    (line,) = [line for line in lines(capsys, "warning") if "trained on as well" in line]
    assert line.startswith("warning: 1 of 2 pictures for validation") and "rocket_again.jpg" in line


def test_all_mistakes_of_a_configuration_are_problems(tmp_path: Path, capsys) -> None:
    assert check("regression", "--data.crpo", 8, "--run.batch", "many", "--output", tmp_path / "check") == 1
    printed = lines(capsys, "problem")
    assert len(printed) == 2 and "crpo" in printed[0] + printed[1] and "many" in printed[0] + printed[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.train", "nowhere"], r"data\.train: there is no folder nowhere"),
        (["--validation.lpips", "nowhere.npz"], r"validation\.lpips: there is no nowhere\.npz"),
        (["--run.init-from", "nowhere.safetensors"], r"run\.init_from: there is no nowhere"),
        (["--data.crop", "65"], r"data\.crop: expected a multiple of"),
        (["--run.accumulate", "3"], r"run\.batch: expected a multiple of 3 .*got 4"),
        (["--data.train", __file__], r"data\.train: .*test_check\.py is a file: give the folder that holds"),
    ],
)
def test_what_would_stop_the_training_is_a_problem(sound: Path, tmp_path: Path, capsys, options, said) -> None:
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1, *options)) == 1
    (line,) = lines(capsys, "problem")
    assert re.search(said, line), line


def test_another_run_in_the_folder_is_a_problem(sound: Path, tmp_path: Path, capsys) -> None:
    from training.command_line.configure import parse
    from training.command_line.files import to_plain

    arguments = [str(word) for word in tiny(sound, tmp_path)[1:-2]]
    _, config = parse("regression", arguments)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"command": "driftrec", **to_plain(config)}))
    (tmp_path / "run" / "checkpoint.pt").touch()
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1)) == 1
    assert "holds another run (command was 'driftrec'" in lines(capsys, "problem")[0]


@pytest.mark.parametrize("quality", [10, 30, 50])
def test_traces_of_compression_are_seen_in_pixels(tmp_path: Path, quality: int) -> None:
    """Also off the grid, and all of the photographs that ship with scikit-image."""
    for name in PHOTOS:
        clean, shifted = photo(name), compress(photo(name), quality)[3:, 5:]
        assert find_grid(clean)[0] < 1.05
        if quality < 30:
            assert find_grid(shifted)[0] > 1.3, name
        seen = [look_at(save(pixels, tmp_path / "a.png")).seen_quality for pixels in (clean, compress(clean, quality))]
        assert seen[0] > 75 and seen[1] < 60 + quality / 5, (name, seen)


def test_the_quality_of_a_file_is_that_of_its_tables(tmp_path: Path) -> None:
    for quality in (20, 74, 75, 98):
        path = save(photo("coffee"), tmp_path / "a.jpg", quality=quality)
        facts = look_at(path)
        assert facts.file_quality == quality and facts.seen_quality is None
        said = any("JPEGs of a quality below" in finding.text for finding in judge("x", [facts], Expectation(16)))
        assert said == (quality < 75)


def test_versions_of_a_picture_are_one_and_others_are_not() -> None:
    """Scaled, recompressed, brightened and slightly cut; the other three photographs, and turned ones, are others."""

    def facts(pixels: np.ndarray) -> PictureFacts:
        small = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BOX))
        return PictureFacts(Path("x"), fingerprint=fingerprint(pixels), thumbnail=small.tobytes())

    for name in PHOTOS:
        picture = photo(name)
        scaled = np.asarray(Image.fromarray(picture).resize((150, 170), Image.Resampling.BICUBIC))
        brighter = np.clip(picture.astype(int) + 4, 0, 255).astype(np.uint8)
        versions = [picture, compress(picture, 20), scaled, brighter]
        others = [photo(other) for other in PHOTOS if other != name] + [picture[::-1].copy(), picture[:, ::-1].copy()]
        groups = find_duplicates([facts(pixels) for pixels in [*versions, *others]])
        assert groups == [[0, 1, 2, 3]], name


def test_all_pairs_within_four_bits_are_found_as_by_comparing_all() -> None:
    rng = np.random.default_rng(0)
    base = [int(value) for value in rng.integers(0, 2**63, 60)]
    prints = base + [value ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 8), False)) for value in base]
    facts = [PictureFacts(Path("x"), fingerprint=value, thumbnail=bytes(768)) for value in prints]
    found = {tuple(group) for group in find_duplicates(facts)}
    expected = {(n, n + 60) for n in range(60) if bin(prints[n] ^ prints[n + 60]).count("1") <= 4}
    assert found == expected and 20 < len(found) < 60


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected a command that trains"),
        (["regresion", "--data.train", "x"], "Did you mean regression"),
        (["regression", "--data", "x"], "or --data FOLDER alone"),
        (["--data", "x", "--data.crop", "8"], "expected no options of a training without its command"),
        (["--data", "x", "--pairs", "-1"], "--pairs: expected at least 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(arguments)


def test_a_set_without_a_whole_picture_is_a_problem(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.png").write_text("no picture")
    assert check("--data", tmp_path, "--output", tmp_path / "check") == 1
    assert "nothing is left" in lines(capsys, "problem")[0]


def test_help_says_how(capsys) -> None:
    assert run(["--help"]) == 0
    assert "--data FOLDER" in (said := capsys.readouterr().out) and "Exit status" in said


def test_odd_and_broken_files_end_in_findings_alone(tmp_path: Path, recwarn) -> None:
    folder = shared_path("data", "torture")
    assert check("--data", folder, "--output", tmp_path / "check", "--pairs", 3) == 0
    findings = json.loads((tmp_path / "check" / "findings.json").read_text())
    (broken,) = [finding["pictures"] for finding in findings if "cannot be decoded" in finding["text"]]
    assert 0 < len(broken) < len(list(folder.glob("*.jp*g"))) / 2
    for path in broken:
        with pytest.raises(DECODE_ERRORS):
            load_image(Path(path))
    assert not [warning for warning in recwarn if "EXIF" in str(warning.message)]


def test_the_same_file_many_times_is_found_at_once() -> None:
    copies = [PictureFacts(Path("x"), fingerprint=5, thumbnail=bytes(768))] * 5000
    others = [PictureFacts(Path("y"), fingerprint=5, thumbnail=bytes([200]) * 768)]
    assert find_duplicates([*others, *copies]) == [list(range(1, 5001))]


def test_the_end_speaks_of_pictures_where_there_are_any(sound: Path, tmp_path: Path, capsys) -> None:
    check("regression", "--data.crpo", 8, "--output", tmp_path / "check")
    report = tmp_path / "check" / "findings.json"
    assert capsys.readouterr().out.endswith(f"1 problem(s), 0 warning(s); they are in {report}\n")
    check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1, "--data.crop", 512))
    assert capsys.readouterr().out.endswith(f"they are in {report}, with the names of all pictures\n")
