"""`rushes check` passes sound configurations, and catches each planted bug by the check that is for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align import selfcheck
from align.kernels import Ancestral
from align.trajectory import replay
from base_model.errors import UserError
from base_model.lora import add_lora
from base_model.tiny import LatentVideoModel
from recipes import check, cli, ddpo, feedback
from recipes.cli import main
from reward.mixture import Mixture, Term
from reward.types import Scores
from tests.forked import ranks_environment
from tests.recipes.small import save_small_network, save_small_reward_model

RECIPES = ("ddpo", "grpo", "nft", "ppo", "dpo", "reward-gradient")
WITHOUT_DENSITY = ("nft", "dpo", "reward-gradient")
SAMPLER = ["--sampler", "{steps: 4, frames: 5, height: 16, width: 16}"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("check")
    return ["--model", str(save_small_network(folder / "network.safetensors")), "--reward", str(save_small_reward_model(folder / "reward")), "--prompt-pool", "6"]


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Path]:
    files = {}
    for recipe in RECIPES:
        files[recipe] = tmp_path / f"{recipe}.yaml"
        files[recipe].write_text(f"# rushes {recipe} {files[recipe]}\npolicy: {{prompts: 2, group_size: 4, micro_batch: 4, lora_rank: 2}}\n")
    return files


def checked(capfd: pytest.CaptureFixture[str], words: Sequence[object]) -> tuple[int, dict[str, str], str]:
    """(exit status, name of a check -> what is told of it, standard error)."""
    status = main(["check", *map(str, words), *SAMPLER])
    out, err = capfd.readouterr()
    return status, dict(line.split(": ", 1) for line in out.splitlines()), err


def failing(told: dict[str, str]) -> set[str]:
    return {name for name, said in told.items() if said.startswith("FAIL")}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sound_configuration_passes_and_nothing_is_left_behind(
    recipe: str, configs: dict[str, Path], weights: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, told, err = checked(capfd, [configs[recipe], *weights])
    assert status == 0 and told["recipe"] == recipe, err
    assert all(re.match(r"pass, .*\d|not asked, ", told[name]) for name in (*selfcheck.CHECKS, check.FITS)), told
    asked = {name for name in selfcheck.CHECKS if told[name].startswith("pass")}
    assert set(selfcheck.CHECKS) - asked == {selfcheck.RANKS} | ({selfcheck.RATIO, selfcheck.OTHER_BATCHES} if recipe in WITHOUT_DENSITY else set())
    assert sorted(tmp_path.rglob("*")) == before and not selfcheck.rehearsing()


class Flat:
    """A scorer that says the same of every clip."""

    dims, differentiable = ("overall",), True

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        return Scores(torch.full((len(video), 1), self.value), torch.zeros(len(video), 1))


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "reward-gradient"])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_a_reward_that_is_constant_or_unknown_fails(
    value: float, recipe: str, configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "standardised", lambda scorer, pessimism=0.0, dimensions=None: Mixture({"flat": Flat(value)}, (Term("flat", "overall"),)))
    status, told, err = checked(capfd, [configs[recipe], *weights])
    assert status == 1 and "Traceback" not in err
    found = failing(told) - {check.WHOLE}  # what comes after a failed check may break on it
    assert found == {selfcheck.SPREAD} | ({selfcheck.KNOWN} if value != value else set())


@pytest.mark.parametrize("recipe", ["ddpo", "grpo", "ppo"])
def test_a_replay_with_another_kernel_fails_by_its_ratio_and_by_what_was_sampled(
    recipe: str, configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "replay", lambda policy, kernel, step, cond: replay(policy, Ancestral(0.6), step, cond))
    status, told, _ = checked(capfd, [configs[recipe], *weights])
    assert status == 1 and failing(told) == {selfcheck.RATIO, selfcheck.OTHER_BATCHES, selfcheck.RESIDUAL}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_adapter_that_is_not_zero_at_the_start_fails(
    recipe: str, configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(network: Any, **told: Any) -> Any:
        adapted = add_lora(network, **told)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                parameter.add_(1e-3 * ("lora_B" in name))
        return adapted

    monkeypatch.setattr(f"recipes.{recipe.replace('-', '_')}.add_lora", used)
    status, told, _ = checked(capfd, [configs[recipe], *weights])
    assert status == 1 and failing(told) == {selfcheck.ADAPTER}


def test_a_kl_without_gradient_fails(configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "replay", torch.no_grad()(replay))
    status, told, _ = checked(capfd, [configs["ddpo"], *weights])
    assert status == 1 and failing(told) == {selfcheck.KL}


def test_a_pass_that_differs_with_gradient_fails(configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As dropout does, or another attention kernel."""
    velocity = LatentVideoModel._velocity
    monkeypatch.setattr(LatentVideoModel, "_velocity", lambda self, x, t, cond: velocity(self, x, t, cond) * (1 + 1e-3 * torch.is_grad_enabled()))
    for recipe in (*WITHOUT_DENSITY, "ddpo"):
        expected = {selfcheck.RESIDUAL} if recipe in WITHOUT_DENSITY else {selfcheck.RATIO, selfcheck.ADAPTER}
        status, told, _ = checked(capfd, [configs[recipe], *weights])
        assert status == 1 and failing(told) == expected


