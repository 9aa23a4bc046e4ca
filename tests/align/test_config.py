import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from align.config import Config, commit, dump, help_text, load, path_keys, resolved
from base_model.errors import UserError


class Sampler(Config):
    steps: Annotated[int, Field(ge=1)] = 8
    """Denoising steps."""
    kind: Literal["ode", "sde"] = "ode"
    """How a step is drawn."""
    eta: float = 0.5
    """Share of noise."""


class Ddpo(Config):
    type: Literal["ddpo"] = "ddpo"
    clip_range: float = 1e-4


class Grpo(Config):
    type: Literal["grpo"] = "grpo"
    beta: float = 0.1


class Example(Config):
    out: Path
    """Folder of the run."""
    lr: float = 1e-3
    """Learning rate."""
    iterations: int = 10
    """Updates."""
    sampler: Sampler = Sampler(eta=0.9)
    algorithm: Annotated[Ddpo | Grpo, Field(discriminator="type")] = Ddpo()
    sizes: tuple[int, ...] = (16, 32)
    """Sides in pixels."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each reward."""
    base: Path | None = None
    """Weights to start from."""
    name: str | None = None
    """A name."""
    quick: bool = False
    """Do less."""
    prompts: tuple[str, ...] = ()
    """What to show."""
    models: dict[str, Path] = Field(default_factory=dict)
    """Name -> folder."""

    @model_validator(mode="after")
    def _sizes_rise(self) -> "Example":
        if list(self.sizes) != sorted(self.sizes):
            raise ValueError("sizes must rise")
        return self


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.yaml"


def example(file: Path, text: str = "out: a\n", *overrides: str) -> Example:
    file.write_text(text)
    return load(Example, file, overrides)


def complaint(file: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        example(file, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(file), "x.yaml")


def test_the_command_line_beats_yaml_and_yaml_beats_defaults(file: Path) -> None:
    cfg = example(file, "out: a\nlr: 0.2\nsampler:\n  steps: 4\n  kind: sde\n", "--sampler.steps", "20")
    assert (cfg.iterations, cfg.lr, cfg.sampler.steps, cfg.sampler.kind) == (10, 0.2, 20, "sde")


def test_a_section_given_in_part_keeps_the_rest_of_its_default(file: Path) -> None:
    assert example(file, "out: a\nsampler: {steps: 4}\n").sampler.eta == 0.9
    assert example(file, "out: a\n", "--sampler.kind", "sde").sampler.eta == 0.9


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--lr", "1e-4"], {"lr": 1e-4}),
        (["--iterations", "1_000"], {"iterations": 1000}),
        (["--iterations=7"], {"iterations": 7}),
        (["--lr", "-1"], {"lr": -1.0}),
        (["--quick"], {"quick": True}),
        (["--quick", "--lr", "2"], {"quick": True, "lr": 2.0}),
        (["--quick", "false"], {"quick": False}),
        (["--sizes", "8,16"], {"sizes": (8, 16)}),
        (["--sizes", "[8, 16]"], {"sizes": (8, 16)}),
        (["--sizes", "8"], {"sizes": (8,)}),
        (["--weights", "{judge-a: 1, b: 2}"], {"weights": {"judge-a": 1.0, "b": 2.0}}),
        (["--weights.judge-a", "3"], {"weights": {"judge-a": 3.0}}),
        (["--base", "null"], {"base": None}),
        (["--base", "runs/a"], {"base": Path("runs/a")}),
        (["--name", "12"], {"name": "12"}),
        (["--name", "title: a cat"], {"name": "title: a cat"}),
        (["--prompts", "a red circle, moving left"], {"prompts": ("a red circle, moving left",)}),
        (["--prompts", "title: a cat"], {"prompts": ("title: a cat",)}),
        (["--prompts", "# a"], {"prompts": ("# a",)}),
        (["--prompts", "2020-01-01"], {"prompts": ("2020-01-01",)}),
        (["--prompts", "[2020-01-01, 2020-13-45, 'a, b']"], {"prompts": ("2020-01-01", "2020-13-45", "a, b")}),
        (["--prompts", r'["\ud83d\ude00"]'], {"prompts": ("\U0001f600",)}),
        (["--name", "\ud83d\ude00"], {"name": "\U0001f600"}),
        (["--models", "{base-1: runs/a}"], {"models": {"base-1": Path("runs/a")}}),
        (["--name", "[a] b: c"], {"name": "[a] b: c"}),
        (["--algorithm.type", "grpo", "--algorithm.beta", "1e-5"], {"algorithm": Grpo(beta=1e-5)}),
        (["--algorithm.clip-range", "0.1"], {"algorithm": Ddpo(clip_range=0.1)}),
    ],
)
def test_values_on_the_command_line_take_the_type_of_their_field(file: Path, overrides: list[str], expected: dict[str, Any]) -> None:
    cfg = example(file, "out: a\n", *overrides)
    assert {name: getattr(cfg, name) for name in expected} == expected


