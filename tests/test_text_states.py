"""Text states: those that Stable Diffusion is prompted with; computed once, kept in files, found again."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared import ROOT
from tiny_text_encoder import write_text_encoder
from transformers import CLIPTextModel, CLIPTokenizer

import training.data.text_states as text_states
from training.data.text_states import TextEncoder, TextStatesError, cached_text_states


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("base"))


CAPTIONS = ["a cat, a dog.", "", "dog " * 100, "Cat", "dog " * 90]


def test_states_are_diffusers_own_prompt_embeddings(base: Path, tmp_path: Path) -> None:
    """As a Stable Diffusion pipeline encodes prompts: padded and cut to 77 tokens, without a mask; here to half's
    precision."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"), unet=None, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    expected, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=False)
    states = cached_text_states(CAPTIONS, str(base), tmp_path)
    assert len(states) == 5
    for caption, wanted in zip(CAPTIONS, expected, strict=True):
        assert states[caption].dtype == torch.float16 and states[caption].shape == (77, 16)
        torch.testing.assert_close(states[caption].float(), wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(states["a cat, a dog."], states["Cat"], atol=0.1)


def test_the_final_norm_is_included(base: Path) -> None:
    """With the norm's weight zero, every state is its bias."""
    encoder = TextEncoder(str(base))
    norm = dict(encoder.network.named_modules())[
        next(name for name, _ in encoder.network.named_modules() if name.endswith("final_layer_norm"))
    ]
    norm.weight.zero_()
    states = encoder.states(encoder.tokens(["a cat"]))
    torch.testing.assert_close(states, norm.bias.expand(1, 77, 16))


def test_long_captions_are_cut_with_their_end_kept(base: Path) -> None:
    tokens = TextEncoder(str(base)).tokens(["dog " * 100, "dog"])
    start, end = int(tokens[1, 0]), int(tokens[1, 2])
    assert tokens.shape == (2, 77) and (tokens[0, 0], tokens[0, -1]) == (start, end)
    assert (tokens[0, 1:-1] == tokens[1, 1]).all() and (tokens[1, 3:] == 0).all()


class Counted:
    """How many captions went through the text encoder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_after: float = float("inf")) -> None:
        self.captions = 0
        states = TextEncoder.states

        def counted(encoder: TextEncoder, tokens: torch.Tensor) -> torch.Tensor:
            if self.captions + len(tokens) > dies_after:
                raise KeyboardInterrupt
            self.captions += len(tokens)
            return states(encoder, tokens)

        monkeypatch.setattr(TextEncoder, "states", counted)


def test_captions_are_encoded_once_and_a_killed_run_keeps_its_whole_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_states, "_SHARD", 2)
    monkeypatch.setattr(text_states, "_BATCH", 1)
    captions = [*"abcdefg"]
    with monkeypatch.context() as patch:
        Counted(patch, dies_after=5)
        with pytest.raises(KeyboardInterrupt):
            cached_text_states(captions, str(base), tmp_path)
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        states = cached_text_states([*captions, *captions, "dog " * 100, "dog " * 90], str(base), tmp_path)
        assert counted.captions == 3 + 1  # two files of two were whole; the two long ones are cut to the same tokens
        again = cached_text_states(reversed(captions), str(base), tmp_path)
        assert counted.captions == 4
    encoder = TextEncoder(str(base))
    for caption in captions:
        assert torch.equal(again[caption], states[caption])
        expected = encoder.states(encoder.tokens([caption]))[0]
        torch.testing.assert_close(states[caption].float(), expected, rtol=1e-3, atol=1e-3)


def test_another_text_encoder_has_other_states_in_the_same_folder(base: Path, tmp_path: Path) -> None:
    other = write_text_encoder(tmp_path / "other", seed=1)
    one, two = (cached_text_states(["a cat"], str(path), tmp_path / "cache")["a cat"] for path in (base, other))
    assert not torch.allclose(one, two, atol=0.1)


def test_states_travel_to_worker_processes(base: Path, tmp_path: Path) -> None:
    states = cached_text_states(CAPTIONS, str(base), tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(states))["Cat"], states["Cat"])


def test_processes_share_the_captions(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport training.data.text_states as text_states\n"
        "text_states._SHARD, seen, states = 2, [], text_states.TextEncoder.states\n"
        "text_states.TextEncoder.states = lambda encoder, tokens: seen.append(len(tokens)) or states(encoder, tokens)\n"
        "found = text_states.cached_text_states('abcdefghij', sys.argv[1], Path(sys.argv[2]))\n"
        "usable = sum(found[letter].shape == (77, 16) for letter in 'abcdefghij')\n"
        "sys.stdout.write(f'encoded {sum(seen)} of {usable}\\n')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(base), str(tmp_path / "cache")], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("encoded 5 of 10") == 2


def test_what_is_said_when_something_is_missing_or_broken(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TextStatesError, match=r"its text_encoder cannot be loaded .*--text-encoder\.path"):
        cached_text_states(["a"], str(tmp_path), tmp_path / "cache")
    (tmp_path / "text_encoder").symlink_to(base / "text_encoder")
    with pytest.raises(TextStatesError, match=r"its tokenizer .*--text-encoder\.path"):
        cached_text_states(["a"], str(tmp_path), tmp_path / "cache")
    cached_text_states(["a"], str(base), tmp_path / "cache")
    shard = next((tmp_path / "cache").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(TextStatesError, match=rf"{shard.name} is not a whole file .*Remove it"):
        cached_text_states(["a"], str(base), tmp_path / "cache")
