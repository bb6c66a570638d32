"""Odd and broken JPEGs of other decoders: each loads or is refused; none hangs, crashes or eats the memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT, shared_path

SECONDS_PER_FILE = 20
BYTES_ABOVE_BASELINE = 2 << 30

# Loaded files whose pixels Pillow makes otherwise than from the coefficients alone.
EXCEPTIONS = {
    # an incomplete progressive file: libjpeg guesses missing coefficients from the neighbours ("block smoothing")
    "jd-crash__b55977028a3a574336966b6536640fc9.jpg",
    # damaged blocks with samples far outside 0..255, where libjpeg's table of 8-bit values wraps around (46 pixels)
    "pil__hopper_bad_exif.jpg",
}

PROGRAM = """
import json, resource, signal, sys, warnings
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from restoration.jpeg import JPEGError, decode, read_jpeg_and_pixels
with open("/proc/self/statm") as file:
    baseline = int(file.read().split()[0]) * resource.getpagesize()
limit = baseline + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[3:]:
    signal.alarm(int(sys.argv[1]))
    try:
        jpeg, pixels = read_jpeg_and_pixels(path)
        error = (decode(jpeg.coefficients)[0] - pixels).abs() * 255
        result = [path, "loaded", float(error.mean()), float(error.max())]
    except JPEGError as refusal:
        result = [path, "refused", str(refusal)]
    print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    """What one guarded process makes of every file, by file name."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the memory guard needs Linux: run this test there")
    folder = shared_path("data", "torture")
    paths = [str(path) for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".tsv")]
    arguments = [sys.executable, "-c", PROGRAM, str(SECONDS_PER_FILE), str(BYTES_ABOVE_BASELINE), *paths]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    missing = paths[len(lines)] if len(lines) < len(paths) else "no file"
    assert done.returncode == 0, f"ended by {done.returncode} at {missing}: {done.stderr[-2000:]}"
    return {Path(line[0]).name: line[1:] for line in lines}


def test_no_file_hangs_crashes_or_exceeds_two_gigabytes(results: dict[str, list]) -> None:
    assert len(results) >= 80


def test_loaded_files_decode_as_pillow_decodes_them(results: dict[str, list]) -> None:
    loaded = {name: result[1:] for name, result in results.items() if result[0] == "loaded"}
    assert len(loaded) >= 55
    wrong = {name: error for name, error in loaded.items() if error[0] > 0.5 or error[1] > 3.01}
    assert set(wrong) <= EXCEPTIONS, wrong
    assert all(error[0] < 0.5 for error in wrong.values())


def test_refusals_are_one_sentence_that_names_the_file_and_a_remedy(results: dict[str, list]) -> None:
    refused = {name: result[1] for name, result in results.items() if result[0] == "refused"}
    assert len(refused) >= 25
    for name, sentence in refused.items():
        assert sentence.startswith(name) and ": " in sentence and "\n" not in sentence and "<_io" not in sentence


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("syn__huge_dims_65500x65500.jpg", "holds only 8288 bytes"),
        ("syn__zero_height.jpg", "213x0"),
        ("syn__cut_at_50pct.jpg", "cut short"),
        ("jd__MR4.jpg", "lossless"),
        ("ljt__testimgari.jpg", "arithmetic"),
        ("pil__pil_sample_cmyk.jpg", "CMYK"),
        ("jd__jpg-size-6x6.jpg", "not a JPEG"),
    ],
)
def test_the_reason_of_a_refusal_is_the_true_one(results: dict[str, list], name: str, complaint: str) -> None:
    assert results[name][0] == "refused" and complaint in results[name][1]
