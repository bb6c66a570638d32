"""SODiff's first stage: its loss, the crops and captions that it is shown, resuming, its file, its errors."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training_loop import stop_after
from tiny_text_encoder import write_text_encoder

from restoration.networks.saipe import SAIPE, SAIPEConfig
from restoration.restorer_file import RestorerFileError, read_restorer
from tests.shared import shared_path
from training.configs.common import DataConfig, RunConfig, ValidationConfig
from training.configs.saipe import PRESETS, SAIPETrainingConfig, TextEncoderConfig
from training.data.captioned import CaptionedCrops, CaptionedPictures, find_captions
from training.data.captions import CaptionedCrop, CaptionError, draw_crop
from training.data.pairs import PairDataset
from training.data.pictures import find_images
from training.data.text_states import TextStatesError
from training.degradation import Degradation
from training.loop.checkpoint import read_checkpoint
from training.loop.session import Session
from training.trainers.saipe import SAIPETask

NETWORK = SAIPEConfig(
    dim=12, down_depths=(1,), up_depths=(1,), heads=2, window=4, drop_path=0.1, performer_depth=1, performer_heads=2,
    performer_dim_head=8, performer_mult=1, features=16, context_dim=16, pool_heads=2, image_side=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoderConfig:
    folder = tmp_path_factory.mktemp("text")
    return TextEncoderConfig(str(write_text_encoder(folder / "base")), folder / "cache")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "sub/c"):
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def caption_crops(folder: Path, side: int = 32, crops: int = 2) -> list[CaptionedCrop]:
    """A caption file in the folder, as the command writes one, with a caption of its own for each crop."""
    written = []
    for path in find_images(folder):
        name, (width, height) = path.relative_to(folder).as_posix(), Image.open(path).size
        for number in range(crops):
            box, quality = draw_crop(name, number, (height, width), side, (5, 95), seed=0)
            caption = "cat " * len(written) + "dog"
            written.append(CaptionedCrop(name, number, box, quality, caption, "nobody"))
    (folder / "captions.jsonl").write_text("".join(crop.to_line() for crop in written))
    return written


class Lengths:
    """In place of text states: the length of the caption."""

    def __getitem__(self, caption: str) -> torch.Tensor:
        return torch.full((2, 3), float(len(caption)), dtype=torch.float16)


def config(folder: Path, text_encoder: TextEncoderConfig | None = None, **changes) -> SAIPETrainingConfig:
    return SAIPETrainingConfig(
        data=DataConfig(folder, crop=32, augmentation="crop", degradation=Degradation(5, 95), workers=0),
        network=NETWORK, text_encoder=text_encoder or TextEncoderConfig(), optimizer=PRESETS["paper"].optimizer,
        validation=ValidationConfig(every=10**9, images=1, crop=32, qualities=(10, 50)),
        run=changes.pop("run", RunConfig(folder.parent / "run", images=16, batch=4)), **changes,
    )  # fmt: skip


def batch(text: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, degraded = torch.rand(2, 3, 3, 32, 32, generator=generator)
    given = {"clean": clean, "degraded": degraded, "index": torch.tensor([4, 5, 6])}
    return {**given, "text": torch.randn(3, 77, 16, generator=generator).half()} if text else given


@pytest.mark.parametrize("align", ["text", "none"])
def test_the_loss_is_the_papers_and_without_alignment_no_token_is_learnt(align: str, pictures: Path) -> None:
    """mean |reconstruction - clean| + weight * mean (tokens - states)², by numpy."""
    caption_crops(pictures)
    task, given = SAIPETask(config(pictures, align=align, alignment_weight=0.25)), batch(text=align == "text")
    task.model.eval()  # no branch is left out
    loss = task.loss(task.model, given, torch.Generator())
    reconstruction, tokens = (value.detach().double().numpy() for value in task.model(given["degraded"]))
    expected = np.abs(reconstruction - given["clean"].double().numpy()).mean()
    if align == "text":
        expected += 0.25 * ((tokens - given["text"].double().numpy()) ** 2).mean()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for name, parameter in task.model.named_parameters():
        learnt = align == "text" or not name.startswith("embedder.")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == learnt, name
        assert parameter.requires_grad == learnt


def test_the_paper_preset_is_the_papers() -> None:
    paper, small = PRESETS["paper"], PRESETS["small"]
    assert paper.network == SAIPEConfig() and paper.align == "text" and paper.alignment_weight == 0.5
    assert (paper.run.batch, paper.run.images // paper.run.batch) == (16, 50_000)
    optimizer = paper.optimizer
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.schedule) == (2e-4, 0.0, "constant")
    assert (optimizer.ema_decay, optimizer.betas, optimizer.gradient_clip) == (0.0, (0.9, 0.999), 0.0)
    assert paper.data.crop == 512 and paper.data.degradation == Degradation(5, 95) and paper.redraw_every == 1000
    assert not (paper.data.flips or paper.data.rotations)
    assert (small.network.tokens, small.network.context_dim) == (
        77,
        1024,
    ) and small.data.crop == small.network.image_side


def pillow_pair(path: Path, crop: CaptionedCrop) -> tuple[np.ndarray, np.ndarray]:
    """The clean crop and the JPEG, by Pillow alone."""
    clean = Image.open(path).crop(crop.box)
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG", quality=crop.quality, subsampling="4:2:0")
    return np.asarray(clean), np.asarray(Image.open(buffer))


def pixels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def test_crops_are_the_files_own_boxes_at_their_own_qualities(pictures: Path) -> None:
    """Each line once in an epoch, to the pixel; with its own caption."""
    crops = caption_crops(pictures)
    found = find_captions(pictures, None)
    dataset = found.of(find_images(pictures)).dataset(config(pictures).data, 0, Lengths())
    by_caption = {len(crop.caption): crop for crop in crops}
    for epoch in range(2):
        items = [dataset[epoch * 6 + index] for index in range(6)]
        assert {int(item["text"][0, 0]) for item in items} == set(by_caption)
        for item in items:
            crop = by_caption[int(item["text"][0, 0])]
            clean, degraded = pillow_pair(pictures / crop.path, crop)
            assert item["path"] == str(pictures / crop.path) and float(item["quality"]) == crop.quality
            np.testing.assert_array_equal(pixels(item["clean"]), clean)
            np.testing.assert_array_equal(pixels(item["degraded"]), degraded)
    orders = [[int(dataset[epoch * 6 + index]["text"][0, 0]) for index in range(6)] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_an_earlier_compression_leaves_box_and_quality_alone(pictures: Path) -> None:
    """Double, displaced compression looks beyond the box; the clean crop and the last quality stay the file's."""
    crops = {len(crop.caption): crop for crop in caption_crops(pictures)}
    law = Degradation(5, 95, double_probability=1.0, shift=True, quality_choices=(1,), choice_probability=1.0)
    data = replace(config(pictures).data, degradation=law)
    dataset = find_captions(pictures, None).of(find_images(pictures)).dataset(data, 0, Lengths())
    for index in range(6):
        item = dataset[index]
        crop = crops[int(item["text"][0, 0])]
        clean, once = pillow_pair(pictures / crop.path, crop)
        np.testing.assert_array_equal(pixels(item["clean"]), clean)
        assert float(item["quality"]) == crop.quality and item["degraded"].shape == (3, 32, 32)
        assert crop.quality < 20 or (pixels(item["degraded"]) != once).any()


