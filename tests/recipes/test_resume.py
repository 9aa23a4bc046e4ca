"""Killed with SIGKILL at any moment, in one process or in two, SFT and RL end with the very same weights, state and metrics as a run that nobody disturbed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from align.run import Run, latest_checkpoint, read_metrics
from base_model.checkpoint import load_weights
from recipes import ddpo, dpo, grpo, nft, ppo, reward_gradient
from recipes.feedback import PolicyLimit
from recipes.weights import file_hash
from reward.safety.contract import SafetyRunner
from reward.safety.head import Head, load_filter, load_look, save_filter
from reward.safety.policy import load_policy
from tests.recipes.killed import MOMENTS, Ended, Server
from tests.recipes.small import Dazzle, run_small, save_small_network, save_small_reward_model

POLICY = {"iterations": 6, "prompts": 2, "group_size": 4, "micro_batch": 4, "evaluate_every": 3, "save_every": 2, "lora_rank": 4}
OWN: dict[str, dict[str, object]] = {
    "ddpo": {"same_noise": "false", "micro_batch": 2, "updates": 2},
    "grpo": {"window": "sliding", "slide_every": 2, "first_steps": 3},
    "ppo": {"micro_batch": 2, "epochs": 2, "minibatches": 2},
    "nft": {"updates": 2, "old_rate": 0.1},
    "dpo": {"updates": 2, "micro_batch": 2, "which": "all"},
    "reward-gradient": {"method": "alignprop"},
}
"""Keys of each recipe's policy beside those that all have: with every state it can have, and at least two micro-batches."""

ALWAYS = {"network", "optimizer", "guard_watch", "multiplier", "multiplier_p05"}
KEPT = {
    "sft": {"network", "optimizer", "schedule", "average"},
    "ddpo": {*ALWAYS, "schedule", "statistics"},
    "grpo": ALWAYS,
    "ppo": {*ALWAYS, "critic", "critic_optimizer"},
    "nft": {*ALWAYS, "old"},
    "dpo": ALWAYS,
    "reward-gradient": ALWAYS,
}
"""What of each recipe changes in its loop. Prompts, windows, noise and orders are functions of the seed and the iteration; what is held out and encoded is made before the loop."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_small_network(folder / "network.safetensors")
    save_small_reward_model(folder / "reward", seed=1)
    save_small_reward_model(folder / "guard", seed=2)
    save_choosy_head(folder / "head")
    return folder


def save_choosy_head(folder: Path) -> None:
    """A trained filter that has learned nothing and blocks some of the small network's clips under each of two policies, mostly others."""
    torch.manual_seed(0)
    head = Head(("P05", "P17"), 8, 4)
    for limits in (head.low, head.high):
        limits.copy_(torch.tensor([0.596, 0.483]))
    save_filter(folder, head, load_look("", fps=12.0, seconds=1.0), fps=12.0, seconds=1.0, facts={})


def command(recipe: str, out: Path, weights: Path) -> list[str]:
    common = ["--out", str(out), "--seed", "3"]
    if recipe == "sft":
        fit = {"iterations": 12, "capacity": 512, "held_out": 4, "evaluate_every": 4, "save_every": 2, "lr": 0.003}
        return ["sft", *common, "--model", str(weights / "network.safetensors"), "--clips", "40", *[x for key, value in fit.items() for x in (f"--fit.{key}", str(value))]]
    sampler = {"steps": 5, "frames": 5, "height": 16, "width": 16}
    words = [recipe, *common, "--model", str(weights / "network.safetensors"), "--reward", str(weights / "reward"), "--guard", str(weights / "guard")]
    words += ["--prompt-pool", "6", "--held-out-prompts", "4", "--guard-drop", "1000"]
    words += ["--filters.trained", json.dumps([str(weights / "head")]), "--limits", json.dumps({"P05": {"limit": 0.2}})]
    words += [x for key, value in {**POLICY, **OWN[recipe]}.items() for x in (f"--policy.{key}", str(value))]
    return words + [x for key, value in sampler.items() for x in (f"--sampler.{key}", str(value))]


def finished(ended: Ended) -> Ended:
    assert not any(ended.statuses), ended.said[-3000:]
    return ended


