"""Captions: boxes and qualities, resuming after a kill, several processes, a real vision-language model (tiny, random),
ready `.txt` files, and what is said when something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import ROOT

from training.data.captions import CaptionedCrop, CaptionError, cut_crop, draw_crop, read_captions, read_texts
from training.prepare import run
from training.prepare.captions import CaptionSettings, write_captions

SETTINGS = CaptionSettings(model="fake", crop=32)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of noise, one of them smaller than the crops, one in a sub-folder, one turned by its EXIF tag."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, shape in {"a": (40, 60), "b": (48, 33), "small": (20, 70), "sub/d": (64, 64)}.items():
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    turned, exif = Image.fromarray(rng.integers(0, 255, (36, 90, 3), dtype=np.uint8)), Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.png", exif=exif)
    return folder


class Fake:
    """Describes a picture by the sum of its pixels, and may be killed before a given one."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.pictures: list[Image.Image] = []
        self.dies_at = dies_at

    def __call__(self, pictures):
        if self.dies_at is not None and len(self.pictures) + len(pictures) > self.dies_at:
            raise KeyboardInterrupt
        self.pictures += pictures
        return [f"sum {int(np.asarray(picture).sum(dtype=np.int64))}" for picture in pictures]


def write(pictures: Path, output: Path, settings: CaptionSettings = SETTINGS, **options) -> Fake:
    fake = options.pop("fake", Fake())
    write_captions(settings, pictures, output, make_captioner=lambda *_: fake, **{"batch": 2, **options})
    return fake


def pillow_crop(path: Path, box, quality: int | None) -> np.ndarray:
    """The crop by Pillow alone: upright, cut, compressed with 4:2:0."""
    from PIL import ImageOps

    with Image.open(path) as picture:
        window = ImageOps.exif_transpose(picture).crop(box)
    if quality is not None:
        buffer = io.BytesIO()
        window.save(buffer, "JPEG", quality=quality, subsampling=2)
        window = Image.open(buffer).convert("RGB")
    return np.asarray(window)


