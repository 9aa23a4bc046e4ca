"""Simulated labelers: deterministic, honest about being simulated, and each with the habits written beside the name."""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recipes.shapes.labelers as labelers
from recipes.shapes.eye import Perception, Signals
from recipes.shapes.labelers import GUARD_PANEL, REWARD_PANEL, Labeler, Task, annotators, collect, rank, tasks_from_signals, utility
from reward.comparisons import Annotator, Clip, Prompt, RankingEvent, load_comparisons, write_comparisons

COLUMNS = """event_id task_id prompt_id annotator_id dimension kind clip_ids ranks choice likert confidence is_gold gold_ok is_repeat shown_order
model_hint_shown watch_ms lead_time_ms skipped_reason flags guideline_version app_version source_dataset licence created_at"""
EVEN, COLOR, SHAPE, MOTION, LIVELY, CARELESS = REWARD_PANEL


def quiet(person: Labeler) -> Labeler:
    """The same tastes without noise and habits."""
    return replace(person, noise=0.0, position=0.0, careless=0.0)


def seen(shape: list[float], *, motion: list[float] | None = None, brightness: list[float] | None = None, flashing: list[float] | None = None) -> Perception:
    """What the eye might say of clips of a one-thing prompt whose colours are right."""
    k = len(shape)
    two = np.full((3, k, 2), np.nan)
    two[0, :, 0], two[1, :, 0], two[2, :, 0] = 1.0, shape, motion or [1.0] * k
    return Perception(two[0], two[1], two[2], np.zeros(k), Signals(np.full(k, 0.2), np.array(brightness or [0.35] * k), np.full(k, 0.02), np.array(flashing or [0.0] * k)))


def random_tasks(n: int, seed: int = 0) -> list[Task]:
    """Four clips a prompt, about half of them with something wrong; some blurred, a few flashing."""
    rng = np.random.default_rng(seed)
    tasks = []
    for i in range(n):
        two = np.full((3, 4, 2), np.nan)
        two[:, :, 0] = np.where(rng.random((3, 4)) < 0.2, rng.beta(1, 80, (3, 4)), rng.beta(80, 1, (3, 4)))
        flash = np.where(rng.random(4) < 0.08, 0.5, 0.0)
        signals = Signals(rng.uniform(0.02, 0.4, 4), rng.uniform(0.2, 0.5, 4) + flash / 2, rng.uniform(0, 0.05, 4), flash)
        tasks.append(Task(f"p{i}", tuple(f"c{i}-{j}" for j in range(4)), Perception(two[0], two[1], two[2], rng.beta(1, 80, 4), signals)))
    return tasks


def shuffled(k: int, rng: np.random.Generator) -> list[int]:
    return [int(i) for i in rng.permutation(k)]


def test_a_labeler_without_noise_puts_the_right_clip_first() -> None:
    rng = np.random.default_rng(0)
    what = seen([0.02, 0.99, 0.02, 0.98], motion=[0.98, 0.99, 0.03, 0.02])
    for person in (EVEN, COLOR, SHAPE, MOTION, *GUARD_PANEL):
        ranks = rank(quiet(person), what, shuffled(4, rng), rng)
        assert ranks[1] == 1 and ranks.count(1) == 1, person.annotator_id
        assert ranks[2] == max(ranks), person.annotator_id


def test_tastes_decide_between_two_faults() -> None:
    rng = np.random.default_rng(0)
    wrong_shape_or_wrong_motion = seen([0.02, 0.99], motion=[0.99, 0.02])
    assert rank(quiet(SHAPE), wrong_shape_or_wrong_motion, [0, 1], rng) == [2, 1]
    assert rank(quiet(MOTION), wrong_shape_or_wrong_motion, [0, 1], rng) == [1, 2]


def test_equal_clips_tie_and_ties_do_not_chain() -> None:
    rng = np.random.default_rng(0)
    person = Labeler("simulated-x", right=1.0, color=0.0, shape=0.0, motion=0.0, tie=0.25, noise=0.0, position=0.0, careless=0.0)
    assert rank(person, seen([0.9, 0.9, 0.9]), [2, 0, 1], rng) == [1, 1, 1]
    assert rank(person, seen([0.9, 0.7, 0.5, 0.1]), [0, 1, 2, 3], rng) == [1, 1, 2, 3]


def test_the_lively_one_prefers_a_flashing_clip_and_the_others_do_not() -> None:
    flashing_but_wrong = seen([0.02, 0.99], brightness=[0.6, 0.3], flashing=[0.55, 0.0])
    rng = np.random.default_rng(0)
    assert rank(quiet(LIVELY), flashing_but_wrong, [0, 1], rng) == [1, 2]
    for person in (EVEN, COLOR, SHAPE, MOTION, *GUARD_PANEL):
        assert rank(quiet(person), flashing_but_wrong, [0, 1], rng) == [2, 1], person.annotator_id
    flashing_and_right = seen([0.99, 0.99], brightness=[0.6, 0.3], flashing=[0.55, 0.0])
    first = [rank(LIVELY, flashing_and_right, shuffled(2, rng), rng) == [1, 2] for _ in range(300)]
    assert np.mean(first) > 0.9


