"""`rushes compare`: known winners, ties and intervals; what people see says nothing of whose clip it is; what they answer is read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.config import load
from base_model.errors import UserError
from base_model.video.store import ClipStore
from recipes import cli, compare
from recipes.compare import Side
from recipes.generate import Sampler
from recipes.rankings import read_tasks
from recipes.scorers import card_hash
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from recipes.statistics import bootstrap_mean
from recipes.weights import file_hash
from reward.comparisons import Annotator, RankingEvent, write_comparisons
from tests.recipes.small import save_small_network, save_small_reward_model

SMALL = ["--prompts", "10", "--clips-per-prompt", "2", "--two-objects", "0.2", "--strobe", "0.2"]
TINY = "{steps: 2, frames: 5, height: 16, width: 16}"
FIRST, SECOND = Path("first-run"), Path("second-run")


def config(out: Path, *words: str) -> compare.Config:
    return load(compare.Config, None, ["--out", str(out), "--run-a", "base", "--run-b", "base", *SMALL, *words])


def drawn(asked: Sequence[ShapesPrompt], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in asked])  # [P,T,3,H,W]


def asked_of(cfg: compare.Config) -> list[ShapesPrompt]:
    return [prompt for prompt in compare.prompts_of(cfg) for _ in range(cfg.clips_per_prompt)]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Clips of A and B instead of networks; fill it before the command runs."""
    clips: dict[str, Tensor] = {}
    monkeypatch.setattr(compare, "sides_of", lambda cfg: (Side(None, Sampler()), Side(None, Sampler(guidance=2.0))))
    monkeypatch.setattr(compare, "clips_of", lambda network, texts, seeds, sampler: clips["a" if sampler.guidance == 1 else "b"])
    return clips


# Numbers


def test_right_clips_win_by_the_judge_in_every_stratum_and_both_sides_are_drawn(tmp_path: Path, sides: dict[str, Tensor]) -> None:
    cfg = config(tmp_path)
    asked = asked_of(cfg)
    calm = [ShapesPrompt(prompt.prompt_id, prompt.text, prompt.things, False, prompt.split) for prompt in asked]
    sides["a"] = drawn(calm)
    sides["b"] = sides["a"].clone()
    sides["b"][1::2] = 0.5  # every second pair of each prompt
    result = compare.main(cfg)
    assert [row["prompts_of"] for row in result["rows"]] == ["all", "one object", "two objects", "strobe"]
    for row in result["rows"]:
        assert row["a_wins"] == pytest.approx((row["wins"] + row["ties"] / 2) / row["votes"]) and row["votes"] == row["pairs"] == 2 * row["prompts"]
        assert row["losses"] == 0 and row["blocked_a"] == 0 and row["blocked_b"] == 0.5
    whole = result["rows"][0]
    assert whole["prompts"] == 10 and whole["ties"] >= 10 and whole["wins"] >= 8 and 0.7 <= whole["a_wins"] <= 0.75
    assert sum(row["prompts"] for row in result["rows"][1:]) == 10 and result["verdict"].endswith("A is better")
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == result["rows"]
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape[1] > 2 * 5 * 32 * 2 and picture.std() > 10


def test_a_tie_counts_half_and_the_interval_resamples_prompts() -> None:
    cfg = config(Path("unused"), "--clips-per-prompt", "4")
    prompts = make_prompts(6, seed=0, split="eval")
    asked, fine = [prompt for prompt in prompts for _ in range(4)], [[False] * 24] * 2
    shares = [1.0, 0.5, 0.0, 1.0, 0.5, 1.0]
    alike = [[share] for share in shares for _ in range(4)]
    (row,) = compare.rows_of(cfg, alike, asked, fine)[:1]
    expected = bootstrap_mean(shares)
    assert (row["a_wins"], row["a_wins_low"], row["a_wins_high"]) == pytest.approx(expected), "four equal pairs of a prompt say no more than one"
    assert (row["wins"], row["ties"], row["losses"], row["decided_by_nobody"]) == (12, 8, 4, 0)
    alike[0], alike[4:8] = [0.0, 0.0, 1.0, 1.0], [[], [], [], []]
    (row,) = compare.rows_of(cfg, alike, asked, fine)[:1]
    assert row["a_wins"] == pytest.approx(np.mean([(0.5 + 3) / 4, 0.0, 1.0, 0.5, 1.0])) and row["decided_by_nobody"] == 4 and row["votes"] == 23


