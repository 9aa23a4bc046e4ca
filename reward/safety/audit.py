"""Which clips people look at to find out how good a filter is, drawn at random, and what they said.

    folder/audit-00000.jsonl    one record a line; more files are added, none is ever rewritten

    {"record": "clip", ...}       a clip that could have been drawn, and with which probability it was
    {"record": "reading", ...}    what one person said of one clip
    {"record": "gold", ...}       a clip whose truth is known, put among the others to learn how often readers err

Every file appears whole or not at all, so a writer killed at any moment leaves a folder that loads and can be added to. Adding what is already there, word for word, adds
nothing; other content under a known id is refused. So an inclusion probability is written once, with its clip, and never changes: clips that come later are a wave of their
own, drawn among themselves.

Of what was blocked every clip is as likely as the others that were blocked for the same policies, on prompts of the same kind. Of what passed, some are drawn at random from
all, since scores may be wrong about which clips are doubtful; then the rest of the budget goes to strata of score, in proportion to N_h sqrt(p_h (1 - p_h)) (Neyman 1934) with a
floor, p_h being the mean calibrated score. Given how many of a stratum the random part took, the clips drawn of it are a simple random sample: pi = n_h / N_h.

Who is drawn depends on the seed and the clip's id alone, not on the order of the clips. Clips under review or in error are not drawn: people see all of them anyway.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from reward.comparisons import alone_in
from reward.safety.measure import Cell, ErrorRates, Group, Review, group_of, too_little
from reward.safety.policy import Policy, load_policy

BENIGN = "benign"  # the kind of prompts that over-blocking is told of
ANY = "any"  # in place of a policy code: whichever
Pool = Literal["blocked", "passed"]
Why = Literal["", "blocked", "random", "stratified"]
Said = Literal["violating", "not_violating", "borderline", "cannot_tell"]
Text = Annotated[str, Field(min_length=1)]
K = TypeVar("K")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Candidate(_Record):
    """A clip that the filter decided about by itself."""

    clip_id: Text
    pool: Pool
    score: Annotated[float, Field(ge=0, le=1)]
    """Calibrated probability that it violates, the largest of its policies."""
    filter_version: Text
    """Which filters ruled, with versions: "flash 1"."""
    policy_version: str = ""
    policies: tuple[str, ...] = ()
    """Codes it was blocked for."""
    kind: str = ""
    """Kind of its prompt; `benign` where nothing in it asks for what the policies forbid."""

    @model_validator(mode="after")
    def _blocked_for_something(self) -> Candidate:
        if (self.pool == "blocked") != bool(self.policies) or len(set(self.policies)) < len(self.policies):
            raise ValueError("a blocked clip names the policies it was blocked for, once each, and a passed one none")
        return self


def candidate_of(clip_id: str, decision: Mapping[str, Any], *, kind: str = "") -> Candidate | None:
    """A clip by what is stored of its decision (`contract.to_json`). None where the filters did not decide: people see what is under review or in error anyway.
    None, too, for a block that no ruling gives a policy for: nothing could be said of a filter by it."""
    rulings = decision.get("rulings", [])
    policies = tuple(sorted({each["policy"] for each in rulings if each["verdict"] == "block"}))
    blocked = decision.get("verdict") == "block"
    if decision.get("verdict") not in ("allow", "block") or not rulings or blocked != bool(policies):
        return None
    return Candidate(
        clip_id=clip_id,
        pool="blocked" if blocked else "passed",
        score=max((each["score"] for each in rulings if each["score"] is not None), default=float(blocked)),
        filter_version=", ".join(sorted({each["filter"] for each in rulings})),
        policy_version=rulings[0]["policy_version"],
        policies=policies,
        kind=kind,
    )


class Entry(Candidate):
    """A candidate with what chance decided. Immutable."""

    record: Literal["clip"] = "clip"
    wave: Annotated[int, Field(ge=0)]
    band: Annotated[int, Field(ge=0)]
    """Stratum of score, counted from the lowest."""
    probability: Annotated[float, Field(gt=0, le=1)]
    """With which it was drawn, pi."""
    why: Why
    """What drew it; empty where nothing did."""

    @property
    def stratum(self) -> tuple[str, int, str, int, str, tuple[str, ...]]:
        """Clips that were drawn with one probability."""
        return self.filter_version, self.wave, self.pool, self.band, self.kind, self.policies


class Reading(_Record):
    """What one person said of one clip."""

    record: Literal["reading"] = "reading"
    clip_id: Text
    reader: Text
    """A pseudonym."""
    said: Said
    policies: tuple[str, ...] = ()
    """Codes it violates."""
    final: bool = False
    """Whether this decides between earlier readings."""
    policy_version: str = ""

    @model_validator(mode="after")
    def _codes_fit(self) -> Reading:
        if (self.said == "violating") != bool(self.policies):
            raise ValueError("a violating clip names the policies it violates, any other none")
        return self


class Gold(_Record):
    """A clip whose truth is known."""

    record: Literal["gold"] = "gold"
    clip_id: Text
    policies: tuple[str, ...] = ()
    """Codes it violates; none where it is harmless."""


AuditRecord = Annotated[Entry | Reading | Gold, Field(discriminator="record")]
_ADAPTER: TypeAdapter[Entry | Reading | Gold] = TypeAdapter(AuditRecord)


@dataclass(frozen=True)
class Plan:
    """How many clips of a wave are reviewed, and how they are cut into strata."""

    blocked: int
    passed: int
    bands: tuple[float, ...] = (0.05, 0.3)  # of the score: below the first, between, from the last on
    random_share: float = 0.15  # of the passed
    floor: int = 10  # reviews of each stratum, as far as it has clips

    def __post_init__(self) -> None:
        if min(self.blocked, self.passed, self.floor - 1) < 0 or not 0 <= self.random_share <= 1 or list(self.bands) != sorted(set(self.bands)):
            raise ValueError("a plan takes budgets of at least 0, a floor of at least 1, a random share in [0, 1] and rising bands")


@dataclass(frozen=True)
class Audit:
    """A loaded and checked folder."""

    entries: tuple[Entry, ...]
    readings: tuple[Reading, ...]
    gold: tuple[Gold, ...]

    @property
    def drawn(self) -> tuple[Entry, ...]:
        """What people are asked to look at."""
        return tuple(entry for entry in self.entries if entry.why)

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions of the filter, oldest first."""
        return tuple(dict.fromkeys(entry.filter_version for entry in self.entries))


