"""Which clip is better: pairs out of stored rankings, or of clips just made and scored. What the safety filters say comes first. Used by `dpo.py`.

A clip the filters do not allow is below every clip of its group that they allow, whatever people or a reward say, and so never wins; two such clips make no pair. A clip
they could not judge is in no pair. Where nothing is allowed, nothing is learned.

Letters: B clips, N groups of G clips (the clips of a prompt, or of a ranking); C, E, K clips, rankings and clips of a ranking that are stored.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align.constraints import Multipliers
from align.objectives.preference import Pairs, preference_pairs
from base_model.errors import UserError
from base_model.types import ClipShape, Conditioning, TrainableModel
from base_model.video.store import ClipStore
from recipes.feedback import Assessment, Assessor, costs_of
from recipes.generate import latent_shape
from recipes.models import encode_prompts
from recipes.reward_model import Answers, Rankings, events_hash, load_answers, load_rankings
from reward.safety.contract import SafetyRunner, Verdict, allowed, check_error_rate

Which = Literal["extremes", "all"]


class Takes(NamedTuple):
    """Clips of one size, and which of them beat which."""

    latents: Tensor  # [B,C,F,H,W] finished, on the CPU
    cond: Conditioning  # B
    pairs: Pairs  # rows of the clips


def lawful_pairs(score: Tensor, permitted: Tensor, judged: Tensor, group_size: int, which: Which, *, margin: float = 0.0) -> Pairs:
    """Pairs of groups side by side whose scores [B] differ by more than margin; permitted, judged: which clips the filters allow, and could judge at all, bool [B].

    Example: scores 3, 1, 2 of one group, the first not permitted: 2 wins over 3.
    """
    table = score.where(judged, torch.nan).reshape(-1, group_size)  # [N,G]
    below = (table.nan_to_num(torch.inf).amin(1, keepdim=True) - 1 - margin).expand_as(table)  # [N,G]
    table = torch.where(permitted.reshape_as(table) | table.isnan(), table, below)
    return preference_pairs(table.flatten(), group_size, which=which, margin=margin)


def fresh_pairs(seen: Assessment, multipliers: Multipliers | None, group_size: int, which: Which, *, margin: float) -> Pairs:
    """Of clips that were just scored, the clips of a prompt side by side; a clip is worth its reward less its graded costs, each at its multiplier's price.

    multipliers: None where no limit is kept; then only clips the filters could not judge are left out.
    """
    judged = ~seen.unknown  # [B]
    if multipliers is None:
        return lawful_pairs(seen.reward, judged, judged, group_size, which, margin=margin)
    worth = seen.reward - sum(multipliers[policy].value * cost for policy, cost in costs_of(seen).items())  # [B]
    return lawful_pairs(worth, seen.allowed, judged, group_size, which, margin=margin)


class Ranked(NamedTuple):
    """Pairs that people made, of two splits, by size of the clips."""

    train: list[Takes]
    val: list[Takes]
    sha256: str = ""  # of the answers


def stored_pairs(
    comparisons: Path, clips: Path, model: TrainableModel, runner: SafetyRunner, *, dimension: str, which: Which, commercial: bool, constrained: bool
) -> Ranked:
    """Of the rankings in a folder, their clips in a clip store.

    Raises UserError where there is no pair to learn from, the dimension is unknown, `commercial` is asked for and a licence forbids it or is unknown, or a clip is missing or
    fits no latent grid; GuardStop where the filters fail on more than 5 % of the prompts or clips.
    """
    answers, store = load_answers(comparisons, commercial=commercial), ClipStore(clips)
    if dimension not in answers.dims:
        nearest = difflib.get_close_matches(dimension, answers.dims, n=1, cutoff=0.0)[0]
        raise UserError(f"no answers in the dimension {dimension!r}, {comparisons}. Did you mean {nearest}? There are: {', '.join(answers.dims)}")
    events = {split: [event for event in answers.splits[split] if event.dimension == dimension] for split in ("train", "val")}
    found = {}
    for split, told in events.items():
        parts = load_rankings(told, answers.data, store, (dimension,), answers.most_clips)
        ruled = [rulings_of(runner, answers, part) for part in parts]
        found[split] = [takes_of(model, part, permitted if constrained else judged, judged, which) for part, (permitted, judged) in zip(parts, ruled, strict=True)]
    if not count(found["train"]):
        why = f"in its {len(events['train'])} answers clips tie, or the safety filters allow none"
        raise UserError(f"no usable pairs in the split train, {comparisons}: {why}. Rank more prompts")
    return Ranked(**found, sha256=events_hash([*events["train"], *events["val"]]))


def takes_of(model: TrainableModel, part: Rankings, permitted: Tensor, judged: Tensor, which: Which) -> Takes:
    """The C clips of one size as latents, and their pairs: a rank is a score. permitted, judged: bool [C]."""
    ranks, rows = part.ranks.flatten(), part.index.flatten()  # [E K] each
    score = -ranks.float().where(ranks > 0, torch.nan)  # [E K]
    pairs = lawful_pairs(score, permitted[rows], judged[rows], part.ranks.shape[1], which)
    return Takes(encode(model, part), encode_prompts(model, part.prompts), Pairs(rows[pairs.win], rows[pairs.lose], pairs.weight))


def rulings_of(runner: SafetyRunner, answers: Answers, part: Rankings, *, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Which of C clips the filters allow, prompt and pixels, and which they could judge at all, bool [C] each; asked now, whatever they said when a clip was stored."""
    asked = runner.check_prompts(part.prompts)
    shown = list(asked)
    rates = torch.tensor([answers.data.clips[clip_id].fps for clip_id in part.clip_ids])  # [C]
    for fps in rates.unique().tolist():
        for rows in (rates == fps).nonzero()[:, 0].split(batch):
            for i, decision in zip(rows.tolist(), runner.check_videos(part.pixels(rows), [part.prompts[i] for i in rows.tolist()], fps), strict=True):
                shown[i] = decision
    for decisions in (asked, shown):
        check_error_rate(decisions, Assessor.max_error_share)
    both = list(zip(asked, shown, strict=True))
    permitted = torch.tensor([allowed(prompt) and allowed(clip) for prompt, clip in both])
    return permitted, torch.tensor([Verdict.ERROR not in (prompt.verdict, clip.verdict) for prompt, clip in both])


def encode(model: TrainableModel, part: Rankings, *, batch: int = 64) -> Tensor:
    """The latents of C stored clips, [C,C',F,H,W]. Raises UserError where they fit no latent grid."""
    _, frames, _, height, width = part.video.shape
    try:
        latent_shape(model, ClipShape(frames, height, width))
    except UserError as error:
        raise UserError(f"the clip {part.clip_ids[0]} cannot be one of this model: {error.__cause__}. Rank clips of another size, or give another model") from error
    return torch.cat([model.encode(part.pixels(rows).to(model.device)).cpu() for rows in torch.arange(len(part.video)).split(batch)])


def count(takes: Sequence[Takes]) -> int:
    """Pairs of all sizes together."""
    return sum(len(each.pairs.win) for each in takes)


def numbered(takes: Sequence[Takes], numbers: Sequence[int], batch: int) -> list[tuple[Takes, Tensor]]:
    """The pairs of these numbers, counted through all sizes, in batches of one size: (clips, rows of their pairs)."""
    wanted, first, found = torch.tensor(numbers, dtype=torch.long), 0, []
    for each in takes:
        last = first + len(each.pairs.win)
        rows = wanted[(wanted >= first) & (wanted < last)] - first
        found += [(each, some) for some in rows.split(batch) if len(some)]
        first = last
    return found