def test_an_unknown_score_decides_nothing() -> None:
    assert compare.vote(2.0, 1.0) == [1.0] and compare.vote(1.0, 2.0) == [0.0] and compare.vote(1.0, 1.0) == [0.5]
    assert compare.vote(float("nan"), 1.0) == compare.vote(1.0, float("nan")) == []


@pytest.mark.parametrize(("low", "high", "says"), [(0.51, 0.7, "A is better"), (0.3, 0.49, "B is better"), (0.45, 0.6, "cannot be told")])
def test_a_verdict_needs_the_whole_interval(low: float, high: float, says: str) -> None:
    assert says in compare.verdict({"a_wins": (low + high) / 2, "a_wins_low": low, "a_wins_high": high, "wins": 1, "ties": 0, "losses": 0})
    assert "nobody" in compare.verdict({"a_wins": None})


def test_sides_changed_round_change_the_win_rate_round_and_a_run_ties_with_itself(tmp_path: Path) -> None:
    one, other = (save_small_network(tmp_path / name / "network.safetensors", seed) for name, seed in (("one", 0), ("other", 5)))
    guard = save_small_reward_model(tmp_path / "guard", seed=2)
    few = ["--prompts", "4", "--clips-per-prompt", "1", "--sampler", TINY, "--by", "guard", "--guard", str(guard), "--shown", "0"]
    rows = {}
    for name, pair in (("there", (one, other)), ("back", (other, one)), ("itself", (one.parent, one))):
        rows[name] = compare.main(load(compare.Config, None, ["--out", str(tmp_path / name), "--run-a", str(pair[0]), "--run-b", str(pair[1]), *few]))["rows"][0]
    assert rows["there"]["a_wins"] == pytest.approx(1 - rows["back"]["a_wins"]) and rows["there"]["wins"] == rows["back"]["losses"]
    assert rows["there"]["wins"] + rows["there"]["losses"] == 4, "other networks make other clips"
    assert rows["itself"]["ties"] == 4 and rows["itself"]["a_wins"] == rows["itself"]["a_wins_low"] == rows["itself"]["a_wins_high"] == 0.5, "the noise is the same"


# What is refused


def with_card(folder: Path, **sampler: Any) -> Path:
    save_small_network(folder / "network.safetensors")
    (folder / "network.json").write_text(json.dumps({"config": {f"sampler.{key}": value for key, value in sampler.items()}}))
    return folder