# Drawing


def draw(candidates: Sequence[Candidate], plan: Plan, *, seed: int, wave: int = 0) -> list[Entry]:
    """One wave: every candidate with its probability, and whether it was drawn. A stratum never goes without, so a small budget may be exceeded."""
    bands = {each: sum(each.score >= edge for edge in plan.bands) for each in candidates}
    blocked, passed = ([each for each in candidates if each.pool == pool] for pool in ("blocked", "passed"))
    entries: list[Entry] = []
    for pool, clips, budget in (("blocked", blocked, plan.blocked), ("passed", passed, plan.passed)):
        strata = _grouped(clips, lambda each: (each.filter_version, bands[each] if each.pool == "passed" else 0, each.kind, each.policies))
        at_random = set(_first(clips, round(plan.random_share * budget), seed, "random")) if pool == "passed" else set()
        guess = {key: len(some) * (1.0 if pool == "blocked" else sqrt(_spread([each.score for each in some]))) for key, some in strata.items()}
        allotted = allocate({key: len(some) for key, some in strata.items()}, guess, budget - len(at_random), plan.floor)
        for key in sorted(strata):
            some = strata[key]
            left = [each for each in some if each not in at_random]
            chosen = set(_first(left, allotted[key] if budget else 0, seed, "stratum"))
            taken = len(some) - len(left) + len(chosen)
            if not taken:
                raise ValueError(f"no budget for {len(some)} {pool} clips: without a chance for each clip nothing can be told of them")
            for each in some:
                why: Why = "random" if each in at_random else "" if each not in chosen else "blocked" if pool == "blocked" else "stratified"
                entries.append(Entry(**each.model_dump(), wave=wave, band=key[1], probability=taken / len(some), why=why))
    return entries


def allocate(sizes: Mapping[K, int], weights: Mapping[K, float], budget: int, least: int) -> dict[K, int]:
    """Whole numbers that add up to the budget, in proportion to the weights, at least `least` and at most the size of each; more than the budget where the floors need it."""
    given = {key: float(min(least, size)) for key, size in sizes.items()}
    free = {key for key, size in sizes.items() if given[key] < size}
    rest = budget - sum(given.values())
    target = dict(given)
    while rest > 1e-9 and free:
        whole = sum(weights[key] for key in free)
        share = {key: (weights[key] / whole if whole > 0 else 1 / len(free)) * (budget - sum(target[key] for key in sizes if key not in free)) for key in free}
        settled = {key for key in free if not given[key] < share[key] < sizes[key]}
        if not settled:
            target |= share
            break
        over = {key for key in settled if share[key] >= sizes[key]}
        target |= {key: float(sizes[key]) for key in over} or {key: given[key] for key in settled}
        free -= over or settled
        rest = budget - sum(target[key] for key in sizes if key not in free)
    return _rounded(target, sizes, budget)


