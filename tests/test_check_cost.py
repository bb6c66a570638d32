"""What `check` says of memory, disk, batch, crops and models before anything is loaded."""

from __future__ import annotations

import re
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.checking import check, lines, tiny, write_sound
from training.check import cost as costs
from training.check import weights
from training.check.memory import check_kept_pictures, check_known_memory, check_memory
from training.check.sizes import ADAPTED_MULTIPLES
from training.commands import COMMANDS


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    return write_sound(tmp_path / "sound")


def test_disk_and_memory_are_compared_with_what_is_there(sound: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1)) == 0
    assert [line.split(":")[1] for line in lines(capsys, "note")] == [
        " memory", " memory of the data workers", " disk", " data.train",
    ]  # fmt: skip
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "available")(1000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1)) == 1
    printed = capsys.readouterr().out
    assert "problem: disk: " in printed and "problem: memory: " in printed and "--run.accumulate" in printed
    assert "warning: memory of the data workers: decoded pictures of up to 2.0 GiB (2 workers, 1000 MB each)" in printed


def test_the_estimated_checkpoint_is_as_large_as_the_written_one(sound: Path, tmp_path: Path) -> None:
    from training.command_line.configure import parse
    from training.loop.session import Session

    arguments = [str(word) for word in tiny(sound, tmp_path)[1:-2]]
    arguments += ["--run.images", "4", "--data.workers", "0"]
    arguments += ["--validation.images", "1", "--validation.qualities", "10"]
    _, config = parse("regression", arguments)
    cost = costs.measure(COMMANDS["regression"].make_task(config), config)
    Session("regression", config).train()
    written = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    restorer = (tmp_path / "run" / "regression.safetensors").stat().st_size
    assert 0.7 < cost.checkpoint / written < 1.1 and 0.5 < cost.restorer / restorer < 1.2


def test_activations_grow_with_pixels_and_pictures(sound: Path, tmp_path: Path) -> None:
    from training.command_line.configure import parse

    def memory(*more: object) -> int:
        _, config = parse("regression", [str(word) for word in [*tiny(sound, tmp_path)[1:-2], *more]])
        return costs.measure(COMMANDS["regression"].make_task(config), config).memory

    base = memory()
    per_picture = base - memory("--run.batch", 3)
    rest = base - 4 * per_picture
    assert per_picture > 0 and rest > 0
    assert abs(memory("--run.batch", 8, "--run.accumulate", 2) - base) <= 4
    assert abs((memory("--data.crop", 128) - rest) / (16 * per_picture) - 1) < 0.1


def test_models_are_looked_for_in_folders_and_in_the_hubs_cache(tmp_path: Path, monkeypatch) -> None:
    from training.command_line.configure import parse

    base = tmp_path / "base"
    for part in ("unet", "vae"):
        (base / part).mkdir(parents=True)
    (base / "vae" / "a.safetensors").touch()
    cave = tmp_path / "cave.safetensors"
    cave.touch()
    asked = ["--cave", str(cave), "--loss.perceptual.kind", "none"]
    (finding,) = weights.check_weights(parse("codiff", [*asked, "--base.path", str(base)])[1])
    assert finding.level == "problem" and "lacks scheduler, the .safetensors of unet." in finding.text
    (base / "scheduler").mkdir()
    (base / "unet" / "a.safetensors").touch()
    assert weights.check_weights(parse("codiff", [*asked, "--base.path", str(base)])[1]) == []
    said = [finding.text for finding in weights.check_weights(parse("codiff", ["--base.path", str(base)])[1])]
    assert len(said) == 2 and said[0].startswith("cave: no first stage") and "--loss.perceptual.dists" in said[1]
    (finding,) = weights.check_weights(parse("codiff", [*asked, "--base.path", "nobody/nothing-of-this-name"])[1])
    assert finding.level == "warning" and "will be downloaded" in finding.text
    (finding,) = weights.check_weights(parse("codiff", [*asked, "--base.path", str(tmp_path / "absent")])[1])
    assert finding.level == "problem" and "neither a folder nor the name" in finding.text


