"""Drawing clips to review: probabilities that hold and stay, folders that survive, and what readings become."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base_model.errors import UserError
from reward.safety.audit import (
    Audit,
    Candidate,
    Entry,
    Gold,
    Plan,
    Reading,
    add_readings,
    allocate,
    blocked_for,
    draw,
    draw_audit,
    first_readings,
    load_audit,
    reader_errors,
    review_of,
    severity,
    to_read_again,
    unconfirmed,
    violates,
)
from reward.safety.measure import Minimum, horvitz_thompson, leak_rate, precision, recall
from reward.safety.policy import load_policy

PLAN = Plan(blocked=20, passed=60)


def passed(count: int, *, start: int = 0, version: str = "flash 1") -> list[Candidate]:
    """Most clips with a low score, a few near the threshold."""
    return [
        Candidate(clip_id=f"p{i}", pool="passed", score=0.4 if i % 50 == 0 else 0.1 if i % 10 == 0 else 0.001, filter_version=version, kind="benign" if i % 2 else "asks")
        for i in range(start, start + count)
    ]


def blocked(count: int) -> list[Candidate]:
    return [Candidate(clip_id=f"b{i}", pool="blocked", score=0.9, filter_version="flash 1", policies=("P17",) if i % 4 else ("P05", "P17"), kind="asks") for i in range(count)]


def reading(clip_id: str, *codes: str, reader: str = "ann", **more: Any) -> Reading:
    return Reading(clip_id=clip_id, reader=reader, said="violating" if codes else "not_violating", policies=codes, **more)


def lines(folder: Path) -> list[str]:
    return [line for part in sorted(folder.glob("audit-*.jsonl")) for line in part.read_text().splitlines()]


# Drawing


def test_probabilities_are_how_often_a_clip_is_drawn_and_the_total_is_unbiased() -> None:
    clips = passed(400)
    bad = {each.clip_id for each in clips if each.score > 0.05 and int(each.clip_id[1:]) % 3 == 0} | {"p7", "p33"}
    times: Counter[str] = Counter()
    said: Counter[str] = Counter()
    totals = []
    for seed in range(250):
        entries = draw(clips, PLAN, seed=seed)
        taken = [entry for entry in entries if entry.why]
        times.update(entry.clip_id for entry in taken)
        for entry in entries:
            said[entry.clip_id] += entry.probability  # type: ignore[assignment]
        totals.append(horvitz_thompson([entry.clip_id in bad for entry in taken], [entry.probability for entry in taken]))
    error = float(np.std(totals) / math.sqrt(len(totals)))
    print("true:", len(bad), "mean of estimates:", np.mean(totals), "+-", error)
    assert abs(np.mean(totals) - len(bad)) < 4 * error and np.std(totals) > 0
    drawn, expected = (np.array([counter[each.clip_id] for each in clips]) / 250 for counter in (times, said))
    assert np.abs(drawn - expected).max() < 4.5 * 0.5 / math.sqrt(250) and abs((drawn - expected).mean()) < 0.005


def test_a_draw_keeps_its_budget_its_floor_and_its_random_share() -> None:
    entries = draw([*passed(1_000), *blocked(100)], PLAN, seed=0)
    taken = Counter((entry.pool, entry.why) for entry in entries if entry.why)
    print(taken)
    assert taken["passed", "random"] == 9 and 60 <= taken["passed", "random"] + taken["passed", "stratified"] <= 66 and 20 <= taken["blocked", "blocked"] <= 21
    strata = Counter(entry.stratum for entry in entries)
    drawn = Counter(entry.stratum for entry in entries if entry.why)
    assert all(drawn[key] >= min(PLAN.floor, size) for key, size in strata.items())
    assert all(entry.probability == drawn[entry.stratum] / strata[entry.stratum] for entry in entries)
    share = {band: drawn_share(entries, band) for band in (0, 1, 2)}
    assert share[0] < share[1] < share[2], "the nearer the threshold, the likelier"


def drawn_share(entries: list[Entry], band: int) -> float:
    some = [bool(entry.why) for entry in entries if entry.band == band and entry.pool == "passed"]
    return sum(some) / len(some)


def test_a_draw_hangs_on_the_seed_and_not_on_the_order() -> None:
    clips = [*passed(300), *blocked(40)]
    first, again, other = draw(clips, PLAN, seed=1), draw(clips[::-1], PLAN, seed=1), draw(clips, PLAN, seed=2)
    assert {entry.clip_id: entry for entry in first} == {entry.clip_id: entry for entry in again}
    assert {entry.clip_id for entry in first if entry.why} != {entry.clip_id for entry in other if entry.why}


def test_shares_of_a_budget() -> None:
    assert allocate({"a": 1_000, "b": 1_000}, {"a": 3, "b": 1}, 40, 1) == {"a": 30, "b": 10}
    assert allocate({"a": 1_000, "b": 5}, {"a": 1, "b": 100}, 40, 1) == {"a": 35, "b": 5}
    assert allocate({"a": 1_000, "b": 1_000, "c": 3}, {"a": 98, "b": 1, "c": 1}, 50, 10) == {"a": 37, "b": 10, "c": 3}
    assert allocate({"a": 9, "b": 2}, {"a": 1, "b": 1}, 50, 1) == {"a": 9, "b": 2}
    assert allocate({"a": 100, "b": 100}, {"a": 1, "b": 1}, 4, 10) == {"a": 10, "b": 10}, "a floor may exceed the budget"
    assert allocate({"a": 10, "b": 10, "c": 10}, {"a": 0, "b": 0, "c": 0}, 7, 1) in ({"a": 3, "b": 2, "c": 2}, {"a": 2, "b": 3, "c": 2}, {"a": 2, "b": 2, "c": 3})
    assert allocate({}, {}, 10, 1) == {}


def test_tiny_and_empty_pools() -> None:
    assert draw([], PLAN, seed=0) == []
    only = draw(passed(1), PLAN, seed=0)
    assert [(entry.probability, bool(entry.why)) for entry in only] == [(1.0, True)]
    with pytest.raises(ValueError, match="passed clips: without a chance"):
        draw(passed(5), Plan(blocked=5, passed=0), seed=0)
    for wrong in ({"blocked": -1}, {"floor": 0}, {"random_share": 1.5}, {"bands": (0.3, 0.1)}):
        with pytest.raises(ValueError, match="a plan takes"):
            replace(PLAN, **wrong)  # type: ignore[arg-type]


# On disk


def test_later_clips_never_redraw_earlier_ones(tmp_path: Path) -> None:
    first = draw_audit(tmp_path, [*passed(300), *blocked(40)], PLAN, seed=0)
    before = lines(tmp_path)
    assert draw_audit(tmp_path, [*passed(300), *blocked(40)], PLAN, seed=99) == first and lines(tmp_path) == before, "drawing again adds nothing"
    second = draw_audit(tmp_path, passed(600), Plan(blocked=0, passed=500), seed=5)
    assert lines(tmp_path)[: len(before)] == before
    old = {entry.clip_id: entry for entry in second.entries if entry.wave == 0}
    assert old == {entry.clip_id: entry for entry in first.entries} and Counter(entry.wave for entry in second.entries) == {0: 340, 1: 300}
    assert load_audit(tmp_path) == second


def test_a_clip_whose_verdict_changed_is_refused_unless_the_filter_did(tmp_path: Path) -> None:
    draw_audit(tmp_path, passed(100), PLAN, seed=0)
    before = lines(tmp_path)
    with pytest.raises(UserError, match="clip p0 is already there with other content"):
        draw_audit(tmp_path, [passed(1)[0].model_copy(update={"score": 0.2})], PLAN, seed=0)
    assert lines(tmp_path) == before
    both = draw_audit(tmp_path, passed(100, version="flash 2"), PLAN, seed=0)
    assert both.versions == ("flash 1", "flash 2") and len(both.entries) == 200


def test_readings_are_added_and_never_replaced(tmp_path: Path) -> None:
    audit = draw_audit(tmp_path, passed(100), PLAN, seed=0)
    clip = audit.drawn[0].clip_id
    add_readings(tmp_path, [reading(clip, "P05"), Gold(clip_id="g"), reading("g")])
    before = lines(tmp_path)
    add_readings(tmp_path, [reading(clip, "P05")])
    assert lines(tmp_path) == before
    undrawn = next(entry.clip_id for entry in audit.entries if not entry.why)
    for wrong, message in (
        ([reading(clip)], "is there twice"),
        ([reading(undrawn)], "no audit drew it"),
        ([reading(clip, "P99", reader="bo")], "unknown policy 'P99'"),
        ([Gold(clip_id=clip)], "is gold and was drawn"),
        ([Gold(clip_id="g", policies=("P05",))], "gold clip g is there twice"),
        ([reading(clip, "P05", reader="bo", final=True), reading(clip, reader="cy", final=True)], "final reading of clip"),
    ):
        with pytest.raises(UserError, match=message):
            add_readings(tmp_path, wrong)
        assert lines(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": 0.9}, "its probability is 0.9"),
        ({"probability": 0}, "probability: Input should be greater than 0"),
        ({"pool": "lost"}, "pool: Input should be 'blocked' or 'passed'"),
        ({"colour": 1}, "colour: Extra inputs"),
        ({"score": "NaN"}, "score"),
        ({"record": "other"}, "does not match any of the expected tags"),
        ({"why": "user report"}, "why"),
        ({"policies": ["P05"]}, "a blocked clip names"),
    ],
)
def test_what_is_not_known_is_refused_with_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    draw_audit(tmp_path, passed(100), PLAN, seed=0)
    part = tmp_path / "audit-00000.jsonl"
    text = part.read_text().splitlines()
    text[3] = json.dumps(json.loads(text[3]) | change)
    part.write_text("\n".join(text) + "\n")
    with pytest.raises(UserError) as error:
        load_audit(tmp_path)
    print(error.value)
    assert message in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert "its probability" in message or ":4:" in str(error.value)


def test_lost_lines_and_files_that_are_no_audit_are_noticed(tmp_path: Path) -> None:
    draw_audit(tmp_path / "a", passed(100), PLAN, seed=0)
    part = tmp_path / "a" / "audit-00000.jsonl"
    whole = part.read_bytes()
    for damaged, message in ((b"".join(whole.splitlines(True)[2:]), "Lines were lost"), (whole[:-20], "audit-00000.jsonl:100"), (b"\xff\xfe", "cannot read"), (b"{}\n", "record")):
        part.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            load_audit(tmp_path / "a")
    part.write_bytes(b"")
    assert load_audit(tmp_path / "a") == Audit((), (), ())
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="no audit"):
            load_audit(folder)


def test_ids_of_any_script_and_prompts_kinds_with_markup(tmp_path: Path) -> None:
    names = ["клип", "片段", "a b\u2028c", "<b>", 'q"\\', "é", "e\u0301"]
    clips = [Candidate(clip_id=name, pool="passed", score=0.1, filter_version="фильтр 1", kind="<i>") for name in names]
    audit = draw_audit(tmp_path, clips, PLAN, seed=0)
    add_readings(tmp_path, [reading(name, reader="読者") for name in names])
    loaded = load_audit(tmp_path)
    assert {entry.clip_id for entry in loaded.entries} == set(names) and loaded.entries == audit.entries and len(loaded.readings) == len(names)


def test_a_writer_that_is_killed_leaves_a_folder_that_loads_and_goes_on(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from reward.safety.audit import Candidate, Plan, draw_audit
        for wave in range(1000):
            clips = [Candidate(clip_id=f"w{wave}-{i}", pool="passed", score=0.1, filter_version="f 1") for i in range(100)]
            draw_audit(Path(sys.argv[1]), clips, Plan(blocked=0, passed=20), seed=wave)
    """
    for moment in (0.05, 0.2):
        writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
        deadline = time.monotonic() + 60
        already = len(list(tmp_path.glob("audit-*.jsonl")))
        while len(list(tmp_path.glob("audit-*.jsonl"))) < already + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        audit = load_audit(tmp_path)
        assert len(audit.entries) % 100 == 0 and len(audit.entries) >= 200
    whole = draw_audit(tmp_path, [Candidate(clip_id="after", pool="passed", score=0.1, filter_version="f 1")], PLAN, seed=0)
    assert len(whole.entries) == len(audit.entries) + 1


