"""Whether people can be trusted, and filters: agreement, each person's habits, and how good a filter is by what reviewers found.

The coefficients are those of `reward/agreement.py`, the rates those of `reward/safety/measure.py` on the audit that reviewers read. A number comes with how much it stands on
and a 95 % interval; what stands on too little is "not measurable yet".
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel
from sqlalchemy import select

from reward.app import auditing, labeling
from reward.app.labeling import answer_of
from reward.app.reports import gently
from reward.app.schema import clip, item
from reward.app.store import Store
from reward.safety.policy import load_policy

if TYPE_CHECKING:
    from reward.comparisons import RankingEvent
    from reward.safety.audit import Audit
    from reward.safety.measure import Estimate

LEAST_PAIRS = 20  # judged by two people, before agreement is told
LEAST_CHECKS = 6  # of a person, before a share is told
MOST_ANSWERS = 20_000  # that agreement is worked out of: the newest
ANY = "any"
BENIGN = "benign"


class Measured(BaseModel):
    """A number with its 95 % interval; None where it is not measurable yet, for the reason in `note`."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int
    note: str = ""


def measured(value: Iterable[float], n: int, note: str = "") -> Measured:
    told = [None if math.isnan(each) else float(each) for each in value]
    return Measured(value=told[0], low=told[1] if told[0] is not None else None, high=told[2] if told[0] is not None else None, n=n, note=note)


def too_few(n: int, least: int, what: str) -> Measured:
    return Measured(n=n, note=f"{n} {what}, {least} are needed")


def share(hits: float, trials: int, *, least: int = LEAST_CHECKS, what: str = "checks") -> Measured:
    """A share with Wilson's interval (1927, the score interval)."""
    if trials < least:
        return too_few(trials, least, what)
    z, p = 1.959964, hits / trials
    middle, half = p + z * z / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    whole = 1 + z * z / trials
    return Measured(value=p, low=max(0.0, (middle - half) / whole) if hits else 0.0, high=min(1.0, (middle + half) / whole) if hits < trials else 1.0, n=trials)


def share_of(hits: float, trials: int, tasks: int, *, what: str, least: int = LEAST_CHECKS) -> Measured:
    """A share of trials that come in tasks. Those of one task say much the same, so the interval is that of as many trials as there are tasks."""
    return share(hits / trials * tasks if trials else 0.0, tasks, least=least, what=what)


# What people answered


def events_of(store: Store, project_id: str) -> Iterator[RankingEvent]:
    """The answers that stand, oldest first."""
    return labeling.events_of(store, project_id)


class Dimension(BaseModel):
    """How far people agree in one dimension, over pairs of clips that two or more of them ranked."""

    dimension: str
    answers: int
    people: int
    pairs: int
    ties: float | None
    alpha: Measured
    kappa: Measured
    ac1: Measured
    raw: Measured


class Person(BaseModel):
    """What a person's answers say of the person."""

    pseudonym: str
    answers: int
    gold: Measured
    """Share of gold tasks answered as is known to be right."""
    repeats: Measured
    """Share of pairs ordered as the first time, when a task came again."""
    first_place: Measured
    """Share of rankings in which the clip shown first was ranked best; chance is `chance`."""
    chance: float | None
    median_seconds: float | None
    watched: float | None
    """Median share of a clip that was watched, at most 1."""
    agrees: Measured
    """How often another person's decided answer was given, too; a tie earns one half."""


class People(BaseModel):
    answers: int
    """That all this stands on: the newest ones."""
    of: int
    dimensions: list[Dimension]
    people: list[Person]


def people_of(store: Store, project_id: str) -> People:
    """Agreement and habits. Skipped tasks and answers that were taken back do not count; gold and practice do not count for agreement."""
    of = 0
    recent: deque[list[RankingEvent]] = deque(maxlen=MOST_ANSWERS)
    for _, rows in groupby(gently(events_of(store, project_id)), answer_of):
        recent.append(list(rows))
        of += 1
    events = [event for rows in recent for event in rows]
    return People(answers=len(recent), of=of, dimensions=agreement_of(events), people=persons_of(events, lengths_of(store, project_id, events)))


def lengths_of(store: Store, project_id: str, events: Iterable[RankingEvent]) -> dict[str, float]:
    """Milliseconds that clips last, as far as it is known."""
    wanted = sorted({clip_id for event in events if event.watch_ms for clip_id in event.clip_ids})
    found: dict[str, float] = {}
    with store.reading() as db:
        for start in range(0, len(wanted), 500):
            chosen = select(clip.c.clip_id, clip.c.row).where(clip.c.project_id == project_id, clip.c.clip_id.in_(wanted[start : start + 500]))
            for clip_id, row in db.execute(chosen):
                frames, fps = row.get("num_frames"), row.get("fps")
                if isinstance(frames, int | float) and isinstance(fps, int | float) and frames > 0 and fps > 0:
                    found[clip_id] = 1000 * frames / fps
    return found