def test_items_follow_from_seed_and_index_alone_in_any_process(pictures: Path) -> None:
    caption_crops(pictures)
    captions = find_captions(pictures, None).of(find_images(pictures))
    one, other = (captions.dataset(config(pictures).data, 0, Lengths()) for _ in range(2))
    expected = [one[index] for index in range(12)]
    travelled = pickle.loads(pickle.dumps(other))
    for index in reversed(range(12)):
        for key, value in travelled[index].items():
            same = torch.equal(value, expected[index][key]) if torch.is_tensor(value) else value == expected[index][key]
            assert same, (index, key)


def test_a_picture_that_breaks_gives_its_turn_to_the_next_crop(pictures: Path) -> None:
    caption_crops(pictures)
    captions = find_captions(pictures, None).of(find_images(pictures))
    (pictures / "b.png").write_bytes(b"")
    dataset = captions.dataset(config(pictures).data, 0, Lengths())
    assert {Path(dataset[index]["path"]).name for index in range(6)} == {"a.png", "c.png"}


def test_with_texts_beside_pictures_crops_are_free(pictures: Path) -> None:
    """The pairs are the usual ones of those pictures that have a text."""
    (pictures / "a.txt").write_text("a cat")
    (pictures / "sub" / "c.txt").write_text("dogs, dogs")
    captions = find_captions(pictures, None).of(find_images(pictures))
    data = replace(config(pictures).data, flips=True)
    dataset = captions.dataset(data, 3, Lengths())
    paths = [pictures / "a.png", pictures / "sub" / "c.png"]
    usual = PairDataset(paths, 32, data.degradation, seed=3, augmentation="crop", flips=True, rotations=False)
    assert isinstance(dataset, CaptionedPictures)
    for index in range(8):
        item, expected = dataset[index], usual[index]
        assert torch.equal(item["degraded"], expected["degraded"]) and torch.equal(item["clean"], expected["clean"])
        assert float(item["text"][0, 0]) == (5 if item["path"].endswith("a.png") else 10)
    caption_crops(pictures)
    assert isinstance(find_captions(pictures, None).dataset(data, 3, Lengths()), CaptionedCrops)