# What readings become


def test_a_majority_decides_a_final_reading_more_and_an_even_split_nothing() -> None:
    yes, no, border = reading("a", "P05"), reading("a", reader="bo"), Reading(clip_id="a", reader="cy", said="borderline")
    unsure = Reading(clip_id="a", reader="di", said="cannot_tell")
    assert violates([yes]) is True and violates([no]) is False and violates([border]) is False and violates([unsure]) is None and violates([]) is None
    assert violates([yes, no]) is None and violates([yes, no, border]) is False and violates([yes, unsure]) is True
    final = reading("a", "P05", reader="eve", final=True)
    assert violates([no, border, final]) is True and violates([yes], "P17") is False and violates([yes], "P05") is True
    policy = load_policy()
    assert severity([yes], policy) == policy.rule("P05").severity and severity([no], policy) == 0
    assert severity([reading("a", "P05", "P04")], policy) == 4
    for wrong in ({"said": "violating"}, {"said": "not_violating", "policies": ("P05",)}):
        with pytest.raises(ValueError, match="a violating clip names"):
            Reading(clip_id="a", reader="ann", **wrong)  # type: ignore[arg-type]


def judged(folder: Path, bad: set[str]) -> Audit:
    """An audit whose drawn clips one reader judged rightly."""
    audit = draw_audit(folder, [*passed(1_000), *blocked(100)], Plan(blocked=60, passed=200), seed=0)
    return add_readings(folder, [reading(entry.clip_id, *(("P17",) if entry.clip_id in bad else ())) for entry in audit.drawn])


