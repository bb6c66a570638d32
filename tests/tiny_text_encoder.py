"""SD 2.1's kind of text encoder and tokenizer, tiny and random, in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel


def write_text_encoder(folder: Path, width: int = 16, seed: int = 0) -> Path:
    """A base model's `text_encoder` and `tokenizer` in diffusers' layout: SD 2.1's kind, tiny and random."""
    pieces = ["!"]  # the first token pads, as in SD 2.1
    pieces += [letter + end for letter in "abcdefghijklmnopqrstuvwxyz,." for end in ("", "</w>")]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    pieces += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "model_max_length": 77}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=8, hidden_act="gelu", max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"], pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CLIPTextModel(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=2.0 if "token_embedding" in name else 0.3)  # so that captions matter
    model.save_pretrained(folder / "text_encoder")
    return folder