def agreement_of(events: Iterable[RankingEvent]) -> list[Dimension]:
    from reward.agreement import agreement_of_pairs, alpha_of_pairs, pairs_of, tie_share

    events, found = list(events), []
    for name in sorted({event.dimension for event in events}):
        mine = [event for event in events if event.dimension == name and _is_ranking(event) and not event.is_gold and not event.is_repeat]
        pairs = pairs_of(mine)
        several = [pair for pair in pairs if len(pair.votes) > 1]
        clusters = {pair.prompt_id: pair.prompt_id for pair in several}
        if len(several) < LEAST_PAIRS:
            told = dict.fromkeys(("raw", "kappa", "ac1", "alpha"), too_few(len(several), LEAST_PAIRS, "pairs judged by two people"))
        else:
            values = {**agreement_of_pairs(several, clusters), "alpha": alpha_of_pairs(several, clusters)}
            told = {key: measured(value, len(several), "" if not math.isnan(value[0]) else "everybody gave one and the same answer") for key, value in values.items()}
        ties = tie_share(pairs)
        people = len({event.annotator_id for event in mine})
        found.append(Dimension(dimension=name, answers=len(mine), people=people, pairs=len(several), ties=None if math.isnan(ties) else ties, **told))
    return found


def _is_ranking(event: RankingEvent) -> bool:
    return event.skipped_reason is None and sum(rank is not None for rank in event.ranks) > 1


def persons_of(events: Iterable[RankingEvent], lengths: Mapping[str, float]) -> list[Person]:
    """Everybody who answered, in the order of their pseudonyms."""
    mine: dict[str, list[RankingEvent]] = defaultdict(list)
    for event in events:
        mine[event.annotator_id].append(event)
    with_others = _agreement_with_others(events)
    return [_person(name, mine[name], lengths, with_others.get(name, (0.0, 0, 0))) for name in sorted(mine)]


def _person(name: str, events: Sequence[RankingEvent], lengths: Mapping[str, float], others: tuple[float, int, int]) -> Person:
    once = list({answer_of(event): event for event in events}.values())  # whatever the number of questions
    gold = [event.gold_ok for event in once if event.is_gold and event.gold_ok is not None]
    first, chance, ranked = _first_places(events)
    times = [event.lead_time_ms / 1000 for event in once if event.lead_time_ms is not None and event.skipped_reason is None]
    watched = [min(1.0, ms / lengths[clip_id]) for event in once if event.watch_ms for clip_id, ms in zip(event.clip_ids, event.watch_ms, strict=True) if clip_id in lengths]
    return Person(
        pseudonym=name,
        answers=len(once),
        gold=share(sum(gold), len(gold), what="gold tasks"),
        repeats=share_of(*_kept(events), what="repeated tasks"),
        first_place=share_of(sum(first), len(first), ranked, least=20, what="rankings with one best clip"),
        chance=sum(chance) / len(chance) if chance else None,
        median_seconds=median(times) if times else None,
        watched=median(watched) if watched else None,
        agrees=share_of(*others, what="prompts that another person judged, too"),
    )


def _kept(events: Sequence[RankingEvent]) -> tuple[int, int, int]:
    """(pairs ordered as the first time, pairs asked again, tasks that they are of)."""
    first: dict[tuple[str, str, str, str], int] = {}
    kept = asked = 0
    tasks: set[str] = set()
    for event in sorted(events, key=lambda event: (event.is_repeat, event.created_at, event.event_id)):
        for key, said in _orders(event):
            if not event.is_repeat:
                first.setdefault(key, said)
            elif key in first:
                kept, asked = kept + (first[key] == said), asked + 1
                tasks.add(event.task_id)
    return kept, asked, len(tasks)


def _orders(event: RankingEvent) -> list[tuple[tuple[str, str, str, str], int]]:
    ranked = sorted((clip_id, rank) for clip_id, rank in zip(event.clip_ids, event.ranks, strict=True) if rank is not None)
    return [((event.prompt_id, event.dimension, a, b), (y > x) - (y < x)) for i, (a, x) in enumerate(ranked) for b, y in ranked[i + 1 :]]


