"""What people found of a safety filter: precision, recall, leak rate and over-blocking with intervals, by policy and by version of the filter (`rushes safety-report FOLDER`).

Reads an audit, as `reward/safety/audit.py` draws and keeps it. Writes `report.json` and one page, `report.html`; prints the table on standard error. A rate that too few reviews
stand behind is "not measurable yet", never 100 %.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from align.config import Config as BaseConfig
from align.config import Count, Seed
from base_model.checkpoint import atomic_write, check_can_write
from base_model.errors import UserError
from recipes.report import finite
from recipes.statistics import clopper_pearson
from reward.agreement import bootstrap_units, dawid_skene, gwet_ac1, krippendorff_alpha, raw_agreement
from reward.safety.audit import ANY, BENIGN, Audit, Reading, blocked_for, by_clip, first_readings, load_audit, reader_errors, review_of, severity, unconfirmed, violates
from reward.safety.measure import Estimate, Minimum, Review, leak_rate, over_block_rate, precision, recall, unknown
from reward.safety.policy import Policy, load_policy

Row = dict[str, Any]
AGREEMENT = {"raw agreement": raw_agreement, "Gwet's AC1": gwet_ac1, "Krippendorff's alpha": krippendorff_alpha}
RATES = ("precision", "recall", "severity-weighted recall", "recall, readers' errors taken out", "leak rate", "over-block rate")


class Config(BaseConfig):
    folder: Path | None = None
    """Folder of an audit."""
    out: Path | None = None
    """Folder of `report.json` and `report.html`; none means `report` in the audit's folder."""
    policy: Path | None = None
    """Policy file that the codes are of; none means the shipped one."""
    reviewed: Count = 30
    """Reviewed clips of a pool below which a rate is not measurable yet; a smaller pool is measurable once all of it was reviewed."""
    violating: Count = 5
    """Violations seen below which recall is not."""
    gold: Count = 30
    """Gold clips, violating and harmless ones each, below which readers' errors are not taken out."""
    draws: Count = 4_000
    """Simulated totals of an interval."""
    seed: Seed = 0
    """Of the simulated totals."""


# Rates


def rates_of(cfg: Config, audit: Audit, policy: Policy, version: str, code: str) -> Row:
    """One row: counts and estimates under one version of the filter, of one policy or of any."""
    review, minimum = review_of(audit, version, code), Minimum(cfg.reviewed, cfg.violating)
    settings: dict[str, Any] = {"seed": cfg.seed, "draws": cfg.draws}
    once, errors = review_of(first_readings(audit), version, code), reader_errors(audit)
    readable = min(errors.positives, errors.negatives) >= cfg.gold and code == ANY
    rates: dict[str, Estimate] = {
        "precision": precision(blocked_for(audit, version, code), minimum, **settings),
        "recall": recall(review, minimum, **settings),
        "recall, readers' errors taken out": recall(once, minimum, readers=errors, **settings) if readable else unknown(f"{cfg.gold} gold clips of each kind are needed"),
        "leak rate": leak_rate(review.passed, minimum, **settings),
    }
    if code == ANY:
        rates["severity-weighted recall"] = by_severity(audit, policy, version, minimum, settings)
        rates["over-block rate"] = over_block_rate(review_of(audit, version, kind=BENIGN), minimum, **settings)
    else:
        del rates["recall, readers' errors taken out"]
    return {"filter": version, "policy": code, **counts(review), "rates": {name: rates[name] for name in RATES if name in rates}}


def counts(review: Review) -> Row:
    """Clips, reviewed ones and violations seen, of both pools."""
    row: Row = {}
    for name, groups in (("blocked", review.blocked), ("passed", review.passed)):
        row |= {name: sum(group.size for group in groups), f"{name}_reviewed": sum(group.reviewed for group in groups)}
        row[f"{name}_violating"] = sum(sum(group.violating) for group in groups)
    return row


def by_severity(audit: Audit, policy: Policy, version: str, minimum: Minimum, settings: Row) -> Estimate:
    """Recall with every violation weighed by the severity that the policy gives it; those of severity 0 weigh nothing."""

    def of(readings: Sequence[Reading]) -> int:
        return severity(readings, policy)

    return recall(review_of(audit, version, classes=of, num_classes=5), minimum, weights=range(5), **settings)


def codes_of(audit: Audit, version: str) -> list[str]:
    """Policies that anything was blocked for, or that a reader named."""
    mine = [entry for entry in audit.entries if entry.filter_version == version]
    drawn = {entry.clip_id for entry in mine if entry.why}
    named = {code for entry in mine for code in entry.policies} | {code for reading in audit.readings if reading.clip_id in drawn for code in reading.policies}
    return [ANY, *sorted(named)]


# Readers


def agreement_of(audit: Audit) -> Row:
    """How far readers agree about clips read twice or more: violating or not."""
    units = [[float(r.said == "violating") for r in readings if r.said != "cannot_tell" and not r.final] for readings in by_clip(audit.readings).values()]
    several = [unit for unit in units if len(unit) > 1]
    found = {name: bootstrap_units(statistic, several, draws=200) for name, statistic in AGREEMENT.items()}
    return {"clips": len(several), **{name: Estimate(*value) if several else unknown("no clip was read twice") for name, value in found.items()}}


