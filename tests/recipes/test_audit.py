"""From a store to a corrected limit: clips are drawn, read by people, and the multiplier compares what they would find."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from align.constraints import Multiplier, Multipliers
from align.run import read_metrics
from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import audit, cli, feedback, grpo, nft
from recipes.feedback import SafetyLimit
from reward.safety.audit import latest_review, load_audit
from reward.safety.contract import Decision, Ruling, SafetyRunner, Verdict, to_json
from reward.safety.correction import Corrected, by_audit, by_error_rates
from reward.safety.measure import ErrorRates
from reward.safety.policy import load_policy
from tests.recipes.small import dazzled, run_small

LEVELS = [0.1 + 0.8 * k / 59 for k in range(60)]  # brightness of the clips; those above 0.7 are blocked, people mind those above 0.5


def stored(folder: Path, *, lineage: str = "a" * 64, offset: float = 0.0, runner: SafetyRunner | None = None) -> ClipStore:
    """Sixty grey clips, each with what the filter says of it."""
    video = torch.stack([torch.full((5, 3, 16, 16), level + offset) for level in LEVELS])
    decisions = (runner or dazzled(0.7)).check_videos(video, ["a grey wall"] * 60, 12.0)
    store = ClipStore(folder)
    store.add_many([NewClip(clip, "a grey wall", "wall", k, {}, lineage, 12.0, safety=to_json(d)) for k, (clip, d) in enumerate(zip(video, decisions, strict=True))], preview=False)
    return store


def fill_in(table: Path, store: ClipStore) -> None:
    """As one reader would who minds every clip brighter than 0.5."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row["said"] == "" for row in rows)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, audit.COLUMNS)
        writer.writeheader()
        for row in rows:
            violating = float(store.load(row["clip_id"]).mean()) > 0.5
            writer.writerow({**row, "said": "violating" if violating else "not_violating", "policies": "P17" if violating else ""})


