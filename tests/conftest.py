"""Fixtures for tests in a real ComfyUI, and restorers small enough for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Before torch: threads that wait by spinning make everything many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # processes that share the machine, and what they start
    cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))

import pytest
import torch

from restoration.diffusion.prediction import Prediction
from restoration.networks.ncsnpp import NCSNpp, NCSNppConfig
from restoration.restorer_file import RestorerMetadata, half, read_restorer, write_restorer
from tools.setup_env import comfyui_dir


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    """Trainings in mixed precision leave cycles with whole base models in them."""
    yield
    gc.collect()


def network_weights(config: NCSNppConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random weights whose network does something: layers that start at zero are drawn, too."""
    network, generator = NCSNpp(config), torch.Generator().manual_seed(seed)
    network.initialize(generator)
    for parameter in network.parameters():
        if parameter.dim() > 1 and float(parameter.detach().abs().max()) < 1e-3:
            parameter.data.normal_(0, 0.05, generator=generator)
    return network.state_dict()


def write_driftrec(path: Path, width: int = 8, seed: int = 0) -> Path:
    """A DriftRec restorer with random weights."""
    config = NCSNppConfig(width=width, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(), patch_size=2)
    sde = {"name": "ouve", "sigma_min": 0.01, "sigma_max": 1.0, "gamma": 1.0}
    prediction = Prediction("residual", 0.05)
    meaning = {"kind": prediction.kind, "sigma_data": prediction.sigma_data}
    settings = {"network": config.to_dict(), "sde": sde, "prediction": meaning}
    tensors = {f"score.{key}": value for key, value in half(network_weights(config, seed)).items()}
    write_restorer(path, RestorerMetadata("driftrec", settings, license="Apache-2.0"), tensors)
    return path


def write_regression(path: Path, width: int = 8, seed: int = 1) -> Path:
    """A regression restorer with random weights."""
    config = NCSNppConfig(
        in_channels=3, width=width, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(), conditional=False
    )
    settings = {"network": config.to_dict(), "residual_scale": 0.05, "noise_level": None}
    tensors = {f"regression.{key}": value for key, value in network_weights(config, seed).items()}
    write_restorer(path, RestorerMetadata("regression", settings, license="Apache-2.0"), tensors)
    return path


@pytest.fixture(scope="session")
def comfyui_folder() -> Path:
    """The folder of a real ComfyUI; tests that need it are skipped where there is none."""
    folder = comfyui_dir()
    if not (folder / "main.py").exists():
        pytest.skip(f"no ComfyUI in {folder}: run `make setup`, or set COMFYUI_DIR to an installed one")
    return folder


@pytest.fixture(scope="session")
def comfy(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """ComfyUI's executor with this pack, and restorers `test-driftrec` and `test-regression` in its models folder."""
    from tests.comfyui_inprocess import ComfyUI

    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "jpeg_restorers"
    write_driftrec(models / "test-driftrec.safetensors")
    write_regression(models / "test-regression.safetensors")
    yield ComfyUI(comfyui_folder, base)


@pytest.fixture
def fresh(comfy):
    """The executor with empty caches and no listener, left so: models in its caches may be patched in place."""
    comfy.forget()
    comfy.on_progress = None
    yield comfy
    comfy.on_progress = None
    comfy.forget()


@pytest.fixture(scope="session")
def reduced(comfy) -> SimpleNamespace:
    """The reduced base in ComfyUI's folders, a CODiff restorer for it, and that restorer's file."""
    from tests.codiff_graphs import RESTORER
    from tests.reduced_sd21 import reduced_base, write_codiff

    base = reduced_base()
    comfy.folder_paths.add_model_folder_path("checkpoints", str(base.checkpoint.parent))
    comfy.folder_paths.add_model_folder_path("vae", str(base.vae.parent))
    path = write_codiff(comfy.base / "models" / "jpeg_restorers" / RESTORER, base)
    comfy.folder_paths.filename_list_cache.clear()
    return SimpleNamespace(base=base, file=read_restorer(path))


@pytest.fixture
def codiff(fresh, reduced) -> SimpleNamespace:
    """The executor with empty caches, and the base and restorer files that it knows."""
    return SimpleNamespace(comfy=fresh, **vars(reduced))


@pytest.fixture(scope="session")
def sodiff_files(comfy, reduced) -> SimpleNamespace:
    """The reduced base, and SODiff restorers for it: with a predictor, without its calibration, at a fixed timestep,
    the first stage alone, and an estimator of the quality."""
    from tests import sodiff_graphs as names
    from tests.reduced_sd21 import write_quality, write_saipe, write_sodiff

    folder = comfy.base / "models" / "jpeg_restorers"
    path = write_sodiff(folder / names.RESTORER, reduced.base)
    write_sodiff(folder / names.UNCALIBRATED, reduced.base, calibration=None)
    write_sodiff(folder / names.FIXED, reduced.base, predictor=None, timestep=199.5)
    write_saipe(folder / names.FIRST_STAGE)
    write_quality(folder / names.QUALITY)
    comfy.folder_paths.filename_list_cache.clear()
    return SimpleNamespace(base=reduced.base, file=read_restorer(path))


@pytest.fixture
def sodiff(fresh, sodiff_files) -> SimpleNamespace:
    """The executor with empty caches, and the base and restorer files that it knows."""
    return SimpleNamespace(comfy=fresh, **vars(sodiff_files))


@pytest.fixture(scope="session")
def restorers(comfy) -> None:
    """A restorer of each family that restores."""
    from tests.restore_graphs import write_restorers

    write_restorers(comfy.base / "models" / "jpeg_restorers")
    comfy.folder_paths.filename_list_cache.clear()


@pytest.fixture
def restore(fresh, restorers):
    """The executor with empty caches, and restorers of all families."""
    return fresh
