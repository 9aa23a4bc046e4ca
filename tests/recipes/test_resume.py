"""Killed with SIGKILL at any point and resumed, SFT and RL end with the very same weights and metrics as without the interruption."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.run import read_metrics
from recipes.weights import file_hash
from tests.recipes.small import save_small_network, save_small_reward_model

OWN: dict[str, dict[str, object]] = {
    "ddpo": {"updates": 2},
    "nft": {"updates": 2},
    "ppo": {"epochs": 2, "minibatches": 2},
    "dpo": {"updates": 2},
    "reward-gradient": {"method": "vader"},
}
"""Keys of each recipe's policy beside those that all have."""


def command(recipe: str, out: Path, weights: Path) -> list[str]:
    common = ["--out", str(out), "--seed", "3"]
    if recipe == "sft":
        fit = {"iterations": 24, "capacity": 512, "held_out": 4, "evaluate_every": 8, "save_every": 4, "lr": 0.003}
        return ["sft", *common, "--base", str(weights / "network.safetensors"), "--clips", "40", *[x for key, value in fit.items() for x in (f"--fit.{key}", str(value))]]
    policy = {"iterations": 12, "prompts": 2, "group_size": 4, "micro_batch": 4, "evaluate_every": 4, "save_every": 3, "lora_rank": 4, **OWN[recipe]}
    sampler = {"steps": 4, "frames": 5, "height": 16, "width": 16}
    words = [recipe, *common, "--model", str(weights / "network.safetensors"), "--reward", str(weights / "reward"), "--guard", str(weights / "guard")]
    words += ["--prompt-pool", "6", "--held-out-prompts", "4", "--guard-drop", "1000"]
    words += [x for key, value in policy.items() for x in (f"--policy.{key}", str(value))]
    return words + [x for key, value in sampler.items() for x in (f"--sampler.{key}", str(value))]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "recipes.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)


def finish(words: list[str]) -> None:
    process = start(words)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-2000:]


def killed_when(process: subprocess.Popen[bytes], metrics: Path, lines: int, delay: float) -> None:
    """SIGKILL a moment after `metrics` has `lines` lines."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.communicate(timeout=60)


@pytest.mark.parametrize("recipe", ["sft", *OWN])
def test_a_killed_run_resumes_to_identical_weights_and_metrics(recipe: str, tmp_path: Path) -> None:
    save_small_network(tmp_path / "network.safetensors")
    save_small_reward_model(tmp_path / "reward", seed=1)
    save_small_reward_model(tmp_path / "guard", seed=2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(recipe, whole, tmp_path))

    dice = random.Random(recipe)
    process = start(command(recipe, broken, tmp_path))
    killed_when(process, broken / "metrics.jsonl", dice.randint(1, 9), dice.random() * 0.2)
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    finish([*command(recipe, broken, tmp_path), "--resume"])

    assert file_hash(broken / "network.safetensors") == file_hash(whole / "network.safetensors")
    assert read_metrics(broken, wall_clock=False) == read_metrics(whole, wall_clock=False)
    if recipe != "sft":
        assert file_hash(broken / "adapter.safetensors") == file_hash(whole / "adapter.safetensors")
        looks = sorted(path.name for path in (whole / "held_out").iterdir())
        assert looks and looks == sorted(path.name for path in (broken / "held_out").iterdir())
        assert all(file_hash(broken / "held_out" / name) == file_hash(whole / "held_out" / name) for name in looks)
