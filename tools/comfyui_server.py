"""A headless ComfyUI with this pack in it, in a folder of its own: `with ComfyUIServer() as server: ...`."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from restoration.devices import accelerator_available
from tools.setup_env import PYTHON, ROOT, comfyui_dir

PACK = "comfyui-jpeg-restorer"
PARTS = ("__init__.py", "nodes", "restoration", "weights", "web", "example_workflows", "locales", "pyproject.toml")
NODES = (
    "LoadJPEG",
    "LoadJPEGFolder",
    "LoadJPEGRestorer",
    "CaVEEmbed",
    "SAIPEPrompt",
    "QFTimestepPredict",
    "OneStepDenoise",
    "DriftRecSample",
    "DDRMJPEGRestore",
    "RestoreJPEG",
    "JPEGConsistency",
    "JPEGCompress",
    "JPEGMatchColor",
    "JPEGToLatent",
)
LOG_LINES = 25


class ServerError(RuntimeError):
    """ComfyUI did not start, or not with this pack; the message ends with what it logged last."""


class ComfyUIServer:
    """ComfyUI as a process of its own, with its models, input and output in the folder `base`, which goes when it goes.

    Entering starts it and waits until it has this pack's nodes; leaving ends it with all that it started, also after
    Ctrl-C and SIGTERM.

    Args:
        comfyui: A folder with ComfyUI; by default the one of `setup_env`.
        timeout: Seconds to wait for the start.

    Raises:
        ServerError: It did not start in time, or could not import the pack.
    """

    def __init__(self, comfyui: Path | None = None, timeout: float = 240) -> None:
        self.comfyui, self.timeout = comfyui or comfyui_dir(), timeout
        self.host, self.port = "127.0.0.1", 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ComfyUIServer:
        self.base = Path(tempfile.mkdtemp(prefix="jpeg-restorer-comfyui-")).resolve()
        self.log = self.base / "server.log"
        self._handlers = _terminate_by_exception()
        try:
            self._start()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._process is not None:
                _end_group(self._process)
        finally:
            shutil.rmtree(self.base, ignore_errors=True)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def input(self) -> Path:
        return self.base / "input"

    @property
    def output(self) -> Path:
        return self.base / "output"

    def get(self, path: str, timeout: float = 30) -> bytes:
        """The body of GET `path`."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as answer:
            return answer.read()

    def post(self, path: str, value: Any) -> Any:
        """The answer to POST `path` of a JSON value; None where it is empty."""
        body, header = json.dumps(value).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, header, method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def last_log_lines(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-LOG_LINES:])

    def _start(self) -> None:
        for name in ("input", "output", "temp", "user", "custom_nodes", "models"):
            (self.base / name).mkdir()
        _install_pack(self.base / "custom_nodes" / PACK)
        self.port = _free_port()
        command = [
            str(PYTHON), "main.py", "--base-directory", str(self.base), "--listen", self.host, "--port", str(self.port),
            "--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
            *([] if accelerator_available() else ["--cpu"]),
        ]  # fmt: skip
        # Threads that wait by spinning make it twenty times slower on a machine that is busy with something else.
        settings = {"PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        group: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            group = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **group,
            )

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise ServerError(f"ComfyUI ended with exit code {code} while starting:\n{self.last_log_lines()}")
            try:
                missing = [
                    name for name in NODES if name not in json.loads(self.get(f"/object_info/{name}", timeout=5))
                ]
            except (OSError, http.client.HTTPException, json.JSONDecodeError):
                time.sleep(0.2)
                continue
            if missing:
                raise ServerError(f"ComfyUI runs, but without {', '.join(missing)}:\n{self.last_log_lines()}")
            return
        raise ServerError(f"ComfyUI did not answer within {self.timeout:.0f} s:\n{self.last_log_lines()}")


def run_workflow(server: ComfyUIServer, workflow: Path) -> dict[str, list[str]]:
    """Run a workflow file, in the format of the editor or of the API, with comfy-cli and wait for its end.

    Returns:
        Addresses of the pictures that it made, by the id of the node that saved them.

    Raises:
        ServerError: It failed; the message is what the node said.
    """
    address = ("--host", server.host, "--port", str(server.port))
    result = comfy_cli("--json", "run", "--workflow", str(workflow), "--wait", *address)
    try:
        envelope = json.loads(result.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise ServerError(f"comfy run ended with {result.returncode}:\n{result.stdout}{result.stderr}") from error
    if result.returncode or not envelope["ok"]:
        raise ServerError(_reason(envelope["error"]))
    return envelope["data"]["outputs_by_node"]


def comfy_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run comfy-cli: without tracking, its settings in a folder that is removed. Ctrl-C and SIGTERM end it, too."""
    with tempfile.TemporaryDirectory(prefix="jpeg-restorer-cli-") as home:
        variables = ("HOME", "USERPROFILE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "APPDATA")
        settings = {"DO_NOT_TRACK": "1", "COMFY_CLI_NO_REMOTE_REFRESH": "1"}
        environment = {**os.environ, **dict.fromkeys(variables, home), **settings}
        command = [str(PYTHON), "-m", "comfy_cli", "--skip-prompt", *arguments]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", check=False
        )


def _reason(error: dict[str, Any]) -> str:
    """The nodes' own sentences in an error of comfy-cli, or the error itself."""
    details = error.get("details") or {}
    if said := details.get("exception_message"):
        return str(said).strip()
    refused = [one["details"] for node in details.get("node_errors", []) for one in node["errors"]]
    sentences = [text.partition(" - ")[2] or text for text in refused]
    return " ".join(sentences) or error["message"]


def _install_pack(target: Path) -> None:
    """A link to this repository, or a copy of what ComfyUI needs where links are not allowed."""
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        target.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / part).exists():
                shutil.copy(ROOT / part, target / part)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _terminate_by_exception() -> dict[int, Any]:
    """Let SIGTERM and SIGHUP unwind the stack; returns the handlers to put back."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {number: signal.signal(number, leave) for number in numbers}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: politely, then by force."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait(10)
        return
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM and not _group_lives(process.pid):
            return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
