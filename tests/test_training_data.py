"""Training items depend on seed and index alone; folders with odd and broken files still train, and say so."""

import contextlib
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT, shared_path
from skimage import data

from training.data.crops import CropSettings, draw_pair
from training.data.pairs import IndexSampler, PairDataset, make_loader
from training.data.pictures import find_images, load_image, scan_images
from training.degradation import PRESETS, Degradation

CLEAR = Degradation(quality_min=95, quality_max=95, subsampling={"4:4:4": 1.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures in two folders, smaller and larger than a crop."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deep" / "er").mkdir(parents=True)
    astronaut = data.astronaut()
    for number, side in enumerate((20, 90, 130, 200, 300)):
        Image.fromarray(astronaut[: side + 10, 50 : 50 + side]).save(root / f"picture{number}.png")
    Image.fromarray(data.coffee()[:150, :170]).save(root / "deep" / "er" / "coffee.JPG", quality=95)
    (root / "notes.txt").write_text("not a picture")
    return root


def dataset(folder, crop=64, degradation=PRESETS["wide"], **options):
    return PairDataset(find_images(folder), crop, degradation, **options)


def test_folders_are_searched_deep_in_sorted_order(folder):
    names = [path.name for path in find_images(folder)]
    assert names == ["coffee.JPG", *(f"picture{number}.png" for number in range(5))]


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_images(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no picture found"):
        find_images(tmp_path)
    (tmp_path / "beach.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"beach\.jpg is a file: give the folder .*, e\.g\. "):
        find_images(tmp_path / "beach.jpg")


@pytest.mark.parametrize("augmentation", ["paper", "crop"])
@pytest.mark.parametrize("preset", ["paper", "wide", "codiff_paper", "codiff_code"])
def test_items_have_the_promised_form_also_from_small_pictures(folder, augmentation, preset):
    items = dataset(folder, degradation=PRESETS[preset], augmentation=augmentation, downscale=(1.0, 2.0))
    for index in range(8):
        item = items[index]
        for name in ("clean", "degraded"):
            assert item[name].shape == (3, 64, 64) and item[name].dtype == torch.float32
            assert item[name].min() >= 0 and item[name].max() <= 1 and item[name].is_contiguous()
        assert item["quality"].dtype == torch.float32 and 0 <= item["quality"] <= 100
        assert item["index"] == index and item["path"].lower().endswith((".png", ".jpg"))


def test_an_item_is_a_function_of_seed_and_index(folder):
    first, second = dataset(folder, cache_mb=0), dataset(folder)
    for index in (17, 3, 40):
        second[index + 1]
        assert torch.equal(first[index]["degraded"], second[index]["degraded"])
        assert first[index]["path"] == second[index]["path"]
    assert not torch.equal(first[3]["clean"], dataset(folder, seed=1)[3]["clean"])


def test_every_epoch_shows_each_picture_once_in_its_own_order(folder):
    items = dataset(folder)
    epochs = [[items[epoch * 6 + step]["path"] for step in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(map(str, items.paths)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_degraded_is_aligned_with_clean_under_every_augmentation(folder):
    for augmentation in ("paper", "crop"):
        items = dataset(folder, degradation=CLEAR, augmentation=augmentation)
        assert all((items[i]["clean"] - items[i]["degraded"]).abs().mean() < 0.02 for i in range(20))


def test_crops_come_from_the_picture_and_flips_and_rotations_can_be_turned_off(tmp_path):
    """In a picture whose red rises to the right and green downwards, orientation and place can be read off a crop."""
    rows, columns = np.mgrid[:120, :140]
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(tmp_path / "ramp.png")
    plain = dataset(tmp_path, 32, CLEAR, flips=False, rotations=False)
    corners = set()
    for index in range(30):
        levels = (plain[index]["clean"] * 255).round()
        left, top = levels[0, 0, 0].item(), levels[1, 0, 0].item()
        assert torch.equal(levels[0, 0], left + torch.arange(32.0)) and torch.equal(
            levels[1, :, 0], top + torch.arange(32.0)
        )
        corners.add((left % 8, top % 8))
    assert len(corners) > 15
    turned = dataset(tmp_path, 32, CLEAR)
    slopes = set()
    for index in range(60):
        red = turned[index]["clean"][0] * 255
        slopes.add((round((red[0, 1] - red[0, 0]).item()), round((red[1, 0] - red[0, 0]).item())))
        slopes.add(("mirrored", bool(np.linalg.det(orientation(turned[index]["clean"])) < 0)))
    assert {(1, 0), (-1, 0), (0, 1), (0, -1), ("mirrored", True), ("mirrored", False)} == slopes


def orientation(clean):
    red, green = clean[0] * 255, clean[1] * 255
    return [[(c[0, 1] - c[0, 0]).item(), (c[1, 0] - c[0, 0]).item()] for c in (red, green)]


def test_paper_crops_are_bilinear_squares_of_a_fifth_to_all_of_the_area(tmp_path):
    """On a linear ramp a resized crop's slope is its source side over the crop side."""
    columns = np.tile(np.arange(200, dtype=np.uint8), (200, 1))
    Image.fromarray(columns).convert("RGB").save(tmp_path / "ramp.png")
    items = dataset(tmp_path, 64, CLEAR, augmentation="paper", flips=False, rotations=False)
    sides = np.array([((c := items[i]["clean"][0, 32] * 255)[52] - c[12]).item() / 40 * 64 for i in range(200)])
    areas = (sides / 200) ** 2
    assert 0.17 < areas.min() < 0.26 and 0.93 < areas.max() < 1.05 and abs(areas.mean() - 0.6) < 0.05


def test_half_of_codiffs_crops_have_their_blocks_off_the_grid(tmp_path):
    """Seen from outside: after a coarse compression, steps lie eight pixels apart, at the crop's edge or not."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize(
        (240, 240), Image.Resampling.BICUBIC
    )
    smooth.save(tmp_path / "smooth.png")
    law = replace(PRESETS["codiff_code"], quality_choices=(3,), choice_probability=1.0)
    items = dataset(tmp_path, 128, law, flips=False, rotations=False)
    phases = []
    for index in range(60):
        steps = (items[index]["degraded"][1].diff(dim=1)).abs().mean(dim=0)
        phases.append(int(torch.stack([steps[phase::8].mean() for phase in range(8)]).argmax()))
    aligned = np.mean(np.array(phases) == 7)
    assert 0.4 < aligned < 0.75 and len(set(phases)) >= 7


def test_small_pictures_are_mirrored_outwards(tmp_path):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(values).convert("RGB").save(tmp_path / "tiny.png")
    item = dataset(tmp_path, 8, CLEAR, flips=False, rotations=False)[0]
    expected = np.pad(values, 2, mode="symmetric")
    assert np.array_equal((item["clean"][0] * 255).round().numpy(), expected)


def test_broken_files_are_found_by_the_scan(folder, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture at all")
    (tmp_path / "empty.png").touch()
    good, broken = scan_images([*find_images(folder), tmp_path / "text.jpg", tmp_path / "empty.png"])
    assert good == find_images(folder)
    assert [path.name for path, _ in broken] == ["text.jpg", "empty.png"] and all(reason for _, reason in broken)


def test_a_picture_that_breaks_while_decoding_is_named_once_and_replaced(folder, tmp_path, caplog):
    whole = (folder / "deep" / "er" / "coffee.JPG").read_bytes()
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole[: len(whole) // 2])
    assert scan_images([cut])[0] == [cut], "the header is fine: only decoding tells"
    paths = [cut, *find_images(folder)]
    first, second = (PairDataset(paths, 32, PRESETS["wide"]) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        shown = [first[index]["path"] for index in range(21)]
    assert str(cut) not in shown and len(caplog.records) == 1 and "cut.jpg" in caplog.text
    for index in reversed(range(21)):
        assert second[index]["path"] == shown[index], "the substitute must not depend on what was seen before"
    with pytest.raises(RuntimeError, match="none of the 1"):
        PairDataset([cut], 32, PRESETS["wide"])[0]


def test_the_projects_torture_files_never_stop_a_run(caplog):
    paths = find_images(shared_path("data", "torture"))
    good, broken = scan_images(paths)
    assert len(good) + len(broken) == len(paths) and good
    items = PairDataset(good, 32, PRESETS["wide"])
    for index in range(len(good)):
        assert items[index]["degraded"].isfinite().all()


def test_pictures_come_upright_opaque_and_in_8_bits(tmp_path):
    levels = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels).convert("RGB").save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png")[..., 0], np.rot90(levels, -1))
    Image.fromarray(np.dstack([levels] * 3 + [255 - levels])).save(tmp_path / "alpha.png")
    assert np.array_equal(load_image(tmp_path / "alpha.png")[..., 1], levels)
    Image.fromarray(levels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(load_image(tmp_path / "deep.png")[..., 2], levels)


def test_the_cache_stays_within_its_bound_and_travels_empty(folder):
    items = dataset(folder, cache_mb=0.1)
    for index in range(12):
        items[index]
        assert items._cache.size <= 0.1 * 2**20
    assert sum(p.nbytes for p in items._cache._pictures.values()) == items._cache.size > 0
    copy = pickle.loads(pickle.dumps(items))
    assert copy._cache.size == 0 and torch.equal(copy[5]["degraded"], items[5]["degraded"])


def test_global_batches_are_the_same_for_any_number_of_processes():
    alone = list(IndexSampler(24, 70, batch=12))
    for world in (1, 2, 3, 4, 6):
        ranks = [list(IndexSampler(24, 70, rank, world, 12)) for rank in range(world)]
        share = 12 // world
        for batch in range(4):
            union = sorted(index for rank in ranks for index in rank[batch * share : (batch + 1) * share])
            assert union == alone[batch * 12 : (batch + 1) * 12]
        assert {len(rank) for rank in ranks} == {4 * share} == {len(IndexSampler(24, 70, 0, world, 12))}
    assert alone == list(range(24, 72)), "whole batches until `stop` is reached"
    assert list(IndexSampler(24, 24, batch=12)) == []
    with pytest.raises(ValueError, match="multiple of the processes"):
        IndexSampler(0, 10, 0, 3, 10)


def test_workers_change_nothing_and_leave_torchs_generator_alone(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    batches = [list(make_loader(dataset(folder, 32), IndexSampler(6, 18), 4, workers)) for workers in (0, 2)]
    assert torch.equal(state, torch.get_rng_state())
    for alone, worker in zip(*batches, strict=True):
        assert torch.equal(alone["index"], worker["index"]) and torch.equal(alone["degraded"], worker["degraded"])


def test_a_spawned_process_gives_the_same_item(folder):
    items = dataset(folder, 32)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.map(items.__getitem__, [9])[0]
    assert torch.equal(other["degraded"], items[9]["degraded"])


def test_a_resumed_run_sees_what_the_uninterrupted_one_would_have(folder):
    whole = torch.cat(
        [batch["degraded"] for batch in make_loader(dataset(folder, 32), IndexSampler(0, 12, batch=4), 4)]
    )
    rest = torch.cat([batch["degraded"] for batch in make_loader(dataset(folder, 32), IndexSampler(8, 12, batch=4), 4)])
    assert torch.equal(whole[8:], rest)


def test_wrong_options_are_refused_in_words(folder):
    with pytest.raises(ValueError, match="at least one picture"):
        PairDataset([], 64, CLEAR)
    with pytest.raises(ValueError, match="augmentation must be"):
        dataset(folder, augmentation="none")
    with pytest.raises(ValueError, match="downscale must be"):
        dataset(folder, downscale=(0.5, 1))
    with pytest.raises(ValueError, match="crop must be"):
        dataset(folder, crop=4)


def test_a_pair_is_made_again_from_its_picture_and_a_seed(folder):
    """As the sheet of `check` and docs/data.md say: picture, settings and seed are all that it takes."""
    items = dataset(folder, degradation=PRESETS["web"], seed=7, downscale=(1.0, 2.0))
    for index in (0, 5, 31):
        path, pair = items.pair(index)
        again = draw_pair(load_image(path), CropSettings(64, PRESETS["web"], downscale=(1.0, 2.0)), [7, 1, index])
        assert np.array_equal(pair.image, again.image) and np.array_equal(pair.clean, again.clean)
        assert pair.description == again.description
        item = items[index]
        assert item["path"] == str(path) and item["quality"] == pair.quality
        assert np.array_equal((item["degraded"] * 255).round().byte().permute(1, 2, 0).numpy(), pair.image)


def noisy_picture():
    """Smooth and rough parts from whole numbers alone, the same everywhere."""
    rows, columns = np.mgrid[:150, :170]
    rough = np.random.default_rng(1).integers(0, 60, (150, 170, 3))
    return ((rows[..., None] * [3, 1, 2] + columns[..., None] * [1, 2, 3] + rough) % 256).astype(np.uint8)


@pytest.mark.parametrize(
    "preset, augmentation, expected",
    [
        ("paper", "paper", "72239406916105c3"),
        ("paper", "crop", "0d9bb3f04ad5d27e"),
        ("wide", "paper", "751694c049e2988b"),
        ("wide", "crop", "2f6653763b4a150a"),
        ("codiff_paper", "paper", "e80b691291929b19"),
        ("codiff_paper", "crop", "ea8c7179a0ec0dc9"),
        ("codiff_code", "paper", "48d86e9669a31d5a"),
        ("codiff_code", "crop", "d50b82fe27d25383"),
    ],
)
def test_pairs_are_those_of_the_first_version(preset, augmentation, expected):
    """Trainings go on across versions: the pixels of pairs stay, bit by bit. The numbers are the first version's."""
    settings = CropSettings(48, PRESETS[preset], augmentation, downscale=(1.0, 2.0))
    digest = hashlib.sha256()
    for index in range(12):
        pair = draw_pair(noisy_picture(), settings, [3, 1, index])
        digest.update(pair.clean.tobytes() + pair.image.tobytes() + bytes([pair.quality]))
    assert digest.hexdigest()[:16] == expected


def test_workers_leave_the_first_sigterm_to_the_trainer(folder):
    """It often goes to every process of a group; a second one ends a worker, as what ends hanging ones needs it to."""
    alone = [batch["degraded"] for batch in make_loader(dataset(folder, 32), IndexSampler(0, 40), 4)]
    loader = iter(make_loader(dataset(folder, 32), IndexSampler(0, 40), 4, 2, prefetch=1))
    batches = [next(loader), next(loader)]  # both workers have begun
    workers = loader._workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    batches += loader
    assert all(torch.equal(one, other["degraded"]) for one, other in zip(alone, batches, strict=True))
    loader = iter(make_loader(dataset(folder, 32), IndexSampler(0, 40), 4, 1, prefetch=1))
    next(loader)
    worker = loader._workers[0]
    with contextlib.suppress(RuntimeError):  # torch's, of a worker that was killed; it comes at any moment
        for _ in range(50):
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)
                worker.join(0.2)
    worker.join(5)
    assert worker.exitcode == -signal.SIGTERM


def test_a_loader_that_an_error_left_behind_does_not_keep_the_trainer_from_ending(folder):
    """Something still holds it when Python ends, as the frames of a traceback do."""
    script = (
        "import builtins, sys\n"
        "from training.data.pairs import *\nfrom training.data.pictures import *\n"
        "from training.degradation import PRESETS\n"
        "items = PairDataset(find_images(sys.argv[1]), 32, PRESETS['wide'])\n"
        "builtins.kept = iter(make_loader(items, IndexSampler(0, 4000), 4, 2))\n"
        "next(builtins.kept), next(builtins.kept)\n"
        "type(builtins.kept).__del__ = lambda self: None\n"
        "raise SystemExit(3)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, timeout=60, check=False)
    assert ended.returncode == 3


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_when_the_trainer_was_killed(folder):
    script = (
        "import sys, time\n"
        "from training.data.pairs import *\nfrom training.data.pictures import *\n"
        "from training.degradation import PRESETS\n"
        "items = PairDataset(find_images(sys.argv[1]), 32, PRESETS['wide'])\n"
        "loader = iter(make_loader(items, IndexSampler(0, 4000), 4, 2))\n"
        "next(loader)\n"
        "print(*(worker.pid for worker in loader._workers), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, cwd=ROOT) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