@pytest.mark.parametrize("of", ["degraded", "clean"])
def test_the_model_sees_the_box_at_the_quality_that_the_line_names(of: str, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    fake = write(pictures, output, replace(SETTINGS, of=of), crops=2)
    crops = read_captions(output)
    shown = {f"sum {int(np.asarray(picture).sum(dtype=np.int64))}": np.asarray(picture) for picture in fake.pictures}
    assert len(crops) == len(shown) == 10
    for crop in crops:
        assert crop.side == 32 and crop.model == "fake" and 5 <= crop.quality <= 95
        if crop.path != "small.png":
            expected = pillow_crop(pictures / crop.path, crop.box, crop.quality if of == "degraded" else None)
            np.testing.assert_array_equal(shown[crop.caption], expected)


def test_a_box_beyond_a_small_picture_shows_it_mirrored() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (5, 12, 3), dtype=np.uint8)
    (left, top, right, bottom), _ = draw_crop("a.png", 0, picture.shape, 12, (5, 95), seed=0)
    assert (left, right, bottom - top) == (0, 12, 12) and top == -3
    padded = np.pad(picture, ((3, 4), (0, 0), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(cut_crop(picture, (0, -3, 12, 9)), padded)
    np.testing.assert_array_equal(cut_crop(picture, (2, 1, 6, 5)), picture[1:5, 2:6])


def test_boxes_and_qualities_are_uniform_and_follow_from_name_number_and_seed() -> None:
    draws = [draw_crop(f"{name}.png", 0, (40, 50), 32, (5, 95), seed=0) for name in range(4000)]
    boxes, qualities = np.array([box for box, _ in draws]), np.array([quality for _, quality in draws])
    assert set(boxes[:, 0]) == set(range(19)) and set(boxes[:, 1]) == set(range(9))
    assert set(qualities) == set(range(5, 96)) and abs(qualities.mean() - 50) < 4 * 26.3 / 4000**0.5
    assert abs(np.corrcoef(boxes[:, 0], qualities)[0, 1]) < 0.08 and abs(np.corrcoef(boxes[:, :2].T)[0, 1]) < 0.08
    same = [draw_crop("7.png", *rest, seed=seed) for *rest, seed in [(0, (40, 50), 32, (5, 95), 0)] * 2]
    assert same == [draws[7]] * 2
    others = {draw_crop("7.png", number, (400, 500), 32, (5, 95), seed) for number in range(3) for seed in range(3)}
    assert len(others) == 9


@pytest.mark.parametrize("cut", [True, False])
def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(cut: bool, pictures: Path, tmp_path: Path) -> None:
    """Nothing is captioned twice; a line that the kill cut in two is dropped and captioned again."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    write(pictures, whole, crops=2)
    with pytest.raises(KeyboardInterrupt):
        write(pictures, parts, crops=2, fake=Fake(dies_at=5))
    text = parts.read_text()
    assert text.count("\n") == 4
    if cut:
        parts.write_text(text[:-20])
    again = write(pictures, parts, crops=2)
    assert len(again.pictures) == (7 if cut else 6)
    assert parts.read_text() == whole.read_text()
    assert write(pictures, parts, crops=2).pictures == []


def test_more_crops_and_more_pictures_may_be_asked_for_later(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    write(pictures, output)
    before = set(output.read_text().splitlines())
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(pictures / "0 new.png")
    assert len(write(pictures, output, crops=2).pictures) == 7
    assert before < set(output.read_text().splitlines()) and len(read_captions(output)) == 12


def test_another_setting_in_the_same_file_is_refused_and_named(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    write(pictures, output)
    for change in ({"prompt": "Why?"}, {"seed": 3}, {"of": "clean"}, {"quality_max": 50}):
        (key, value), fake = next(iter(change.items())), Fake()
        with pytest.raises(CaptionError, match=rf"other settings \({key} was .*, is {re.escape(repr(value))}\)"):
            write(pictures, output, replace(SETTINGS, **change), fake=fake)
        assert not fake.pictures
    output.with_suffix(".settings.json").unlink()
    with pytest.raises(CaptionError, match="unknown settings"):
        write(pictures, output)


def test_a_picture_that_cannot_be_decoded_is_named_and_the_others_are_captioned(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(whole, "JPEG")
    (pictures / "cut.jpg").write_bytes(whole.getvalue()[:2000])
    write(pictures, tmp_path / "captions.jsonl")
    written = capsys.readouterr()
    assert "broken.png" in written.out and "cut.jpg" in written.out + written.err
    assert len(read_captions(tmp_path / "captions.jsonl")) == 5


LINE = {"path": "a.png", "number": 0, "box": [0, 0, 8, 8], "quality": 30, "caption": "a “cat”", "model": "m"}


def test_a_line_is_read_as_it_was_written_and_may_say_more(tmp_path: Path) -> None:
    crop = CaptionedCrop("ü/a.png", 3, (-2, 0, 6, 8), 30, "ein “Hund”\u2028mit Ball", "m")
    file = tmp_path / "captions.jsonl"
    file.write_text(crop.to_line() + json.dumps({**LINE, "note": 1}) + "\n", encoding="utf-8")
    assert read_captions(file) == [crop, CaptionedCrop("a.png", 0, (0, 0, 8, 8), 30, "a “cat”", "m")]


@pytest.mark.parametrize(
    "change", [{"box": [0, 0, 8, 9]}, {"box": [0, 0, 8]}, {"quality": 0}, {"caption": None}, {"path": 3}]
)
def test_a_wrong_line_is_named(change: dict, tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + json.dumps({**LINE, **change}) + "\n")
    with pytest.raises(CaptionError, match=rf"line 2: .*{next(iter(change))}"):
        read_captions(file)


def test_texts_beside_pictures_are_read_as_one_line_each(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.png", "d.webp")]
    (tmp_path / "a.txt").write_bytes("\ufeffa cat,\r\n on a  mat\n".encode())
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "d.txt").write_text("ein Hühnchen", encoding="utf-8")
    assert read_texts(paths) == {paths[0]: "a cat, on a mat", paths[3]: "ein Hühnchen"}
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CaptionError, match=r"d\.txt: expected UTF-8"):
        read_texts(paths)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of 20,000 random weights that knows 15 words, as transformers stores one."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llava")
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:", "describe", "this", "picture"]
    words += ["a", "red", "cat", "dog", "."]
    words_to_ids = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    words_to_ids.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**shape, image_size=28, patch_size=14, projection_dim=16),
        text_config=transformers.LlamaConfig(**shape, vocab_size=15, pad_token_id=0, bos_token_id=2, eos_token_id=3),
        image_token_id=4, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # so that pictures change what it says
    model.save_pretrained(folder)
    return folder


def arguments(pictures: Path, output: Path, model: Path | str) -> list[str]:
    return [
        *("captions", "--train", str(pictures), "--output", str(output), "--model", str(model), "--crop", "32"),
        *("--prompt", "describe this picture", "--max-new-tokens", "6", "--batch", "3"),
    ]


def test_a_vision_language_model_captions_what_transformers_itself_says(
    tiny_llava: Path, pictures: Path, tmp_path: Path
) -> None:
    """Each crop alone, through transformers' own chat template: the same caption as in our batches."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run(arguments(pictures, tmp_path / "captions.jsonl", tiny_llava))
    crops = read_captions(tmp_path / "captions.jsonl")
    processor = AutoProcessor.from_pretrained(tiny_llava)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    for crop in crops:
        if crop.path == "small.png":
            continue
        window = Image.fromarray(pillow_crop(pictures / crop.path, crop.box, crop.quality))
        content = [{"type": "image", "image": window}, {"type": "text", "text": "describe this picture"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
        assert crop.caption == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert len(crops) == 5 and len({crop.caption for crop in crops}) > 1


def test_processes_share_the_pictures_and_end_with_the_file_of_one(
    tiny_llava: Path, pictures: Path, tmp_path: Path
) -> None:
    """Under torchrun; the second run finds a part that was left behind by a killed one, its last line cut."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(arguments(pictures, one, tiny_llava))
    lines = one.read_text().splitlines(keepends=True)
    two.with_suffix(".settings.json").write_text(one.with_suffix(".settings.json").read_text())
    (tmp_path / "two.jsonl.part-001").write_text(lines[2] + lines[3][:30])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "training"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "prepare", *arguments(pictures, two, tiny_llava)], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 5 crops" in done.stdout and done.stdout.count("done:") == 1
    assert two.read_text() == one.read_text()
    assert not list(tmp_path.glob("*part*"))


def test_what_is_said_without_a_usable_model(pictures: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import training.__main__ as program

    def message(model: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["training", "prepare", *arguments(pictures, tmp_path / "c.jsonl", model)])
        assert program.main() == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "cannot be loaded" in message(tmp_path / "absent") and "llava-hf/llava-1.5-7b-hf" in message(tmp_path / "no")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install" in message(tmp_path / "absent")
    assert "other settings" not in message(tmp_path / "nothing was captioned with the others")


def test_the_default_file_lies_with_the_pictures(pictures: Path, tiny_llava: Path, monkeypatch, capsys) -> None:
    run([*arguments(pictures, Path("unused"), tiny_llava)[:3], *arguments(pictures, Path("unused"), tiny_llava)[5:]])
    assert len(read_captions(pictures / "captions.jsonl")) == 5
    with pytest.raises(CaptionError, match="quality-min"):
        run([*arguments(pictures, pictures / "x.jsonl", tiny_llava), "--quality-min", "0"])