def test_runs_of_different_sizes_are_refused_and_a_run_samples_as_its_card_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = with_card(tmp_path / "small", frames=5, height=16, width=16, steps=3), with_card(tmp_path / "large", frames=13)
    assert cli.main(["compare", str(small), str(large), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "5 frames of 16x16 at 12 a second" in said and "13 frames of 32x32" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
    plain = save_small_network(tmp_path / "plain.safetensors")
    first, second = compare.sides_of(config(tmp_path, "--run-a", str(small), "--run-b", str(plain)))
    assert first.sampler == second.sampler == Sampler(frames=5, height=16, width=16, steps=3), "a network without a card is sampled as the other"
    guided = with_card(tmp_path / "guided", guidance=2.0)
    assert [side.sampler.guidance for side in compare.sides_of(config(tmp_path, "--run-a", str(guided), "--run-b", str(large)))] == [2.0, 1.0]
    assert [side.sampler.steps for side in compare.sides_of(config(tmp_path, "--run-a", str(small), "--run-b", str(large), "--sampler.steps", "2"))] == [2, 2]


def test_a_run_without_a_network_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    for run, says in ((tmp_path / "begun", "the run has no network"), (tmp_path / "nowhere", "no such network")):
        assert cli.main(["compare", "base", str(run), "--out", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err


def test_somebody_has_to_decide(tmp_path: Path) -> None:
    for words, says in ((["--by", "guard"], "no reward model"), (["--captions", "waves at night"], "captions are given")):
        with pytest.raises(UserError, match=says):
            compare.main(config(tmp_path / "out", *words))


def test_a_guard_that_a_run_was_optimised_by_decides_nothing(tmp_path: Path) -> None:
    guard, other = (save_small_reward_model(tmp_path / name, seed=seed) for seed, name in enumerate(("guard", "other")))
    climbed, before, ranked = (tmp_path / name for name in ("climbed", "before", "ranked"))
    there = {"reward": str(guard)}
    for run, told in (
        (climbed, {"config": {"reward": "moved"}, "reward": card_hash(guard)}),
        (before, {"config": there}),
        (ranked, {"config": {**there, "comparisons": "rankings"}, "reward": card_hash(guard)}),
    ):
        run.mkdir()
        (run / "run.json").write_text(json.dumps(told))
    for run, says in ((climbed, "the guard is what .*climbed was optimised by"), (before, "the guard has the weights of the reward model")):
        words = ["--by", "guard", "--run-b", str(run)]
        with pytest.raises(UserError, match=says):
            compare.check(config(tmp_path / "out", *words, "--guard", str(guard)))
        compare.check(config(tmp_path / "out", *words, "--guard", str(other)))
        compare.check(config(tmp_path / "out", "--run-b", str(run), "--guard", str(guard)))
    compare.check(config(tmp_path / "out", "--by", "guard", "--run-b", str(ranked), "--guard", str(guard)))


# People


@pytest.fixture
def asked(tmp_path: Path, sides: dict[str, Tensor]) -> tuple[compare.Config, dict[str, Any]]:
    """People have been asked: A has drawn clips, B the same with every fourth one flashing and every fifth one equal to A's."""
    cfg = config(tmp_path / "out", "--by", "people")
    calm = [ShapesPrompt(prompt.prompt_id, prompt.text, prompt.things, False, prompt.split) for prompt in asked_of(cfg)]
    sides["a"], sides["b"] = drawn(calm), drawn(calm, seed=1)
    sides["b"][3::4, ::2], sides["b"][3::4, 1::2] = 0.05, 0.95
    sides["b"][0::5] = sides["a"][0::5]
    return cfg, compare.main(cfg)


FLASHING, EQUAL = {3, 7, 11, 19}, {0, 5, 10, 15}  # of 20 pairs; the 16th is both, and so equal


def test_people_are_shown_nothing_that_says_whose_a_clip_is(asked: tuple[compare.Config, dict[str, Any]]) -> None:
    cfg, result = asked
    people, key = cfg.out / "people", json.loads((cfg.out / "key.json").read_text())
    tasks = read_tasks(people)
    assert result["answered"] == "0 of 12 pairs" and len(tasks) == 12 and "picture" not in result and result["keep_from_them"] == str(cfg.out / "key.json")
    assert {task["pair"] for task in key["tasks"].values()} == set(range(20)) - FLASHING - EQUAL, "what flashes is shown to nobody, and equal clips are asked of nobody"
    places = [task.clip_ids.index(key["tasks"][task.task_id]["a"]) for task in tasks]
    assert 0 < sum(places) < len(places), "sides are drawn"
    numbers = [key["tasks"][task.task_id]["pair"] for task in tasks]
    assert numbers != sorted(numbers), "the order is drawn"
    rows = ClipStore(people / "clips").rows()
    assert {row.clip_id for row in rows} == {clip for task in tasks for clip in task.clip_ids}
    for side in ("a", "b"):
        of_side = [row for row in rows if any(task[side] == row.clip_id for task in key["tasks"].values())]
        assert {(row.generator, row.generator_rev, row.extra_json) for row in of_side} == {("rushes", "blind", "{}")}
        assert len({row.sampler_json for row in of_side}) == 2 and sorted(row.seed for row in of_side) == list(range(12)), "both sides have the same places and numbers"
    assert all((people / "clips" / "clips" / f"{row.clip_id}.mp4").exists() for row in rows)
    words = ("run_a", "run_b", "guidance", key["settings"]["run_a"][0])
    for file in (path for path in people.rglob("*") if path.suffix in (".jsonl", ".parquet")):
        assert not any(word.encode() in file.read_bytes() for word in words), file


def answer(cfg: compare.Config, person: str, choose: dict[str, str]) -> None:
    """choose: task -> "a", "b", "tie" or "skip"."""
    people, key = cfg.out / "people", json.loads((cfg.out / "key.json").read_text())
    events = []
    for task in read_tasks(people):
        if task.task_id not in choose:
            continue
        word, mine = choose[task.task_id], key["tasks"][task.task_id]
        better = mine[word] if word in "ab" else None
        ranks = (None, None) if word == "skip" else (1, 1) if better is None else tuple(1 if clip == better else 2 for clip in task.clip_ids)
        choice = None if word == "skip" else "tie" if better is None else "AB"[task.clip_ids.index(better)]
        skipped = "broken" if word == "skip" else None
        events.append(RankingEvent(f"{person}-{task.task_id}", task.task_id, task.prompt_id, person, task.clip_ids, ranks, kind="pair", choice=choice, skipped_reason=skipped))
    write_comparisons(people / "rankings", events, clips=(), prompts=(), annotators=[Annotator(person)], shares=(0.0, 0.0, 1.0))


def test_what_people_answer_is_read_back_by_the_key(asked: tuple[compare.Config, dict[str, Any]]) -> None:
    cfg, _ = asked
    tasks = [task.task_id for task in read_tasks(cfg.out / "people")]
    answer(cfg, "ann", dict.fromkeys(tasks[:6], "a") | dict.fromkeys(tasks[6:8], "b") | {tasks[8]: "tie", tasks[9]: "skip"})
    answer(cfg, "bob", {tasks[0]: "b"})
    theirs = {path: file_hash(path) for path in (cfg.out / "people").rglob("*.parquet")}
    result = compare.main(cfg)
    row, key = result["rows"][0], json.loads((cfg.out / "key.json").read_text())
    assert result["answered"] == "9 of 12 pairs" and Path(result["picture"]).exists()
    assert (row["wins"], row["ties"], row["losses"], row["votes"]) == (6, 1 + len(EQUAL), 3, 10 + len(EQUAL)) and row["decided_by_nobody"] == 3 + len(FLASHING)
    pair = {key["tasks"][task]["pair"]: value for task, value in zip(tasks, [0.5, 1, 1, 1, 1, 1, 0, 0, 0.5], strict=False)} | dict.fromkeys(EQUAL, 0.5)
    by_prompt = [np.mean([pair[i] for i in (2 * n, 2 * n + 1) if i in pair]) for n in range(10) if 2 * n in pair or 2 * n + 1 in pair]
    assert row["a_wins"] == pytest.approx(np.mean(by_prompt)) and row["blocked_b"] == len(FLASHING) / 20
    assert {path: file_hash(path) for path in theirs} == theirs, "reading rewrites nothing"


def test_other_runs_or_settings_are_not_mixed_with_what_people_were_asked(asked: tuple[compare.Config, dict[str, Any]], tmp_path: Path) -> None:
    cfg, _ = asked
    with pytest.raises(UserError, match="asked about other clips"):
        compare.main(cfg.model_copy(update={"seed": 1}))
    shutil.copytree(cfg.out / "people", tmp_path / "killed" / "people")  # a first call that was killed before the key
    again = compare.main(cfg.model_copy(update={"out": tmp_path / "killed"}))
    assert again["answered"] == "0 of 12 pairs" and file_hash(tmp_path / "killed" / "key.json") == file_hash(cfg.out / "key.json")
    assert len(ClipStore(tmp_path / "killed" / "people" / "clips")) == 24
