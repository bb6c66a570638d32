"""Metrics of the optional package pyiqa, where it is installed and its weights are in its cache: nothing is fetched."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

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
    """Something was about to be fetched: `wanted` is the file that it would become, or None where only a host is known."""

    def __init__(self, message: str, wanted: Path | None = None) -> None:
        super().__init__(message)
        self.wanted = wanted


def create(name: str, device: torch.device) -> Available | Unavailable:
    """One of `NAMES` on a device, or what it lacks."""
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
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return Unavailable(f"pyiqa {version}: {_what_to_do(error)}")
    return Available(version, _comparing(network))


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Refuse downloads inside: those of torch.hub by the file's name, all others where they look up an address.

    Raises:
        DownloadRefusedError: Inside, in place of the download; libraries may wrap it in an error of their own.
    """

    def refuse_file(url: str, dst: str, *_: Any, **__: Any) -> NoReturn:
        raise DownloadRefusedError(f"{url} is not fetched", Path(dst))

    def refuse_address(host: Any, *_: Any, **__: Any) -> NoReturn:
        raise DownloadRefusedError(f"nothing is fetched from {host}")

    with contextlib.ExitStack() as stack:
        for module in ("torch.hub", "pyiqa.utils.download_util"):
            if module in sys.modules:
                stack.enter_context(_replaced(sys.modules[module], "download_url_to_file", refuse_file))
        stack.enter_context(_replaced(socket, "getaddrinfo", refuse_address))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _comparing(network: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of two pictures, whose complaints are ValueErrors."""
    pair = network.metric_mode == "FR"

    def compare(picture: Tensor, clean: Tensor) -> Tensor:
        try:
            return network(picture, clean) if pair else network(picture)
        except (AssertionError, IndexError) as error:
            raise ValueError(f"pyiqa refuses a picture of {picture.shape[-1]}x{picture.shape[-2]}: {error}") from error

    return compare


def _what_to_do(error: BaseException) -> str:
    """The file that was refused, if one is among the causes, else the error's own words."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, DownloadRefusedError) and cause.wanted is not None):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, DownloadRefusedError) and cause.wanted is not None:
        return f"put {cause.wanted.name} into {cause.wanted.parent} (TORCH_HOME moves this folder)"
    return " ".join(str(error).split())[:300] or type(error).__name__


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
