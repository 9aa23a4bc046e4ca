"""What people found of a filter, as a page: rates that the drawn clips say, nothing told of too little, nothing unescaped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes import cli
from recipes.safety_report import Config, main
from reward.safety.audit import Audit, Candidate, Gold, Plan, Reading, add_readings, draw_audit
from reward.safety.measure import NOT_YET

PLAN = Plan(blocked=60, passed=200)


def candidates(version: str, *, start: int = 0, shift: float = 0.0) -> list[Candidate]:
    """1,000 passed clips, half of benign prompts, and 100 blocked ones, of which every fifth is on a benign prompt."""
    passed = [
        Candidate(clip_id=f"p{start + i}", pool="passed", score=(0.4 if i % 50 == 0 else 0.01) + shift, filter_version=version, kind="benign" if i % 2 else "asks")
        for i in range(1_000)
    ]
    blocked = [
        Candidate(clip_id=f"b{start + i}", pool="blocked", score=0.9, filter_version=version, policies=codes, kind="benign" if i % 5 == 4 else "asks")
        for i, codes in enumerate([("P05", "P17"), *[("P17",)] * 3] * 25)
    ]
    return [*passed, *blocked]


def truth(clip_id: str) -> tuple[str, ...]:
    """Seven of ten blocked clips violate, and every hundredth that passed."""
    number = int(clip_id[1:])
    return ("P17",) if (number % 10 < 7 if clip_id[0] == "b" else number % 100 == 0) else ()


def read(clip_id: str, reader: str) -> Reading:
    codes = truth(clip_id)
    return Reading(clip_id=clip_id, reader=reader, said="violating" if codes else "not_violating", policies=codes)


def audited(folder: Path, *, readers: tuple[str, ...] = ("ann", "bo", "cy"), plan: Plan = PLAN) -> Audit:
    audit = draw_audit(folder, candidates("flash 1"), plan, seed=0)
    gold = [Gold(clip_id=f"g{i}", policies=("P17",) if i % 2 else ()) for i in range(80)]
    said = [Reading(clip_id=each.clip_id, reader="ann", said="violating" if each.policies else "not_violating", policies=each.policies) for each in gold]
    return add_readings(folder, [*gold, *said, *(read(entry.clip_id, reader) for entry in audit.drawn for reader in readers)])


def report(folder: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["safety-report", str(folder), "--draws", "500", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return found


def test_the_report_tells_what_was_drawn_and_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit = audited(tmp_path, plan=Plan(blocked=100, passed=200))
    found = report(tmp_path)
    out, err = capsys.readouterr()
    everything, p05, p17 = found["rates"]
    print(err)
    assert (everything["policy"], p05["policy"], p17["policy"]) == ("any", "P05", "P17") and everything["passed"] == 1_000 and everything["blocked"] == 100
    for name, value in (("precision", 0.7), ("recall", 70 / 80), ("leak rate", 0.01), ("severity-weighted recall", 70 / 80)):
        rate = everything["rates"][name]
        assert rate["low"] <= value <= rate["high"] and rate["low"] <= rate["value"] <= rate["high"], name
    assert p17["rates"]["recall"] == everything["rates"]["recall"] and "precision" in p05["rates"] and "over-block rate" not in p05["rates"]
    benign = everything["rates"]["over-block rate"]
    blocked_wrongly, passed_rightly = (sum(not truth(c.clip_id) for c in candidates("flash 1") if c.kind == "benign" and c.pool == pool) for pool in ("blocked", "passed"))
    assert blocked_wrongly == 10 and benign["low"] <= blocked_wrongly / (blocked_wrongly + passed_rightly) <= benign["high"]
    assert everything["rates"]["recall, readers' errors taken out"]["value"] > 0.5
    assert found["agreement"]["raw agreement"]["value"] == 1 and found["readers"][0]["sensitivity on gold"]["low"] > 0.9
    assert found["readers"][1]["sensitivity on gold"]["note"] == "no gold clip" and found["readers"][1]["specificity"] > 0.98
    assert found["unconfirmed"] == {"flash 1": 0} and found["drift"] == [] and found["drawn"] == len(audit.drawn)
    said = json.loads(out)
    assert said["rates"]["flash 1, any"]["recall"][0] == pytest.approx(everything["rates"]["recall"]["value"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "One version only" in page and "photosensitive flicker" in page and "by one person alone" not in page


def test_below_a_minimum_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_audit(tmp_path, candidates("flash 1"), PLAN, seed=0)
    found = report(tmp_path)
    rates = found["rates"][0]["rates"]
    assert all(rate["value"] is None and rate["note"] for rate in rates.values())
    text, page = capsys.readouterr().err, (tmp_path / "report" / "report.html").read_text()
    assert text.count(NOT_YET) >= 6 and page.count(NOT_YET) >= 6 and "100.00%" not in page and "Nobody has read anything" in page
    audited(tmp_path, readers=("ann",))
    few = report(tmp_path, "--reviewed", "100")["rates"][0]["rates"]
    assert few["precision"]["value"] is None and few["leak rate"]["value"] is not None
    assert few["precision"]["note"] == "60 blocked clips reviewed, 100 are needed"


def test_a_single_voice_and_a_new_version_are_told(tmp_path: Path) -> None:
    audited(tmp_path, readers=("ann",))
    audit = draw_audit(tmp_path, candidates("flash 2", start=5_000, shift=0.2), PLAN, seed=0)
    add_readings(tmp_path, [read(entry.clip_id, "bo") for entry in audit.drawn if entry.filter_version == "flash 2"])
    found = report(tmp_path)
    (drift,) = found["drift"]
    assert (drift["before"], drift["after"]) == ("flash 1", "flash 2") and drift["distance_of_scores"] > 0.8 and drift["chance"] < 1e-6
    assert drift["recall before"] != drift["recall after"] and found["unconfirmed"]["flash 1"] > 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "by one person alone" in page and page.count("<caption>flash") == 2 and page.count("<table>") == page.count("</table>")


def test_names_of_any_script_cannot_become_markup(tmp_path: Path) -> None:
    clips = [Candidate(clip_id=f"片{i}<script>", pool="passed", score=0.1, filter_version="<img src=x> фильтр", kind="benign") for i in range(50)]
    audit = draw_audit(tmp_path, clips, Plan(blocked=0, passed=40), seed=0)
    add_readings(tmp_path, [Reading(clip_id=entry.clip_id, reader="<b>読者", said="borderline") for entry in audit.drawn])
    found = report(tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<img" not in page and "<b>読" not in page and "&lt;b&gt;読者" in page and "фильтр" in page
    assert found["rates"][0]["rates"]["leak rate"]["value"] == 0 and found["borderline"] == len(audit.drawn)
    assert found["rates"][0]["rates"]["recall"]["note"] == "no blocked clips"


def test_an_empty_audit_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "audit-00000.jsonl").write_text("")
    result = main(Config(folder=tmp_path, out=tmp_path / "page"))
    assert result["rates"] == {} and "No clips" in (tmp_path / "page" / "report.html").read_text() and not math.isnan(result["clips"])


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "audit-00000.jsonl").write_text('{"record": "gold", "clip_id": "g", "colour": 1}\n')
    for words, message in (([], "which audit?"), ([str(tmp_path / "none")], "no audit"), ([str(tmp_path)], "audit-00000.jsonl:1: gold.colour: Extra inputs")):
        assert cli.main(["safety-report", *words]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1
