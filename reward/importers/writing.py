"""What the writers of all formats share: answers as pairs, and a count of what a format has no room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from reward.comparisons import RankingEvent


class Exported(NamedTuple):
    """What was written."""

    rows: int
    left_out: Mapping[str, int]  # why -> how many answers


def pairs(event: RankingEvent, left_out: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """(first clip, second clip, choice) of an answer: a pair itself, every pair of a ranking, the best clip and each other. Ratings and tags have none."""
    if event.skipped_reason:
        left_out["skipped by the person"] += 1
    elif event.kind == "pair" and event.choice is not None:
        yield event.clip_ids[0], event.clip_ids[1], event.choice
    elif event.kind == "best":
        best = event.clip_ids[event.ranks.index(1)]
        yield from ((best, other, "A") for other in event.clip_ids if other != best)
    elif event.kind in ("pair", "rank") and sum(rank is not None for rank in event.ranks) > 1:
        ranked = [(clip_id, rank) for clip_id, rank in zip(event.clip_ids, event.ranks, strict=True) if rank is not None]
        for (first, rank), (second, other) in combinations(ranked, 2):
            yield first, second, "A" if rank < other else "B" if other < rank else "tie"
    else:
        left_out[f"kind {event.kind}, no ranking"] += 1
