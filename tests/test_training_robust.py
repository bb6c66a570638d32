"""What must not cost a run its work: a reader that is gone, a second trainer, a first stage that changed, another count
of validation pictures, a checkpoint that cannot be read, a stop amid a validation."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT
from stopping import stop_after
from tiny_trainings import same, stats, tiny, write_pictures

import training.loop.validation
from restoration.replacing import replace as replace_path
from restoration.restorer_file import RestorerMetadata, read_restorer, write_restorer
from training.command_line.files import to_yaml
from training.commands import COMMANDS
from training.configs.common import RunConfig
from training.degradation import Degradation, compress
from training.loop.briefing import changes, warnings
from training.loop.checkpoint import CheckpointError, read_checkpoint
from training.loop.grid import make_grid
from training.loop.lock import FolderLock, LockedError
from training.loop.logs import StatsFile
from training.loop.same_run import RunFolderError, check_same_run
from training.loop.session import Session
from training.loop.steps import Steps, TrainingStoppedError
from training.loop.validation import is_better, split_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    Session("regression", tiny(folder, output)).train()
    return output


def command(folder: Path, output: Path, **run) -> list[str]:
    config = output.parent / f"{output.name}.yaml"
    config.write_text(to_yaml(tiny(folder, output, **run)))
    return [sys.executable, "-m", "training", "regression", "--config", str(config)]


# --- the end of those who read along ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("asked", [None, signal.SIGINT, signal.SIGHUP])
def test_a_reader_that_is_gone_ends_nothing(asked: int | None, folder: Path, tmp_path: Path, whole: Path) -> None:
    """As with `| tee log`, which Ctrl-C ends before the trainer has saved, or a terminal that is closed."""
    output = tmp_path / "run"
    run = subprocess.Popen(
        command(folder, output, images=40 if asked is None else 100_000), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert run.stdout is not None
    run.stdout.readline()
    run.stdout.close()
    if asked is not None:
        until(lambda: (output / "checkpoint.pt").exists())
        run.send_signal(asked)
    assert run.wait(timeout=120) == 0
    images = read_checkpoint(output / "checkpoint.pt")["images"]
    assert images % 4 == 0 and len([line for line in stats(output) if "loss" in line]) == images // 4
    if asked is None:
        assert images == 40 and same(output, whole)


def until(happens, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


# --- two at once ------------------------------------------------------------------------------------------------------


HOLD = "import sys, time\nfrom pathlib import Path\nfrom training.loop.lock import FolderLock\n" \
       "lock = FolderLock(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.readline()\n"  # fmt: skip


def test_a_second_training_in_the_same_folder_is_refused_until_the_first_has_ended(
    folder: Path, tmp_path: Path
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    (tmp_path / "checkpoint.pt.part").write_bytes(b"being written by the other one")
    with pytest.raises(RunFolderError, match=rf"another training writes there \(process {holder.pid} on .*Wait"):
        Session("regression", tiny(folder, tmp_path)).train()
    assert (tmp_path / "checkpoint.pt.part").exists() and not (tmp_path / "config.json").exists()
    holder.kill()
    holder.wait()
    Session("regression", tiny(folder, tmp_path, images=4)).train()
    assert not (tmp_path / "checkpoint.pt.part").exists()
    FolderLock(tmp_path).release()  # the training has let go of it


def test_a_lock_of_a_process_is_not_held_by_those_it_started(tmp_path: Path) -> None:
    """Workers of the data pipeline may outlive a trainer that was killed, by some seconds."""
    script = f"import subprocess, sys\nsys.argv = ['', sys.argv[1]]\n{HOLD.replace('sys.stdin.readline()', '')}" \
             "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False)\n" \
             "print(child.pid, flush=True)\n"  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    child = int(process.stdout.readline())
    process.wait()
    try:
        FolderLock(tmp_path).release()
    except LockedError as error:
        pytest.fail(f"still held: {error}")
    finally:
        os.kill(child, signal.SIGTERM)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_kept_checkpoint_can_be_copied_over_the_newest_and_stays_itself(folder: Path, tmp_path: Path) -> None:
    """With a copy that writes into the file that is there, as cp does."""
    Session("regression", tiny(folder, tmp_path, keep_every=8)).train()
    kept = sorted((tmp_path / "kept").glob("*.pt"))
    before = [path.read_bytes() for path in kept]
    with (tmp_path / "checkpoint.pt").open("r+b") as file:
        file.truncate(0)
        file.write(before[0])
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize("wanted", [1, 3])
def test_pictures_that_were_set_aside_stay_so_whatever_is_wanted_later(wanted: int, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(75):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(pictures / f"{number:02d}.png")
    config = tiny(tmp_path, tmp_path / "run", images=8)
    asked = replace(config, validation=replace(config.validation, images=2, crop=16))
    first = Session("regression", asked)
    first.train()
    config = tiny(tmp_path, tmp_path / "run", images=12)
    pictures.rename(tmp_path / "elsewhere")
    moved = replace(config.data, train=tmp_path / "elsewhere")
    second = Session("regression", replace(config, data=moved, validation=replace(asked.validation, images=wanted)))
    assert [path.name for path in first.validation] == ["24.png", "49.png"]
    assert [path.name for path in second.training] == [path.name for path in first.training]
    assert [path.name for path in second.validation] == ["24.png", "49.png"][:wanted]
    second.train()
    third = Session("regression", replace(asked, data=moved))
    assert [path.name for path in third.validation] == ["24.png", "49.png"]


def test_a_new_run_sets_every_25th_picture_aside() -> None:
    paths = [Path(f"{number}.png") for number in range(60)]
    kept, aside = split_pictures(paths, 8)
    assert aside == [paths[24], paths[49]] and len(kept) == 58


def test_a_first_stage_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    """It may lie elsewhere when the run goes on; one that was trained on meanwhile is another one."""
    first = stage(tmp_path / "cave.safetensors", 0)
    config = replace(COMMANDS["codiff"].presets()["starter"], cave=first)
    store(tmp_path / "run", "codiff", config)
    moved = first.rename(tmp_path / "moved.safetensors")
    check_same_run(tmp_path / "run", "codiff", replace(config, cave=moved))
    stage(moved, 1)
    with pytest.raises(RunFolderError, match="cave was"):
        check_same_run(tmp_path / "run", "codiff", replace(config, cave=moved))
    stage(first, 1)
    with pytest.raises(RunFolderError, match=r"what is in the file of cave, '.*cave\.safetensors', has changed"):
        check_same_run(tmp_path / "run", "codiff", replace(config, cave=first))


def stage(path: Path, value: float) -> Path:
    write_restorer(path, RestorerMetadata("cave", {}, license="unknown"), {"prompt.a": torch.full((2,), value)})
    return path


def store(output: Path, command: str, config) -> None:
    from training.loop.same_run import CONFIG, stored_run

    output.mkdir()
    (output / CONFIG).write_text(stored_run(command, config, []))
    (output / "checkpoint.pt").touch()


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda c: replace(c, data=replace(c.data, degradation=Degradation(subsampling={"4:4:4": 1.0}))),
         "data.degradation"),
        (lambda c: replace(c, timestep=300.0), "timestep was 499.0, is 300.0"),
        (lambda c: replace(c, optimizer=replace(c.optimizer, eight_bit=True)), "optimizer.eight_bit"),
        (lambda c: replace(c, gradient_checkpointing=True), None),
        (lambda c: replace(c, run=replace(c.run, accumulate=2)), None),
    ],
)  # fmt: skip
def test_what_trains_something_else_is_refused_and_what_does_not_is_not(change, differs, tmp_path: Path) -> None:
    config = COMMANDS["codiff"].presets()["starter"]
    store(tmp_path / "run", "codiff", config)
    if differs is None:
        check_same_run(tmp_path / "run", "codiff", change(config))
    else:
        with pytest.raises(RunFolderError, match=differs):
            check_same_run(tmp_path / "run", "codiff", change(config))


def test_a_description_that_is_spoilt_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(RunFolderError, match=r"config\.json is spoilt"):
        check_same_run(tmp_path, "codiff", COMMANDS["codiff"].presets()["starter"])


@pytest.mark.parametrize("spoil", ["text", "pickle", "cut"])
def test_nobody_is_told_to_remove_a_checkpoint(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"images": 4}, path)
    contents = {"text": b"version https://git-lfs", "pickle": pickle.dumps(print), "cut": path.read_bytes()[:-40]}
    path.write_bytes(contents[spoil])
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint.*Move it away to start anew") as caught:
        read_checkpoint(path)
    assert "emove it" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_read_is_not_called_spoilt(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoint\.pt: Is a directory"):
        read_checkpoint(tmp_path / "checkpoint.pt")


def test_processes_that_found_different_runs_or_pictures_say_so(folder: Path, tmp_path: Path) -> None:
    """Two machines without a common folder: each has its own checkpoint, of which one is missing."""
    config = tiny(folder, tmp_path / "run", batch=4, images=8)
    Session("regression", config).train()
    (tmp_path / "again.yaml").write_text(to_yaml(tiny(folder, tmp_path / "run", images=16)))
    script = (
        "import os, sys\nfrom pathlib import Path\nexists = Path.exists\n"
        "hidden = lambda self, **k: False if os.environ['RANK'] == '1' and self.name == 'checkpoint.pt' "
        "else exists(self, **k)\n"
        "Path.exists = hidden\nsys.argv = ['training', 'regression', '--config', sys.argv[1]]\n"
        "from training.__main__ import main\nsys.exit(main())\n"
    )
    (tmp_path / "two.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*launch, str(tmp_path / "two.py"), str(tmp_path / "again.yaml")], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode != 0
    assert "do not agree: they have seen [0, 8] images, of the same pictures" in ended.stderr


# --- validations ------------------------------------------------------------------------------------------------------


def test_a_stop_amid_a_validation_cuts_it_short_and_it_is_made_up_for(
    folder: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, seen = training.loop.validation.Validation._one, []

    def counted(self, task, quality, number, device):
        seen.append(quality)
        if len(seen) == 6:  # in the middle of the validation at 16 images: of two qualities, after 4 for that at 0
            os.kill(os.getpid(), signal.SIGTERM)
        return one(self, task, quality, number, device)

    config = tiny(folder, tmp_path / "run")
    config = replace(config, validation=replace(config.validation, qualities=(10, 20, 30, 40)))
    with monkeypatch.context() as patch:
        patch.setattr(training.loop.validation.Validation, "_one", counted)
        Session("regression", config).train()
    assert len(seen) == 6
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pt")["images"] == 16
    assert [line["images"] for line in stats(tmp_path / "run") if "validation/psnr/qf10" in line] == [0]
    Session("regression", config).train()
    found = [line["images"] for line in stats(tmp_path / "run") if "validation/psnr/qf10" in line]
    assert found == [0, 16, 32, 40]
    assert same(tmp_path / "run", whole)


def test_a_stop_amid_the_last_validation_is_made_up_for(folder: Path, tmp_path: Path, whole: Path) -> None:
    stop_after(Session("regression", tiny(folder, tmp_path)), images=40)
    assert read_restorer(tmp_path / "regression.safetensors").metadata.training["images"] == 40
    Session("regression", tiny(folder, tmp_path)).train()
    training = read_restorer(tmp_path / "regression.safetensors").metadata.training
    assert training["measured_at"] == 40 and same(tmp_path, whole)


def test_a_long_validation_tells_how_far_it_is(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(training.loop.validation, "_SECONDS", -1.0)
    Session("regression", tiny(folder, tmp_path, images=4)).train()
    assert "validation at 0 images: 0 of 1 pictures" in capsys.readouterr().out


def test_the_best_is_told_by_the_qualities_that_both_validations_have() -> None:
    """Otherwise asking for lower qualities makes every later result worse than the first."""
    before = {"psnr/qf40": 30.0, "psnr/qf20": 28.0}
    assert is_better({"psnr/qf40": 30.5, "psnr/qf5": 20.0}, before, None, ("psnr",))
    assert not is_better({"psnr/qf40": 29.5, "psnr/qf95": 45.0}, before, None, ("psnr",))


def test_grids_have_titles_and_the_pictures_untouched() -> None:
    rows = [[torch.full((3, 20, 40), value), torch.full((3, 20, 40), 1 - value)] for value in (0.2, 0.4)]
    grid = make_grid([*rows, [torch.zeros(3, 10, 30), torch.ones(3, 10, 30)]], ["JPEG, quality 10", "original"])
    assert grid.shape == (3, 16 + 20 + 20 + 10, 80)
    assert torch.equal(grid[:, 16:36, :40], rows[0][0]) and torch.equal(grid[:, 36:56, 40:], rows[1][1])
    assert grid[:, :16, :40].max() > 0.9 and grid[:, :16, 40:].max() > 0.9, "words"
    assert grid[:, 56:, 60:].max() == 0, "a narrower row ends in black"


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_run_says_what_differs_from_which_preset() -> None:
    starter = COMMANDS["driftrec"].presets()["starter"]
    assert changes("driftrec", starter) == "configuration: preset starter"
    changed = replace(starter, run=replace(starter.run, batch=8, output=Path("mine")))
    assert changes("driftrec", changed) == "configuration: preset starter, with\n  run.output: mine\n  run.batch: 8"


def test_a_large_network_on_a_cpu_and_coarse_jpegs_are_spoken_of(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    for number, quality in enumerate((20, 60, 90)):
        picture = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        picture.save(tmp_path / f"{number}.jpg", quality=quality)
    Image.fromarray(compress(np.zeros((32, 32, 3), np.uint8), 10)).save(tmp_path / "a.png")
    paths = sorted(tmp_path.iterdir())
    monkeypatch.setattr("training.loop.briefing.accelerator_available", lambda: False)
    small, large = torch.nn.Linear(2, 2), torch.nn.Linear(5000, 5000)
    assert [*warnings("driftrec", small, paths[-1:])] == []
    (poor,) = warnings("driftrec", small, paths)
    assert poor.startswith("2 of 3 JPEGs") and "training check" in poor
    (weeks,) = warnings("driftrec", large, [])
    assert "25,005,000 parameters" in weeks and "--preset starter" in weeks
    monkeypatch.setattr("training.loop.briefing.accelerator_available", lambda: True)
    assert [*warnings("driftrec", large, [])] == []


def test_what_is_no_number_is_null_in_the_statistics(tmp_path: Path) -> None:
    log = StatsFile(tmp_path / "stats.jsonl", 0)
    log.figures(4, {"gradient_norm": float("inf"), "loss": 0.5})
    log.close()
    line = json.loads((tmp_path / "stats.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"images": 4, "gradient_norm": None, "loss": 0.5}


def test_fp16_may_skip_steps_but_not_for_ever() -> None:
    steps, learner = Steps.__new__(Steps), SimpleNamespace(skipped=0)
    steps.run_config, steps.critic = RunConfig(precision="fp16", batch=4), None
    batch = {"path": ["a.png"], "index": torch.tensor([7])}
    for _ in range(2):
        for _ in range(50):
            steps._check_norm(learner, float("inf"), 8, [batch])
        steps._check_norm(learner, 1.0, 8, [batch])
    with pytest.raises(TrainingStoppedError, match=r"step 2, 8 images: the gradient's norm is nan, for the 51\. time"):
        for _ in range(51):
            steps._check_norm(learner, float("nan"), 8, [batch])
    steps.run_config, learner.skipped = RunConfig(precision="bf16"), 0
    with pytest.raises(TrainingStoppedError, match=r"the gradient's norm is inf in the batch a\.png"):
        steps._check_norm(learner, float("inf"), 8, [batch])


@pytest.mark.parametrize(("held", "arrives"), [(3, True), (1000, False)])
def test_on_windows_a_file_that_somebody_has_open_is_waited_for(
    held: int, arrives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, tries = tmp_path / "a", tmp_path / "b", [0]
    source.write_text("new")
    really = os.replace

    def barred(old, new):
        tries[0] += 1
        if tries[0] <= held:
            raise PermissionError("used by another process")
        really(old, new)

    monkeypatch.setattr("restoration.replacing.os.name", "nt")
    monkeypatch.setattr("restoration.replacing.os.replace", barred)
    monkeypatch.setattr("restoration.replacing.time.sleep", lambda seconds: None)
    monkeypatch.setattr("restoration.replacing.Path", type(tmp_path))
    if arrives:
        replace_path(source, target)
        assert target.read_text() == "new"
    else:
        with pytest.raises(PermissionError):
            replace_path(source, target)
        assert source.exists()
