"""What the text encoder of SD 2.1 makes of captions: computed once, kept in files, read one at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from restoration.devices import accelerator_available
from training.configs.one_step import SD21_BASE_COPIES

_SHARD = 512
"""Captions in each file; 77 x 1024 in half precision are 158 kB."""
_BATCH = 32
_WHAT_TO_GIVE = (
    "Give --text-encoder.path a folder in diffusers' layout with text_encoder and tokenizer of SD 2.1-base, or a name "
    f"on the hub, e.g. {SD21_BASE_COPIES[0]}."
)


class TextStatesError(ValueError):
    """The text encoder or a file of states cannot be used; the message says what to do."""


class TextEncoder:
    """The tokenizer and the text encoder of a base model, in float32.

    Args:
        base: A folder in diffusers' layout (`text_encoder`, `tokenizer`), or a name on the Hugging Face hub.
        device: Where it runs.

    Raises:
        TextStatesError: A part of it is missing.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(self, base: str, device: torch.device | str | None = None) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.tokenizer: Any = _load(CLIPTokenizer.from_pretrained, base, "tokenizer")
        network: Any = _load(CLIPTextModel.from_pretrained, base, "text_encoder", dtype=torch.float32)
        self.network = network.to(device).eval().requires_grad_(False)
        if len(self.tokenizer) != network.config.vocab_size:  # transformers makes an empty one where there is none
            raise TextStatesError(
                f"{base}: its tokenizer knows {len(self.tokenizer)} tokens, its text_encoder "
                f"{network.config.vocab_size}. {_WHAT_TO_GIVE}"
            )
        self.length: int = network.config.max_position_embeddings
        """Tokens of each caption."""
        self.width: int = network.config.hidden_size
        """Numbers of each token's state."""

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (N, length): captions that are longer are cut, shorter ones padded."""
        return self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """The last hidden states after the final norm (N, length, width), as Stable Diffusion is prompted with."""
        return self.network(tokens.to(self.network.device)).last_hidden_state

    def fingerprint(self) -> str:
        """A hash of the encoder's weights."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _load(load: Callable[..., Any], base: str, part: str, **options: Any) -> Any:
    local = Path(base).is_dir()
    try:
        return load(base, subfolder=part, local_files_only=local, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TextStatesError(
            f"{base}: its {part} cannot be loaded ({lines[0].strip().rstrip('.')}). {_WHAT_TO_GIVE}"
        ) from error


class TextStates:
    """The states of known captions; a mapping that reads each from its file when it is asked for.

    Args:
        keys: Caption -> name of its states.
        files: Name -> the safetensors file that has them.
    """

    def __init__(self, keys: dict[str, str], files: dict[str, Path]) -> None:
        self.keys = keys
        self.files = {key: files[key] for key in keys.values()}

    def __getitem__(self, caption: str) -> Tensor:
        """Float16 (length, width)."""
        key = self.keys[caption]
        with safe_open(self.files[key], framework="pt", device="cpu") as file:
            return file.get_tensor(key).clone()

    def __len__(self) -> int:
        return len(self.keys)


def cached_text_states(captions: Iterable[str], base: str, folder: Path) -> TextStates:
    """The states of all captions; those that the folder has not are computed, by each process its share.

    A kill loses no more than the file that was being written. Files are named by what is in them, so that several
    trainings may share a folder.

    Args:
        captions: Any number; the same one is computed once.
        base: As for `TextEncoder`.
        folder: Of the files.

    Raises:
        TextStatesError: The encoder cannot be loaded, or a file of the folder is broken.
    """
    state = PartialState(cpu=not accelerator_available())
    encoder = TextEncoder(base, state.device)
    folder = folder / encoder.fingerprint()
    texts = sorted(set(captions))
    tokens: dict[str, Tensor] = {}
    keys: dict[str, str] = {}
    for start in range(0, len(texts), 4096):
        some = texts[start : start + 4096]
        for text, row in zip(some, encoder.tokens(some), strict=True):
            keys[text] = hashlib.blake2b(row.numpy().tobytes(), digest_size=16).hexdigest()
            tokens[keys[text]] = row
    present = _stored(folder)
    missing = sorted(tokens.keys() - present.keys())
    state.wait_for_everyone()  # all have seen the same files before anyone adds one
    share = missing[state.process_index :: state.num_processes]
    if share:
        _compute(share, tokens, encoder, folder, show=state.is_main_process)
    state.wait_for_everyone()
    return TextStates(keys, _stored(folder) if missing else present)


def _compute(keys: Sequence[str], tokens: dict[str, Tensor], encoder: TextEncoder, folder: Path, *, show: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(keys), unit="caption", desc="text states", disable=not show, dynamic_ncols=True) as progress:
        for start in range(0, len(keys), _SHARD):
            shard = keys[start : start + _SHARD]
            states: dict[str, Tensor] = {}
            for first in range(0, len(shard), _BATCH):
                some = shard[first : first + _BATCH]
                rows = encoder.states(torch.stack([tokens[key] for key in some])).to("cpu", torch.float16)
                states |= {key: row.clone() for key, row in zip(some, rows, strict=True)}
                progress.update(len(some))
            _write_shard(states, folder)


def _write_shard(states: dict[str, Tensor], folder: Path) -> None:
    name = hashlib.blake2b("".join(states).encode(), digest_size=16).hexdigest()
    temporary = folder / f"{name}.{os.getpid()}.writing"
    try:
        save_file(states, temporary)
        os.replace(temporary, folder / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise TextStatesError(f"{folder}: text states cannot be written ({error}). Free some space.") from error


def _stored(folder: Path) -> dict[str, Path]:
    """Name -> file of all states in a folder."""
    stored: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                stored |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise TextStatesError(f"{path} is not a whole file ({error}). Remove it; it is written anew.") from error
    return stored
