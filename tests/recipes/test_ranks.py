"""Training recipes in several processes: the steps of one process at the same batch, on with another number of processes after a kill, or a refusal in one line.

What aligns is in test_resume.py, SFT in test_sft_resume.py, both with these tests' tools; what aligns with its weights spread over the processes is here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from align.run import latest_checkpoint, read_metrics
from base_model.checkpoint import load_weights
from base_model.prompts.text import TextEncoder
from base_model.video.files import write_mp4
from recipes.cli import COMMANDS
from recipes.demo import STAGES
from reward.matcher import Matcher
from reward.model import RewardModel, save_reward_model
from reward.quality import Quality
from tests.base_model.families import tiny_wan
from tests.recipes.killed import Server
from tests.recipes.small import save_small_network, save_small_reward_model
from tests.recipes.test_demo import TOY as TOY_DEMO
from tests.recipes.test_families import clear
from tests.recipes.test_resume import finished
from tests.recipes.test_rounds import POLICY, TOY
from tests.recipes.test_vlm_reward import make_world
from tests.reward.vlm.tiny import save_tiny

RECIPES = ("vae", "pretrain", "temporal", "upsample", "vlm-reward", "latent-reward")
SLOW = ("pretrain", "temporal", "upsample", "latent-reward")
NAMES = {"vae": "codec", "vlm-reward": "model", "latent-reward": "learning"}
"""What a checkpoint calls that which learns, where it is not the network."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_small_network(folder / "network.safetensors")
    save_small_reward_model(folder / "reward")
    make_world(folder, 12)
    save_tiny(folder / "vlm", "qwen3_vl")
    clear(tiny_wan.text_to_video()).save_pretrained(folder / "wan")
    torch.manual_seed(1)
    reward = RewardModel(Matcher(), Quality(), ("overall",), TextEncoder())
    reward.scale.fill_(1e-3)  # a fresh one says almost the same of all clips
    (folder / "sharp").mkdir()
    save_reward_model(folder / "sharp", reward, {})
    (folder / "captioned").mkdir()
    rows = []
    for k in range(10):
        write_mp4(folder / "captioned" / f"{k}.mp4", torch.full((9, 3, 16, 16), 0.1 + 0.08 * k), 8.0, upscale=False)
        rows.append({"file_name": f"{k}.mp4", "text": "a bright clip that is seen" if k % 2 else "dark"})
    (folder / "captioned" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words_of(keys: dict[str, Any]) -> list[str]:
    return [word for key, value in keys.items() for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]


def command(recipe: str, out: Path, folder: Path) -> list[str]:
    """A few steps, each of at least two parts, a checkpoint every other step."""
    sampler = {"sampler.steps": 2, "sampler.frames": 5, "sampler.height": 16, "sampler.width": 16}
    fit = {"iterations": 4, "lr": 1e-3, "capacity": 256, "held_out": 2, "save_every": 2, "evaluate_every": 2}
    keys: dict[str, dict[str, Any]] = {
        "vae": {"clips": 12, "held_out": 2, "batch": 4, "width": 16, "iterations": 4, "save_every": 2},
        "pretrain": {"width": 128, "depth": 1, "legs": [{"seed": 0, "clips": 8, "fit": fit}, {"seed": 1, "clips": 8, "fit": fit}]},
        "temporal": {
            "image": str(folder / "network.safetensors"),
            **{"clips": 6, "frames": 5, "side": 16, "batch": 2, "held_out": 2, "iterations": 4, "save_every": 2, "evaluate_every": 2, "lr": 1e-3, "optimizer": "adamw"},
        },
        "upsample": {
            **{"frames": 3, "side": 16, "crop": 8, "clips": 12, "width": 24, "depth": 1, "batch": 2, "held_out": 2, "steps": 1, "lr": 1e-3, "optimizer": "adamw"},
            **{"iterations": 4, "save_every": 2, "evaluate_every": 2},
        },
        "vlm-reward": {
            **{"comparisons": str(folder / "rankings"), "clips": str(folder / "clips"), "base": str(folder / "vlm")},
            **{"rank": 4, "alpha": 8.0, "epochs": 2, "batch": 3, "save_every": 1},
            "frames": {"fps": 4.0, "min_frames": 2, "max_frames": 16, "min_pixels": 64, "max_pixels": 1024},
        },
        "latent-reward": {
            **{"reward": str(folder / "reward"), "model": str(folder / "network.safetensors"), "prompts": 20, "takes": 3, "held_out": 4, "levels": [0.0, 0.5]},
            **{"fit.sight": 1, "fit.iterations": 2, "fit.prompts": 4, "fit.steps": 2, "fit.passes": 2, "fit.evaluate_every": 1, "fit.save_every": 1},
            **{"reader.after": [1, 2], "reader.width": 16, "reader.heads": 2, **sampler},
        },
    }
    return [recipe, "--out", str(out), *words_of(keys[recipe])]


def runs(recipe: str, out: Path) -> list[Path]:
    """Folders of the runs that it made."""
    found = sorted(file.parent for file in out.glob("**/metrics.jsonl"))
    assert len(found) == (2 if recipe == "pretrain" else 1)
    return found


def alike(recipe: str, one: Path, other: Path) -> float:
    """All metrics to 1e-5, passes exactly, and what learned; the largest distance of a weight over the largest there is."""
    apart = 0.0
    for mine, theirs in zip(runs(recipe, one), runs(recipe, other), strict=True):
        rows, same = read_metrics(mine, wall_clock=False), read_metrics(theirs, wall_clock=False)
        assert len(rows) >= 1
        for row, wanted in zip(rows, same, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6, nan_ok=True)
            assert all(row[name] == wanted[name] for name in ("iteration", "forward_passes", "forward_equivalents"))
        states = []
        for run in (mine, theirs):
            checkpoint = latest_checkpoint(run)
            assert checkpoint is not None
            states.append(load_weights(checkpoint / f"{NAMES.get(recipe, 'network')}.safetensors")[0])
        assert states[0].keys() == states[1].keys()
        apart = max([apart, *(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0] if states[0][name].numel())])
    return apart


