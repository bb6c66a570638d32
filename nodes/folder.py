"""The node that loads the JPEGs of a folder, one after the other, with their names."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..restoration.compute import Progress
from ..restoration.jpeg import JPEGData, JPEGError
from ..restoration.pictures import PictureError
from .files import SUFFIXES, load_picture
from .images import join_image
from .runtime import ProgressReport, image_device, show_text
from .types import JPEGDataSocket, NoJPEG, errors_of

BROKEN = ("skip", "stop")
_MOST = 100_000
_NAMED = 10
"""Files that are named on the node where more are broken."""


class LoadJPEGFolder(io.ComfyNode):
    """All pictures of a folder, as lists: what is connected runs once for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadJPEGFolder",
            display_name="Load JPEG Folder",
            category="image/restoration",
            description="Loads the JPEGs of a folder inside of ComfyUI's input folder, each as Load JPEG does, of any "
            "sizes. What is connected runs once for each file. Connect name to filename_prefix of Save Image, and "
            "results keep the names and sub-folders of their files. All pictures of a run are in memory at once: take "
            "large folders in parts, with start and count.",
            search_aliases=["batch", "load folder", "directory", "jpg folder", "image list", "many jpegs"],
            inputs=_inputs(),
            outputs=[
                io.Image.Output("IMAGE", is_output_list=True, tooltip="The pictures, each turned upright."),
                JPEGDataSocket.Output(
                    "JPEG_DATA",
                    is_output_list=True,
                    tooltip="What each file holds without loss; restorers keep their result consistent with it. Of "
                    "other pictures it says that they are no JPEGs.",
                ),
                io.Float.Output(
                    "quality",
                    display_name="quality",
                    is_output_list=True,
                    tooltip="The quality of each, 1 to 100: of JPEGs read off their tables, of others estimated.",
                ),
                io.String.Output(
                    "name",
                    display_name="name",
                    is_output_list=True,
                    tooltip="The name of each, with its folders below the chosen one and without ending.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, folder: str, subfolders: bool, start: int, count: int, broken: str) -> io.NodeOutput:
        with errors_of("LoadJPEGFolder"):
            root = _folder(folder)
            loaded = _load(root, _chosen(root, subfolders, start, count), stop=broken == "stop")
        text = _described(loaded)
        show_text(cls.hidden.unique_id, text)
        lists = (loaded.images, loaded.jpegs, loaded.qualities, loaded.names)
        return io.NodeOutput(*lists, ui=ui.PreviewText(text))

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        try:
            if folder is not None:
                _folder(folder)
        except JPEGError as error:
            return f"LoadJPEGFolder: {error}"
        return True

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None = None, subfolders: bool = True, start: int = 0, count: int = 0, **_: Any
    ) -> str:
        """Names, times and sizes of the files."""
        try:
            root = _folder(folder or "")
            states = [(name, os.stat(root / name)) for name in _chosen(root, subfolders, start, count)]
        except (JPEGError, OSError):
            return ""
        described = "\n".join(f"{name}\t{state.st_mtime_ns}\t{state.st_size}" for name, state in states)
        return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()


def _inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "folder",
            default="",
            tooltip="A folder inside of ComfyUI's input folder, such as holiday or holiday/day 2; empty for the input "
            "folder itself.",
        ),
        io.Boolean.Input("subfolders", default=True, tooltip="Whether the folders in it are taken, too."),
        io.Int.Input(
            "start", default=0, min=0, max=_MOST, tooltip="How many files are left out at the beginning, by name."
        ),
        io.Int.Input(
            "count", default=0, min=0, max=_MOST, tooltip="How many files are loaded from there on; 0 for all."
        ),
        io.Combo.Input(
            "broken",
            options=list(BROKEN),
            default=BROKEN[0],
            tooltip="What happens with files that cannot be read. skip: they are left out and named on the node. stop: "
            "the first one ends the run, before anything is restored.",
        ),
    ]


@dataclass
class _Loaded:
    """What the lists hold, and what was wrong with files that are left out."""

    images: list[Tensor] = field(default_factory=list)
    jpegs: list[list[JPEGData | NoJPEG]] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def _load(root: Path, names: list[str], *, stop: bool) -> _Loaded:
    loaded, report = _Loaded(), ProgressReport()
    for number, name in enumerate(names):
        report(Progress(number / len(names), None))
        try:
            upright, jpeg, quality = load_picture(str(root / name))
        except (JPEGError, PictureError) as error:
            said = f"{name.removesuffix(PurePosixPath(name).name)}{error}"
            if stop:
                raise ValueError(f"{said}, or set broken to skip.") from error
            loaded.broken.append(said)
            continue
        loaded.images.append(join_image(upright, None, image_device()))
        loaded.jpegs.append([jpeg])
        loaded.qualities.append(quality)
        loaded.names.append(str(PurePosixPath(name).with_suffix("")))
    if not loaded.images:
        raise ValueError(f"none of the {len(names)} files in {root.name!r} can be read; {loaded.broken[0]}.")
    report(Progress(1.0, None))
    return loaded


def _folder(name: str) -> Path:
    """The folder inside of ComfyUI's input folder.

    Raises:
        JPEGError: It lies outside, or is not there.
    """
    inputs = Path(os.path.abspath(folder_paths.get_input_directory()))
    root = Path(os.path.abspath(inputs / name.strip()))
    if root != inputs and inputs not in root.parents:
        raise JPEGError(
            f"expected a folder inside of ComfyUI's input folder, got {name!r}, which lies outside. Copy or link your "
            "folder into the input folder, and give its name there."
        )
    if not root.is_dir():
        raise JPEGError(f"there is no folder {name!r} in ComfyUI's input folder. Put your JPEGs into one there.")
    return root


def _chosen(root: Path, subfolders: bool, start: int, count: int) -> list[str]:
    """The pictures below a folder by name, relative to it, with "/" between the parts.

    Raises:
        JPEGError: There are none.
    """
    names = _pictures_below(root, subfolders)
    chosen = names[start : start + count if count else None]
    if not names:
        more = "" if subfolders else ", or turn subfolders on"
        raise JPEGError(f"there is no JPEG or other picture in the folder {root.name!r}. Choose another one{more}.")
    if not chosen:
        raise JPEGError(f"expected start to be less than {len(names)}, the number of pictures, got {start}. Lower it.")
    return chosen


def _pictures_below(root: Path, subfolders: bool) -> list[str]:
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if subfolders and not name.startswith(".")]
        within = Path(folder).relative_to(root)
        found += [
            (within / name).as_posix()
            for name in files
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _described(loaded: _Loaded) -> str:
    """How many pictures, and which files were left out and why."""
    lines = [f"{len(loaded.images)} {'picture' if len(loaded.images) == 1 else 'pictures'}"]
    if loaded.broken:
        lines[0] += f", {len(loaded.broken)} left out:"
        lines += loaded.broken[:_NAMED]
        lines += [f"and {len(loaded.broken) - _NAMED} more"] if len(loaded.broken) > _NAMED else []
    return "\n".join(lines)