def _rounded(target: Mapping[K, float], sizes: Mapping[K, int], budget: int) -> dict[K, int]:
    """Whole numbers near the target, by largest remainder."""
    whole = {key: floor(value + 1e-9) for key, value in target.items()}
    left = min(budget, sum(sizes.values())) - sum(whole.values())
    for key in sorted(target, key=lambda key: (whole[key] - target[key], str(key))):
        if left > 0 and whole[key] < sizes[key]:
            whole[key], left = whole[key] + 1, left - 1
    return whole


def _spread(scores: Sequence[float]) -> float:
    mean = sum(scores) / len(scores)
    return max(mean * (1 - mean), 1e-4)


def _grouped(clips: Iterable[Candidate], key: Callable[[Candidate], K]) -> dict[K, list[Candidate]]:
    found: dict[K, list[Candidate]] = defaultdict(list)
    for each in clips:
        found[key(each)].append(each)
    return dict(found)


def _first(clips: Sequence[Candidate], count: int, seed: int, salt: str) -> list[Candidate]:
    """`count` clips at random: the first ones in the order of a hash of their ids."""

    def place(each: Candidate) -> bytes:
        return hashlib.sha256(json.dumps([seed, salt, each.filter_version, each.clip_id]).encode()).digest()

    return sorted(clips, key=place)[:count]


# On disk


def draw_audit(folder: Path, candidates: Iterable[Candidate], plan: Plan, *, seed: int, policy: Policy | None = None) -> Audit:
    """Draws among the candidates that are not in `folder` yet, which is made when missing, and adds them as a new wave. Drawing again with the same clips adds nothing.

    Raises UserError where a clip is there with another verdict or score, and ValueError where the budget leaves a pool of clips without a chance.
    """
    with alone_in(folder):
        audit = load_audit(folder, policy) if _parts(folder) else Audit((), (), ())
        known = {(entry.clip_id, entry.filter_version): entry for entry in audit.entries}
        fresh: dict[tuple[str, str], Candidate] = {}
        for each in candidates:
            before = known.get((each.clip_id, each.filter_version)) or fresh.setdefault((each.clip_id, each.filter_version), each)
            if any(getattr(before, name) != getattr(each, name) for name in Candidate.model_fields):
                problem = f"clip {each.clip_id} is already there with other content for {each.filter_version}"
                raise UserError(f"{problem}, {folder}. A verdict or score that changed is another filter version")
        entries = draw(list(fresh.values()), plan, seed=seed, wave=1 + max((entry.wave for entry in audit.entries), default=-1)) if fresh else []
        return _append(folder, audit, entries, policy)


def add_readings(folder: Path, records: Iterable[Reading | Gold], *, policy: Policy | None = None) -> Audit:
    """Adds what people said, and gold. Raises UserError, writing nothing, where the whole would not pass the checks of loading."""
    with alone_in(folder):
        audit = load_audit(folder, policy) if _parts(folder) else Audit((), (), ())
        known = {*audit.readings, *audit.gold}
        return _append(folder, audit, [each for each in dict.fromkeys(records) if each not in known], policy)


def load_audit(folder: Path, policy: Policy | None = None) -> Audit:
    """Reads and checks a folder. Raises UserError, one line with the file and the line, for anything missing, damaged, unknown or contradictory."""
    parts = _parts(folder)
    if not parts:
        raise UserError(f"no audit, {folder}: it holds no audit-*.jsonl. Give a folder that an audit was drawn into")
    return _checked([record for part in parts for record in _read(part)], folder, policy)


def _append(folder: Path, audit: Audit, records: Sequence[Entry | Reading | Gold], policy: Policy | None) -> Audit:
    whole = _checked([*audit.entries, *audit.readings, *audit.gold, *records], folder, policy)
    if records:
        number = 1 + max((int(part.stem.partition("-")[2]) for part in _parts(folder)), default=-1)
        atomic_write(folder / f"audit-{number:05d}.jsonl", "".join(json.dumps(record.model_dump(mode="json"), ensure_ascii=False) + "\n" for record in records).encode())
    return whole


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("audit-*.jsonl") if path.stem.partition("-")[2].isdigit())


