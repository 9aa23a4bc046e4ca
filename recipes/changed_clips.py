"""Good clips to change (`reward/metamorphic.py`): drawn ones of the built-in world and real footage, and the table of what a scorer made of the changes.

Every reward model is checked so when it is trained, and its card lists what failed; `rushes evaluate-reward` does it again, with footage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from base_model.errors import UserError
from base_model.types import ClipShape
from base_model.video.files import cover, from_uint8, read_video, resample_fps
from recipes.shapes.prompts import make_prompts, swap_attribute, write_prompt
from recipes.shapes.render import FPS, render, sample_scene
from recipes.statistics import clopper_pearson
from reward.comparisons import Clip
from reward.metamorphic import CHECKS, Case, Outcome, run_checks
from reward.types import Scorer, Scores

UNDIRECTED = ("still", "bounce")
"""Motions that look the same backwards; an orbit does too, unless its sense is said."""
MOST_VALUES = 200_000_000
"""Pixel values that are held at once, as 32-bit floats, and twice: clips and changed clips."""
FOOTAGE = (".mp4", ".webm", ".mkv", ".mov")


def checked(
    model: Scorer, std: Mapping[str, float], clip: ClipShape, fps: float, *, drawn: int, footage: Path | None = None, seed: int = 0, batch: int = 16
) -> dict[str, dict[str, dict[str, Any]]]:
    """"drawn" and "footage" -> `table_of` what the metamorphic checks found on clips of that size and rate; {} for what was not asked for.

    std: dimension -> standard deviation of the model's scores among clips of one prompt; dimensions without one are left out. Of large clips fewer are drawn, perhaps none:
    no more than `MOST_VALUES` in all.
    """
    drawn = min(drawn, MOST_VALUES // (3 * clip.frames * clip.height * clip.width))
    cases = {"drawn": drawn_cases(drawn, clip, seed=seed) if drawn else [], "footage": footage_cases(footage, clip, fps) if footage else []}
    free = tuple(check for check in CHECKS if not check.needs_prompt)
    known = {dim: value for dim, value in std.items() if value > 0}
    judged = Narrowed(model, tuple(known)) if known else None
    return {name: table_of(run_checks(judged, some, known, CHECKS if name == "drawn" else free, batch=batch)) if some and judged else {} for name, some in cases.items()}


def ranked_most(clips: Iterable[Clip]) -> tuple[ClipShape, float]:
    """The size and the frame rate that most of the clips have. Raises ValueError where there is no clip."""
    kinds = Counter((ClipShape(clip.num_frames, clip.height, clip.width), clip.fps) for clip in clips)
    if not kinds:
        raise ValueError("no clips to take a size from")
    return kinds.most_common(1)[0][0]


class Narrowed:
    """A scorer's dimensions that are to be checked."""

    def __init__(self, scorer: Scorer, dims: tuple[str, ...]) -> None:
        self.dims, self.differentiable, self._scorer = dims, scorer.differentiable, scorer
        self._columns = [scorer.dims.index(dim) for dim in dims]

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        scores = self._scorer(video, list(prompts))
        return Scores(scores.mean[:, self._columns], scores.spread[:, self._columns])


def drawn_cases(number: int, clip: ClipShape, *, seed: int) -> list[Case]:
    """Clips that show what their held-out prompts of one object say, with a wrong prompt each: one attribute is another."""
    rng = np.random.default_rng([seed, 1])
    cases = []
    for prompt in make_prompts(number, seed=seed, split="eval"):
        wrong = write_prompt(swap_attribute(prompt.things, rng), rng, split="eval").text
        directed = prompt.things[0].motion not in (*UNDIRECTED, "orbit")
        cases.append(Case(prompt.prompt_id, render(sample_scene(prompt, rng, clip=clip), clip), prompt.text, FPS, wrong, directed))
    return cases


def footage_cases(folder: Path, clip: ClipShape, fps: float) -> list[Case]:
    """Real clips at the rate and size the scorer knows, described by nothing but "a video". Raises UserError where the folder holds none."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in FOOTAGE)
    if not files:
        raise UserError(f"no video files, {folder}. Give --footage a folder with {', '.join(FOOTAGE)}")
    cases = []
    for file in files:
        decoded = read_video(file, seconds=(clip.frames + 1) / fps)
        video = resample_fps(from_uint8(decoded.frames), decoded.fps, fps)[: clip.frames]
        cases.append(Case(file.stem, cover(video, clip.height, clip.width), "a video", fps))
    return cases


def table_of(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """dimension -> the share of cases each check passed, with its 95 % interval, over all checks, and which cases failed."""
    found: dict[str, dict[str, Any]] = {}
    for dim in dict.fromkeys(one.dimension for one in outcomes):
        mine = [one for one in outcomes if one.dimension == dim]
        rows = [_row(check.name, check.expect, [one for one in mine if one.check == check.name]) for check in CHECKS]
        found[dim] = {"checks": [row for row in rows if row["cases"]], "all": _row("all", "", mine)}
    return found


def _row(name: str, expect: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    passed = sum(one.passed for one in outcomes)
    return {
        "check": name,
        "expect": expect,
        "cases": len(outcomes),
        "passed": clopper_pearson(passed, len(outcomes))._asdict(),
        "failed": [f"{one.check}: {one.case_id}" if not expect else one.case_id for one in outcomes if not one.passed],
    }


def within_prompt_std(scores: Mapping[str, Mapping[str, float]], prompt_of: Mapping[str, str]) -> dict[str, float]:
    """dimension -> standard deviation of known scores among clips of one prompt, pooled over prompts with two or more; nan where there is none.

    scores: dimension -> clip_id -> score; prompt_of: clip_id -> prompt_id.
    """
    found = {}
    for dim, score in scores.items():
        by_prompt: dict[str, list[float]] = {}
        for clip_id, value in score.items():
            if np.isfinite(value):
                by_prompt.setdefault(prompt_of[clip_id], []).append(value)
        groups = [np.array(values) for values in by_prompt.values() if len(values) > 1]
        freedom = sum(len(group) - 1 for group in groups)
        found[dim] = float(np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom)) if freedom else float("nan")
    return found