def _first_places(events: Sequence[RankingEvent]) -> tuple[list[bool], list[float], int]:
    """Of every ranking with one best clip, whether it was shown first, and how likely that is by chance; and how many answers they are of, whatever the number of questions."""
    hits, chance, answers = [], [], set()
    for event in events:
        ranks = [rank for rank in event.ranks if rank is not None]
        if event.is_gold or not event.shown_order or len(ranks) < 2 or ranks.count(min(ranks)) != 1:
            continue
        hits.append(event.shown_order[event.ranks.index(min(ranks))] == 0)
        chance.append(1 / len(event.shown_order))
        answers.add(answer_of(event))
    return hits, chance, len(answers)


def _agreement_with_others(events: Iterable[RankingEvent]) -> dict[str, tuple[float, int, int]]:
    """Pseudonym -> (answers given by another, too, a tie for one half; answers of others; prompts that they are of)."""
    from reward.agreement import pairs_of

    found: dict[str, tuple[float, int]] = {}
    prompts: dict[str, set[str]] = defaultdict(set)
    for pair in pairs_of(event for event in events if _is_ranking(event) and not event.is_gold and not event.is_repeat):
        counts = Counter(pair.votes.values())
        for name, said in pair.votes.items():
            for other, number in counts.items():
                number -= other == said
                if other and number:
                    hits, trials = found.get(name, (0.0, 0))
                    found[name] = hits + number * (1.0 if said == other else 0.0 if said else 0.5), trials + number
                    prompts[name].add(pair.prompt_id)
    return {name: (hits, trials, len(prompts[name])) for name, (hits, trials) in found.items()}


# What reviewers found


def audit_of(store: Store, project_id: str) -> Audit | None:
    """What reviewers read of the audits that were drawn; None before the first."""
    from reward.safety.audit import load_audit

    with store.reading() as db:
        if db.execute(select(item.c.id).where(item.c.project_id == project_id, item.c.wave.is_not(None)).limit(1)).first() is None:
            return None
    with tempfile.TemporaryDirectory(prefix="rushes-audit-") as folder:
        auditing.audit_folder(store, project_id, Path(folder))
        return load_audit(Path(folder))


class FilterRow(BaseModel):
    """One version of the filters under one policy, or any."""

    filter: str
    policy: str
    policy_name: str
    blocked: int
    blocked_reviewed: int
    passed: int
    passed_reviewed: int
    rates: dict[str, Measured]


class Drift(BaseModel):
    """A version of the filters beside the one before."""

    before: str
    after: str
    distance: float
    """Of the scores (Kolmogorov and Smirnov)."""
    chance: float
    """How likely such a distance is where nothing changed."""
    clips_before: int
    clips_after: int


class Filters(BaseModel):
    clips: int
    drawn: int
    read: int
    unconfirmed: int
    """Misses that one person alone reported: have them read again before recall is believed."""
    rows: list[FilterRow]
    drift: list[Drift]
    agreement: dict[str, Measured]
    """Of readers, about clips read twice."""


NOTHING = Filters(clips=0, drawn=0, read=0, unconfirmed=0, rows=[], drift=[], agreement={})
UNKNOWN_KINDS = Measured(n=0, note="of no prompt is it known that it is benign")
RATES = ("precision", "recall", "severity-weighted recall", "leak rate", "over-block rate")


def filters_of(audit: Audit | None) -> Filters:
    """How good every version of the filters is, under any policy and under each that was blocked for or named."""
    if audit is None:
        return NOTHING
    from reward.safety.audit import by_clip, unconfirmed

    said, drawn = by_clip(audit.readings), {entry.clip_id for entry in audit.drawn}
    rows = [_filter_row(audit, version, code) for version in audit.versions for code in _codes(audit, version)]
    return Filters(
        clips=len(audit.entries),
        drawn=len(drawn),
        read=len(drawn & said.keys()),
        unconfirmed=sum(len(unconfirmed(audit, version)) for version in audit.versions),
        rows=rows,
        drift=_drift(audit),
        agreement=_readers_agree(audit),
    )


def _codes(audit: Audit, version: str) -> list[str]:
    """Any policy, and each that was blocked for or named. What only the child-safety role may know of is told to nobody else, not even as a number."""
    mine = [entry for entry in audit.entries if entry.filter_version == version]
    drawn = {entry.clip_id for entry in mine if entry.why}
    blocked, named = {code for entry in mine for code in entry.policies}, {code for reading in audit.readings if reading.clip_id in drawn for code in reading.policies}
    return [ANY, *sorted(code for code in blocked | named if not (code in load_policy() and load_policy().rule(code).escalate))]