def killed_and_resumed(server: Server, words: list[str], whole: Ended, moments: list[str], dice: random.Random, processes: int = 1) -> list[str]:
    """Killed at each of the moments, after at most an equal share of the work, and resumed each time; where it was killed."""
    told = []
    for moment in moments:
        number = dice.randint(1, max(1, whole.moments[moment] // (len(moments) + 1)))
        victim = 0 if moment == "checkpoint" else dice.randrange(processes)
        ended = server.run(words, processes=processes, kill=(moment, number), victim=victim)
        assert ended.statuses[victim] == -signal.SIGKILL, f"was not killed at {moment} {number}: {ended.said[-3000:]}"
        words = [*words, "--resume"] if "--resume" not in words else words
        told.append(f"{moment} {number} of process {victim}")
    finished(server.run(words, processes=processes))
    return told


def result(out: Path, recipe: str) -> dict[str, Any]:
    """All that a run leaves behind, but for the time it took."""
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    state = {key: value for key, value in json.loads((checkpoint / "state.json").read_text()).items() if key not in ("seconds", "metrics_bytes")}
    files = [*checkpoint.glob("*.safetensors"), *out.glob("*.safetensors"), *out.glob("held_out/*"), *out.glob("guards.json")]
    assert set(state["states"]) == KEPT[recipe] == {file.stem for file in checkpoint.glob("*.safetensors")}
    assert recipe == "sft" or len(files) == len(KEPT[recipe]) + 2 + 3 + 1  # adapter and network, three looks, what the guards said
    rows = read_metrics(out, wall_clock=False)
    assert recipe == "sft" or limits_matter(rows)
    return {"metrics": rows, "state": state, **{str(file.relative_to(out)): file_hash(file) for file in files}}


def limits_matter(rows: list[dict[str, Any]]) -> bool:
    """Whether some clips of a run violated both of its limits, and some did not."""
    return all(0 < max(row.get(rate) or 0.0 for row in rows) < 1 for rate in ("violation_rate", "violation_rate_P05"))


COUNTED = ("forward_passes", "forward_equivalents")


def close(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float) -> bool:
    """Whether all metrics of two runs agree to rounding; names, what is unknown and the passes after the first rollout exactly."""
    for counted in COUNTED:
        passes = {row[counted] - same[counted] for row, same in zip(one, other, strict=True)}
        assert len(passes) == 1, f"each process checks a micro-batch of its own before the first update, and that is all: {passes}"
    pairs = [(row[name], same.get(name)) for row, same in zip(one, other, strict=True) for name in row if name not in COUNTED]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert [sorted(row) for row in one] == [sorted(row) for row in other] and all(a is b for a, b in pairs if a is None or b is None)
    return all(a == pytest.approx(b, rel=rel, abs=5e-5) for a, b in known)


@pytest.mark.parametrize(("recipe", "moment"), [*zip(["sft", *OWN], ["update", "checkpoint", "rollout"] * 3, strict=False)])
def test_a_killed_run_resumes_to_the_same_bits(recipe: str, moment: str, server: Server, weights: Path, tmp_path: Path) -> None:
    whole = finished(server.run(command(recipe, tmp_path / "whole", weights)))
    print(recipe, killed_and_resumed(server, command(recipe, tmp_path / "killed", weights), whole, [moment], random.Random(recipe)))
    assert result(tmp_path / "killed", recipe) == result(tmp_path / "whole", recipe)


@pytest.fixture(scope="module")
def of_two(server: Server, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """PPO in two processes, undisturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, finished(server.run(command("ppo", out, weights), processes=2))


def test_two_processes_killed_resume_to_the_same_bits(of_two: tuple[Path, Ended], server: Server, weights: Path, tmp_path: Path) -> None:
    print(killed_and_resumed(server, command("ppo", tmp_path / "killed", weights), of_two[1], ["update"], random.Random(5), processes=2))
    assert result(tmp_path / "killed", "ppo") == result(of_two[0], "ppo")


def test_a_run_of_two_processes_goes_on_in_one_and_says_what_changes(of_two: tuple[Path, Ended], server: Server, weights: Path, tmp_path: Path) -> None:
    words, out = command("ppo", tmp_path / "run", weights), tmp_path / "run"
    server.run(words, processes=2, kill=("update", of_two[1].moments["update"] // 2 + 1), victim=1)
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    kept = int(checkpoint.name)  # rows
    ended = finished(server.run([*words, "--resume"]))
    assert "saved by 2 processes, goes on with 1 process: " in ended.said and "rounding" in ended.said
    rows, others = read_metrics(out, wall_clock=False), read_metrics(of_two[0], wall_clock=False)
    assert 0 < kept < len(rows) and rows[:kept] == others[:kept]
    assert close(rows, others, 1e-3) and rows[-1]["forward_passes"] == others[-1]["forward_passes"]


def compared(server: Server, weights: Path, folder: Path, recipe: str) -> None:
    """A recipe in one process and in two."""
    for processes in (1, 2):
        finished(server.run(command(recipe, folder / str(processes), weights), processes=processes))
    one, two = (read_metrics(folder / name, wall_clock=False) for name in ("1", "2"))
    assert close(one[:1], two[:1], 1e-4) and close(one, two, 1e-3) and limits_matter(one)
    adapters = [load_weights(folder / name / "adapter.safetensors")[0] for name in ("1", "2")]
    apart = sum(float((adapters[0][name] - adapters[1][name]).square().sum()) for name in adapters[0])
    moved = sum(float(tensor.square().sum()) for name, tensor in adapters[0].items() if "lora_B" in name)  # which was 0
    assert apart < 1e-6 * moved


def test_two_processes_share_the_work_of_one_and_come_to_the_same_policy(server: Server, weights: Path, tmp_path: Path) -> None:
    compared(server, weights, tmp_path, "nft")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in OWN if recipe != "nft"])
def test_every_recipe_comes_to_the_same_policy_in_two_processes(recipe: str, server: Server, weights: Path, tmp_path: Path) -> None:
    compared(server, weights, tmp_path, recipe)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", OWN)
def test_killed_again_and_again_a_run_resumes_to_the_same_bits(recipe: str, processes: int, server: Server, weights: Path, tmp_path: Path) -> None:
    whole = finished(server.run(command(recipe, tmp_path / "whole", weights), processes=processes))
    for seed in range(2):
        dice, out = random.Random(f"{recipe} {processes} {seed}"), tmp_path / f"killed-{seed}"
        print(recipe, processes, killed_and_resumed(server, command(recipe, out, weights), whole, dice.sample(MOMENTS, 3), dice, processes))
        assert result(out, recipe) == result(tmp_path / "whole", recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OWN)
def test_a_run_goes_on_with_one_process_more(recipe: str, server: Server, weights: Path, tmp_path: Path) -> None:
    whole = finished(server.run(command(recipe, tmp_path / "whole", weights)))
    words = command(recipe, tmp_path / "run", weights)
    server.run(words, kill=("update", whole.moments["update"] // 2 + 1))
    ended = finished(server.run([*words, "--resume"], processes=2))
    assert "saved by 1 process, goes on with 2 processes: " in ended.said
    assert close(*(read_metrics(tmp_path / name, wall_clock=False) for name in ("run", "whole")), 1e-3)


@pytest.mark.slow
def test_torchrun_killed_as_a_whole_or_one_process_alone_resumes_to_the_same_bits(server: Server, weights: Path, tmp_path: Path) -> None:
    def start() -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recipes.cli", *command("nft", tmp_path / "killed", weights)]
        return subprocess.Popen([*words, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def wait_for_lines(number: int) -> None:
        until = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= number):
            assert time.monotonic() < until and process.poll() is None, "it never came so far"
            time.sleep(0.01)

    metrics = tmp_path / "killed" / "metrics.jsonl"
    finished(server.run(command("nft", tmp_path / "whole", weights), processes=2))
    process = start()
    wait_for_lines(2)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:  # workers have sessions of their own
        each.kill()
    process.communicate(timeout=60)
    process = start()
    wait_for_lines(4)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "recipes.cli" in child.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    process.communicate(timeout=300)
    assert process.returncode == 1
    process = start()
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, error[-3000:]
    assert result(tmp_path / "killed", "nft") == result(tmp_path / "whole", "nft")


def test_more_processes_than_micro_batches_are_one_line(server: Server, weights: Path, tmp_path: Path) -> None:
    ended = server.run([*command("nft", tmp_path / "run", weights), "--policy.micro_batch", "8"], processes=2)
    assert ended.statuses == [2, 2]
    assert "2 processes cannot share 1 micro-batches, policy.micro_batch. Lower it" in ended.said and "Traceback" not in ended.said


class Cut(Exception):
    pass


class Forgetful:
    """Saves a state, of a network what trains, and forgets to load it."""

    def __init__(self, thing: Any, trainable_only: bool) -> None:
        self.thing, self.trainable_only = thing, trainable_only

    def state_dict(self) -> Any:
        trained = {name for name, parameter in self.thing.named_parameters() if parameter.requires_grad} if self.trainable_only else set()
        return {name: value for name, value in self.thing.state_dict().items() if not self.trainable_only or name in trained}

    def load_state_dict(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("recipe", [ppo, *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in (ddpo, grpo, nft, dpo, reward_gradient))])
def test_every_state_is_needed_so_that_one_forgotten_would_be_noticed(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = recipe.__name__.removeprefix("recipes.").replace("_", "-")
    own = {key: value == "true" if value in ("true", "false") else value for key, value in OWN[name].items()}
    policy = {**POLICY, **own, "iterations": 4, "evaluate_every": 100}
    save_choosy_head(tmp_path / "head")
    limits = {"P05": PolicyLimit(limit=0.2)}

    def run(out: Path, *, resume: bool = False) -> Any:
        filters = [Dazzle(0.45), load_filter(tmp_path / "head", load_policy())]
        run_small(recipe, out, policy, runner=SafetyRunner(filters, load_policy()), constrained=True, limits=limits, strobe=0.5, resume=resume)
        checkpoint = latest_checkpoint(out)
        assert checkpoint is not None
        return read_metrics(out, wall_clock=False), {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}

    whole, write, register = run(tmp_path / "whole"), Run._write, Run.register

    def cut(self: Run, states: Any) -> None:
        write(self, states)
        raise Cut

    with monkeypatch.context() as patched, pytest.raises(Cut):
        patched.setattr(Run, "_write", cut)
        run(tmp_path / "begun")
    for forgotten in ("", *sorted(KEPT[name] - {"guard_watch"})):  # nobody watches here

        def keep(self: Run, key: str, thing: Any, *, trainable_only: bool = False, forgotten: str = forgotten) -> None:
            if key == forgotten:
                register(self, key, Forgetful(thing, trainable_only))
            else:
                register(self, key, thing, trainable_only=trainable_only)

        monkeypatch.setattr(Run, "register", keep)
        shutil.copytree(tmp_path / "begun", tmp_path / f"without-{forgotten}")
        assert (run(tmp_path / f"without-{forgotten}", resume=True) == whole) == (not forgotten), forgotten