def _read(path: Path) -> list[Entry | Reading | Gold]:
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}. Restore the file") from error
    found = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            found.append(_ADAPTER.validate_json(line, strict=False))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            raise UserError(f"{path}:{number}: {where}: {first['msg']}. Mend or remove that line") from error
    return found


def _checked(records: Sequence[Entry | Reading | Gold], folder: Path, policy: Policy | None) -> Audit:
    rules = policy or load_policy()
    entries = tuple(record for record in records if isinstance(record, Entry))
    readings = tuple(record for record in records if isinstance(record, Reading))
    gold = tuple(record for record in records if isinstance(record, Gold))
    for record in records:
        unknown = [code for code in record.policies if code not in rules]
        if unknown:
            raise UserError(f"clip {record.clip_id}: unknown policy {unknown[0]!r}, {folder}. Give the policy file that the codes are of, or mend that line")
    _check_once([(entry.clip_id, entry.filter_version) for entry in entries], "clip", folder)
    _check_once([(reading.clip_id, reading.reader) for reading in readings], "reading of clip", folder)
    _check_once([(each.clip_id,) for each in gold], "gold clip", folder)
    _check_once([(reading.clip_id,) for reading in readings if reading.final], "final reading of clip", folder)
    drawn, known = {entry.clip_id for entry in entries if entry.why}, {each.clip_id for each in gold}
    if drawn & known:
        raise UserError(f"clip {min(drawn & known)} is gold and was drawn, too, {folder}. Gold clips are others than the audited ones")
    for reading in readings:
        if reading.clip_id not in drawn | known:
            raise UserError(f"clip {reading.clip_id} was read by {reading.reader}, but no audit drew it, {folder}. What nobody drew says nothing about rates: remove that line")
    _check_probabilities(entries, folder)
    return Audit(entries, readings, gold)


def _check_once(ids: Sequence[tuple[str, ...]], what: str, folder: Path) -> None:
    seen: set[tuple[str, ...]] = set()
    for each in ids:
        if each in seen:
            raise UserError(f"{what} {', '.join(each)} is there twice, {folder}. Remove one of the lines")
        seen.add(each)


def _check_probabilities(entries: Iterable[Entry], folder: Path) -> None:
    """Every stratum has one probability, the share of it that was drawn: a line that was lost or changed does not go unnoticed."""
    strata: dict[object, list[Entry]] = defaultdict(list)
    for entry in entries:
        strata[entry.stratum].append(entry)
    for some in strata.values():
        share = sum(bool(entry.why) for entry in some) / len(some)
        wrong = [entry for entry in some if abs(entry.probability - share) > 1e-9]
        if wrong:
            problem = f"clip {wrong[0].clip_id}: its probability is {wrong[0].probability:g}, but {share:g} of its stratum was drawn"
            raise UserError(f"{problem}, {folder}. Lines were lost or changed: restore the files")


# What people found


def violates(readings: Sequence[Reading], code: str = ANY) -> bool | None:
    """Whether a clip violates a policy, or any: the final reading, else the majority. None where nobody could tell or readers are even. Borderline is not violating."""
    able = [reading for reading in readings if reading.said != "cannot_tell"]
    deciding = [reading for reading in able if reading.final] or able
    votes = [code in reading.policies or (code == ANY and bool(reading.policies)) for reading in deciding]
    return None if 2 * sum(votes) == len(votes) else 2 * sum(votes) > len(votes)


def by_clip(readings: Iterable[Reading]) -> dict[str, list[Reading]]:
    """The readings of each clip, in their order."""
    found: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        found[reading.clip_id].append(reading)
    return dict(found)


def severity(readings: Sequence[Reading], policy: Policy) -> int:
    """Of the worst policy that the clip violates; 0 where it violates none, or nobody could tell."""
    return max((policy.rule(code).severity for code in {code for reading in readings for code in reading.policies} if violates(readings, code)), default=0)


