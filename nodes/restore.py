"""The one node for everybody: a JPEG and a restorer of any family in, the restored picture out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..restoration.jpeg import JPEGData
from ..restoration.strips import is_finite, strips_of
from .ddrm import JPEG_REMEDY, ONE_SIZE_REMEDY
from .driftrec import one_jpeg_each
from .images import join_image, split_image
from .inputs import closed_loop_input, overlap_input, samples_input, seed_input, share_input, tile_input
from .restoring import FAMILIES, Pictures, Restoration, Settings, decoded, restore
from .runtime import ProgressReport, image_device, show_text
from .types import (
    JPEGDataSocket,
    NoJPEG,
    Restorer,
    RestorerSocket,
    errors_of,
    expect_jpegs,
    expect_one_size,
    expect_restorer,
)

_DEFAULTS = Settings()
_AUTOMATIC = -1.0


class RestoreJPEG(io.ComfyNode):
    """Restoration by a restorer of any family."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RestoreJPEG",
            display_name="Restore JPEG",
            category="image/restoration",
            description="Restores JPEGs with any restorer: takes away blocks, ringing and colour noise. Connect IMAGE "
            "and JPEG_DATA of Load JPEG, and a restorer; with JPEG_DATA, the result is one that the file could have "
            "come from. Any size; large pictures run in tiles. Alpha is returned as it came.",
            search_aliases=[
                *("jpeg artifact removal", "deblock", "remove artifacts", "fix jpeg", "jpeg restoration"),
                *("compression artifacts", "codiff", "sodiff", "driftrec", "ddrm"),
            ],
            inputs=[*_main_inputs(), *_advanced_inputs()],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    tooltip="The restored pictures, of the same size, rounded to whole 8-bit levels; at strength 0 "
                    "without a file to hold them to, the pictures just as they came.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        restorer: Restorer,
        strength: float,
        seed: int,
        samples: int,
        consistency: float,
        image: Tensor | None = None,
        jpeg: list[JPEGData | NoJPEG] | None = None,
        model: Any = None,
        vae: Any = None,
        closed_loop: bool = _DEFAULTS.closed_loop,
        quality: float = _AUTOMATIC,
        same_for_batch: bool = _DEFAULTS.same_for_batch,
        tile: int = _DEFAULTS.tile,
        overlap: int = _DEFAULTS.overlap,
    ) -> io.NodeOutput:
        with errors_of("RestoreJPEG"):
            expect_restorer(restorer, *FAMILIES)
            pictures, alpha = _pictures(image, jpeg, restorer)
            settings = Settings(
                strength,
                seed,
                samples,
                consistency,
                closed_loop,
                None if quality == _AUTOMATIC else quality,
                same_for_batch,
                tile,
                overlap,
            )
            result = restore(restorer, pictures, settings, ProgressReport(), model=model, vae=vae)
        text = _described(result, pictures, consistency)
        show_text(cls.hidden.unique_id, text)
        return io.NodeOutput(join_image(result.images, alpha, image_device()), ui=ui.PreviewText(text))


