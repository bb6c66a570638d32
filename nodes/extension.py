"""The pack's entry point and the list of its nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .color import JPEGMatchColor
from .compress import JPEGCompress
from .consistency import JPEGConsistency
from .ddrm import DDRMJPEGRestore
from .driftrec import DriftRecSample
from .files import LoadJPEG, LoadJPEGRestorer
from .folder import LoadJPEGFolder
from .latent import JPEGToLatent
from .loading import register_restorer_folders
from .one_step import CaVEEmbed, OneStepDenoise
from .restore import RestoreJPEG
from .sodiff import QFTimestepPredict, SAIPEPrompt


class JPEGRestorerExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def on_load(self) -> None:
        register_restorer_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadJPEG,
            LoadJPEGFolder,
            LoadJPEGRestorer,
            JPEGToLatent,
            CaVEEmbed,
            SAIPEPrompt,
            QFTimestepPredict,
            OneStepDenoise,
            DriftRecSample,
            DDRMJPEGRestore,
            RestoreJPEG,
            JPEGConsistency,
            JPEGCompress,
            JPEGMatchColor,
        ]


async def comfy_entrypoint() -> JPEGRestorerExtension:
    """Called once by ComfyUI when it loads the pack."""
    return JPEGRestorerExtension()
