"""Options of the trainings against tyro, another reader of the same dataclasses, and what is said of mistakes."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import tyro
from shared import ROOT

from training.command_line.checks import ConfigError, Given, Names, leaves, put_in, unknown_name, value_of
from training.command_line.configure import parse
from training.command_line.files import read_config
from training.command_line.options import given_in_options, split_options, written
from training.command_line.values import WRONG, convert, convert_words, in_words
from training.commands import COMMANDS


def words_of(value: Any) -> list[str]:
    """A value as a person would write it after its option."""
    if isinstance(value, dict):
        return [str(part) for item in value.items() for part in item]
    return [str(item) for item in value] if isinstance(value, tuple) else [str(value)]


def options_for(config: Any, fields: Iterable[Names]) -> list[str]:
    """Fields of a configuration as options."""
    found: list[str] = []
    for names in fields:
        value = value_of(config, names)
        if isinstance(value, bool):
            off = written((*names[:-1], f"no_{names[-1]}"))
            found.append(written(names) if value else off)
        else:
            found += [written(names), *words_of(value)]
    return found


@pytest.mark.parametrize("command", list(COMMANDS))
def test_options_are_read_as_tyro_reads_them(command: str) -> None:
    """Every field of the last preset, given as options over the default one. tyro gives names with numbers one by one
    and cannot add any: it gets them beforehand."""
    presets = COMMANDS[command].presets()
    default, wanted = presets["paper"], list(presets.values())[-1]
    problems: list[str] = []
    options = options_for(wanted, leaves(wanted))
    assert put_in(default, given_in_options(split_options(options), default, problems), problems) == wanted
    assert problems == []
    several = [names for names, kind in leaves(wanted).items() if typing.get_origin(kind) is dict]
    default = put_in(default, [Given(names, value_of(wanted, names), "") for names in several], problems)
    options = options_for(wanted, [names for names in leaves(wanted) if names not in several])
    options += [word for names in several for key, number in value_of(wanted, names).items()
                for word in (f"{written(names)}.{key}", str(number))]  # fmt: skip
    assert put_in(default, given_in_options(split_options(options), default, problems), problems) == wanted
    assert problems == []
    assert tyro.cli(type(default), default=default, args=options, config=(tyro.conf.AvoidSubcommands,)) == wanted


def test_one_of_several_names_with_numbers_is_changed_beside_the_others(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("data: {degradation: {subsampling: {'4:2:0': 0.5, '4:4:4': 0.5}}}")
    option = "--data.degradation.subsampling"
    _, config = parse("cave", ["--config", str(tmp_path / "my.yaml"), f"{option}.4:4:4", "2", f"{option}.4:2:2", "1"])
    assert config.data.degradation.subsampling == {"4:2:0": 0.5, "4:4:4": 2.0, "4:2:2": 1.0}
    with pytest.raises(ConfigError, match=r"--data\.degradation\.subsampling\.4:2:2: expected a number, got 'much'"):
        parse("cave", [f"{option}.4:2:2", "much"])


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (int, ["7"], 7), (int, ["-1"], -1), (int, ["1e6"], 1_000_000), (int, ["1.5"], WRONG), (int, [], WRONG),
        (int, ["1", "2"], WRONG), (float, ["1e-4"], 1e-4), (float, ["nan"], WRONG), (float, ["inf"], WRONG),
        (bool, [], True), (bool, ["False"], False), (bool, ["true"], True), (bool, ["maybe"], WRONG),
        (Path, ["a b"], Path("a b")), (Path | None, ["None"], None), (Path | None, ["null"], None), (Path, [""], WRONG),
        (float | None, ["0.5"], 0.5), (float | None, ["half"], WRONG),
        (tuple[int, ...], [], ()), (tuple[int, ...], ["5", "10"], (5, 10)), (tuple[int, ...], ["5", "x"], WRONG),
        (tuple[float, float], ["1", "2"], (1.0, 2.0)), (tuple[float, float], ["1"], WRONG),
        (tuple[float, float], ["1", "2", "3"], WRONG), (tuple[bool, ...], ["True", "False"], (True, False)),
        (dict[str, float], ["4:2:0", "0.5"], {"4:2:0": 0.5}), (dict[str, float], ["4:2:0"], WRONG),
        (Literal["no", "bf16"], ["no"], "no"), (Literal["no", "bf16"], ["fp8"], WRONG), (Literal[2, 4], ["4"], 4),
        (tuple[Literal["a", "b"], ...], ["b", "a"], ("b", "a")), (int, ["9007199254740993"], 9007199254740993),
        (tuple[int, ...], ["2024-13-45"], WRONG), (Path, ["~/x"], Path.home() / "x"), (Path, ["a~"], Path("a~")),
    ],
)  # fmt: skip
def test_words_become_values_of_the_fields_type_or_are_refused(kind: Any, words: list[str], value: Any) -> None:
    assert convert_words(kind, words) == value


@pytest.mark.parametrize(
    ("kind", "given", "value"),
    [
        (int, True, WRONG), (int, 7, 7), (int, 7.0, 7), (int, 7.5, WRONG), (float, 1, 1.0), (float, "3e-4", 3e-4),
        (float, True, WRONG), (float, float("nan"), WRONG), (bool, 1, WRONG), (bool, "true", WRONG), (str, 3, WRONG),
        (Path, None, WRONG), (Path | None, None, None), (Path, 3, WRONG), (tuple[int, ...], 5, WRONG),
        (tuple[int, ...], [5, None], WRONG), (tuple[float, float], [1, 2], (1.0, 2.0)),
        (dict[str, float], {1: 2}, WRONG), (dict[str, float], {"a": "b"}, WRONG),
        (Literal["no", "bf16"], False, "no"), (Literal["yes"], True, WRONG), (Path, "~/x", Path.home() / "x"),
        pytest.param(float, 10**400, WRONG, id="no float"), pytest.param(int, "9" * 5000, WRONG, id="too long"),
    ],
)  # fmt: skip
def test_values_of_yaml_become_values_of_the_fields_type_or_are_refused(kind: Any, given: Any, value: Any) -> None:
    assert convert(kind, given) == value
    assert type(convert(kind, given)) is type(value)


def test_types_are_said_in_words() -> None:
    assert in_words(Path | None) == "a path or null"
    assert in_words(tuple[int, ...]) == "a list of whole numbers"
    assert in_words(tuple[float, float]) == "a list of 2 numbers"
    assert in_words(dict[str, float]) == "names with numbers"
    assert in_words(Literal["a", "b"]) == "one of 'a', 'b'"


def test_all_mistakes_of_a_command_line_and_its_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("data:\n  crpo: 64\n  workers: two\n")
    with pytest.raises(ConfigError) as caught:
        parse("driftrec", [
            "starter", "--preset", "startr", "--config", str(path), "--run.batch", "big", "--optimizer.lr", "1e-4",
            "--data.degradation.quality-min=200", "--run.precison", "bf16", "--sde.name", "ouv", "--data", "pictures",
            "--data.no-flips", "now", "--validation.crop",
        ])  # fmt: skip
    assert str(caught.value).splitlines() == [
        "12 mistakes",
        "  starter: expected options, which begin with --; did you mean --preset starter?",
        "  --preset: expected one of paper, starter, got 'startr'; did you mean 'starter'?",
        f"  {path}, line 2: data.crpo: unknown key, did you mean 'crop'?",
        f"  {path}, line 3: data.workers: expected a whole number, got 'two'",
        "  --run.batch: expected a whole number, got 'big'",
        "  --optimizer.lr: unknown option, did you mean --optimizer.learning-rate?",
        "  --run.precison: unknown option, did you mean --run.precision?",
        "  --sde.name: expected one of 'ouve', 'tsdve', 'cosve', got 'ouv'; did you mean 'ouve'?",
        *[line for line in str(caught.value).splitlines() if line.startswith("  --data: a group of options: --data.")],
        "  --data.no-flips: expected nothing after it, got 'now'",
        "  --validation.crop: expected a whole number, got nothing",
        "  --data.degradation.quality-min: quality_min and quality_max must satisfy 0 <= min <= max <= 100, "
        "got 200 and 100",
    ]


def test_mistakes_of_a_file_are_told_in_the_order_of_its_lines(tmp_path: Path) -> None:
    """Also those that only a check of several values finds, which comes last."""
    path = tmp_path / "my.yaml"
    path.write_text("run:\n  batch: 0\ndata:\n  crpo: 64\n  workers: -1\nrun2: 5\ndata:\n  workers: two\n")
    with pytest.raises(ConfigError) as caught:
        parse("driftrec", ["--preset", "startr", "--config", str(path), "--optimizer.lr", "1"])
    said = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert said[0].startswith("--preset: ") and said[-1].startswith("--optimizer.lr: ")
    numbers = [int(line.removeprefix(f"{path}, line ").split(":")[0]) for line in said[1:-1]]
    assert numbers == sorted(numbers) and numbers[0] == 2 and len(numbers) >= 4


@dataclass(frozen=True)
class Inner:
    low: int = 0
    high: int = 100
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"inner.low: expected at most high ({self.high}), got {self.low}.")
        if not 0 <= self.share <= 1 or self.high > 1000:
            raise ValueError(f"expected a share from 0 to 1 and a high of at most 1000, got {self}.")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    kind: Literal["a", "b"] = "a"
    crop: int = 64
    other: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.kind == "b" and self.inner.high > 50:
            raise ValueError(f"inner.high: expected at most 50 with kind b, got {self.inner.high}.")


def refusals(**values: Any) -> list[str]:
    """What is said of values for Outer, by their names with `__` for dots."""
    given = [Given(tuple(key.split("__")), value, f"<{key}>") for key, value in values.items()]
    problems: list[str] = []
    put_in(Outer(), given, problems)
    return problems


def test_values_that_fit_together_are_taken_even_where_each_alone_would_not() -> None:
    assert refusals(inner__low=200, inner__high=300) == []
    assert refusals(kind="b", inner__high=40) == []


def test_each_group_that_refuses_is_reported_with_the_value_that_is_at_fault() -> None:
    assert refusals(inner__low=200, crop=32, other__share=3.0, kind="b") == [
        "<inner__low>: expected at most high (100), got 200.",
        "<other__share>: expected a share from 0 to 1 and a high of at most 1000, got "
        "Inner(low=0, high=100, share=3.0).",
        "<kind>: inner.high: expected at most 50 with kind b, got 100.",
    ]


def test_two_values_that_one_check_refuses_are_both_named() -> None:
    (said,) = refusals(inner__share=-1.0, inner__high=2000, crop=32)
    assert said.startswith("<inner__share> and <inner__high>: expected a share from 0 to 1")


def test_what_is_right_is_kept_beside_what_is_wrong() -> None:
    problems: list[str] = []
    config = put_in(Outer(), [Given(("crop",), 32, ""), Given(("inner", "share"), 7.0, "")], problems)
    assert config == Outer(crop=32) and len(problems) == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("data.crpo", "did you mean data.crop?"),
        ("optimizr.learning_rate", "did you mean optimizer.learning_rate?"),
        ("crop", "did you mean data.crop or validation.crop?"),
        ("lr", "did you mean optimizer.learning_rate?"),
        ("epochs", "did you mean run.images?"),
        ("batch_size", "did you mean run.batch?"),
        ("output", "did you mean run.output?"),
        ("run.qualities", "did you mean validation.qualities?"),
        ("sde.wibble", "known are sde.name, sde.sigma_min, sde.sigma_max, sde.gamma, sde.t_eps"),
    ],
)
def test_the_nearest_names_are_those_that_people_mean(name: str, hint: str) -> None:
    config = COMMANDS["driftrec"].presets()["paper"]
    assert unknown_name(tuple(name.split(".")), config, ".".join) == hint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {crop: 64}\nrun: {batch: 4}\ndata: {flips: true}\n",
         "line 1: data: given again in line 3. Keep one of the two."),
        ("run:\n  batch: 4\n  images: 9\n  batch: 8\n", "line 2: run.batch: given again in line 4."),
        ("run:\n\tbatch: 4\n", "line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("just words", "expected keys and values, got 'just words'"),
        ("data: 5", "line 1: data: expected keys and values, got 5"),
        ("crop: 64", "line 1: crop: unknown key, did you mean 'data.crop' or 'validation.crop'?"),
        ("run: {precision: fp6}", "expected one of 'no', 'bf16', 'fp16', got 'fp6'; did you mean 'fp16'?"),
        ("5: 6", "line 1: 5: unknown key"),
        ("run:\n  seed: 2024-13-45\n", "line 2: run.seed: expected a whole number, got '2024-13-45'"),
        ("run:\n  seed: !!int many\n", "not valid YAML: invalid literal for int()"),
        ("a: !!python/object:os.system {}", "not valid YAML: could not determine a constructor"),
    ],
)  # fmt: skip
def test_mistakes_of_a_file_are_named_with_their_line(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path, COMMANDS["driftrec"].presets()["paper"])
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_in_the_encodings_that_windows_writes(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("run: {license: Größe, precision: no}\ndata:\n  # all of it is commented out\n", encoding=encoding)
    config = read_config(path, COMMANDS["driftrec"].presets()["paper"])
    assert config.run.license == "Größe" and config.run.precision == "no"


def test_a_value_that_a_file_gives_may_be_made_right_by_an_option(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("backbone: dct-small\n")
    with pytest.raises(ConfigError, match=r"backbone: loss\.adversarial\.discriminator: expected dct or none"):
        parse("codiff", ["--config", str(path)])
    _, config = parse("codiff", ["--config", str(path), "--loss.adversarial.discriminator", "none"])
    assert config.backbone == "dct-small"


def test_the_example_of_the_documentation_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    block = text[text.index("    training driftrec: 3 mistakes") :].split("\n\n")[0]
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("data:\n  crpo: 64\n" + "# more\n" * 5 + "run:\n  precision: fp6\n")
    with pytest.raises(ConfigError) as caught:
        parse("driftrec", ["--config", "my.yaml", "--optimizer.lr", "1e-4"])
    assert f"training driftrec: {caught.value}" == "\n".join(line[4:] for line in block.splitlines())
