"""Metamorphic checks of a scorer: changes to a good clip after which its score must stay, or must fall, whatever the score is.

No answer of a person is needed, so every checkpoint can be checked. A score "stays" within a quarter of the standard deviation that clips of one prompt
have among themselves, and "falls" when it is lower by any amount. What cannot be scored fails. Checks that leave the prompt alone and ask nothing of it
(`needs_prompt` false) hold for any footage; the others need a prompt that says what the clip shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.video.files import resample_fps
from reward.mirror import swap_sides
from reward.planted import h264
from reward.types import Scorer

STAYS_WITHIN = 0.25
"""Of the standard deviation of scores within a prompt."""
GRID_PERIOD = 8


@dataclass(frozen=True)
class Case:
    """A good clip of its prompt."""

    case_id: str
    video: Tensor  # [T,3,H,W] in [0,1]
    prompt: str
    fps: float
    wrong_prompt: str = ""
    """A prompt that the clip does not follow; empty where none is known."""
    directed: bool = False
    """Whether played backwards the clip no longer does what the prompt says."""


Changed = tuple[Tensor, str]


@dataclass(frozen=True)
class Check:
    """One change. `change` returns None for a case that it says nothing about."""

    name: str
    expect: Literal["stays", "falls"]
    change: Callable[[Case], Changed | None]
    needs_prompt: bool = False


class Outcome(NamedTuple):
    """What one check found of one case in one dimension."""

    check: str
    case_id: str
    dimension: str
    before: float
    after: float
    passed: bool


def reencoded(case: Case) -> Changed:
    """Written as H.264 and read again, as a labeler's browser got it."""
    return h264(case.video, case.fps), case.prompt


def without_last_frame(case: Case) -> Changed | None:
    """The clip without its last frame, where it has three."""
    return (case.video[:-1], case.prompt) if len(case.video) > 2 else None


def with_one_more_frame(case: Case) -> Changed:
    """The clip with its last frame twice."""
    return torch.cat([case.video, case.video[-1:]]), case.prompt


def at_another_rate(case: Case) -> Changed:
    """A player of half as many frames a second again: some frames are shown twice, none is lost, the duration stays."""
    return resample_fps(case.video, case.fps, 1.5 * case.fps), case.prompt


def mirrored(case: Case) -> Changed:
    """The mirror image under the mirrored prompt."""
    return case.video.flip(-1), swap_sides(case.prompt)


def shuffled(case: Case) -> Changed | None:
    """Every third frame, then those between: from seven frames on no two neighbours were neighbours. Nothing to say of fewer than five, or of a clip that hardly moves."""
    order = [index for start in (0, 2, 1) for index in range(start, len(case.video), 3)]
    return (case.video[order], case.prompt) if len(case.video) > 4 and moves(case.video) else None


def frozen(case: Case) -> Changed | None:
    """The middle frame all the time. Nothing to say of a clip that hardly moves."""
    middle = case.video[len(case.video) // 2]
    return (middle.expand_as(case.video), case.prompt) if moves(case.video) else None


def blurred(case: Case) -> Changed:
    """A box blur as wide as a tenth of the short side, three pixels at least."""
    width = max(3, min(case.video.shape[-2:]) // 10 | 1)
    padded = F.pad(case.video, (width // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, width, stride=1), case.prompt


def gridded(case: Case) -> Changed:
    """Every eighth row and column brighter by a sixth: what an optimiser paints where patches meet."""
    video = case.video.clone()
    video[..., ::GRID_PERIOD, :] += 1 / 6
    video[..., ::GRID_PERIOD] += 1 / 6
    return video.clamp(0, 1), case.prompt


def oversaturated(case: Case) -> Changed | None:
    """Colours three times as far from grey. Nothing to say of a clip without colours, which stays what it is."""
    grey = case.video.mean(1, keepdim=True)
    return ((grey + 3 * (case.video - grey)).clamp(0, 1), case.prompt) if coloured(case.video) else None


def reversed_in_time(case: Case) -> Changed | None:
    """The clip backwards, where its prompt names a direction."""
    return (case.video.flip(0), case.prompt) if case.directed else None


def under_a_wrong_prompt(case: Case) -> Changed | None:
    """The clip under another prompt, where one is known that is wrong."""
    return (case.video, case.wrong_prompt) if case.wrong_prompt else None


CHECKS = (
    Check("re-encoded", "stays", reencoded),
    Check("without its last frame", "stays", without_last_frame),
    Check("with one more frame", "stays", with_one_more_frame),
    Check("at another frame rate", "stays", at_another_rate),
    Check("mirrored, sides swapped in the prompt", "stays", mirrored, needs_prompt=True),
    Check("shuffled", "falls", shuffled),
    Check("frozen", "falls", frozen),
    Check("blurred", "falls", blurred),
    Check("gridded", "falls", gridded),
    Check("over-saturated", "falls", oversaturated),
    Check("reversed", "falls", reversed_in_time, needs_prompt=True),
    Check("under a wrong prompt", "falls", under_a_wrong_prompt, needs_prompt=True),
)


def moves(video: Tensor) -> bool:
    """Whether more than a hundredth of the pixels ever change by more than a tenth, [T,3,H,W]."""
    return bool(((video.amax(0) - video.amin(0)).amax(0) > 0.1).float().mean() > 0.01)


def coloured(video: Tensor) -> bool:
    """Whether the channels of more than a hundredth of the pixels ever differ by more than a twentieth, [T,3,H,W]."""
    return bool(((video.amax(1) - video.amin(1)).amax(0) > 0.05).float().mean() > 0.01)


@torch.no_grad()
def run_checks(scorer: Scorer, cases: Sequence[Case], within_prompt_std: Mapping[str, float], checks: Iterable[Check] = CHECKS, *, batch: int = 16) -> list[Outcome]:
    """Every check of every case in every dimension of the scorer; cases that a check says nothing about are left out.

    within_prompt_std: dimension -> standard deviation of the scores of clips of one prompt. Raises ValueError where it lacks a dimension or is not positive.
    """
    for dim in scorer.dims:
        if not within_prompt_std.get(dim, 0.0) > 0:
            raise ValueError(f"no positive standard deviation within prompts for the dimension {dim}: a score that never varies cannot be checked")
    before = _scores(scorer, [(case.video, case.prompt) for case in cases], batch)
    outcomes = []
    for check in checks:
        found = [(row, case, changed) for row, case in enumerate(cases) if (changed := check.change(case)) is not None]
        after = _scores(scorer, [changed for _, _, changed in found], batch)
        for (row, case, _), scores in zip(found, after, strict=True):
            for dim, was, now in zip(scorer.dims, before[row], scores, strict=True):
                outcomes.append(Outcome(check.name, case.case_id, dim, was, now, _passes(check, was, now, within_prompt_std[dim])))
    return outcomes


def _passes(check: Check, before: float, after: float, std: float) -> bool:
    """False for nan on either side."""
    return after < before if check.expect == "falls" else abs(after - before) <= STAYS_WITHIN * std


def _scores(scorer: Scorer, clips: Sequence[Changed], batch: int) -> list[list[float]]:
    """[B][R] in the order given; clips of one size are scored together."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for row, (video, _) in enumerate(clips):
        by_size.setdefault(tuple(video.shape), []).append(row)
    scores: dict[int, list[float]] = {}
    for rows in by_size.values():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            mean = scorer(torch.stack([clips[row][0] for row in part]), [clips[row][1] for row in part]).mean
            scores.update(zip(part, mean.tolist(), strict=True))
    return [scores[row] for row in range(len(clips))]