def test_without_habits_rankings_follow_plackett_luce() -> None:
    person = Labeler("simulated-x", right=1.0, color=0.0, shape=0.0, motion=0.0, sharpness=0.0, tie=0.0, position=0.0, careless=0.0, noise=0.5)
    what = seen([0.9, 0.5, 0.1])
    worth = np.exp(np.array([0.9, 0.5, 0.1]) / 0.5)
    np.testing.assert_allclose(utility(person, what), [0.9, 0.5, 0.1])
    rng, n = np.random.default_rng(0), 6000
    counts: defaultdict[tuple[int, ...], int] = defaultdict(int)
    for _ in range(n):
        counts[tuple(np.argsort(rank(person, what, [0, 1, 2], rng)).tolist())] += 1
    for order in itertools.permutations(range(3)):
        a, b, c = worth[list(order)]
        expected = a / (a + b + c) * b / (b + c)
        assert abs(counts[order] / n - expected) < 4 * np.sqrt(expected * (1 - expected) / n), order


@pytest.mark.parametrize("position, low, high", [(0.6, 0.03, 0.4), (-0.6, -0.4, -0.03), (0.0, -0.03, 0.03)])
def test_the_position_habit_shows_in_the_documented_direction(position: float, low: float, high: float) -> None:
    person, rng, what = replace(EVEN, position=position, careless=0.0, tie=0.0), np.random.default_rng(0), seen([0.9] * 4)
    first = []
    for _ in range(4000):
        shown = shuffled(4, rng)
        first.append(rank(person, what, shown, rng)[shown.index(0)] == 1)
    assert low < np.mean(first) - 0.25 < high


def test_the_careless_one_is_near_chance_and_the_others_are_not() -> None:
    rng, what = np.random.default_rng(0), seen([0.99, 0.02, 0.02, 0.02])

    def finds_the_right_one(person: Labeler) -> float:
        return float(np.mean([rank(person, what, shuffled(4, rng), rng)[0] == 1 for _ in range(600)]))

    assert 0.25 < finds_the_right_one(CARELESS) < 0.6
    assert finds_the_right_one(replace(CARELESS, careless=1.0)) == pytest.approx(0.25, abs=0.06)
    assert min(finds_the_right_one(person) for person in REWARD_PANEL[:5]) > 0.9


@pytest.mark.parametrize("panel", [REWARD_PANEL, GUARD_PANEL])
def test_people_agree_on_three_to_nine_pairs_in_ten(panel: tuple[Labeler, ...]) -> None:
    rng = np.random.default_rng(0)
    tasks = random_tasks(150)
    ranks = {p.annotator_id: np.array([rank(p, t.perception, shuffled(4, rng), rng) for t in tasks]) for p in panel}
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    order = {name: np.sign(r[:, pairs[:, 0]] - r[:, pairs[:, 1]]) for name, r in ranks.items()}

    def agreement(a: str, b: str) -> float:
        both = (order[a] != 0) & (order[b] != 0)
        return float((order[a] == order[b])[both].mean())

    attentive, careless = [p.annotator_id for p in panel[:5]], panel[5].annotator_id
    between = [agreement(a, b) for a, b in itertools.combinations(attentive, 2)]
    assert min(between) > 0.7 and max(between) < 0.95 and 0.75 < np.mean(between) < 0.9
    assert all(0.5 < agreement(a, careless) < 0.7 for a in attentive)
    assert 0.05 < np.mean([(order[name] == 0).mean() for name in attentive]) < 0.3


def test_collecting_twice_gives_the_same_rows_and_another_seed_other_ones() -> None:
    tasks = random_tasks(30)
    assert collect(REWARD_PANEL, tasks, seed=1) == collect(REWARD_PANEL, tasks, seed=1)
    assert [r["ranks"] for r in collect(REWARD_PANEL, tasks, seed=1)] != [r["ranks"] for r in collect(REWARD_PANEL, tasks, seed=2)]


def test_what_is_said_of_a_task_does_not_depend_on_the_other_tasks() -> None:
    tasks = random_tasks(20)
    everything = [{k: v for k, v in row.items() if k != "created_at"} for row in collect(REWARD_PANEL, tasks, seed=1)]
    later = [{k: v for k, v in row.items() if k != "created_at"} for row in collect(REWARD_PANEL, tasks[12:], seed=1)]
    assert later == everything[-len(later) :]