def _main_inputs() -> list[io.Input]:
    return [
        RestorerSocket.Input("restorer", tooltip="A restorer of any family that restores, from Load JPEG Restorer."),
        io.Image.Input(
            "image",
            optional=True,
            tooltip="The compressed pictures, at the size that the JPEG has. Without, they are decoded from jpeg.",
        ),
        JPEGDataSocket.Input(
            "jpeg",
            optional=True,
            tooltip="JPEG_DATA of the same pictures: one for each, or one for all. The result is held to it, as "
            "consistency says. A restorer of the family prior needs it, one for each.",
        ),
        share_input(
            "strength",
            _DEFAULTS.strength,
            "1 is the whole restoration, 0 gives the pictures back as they came; in between both are blended.",
        ),
        seed_input(
            "Of the noise. The same seed gives the same picture. Restorers of the families driftrec and prior give "
            "another plausible picture with another seed; others have no noise."
        ),
        samples_input(
            _DEFAULTS.samples,
            "Restorations that are averaged, by restorers of the families driftrec and prior: 1 keeps the most "
            "texture, more come closer to the original on average and take longer. Others ignore it.",
        ),
        share_input(
            "consistency",
            _DEFAULTS.consistency,
            "With jpeg connected: how far the result is moved into what the file allows. 1 all the way, 0 not at all.",
        ),
    ]


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="MODEL of Load JPEG Restorer, for restorers that adapt Stable Diffusion 2.1-base, or with LoRAs or "
            "other changes of yours. Others bring along what they need.",
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="VAE of Load JPEG Restorer, for restorers that adapt Stable Diffusion 2.1-base. Others bring along "
            "what they need.",
        ),
        closed_loop_input(
            _DEFAULTS.closed_loop,
            "With jpeg connected: encode the rounded result again and mend it until it gives the file's own "
            "coefficients. Off, rounding to 8 bits moves some of them out again.",
        ),
        io.Float.Input(
            "quality",
            default=_AUTOMATIC,
            min=_AUTOMATIC,
            max=100.0,
            step=1.0,
            round=0.01,
            optional=True,
            advanced=True,
            tooltip="For restorers of the family sodiff: the JPEG quality in place of the one that they see, 0 to 100; "
            "lower restores more. -1 takes what is seen. Others ignore it.",
        ),
        io.Boolean.Input(
            "same_for_batch",
            default=_DEFAULTS.same_for_batch,
            optional=True,
            advanced=True,
            tooltip="On, for frames of a film: all pictures of a batch get one timestep and one noise, so that nothing "
            "flickers. Off: each its own timestep, and a seed that counts up from picture to picture.",
        ),
        tile_input(
            _DEFAULTS.tile,
            "Side of the tiles that larger pictures are split into, pixels; 0 takes what suits the restorer, mostly "
            "1024, and 768 with an overlap of at least 256 where it adapts Stable Diffusion 2.1-base. It is halved "
            "when memory runs out.",
        ),
        overlap_input(
            "Pixels that neighbouring tiles share; they are blended there. More than half a tile is lowered to that."
        ),
    ]


def _pictures(image: Tensor | None, jpeg: Any, restorer: Restorer) -> tuple[Pictures, Tensor | None]:
    """What is restored, and the alpha of the image."""
    if image is None and jpeg is None:
        raise ValueError("expected an image, JPEG_DATA or both, got neither. Connect IMAGE and JPEG_DATA of Load JPEG.")
    if restorer.metadata.family == "prior":
        _expect_files(jpeg, restorer)
    if image is None:
        jpegs = expect_jpegs(jpeg, "Connect the IMAGE of the same picture, too.")
        expect_one_size(jpegs, ONE_SIZE_REMEDY)
        return Pictures(decoded(jpegs), jpegs), None
    images, alpha = split_image(image)
    _expect_numbers(images)
    if jpeg is None or _no_jpegs(jpeg):
        return Pictures(images), alpha
    if restorer.metadata.family == "prior" and len(jpeg) != len(images):
        raise ValueError(
            f"expected one JPEG for each of the {len(images)} images, got {len(jpeg)}: {restorer.name}, a prior, "
            "restores what is in the file. Connect the JPEG_DATA that belongs to these images."
        )
    return Pictures(images, one_jpeg_each(jpeg, images)), alpha


def _expect_numbers(images: Tensor) -> None:
    """What no network can make a picture of, and would be blamed for."""
    for number, image in enumerate(images, 1):
        if not is_finite(image):
            missing = sum(int(strip.isfinite().logical_not_().sum()) for strip in strips_of(image))
            raise ValueError(
                f"image {number} holds something that is no number (NaN) in {missing} of its values. Look at the node "
                "that made it: a network in half precision often does this; run it in float32."
            )


def _expect_files(jpeg: Any, restorer: Restorer) -> None:
    """What a prior has to be given."""
    if jpeg is None:
        raise ValueError(
            f"expected JPEG_DATA for {restorer.name}, a prior, which is held to the file at each step; got an image "
            "alone. Connect JPEG_DATA of Load JPEG, or of Compress to JPEG with its IMAGE."
        )
    expect_jpegs(jpeg, JPEG_REMEDY)


def _no_jpegs(jpeg: Any) -> bool:
    """Whether it is the JPEG_DATA of pictures none of which is a JPEG."""
    return isinstance(jpeg, list) and bool(jpeg) and all(isinstance(one, NoJPEG) for one in jpeg)


def _described(result: Restoration, pictures: Pictures, consistency: float) -> str:
    """The timesteps that were taken, each once, and what the pictures are held to."""
    lines = []
    if result.timesteps:
        steps: Sequence[str] = list(dict.fromkeys(f"{step:.1f}" for step in result.timesteps))
        lines.append(f"timestep{'s' if len(steps) > 1 else ''} {', '.join(steps)}")
    names = list(dict.fromkeys(jpeg.name for jpeg in pictures.jpegs)) if consistency > 0 else []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    lines.append(f"held to {names[0]}{more}" if names else "held to no file")
    return "\n".join(lines)