def test_an_audit_becomes_estimates_that_agree_with_horvitz_thompson(tmp_path: Path) -> None:
    bad = {f"b{i}" for i in range(70)} | {f"p{i}" for i in range(0, 1_000, 20)}
    audit = judged(tmp_path, bad)
    review = review_of(audit, "flash 1")
    by_pool = {pool: [entry for entry in audit.drawn if entry.pool == pool] for pool in ("blocked", "passed")}
    caught, missed = (horvitz_thompson([entry.clip_id in bad for entry in some], [entry.probability for entry in some]) for some in by_pool.values())
    found = recall(review)
    print("recall:", found, "truth:", 70 / 120)
    assert found.value == pytest.approx(caught / (caught + missed)) and found.low < 70 / 120 < found.high
    assert precision(blocked_for(audit, "flash 1")).value == pytest.approx(caught / 100) and leak_rate(review.passed).value == pytest.approx(missed / 1_000)
    assert [group.size for group in review.passed] == [900, 80, 20]
    p05 = blocked_for(audit, "flash 1", "P05")
    assert sum(group.size for group in p05) == 25 and precision(p05, Minimum(reviewed=10)).value == 0, "everybody said P17"
    assert [group.size for group in review_of(audit, "flash 1", "P05").blocked] == [25, 75]
    assert [group.size for group in review_of(audit, "flash 1", kind="benign").passed] == [500]
    assert review_of(audit, "flash 2") == review_of(Audit((), (), ()), "flash 1")