def _filter_row(audit: Audit, version: str, code: str) -> FilterRow:
    from reward.safety.audit import blocked_for, review_of, severity
    from reward.safety.measure import leak_rate, over_block_rate, precision, recall

    policy, review = load_policy(), review_of(audit, version, code)
    size = {
        (pool, name): sum(getattr(group, name) for group in groups) for pool, groups in (("blocked", review.blocked), ("passed", review.passed)) for name in ("size", "reviewed")
    }
    both = size["blocked", "reviewed"] + size["passed", "reviewed"]
    own = blocked_for(audit, version, code)
    rates = {
        "precision": _told(precision(own), sum(group.reviewed for group in own)),
        "recall": _told(recall(review), both),
        "leak rate": _told(leak_rate(review.passed), size["passed", "reviewed"]),
    }
    if code == ANY:
        graded = review_of(audit, version, classes=lambda readings: severity(readings, policy), num_classes=5)
        benign = review_of(audit, version, kind=BENIGN)
        rates["severity-weighted recall"] = _told(recall(graded, weights=range(5)), both)
        known = any(group.size for group in (*benign.blocked, *benign.passed))
        rates["over-block rate"] = _told(over_block_rate(benign), sum(group.reviewed for group in (*benign.blocked, *benign.passed))) if known else UNKNOWN_KINDS
    return FilterRow(
        filter=version,
        policy=code,
        policy_name=policy.rule(code).name if code in policy else "whichever",
        blocked=size["blocked", "size"],
        blocked_reviewed=size["blocked", "reviewed"],
        passed=size["passed", "size"],
        passed_reviewed=size["passed", "reviewed"],
        rates={name: rates[name] for name in RATES if name in rates},
    )


def _told(estimate: Estimate, n: int) -> Measured:
    return measured(estimate[:3], n, estimate.note)


def _drift(audit: Audit) -> list[Drift]:
    from scipy.stats import ks_2samp

    scores = {version: [entry.score for entry in audit.entries if entry.filter_version == version] for version in audit.versions}
    found = []
    for before, after in pairwise(audit.versions):
        moved = ks_2samp(scores[before], scores[after])
        counts = {"clips_before": len(scores[before]), "clips_after": len(scores[after])}
        found.append(Drift(before=before, after=after, distance=float(moved.statistic), chance=float(moved.pvalue), **counts))
    return found


def _readers_agree(audit: Audit) -> dict[str, Measured]:
    from reward.agreement import bootstrap_units, fleiss_kappa, gwet_ac1, krippendorff_alpha, raw_agreement
    from reward.safety.audit import by_clip

    units = [[float(r.said == "violating") for r in readings if r.said != "cannot_tell" and not r.final] for readings in by_clip(audit.readings).values()]
    several = [unit for unit in units if len(unit) > 1]
    found = {}
    for name, statistic in (("alpha", krippendorff_alpha), ("kappa", fleiss_kappa), ("ac1", gwet_ac1), ("raw", raw_agreement)):
        if len(several) < LEAST_PAIRS:
            found[name] = too_few(len(several), LEAST_PAIRS, "clips read by two people")
        else:
            value = bootstrap_units(statistic, several, draws=200)
            found[name] = measured(value, len(several), "" if not math.isnan(value[0]) else "readers gave one and the same answer")
    return found


# What filters said of every clip


class Scores(NamedTuple):
    """What one filter said under one policy, of every clip that it could judge."""

    threshold: float
    """The one that was used last."""
    by_clip: dict[str, float]  # clip_id -> score


def scores_of(store: Store, project_id: str) -> dict[tuple[str, str], Scores]:
    """(filter with its version, policy) -> scores. Clips that are restricted to child safety or deleted, and worse copies, are left out."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    thresholds: dict[tuple[str, str], float] = {}
    there = (clip.c.project_id == project_id, clip.c.state.in_(("live", "withdrawn")), clip.c.made_of.is_(None))
    kept = select(clip.c.clip_id, clip.c.decision).where(*there).order_by(clip.c.created_at, clip.c.id)
    with store.reading() as db:
        for clip_id, decision in gently(db.execution_options(yield_per=200).execute(kept)):
            for each in decision.get("rulings", []):
                if each["score"] is not None and each["verdict"] != "error":
                    key = (each["filter"], each["policy"])
                    found[key][clip_id] = max(each["score"], found[key].get(clip_id, 0.0))
                    thresholds[key] = each["threshold"]
    return {key: Scores(thresholds[key], scores) for key, scores in sorted(found.items())}


class Histogram(BaseModel):
    """How many clips have which score, in equal steps from 0 to 1."""

    filter: str
    policy: str
    threshold: float
    clips: int
    counts: list[int]


def histograms(scores: Mapping[tuple[str, str], Scores], steps: int = 25) -> list[Histogram]:
    found = []
    for (name, code), some in scores.items():
        counts = Counter(min(steps - 1, int(score * steps)) for score in some.by_clip.values())
        found.append(Histogram(filter=name, policy=code, threshold=some.threshold, clips=len(some.by_clip), counts=[counts[step] for step in range(steps)]))
    return found
