"""What leads are told of people and of filters, against counts by hand and simulated worlds."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from base_model.errors import UserError
from recipes import app
from reward.app import quality, signing_off, thresholds
from reward.app.quality import Scores, agreement_of, filters_of, persons_of, scores_of, share
from reward.app.schema import event, signoff, threshold
from reward.app.security import Actor, Denied
from reward.app.store import Store
from reward.comparisons import RankingEvent
from reward.safety.audit import Audit, Candidate, Plan, Reading, draw, review_of
from reward.safety.measure import precision, recall
from tests.reward.app.conftest import add_clips, add_project

SHARES = ("alpha", "kappa", "ac1", "raw")


def actor(name: str) -> Actor:
    return Actor(f"p_{name}", name, name.title(), {"*": frozenset({"lead"})}, {}, "", "")


def ranking(who: str, ranks: tuple[int | None, ...], *, task: str = "t", order: tuple[int, ...] = (), **more: Any) -> RankingEvent:
    k = len(ranks)
    clips = tuple(f"{task}/{place}" for place in range(k))
    return RankingEvent(f"{task}.{who}.{more.get('created_at', '')}", task, task, who, clips, ranks, shown_order=order or tuple(range(k)), **more)


def test_people_who_agree_and_people_who_throw_dice_are_told_apart() -> None:
    rng = random.Random(1)
    same = [ranking(who, (1, 2, 3), task=f"t{n}") for n in range(40) for who in ("ann", "bob", "cat")]
    dice = [ranking(who, tuple(rng.sample((1, 2, 3), 3)), task=f"t{n}") for n in range(120) for who in ("ann", "bob", "cat")]
    (good,), (bad,) = agreement_of(same), agreement_of(dice)
    assert good.pairs == 120 and good.people == 3 and good.answers == 120
    assert all(getattr(good, name).value == pytest.approx(1) for name in SHARES)
    for name, chance in (("alpha", 0), ("kappa", 0), ("ac1", 0), ("raw", 0.5)):
        told = getattr(bad, name)
        assert told.low <= chance <= told.high and told.n == 360, name


def test_agreement_on_too_little_is_not_measurable_yet() -> None:
    (few,) = agreement_of([ranking(who, (1, 2), task=f"t{n}") for n in range(19) for who in ("ann", "bob")])
    assert (few.alpha.value, few.alpha.n, few.alpha.note) == (None, 19, "19 pairs judged by two people, 20 are needed")
    alone = agreement_of([ranking("ann", (1, 2), task=f"t{n}") for n in range(50)])
    assert alone[0].raw.value is None and agreement_of([]) == []


def test_gold_repeats_and_skipped_tasks_do_not_count_for_agreement() -> None:
    real = [ranking(who, (1, 2), task=f"t{n}") for n in range(25) for who in ("ann", "bob")]
    other = [ranking("ann", (2, 1), task="g", is_gold=True, gold_ok=False), ranking("bob", (1, 2), task="g", is_gold=True), ranking("ann", (2, 1), task="t0", is_repeat=True)]
    skipped = [ranking(who, (None, None), task="s", skipped_reason="dark") for who in ("ann", "bob")]
    assert agreement_of([*real, *other, *skipped]) == agreement_of(real)


def test_a_persons_habits_by_hand() -> None:
    said = []
    for n in range(30):  # of three clips, always the one shown first
        order = ((0, 1, 2), (1, 2, 0), (2, 0, 1))[n % 3]
        best = order.index(0)
        ranks = tuple(1 if place == best else 2 for place in range(3))
        said.append(ranking("ann", ranks, task=f"t{n}", order=order, lead_time_ms=1000 * (n + 1), watch_ms=(500, 1000, 3000), created_at=f"1-{n:02d}"))
    said += [ranking("ann", (1, 2, 2), task=f"t{n}", is_repeat=True, created_at=f"2-{n:02d}") for n in range(6)]
    said += [ranking("ann", (1, 2), task=f"g{n}", is_gold=True, gold_ok=n < 6, created_at=f"3-{n}") for n in range(8)]
    (told,) = persons_of(said, {f"t{n}/{place}": 1000.0 for n in range(30) for place in range(3)})
    assert told.answers == 44 and told.first_place.value == pytest.approx((30 + 6) / 36) and told.chance == pytest.approx(1 / 3)
    assert told.gold.value == 6 / 8 and told.median_seconds == 15.5 and told.watched == 1.0
    assert told.repeats.n == 6 and told.repeats.value == pytest.approx(6 / 18)  # all three pairs of the two tasks whose best clip came first in the folder, none of the others
    assert told.agrees.value is None


@pytest.mark.parametrize(("hits", "trials", "low", "high"), [(0, 20, 0.0, 0.161), (20, 20, 0.839, 1.0), (15, 20, 0.531, 0.888)])
def test_shares_carry_wilsons_interval(hits: int, trials: int, low: float, high: float) -> None:
    told = share(hits, trials)
    assert (told.low, told.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    assert share(2, 5).value is None and share(0, 0).note == "0 checks, 6 are needed"


# Filters


def reading(clip_id: str, violating: bool) -> Reading:
    return Reading(clip_id=clip_id, reader="ann", said="violating" if violating else "not_violating", policies=("P17",) if violating else ())


def a_world(clips: int = 4_000, *, cut: float = 0.5, seed: int = 0) -> tuple[Audit, dict[str, float], dict[str, bool]]:
    """Clips with a calibrated score, of which a filter blocks those from `cut` on; an audit of them, read without error."""
    rng = random.Random(seed)
    score = {f"{n:064x}": rng.betavariate(0.5, 4) for n in range(clips)}
    truth = {clip_id: rng.random() < value for clip_id, value in score.items()}
    known = [
        Candidate(clip_id=clip_id, pool="blocked" if value >= cut else "passed", score=value, filter_version="flash 3", policies=("P17",) if value >= cut else ())
        for clip_id, value in score.items()
    ]
    entries = draw(known, Plan(200, 600), seed=seed)
    readings = [reading(each.clip_id, truth[each.clip_id]) for each in entries if each.why]
    return Audit(tuple(entries), tuple(readings), ()), score, truth


def test_rates_of_filters_are_those_of_the_measuring_code_and_cover_the_truth() -> None:
    audit, score, truth = a_world()
    told = {row.policy: row for row in filters_of(audit).rows}
    blocked = [clip_id for clip_id, value in score.items() if value >= 0.5]
    right = {"precision": sum(truth[each] for each in blocked) / len(blocked), "recall": sum(truth[each] for each in blocked) / sum(truth.values())}
    review = review_of(audit, "flash 3", "P17")
    assert told["P17"].rates["recall"].value == pytest.approx(recall(review)[0]) and told["P17"].rates["precision"].value == pytest.approx(precision(review.blocked)[0])
    for name, value in right.items():
        for code in ("any", "P17"):
            rate = told[code].rates[name]
            assert rate.low is not None and rate.high is not None and rate.low <= value <= rate.high, (name, code)
    assert told["any"].blocked == len(blocked) and told["any"].rates["over-block rate"].note == "of no prompt is it known that it is benign"


def test_nothing_read_is_not_measurable_yet_and_never_all() -> None:
    audit, *_ = a_world(400)
    unread = filters_of(Audit(audit.entries, (), ()))
    assert all(rate.value is None and rate.note for row in unread.rows for rate in row.rates.values())
    assert filters_of(None) == quality.NOTHING


def test_the_child_safety_policy_has_no_row() -> None:
    audit, *_ = a_world(400)
    hit = next(each for each in audit.entries if each.why)
    readings = [each for each in audit.readings if each.clip_id != hit.clip_id]
    told = filters_of(Audit(audit.entries, (*readings, Reading(clip_id=hit.clip_id, reader="bob", said="violating", policies=("P04",))), ()))
    assert "P04" not in {row.policy for row in told.rows}


def test_drift_tells_versions_apart() -> None:
    audit, *_ = a_world(500)
    newer = [each.model_copy(update={"filter_version": "flash 4", "score": min(1.0, each.score + 0.2)}) for each in audit.entries]
    (told,) = filters_of(Audit((*audit.entries, *newer), audit.readings, ())).drift
    assert (told.before, told.after, told.clips_before) == ("flash 3", "flash 4", 500) and told.distance > 0.3 and told.chance < 1e-6


def test_scores_are_of_clips_that_may_be_known(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_clips(each_store, project_id, files=False, verdicts=("allow", "block", "error", "review"))
    found = scores_of(each_store, project_id)
    assert set(found) == {("flash 3", "P17")} and sorted(found["flash 3", "P17"].by_clip.values()) == [0.02] * 3 + [0.4] * 3 + [0.9] * 3
    (drawn,) = quality.histograms(found)
    assert sum(drawn.counts) == 9 and drawn.counts[int(0.4 * 25)] == 3 and drawn.threshold == 0.5


# Thresholds


def test_a_preview_counts_who_changes_sides_and_covers_the_truth() -> None:
    audit, score, truth = a_world(seed=3)
    some = {("flash 3", "P17"): Scores(0.5, score)}
    told = thresholds.preview_of(audit, some, "flash 3", "P17", 0.3)
    between = [clip_id for clip_id, value in score.items() if 0.3 <= value < 0.5]
    read = {each.clip_id for each in audit.readings}
    assert told.blocked_more.clips == len(between) and told.blocked_less.clips == 0
    assert told.blocked_more.audited == len(read & set(between)) and told.blocked_more.violating == sum(truth[each] for each in read & set(between))
    for cut, rates in ((0.5, told.before), (0.3, told.after)):
        blocked = [clip_id for clip_id, value in score.items() if value >= cut]
        for rate, value in ((rates.precision, sum(truth[each] for each in blocked) / len(blocked)), (rates.recall, sum(truth[each] for each in blocked) / sum(truth.values()))):
            assert rate.low is not None and rate.high is not None and rate.low <= value <= rate.high
    assert told.before.precision.value == pytest.approx(precision(review_of(audit, "flash 3", "P17").blocked)[0])
    higher = thresholds.preview_of(audit, some, "flash 3", "P17", 0.7)
    assert higher.blocked_more.clips == 0 and higher.blocked_less.clips == sum(0.5 <= value < 0.7 for value in score.values())


def test_a_preview_without_an_audit_counts_and_measures_nothing() -> None:
    told = thresholds.preview_of(None, {("flash 3", "P17"): Scores(0.5, {"a": 0.4, "b": 0.6})}, "flash 3", "P17", 0.3)
    assert (told.blocked_more.clips, told.blocked_more.audited, told.after.recall.value, told.after.precision.value) == (1, 0, None, None)


@pytest.mark.parametrize(("name", "new"), [("flash 4", 0.3), ("flash 3", 0.5), ("flash 3", 0.0), ("flash 3", 1.5), ("flash 3", math.nan)])
def test_a_preview_of_nothing_is_refused(name: str, new: float) -> None:
    with pytest.raises(UserError):
        thresholds.preview_of(None, {("flash 3", "P17"): Scores(0.5, {})}, name, "P17", new)


def test_another_person_approves_a_threshold_and_the_log_tells_who(each_store: Store) -> None:
    project_id = add_project(each_store)
    other = add_project(each_store, "other")
    preview = thresholds.preview_of(None, {("flash 3", "P17"): Scores(0.5, {"a": 0.4})}, "flash 3", "P17", 0.3)
    made = thresholds.propose(each_store, project_id, preview, actor("ann"))
    with pytest.raises(UserError, match="waits"):
        thresholds.propose(each_store, project_id, preview, actor("bob"))
    for project, who, status in ((project_id, "ann", 403), (other, "bob", 404)):
        with pytest.raises(Denied) as denied:
            thresholds.decide(each_store, project, made, True, actor(who))
        assert denied.value.status == status
    thresholds.decide(each_store, project_id, made, True, actor("bob"))
    thresholds.decide(each_store, project_id, made, True, actor("bob"))
    with pytest.raises(Denied, match="already"):
        thresholds.decide(each_store, project_id, made, False, actor("cat"))
    with each_store.reading() as db:
        told = thresholds.listed(thresholds.proposals(db, project_id))
        kinds = [(row.kind, row.actor) for row in db.execute(select(event.c.kind, event.c.actor).where(event.c.subject == made).order_by(event.c.seq))]
        assert db.execute(select(threshold.c.state).where(threshold.c.id == made)).scalar() == "approved"
    assert [(each["filter"], each["policy"], each["threshold"], each["proposed_by"], each["approved_by"]) for each in told] == [("flash 3", "P17", 0.3, "ann", "bob")]
    assert kinds == [("threshold proposed", "ann"), ("threshold approved", "bob")]
    assert "threshold: 0.3" in thresholds.as_yaml(told)


def test_who_proposed_may_take_it_back_and_a_newer_approval_holds(store: Store) -> None:
    project_id, some = add_project(store), {("flash 3", "P17"): Scores(0.5, {"a": 0.4})}
    taken = thresholds.propose(store, project_id, thresholds.preview_of(None, some, "flash 3", "P17", 0.1), actor("ann"))
    thresholds.decide(store, project_id, taken, False, actor("ann"))
    for new in (0.3, 0.4):
        store.now = lambda at=int(new * 10): 1_000 + at  # type: ignore[misc]
        thresholds.decide(store, project_id, thresholds.propose(store, project_id, thresholds.preview_of(None, some, "flash 3", "P17", new), actor("ann")), True, actor("bob"))
    with store.reading() as db:
        assert [each["threshold"] for each in thresholds.listed(thresholds.proposals(db, project_id))] == [0.4]


# Signing off


def test_a_sign_off_freezes_what_was_shown_and_goes_into_the_card_once(each_store: Store, tmp_path: Path) -> None:
    project_id = add_project(each_store)
    add_clips(each_store, project_id, files=False, verdicts=("allow", "allow", "block", "error"))
    filters = filters_of(a_world(400)[0])
    with each_store.reading() as db:
        evidence = signing_off.evidence_of("test", signing_off.counts_of(db, project_id, "test"), filters)
    assert (
        evidence["clips"] == {"allow": 6, "review": 0, "error": 3, "block": 3}
        and evidence["filters"] == ["flash 3"]
        and {row["policy"] for row in evidence["rates"]} == {"any", "P17"}
    )
    seen = signing_off.hash_of(evidence)
    for statement, hash_, expected in (("", seen, UserError), (" ", seen, UserError), ("fine", "0" * 64, Denied)):
        with pytest.raises(expected):
            signing_off.sign(each_store, project_id, "test", True, statement, hash_, filters, actor("ann"))
    with each_store.writing() as db:
        each_store.log(db, "system", "test", "x")
    made = signing_off.sign(each_store, project_id, "test", True, "looked at all of it", seen, filters, actor("ann"))
    with each_store.reading() as db:
        (held,) = signing_off.signoffs(db, project_id)
        body = db.execute(select(event.c.body).where(event.c.subject == made)).scalar_one()
    assert (held.run, held.approved, held.by, held.evidence["clips"]) == ("test", True, "ann", evidence["clips"]) and held.hash in body and "looked" not in body
    card, before = tmp_path / "adapter.json", {"sha256": "ab", "measured": {"x": 1}}
    card.write_text(json.dumps(before))
    for _ in range(2):
        signing_off.write_card(each_store, made, card)
    told = json.loads(card.read_text())
    assert {key: told[key] for key in before} == before and [each["id"] for each in told["signoffs"]] == [made]
    assert told["signoffs"][0]["evidence"] == held.evidence and told["signoffs"][0]["statement"] == "looked at all of it" and list(tmp_path.glob("*.json")) == [card]
    with pytest.raises(UserError):
        signing_off.write_card(each_store, "s_none", card)
    with pytest.raises(Denied), each_store.reading() as db:
        signing_off.counts_of(db, project_id, "another")


def test_the_command_writes_a_sign_off_into_a_card_and_leaves_the_rest(store: Store, tmp_path: Path) -> None:
    project_id = add_project(store)
    add_clips(store, project_id, files=False)
    with store.reading() as db:
        seen = signing_off.hash_of(signing_off.evidence_of("test", signing_off.counts_of(db, project_id, "test"), quality.NOTHING))
    made = signing_off.sign(store, project_id, "test", False, "not yet", seen, quality.NOTHING, actor("ann"))
    card = tmp_path / "adapter.json"
    card.write_text(json.dumps({"sha256": "ab"}))
    cfg = app.Config(action="sign", out=store.folder, folder=card, signoff=made)
    told = app.main(cfg)
    assert (told["id"], told["run"], told["approved"], told["by"]) == (made, "test", False, "ann") and app.main(cfg) == told
    written = json.loads(card.read_text())
    assert written["sha256"] == "ab" and [each["statement"] for each in written["signoffs"]] == ["not yet"]
    for lacks, message in (
        ({"signoff": ""}, "which sign-off"),
        ({"signoff": "s_none"}, "no sign-off 's_none'"),
        ({"folder": None}, "which card"),
        ({"folder": tmp_path / "no"}, "cannot read the card"),
    ):
        with pytest.raises(UserError, match=message):
            app.main(cfg.model_copy(update=lacks))


def test_a_sign_off_is_never_changed(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_clips(each_store, project_id, files=False)
    with each_store.reading() as db:
        seen = signing_off.hash_of(signing_off.evidence_of("test", signing_off.counts_of(db, project_id, "test"), quality.NOTHING))
    signing_off.sign(each_store, project_id, "test", False, "no", seen, quality.NOTHING, actor("ann"))
    with pytest.raises(Exception, match="only added to"), each_store.writing() as db:
        db.execute(signoff.update().values(approved=True))