@pytest.fixture(scope="module")
def alone(folder: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Undisturbed runs of one process, made when first asked for: recipe -> folder, how often it stepped."""
    place = tmp_path_factory.mktemp("alone")

    class Runs(dict[str, tuple[Path, int]]):
        def __missing__(self, recipe: str) -> tuple[Path, int]:
            ended = finished(server.run(command(recipe, place / recipe, folder)))
            self[recipe] = place / recipe, ended.moments["update"]
            return self[recipe]

    return Runs()


CASES = [pytest.param(recipe, marks=[pytest.mark.slow] if recipe in SLOW else []) for recipe in RECIPES]


@pytest.mark.parametrize("recipe", CASES)
def test_two_processes_make_the_steps_of_one(recipe: str, alone: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    ended = finished(server.run(command(recipe, tmp_path / "two", folder), processes=2))
    assert ended.moments["update"] == alone[recipe][1]
    apart = alike(recipe, tmp_path / "two", alone[recipe][0])
    print(f"{recipe}: weights {apart:.1e}")
    assert apart < 1e-5


def test_a_vision_language_reward_with_its_frozen_weights_sharded_makes_the_steps_of_one(alone: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    words = [*command("vlm-reward", tmp_path / "two", folder), "--shard", "true", "--recompute", "true"]
    ended = finished(server.run(words, processes=2))
    assert ended.moments["idle"] > 0, "three sets a step are two and one"
    assert alike("vlm-reward", tmp_path / "two", alone["vlm-reward"][0]) < 1e-5


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_another_number_of_processes(recipe: str, before: int, after: int, alone: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    undisturbed, steps = alone[recipe]
    words = command(recipe, tmp_path / "run", folder)
    killed = server.run(words, processes=before, kill=("update", steps), victim=before - 1)
    assert -9 in killed.statuses, killed.said
    ended = finished(server.run([*words, "--resume"], processes=after))
    assert f"saved by {before} process" in ended.said
    assert alike(recipe, tmp_path / "run", undisturbed) < 1e-5


# Frozen weights spread over the processes


UNEVEN: dict[str, dict[str, Any]] = {
    "nft": {"policy.prompts": 2, "policy.micro_batch": 1, "policy.updates": 1, "policy.old_rate": 0.1},
    "grpo": {"seed": 6, "policy.prompts": 4, "policy.micro_batch": 4, "policy.first_steps": 3, "policy.same_noise": True, "sampler.steps": 4, "sampler.guidance": 2.0},
    "ddpo": {"policy.prompts": 4, "policy.micro_batch": 2, "policy.updates": 3, "policy.window": 3, "policy.steps_a_pass": 2, "sampler.steps": 4, "recompute": 0.5},
    "ppo": {
        **{"policy.prompts": 4, "policy.micro_batch": 2, "policy.epochs": 2, "policy.minibatches": 3, "policy.window": 2},
        **{"sampler.steps": 3, "sampler.guidance": 2.0, "policy.train_empty": False},
    },
    "dpo": {"policy.prompts": 4, "policy.micro_batch": 4, "policy.updates": 2},
    "dpo of rankings": {"policy.pairs": 6, "policy.micro_batch": 2, "policy.updates": 2, "policy.held_out_pairs": 4},
    "reward-gradient": {"policy.prompts": 2, "policy.micro_batch": 2, "policy.last_steps": 2, "recompute": 1.0, "constrained": True},
}
"""Keys of each recipe that have its processes make unequally many passes, but for `nft`, where they make as many: noisy steps of clips (`grpo`), batches of an update and what only
the first one asks (`ddpo`), minibatches (`ppo`), pairs (`dpo`), clips that may be learned from."""

FORBIDDEN = {"reward-gradient": 2}
"""Clips of a rollout that the filters do not allow, all of one micro-batch."""


def rl_words(recipe: str, out: Path, folder: Path, *, shard: bool) -> list[str]:
    policy = {"iterations": 2, "group_size": 2, "lora_rank": 2, "lr": 1e-4, "evaluate_every": 2, "save_every": 1}
    keys = {"model": str(folder / "wan"), "reward": str(folder / "sharp"), "captions": ["a ball", "a cube"], "constrained": False, "guards.watch": False, "shard": shard}
    sampler = {"steps": 2, "frames": 5, "height": 16, "width": 16}
    keys |= {f"policy.{key}": value for key, value in policy.items()} | {f"sampler.{key}": value for key, value in sampler.items()} | UNEVEN[recipe]
    keys |= {"comparisons": str(folder / "rankings"), "clips": str(folder / "clips")} if recipe == "dpo of rankings" else {}
    return [recipe.split()[0], "--out", str(out), *words_of(keys)]


def same_steps(out: Path, other: Path, rel: float) -> None:
    """Metrics, to `rel` of themselves or of 1, and adapters, to that and at least a thousandth of what they moved."""
    adapters = [load_weights(folder / "adapter.safetensors")[0] for folder in (out, other)]
    for row, same in zip(read_metrics(out, wall_clock=False), read_metrics(other, wall_clock=False), strict=True):
        told = [key for key in same if same[key] is not None]
        assert row.keys() == same.keys() and {key: row[key] for key in told} == pytest.approx({key: same[key] for key in told}, rel=rel, abs=rel)
    assert adapters[0].keys() == adapters[1].keys()
    apart = math.hypot(*(float((adapters[0][key] - adapters[1][key]).norm()) for key in adapters[0]))
    moved = math.hypot(*(float(tensor.norm()) for key, tensor in adapters[0].items() if "lora_B" in key))  # which was 0
    print(f"apart {apart:.1e}, moved {moved:.1e}")
    assert moved > 1e-3 and apart < max(rel, 1e-3) * moved


@pytest.fixture(scope="module")
def whole(folder: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs of two processes that hold all weights each, made when first asked for: recipe -> folder, how often it stepped."""
    place = tmp_path_factory.mktemp("whole")

    class Runs(dict[str, tuple[Path, int]]):
        def __missing__(self, recipe: str) -> tuple[Path, int]:
            ended = finished(server.run(rl_words(recipe, place / recipe, folder, shard=False), processes=2, forbidden=FORBIDDEN.get(recipe, 0)))
            assert ended.moments["update"] >= 2 and "idle" not in ended.moments
            self[recipe] = place / recipe, ended.moments["update"]
            return self[recipe]

    return Runs()


@pytest.mark.parametrize("recipe", UNEVEN)
def test_rl_with_its_frozen_weights_sharded_makes_the_steps_of_whole_ones(recipe: str, whole: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    """The first process waits for the other, in passes that are not counted."""
    ended = finished(server.run(rl_words(recipe, tmp_path / "cut", folder, shard=True), processes=2, forbidden=FORBIDDEN.get(recipe, 0)))
    assert ("idle" in ended.moments) == (recipe != "nft")
    same_steps(tmp_path / "cut", whole[recipe][0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", UNEVEN)
def test_rl_with_its_frozen_weights_sharded_goes_on_in_one_process(recipe: str, whole: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    """In one process numbers differ by more: this reward magnifies rounding a thousand times."""
    words = rl_words(recipe, tmp_path / "turns", folder, shard=True)
    killed = server.run(words, processes=2, kill=("update", whole[recipe][1] // 2 + 1), victim=1, forbidden=FORBIDDEN.get(recipe, 0))
    assert -9 in killed.statuses, killed.said
    finished(server.run([*words, "--resume"], forbidden=FORBIDDEN.get(recipe, 0)))
    same_steps(tmp_path / "turns", whole[recipe][0], 1e-2)


def test_the_built_in_model_is_not_sharded_which_is_one_line(server: Server, folder: Path, tmp_path: Path) -> None:
    words = [*rl_words("grpo", tmp_path / "run", folder, shard=True), "--model", str(folder / "network.safetensors")]
    ended = server.run(words)
    assert ended.statuses == [2] and "the built-in network is small enough for every process, shard. Leave it out" in ended.said and "Traceback" not in ended.said


# trl's own loops


def trl_words(recipe: str, out: Path, folder: Path) -> list[str]:
    """Six steps, a checkpoint every other one."""
    if recipe == "expand":
        words = ["--pool", "100", "--most-tokens", "16", "--tiny", "{width: 48, depth: 2, heads: 2, vocabulary: 420}", "--micro-batch", "2"]
        return [recipe, "--out", str(out), *words, "--sft.steps", "6", "--sft.batch", "8", "--sft.evaluate-every", "2", "--sft.lr", "1e-4"]
    frames = {"fps": 4.0, "min_frames": 2, "max_frames": 4, "min_pixels": 64, "max_pixels": 256}
    given = {"model": str(folder / "vlm"), "data": str(folder / "captioned"), "frames": frames, "instruction": "look", "optimizer": "adamw", "lr": 1e-4}
    return [recipe, "--out", str(out), *words_of({**given, "batch": 4, "together": 2, "held_out": 2, "steps": 6, "save_every": 2})]


def told_by_trl(recipe: str, out: Path) -> list[float]:
    """The losses of all steps (a captioner's of every step, too, for there are fewer than ten), and the held-out loss."""
    if recipe == "expand":
        rows = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
        return [row[name] for name in ("loss", "grad_norm", "learning_rate") for row in rows if name in row]
    measured = json.loads((out / "captioner.json").read_text())["measured"]
    return [*measured["loss"], measured["held_out_loss_before"], measured["held_out_loss"]]


TRL = ["caption-train", pytest.param("expand", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def by_trl(folder: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What undisturbed runs of one process told, made when first asked for."""
    place = tmp_path_factory.mktemp("trl")

    class Told(dict[str, list[float]]):
        def __missing__(self, recipe: str) -> list[float]:
            finished(server.run(trl_words(recipe, place / recipe, folder)))
            self[recipe] = told_by_trl(recipe, place / recipe)
            return self[recipe]

    return Told()


@pytest.mark.parametrize("recipe", TRL)
def test_trls_recipes_share_a_step(recipe: str, by_trl: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    finished(server.run(trl_words(recipe, tmp_path / "two", folder), processes=2))
    assert told_by_trl(recipe, tmp_path / "two") == pytest.approx(by_trl[recipe], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["caption-train", "expand"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_trls_recipes_go_on_with_another_number_of_processes(recipe: str, before: int, after: int, by_trl: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    words = trl_words(recipe, tmp_path, folder)
    steps = {"caption-train": 2, "expand": 4}[recipe]  # micro-batches of a step in one process
    killed = server.run(words, processes=before, kill=("trl", 3 * steps // before + 1), victim=before - 1)
    assert -9 in killed.statuses, killed.said
    finished(server.run([*words, "--resume"], processes=after))
    assert told_by_trl(recipe, tmp_path) == pytest.approx(by_trl[recipe], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_captions_climb_a_reward_in_several_processes_and_go_on_in_others(before: int, after: int, folder: Path, server: Server, tmp_path: Path) -> None:
    """Each process draws its own captions, so the numbers are others than in one process."""
    size = "{width: 48, depth: 2, heads: 2, vocabulary: 420}"
    learn = ["--pool", "200", "--most-tokens", "48", "--tiny", size, "--sft.steps", "60", "--sft.batch", "8", "--sft.evaluate-every", "60", "--sft.lr", "4e-3"]
    finished(server.run(["expand", "--out", str(tmp_path), "--micro-batch", "2", *learn]))
    climb = ["--grpo.steps", "6", "--grpo.prompts", "2", "--grpo.group-size", "4", "--grpo.save-every", "2", "--sampler", "{steps: 1, frames: 5, height: 16, width: 16}"]
    words = ["expand", "--out", str(tmp_path), "--micro-batch", "2", *learn, *climb, "--reward", str(folder / "sharp")]  # the shipped base model: to a fresh one words are nothing
    steps = 4  # micro-batches of a step in one process
    killed = server.run(words, processes=before, kill=("trl", 3 * steps // before + 1), victim=before - 1)
    assert -9 in killed.statuses, killed.said
    assert [path.name for path in (tmp_path / "grpo" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    finished(server.run(words, processes=after))
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row[name]) for row in rows for name in ("reward", "kl", "grad_norm", "missing_reward_share"))
    assert any(row["reward_std"] > 0 for row in rows) and rows[-1]["kl"] > rows[0]["kl"] == pytest.approx(0, abs=1e-6)


# What goes through stages


@pytest.mark.slow
def test_rounds_share_their_rl_and_the_first_process_does_all_else(server: Server, folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        words = ["--labelers", "simulated", "--model", str(folder / "network.safetensors"), "--rounds", "1", *TOY, *POLICY, "--rl.policy.micro_batch", "4"]
        finished(server.run(["rounds", "--out", str(tmp_path / str(processes)), *words], processes=processes))
    one, two = tmp_path / "1", tmp_path / "2"
    for file in ("rankings/comparisons-00000.parquet", "round-1/reward/reward_model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    rows, same = (read_metrics(out / "round-1" / "rl", wall_clock=False) for out in (one, two))
    assert len(rows) >= 2 and [row.keys() for row in rows] == [row.keys() for row in same]
    for row, wanted in zip(rows, same, strict=True):
        assert row["reward"] == pytest.approx(wanted["reward"], rel=1e-4) if "reward" in row else True
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3) if "grad_norm" in row else True


@pytest.mark.slow
def test_the_demo_goes_through_all_its_stages_in_two_processes(server: Server, tmp_path: Path) -> None:
    finished(server.run(["demo", str(TOY_DEMO), "--seed", "1", "--out", str(tmp_path)], processes=2))
    assert (tmp_path / "report" / "index.html").exists() and len([*tmp_path.glob("*/stage.json")]) == len(STAGES)


@pytest.mark.parametrize("name", ["reward-model", "match", "quality", "safety-train"])
def test_what_learns_in_moments_is_refused_in_one_line_and_leaves_nothing(name: str, server: Server, tmp_path: Path) -> None:
    ended = server.run([name, "--out", str(tmp_path / "run")], processes=2)
    assert ended.statuses == [2, 2] and not (tmp_path / "run").exists()
    assert f"rushes {name} works in one process, and torchrun started 2" in ended.said and "Traceback" not in ended.said


def test_every_command_that_trains_says_whether_processes_share_it() -> None:
    assert {name for name, command in COMMANDS.items() if command.shared} >= {
        *RECIPES,
        "sft",
        "caption-train",
        "expand",
        "rounds",
        "demo",
        "encode",
        "ddpo",
        "ppo",
        "grpo",
        "nft",
        "dpo",
        "reward-gradient",
        "check",
    }
    assert not any(COMMANDS[name].shared for name in ("reward-model", "safety-train", "match", "quality", "curate", "app"))