def test_what_nobody_could_tell_counts_neither_way(tmp_path: Path) -> None:
    audit = judged(tmp_path, set())
    unsure = tuple(each.model_copy(update={"said": "cannot_tell"}) if k % 2 else each for k, each in enumerate(audit.readings))
    review = review_of(replace(audit, readings=unsure), "flash 1")
    assert sum(group.reviewed for group in (*review.blocked, *review.passed)) == len(audit.readings) - len(audit.readings) // 2


def test_a_single_voice_about_a_miss_is_told_apart(tmp_path: Path) -> None:
    audit = judged(tmp_path, {"p0", "p50", "b1"})
    assert unconfirmed(audit, "flash 1") == {entry.clip_id for entry in audit.drawn} & {"p0", "p50"} != set()
    second = add_readings(tmp_path, [reading(clip, "P17", reader="bo") for clip in ("p0", "p50") if clip in {entry.clip_id for entry in audit.drawn}])
    assert unconfirmed(second, "flash 1") == set()
    assert [each.reader for each in first_readings(second).readings] == ["ann"] * len(audit.readings)


def test_a_second_reading_is_asked_of_a_random_share_and_of_every_miss(tmp_path: Path) -> None:
    audit = judged(tmp_path, {f"p{i}" for i in range(0, 1_000, 20)})
    again, misses = to_read_again(audit, seed=0), unconfirmed(audit, "flash 1")
    shared = [clip_id for clip_id in again if clip_id not in misses]
    print(len(misses), "misses and", len(shared), "of", len(audit.drawn))
    assert misses and misses < set(again) and 0.05 < len(shared) / len(audit.drawn) < 0.25 and again != sorted(again)
    assert set(to_read_again(audit, share=0, seed=0)) == misses and len(to_read_again(audit, share=1, seed=0)) == len(audit.drawn)
    second = add_readings(tmp_path, [reading(clip_id, *(("P17",) if clip_id in misses else ()), reader="bo") for clip_id in again[:10]])
    assert to_read_again(second, seed=0) == again[10:]


def test_gold_tells_how_often_a_reader_errs() -> None:
    gold = [Gold(clip_id=f"g{i}", policies=("P05",) if i < 4 else ()) for i in range(10)]
    said = [reading(f"g{i}", *(("P05",) if i in (0, 1, 2, 9) else ())) for i in range(10)]
    audit = Audit((), (*said, reading("g0", reader="bo"), Reading(clip_id="g5", reader="bo", said="cannot_tell")), tuple(gold))
    assert reader_errors(audit, "ann") == (3, 4, 5, 6) and reader_errors(audit, "bo") == (0, 1, 0, 0) and reader_errors(audit) == (3, 5, 5, 6)
    assert math.isnan(reader_errors(audit, "nobody").sensitivity)
