"""Metamorphic checks, held against scorers whose every answer is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reward.metamorphic import CHECKS, Case, blurred, coloured, frozen, gridded, mirrored, moves, oversaturated, reencoded, reversed_in_time, run_checks, shuffled
from reward.mirror import swap_sides
from reward.types import Scores


class Fixed:
    """A scorer that is any function of one clip and its prompt."""

    differentiable = False

    def __init__(self, *functions: object) -> None:
        self.functions = functions
        self.dims = tuple(f"dim-{k}" for k in range(len(functions)))
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        self.calls.append(tuple(video.shape))
        mean = torch.tensor([[float(f(clip, prompt)) for f in self.functions] for clip, prompt in zip(video, prompts, strict=True)])  # type: ignore[operator]
        return Scores(mean, torch.zeros_like(mean))


def disc(frames: int = 9, side: int = 32, step: float = 2.0, seed: int = 0) -> Tensor:
    """A coloured disc that moves to the right."""
    y, x = torch.meshgrid(torch.arange(side) * 1.0, torch.arange(side) * 1.0, indexing="ij")
    color = torch.tensor([0.8, 0.3, 0.2]).roll(seed)[:, None, None]
    return torch.stack([torch.where((x - 8 - step * t).square() + (y - 16).square() < 25, color, torch.tensor(0.4)) for t in range(frames)])


def cases(number: int = 3) -> list[Case]:
    return [Case(f"case-{k}", disc(seed=k), "a disc moves right", 8.0, wrong_prompt="a disc moves up", directed=True) for k in range(number)]


def rate(scorer: Fixed, check: str, std: float = 1.0) -> float:
    found = [one for one in run_checks(scorer, cases(), dict.fromkeys(scorer.dims, std)) if one.check == check]
    assert found
    return sum(one.passed for one in found) / len(found)


def test_a_constant_passes_what_must_stay_and_fails_what_must_fall() -> None:
    for check in CHECKS:
        assert rate(Fixed(lambda clip, prompt: 1.0), check.name) == (check.expect == "stays"), check.name


def test_a_scorer_that_cannot_score_fails_every_check() -> None:
    assert not any(one.passed for one in run_checks(Fixed(lambda clip, prompt: math.nan), cases(), {"dim-0": 1.0}))


def test_a_score_of_length_may_move_within_a_quarter_of_the_spread_and_no_further() -> None:
    of_length = Fixed(lambda clip, prompt: len(clip))
    for check in ("without its last frame", "with one more frame"):
        assert rate(of_length, check, std=4.0) == 1
        assert rate(of_length, check, std=3.9) == 0


def test_a_reader_of_the_prompt_falls_under_a_wrong_one_only() -> None:
    reader = Fixed(lambda clip, prompt: "right" in prompt or "left" in prompt)
    assert rate(reader, "under a wrong prompt") == 1
    assert rate(reader, "mirrored, sides swapped in the prompt") == 1
    assert rate(reader, "shuffled") == 0


def test_each_fault_is_seen_by_the_measure_made_for_it() -> None:
    def steadiness(clip: Tensor, prompt: str) -> Tensor:
        return -clip.diff(dim=0).abs().mean()

    def motion(clip: Tensor, prompt: str) -> Tensor:
        return clip.diff(dim=0).abs().mean()

    def edges(clip: Tensor, prompt: str) -> Tensor:
        return clip.diff(dim=-1).abs().amax()

    def greyness(clip: Tensor, prompt: str) -> Tensor:
        return -(clip.amax(1) - clip.amin(1)).mean()

    def rightward(clip: Tensor, prompt: str) -> Tensor:
        mass = (clip - 0.4).abs().mean(1) @ torch.arange(clip.shape[-1]).float()  # [T, H]
        return mass[-1].sum() - mass[0].sum()

    assert rate(Fixed(steadiness), "shuffled") == 1
    assert rate(Fixed(motion), "frozen") == 1
    assert rate(Fixed(edges), "blurred") == 1
    assert rate(Fixed(lambda clip, prompt: -clip.mean()), "gridded") == 1
    assert rate(Fixed(greyness), "over-saturated") == 1
    assert rate(Fixed(rightward), "reversed") == 1


def test_dimensions_are_judged_by_their_own_spread() -> None:
    both = Fixed(lambda clip, prompt: len(clip), lambda clip, prompt: len(clip))
    found = [one for one in run_checks(both, cases(1), {"dim-0": 10.0, "dim-1": 1.0}) if one.check == "with one more frame"]
    assert [(one.dimension, one.before, one.after, one.passed) for one in found] == [("dim-0", 9.0, 10.0, True), ("dim-1", 9.0, 10.0, False)]


def test_clips_are_scored_in_batches_of_one_size_and_each_original_once() -> None:
    scorer = Fixed(lambda clip, prompt: 0.0)
    run_checks(scorer, cases(5), {"dim-0": 1.0}, CHECKS[:1], batch=2)
    assert [shape[0] for shape in scorer.calls] == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("prompt", "mirror"),
    [
        ("a disc moves left", "a disc moves right"),
        ("A red disc drifts to the left; a blue one slides rightward.", "A red disc drifts to the right; a blue one slides leftward."),
        ("Left of the house, upright", "Right of the house, upright"),
        ("it turns counter-clockwise", "it turns clockwise"),
        ("it turns clockwise", "it turns counter-clockwise"),
        ("a leftover bright light, left_over", "a leftover bright light, left_over"),
        ("a ball rolls left-to-right in the top-left corner", "a ball rolls right-to-left in the top-right corner"),
        ("the Left-hand door, right-handed, counter-clockwise-turning", "the Right-hand door, left-handed, clockwise-turning"),
        ("LEFT, Counter-clockwise", "RIGHT, Clockwise"),
        ("nach links: größer ← 左", "nach links: größer ← 左"),
        ("", ""),
    ],
)
def test_sides_change_places_and_other_words_do_not(prompt: str, mirror: str) -> None:
    assert swap_sides(prompt) == mirror
    assert swap_sides(swap_sides(prompt)) == prompt


def test_every_change_keeps_a_clip_a_clip() -> None:
    for check in CHECKS:
        for case in cases(1):
            changed = check.change(case)
            assert changed is not None, check.name
            video, prompt = changed
            assert video.ndim == 4 and video.shape[1:] == case.video.shape[1:], check.name
            assert float(video.min()) >= 0 and float(video.max()) <= 1 and bool(torch.isfinite(video).all()), check.name
            assert (not torch.equal(video, case.video) if video.shape == case.video.shape else True) or prompt != case.prompt, check.name


def test_shuffling_leaves_no_two_neighbours_together_and_loses_no_frame() -> None:
    video = torch.arange(13.0).view(13, 1, 1, 1).expand(13, 3, 4, 4) / 13
    changed = shuffled(Case("a", video, "p", 8.0))
    assert changed is not None
    order = (changed[0][:, 0, 0, 0] * 13).round().int().tolist()
    assert sorted(order) == list(range(13))
    assert min(abs(a - b) for a, b in itertools.pairwise(order)) > 1


def test_nothing_is_asked_of_time_where_nothing_moves() -> None:
    still = Case("a", torch.rand(1, 3, 16, 16).expand(9, 3, 16, 16), "a rock", 8.0)
    assert not moves(still.video)
    assert [change(still) for change in (shuffled, frozen, reversed_in_time)] == [None, None, None]


def test_re_encoding_keeps_odd_sides_and_changes_pixels_a_little() -> None:
    case = Case("a", torch.nn.functional.avg_pool2d(torch.rand(5, 3, 31, 45), 5, 1, 2), "p", 8.0)
    video, _ = reencoded(case)
    assert video.shape == case.video.shape
    assert 0 < float((video - case.video).abs().mean()) < 0.05


def test_mirroring_twice_and_freezing_and_blurring_by_hand() -> None:
    case = cases(1)[0]
    again, prompt = mirrored(Case("a", *mirrored(case), case.fps))
    assert torch.equal(again, case.video) and prompt == case.prompt
    still = frozen(case)
    assert still is not None and torch.equal(still[0][0], case.video[4]) and torch.equal(still[0][8], case.video[4])
    flat = Case("a", torch.full((2, 3, 16, 16), 0.3), "p", 8.0)
    torch.testing.assert_close(blurred(flat)[0], flat.video)
    assert gridded(flat)[0][0, 0, 8, 8] == pytest.approx(0.3 + 2 / 6) and gridded(flat)[0][0, 0, 1, 1] == pytest.approx(0.3)
    colored = Case("a", torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1).expand(2, 3, 8, 8), "p", 8.0)
    more = oversaturated(colored)
    assert more is not None and more[0][0, :, 0, 0].tolist() == pytest.approx([0.7, 0.4, 0.1])


def test_nothing_is_asked_of_colour_where_there_is_none() -> None:
    grey = Case("a", torch.rand(3, 1, 16, 16).expand(3, 3, 16, 16), "a rock", 8.0)
    assert not coloured(grey.video) and oversaturated(grey) is None
    assert all(coloured(case.video) for case in cases())


def test_a_dimension_without_a_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="dim-0"):
        run_checks(Fixed(lambda clip, prompt: 0.0), cases(1), {"dim-0": 0.0})


def test_no_cases_give_no_outcomes() -> None:
    assert run_checks(Fixed(lambda clip, prompt: 0.0), [], {"dim-0": 1.0}) == []