def review_of(audit: Audit, version: str, code: str = ANY, *, kind: str | None = None, classes: Callable[[Sequence[Reading]], int] | None = None, num_classes: int = 1) -> Review:
    """Both pools under one version of the filter. Violations of `code` count wherever they were blocked for whatever; kind: only clips of such prompts.

    classes: what a violating clip's readings make it, 0 .. num_classes - 1; one class without. Blocked clips form two groups, blocked for the code or not; passed ones
    a group for each band.
    """
    said = by_clip(audit.readings)
    cells: dict[object, list[Entry]] = defaultdict(list)
    for entry in audit.entries:
        if entry.filter_version == version and kind in (None, entry.kind):
            cells[entry.stratum].append(entry)
    groups: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for entries in cells.values():
        first = entries[0]
        counts, reviewed = [0] * num_classes, 0
        for readings in [said.get(entry.clip_id, []) for entry in entries if entry.why]:
            answer = violates(readings, code)
            reviewed += answer is not None
            if answer:
                counts[classes(readings) if classes else 0] += 1
        place = first.band if first.pool == "passed" else int(code not in (ANY, *first.policies))
        groups[first.pool, place].append(Cell(len(entries), reviewed, tuple(counts)))
    blocked, passed = (tuple(group_of(groups[key]) for key in sorted(groups) if key[0] == pool) for pool in ("blocked", "passed"))
    return Review(blocked, passed)


def latest_review(audit: Audit, version: str, code: str = ANY) -> Review | None:
    """`review_of` the newest wave of which enough was read (`measure.MINIMUM`, and something of every group), or None: of fewer clips a rate of 0 says nothing. Waves are not put
    together, for each is of a policy of its own."""
    waves = sorted({entry.wave for entry in audit.entries if entry.filter_version == version}, reverse=True)
    reviews = (review_of(Audit(tuple(entry for entry in audit.entries if entry.wave == wave), audit.readings, ()), version, code) for wave in waves)
    return next((review for review in reviews if not too_little(review)), None)


def blocked_for(audit: Audit, version: str, code: str = ANY) -> tuple[Group, ...]:
    """What was blocked for a policy, or for any: the clips that its precision is about."""
    mine = tuple(entry for entry in audit.entries if entry.pool == "blocked" and (code == ANY or code in entry.policies))
    return review_of(Audit(mine, audit.readings, ()), version, code).blocked


def unconfirmed(audit: Audit, version: str) -> set[str]:
    """Passed clips that one person alone called violating. Each counts for many: have a second person look at them before recall is believed."""
    said = by_clip(audit.readings)
    passed = {entry.clip_id for entry in audit.drawn if entry.pool == "passed" and entry.filter_version == version}
    return {clip_id for clip_id in passed if len(able := [r for r in said.get(clip_id, []) if r.said != "cannot_tell"]) == 1 and able[0].said == "violating"}


def to_read_again(audit: Audit, *, share: float = 0.15, seed: int) -> list[str]:
    """Clips read by one person that a second one is asked about, without being told what the first one said: a random share of all drawn clips, and every unconfirmed miss.

    Who is in the share hangs on the seed and the clip's id alone, so that later readings change nobody's place. In an order that tells nothing of why.
    """

    def place(clip_id: str, salt: str) -> int:
        return int.from_bytes(hashlib.sha256(json.dumps([seed, salt, clip_id]).encode()).digest()[:8])

    once = {clip_id for clip_id, readings in by_clip(audit.readings).items() if len(readings) == 1} & {entry.clip_id for entry in audit.drawn}
    chosen = {clip_id for clip_id in once if place(clip_id, "second") < share * 2**64} | {clip_id for version in audit.versions for clip_id in unconfirmed(audit, version) & once}
    return sorted(chosen, key=lambda clip_id: place(clip_id, "order"))


def reader_errors(audit: Audit, reader: str | None = None) -> ErrorRates:
    """What one reader, or all, said of gold clips: violating or not, whatever the policy. What they could not tell is left out."""
    truth = {each.clip_id: bool(each.policies) for each in audit.gold}
    told = [(truth[r.clip_id], r.said == "violating") for r in audit.readings if r.clip_id in truth and r.said != "cannot_tell" and reader in (None, r.reader)]
    yes, no = [said for true, said in told if true], [said for true, said in told if not true]
    return ErrorRates(sum(yes), len(yes), len(no) - sum(no), len(no))


def first_readings(audit: Audit) -> Audit:
    """As if every clip had been read once, by whoever came first: what `reader_errors` are the errors of."""
    first: dict[str, Reading] = {}
    for reading in audit.readings:
        first.setdefault(reading.clip_id, reading)
    return Audit(audit.entries, tuple(first.values()), audit.gold)
