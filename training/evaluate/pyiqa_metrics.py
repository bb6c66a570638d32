"""Metrics of the optional package pyiqa, where it is installed and its weights are in its cache: nothing is fetched."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from restoration.niqe import BLOCK, LEAST_BLOCKS

NAMES = {
    "lpips_alex": "lpips",
    "dists": "dists",
    "niqe": "niqe",
    "musiq": "musiq",
    "maniqa": "maniqa",
    "clipiqa": "clipiqa",
}
"""Our names -> pyiqa's."""
OLDEST = (0, 1, 13)
"""CODiff's; before it MANIQA looked at random places, and had another scale."""
_SMALL = 224
"""Below, an error of a network is taken for that of a picture which is too small for it."""
_ADDRESS = re.compile(r"https?://\S+\.(?:pth?|bin|mat|safetensors)\b")


@dataclass(frozen=True)
class Available:
    """A metric of pyiqa: the package's version, and from a picture and the clean one (1,3,H,W) to a number."""

    version: str
    compare: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Unavailable:
    """What to do so that a metric of pyiqa is there."""

    reason: str


class DownloadRefusedError(OSError):
    """Something was about to be fetched: `wanted` is the file that it would become, None where that is not known."""

    def __init__(self, message: str, wanted: Path | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted


def create(name: str, device: torch.device) -> Available | Unavailable:
    """One of `NAMES` on a device, or what it lacks.

    pyiqa unpickles the files of its cache: they are to be trusted.
    """
    if importlib.util.find_spec("pyiqa") is None:
        return Unavailable("install pyiqa (pip install pyiqa)")
    version = importlib.metadata.version("pyiqa")
    if _numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Unavailable(f"pyiqa is {version}, whose values differ: install {oldest} or newer (pip install -U pyiqa)")
    try:
        package = importlib.import_module("pyiqa")
        with no_downloads(), contextlib.redirect_stdout(io.StringIO()):
            network = package.create_metric(NAMES[name], device=device)
    except ImportError as error:
        return Unavailable(f"pyiqa {version}: {error}. Install it; pkg_resources is in setuptools before 81")
    except (OSError, RuntimeError, ValueError) as error:
        fetch = f"python -c \"import pyiqa; pyiqa.create_metric('{NAMES[name]}')\""
        return Unavailable(f"pyiqa {version}: {_lack(error)}. To have it fetch what it needs: {fetch}")
    return Available(version, _comparing(NAMES[name], network))


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Refuse downloads inside: torch.hub's and CLIP's by the file, the Hugging Face hub's, and all others by the host.

    Raises:
        DownloadRefusedError: Inside, in place of the download; libraries may wrap it in an error of their own.
    """
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            ("torch.hub", "download_url_to_file", _refuse_file),
            ("pyiqa.utils.download_util", "download_url_to_file", _refuse_file),
            ("urllib.request", "urlopen", _refuse_url),
            ("huggingface_hub.constants", "HF_HUB_OFFLINE", True),
            ("socket", "getaddrinfo", _refuse_host),
        ):
            if hasattr(sys.modules.get(module), name):
                stack.enter_context(_replaced(sys.modules[module], name, value))
        yield


def _refuse_file(url: str, dst: str, *_: Any, **__: Any) -> NoReturn:
    raise DownloadRefusedError(f"{url} is not fetched", Path(dst))


def _refuse_url(url: Any, *_: Any, **__: Any) -> NoReturn:
    raise DownloadRefusedError(f"{getattr(url, 'full_url', url)} is not fetched")


def _refuse_host(host: Any, *_: Any, **__: Any) -> NoReturn:
    raise DownloadRefusedError(f"nothing is fetched from {host}")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _comparing(name: str, network: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of two pictures; ValueError where they are too small."""
    pair = network.metric_mode == "FR"

    def compare(picture: Tensor, clean: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        if name == "niqe" and (height // BLOCK) * (width // BLOCK) < LEAST_BLOCKS:
            raise ValueError(f"expected at least {LEAST_BLOCKS} blocks of {BLOCK}x{BLOCK} pixels, got {width}x{height}")
        try:
            return network(picture, clean) if pair else network(picture)
        except (AssertionError, IndexError, RuntimeError) as error:
            if min(height, width) >= _SMALL or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(f"pyiqa refuses a picture of {width}x{height}: {error}") from error

    return compare


def _lack(error: BaseException) -> str:
    """The file that was refused, or its address, if the causes name one; else the error's own words."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DownloadRefusedError) and cause.wanted is not None:
            return f"{cause.wanted.name} is not in {cause.wanted.parent}"
        if address := _ADDRESS.search(str(cause)):
            return f"{address[0]} is not on this machine"
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