def test_floats_that_yaml_reads_as_text_and_dashes_in_keys_work(file: Path) -> None:
    cfg = example(file, "out: a\nlr: 1e-4\nalgorithm:\n  clip-range: 2e-5\n")
    assert cfg.lr == 1e-4 and cfg.algorithm == Ddpo(clip_range=2e-5)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("out: a\nsampler:\n  stepz: 3\n", [], "sampler.stepz: unknown key (x.yaml:3). Did you mean sampler.steps?"),
        ("out: a\nitertions: 3\n", [], "itertions: unknown key (x.yaml:2). Did you mean iterations?"),
        ("out: a\n", ["--steps", "3"], "steps: unknown key (command line). Did you mean sampler.steps?"),
        ("out: a\n", ["--sampler.steps.x", "3"], "sampler.steps.x: unknown key (command line). Did you mean sampler.steps?"),
        ("out: a\nsampler:\n  steps: ten\n", [], "sampler.steps: expected an integer, got 'ten' (x.yaml:3)"),
        ("out: a\nsampler:\n  steps: true\n", [], "sampler.steps: expected an integer, got true (x.yaml:3)"),
        ("out: a\n", ["--sampler.steps", "2.5"], "sampler.steps: expected an integer, got '2.5' (command line)"),
        ("out: a\nsampler: {steps: 0}\n", [], "sampler.steps: expected greater than or equal to 1, got 0 (x.yaml:2)"),
        ("out: a\nlr: fast\n", [], "lr: expected a number, got 'fast' (x.yaml:2)"),
        ("out: a\nlr:\n", [], "lr: expected a number, got null (x.yaml:2)"),
        ("out: a\nlr: .nan\n", [], "lr: expected a finite number, got NaN (x.yaml:2)"),
        ("out: 3\n", [], "out: expected a path, got 3 (x.yaml:1)"),
        ("out: a\nname: 3\n", [], "name: expected text, got 3 (x.yaml:2)"),
        ("out: a\nsampler: 3\n", [], "sampler: expected a section of keys, got 3 (x.yaml:2)"),
        ("out: a\n", ["--sizes", "[1, x]"], "sizes.1: expected an integer, got 'x' (command line)"),
        ("out: a\n", ["--sizes", "2,1"], "Example: sizes must rise (x.yaml)"),
        ("out: a\n", ["--sampler.kind", "x"], "sampler.kind: expected one of ode, sde, got 'x' (command line)"),
        ("out: a\n", ["--sampler.kind", "sdf"], "sampler.kind: expected one of ode, sde, got 'sdf' (command line). Did you mean sde?"),
        ("out: a\n", ["--quick", "maybe"], "quick: expected true or false, got 'maybe' (command line)"),
        ("out: a\n", ["--algorithm.type", "ppo"], "algorithm.type: expected one of ddpo, grpo, got 'ppo' (command line)"),
        ("out: a\n", ["--algorithm.beta", "1"], "algorithm.beta: not a key of the kind of section chosen here (command line). Choose the kind that has it, or leave it out"),
        ("lr: 1\n", [], "out: is required and was given nowhere. Add it to the config or write --out VALUE"),
        ("out: a\n", ["--lr"], "--lr: expected a value after it on the command line. Write --lr VALUE"),
        ("out: a\n", ["lr"], "unexpected argument 'lr' on the command line. Options are written --key.path value"),
        ("out: a\n\nout: b\n", [], "out: given twice (x.yaml:1 and x.yaml:3). Keep one"),
        ("out: a\nname: 2020-01-01\n", ["--name", "\udcff"], "name: holds half a character, '\\udcff' (command line). Write it as UTF-8"),
        ('out: a\nprompts: ["\\ud83d"]\n', [], "prompts.0: holds half a character, '\\ud83d' (x.yaml:2). Write it as UTF-8"),
        ("out: a\nlr: !!timestamp 2020-13-45\n", [], "not YAML, x.yaml: month must be in 1..12. Mend that line"),
        ("out: a\niterations: " + "9" * 5000, [], "not YAML, x.yaml: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits. Mend that line"),
        ("out: a\nprompts: " + "[" * 5000, [], "not YAML, x.yaml: nested too deeply. Mend that line"),
        ("out: a\nprompts: &p [*p]\n", [], "not YAML, x.yaml: an alias stands inside what it names. Mend that line"),
        ("out: !!int x\n", [], "not YAML, x.yaml: invalid literal for int() with base 10: 'x'. Mend that line"),
        ("out: a\n", ["--models", "{a: x, a: y}"], "models.a: given twice (command line). Keep one"),
        ("out: a\n", ["--sampler", "{steps: 3, stepz: 4}"], "sampler.stepz: unknown key (command line). Did you mean sampler.steps?"),
        ("out: a\n", ["--sizes", "[1"], "not YAML, command line: expected ',' or ']', but got '<stream end>'. Write --sizes with a list as '[1, 2]' and a mapping as '{a: 1}'"),
        ("out: a\n", ["--out", ""], "out: is no path, '' (command line). Give the name of a file or folder"),
        ("out: a\n", ["--base", "a\0b"], "base: is no path, 'a\\x00b' (command line). Give the name of a file or folder"),
        ("out: a\n", ["--out", "x" * 300], "out: is too long for a path, '" + "x" * 39 + "... (command line). Give the name of a file or folder"),
        ("out: a\n", ["--models", "{a: ''}"], "models.a: is no path, '' (command line). Give the name of a file or folder"),
        ("out: [a\n", [], "not YAML, x.yaml:2: expected ',' or ']', but got '<stream end>'. Mend that line"),
        ("- a\n", [], "x.yaml: expected a mapping of keys to values, got ['a']. Write `key: value` lines"),
        ("out: !!python/object/apply:os.system [ls]\n", [], "not YAML"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_the_place(file: Path, text: str, overrides: list[str], message: str) -> None:
    said = complaint(file, text, *overrides)
    assert said.startswith(message) if message == "not YAML" else said == message


def test_a_missing_config_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config"):
        load(Example, tmp_path / "none.yaml", [])


def test_an_empty_file_and_no_file_mean_the_defaults(file: Path) -> None:
    assert example(file, "# nothing\n", "--out", "a") == load(Example, None, ["--out", "a"])


def test_a_config_is_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        example(file).lr = 1.0  # type: ignore[misc]


def test_dump_loads_back_to_the_same_config(file: Path, tmp_path: Path) -> None:
    cfg = example(file, "out: a\nweights: {a: 1}\nbase: b\n", "--algorithm.type", "grpo", "--sampler.steps", "3")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(dump(cfg)))
    assert load(Example, again, []) == cfg


def test_resolved_names_config_commit_and_versions(file: Path) -> None:
    found = json.loads(json.dumps(resolved(example(file))))
    assert found["config"]["sampler"] == {"steps": 8, "kind": "ode", "eta": 0.9}
    assert found["versions"]["torch"].startswith("2.") and found["commit"] == commit()


def test_help_shows_every_key_with_its_sentence_type_and_default() -> None:
    text = help_text(Example)
    assert "--out  Path  (required)\n      Folder of the run." in text
    assert "--sampler.kind  ode|sde  (default ode)\n      How a step is drawn." in text
    assert "--algorithm.type  ddpo|grpo  (default ddpo)" in text
    assert "--base  Path|null  (default null)" in text


def test_paths_are_known_by_their_type() -> None:
    assert path_keys(Example) == {"out", "base"}