def test_too_little_memory_fails_by_its_own_check_and_any_other_error_by_the_iteration(
    configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(says: str) -> Any:
        def rollout(*_: Any, **__: Any) -> Any:
            raise RuntimeError(says)

        return rollout

    monkeypatch.setattr(feedback, "rollout", cannot("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    status, told, err = checked(capfd, [configs["nft"], *weights])
    assert status == 1 and failing(told) == {check.FITS} and "Lower policy.micro_batch".lower() in err.lower()
    monkeypatch.setattr(feedback, "rollout", cannot("shapes do not match"))
    status, told, err = checked(capfd, [configs["nft"], *weights])
    assert status == 1 and failing(told) == {check.WHOLE} and "RuntimeError, shapes do not match" in told[check.WHOLE] and not selfcheck.rehearsing()
    assert "Traceback" not in err and main(["check", str(configs["nft"]), *weights, *SAMPLER, "--debug"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_an_iteration_that_does_not_come_to_its_end_fails(
    configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ddpo.ppo_clip
    monkeypatch.setattr(ddpo, "ppo_clip", lambda *given, **named: real(*given, **named)._replace(value=real(*given, **named).value * float("nan")))
    status, told, _ = checked(capfd, [configs["ddpo"], *weights])
    assert status == 1 and failing(told) == {check.WHOLE} and "the loss is nan" in told[check.WHOLE]


def test_json_holds_every_check_also_where_one_failed(configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "standardised", lambda scorer, pessimism=0.0, dimensions=None: Mixture({"flat": Flat(0.0)}, (Term("flat", "overall"),)))
    assert main(["check", str(configs["nft"]), "--json", *weights, *SAMPLER]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["error"]["kind"] == "CheckFailed" and found["error"]["message"].startswith("1 check failed. rewards vary: ")
    assert found["result"][selfcheck.SPREAD].startswith("FAIL") and found["result"][selfcheck.ADAPTER].startswith("pass")


def test_the_recipe_is_named_by_the_first_line_or_by_a_word(tmp_path: Path, configs: dict[str, Path]) -> None:
    assert check.recipe_of(check.Config(file=configs["grpo"])) == "grpo"
    assert check.recipe_of(check.Config(file=configs["grpo"], recipe="ddpo")) == "ddpo"
    for recipe in RECIPES:
        assert check.recipe_of(check.Config(file=cli.shipped_config(recipe))) == recipe
    (tmp_path / "nameless.yaml").write_text("seed: 1\n")
    for wrong, says in (
        (check.Config(), "nobody says which recipe to check, on the command line"),
        (check.Config(file=tmp_path / "nameless.yaml"), "nameless.yaml"),
        (check.Config(file=cli.shipped_config("demo")), "'demo' is no recipe that can be checked"),
        (check.Config(recipe="drpo"), "ddpo, ppo, grpo, nft, dpo, reward-gradient"),
        (check.Config(file=tmp_path / "none.yaml"), "none.yaml"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            check.recipe_of(wrong)


def test_what_follows_is_for_the_recipes_configuration() -> None:
    assert cli.arguments_of("check", ["a.yaml", "--seed", "3"]) == (None, ["--file=a.yaml", '--keys=["--seed", "3"]'])
    assert cli.arguments_of("check", ["--seed", "3", "--recipe", "nft"]) == (None, ["--recipe=nft", '--keys=["--seed", "3"]'])
    assert cli.arguments_of("check", ["a.yaml", "--recipe=nft"]) == (None, ["--file=a.yaml", "--recipe=nft"])
    assert cli.arguments_of("check", []) == (None, [])


def test_the_users_mistakes_end_with_status_2(configs: dict[str, Path], weights: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    for words, says in (([configs["nft"], "--polizy.lr", "1"], "polizy"), ([configs["nft"], "--reward", "no/such"], "no/such"), (["--recipe", "nfd"], "nfd"), ([], "--recipe")):
        assert main(["check", *map(str, words)]) == 2
        err = capfd.readouterr().err
        assert says in err and "Traceback" not in err


# Several processes

TWO = """
import os, sys
from align.run import Run
from recipes.cli import main

generator, statuses = Run.generator, []
for other in (0, 1):
    Run.generator = lambda self, stream, index: generator(self, stream, index + other * int(os.environ["RANK"]))
    statuses.append(main(sys.argv[1:]))
print(statuses)
"""


def test_two_processes_must_hold_the_same_and_do_not_where_one_draws_other_numbers(configs: dict[str, Path], weights: list[str], tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    words = [sys.executable, str(script), "check", str(configs["ddpo"]), *weights, *SAMPLER]
    both = [subprocess.Popen(words, env={**shared, **told}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for told in ranks_environment(2)]
    (out, err), (other_out, _) = (process.communicate(timeout=240) for process in both)
    *lines, statuses = out.splitlines()
    assert statuses == "[0, 1]" and other_out == "[0, 1]\n", f"one process tells\n{err}"
    same, other = (dict(line.split(": ", 1) for line in part) for part in (lines[: len(lines) // 2], lines[len(lines) // 2 :]))
    assert failing(same) == set() and same[selfcheck.RANKS].startswith("pass, gradients, weights and draws of 2 ranks are ")
    assert failing(other) == {selfcheck.RANKS}
