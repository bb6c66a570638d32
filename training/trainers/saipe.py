"""SODiff's first stage: SAIPE learns to restore JPEGs and to see in them the prompt that a caption would give.

The paper's loss is L1 of the reconstruction + 0.5 MSE(tokens, text states) (arXiv 2508.07346, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from restoration.networks.saipe import SAIPE
from restoration.restorer_file import RestorerMetadata
from training.configs.saipe import SAIPETrainingConfig
from training.data.captioned import Captions, check_crops_fit, find_captions
from training.data.captions import CaptionError
from training.data.pairs import PairDataset
from training.data.text_states import TextStates, TextStatesError, cached_text_states
from training.degradation import compress
from training.trainers.task import TaskDefaults, load_whole

_PART = "prompt."


class SAIPETask(TaskDefaults):
    """The absolute error of the reconstruction and the squared error of the tokens.

    Raises:
        CaptionError: With `align` "text": there are no captions, or they do not fit the configuration.
        FileNotFoundError: The same, and there are no pictures.
    """

    stores_frozen = True  # with align none, what makes tokens
    size_multiple = 8  # a block of JPEG; the network takes any size
    what_next = "give it to the second stage: python -m training sodiff --saipe FILE"

    def __init__(self, config: SAIPETrainingConfig) -> None:
        self.config = config
        self.model = SAIPE(config.network, recompute=config.gradient_checkpointing)
        self.model.initialize(torch.Generator().manual_seed(config.run.seed))
        self.captions = _captions(config) if config.align == "text" else None
        if self.captions is None:
            self.model.embedder.requires_grad_(False)
        self._held_out: list[tuple[Tensor, Tensor]] = []
        self._number = self._period = 0

    def dataset(self, paths: Sequence[Path], validation: Sequence[Path]) -> PairDataset | None:
        """Pairs with the text states of their captions; those of validation pictures are kept for `measure`.

        Raises:
            CaptionError: None of the pictures has a caption.
            TextStatesError: The text encoder cannot be loaded, or its states have another shape than the tokens.
        """
        if self.captions is None:
            return None
        config, trained = self.config, self.captions.of(paths)
        if not trained.pictures():
            raise CaptionError(
                f"none of the {len(paths)} pictures in {config.data.train} has a caption in {self.captions.origin}. "
                "Caption this folder: python -m training prepare captions."
            )
        if trained.pictures() < len(paths) and PartialState().is_main_process:
            print(f"{len(paths) - trained.pictures()} of {len(paths)} pictures are left out, without a caption in "
                  f"{self.captions.origin}", flush=True)  # fmt: skip
        folder = config.data.validation
        held_out = (self.captions if folder is None else find_captions(folder, None) or self.captions).of(validation)
        states = cached_text_states(
            [*trained.all(), *held_out.all()], config.text_encoder.path, config.text_encoder.cache
        )
        self._check_shape(states, trained.all()[0])
        self._keep(held_out, states)
        return trained.dataset(config.data, config.run.seed, states)

    def _check_shape(self, states: TextStates, caption: str) -> None:
        expected, given = (self.config.network.tokens, self.config.network.context_dim), tuple(states[caption].shape)
        if given != expected:
            raise TextStatesError(
                f"{self.config.text_encoder.path}: its text encoder gives {given[0]} tokens of {given[1]}, the network "
                f"{expected[0]} of {expected[1]}. Set network.tokens and network.context_dim to its numbers, or give "
                "--text-encoder.path that of SD 2.1-base."
            )

    def _keep(self, captions: Captions, states: TextStates) -> None:
        """Clean crops of validation pictures and what their captions are as text states."""
        count = min(self.config.validation.images, captions.pictures())
        if count:
            pairs = captions.dataset(self.config.data, self.config.run.seed, states)
            items = (pairs[index] for index in range(count))
            self._held_out = [(item["clean"], item["text"]) for item in items]

    def loss(self, model: nn.Module, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        if self.captions is None:
            reconstruction, _ = model(batch["degraded"])
            return (reconstruction - batch["clean"]).abs().mean()
        self._redraw(int(batch["index"].min()))
        reconstruction, tokens = model(batch["degraded"])
        alignment = F.mse_loss(tokens.float(), batch["text"].float())
        error = (reconstruction - batch["clean"]).abs().mean()
        self.note({"loss/pixels": error, "loss/alignment": alignment})
        return error + self.config.alignment_weight * alignment

    def _redraw(self, index: int) -> None:
        """The random features of this part of the run, which follow from the seed and the images before it alone."""
        every = self.config.redraw_every * self.config.run.batch
        period = index // every if every else 0
        if period != self._period:
            words = np.random.SeedSequence([self.config.run.seed, 4, period]).generate_state(1, np.uint64)
            self.model.redraw(torch.Generator().manual_seed(int(words[0] >> np.uint64(1))))
            self._period = period

    def restore(self, degraded: Tensor, seed: int) -> Tensor:
        """The reconstruction."""
        self._number = seed
        return self.model(degraded)[0].clamp(0, 1)

    def measure(self, degraded: Tensor, quality: Tensor) -> dict[str, float]:
        """`alignment`: the squared error of the tokens of a crop that was not trained on, at this JPEG quality.

        Captions belong to crops of their own, so it is not the picture that is shown but the crop of the same number.
        """
        if not self._held_out:
            return {}
        clean, text = self._held_out[self._number % len(self._held_out)]
        pixels = (clean * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        shown = torch.from_numpy(compress(pixels, int(quality))).to(degraded).permute(2, 0, 1)[None] / 255
        return {"alignment": float(F.mse_loss(self.model.tokens(shown)[0].float(), text.to(degraded).float()))}

    def metadata(self, training: dict[str, Any], license: str) -> RestorerMetadata:
        described = {**training, "align": self.config.align}
        return RestorerMetadata(
            "saipe", {"saipe": self.config.network.to_dict()}, training=described, license=license
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return {_PART + key: value for key, value in self.model.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Start from the SAIPE of a restorer file, of the same shape.

        Raises:
            RestorerFileError: It is another network.
        """
        given = {key.removeprefix(_PART): value for key, value in tensors.items() if key.startswith(_PART)}
        load_whole(self.model, given, "a SAIPE of the configuration's shape", "saipe")


def _captions(config: SAIPETrainingConfig) -> Captions:
    captions = find_captions(config.data.train, config.captions)
    if captions is None:
        raise CaptionError(
            f"align text: {config.captions or config.data.train} has no captions. Write them with `python -m training "
            f"prepare captions --train {config.data.train}`, or put a .txt beside each picture. Without alignment: "
            "--align none."
        )
    check_crops_fit(captions, config.data)
    return captions