def test_random_features_are_redrawn_after_so_many_steps(pictures: Path) -> None:
    """What they are follows from the seed and the images seen, not from which steps this process has made."""
    settings = replace(config(pictures, align="text", redraw_every=3), run=RunConfig(pictures.parent / "r", batch=4))
    caption_crops(pictures)

    def features(task: SAIPETask, first: int) -> torch.Tensor:
        task.loss(task.model, {**batch(), "index": torch.arange(first, first + 3)}, torch.Generator())
        return task.model.embedder.features.clone()

    task, resumed = SAIPETask(settings), SAIPETask(settings)
    start = task.model.embedder.features.clone()
    seen = [features(task, first) for first in (0, 4, 8, 12, 16, 20, 24)]
    assert all(torch.equal(value, start) for value in seen[:3])
    assert all(torch.equal(value, seen[3]) for value in seen[3:6])
    assert not torch.equal(seen[3], start) and not torch.equal(seen[6], seen[3])
    assert torch.equal(features(resumed, 21), seen[5])
    never = SAIPETask(replace(settings, redraw_every=0))
    assert torch.equal(features(never, 10**6), start)


def test_a_killed_and_resumed_run_ends_bit_identical(pictures: Path, text_encoder: TextEncoderConfig) -> None:
    """Across a redrawing of the features, with branches left out at random."""
    caption_crops(pictures)

    def settings(name: str) -> SAIPETrainingConfig:
        run = RunConfig(pictures.parent / name, images=40, batch=4)
        return config(pictures, text_encoder, redraw_every=4, run=run)

    Session("saipe", settings("whole")).train()
    stop_after(Session("saipe", settings("parts")), images=20)
    assert read_checkpoint(pictures.parent / "parts" / "checkpoint.pt")["images"] == 20
    Session("saipe", settings("parts")).train()
    whole, parts = (read_checkpoint(pictures.parent / name / "checkpoint.pt")["model"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and "embedder.features" in whole
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    start = SAIPETask(settings("none")).model.state_dict()
    assert not torch.equal(start["embedder.features"], whole["embedder.features"])
    assert not torch.equal(start["embedder.queries"], whole["embedder.queries"])


def test_a_run_writes_a_first_stage_and_measures_the_alignment_of_held_out_crops(
    pictures: Path, text_encoder: TextEncoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = pictures.parent / "held out"
    held_out.mkdir()
    (pictures / "b.png").rename(held_out / "b.png")
    (held_out / "b.txt").write_text("a dog, a cat.")
    caption_crops(pictures)
    settings = config(pictures, text_encoder)
    settings = replace(settings, data=replace(settings.data, validation=held_out))
    session = Session("saipe", settings)
    session.train()
    output = capsys.readouterr().out
    assert "alignment" in output and "python -m training sodiff --saipe FILE" in output
    file = read_restorer(settings.run.output / "saipe.safetensors")
    assert (file.metadata.family, file.metadata.base, file.metadata.training["align"]) == ("saipe", None, "text")
    network = SAIPE(SAIPEConfig(**file.metadata.config["saipe"]))
    network.load_state_dict(file.part("prompt"))
    network.eval()
    for name, value in session.task.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    clean, text = session.task._held_out[0]
    for quality in (10, 50):
        buffer = io.BytesIO()
        Image.fromarray(pixels(clean)).save(buffer, "JPEG", quality=quality)
        shown = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None] / 255
        error = float((network.tokens(shown)[0] - text.float()).detach().square().mean())
        assert file.metadata.training["metrics"][f"alignment/qf{quality}"] == pytest.approx(error, abs=1e-4)


def test_without_captions_of_validation_pictures_no_alignment_is_measured(
    pictures: Path, text_encoder: TextEncoderConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = pictures.parent / "held out"
    held_out.mkdir()
    (pictures / "b.png").rename(held_out / "b.png")
    (pictures / "a.txt").write_text("a cat")
    settings = config(pictures, text_encoder)
    Session("saipe", replace(settings, data=replace(settings.data, validation=held_out))).train()
    output = capsys.readouterr().out
    assert "alignment" not in output.split("validation at")[1] and "1 of 2 pictures are left out" in output


def test_without_alignment_no_caption_is_needed(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(pictures, align="none")
    Session("saipe", settings).train()
    file = read_restorer(settings.run.output / "saipe.safetensors")
    start = SAIPETask(settings).tensors()
    assert file.metadata.training["align"] == "none"
    for name, value in file.tensors.items():
        assert torch.equal(value, start[name]) == name.startswith("prompt.embedder."), name


def test_what_is_said_when_captions_are_missing_or_do_not_fit(
    pictures: Path, text_encoder: TextEncoderConfig, tmp_path: Path
) -> None:
    def refused(match: str, **changes) -> None:
        with pytest.raises(CaptionError, match=match):
            Session("saipe", config(pictures, text_encoder, **changes)).train()

    refused(r"prepare captions --train .*, or put a \.txt beside each picture.*--align none")
    refused(r"there is no file .*absent\.jsonl", captions=tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="not used with align none"):
        config(pictures, align="none", captions=tmp_path / "absent.jsonl")
    elsewhere = tmp_path / "elsewhere.jsonl"
    elsewhere.write_text(CaptionedCrop("other.png", 0, (0, 0, 32, 32), 50, "cat", "nobody").to_line())
    refused("none of the 3 pictures .* has a caption in .*elsewhere.jsonl", captions=elsewhere)
    caption_crops(pictures)
    settings = config(pictures, text_encoder)
    for change, match in (
        ({"crop": 64}, "crops of 32 pixels, data.crop is 64"),
        ({"flips": True}, "data.flips.*left is left"),
        ({"degradation": Degradation(misaligned_probability=0.5, misaligned_max=8)}, "misaligned_max"),
    ):
        with pytest.raises(CaptionError, match=match):
            Session("saipe", replace(settings, data=replace(settings.data, **change)))
    narrow = replace(settings, network=replace(NETWORK, tokens=7))
    with pytest.raises(TextStatesError, match="77 tokens of 16, the network 7 of 16"):
        Session("saipe", narrow).train()


def test_a_run_starts_from_a_first_stage_of_the_same_shape(pictures: Path) -> None:
    task = SAIPETask(config(pictures, align="none"))
    tensors = {key: value + 1 for key, value in task.tensors().items()}
    task.load(tensors)
    assert torch.equal(task.model.embedder.queries, tensors["prompt.embedder.queries"])
    del tensors["prompt.embedder.queries"]
    with pytest.raises(RestorerFileError, match=r"embedder\.queries"):
        task.load(tensors)


def test_a_handful_of_real_patches_is_learnt_in_both_terms(tmp_path: Path, text_encoder: TextEncoderConfig) -> None:
    """On photographs at their own qualities, towards the states of three captions."""
    folder = tmp_path / "patches"
    folder.mkdir()
    photographs = sorted(shared_path("data", "train", "photos").glob("*.jpg"))
    for number in range(3):
        with Image.open(photographs[number * len(photographs) // 3]) as picture:
            picture.resize((96, 80), Image.Resampling.LANCZOS).save(folder / f"{number}.png")
    caption_crops(folder, side=64, crops=1)
    settings = config(folder, text_encoder)
    settings = replace(
        settings, data=replace(settings.data, crop=64), network=replace(NETWORK, image_side=64, drop_path=0.0)
    )
    task = SAIPETask(settings)
    dataset = task.dataset(find_images(folder), [])
    items = [dataset[index] for index in range(3)]
    given = {key: torch.stack([item[key] for item in items]) for key in ("clean", "degraded", "text")}
    given["index"] = torch.arange(3)

    @torch.no_grad()
    def errors() -> np.ndarray:
        reconstruction, tokens = task.model(given["degraded"])
        return np.array([(reconstruction - given["clean"]).abs().mean(), (tokens - given["text"]).square().mean()])

    before, optimizer = errors(), torch.optim.AdamW(task.model.parameters(), 5e-3, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        task.loss(task.model, given, torch.Generator()).backward()
        optimizer.step()
    assert (errors() / before < (0.6, 0.3)).all(), (before, errors())
