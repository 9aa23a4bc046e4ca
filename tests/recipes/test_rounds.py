"""`rushes rounds` at toy size: rankings add up, a round starts from the last one's policy, what is done stays done, and people are waited for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from align.config import load
from align.kernels import Ancestral
from align.trajectory import replay, rollout
from base_model.errors import Interrupted, UserError
from base_model.prompts.text import TextEncoder
from base_model.times import sampling_times
from base_model.tiny import load_tiny, save_network
from base_model.video.store import ClipStore
from recipes import cli, feedback, nft, reward_model, rounds
from recipes.evaluate import clip_seeds
from recipes.feedback import StoppedByGuard
from recipes.generate import Sampler, network_lineage, seeded_noise
from recipes.rankings import answers_to, read_tasks
from recipes.weights import file_hash
from reward.comparisons import Annotator, RankingEvent, load_comparisons, write_comparisons
from reward.model import load_reward_model
from tests.recipes.small import save_small_network, save_small_reward_model, small_model

TOY = ["--prompts", "12", "--rl.sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--rl.prompt-pool", "6", "--rl.held-out-prompts", "4", "--rl.guards.watch", "false"]
SMALL = {"iterations": 2, "prompts": 2, "group_size": 4, "micro_batch": 8, "lora_rank": 4, "lr": 1e-2, "evaluate_every": 9, "save_every": 1}
POLICY = [word for key, value in SMALL.items() for word in (f"--rl.policy.{key}", str(value))]


@dataclass(frozen=True)
class Finished:
    """A run of one round that was then asked for a second."""

    words: list[str]
    out: Path
    network: Path
    guard: Path
    after_one: dict[Path, str]  # hashes of the files there were after the first round
    rows: list[dict[str, Any]]


def hashes(out: Path) -> dict[Path, str]:
    return {path.relative_to(out): file_hash(path) for path in sorted(out.rglob("*")) if path.is_file()}


def rows_of(words: list[str]) -> list[dict[str, Any]]:
    found = rounds.main(load(rounds.Config, None, words))["rounds"]
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("rounds")
    network, guard, out = save_small_network(folder / "network.safetensors"), save_small_reward_model(folder / "guard", seed=2), folder / "out"
    words = ["--labelers", "simulated", "--model", str(network), "--guard", str(guard), "--out", str(out), *TOY, *POLICY]
    rows_of([*words, "--rounds", "1"])
    after_one = hashes(out)
    return Finished(words, out, network, guard, after_one, rows_of([*words, "--rounds", "2"]))


def test_a_further_round_adds_rankings_and_rewrites_none(finished: Finished) -> None:
    now = hashes(finished.out)
    stays = {path for path in finished.after_one if path.parts[0] == "round-1" or path.name.startswith("comparisons-") or path.suffix == ".mkv"}
    assert len(stays) > 20 and all(now[path] == finished.after_one[path] for path in stays)
    assert (finished.out / "rankings" / "comparisons-00001.parquet").exists() and not (finished.out / "rankings" / "comparisons-00002.parquet").exists()
    data, (first, second) = load_comparisons(finished.out / "rankings"), finished.rows
    assert first["answers"] == first["new_answers"] and second["answers"] == len(data.events) == first["answers"] + second["new_answers"]
    assert sum(person.n_events for person in data.annotators.values()) == len(data.events)
    card = json.loads((finished.out / "round-2" / "reward" / "reward_card.json").read_text())
    assert sum(card["answers"].values()) == second["answers"], "the second reward model learns from both rounds"
    assert card["data_sha256"] == reward_model.events_hash(reward_model.usable_events(data))


def test_a_round_starts_from_the_last_policy_which_is_its_reference(finished: Finished) -> None:
    networks = [finished.network, finished.out / "round-1" / "rl" / "network.safetensors"]
    store = ClipStore(finished.out / "clips")
    for number, (network, row) in enumerate(zip(networks, finished.rows, strict=True), 1):
        config = json.loads((finished.out / f"round-{number}" / "rl" / "run.json").read_text())["config"]
        assert Path(config["model"]) == network and Path(config["reward"]) == finished.out / f"round-{number}" / "reward" and row["reference"] == str(network)
        clips = {clip_id for task in read_tasks(finished.out / f"round-{number}" / "takes") for clip_id in task.clip_ids}
        assert {each.generator_rev for each in store.rows() if each.clip_id in clips} == {network_lineage(network)}, "its takes are that policy's"
    first, second = finished.rows
    assert first["guard_after"] == second["guard_before"] and first["blocked_after"] == second["blocked_before"], "the same prompts, noise and network"
    assert first["guard_before"] != first["guard_after"] and 0 < first["kl_from_first"] != second["kl_from_first"]
    assert first["accuracy_newest_before"] is None and second["accuracy_newest_before"] is not None


def test_accuracy_is_of_the_newest_clips_on_prompts_that_were_not_learned_from(finished: Finished) -> None:
    data, store = load_comparisons(finished.out / "rankings"), ClipStore(finished.out / "clips")
    tasks = {frozenset(task.clip_ids) for task in read_tasks(finished.out / "round-2" / "takes")}
    for name, number in (("accuracy_newest_before", 1), ("accuracy_newest", 2)):
        model = load_reward_model(finished.out / f"round-{number}" / "reward", TextEncoder())
        right = decided = 0.0
        seen: set[tuple[str, str, str]] = set()
        for event in data.events:
            if frozenset(event.clip_ids) not in tasks or data.split[event.prompt_id] != "test":
                continue
            text = data.prompts[event.prompt_id].text
            score = dict(zip(event.clip_ids, model(torch.stack([store.load(clip) for clip in event.clip_ids]), [text] * len(event.clip_ids)).mean[:, 0].tolist(), strict=True))
            rank = dict(zip(event.clip_ids, event.ranks, strict=True))
            for a in event.clip_ids:
                for b in event.clip_ids:
                    if rank[a] < rank[b]:
                        key = (event.annotator_id, *sorted((a, b)))
                        if key not in seen:
                            decided, right = decided + 1, right + (score[a] > score[b])
                        seen.add(key)
        assert decided > 0 and finished.rows[1][name] == pytest.approx(right / decided)


def test_a_killed_round_goes_on_and_ends_with_the_same_network(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    for stage in ("rl", "look"):
        shutil.rmtree(out / "round-2" / stage)
    words = [*finished.words, "--out", str(out)]
    last_look = feedback.last_look

    def killed(*_: Any) -> Any:
        raise Interrupted("killed after the last checkpoint", 15)

    monkeypatch.setattr(feedback, "last_look", killed)
    with pytest.raises(Interrupted):
        rows_of(words)
    assert (out / "round-2" / "rl" / "checkpoints").is_dir() and not (out / "round-2" / "rl" / "stage.json").exists()
    monkeypatch.setattr(feedback, "last_look", last_look)
    monkeypatch.setattr(reward_model, "main", lambda *_, **__: pytest.fail("the reward model is finished"))
    found = rows_of(words)
    for name in ("seconds", "reference"):
        assert found[1].pop(name) is not None
    assert found[1] == {key: value for key, value in finished.rows[1].items() if key not in ("seconds", "reference")}
    assert file_hash(out / "round-2" / "rl" / "network.safetensors") == file_hash(finished.out / "round-2" / "rl" / "network.safetensors")


def test_a_killed_reward_model_learns_from_what_people_answered_in_the_meantime(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the description of its run is written, which says how many ranked clips the filters ruled on."""
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    cfg, stage = load(rounds.Config, None, [*finished.words, "--out", str(out)]), out / "round-2" / "reward"
    shutil.rmtree(stage)
    stage.mkdir()

    def killed(*_: Any) -> Any:
        raise Interrupted("killed while it measures", 15)

    with monkeypatch.context() as dying:
        dying.setattr(reward_model, "measure", killed)
        with pytest.raises(Interrupted):
            rounds.learn_reward(cfg, 2, stage)
    assert (stage / "run.json").exists()
    answer(out, 2, slice(0, 3))
    found = rounds.learn_reward(cfg, 2, stage)
    card = json.loads((stage / "reward_card.json").read_text())
    assert found["answers"] == finished.rows[1]["answers"] + 3 and card["data_sha256"] == json.loads((stage / "run.json").read_text())["answers"]


