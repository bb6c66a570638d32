"""Metrics of the optional package pyiqa, by packages that pass for it: found, measured, and nothing is fetched."""

import http.client
import socket
import sys
import urllib.request
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from shared import shared_path

from training.evaluate.metrics import MetricFiles, NotMeasuredError, find_metrics
from training.evaluate.pyiqa_metrics import DownloadRefusedError, no_downloads

CPU = torch.device("cpu")


def by_name(metrics):
    return {metric.name: metric for metric in metrics.single}


def write_pyiqa(folder: Path, version: str, body: str) -> None:
    """A package of this name that pip seems to have installed."""
    (folder / "pyiqa" / "utils").mkdir(parents=True)
    (folder / "pyiqa" / "__init__.py").write_text(f"from .utils import download_util\n{body}", encoding="utf-8")
    (folder / "pyiqa" / "utils" / "__init__.py").touch()
    (folder / "pyiqa" / "utils" / "download_util.py").write_text(
        "from torch.hub import download_url_to_file\n", encoding="utf-8"
    )
    information = folder / f"pyiqa-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pyiqa\nVersion: {version}\n", encoding="utf-8")


@pytest.fixture
def pyiqa(tmp_path, monkeypatch):
    """Writes a package with the given version and code, which is forgotten after the test."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pyiqa"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda version, body: write_pyiqa(tmp_path, version, body)
    for name in [name for name in sys.modules if name.split(".")[0] == "pyiqa"]:
        del sys.modules[name]


WORKING = """
class Network:
    def __init__(self, name):
        self.name, self.metric_mode = name, "FR" if name in ("lpips", "dists") else "NR"
    def __call__(self, *pictures):
        assert pictures[0].shape[-1] >= 32, "too narrow"
        return sum((index + 1) * picture.mean() for index, picture in enumerate(pictures))
def create_metric(name, device):
    print("Loading pretrained model")
    if name == "maniqa":
        download_util.download_url_to_file("https://example.invalid/a/maniqa.pt", "cache/maniqa.pt", hash_prefix=None)
    if name == "clipiqa":
        import urllib.request
        try:
            urllib.request.urlopen("https://example.invalid/RN50.pt")
        except OSError as error:
            raise RuntimeError("could not load RN50") from error
    return Network(name)
"""


def test_metrics_of_pyiqa_are_measured_and_their_downloads_refused(pyiqa, capsys):
    pyiqa("0.1.14", WORKING)
    metrics = find_metrics(MetricFiles(), CPU)
    found = by_name(metrics)
    assert tuple(found)[-4:] == ("lpips_alex", "dists", "niqe", "musiq")
    assert found["musiq"].variant == "pyiqa 0.1.14, koniq10k" and found["musiq"].better == "higher"
    picture, clean = torch.full((1, 3, 40, 40), 0.5), torch.full((1, 3, 40, 40), 0.25)
    assert found["musiq"].measure(picture, None) == pytest.approx(0.5)
    assert found["lpips_alex"].measure(picture, clean) == pytest.approx(1.0)
    reasons = {missing.label: missing.reason for missing in metrics.missing}
    assert reasons["MANIQA"].startswith(
        "pyiqa 0.1.14: maniqa.pt is not in cache. To have it fetch what it needs: python"
    )
    assert reasons["CLIPIQA"].startswith("pyiqa 0.1.14: https://example.invalid/RN50.pt is not on this machine. ")
    assert "create_metric('clipiqa')" in reasons["CLIPIQA"]
    with pytest.raises(NotMeasuredError, match="MUSIQ: pyiqa refuses a picture of 20x40: too narrow"):
        found["musiq"].measure(picture[..., :20], None)
    assert not capsys.readouterr().out


def test_files_of_ones_own_come_before_pyiqas(pyiqa):
    pyiqa("0.1.14", WORKING)
    niqe = shared_path("weights", "niqe", "niqe_pris_params.npz")
    assert "pyiqa" not in by_name(find_metrics(MetricFiles(niqe=niqe), CPU, wanted=["niqe"]))["niqe"].variant


@pytest.mark.parametrize(
    ("version", "body", "words"),
    [("0.1.9", WORKING, "pyiqa is 0.1.9, whose values differ: install 0.1.13 or newer"),
     ("0.2", "import a_package_that_is_not_there", "pyiqa 0.2: No module named 'a_package_that_is_not_there'")],
)  # fmt: skip
def test_a_pyiqa_that_does_not_do_is_named_with_what_to_do(pyiqa, version, body, words):
    pyiqa(version, body)
    (missing,) = find_metrics(MetricFiles(), CPU, wanted=["musiq"]).missing
    assert words in missing.reason


def test_nothing_is_fetched_inside_and_all_is_as_before_after(tmp_path):
    def replaced():
        hub = huggingface_hub.constants.HF_HUB_OFFLINE
        return socket.getaddrinfo, torch.hub.download_url_to_file, urllib.request.urlopen, hub

    before = replaced()
    with no_downloads():
        with pytest.raises(DownloadRefusedError) as caught:
            torch.hub.load_state_dict_from_url("https://example.invalid/vgg16.pth", model_dir=str(tmp_path))
        assert caught.value.wanted == tmp_path / "vgg16.pth"
        with pytest.raises(OSError, match=r"https://example\.invalid/weights\.pth is not fetched"):
            urllib.request.urlopen("https://example.invalid/weights.pth", timeout=5)
        assert huggingface_hub.constants.HF_HUB_OFFLINE is True
        with pytest.raises(OSError, match=r"nothing is fetched from example\.invalid"):
            http.client.HTTPSConnection("example.invalid", timeout=5).connect()
    assert replaced() == before


def test_errors_of_large_pictures_and_of_full_memory_are_not_taken_for_small_pictures(pyiqa):
    pyiqa("0.1.14", WORKING.replace("return sum", "raise RuntimeError('broken'); return sum"))
    musiq = by_name(find_metrics(MetricFiles(), CPU, wanted=["musiq"]))["musiq"]
    with pytest.raises(NotMeasuredError, match="MUSIQ: pyiqa refuses a picture of 40x300: broken"):
        musiq.measure(torch.zeros(1, 3, 300, 40), None)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        musiq.measure(torch.zeros(1, 3, 300, 300), None)


def test_niqe_of_few_blocks_is_left_out_as_by_ones_own(pyiqa):
    pyiqa("0.1.14", WORKING)
    niqe = by_name(find_metrics(MetricFiles(), CPU, wanted=["niqe"]))["niqe"]
    assert niqe.measure(torch.zeros(1, 3, 200, 200), None) == 0
    with pytest.raises(NotMeasuredError, match="NIQE: expected at least 4 blocks of 96x96 pixels, got 191x200"):
        niqe.measure(torch.zeros(1, 3, 200, 191), None)