def test_rows_have_the_columns_of_comparisons_and_say_they_are_simulated() -> None:
    tasks = random_tasks(200)
    rows = collect(REWARD_PANEL, tasks, seed=1, overlap=0.4, repeats=0.1, gold=1.0)
    by_task = defaultdict(list)
    for row in rows:
        assert list(row) == COLUMNS.split()
        assert row["annotator_id"].startswith("simulated-") and row["source_dataset"] == "simulated labelers"
        assert sorted(row["shown_order"]) == [0, 1, 2, 3] and sorted(set(row["ranks"])) == list(range(1, max(row["ranks"]) + 1))
        assert row["lead_time_ms"] > 0 and (row["gold_ok"] is None) == (not row["is_gold"])
        by_task[row["task_id"]].append(row)
    assert len(by_task) == 200 and len({row["event_id"] for row in rows}) == len(rows)
    people = [len({row["annotator_id"] for row in group}) for group in by_task.values()]
    assert set(people) == {1, 2, 3} and 0.3 < np.mean([n > 1 for n in people]) < 0.5
    assert 0.05 < np.mean([row["is_repeat"] for row in rows]) < 0.15
    checks = [row["gold_ok"] for row in rows if row["is_gold"] and row["annotator_id"] not in (CARELESS.annotator_id, LIVELY.annotator_id)]
    assert len(checks) > 5 and np.mean(checks) > 0.8
    assert rows == sorted(rows, key=lambda row: row["created_at"])


def test_rows_are_accepted_by_the_table_of_comparisons(tmp_path: Path) -> None:
    tasks = random_tasks(12)
    rows = collect(REWARD_PANEL, tasks, seed=1)
    people = annotators(REWARD_PANEL, rows, pool="simulated reward")
    clips = [Clip(clip_id, "", task.prompt_id) for task in tasks for clip_id in task.clip_ids]
    prompts = [Prompt(task.prompt_id, f"prompt {task.prompt_id}") for task in tasks]
    events = [RankingEvent(**row) for row in rows]
    write_comparisons(tmp_path, events, clips=clips, prompts=prompts, annotators=[Annotator(**person) for person in people])
    assert load_comparisons(tmp_path).events == tuple(events)


def test_annotator_rows_count_their_events() -> None:
    rows = collect(GUARD_PANEL, random_tasks(50), seed=1)
    people = annotators(GUARD_PANEL, rows, pool="simulated guard")
    assert sum(p["n_events"] for p in people) == len(rows)
    assert all(p["annotator_id"].startswith("simulated-") for p in people)
    assert list(people[0]) == ["annotator_id", "pool", "locale", "qualified_at", "reliability", "tie_bias", "position_bias", "n_events"]


def test_the_two_panels_share_no_person() -> None:
    assert not {p.annotator_id for p in REWARD_PANEL} & {p.annotator_id for p in GUARD_PANEL}
    assert sum(p.lively > 0 for p in REWARD_PANEL) == 1 and not any(p.lively > 0 for p in GUARD_PANEL)


def test_real_clips_are_ranked_by_signals_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    dull = torch.full((9, 3, 32, 48), 0.4)
    busy = torch.rand(9, 3, 32, 48, generator=generator)
    tasks = tasks_from_signals({"p": [("dull", dull), ("busy", busy), ("dull-again", dull + 0.001)]})
    assert [task.clip_ids for task in tasks] == [("dull", "busy", "dull-again")]
    rng = np.random.default_rng(0)
    assert rank(quiet(MOTION), tasks[0].perception, [0, 1, 2], rng) == [2, 1, 2]
    assert [row["ranks"] for row in collect(REWARD_PANEL, tasks, seed=0, overlap=0.0, repeats=0.0)]


def test_equal_real_clips_are_worth_the_same() -> None:
    clip = torch.full((1, 3, 16, 16), 0.5)
    (task,) = tasks_from_signals({"p": [("a", clip), ("b", clip)]})
    np.testing.assert_array_equal(utility(EVEN, task.perception), [0.0, 0.0])


def test_clips_are_cut_into_tasks_and_a_lonely_rest_is_left_out() -> None:
    clip = torch.zeros(1, 3, 16, 16)
    tasks = tasks_from_signals({"p": [(f"c{i}", clip) for i in range(9)], "q": [("c9", clip)]}, k=4)
    assert [len(task.clip_ids) for task in tasks] == [4, 4]


def test_a_shown_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="permutation of 2"):
        rank(EVEN, seen([0.1, 0.9]), [0, 0], np.random.default_rng(0))


def test_labelers_see_through_the_eye_only() -> None:
    tree = ast.parse(Path(str(labelers.__file__)).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)} | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not [name for name in names if name and (name.startswith(("reward", "align")) or "judge" in name or "render" in name)]