def test_what_adapts_a_base_is_told_the_memory_of_the_preset_with_as_large_a_step(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    presets = COMMANDS["codiff"].presets()
    card = replace(presets["24gb"], run=replace(presets["24gb"].run, images=7, seed=3))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=24 * 2**30))
    (finding,) = check_known_memory("codiff", card)
    assert finding.level == "note" and "about 19.8 GiB, as counted for the preset 24gb" in finding.text
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    (finding,) = check_known_memory("codiff", card)
    assert finding.level == "warning" and "--run.accumulate (now 4" in finding.text
    (finding,) = check_known_memory("codiff", replace(card, unet_lora=replace(card.unet_lora, rank=64)))
    assert finding.level == "note" and "not estimated" in finding.text
    (finding,) = check_known_memory("sodiff", COMMANDS["sodiff"].presets()["12gb"])
    assert "about 7.5 GiB, as counted for the preset 12gb" in finding.text


def free_memory(monkeypatch: pytest.MonkeyPatch, gibibytes: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(gibibytes * 2**30)))


def test_memory_that_is_several_times_what_is_there_is_a_problem(monkeypatch) -> None:
    """An estimate may be wrong by something, not by that much; without a GPU there is a preset that suits."""
    free_memory(monkeypatch, 20)
    presets = COMMANDS["driftrec"].presets()
    for needed, level in ((19, "note"), (39, "warning"), (41, "problem")):
        (finding,) = check_memory(needed * 2**30, "driftrec", presets["paper"])
        assert finding.level == level and f"about {needed}.0 GiB; 20.0 GiB of main memory are free" in finding.text
        assert finding.text.endswith("There is no GPU here: --preset starter is meant for that.") == (level != "note")
    (finding,) = check_memory(2**40, "driftrec", presets["starter"])
    assert finding.level == "problem" and "--preset" not in finding.text
    (finding,) = check_memory(2**40, "saipe", COMMANDS["saipe"].presets()["paper"])
    assert finding.text.endswith("--preset small is meant for that.")


def test_the_pictures_that_data_workers_keep_are_counted_in_main_memory(monkeypatch) -> None:
    free_memory(monkeypatch, 16)
    preset = COMMANDS["driftrec"].presets()["starter"]
    many = replace(preset, data=replace(preset.data, workers=4, cache_mb=1024))
    (finding,) = check_kept_pictures(many, 1)
    assert finding.level == "note" and "up to 4.0 GiB (4 workers, 1024 MB each); 16.0 GiB of main" in finding.text
    (finding,) = check_kept_pictures(replace(many, data=replace(many.data, workers=0)), 2)
    assert finding.level == "note" and "up to 2.0 GiB (0 workers in 2 training processes, 1024 MB each)" in finding.text
    (finding,) = check_kept_pictures(many, 5)
    assert finding.level == "warning" and "up to 20.0 GiB" in finding.text and "lower --data.cache-mb" in finding.text


def test_batch_and_crops_are_checked_where_a_base_is_adapted_as_well(sound: Path, tmp_path: Path, capsys) -> None:
    common = ["--data.train", sound, "--limit", 1, "--pairs", 0, "--output", tmp_path / "check"]
    common += ["--run.output", tmp_path / "run", "--loss.perceptual.kind", "none", "--run.batch", 30]
    for command, crop in (("codiff", 264), ("sodiff", 250)):
        assert check(command, "--preset", "24gb", "--run.accumulate", 4, "--data.crop", crop, *common) == 1
        printed = capsys.readouterr().out
        assert "problem: run.batch: expected a multiple of 4 (processes x run.accumulate), got 30." in printed
        multiple = ADAPTED_MULTIPLES[command]
        assert f"problem: data.crop: expected a multiple of {multiple}, which this network needs, got {crop}" in printed
        assert re.search(r"note: disk: \d.* are free for .*run; .* not estimated", printed)


def test_the_multiples_of_what_adapts_a_base_are_those_of_its_trainings() -> None:
    from training.trainers.codiff import CoDiffTask
    from training.trainers.sodiff import SODiffTask

    assert {"codiff": CoDiffTask.size_multiple, "sodiff": SODiffTask.size_multiple} == ADAPTED_MULTIPLES


def test_a_run_among_its_pictures_is_a_problem(sound: Path, tmp_path: Path, capsys) -> None:
    assert check(*tiny(sound, tmp_path, "--pairs", 0, "--limit", 1, "--run.output", sound / "runs" / "a")) == 1
    (line,) = lines(capsys, "problem")
    assert "lies in data.train" in line and "--run.output a folder elsewhere" in line
