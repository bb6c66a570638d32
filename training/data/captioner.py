"""A vision-language model that says what a picture shows, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from training.data.captions import CaptionError, one_line

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
"""The 7 billion parameters of LLaVA-1.5, which SODiff's authors used."""
DEFAULT_PROMPT = "Describe this image in one or two sentences."
"""The paper does not print its own. Two sentences fit into the 77 tokens that the text encoder reads."""
DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Captioner:
    """Captions pictures with one prompt, always with the likeliest next word: the same picture, the same caption.

    Args:
        model: A folder or a name on the Hugging Face hub; anything that AutoModelForImageTextToText loads and that has
            a chat template.
        prompt: The question.
        max_new_tokens: Length of the answer, in the model's tokens.
        dtype: One of `DTYPES`; `auto` is the model's own.
        device: Where it runs.

    Raises:
        CaptionError: The model cannot be had.
        ModuleNotFoundError: transformers is not installed.
    """

    def __init__(
        self, model: str, prompt: str, max_new_tokens: int, dtype: str, device: torch.device | str | None
    ) -> None:  # fmt: skip
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
            network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=DTYPES[dtype])
        except ModuleNotFoundError:
            raise
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise CaptionError(
                f"--model {model}: cannot be loaded ({first[0].rstrip('.')}). Give a folder, or the hub's name of a "
                f"vision-language model for transformers, e.g. {DEFAULT_MODEL}."
            ) from error
        if not getattr(self.processor, "chat_template", None) or not hasattr(self.processor, "tokenizer"):
            raise CaptionError(
                f"--model {model}: it has no chat template, by which a model that answers questions takes them. "
                f"Give another one, e.g. {DEFAULT_MODEL}."
            )
        self.network = network.to(device).eval()
        self.max_new_tokens = max_new_tokens
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # answers begin where the prompts end
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        self.text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        self._has_start = bool(tokenizer.bos_token) and self.text.startswith(tokenizer.bos_token)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption of one line for each RGB picture."""
        inputs = self.processor(
            images=[[picture] for picture in pictures], text=[self.text] * len(pictures), padding=True,
            return_tensors="pt", **({"add_special_tokens": False} if self._has_start else {}),
        )  # fmt: skip
        inputs = inputs.to(self.network.device, dtype=self.network.dtype)  # only what is floating point changes type
        tokens = self.network.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        if not self.network.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        return [one_line(text) for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