def test_other_settings_are_refused_and_a_moved_network_is_not(finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = shutil.copyfile(finished.network, tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"begun with other settings: nft\.policy\.lr \(0\.01 -> 0\.02\), seed \(0 -> 1\)"):
        rows_of([*finished.words, "--seed", "1", "--rl.policy.lr", "0.02"])
    assert rows_of([*finished.words, "--model", str(moved)])[1]["reference"] == finished.rows[1]["reference"]
    assert "from " + str(finished.out / "round-1" / "rl") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rl.seed", "3"], r"rl\.seed is decided by the rounds"),
        (["--rl.policy.itterations", "3"], r"policy\.itterations: unknown key .* Did you mean policy\.iterations"),
        (["--recipe", "ddpo", "--rl.policy.proximal", "1"], r"policy\.proximal: unknown key"),
        (["--rankings", "somewhere"], "Give both, or none"),
        (["--model", "no-such-network"], "no such network"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        rows_of(["--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", get_args(rounds.Recipe))
def test_every_recipe_is_told_where_it_starts_and_what_it_climbs(recipe: str, finished: Finished, tmp_path: Path) -> None:
    cfg = load(rounds.Config, None, ["--recipe", recipe, "--model", str(finished.network), "--guard", str(finished.guard), "--out", str(tmp_path), "--rl.policy.iterations", "3"])
    first, second = (rounds.setting_of(cfg, number) for number in (1, 2))
    assert (first.model, second.model) == (finished.network, tmp_path / "round-1" / "rl" / "network.safetensors")
    assert [setting.reward for setting in (first, second)] == [tmp_path / f"round-{number}" / "reward" for number in (1, 2)]
    assert first.guard == second.guard == finished.guard and first.seed != second.seed and first.policy.iterations == 3
    assert getattr(first, "comparisons", None) is None, "dpo makes fresh pairs"


def moved_by(amount: float, guard_stops: bool = False) -> Any:
    """RL without the work: the network it starts from, its last layer moved."""

    def main(cfg: nft.Config, *, resume: bool = False) -> dict[str, object]:
        model = load_tiny(cfg.model)
        with torch.no_grad():
            for parameter in model.network.tokens_out.parameters():
                parameter.add_(amount)
        save_network(cfg.out / "network.safetensors", model)
        result: dict[str, object] = {"weights": str(cfg.out / "network.safetensors"), "stopped_by_guard": guard_stops, "forward_passes": 7}
        if guard_stops:
            raise StoppedByGuard("the guards' light was red", result)
        return result

    return main


def learned_nothing(cfg: reward_model.Config, *, resume: bool = False) -> dict[str, Any]:
    """A reward model without the learning."""
    save_small_reward_model(cfg.out, seed=1)
    return {"accuracy": {"mean": 0.5, "low": 0.5, "high": 0.5}}


def answer(out: Path, number: int, tasks: slice) -> None:
    """Somebody ranks the tasks: clips in the order of their ids, the first two alike."""
    events = []
    for task in read_tasks(out / f"round-{number}" / "takes")[tasks]:
        ranks = tuple(max(1, sorted(task.clip_ids).index(clip)) for clip in task.clip_ids)
        events.append(RankingEvent(f"ann-{task.task_id}", task.task_id, task.prompt_id, "ann", task.clip_ids, ranks))
    write_comparisons(out / "rankings", events, clips=(), prompts=(), annotators=[Annotator("ann")])


def test_people_are_waited_for_and_earlier_rankings_are_learned_from(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nft, "main", moved_by(0.01))
    monkeypatch.setattr(reward_model, "main", learned_nothing)
    out, given = tmp_path / "out", ["--rankings", str(finished.out / "rankings"), "--clips", str(finished.out / "clips")]
    words = ["rounds", "--labelers", "people", "--model", str(finished.network), "--rounds", "1", "--seed", "7", "--out", str(out), *TOY, *given]
    before, earlier = hashes(finished.out), load_comparisons(finished.out / "rankings")
    assert cli.main(words) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("rushes: round 1 waits for people: 0 of 12 tasks are answered") and str(out / "rankings") in said and "--resume" in said
    assert load_comparisons(out / "rankings").events == earlier.events and not (out / "round-1" / "reward").exists()
    answer(out, 1, slice(0, 5))
    assert cli.main([*words, "--resume"]) == 3 and "5 of 12 tasks" in capsys.readouterr().err
    answer(out, 1, slice(5, 12))
    theirs = {path: file_hash(path) for path in (out / "rankings").glob("comparisons-*")}
    assert cli.main([*words, "--resume"]) == 0
    assert {path: file_hash(path) for path in (out / "rankings").glob("comparisons-*")} == theirs, "nobody else answers, and nothing is rewritten"
    data = load_comparisons(out / "rankings")
    assert len(data.events) == len(earlier.events) + 12 and all(data.split[prompt] == split for prompt, split in earlier.split.items())
    found = answers_to(data, read_tasks(out / "round-1" / "takes"))
    assert all([event.annotator_id for event in events] == ["ann"] for events in found.values())
    assert all((out / "clips" / f"clips/{clip}.mp4").exists() for task in read_tasks(out / "round-1" / "takes") for clip in task.clip_ids), "people need something to look at"
    assert hashes(finished.out) == before, "what was given is copied"


def test_enough_answers_are_enough(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "main", moved_by(0.01))
    monkeypatch.setattr(reward_model, "main", learned_nothing)
    words = ["--labelers", "people", "--model", str(finished.network), "--rounds", "1", "--out", str(tmp_path), *TOY, "--answered", "0.5"]
    for tasks in (slice(0), slice(0, 5)):
        if tasks.stop:
            answer(tmp_path, 1, tasks)
        with pytest.raises(rounds.WaitingForPeople):
            rows_of(words)
    answer(tmp_path, 1, slice(5, 6))
    assert rows_of(words)[0]["new_answers"] == 6


def test_a_run_that_its_guards_ended_is_gone_on_from(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nft, "main", moved_by(0.02, guard_stops=True))
    monkeypatch.setattr(reward_model, "main", learned_nothing)
    found = rows_of(["--labelers", "simulated", "--model", str(finished.network), "--out", str(tmp_path), *TOY])
    assert [row["stopped_by_guard"] for row in found] == [True, True] and found[1]["reference"] == str(tmp_path / "round-1" / "rl" / "network.safetensors")
    assert found[0]["guard_before"] is None, "nobody watches"
    assert found[1]["kl_from_first"] > 2 * found[0]["kl_from_first"], "two steps of one length go further than one"


def test_the_kl_is_that_of_normal_distributions_step_by_step() -> None:
    policy, first, sampler = small_model(), small_model(), Sampler(steps=4, frames=5, height=16, width=16)
    with torch.no_grad():
        for parameter in policy.network.tokens_out.parameters():
            parameter.mul_(1.1)
    cond = policy.encode_text(["a red circle grows", "a blue bar rises"])
    assert rounds.kl_between(policy, policy, cond, sampler, 3) == 0
    noise, times = seeded_noise(policy, sampler.clip, clip_seeds(3, 2)), sampling_times(policy.path, 4, shift=3.0)
    with torch.no_grad():
        taken = rollout(policy, Ancestral(), noise, times, cond, noise=torch.Generator().manual_seed(3))
        total = 0.0
        for step in taken.steps():
            both = [replay(model, Ancestral(), step, cond) for model in (policy, first)]
            total += float(kl_divergence(*(Normal(one.mean.double(), one.std.double().expand_as(one.mean)) for one in both)).mean())
    assert rounds.kl_between(policy, first, cond, sampler, 3) == pytest.approx(total, rel=1e-4) and total > 0
    one_step = sampler.model_copy(update={"steps": 1})
    assert rounds.kl_between(policy, first, cond, one_step, 3) != rounds.kl_between(policy, first, cond, one_step, 3), "nothing is noisy: unknown"


def test_the_table_has_a_line_a_round_and_a_dash_for_what_is_not_known() -> None:
    row = dict.fromkeys(rounds.COLUMNS, None) | {"round": 1, "answers": 12, "accuracy_newest": 0.6251, "forward_passes": 200}
    head, line = rounds.table([row]).splitlines()
    assert head.split("  ")[0] == "round" and len(head) == len(line) and line.split() == ["1", "12", "-", "0.625", *["-"] * 7, "200"]
