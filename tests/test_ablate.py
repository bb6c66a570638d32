"""`python -m training ablate sodiff`: what each row leaves out, and the table."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reduced_sd21 import reduced_base
from sodiff_overfit import tiny_config, write_patches, write_saipe

from training.__main__ import main
from training.ablate import FIXED_TIMESTEP, FULL, ROWS, variants
from training.command_line.files import to_yaml
from training.configs.sodiff import PRESETS, SODiffConfig
from training.loop.checkpoint import read_checkpoint
from training.losses import PerceptualConfig


def test_each_row_leaves_out_one_thing(tmp_path: Path) -> None:
    """Against the full configuration, a row differs in its own switch and in its folder."""
    unaligned = tmp_path / "unaligned.safetensors"
    full = PRESETS["paper"]
    rows = variants(full, list(ROWS), unaligned)
    assert set(rows) == set(ROWS)
    assert rows[FULL] == replace(full, run=replace(full.run, output=full.run.output / FULL))
    expected = {
        "no-alignment": replace(full, saipe=unaligned),
        "no-predictor": replace(full, timestep=FIXED_TIMESTEP),
        "no-quality": replace(full, loss=replace(full.loss, quality=0.0)),
        "no-edges": replace(full, loss=replace(full.loss, perceptual=PerceptualConfig(edges=False))),
        "no-perceptual": replace(full, loss=replace(full.loss, perceptual=PerceptualConfig("none", edges=True))),
        "no-adversarial": replace(
            full, loss=replace(full.loss, adversarial=replace(full.loss.adversarial, discriminator="none"))
        ),
    }
    for name, config in expected.items():
        assert rows[name] == replace(config, run=replace(full.run, output=full.run.output / name)), name


def test_a_row_that_would_repeat_the_full_one_is_refused(tmp_path: Path) -> None:
    config = replace(PRESETS["paper"], timestep=FIXED_TIMESTEP)
    with pytest.raises(ValueError, match="nothing that no-predictor could leave out"):
        variants(config, [FULL, "no-predictor"], None)
    plain = replace(PRESETS["paper"].loss, perceptual=PerceptualConfig("none", edges=True))
    with pytest.raises(ValueError, match="nothing that no-edges could leave out"):
        variants(replace(PRESETS["paper"], loss=plain), ["no-edges"], None)
    with pytest.raises(ValueError, match="nothing that no-quality could leave out"):
        variants(config, ["no-quality"], None)
    with pytest.raises(ValueError, match="--unaligned"):
        variants(config, ["no-alignment"], None)


@pytest.fixture
def config(tmp_path: Path) -> SODiffConfig:
    write_patches(tmp_path / "patches")
    config = tiny_config(reduced_base().folder, tmp_path)
    return replace(config, run=replace(config.run, precision="no"))


def test_the_command_trains_the_rows_and_prints_their_figures(
    config: SODiffConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    described = tmp_path / "config.yaml"
    described.write_text(to_yaml(config))
    unaligned = write_saipe(tmp_path / "unaligned.safetensors", seed=8)
    command = ["training", "ablate", "sodiff", "--config", str(described), "--unaligned", str(unaligned), "--rows"]
    rows = [FULL, "no-alignment", "no-predictor", "no-quality"]
    monkeypatch.setattr(sys, "argv", [*command, *rows])
    assert main() == 0
    table = (config.run.output / "ablation.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert {"psnr/qf10", "ssim/qf10", "timestep/qf10", "quality_error/qf10"} <= set(head)
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in
             ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:])}  # fmt: skip
    assert list(cells) == rows
    assert float(cells["no-predictor"]["timestep/qf10"]) == FIXED_TIMESTEP
    assert cells["no-predictor"]["quality_error/qf10"] == ""
    assert len({row["psnr/qf10"] for row in cells.values()}) > 2
    assert table.strip() in capsys.readouterr().out

    # Repeated with one more row: what is there is not trained again, the new row joins the table.
    before = {name: read_checkpoint(config.run.output / name / "checkpoint.pt") for name in rows}
    times = {name: (config.run.output / name / "checkpoint.pt").stat().st_mtime_ns for name in rows}
    monkeypatch.setattr(sys, "argv", [*command, *rows, "no-adversarial", "--loss.adversarial.discriminator", "sd21"])
    assert main() == 2  # another configuration than that of the folders
    assert "ablate" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, FULL, "no-predictor"])
    assert main() == 0
    assert times == {name: (config.run.output / name / "checkpoint.pt").stat().st_mtime_ns for name in rows}
    assert all(read_checkpoint(config.run.output / name / "checkpoint.pt")["images"] == before[name]["images"] == 2
               for name in rows)  # fmt: skip
    assert [line.split("|")[1].strip() for line in (config.run.output / "ablation.md").read_text().splitlines()
            if line.startswith("|")][2:] == [FULL, "no-predictor"]  # fmt: skip
