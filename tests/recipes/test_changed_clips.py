"""Clips that are changed: drawn ones follow their prompts and not the wrong ones, footage keeps its rate, and the table counts what passed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from base_model.errors import UserError
from base_model.types import ClipShape
from base_model.video.files import write_mp4
from recipes.changed_clips import drawn_cases, footage_cases, table_of, within_prompt_std
from recipes.shapes.judge import judge
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP
from reward.metamorphic import CHECKS, Case, Outcome
from reward.mirror import swap_sides


def test_drawn_clips_show_what_their_prompts_say_and_are_the_same_again() -> None:
    cases, prompts = drawn_cases(12, DEMO_CLIP, seed=3), make_prompts(12, seed=3, split="eval")
    assert [case.prompt for case in cases] == [prompt.text for prompt in prompts]
    assert all(one.all_right for one in judge(torch.stack([case.video for case in cases]), prompts))
    again = drawn_cases(12, DEMO_CLIP, seed=3)
    assert all(torch.equal(a.video, b.video) and a.wrong_prompt == b.wrong_prompt for a, b in zip(cases, again, strict=True))
    assert all(case.wrong_prompt and case.wrong_prompt != case.prompt for case in cases)


def test_a_drawn_clip_played_backwards_is_wrong_where_it_is_called_directed() -> None:
    cases, prompts = drawn_cases(44, DEMO_CLIP, seed=0), make_prompts(44, seed=0, split="eval")
    directed = [row for row, case in enumerate(cases) if case.directed]
    assert 10 < len(directed) < 44
    backwards = judge(torch.stack([cases[row].video.flip(0) for row in directed]), [prompts[row] for row in directed])
    assert not any(one.all_right for one in backwards)


def test_sides_are_swapped_in_the_words_of_the_built_in_world() -> None:
    sided = [case.prompt for case in drawn_cases(44, DEMO_CLIP, seed=0) if "left" in case.prompt or "right" in case.prompt]
    assert sided and all(swap_sides(prompt) != prompt for prompt in sided)


def test_footage_comes_at_the_rate_and_size_that_is_asked_for(tmp_path: Path) -> None:
    levels = torch.linspace(0, 1, 24).view(24, 1, 1, 1).expand(24, 3, 48, 80)
    write_mp4(tmp_path / "fade.mp4", levels, 24.0, upscale=False)
    (tmp_path / "notes.txt").write_text("no clip")
    (case,) = footage_cases(tmp_path, ClipShape(6, 32, 32), 12.0)
    assert (case.case_id, case.fps, case.wrong_prompt, case.directed) == ("fade", 12.0, "", False)
    assert case.video.shape == (6, 3, 32, 32)
    assert case.video.mean((1, 2, 3)).tolist() == pytest.approx((torch.arange(0, 12, 2) / 23).tolist(), abs=0.02)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video files"):
        footage_cases(tmp_path / "empty", ClipShape(6, 32, 32), 12.0)


def test_the_table_counts_cases_and_names_what_failed() -> None:
    outcomes = [Outcome("blurred", f"c{k}", "overall", 1.0, 0.0, k > 0) for k in range(4)] + [Outcome("re-encoded", "c0", "overall", 1.0, 1.0, True)]
    (found,) = table_of(outcomes).values()
    assert [row["check"] for row in found["checks"]] == ["re-encoded", "blurred"]
    blurred = found["checks"][1]
    assert (blurred["cases"], blurred["passed"]["mean"], blurred["failed"]) == (4, 0.75, ["c0"])
    assert (found["all"]["cases"], found["all"]["passed"]["mean"], found["all"]["failed"]) == (5, 0.8, ["blurred: c0"])
    assert table_of([]) == {}
    assert {check.name for check in CHECKS} >= {"blurred", "re-encoded"}


def test_the_spread_within_prompts_is_the_pooled_one_and_leaves_single_clips_out() -> None:
    rng = np.random.default_rng(0)
    groups = {f"p{k}": rng.normal(k, 2.0, size=4) for k in range(500)}
    score = {f"{prompt}-{k}": float(value) for prompt, values in groups.items() for k, value in enumerate(values)} | {"alone-0": 1e9, "p0-9": math.nan}
    prompt_of = {clip: clip.split("-")[0] for clip in score}
    pooled = math.sqrt(np.mean([values.var(ddof=1) for values in groups.values()]))
    assert within_prompt_std({"overall": score}, prompt_of)["overall"] == pytest.approx(pooled, rel=1e-12)
    assert math.isnan(within_prompt_std({"overall": {"alone-0": 1.0}}, prompt_of)["overall"])


def test_a_case_of_footage_asks_nothing_of_the_prompt() -> None:
    case = Case("a", torch.rand(9, 3, 32, 32), "a video", 12.0)
    assert [check.name for check in CHECKS if check.needs_prompt and check.change(case) is not None] == ["mirrored, sides swapped in the prompt"]