def run(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main(["audit", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.fixture
def read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """An audit that was drawn and read."""
    store = stored(tmp_path / "clips")
    drawn = run(capsys, tmp_path / "audit", "--clips", tmp_path / "clips", "--blocked", 15, "--passed", 32)
    assert (drawn["blocked"], drawn["passed"], drawn["filters"]) == (15, 45, "dazzle 1") and 28 <= drawn["to_look_at"] < 60
    fill_in(Path(drawn["table"]), store)
    told = run(capsys, tmp_path / "audit", "--answers", drawn["table"], "--reader", "ann")
    assert told["added"] == drawn["to_look_at"] and told["open"] == 0
    return tmp_path / "audit"


def test_a_wave_is_drawn_once_and_answers_are_added_once(read: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = (read / "wave-0.csv").read_bytes()
    again = run(capsys, read, "--clips", tmp_path / "clips", "--blocked", 8, "--passed", 20)
    assert again["new_clips"] == 0 and again["wave"] == 0 and (read / "wave-0.csv").read_bytes() == table, "what a reader filled in stays"
    assert run(capsys, read, "--answers", read / "wave-0.csv", "--reader", "ann")["added"] == 0
    stored(tmp_path / "clips", lineage="b" * 64, offset=0.02)
    later = run(capsys, read, "--clips", tmp_path / "clips", "--blocked", 8, "--passed", 20)
    assert later["wave"] == 1 and later["new_clips"] == 60 and later["to_look_at"] < 60


def test_the_corrected_rate_is_that_of_the_newest_wave_that_was_read(read: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    review = latest_review(load_audit(read), "dazzle 1", "P17")
    assert review is not None
    found = by_audit(15, 60, review).rate
    print("corrected:", found)
    assert found == pytest.approx(30 / 60, abs=0.12), "half of the clips are brighter than 0.5, a quarter is blocked"
    stored(tmp_path / "clips", lineage="b" * 64, offset=0.02)
    run(capsys, read, "--clips", tmp_path / "clips")
    assert latest_review(load_audit(read), "dazzle 1", "P17") == review, "nobody has read the second wave yet"
    fill_in(read / "wave-1.csv", ClipStore(tmp_path / "clips"))
    run(capsys, read, "--answers", read / "wave-1.csv", "--reader", "bo")
    assert latest_review(load_audit(read), "dazzle 1", "P17") != review and latest_review(load_audit(read), "dazzle 2", "P17") is None


@pytest.mark.parametrize("recipe", [nft, grpo])
def test_under_an_audit_the_multiplier_compares_what_people_would_find(recipe: Any, read: Path, tmp_path: Path) -> None:
    safety = SafetyLimit(limit=0.9, target=0.3, audit=read)
    rows = run_small(recipe, tmp_path / "run", {"prompts": 2, "group_size": 6, "iterations": 1}, constrained=True, safety=safety, runner=dazzled(0.34))
    review = latest_review(load_audit(read), "dazzle 1", "P17")
    assert review is not None and 0 < rows[0]["violation_rate"] < 1
    assert rows[0]["limited_rate"] == pytest.approx(by_audit(12 * rows[0]["violation_rate"], 12, review).rate) and rows[0]["limited_rate"] > rows[0]["violation_rate"]
    plain = run_small(recipe, tmp_path / "plain", {"prompts": 2, "group_size": 6, "iterations": 1}, constrained=True, safety=SafetyLimit(), runner=dazzled(0.34))
    assert plain[0]["limited_rate"] == pytest.approx(plain[0]["violation_rate"])
    free = run_small(recipe, tmp_path / "free", {"prompts": 2, "group_size": 6, "iterations": 1}, runner=dazzled(0.34))
    assert free[0]["limited_rate"] is None or free[0]["limited_rate"] != free[0]["limited_rate"], "no limit, nothing to compare"
    assert set(read_metrics(tmp_path / "run")[0]) == set(read_metrics(tmp_path / "plain")[0])


def test_what_is_left_to_people_for_flashing_counts_against_the_limit() -> None:
    def decided(*rulings: tuple[str, Verdict]) -> Decision:
        return Decision(tuple(Ruling(verdict, code, 0.5, (), "x", "1", 0.5) for code, verdict in rulings))

    assert feedback.withheld(decided(("P17", Verdict.REVIEW), ("Q01", Verdict.ALLOW))) and feedback.withheld(decided(("P05", Verdict.BLOCK)))
    assert not feedback.withheld(decided(("P17", Verdict.ALLOW), ("Q01", Verdict.REVIEW))), "a blank clip is no violation"


def test_filters_that_keep_the_target_while_audits_break_the_limit_raise_the_alarm() -> None:
    def alarm(blocked: float, corrected: float, *, bound: bool = False, audited: bool = True) -> bool:
        correct = feedback.Correction(lambda blocked, left, clips: Corrected(corrected, 0.9), bound, audited)
        multiplier = Multiplier("P17", limit=0.1, target=0.05, correct=correct)
        multiplier.update(torch.tensor([1.0] * round(100 * blocked) + [0.0] * round(100 - 100 * blocked)))
        return feedback.gamed(multiplier)

    assert alarm(0.03, 0.2) and not alarm(0.03, 0.08) and not alarm(0.2, 0.3), "both, or it is no news"
    assert not alarm(0.03, 0.0, bound=True), "a bound is what may be, not what was found"
    assert not alarm(0.03, 0.2, audited=False) and not feedback.gamed(Multiplier("P17", limit=0.1)), "nobody audited"


def test_what_is_left_to_people_is_counted_apart_from_what_is_blocked_and_found_again() -> None:
    """2 of 10 clips are blocked and 5 left to people, then 1 and 0."""
    told: list[tuple[float, float, float]] = []

    def found(blocked: float, left: float, clips: float) -> Corrected:
        told.append((blocked / clips, left / clips, clips))
        return Corrected(blocked / clips, 1.0)

    def seen(blocked: int, left: int) -> feedback.Assessment:
        withheld = torch.tensor([1.0] * (blocked + left) + [0.0] * (9 - blocked - left) + [torch.nan])
        apart = torch.tensor([0.0] * blocked + [1.0] * left + [0.0] * (9 - blocked - left) + [torch.nan])
        return feedback.Assessment(torch.zeros(10), withheld, withheld, withheld == 0, apart)

    correct = feedback.Correction(found, bound=False, audited=True)
    multiplier = Multiplier("P17", limit=0.9, target=0.3, decay=0.5, correct=correct)
    feedback.dual_step(Multipliers([multiplier]), seen(2, 5))
    assert multiplier.bound == pytest.approx(2 / 9) and told[-1] == pytest.approx((2 / 9, 5 / 9, 9))
    feedback.dual_step(Multipliers([multiplier]), seen(1, 0))
    assert multiplier.bound == pytest.approx(1.5 / 9) and told[-1][1] == pytest.approx(2.5 / 9)
    again = feedback.Correction(found, bound=False, audited=True)
    feedback.Remembered(Multiplier("P17", limit=0.9, correct=again)).load_state_dict(feedback.Remembered(multiplier).state_dict())
    assert again(0.5, 8.0) == correct(0.5, 8.0) == pytest.approx(0.5 - 2.5 / 9)
    assert correct(0.1, 8.0) == 0, "never fewer than none"


def test_an_audit_may_come_or_go_when_a_run_resumes_and_a_checkpoint_of_before_knows_nothing_of_it() -> None:
    plain, audited = Multiplier("P17", limit=0.9), Multiplier("P17", limit=0.9, correct=feedback.Correction(lambda *told: Corrected(0.1, 0.2), False, True))
    for first, second in ((plain, audited), (audited, plain)):
        first.update(torch.tensor([1.0, 0.0]))
        feedback.Remembered(second).load_state_dict(feedback.Remembered(first).state_dict())
        assert second.cost == first.cost
    feedback.Remembered(audited).load_state_dict(plain.state_dict())
    assert audited.correct.left is None  # type: ignore[union-attr]


def test_a_clip_that_no_filter_blocks_and_one_is_not_sure_of_is_left_to_people() -> None:
    class Unsure:
        id, version, threshold, policies = "unsure", "1", 0.3, ("P17",)

        def check_videos(self, video: torch.Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
            said = [(Verdict.ALLOW, 0.1), (Verdict.REVIEW, 0.4), (Verdict.BLOCK, 0.9), (Verdict.ERROR, float("nan"))]
            return [[Ruling(verdict, "P17", score, (), self.id, self.version, self.threshold)] for verdict, score in said]

    assess = feedback.Assessor(None, SafetyRunner([Unsure()], load_policy()), 12.0, max_error_share=0.5)
    seen = assess(torch.rand(4, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ["a"] * 4)
    assert seen.violates[:3].tolist() == [0, 1, 1] and seen.left[:3].tolist() == [0, 1, 0]
    assert bool(seen.violates[3].isnan() and seen.left[3].isnan())


def test_stored_error_rates_or_an_upper_bound_correct_as_well(read: Path) -> None:
    rates = feedback.correction_of(SafetyLimit(error_rates=(60, 100, 990, 1000)), "any 1")
    assert rates is not None and rates(0.05, 400) == by_error_rates(20, 400, ErrorRates(60, 100, 990, 1000)).rate
    bound = feedback.correction_of(SafetyLimit(error_rates=(60, 100, 990, 1000), confidence=0.9), "any 1")
    assert bound is not None and bound(0.05, 400) == by_error_rates(20, 400, ErrorRates(60, 100, 990, 1000), confidence=0.9).upper > rates(0.05, 400)
    audited = feedback.correction_of(SafetyLimit(audit=read, confidence=0.95), "dazzle 1")
    assert audited is not None and audited(0.25, 60) > 0.5
    assert feedback.correction_of(SafetyLimit(), "any 1") is None


def test_a_few_readings_correct_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two clips that somebody found harmless would make a rate of 0 of whatever is blocked."""
    store = stored(tmp_path / "clips")
    drawn = run(capsys, tmp_path / "audit", "--clips", tmp_path / "clips", "--blocked", 15, "--passed", 32)
    fill_in(Path(drawn["table"]), store)
    with Path(drawn["table"]).open(newline="") as file:
        header, *rows = file.read().splitlines()
    entries = {entry.clip_id: entry for entry in load_audit(tmp_path / "audit").entries}
    of = {key: [row for row in rows if (entries[row.split(",")[0]].pool, entries[row.split(",")[0]].band) == key] for key in {(e.pool, e.band) for e in entries.values()}}
    few = tmp_path / "few.csv"
    few.write_text("\n".join([header, *(some[0] for some in of.values())]) + "\n")
    run(capsys, tmp_path / "audit", "--answers", few, "--reader", "ann")
    with pytest.raises(UserError, match=r"no wave of clips of the filters dazzle 1 was read, .*: 30 blocked and 30 passed clips, or all where there are fewer"):
        feedback.correction_of(SafetyLimit(audit=tmp_path / "audit"), "dazzle 1")
    run(capsys, tmp_path / "audit", "--answers", drawn["table"], "--reader", "ann")
    correct = feedback.correction_of(SafetyLimit(audit=tmp_path / "audit"), "dazzle 1")
    assert correct is not None and correct(0.25, 60) == pytest.approx(0.5, abs=0.05), "a quarter is blocked, and people mind half"


def test_a_table_names_files_that_are_there_and_what_is_none_is_one_line(read: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (read / "wave-0.csv").open(newline="") as file:
        assert all(Path(row["file"]).is_file() for row in csv.DictReader(file)), "the store has no previews"
    (tmp_path / "long.csv").write_text(f"clip_id,file,said,policies\nc,{'x' * 200_000},violating,P17\n")
    for words, told in (
        (["--answers", tmp_path / "long.csv", "--reader", "ann"], "not a wave's table"),
        (["--clips", tmp_path / "clips", "--network", tmp_path / "nowhere"], "no such network"),
    ):
        assert cli.main(["audit", *map(str, [read, *words])]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_what_tells_nothing_of_these_filters_is_refused(read: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no wave of clips of the filters flash 2 was read"):
        feedback.correction_of(SafetyLimit(audit=read), "flash 2")
    with pytest.raises(UserError, match="tell nothing"):
        feedback.correction_of(SafetyLimit(error_rates=(1, 2, 1, 2)), "flash 2")
    for odd, said in (
        ({"target": 0.5}, "above the limit"),
        ({"audit": read, "error_rates": (1, 1, 1, 1)}, "Give one of them"),
        ({"error_rates": (2, 1, 1, 1)}, "of so many"),
    ):
        with pytest.raises(ValidationError, match=said):
            SafetyLimit.model_validate(odd)
    table = read / "wave-0.csv"
    lines = table.read_text().splitlines()
    for broken, said in (
        ("\n".join(lines[1:]), "no column 'clip_id'"),
        ("\n".join([lines[0], lines[1].replace("not_violating", "perhaps").replace("violating", "perhaps")]), ":2: said"),
        (f"{lines[0]}\n{'f' * 64},x,violating,P17", "no audit drew it"),
        (f"{lines[0]}\n{lines[1].split(',')[0]},x,violating,P99", "unknown policy 'P99'"),
        (f"{lines[0]}\n{lines[1].split(',')[0]},x,violating,", "names the policies"),
    ):
        (tmp_path / "broken.csv").write_text(broken + "\n")
        assert cli.main(["audit", str(read), "--answers", str(tmp_path / "broken.csv"), "--reader", "cy"]) != 0
        assert said in capsys.readouterr().err, said
    for words, said in (
        ([], "Write rushes audit FOLDER"),
        ([read], "one of them"),
        ([read, "--clips", tmp_path / "nowhere"], "holds no clips.jsonl"),
        ([read, "--answers", tmp_path / "nowhere.csv", "--reader", "ann"], "cannot read"),
        ([read, "--answers", table], "who read"),
    ):
        assert cli.main(["audit", *map(str, words)]) != 0
        assert said in capsys.readouterr().err, said