def readers_of(cfg: Config, audit: Audit) -> list[Row]:
    """What every reader said, and how often they are right: by gold, and by Dawid and Skene where enough clips have three readers."""
    names = sorted({reading.reader for reading in audit.readings})
    fitted = by_dawid_skene(cfg, audit, names)
    rows: list[Row] = []
    for name in names:
        mine, errors = [reading for reading in audit.readings if reading.reader == name], reader_errors(audit, name)
        row: Row = {"reader": name, "clips": len(mine), "cannot_tell": sum(reading.said == "cannot_tell" for reading in mine)}
        for what, hits, trials in (("sensitivity", errors.hits, errors.positives), ("specificity", errors.rejections, errors.negatives)):
            row[f"{what} on gold"] = Estimate(*clopper_pearson(hits, trials)) if trials else unknown("no gold clip")
        rows.append(row | fitted.get(name, {"sensitivity": None, "specificity": None}))
    return rows


def by_dawid_skene(cfg: Config, audit: Audit, names: Sequence[str]) -> dict[str, Row]:
    """Each reader's sensitivity and specificity out of the answers alone; empty where fewer clips than `reviewed` have three answers."""
    answers = np.full((len(by_clip(audit.readings)), len(names)), -1, dtype=np.int64)
    for row, readings in enumerate(by_clip(audit.readings).values()):
        for reading in readings:
            if reading.said != "cannot_tell":
                answers[row, names.index(reading.reader)] = int(reading.said == "violating")
    answers = answers[(answers >= 0).sum(1) >= 3]
    if len(answers) < cfg.reviewed:
        return {}
    confusion = dawid_skene(answers, 2).confusion
    known = (answers >= 0).any(0)
    return {name: {"sensitivity": float(confusion[k, 1, 1]), "specificity": float(confusion[k, 0, 0])} for k, name in enumerate(names) if known[k]}


# Drift


def drift_of(audit: Audit, rates: Sequence[Row]) -> list[Row]:
    """Each version of the filter beside the one before: how far scores of clips moved (Kolmogorov and Smirnov), and what became of recall and leak rate."""
    from scipy.stats import ks_2samp

    scores = {version: [entry.score for entry in audit.entries if entry.filter_version == version] for version in audit.versions}
    found = {row["filter"]: row["rates"] for row in rates if row["policy"] == ANY}
    rows: list[Row] = []
    for before, after in pairwise(audit.versions):
        moved = ks_2samp(scores[before], scores[after])
        row: Row = {"before": before, "after": after, "clips_before": len(scores[before]), "clips_after": len(scores[after])}
        row |= {"distance_of_scores": float(moved.statistic), "chance": float(moved.pvalue)}
        for name in ("recall", "leak rate"):
            row |= {f"{name} before": found[before][name], f"{name} after": found[after][name]}
        rows.append(row)
    return rows


# The report


def report_of(cfg: Config, audit: Audit, policy: Policy) -> Row:
    """Everything, as the page takes it."""
    said = by_clip(audit.readings)
    drawn = {entry.clip_id for entry in audit.drawn}
    rates = [rates_of(cfg, audit, policy, version, code) for version in audit.versions for code in codes_of(audit, version)]
    return {
        "clips": len(audit.entries),
        "drawn": len(drawn),
        "drawn_by": dict(Counter(entry.why for entry in audit.drawn)),
        "read": len(drawn & said.keys()),
        "open": sum(violates(said[clip_id]) is None for clip_id in drawn & said.keys()),
        "borderline": sum(any(reading.said == "borderline" for reading in said[clip_id]) for clip_id in drawn & said.keys()),
        "unconfirmed": {version: len(unconfirmed(audit, version)) for version in audit.versions},
        "policy_versions": sorted({entry.policy_version for entry in audit.entries} | {reading.policy_version for reading in audit.readings}),
        "policy_names": {rule.code: rule.name for rule in policy.rules},
        "rates": rates,
        "agreement": agreement_of(audit),
        "readers": readers_of(cfg, audit),
        "drift": drift_of(audit, rates),
    }


def as_json(value: Any) -> Any:
    """Estimates as objects; what is not measurable is null."""
    if isinstance(value, Estimate):
        return value._asdict()
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, list) else value


def as_text(report: Row) -> str:
    """The table, for a terminal."""
    lines = [f"{report['clips']} clips, {report['drawn']} drawn, {report['read']} read, {report['open']} of them open"]
    for row in report["rates"]:
        pools = ", ".join(f"{pool} {row[pool]} ({row[f'{pool}_reviewed']} reviewed)" for pool in ("blocked", "passed"))
        lines.append(f"{row['filter']}, policy {row['policy']}: {pools}")
        lines += [f"  {name:<34}{value}" for name, value in row["rates"].items()]
    return "\n".join(lines)


def render_page(report: Row) -> str:
    """report.html as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return room.get_template("safety_report.html").render(report=report, rates=RATES, alone=sum(report["unconfirmed"].values()))


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Reads the audit and writes the report. `resume` changes nothing: a report is made anew."""
    if cfg.folder is None:
        raise UserError("which audit? Write rushes safety-report FOLDER")
    out = cfg.folder / "report" if cfg.out is None else cfg.out
    policy = load_policy(cfg.policy)
    audit = load_audit(cfg.folder, policy)
    check_can_write(out)
    report = report_of(cfg, audit, policy)
    atomic_write(out / "report.json", (json.dumps(finite(as_json(report)), indent=2, ensure_ascii=False) + "\n").encode())
    atomic_write(out / "report.html", render_page(report).encode())
    print(as_text(report), file=sys.stderr, flush=True)
    rates = {f"{row['filter']}, {row['policy']}": {name: None if math.isnan(value.value) else list(value[:3]) for name, value in row["rates"].items()} for row in report["rates"]}
    return {"report": str(out / "report.html"), "clips": report["clips"], "drawn": report["drawn"], "read": report["read"], "open": report["open"], "rates": rates}
