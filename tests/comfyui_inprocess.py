"""ComfyUI's own executor inside the test process: its validation, its caches, its errors, without a server."""

from __future__ import annotations

import asyncio
import copy
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from restoration.devices import accelerator_available
from tools.setup_env import ROOT

Prompt = dict[str, dict[str, Any]]


@dataclass
class Run:
    """What became of one prompt: `outputs` by node id and slot, `error` the message of the node that failed."""

    success: bool
    outputs: Callable[[str], list[Any]]
    error: str | None = None
    error_node: str | None = None
    validation: dict[str, list[str]] = field(default_factory=dict)
    interrupted: bool = False
    events: list[tuple[str, Any]] = field(default_factory=list)
    progress: list[tuple[float, float, Any]] = field(default_factory=list)
    seconds: float = 0.0


class _Server:
    """The little of PromptServer that the executor uses."""

    def __init__(self) -> None:
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sockets_metadata: dict[str, Any] = {}
        self.events: list[tuple[str, Any]] = []

    def send_sync(self, event: str, data: Any, client: str | None = None) -> None:
        self.events.append((event, data))


class ComfyUI:
    """One ComfyUI with this pack, its folders below `base`; made once a process."""

    def __init__(self, comfyui: Path, base: Path) -> None:
        self.base = base
        sys.path.insert(0, str(comfyui))
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = not accelerator_available()  # before anything else of ComfyUI is imported
        args.base_directory = str(base)
        import comfy.utils
        import execution
        import folder_paths

        import nodes

        for kind in ("input", "output", "temp", "user"):
            (base / kind).mkdir(parents=True, exist_ok=True)
            getattr(folder_paths, f"set_{kind}_directory")(str(base / kind))
        self.nodes, self.execution, self.folder_paths = nodes, execution, folder_paths
        asyncio.run(self._load())
        self.server = _Server()
        caches = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self.executor = execution.PromptExecutor(self.server, cache_type=execution.CacheType.CLASSIC, cache_args=caches)
        self.on_progress: Callable[[float, float, Any], None] | None = None
        self._progress: list[tuple[float, float, Any]] = []
        comfy.utils.set_progress_bar_global_hook(self._hook)

    @property
    def pack(self) -> str:
        """The name in `sys.modules` under which ComfyUI loaded the pack."""
        return self.nodes.NODE_CLASS_MAPPINGS["LoadJPEG"].__module__.removesuffix(".nodes.files")

    def forget(self) -> None:
        """Empty the executor's caches, so that every node runs again."""
        self.executor.reset()

    def run(self, prompt: Prompt) -> Run:
        """Validate and execute a prompt in API format; errors are in the result, as a user would see them."""
        prompt = copy.deepcopy(prompt)  # ComfyUI writes fingerprints into it
        started, number = time.perf_counter(), str(uuid.uuid4())
        self.server.events, self._progress = [], []
        valid, error, outputs, node_errors = asyncio.run(self.execution.validate_prompt(number, prompt, None))
        if not valid:
            details = {key: [e["details"] for e in value["errors"]] for key, value in node_errors.items()}
            return Run(False, lambda _: [], error["message"], validation=details)
        self.executor.execute(prompt, number, {"client_id": "test"}, outputs)
        messages = dict(self.executor.status_messages)
        failure = messages.get("execution_error", {})
        return Run(
            success=self.executor.success and "execution_success" in messages,
            outputs=self._outputs,
            error=failure.get("exception_message", "").strip() or None,
            error_node=failure.get("node_type"),
            interrupted="execution_interrupted" in messages,
            events=self.server.events,
            progress=self._progress,
            seconds=time.perf_counter() - started,
        )

    def interrupt(self) -> None:
        """What POST /interrupt does."""
        self.nodes.interrupt_processing()

    def _outputs(self, node: str) -> list[Any]:
        entry = asyncio.run(self.executor.caches.outputs.get(node))
        return [slot[0] for slot in entry.outputs]

    def _hook(self, value: float, total: float, preview: Any, prompt_id: Any = None, node_id: Any = None) -> None:
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self._progress.append((value, total, preview))
        if self.on_progress is not None:
            self.on_progress(value, total, preview)

    async def _load(self) -> None:
        await self.nodes.init_public_apis()
        import comfy_extras

        extras = Path(comfy_extras.__file__ or comfy_extras.__path__[0])
        folder = extras.parent if extras.is_file() else extras
        for name in ("nodes_images.py", "nodes_image_compare.py", "nodes_model_advanced.py"):
            assert await self.nodes.load_custom_node(str(folder / name), module_parent="comfy_extras")
        assert await self.nodes.load_custom_node(str(ROOT)), "ComfyUI could not import the pack; see the log above"
