"""Judge a reward model on answers it has not seen (`rushes evaluate-reward`).

Every clip that people judged in a split is scored once. Then, for each dimension: how often the model orders a pair as people did, without ties and with them; how its
probabilities compare with what happened, before and after a temperature, a tie parameter and a share of careless answers are fitted on the split `validation`;
whether a wider margin means more; Kendall's tau of whole rankings; and the same by pair of generators. Beside it stand what needs no model (a coin, the prompt
alone, weight-free signals alone) and what another person reaches. Nothing is chosen on the judged split but what is called an oracle.

Writes `report.json` with everything and `report.html`, one page. A clip without a score is left out and counted, never taken for a tie.

Then good clips are changed, and the score has to stay or to fall (`reward/metamorphic.py`): drawn clips of the built-in world, and real footage where `--footage` names some.
Last, with `--takes` and `--guard`, how far the model can be optimised: the best of n clips by its score, looked at by a second scorer. This asks for no rankings.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Seed, Whole, resolved
from align.progress import Progress
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from base_model.video.files import write_atomic
from base_model.video.store import ClipStore
from recipes import best_of_n
from recipes.changed_clips import checked, ranked_most, within_prompt_std
from recipes.charts import Series, line_chart
from recipes.doctor import hardware
from recipes.report import NOT_MEASURED, finite, flat, interval_text
from recipes.reward_model import Table, as_tensors, events_hash, signal_only, usable_events
from recipes.scorers import card_of, check_watches_another, load_scorer, tier_of
from reward.accuracy import Answers, Signs, answers_of, best_threshold, differences, tau_per_ranking, with_ties, without_ties
from reward.agreement import Array, Pair, pairs_of, person_by_person, three_way_agreement
from reward.calibration import (
    OUTCOMES,
    Calibration,
    brier,
    by_margin,
    calibrated_error,
    decided,
    expected_calibration_error,
    falls,
    fit_calibration,
    from_favourite,
    log_loss,
    probabilities,
    reliability,
)
from reward.comparisons import Clip, Comparisons, RankingEvent, load_comparisons
from reward.features import signal_features
from reward.model import TIER, CalibratedScorer
from reward.types import one_rate

MODEL, SIGNALS_ONLY, PROMPT_ONLY = "reward model", "signals only", "prompt only"
CARD = "reward_card.json"
Score = Mapping[str, float]
"""clip_id -> score in one dimension."""


class Config(BaseConfig):
    out: Path = Path("runs/evaluate-reward")
    """Folder of `report.json` and `report.html`."""
    model: Path = Path("runs/reward-model")
    """Folder of the reward model, of any tier."""
    device: str = "cpu"
    """Where a vision-language model runs; the smaller tiers run on the CPU."""
    comparisons: Path | None = Path("runs/rankings")
    """Folder of rankings, as `reward/comparisons.py` writes it; null: only what needs none is told."""
    clips: Path = Path("runs/candidates")
    """Clip store with the ranked clips."""
    takes: Path | None = None
    """Clip store with many clips of each prompt by one generator, of which the best of n are taken, whatever the filters say: 64 of each of 40 prompts say much, 4 little."""
    guard: Path | None = None
    """Folder of a second reward model, from other people's rankings and another start, which looks at them."""
    split: Literal["test", "val"] = "test"
    """Whose answers judge the model."""
    validation: Literal["val", "train"] = "val"
    """Another split, on whose answers threshold, temperature, tie parameter and share of careless answers are chosen."""
    batch: Count = 64
    """Clips scored at once."""
    drawn: Whole = 24
    """Drawn clips of the built-in world that are changed in every way of `reward/metamorphic.py`; 0: none, for a model that was never taught that world."""
    footage: Path | None = None
    """Folder of real clips that are changed too, in the ways that ask nothing of the prompt."""
    seed: Seed = 0
    """Seed of resampling and simulation."""


class Looked(NamedTuple):
    """Numbers of every clip."""

    row: dict[str, int]  # clip_id -> row
    values: Tensor  # [C,W]

    def column(self, values: Tensor, index: int) -> Score:
        return {clip_id: values[row, index].item() for clip_id, row in self.row.items()}


class Asked(NamedTuple):
    """What people answered in one dimension of one split."""

    events: list[RankingEvent]
    pairs: list[Pair]
    told: Answers

    def difference(self, score: Score) -> Array:
        """Of each answer's pair, [N]."""
        return differences(self.pairs, score)[self.told.pair]


# Scoring


@torch.no_grad()
def look(clip_ids: Sequence[str], data: Comparisons, store: ClipStore, of: Callable[[Tensor, list[str]], Tensor], *, batch: int, label: str) -> Looked:
    """What `of` (clips [B,T,3,H,W], their prompts) -> [B,W] says of each clip; every one is decoded once, clips of one size together."""
    ids: list[str] = []
    values: list[Tensor] = []
    with Progress(label, total=len(clip_ids)) as progress:
        for clips in in_batches(clip_ids, data, store, batch):
            prompts = [data.prompts[data.clips[clip_id].prompt_id].text for clip_id in clips]
            ids += clips
            values.append(of(torch.stack(list(clips.values())), prompts))
            progress.advance(steps=len(clips))
    return Looked({clip_id: row for row, clip_id in enumerate(ids)}, torch.cat(values))


def in_batches(clip_ids: Sequence[str], data: Comparisons, store: ClipStore, batch: int) -> Iterator[dict[str, Tensor]]:
    """Clips [T,3,H,W] of one size by id, at most `batch` at once."""

    def size(clip_id: str) -> tuple[int, int, int]:
        clip = data.clips[clip_id]
        return clip.num_frames, clip.height, clip.width

    waiting: dict[str, Tensor] = {}
    for clip_id in sorted(clip_ids, key=size):
        video = store.load(clip_id)
        if waiting and (len(waiting) == batch or video.shape != next(iter(waiting.values())).shape):
            yield waiting
            waiting = {}
        waiting[clip_id] = video
    yield waiting


def check_clips(clip_ids: Sequence[str], store: ClipStore) -> None:
    """Raises UserError, before any work, where the store lacks one."""
    missing = [clip_id for clip_id in clip_ids if not store.record_path(clip_id).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(clip_ids)} ranked clips are not in the clip store, {store.record_path(missing[0])}. Give --clips the store that was ranked")


def judged_rate(cfg: Config, data: Comparisons, tier: str) -> float | None:
    """The frame rate of the judged clips; None where they have several, which only a matcher may score. Raises UserError where another tier would have to."""
    rates = [data.clips[clip_id].fps for event in usable_events(data) if data.split[event.prompt_id] in (cfg.split, cfg.validation) for clip_id in event.clip_ids]
    rate = one_rate(rates)
    if rates and rate is None and tier != TIER:
        named = ", ".join(f"{rate:g}" for rate in sorted(set(rates)))
        raise UserError(f"the ranked clips have {named} frames a second, and the reward model scores clips of one rate, {cfg.comparisons}. Judge it on clips of one")
    return rate


def signal_scores(train: Sequence[RankingEvent], signals: Looked, dims: tuple[str, ...]) -> Tensor:
    """The best linear score of the signals, fitted on training answers, of every clip [C,R]."""
    k = max(len(event.clip_ids) for event in train)
    table = Table(signals.values, *as_tensors(train, signals.row, dims, k, Counter(event.prompt_id for event in train)))
    return signal_only(table, len(dims), k)(signals.values)


# Judging


def asked(events: Sequence[RankingEvent], component: Mapping[str, str]) -> Asked:
    pairs = pairs_of(events)
    return Asked(list(events), pairs, answers_of(pairs, component))


def judge(score: Score, test: Asked, validation: Asked, component: Mapping[str, str], seed: int) -> dict[str, Any]:
    """Everything about one scorer in one dimension; what was chosen on validation is nan or None where that has no answers."""
    difference, other = test.difference(score), validation.difference(score)
    known, usable = np.isfinite(difference), np.isfinite(other)
    answer, cluster = test.told.answer, test.told.cluster
    honest, oracle = best_threshold(validation.told.answer, other), best_threshold(answer, difference)
    fitted = fit_calibration(validation.told.answer[usable], other[usable]) if usable.any() else None
    tau, rankings = tau_per_ranking(test.events, score, component, seed=seed)
    return {
        "accuracy": without_ties(answer, difference, cluster, seed=seed)._asdict(),
        "with_ties": with_ties(answer, difference, cluster, honest.epsilon, seed=seed)._asdict(),
        "threshold": honest.epsilon,
        "with_ties_oracle": oracle.accuracy,
        "threshold_oracle": oracle.epsilon,
        "kendall_tau": tau._asdict(),
        "rankings": rankings,
        "unscored_answers": int((~known).sum()),
        "calibrated": None if fitted is None else trust(answer[known], difference[known], fitted, seed),
    }


def trust(answer: Signs, difference: Array, calibration: Calibration, seed: int) -> dict[str, Any]:
    """Probabilities against what happened: of the three outcomes, and of the better clip where people decided."""
    three = from_favourite(probabilities(difference, calibration), answer)
    row: dict[str, Any] = calibration._asdict()
    for name, (probability, outcome) in (("three_way", three), ("decided", decided(*three))):
        row[name] = {
            "nll": log_loss(probability, outcome),
            "brier": brier(probability, outcome),
            "ece": expected_calibration_error(probability, outcome),
            "ece_if_right": calibrated_error(probability, seed=seed)._asdict(),
        }
    return row


def curves(score: Score, test: Asked, calibration: Calibration, seed: int) -> dict[str, Any]:
    """Reliability of the three outcomes, and accuracy by margin."""
    difference = test.difference(score)
    known = np.isfinite(difference)
    answer, cluster = test.told.answer[known], test.told.cluster[known]
    bins = reliability(*from_favourite(probabilities(difference[known], calibration), answer))
    margins = by_margin(answer, difference[known], cluster, calibration, seed=seed)
    return {
        "reliability": {outcome: [row._asdict() for row in rows] for outcome, rows in zip(OUTCOMES, bins, strict=True)},
        "margins": [{**row._asdict(), "accuracy": row.accuracy._asdict()} for row in margins],
        "margins_fall": falls(margins),
    }


def without_a_model(test: Asked, everyone: Sequence[Pair], component: Mapping[str, str], seed: int) -> dict[str, Any]:
    """A coin, and people predicting people (over the answers of all splits: few pairs of one are judged twice)."""
    ties = float((test.told.answer == 0).mean())
    return {
        "coin flip": {"accuracy": 0.5, "with_ties": (1 - ties) / 2},
        "another person": {
            "accuracy": person_by_person(everyone, component, seed=seed)._asdict(),
            "with_ties": three_way_agreement(everyone, component, seed=seed)._asdict(),
        },
    }


def by_generators(score: Score, test: Asked, clips: Mapping[str, Clip], epsilon: float, seed: int) -> list[dict[str, Any]]:
    """Accuracy for every pair of generators, and how often people and the model prefer the first one (of decided answers; None within one generator)."""
    makers = generator_names(clips)
    names = [(makers[pair.first], makers[pair.second]) for pair in test.pairs]
    couples = sorted({(min(pair), max(pair)) for pair in names})
    number = {couple: n for n, couple in enumerate(couples)}
    couple_of = np.array([number[min(pair), max(pair)] for pair in names])[test.told.pair]  # [N]
    turn = np.array([1 if first <= second else -1 for first, second in names])[test.told.pair]  # [N] so that the first generator's clip is the first
    difference = test.difference(score) * turn
    known = np.isfinite(difference)
    rows = []
    for n, (first, second) in enumerate(couples):
        here = (couple_of == n) & known
        answer, margin, cluster = (test.told.answer * turn)[here], difference[here], test.told.cluster[here]
        prefers = [float((np.sign(part[answer != 0]) + 1).mean() / 2) if first != second and answer.any() else None for part in (answer, margin)]
        rows.append(
            {
                "first": first,
                "second": second,
                "answers": int(here.sum()),
                "unscored_answers": int(((couple_of == n) & ~known).sum()),
                "accuracy": without_ties(answer, margin, cluster, seed=seed)._asdict(),
                "with_ties": with_ties(answer, margin, cluster, epsilon, seed=seed)._asdict(),
                **dict(zip(("people_prefer_first", "model_prefers_first"), prefers, strict=True)),
            }
        )
    return rows


def generator_names(clips: Mapping[str, Clip]) -> dict[str, str]:
    """clip_id -> its generator, with the revision where one generator comes in several."""
    revisions: dict[str, set[str]] = {}
    for clip in clips.values():
        revisions.setdefault(clip.generator, set()).add(clip.generator_rev)
    return {clip_id: (clip.generator or "unknown") + (f" @ {clip.generator_rev[:8] or 'unknown'}" if len(revisions[clip.generator]) > 1 else "") for clip_id, clip in clips.items()}


# The report


def evaluate_model(cfg: Config, model: CalibratedScorer, data: Comparisons, store: ClipStore) -> dict[str, Any]:
    """What `report.json` holds, without lineage. Raises UserError where there is nothing to judge by."""
    events = usable_events(data)
    if cfg.split == cfg.validation:
        raise UserError(f"split and validation are both {cfg.split}: a threshold chosen on the answers it is judged by is an oracle. Choose another --validation")
    there = {event.dimension for event in events if data.split[event.prompt_id] == cfg.split}
    if not there:
        raise UserError(f"no rankings in the split {cfg.split}, {cfg.comparisons}. Rank more prompts ({len(events)} usable answers found), or choose another --split")
    dims = tuple(dim for dim in model.dims if dim in there)
    if not dims:
        raise UserError(f"the model scores {', '.join(model.dims)}, people were asked about {', '.join(sorted(there))}, {cfg.comparisons}. Give a model of that dimension")
    in_split = {name: [event for event in events if data.split[event.prompt_id] == name and event.dimension in dims] for name in ("train", "val", "test")}
    ids = {name: {clip_id for event in chosen for clip_id in event.clip_ids} for name, chosen in in_split.items()}
    to_score = sorted(ids[cfg.split] | ids[cfg.validation])
    others = sorted(ids["train"] - set(to_score))
    check_clips([*to_score, *others], store)

    width = len(model.dims)
    both = look(to_score, data, store, lambda clips, prompts: torch.cat([model(clips, prompts).mean, signal_features(clips)], dim=-1), batch=cfg.batch, label="scores")
    scorers = {MODEL: {dim: both.column(both.values, model.dims.index(dim)) for dim in dims}}
    if in_split["train"]:
        rest = look(others, data, store, lambda clips, _: signal_features(clips), batch=cfg.batch, label="signals") if others else Looked({}, both.values[:0, width:])
        signals = Looked({clip_id: row for row, clip_id in enumerate((*both.row, *rest.row))}, torch.cat([both.values[:, width:], rest.values]))
        fitted = signal_scores(in_split["train"], signals, dims)
        scorers[SIGNALS_ONLY] = {dim: signals.column(fitted, r) for r, dim in enumerate(dims)}
    scorers[PROMPT_ONLY] = {dim: dict.fromkeys(to_score, 0.0) for dim in dims}
    std = within_prompt_std(scorers[MODEL], {clip_id: data.clips[clip_id].prompt_id for clip_id in to_score})
    unscored = [clip_id for clip_id in ids[cfg.split] if not all(math.isfinite(scorers[MODEL][dim][clip_id]) for dim in dims)]
    return {
        "split": cfg.split,
        "validation": cfg.validation,
        "clips": len(ids[cfg.split]),
        "unscored_clips": len(unscored),
        "not_judged": sorted((there | set(model.dims)) - set(dims)),
        "metamorphic": checked(model, std, *ranked_most(data.clips[clip_id] for clip_id in to_score), drawn=cfg.drawn, footage=cfg.footage, seed=cfg.seed, batch=cfg.batch),
        "dimensions": {dim: judge_dimension(dim, cfg, model, data, {name: scores[dim] for name, scores in scorers.items()}) for dim in dims},
    }


def judge_dimension(dim: str, cfg: Config, model: CalibratedScorer, data: Comparisons, scorers: Mapping[str, Score]) -> dict[str, Any]:
    events = [event for event in usable_events(data) if event.dimension == dim]
    test, validation = (asked([event for event in events if data.split[event.prompt_id] == name], data.component) for name in (cfg.split, cfg.validation))
    found = {name: judge(score, test, validation, data.component, cfg.seed) for name, score in scorers.items()}
    difference = test.difference(scorers[MODEL])
    known = np.isfinite(difference)
    stored = Calibration(1.0, float(model.log_tie[model.dims.index(dim), 0]))  # scores are divided by the model's own temperature already
    fitted = found[MODEL]["calibrated"]
    return {
        "answers": len(test.told.answer),
        "decided_answers": int((test.told.answer != 0).sum()),
        "tie_share": float((test.told.answer == 0).mean()),
        "pairs": len(test.pairs),
        "prompts": len({pair.prompt_id for pair in test.pairs}),
        "components": int(test.told.cluster.max()) + 1,
        "people": len({event.annotator_id for event in test.events}),
        "validation_answers": len(validation.told.answer),
        "scorers": found,
        "without_a_model": without_a_model(test, pairs_of(events), data.component, cfg.seed),
        "as_stored": trust(test.told.answer[known], difference[known], stored, cfg.seed),
        **curves(scorers[MODEL], test, Calibration(*(fitted[name] for name in Calibration._fields)) if fitted else stored, cfg.seed),
        "generators": by_generators(scorers[MODEL], test, data.clips, found[MODEL]["threshold"], cfg.seed),
    }


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of one dimension as text: a row a scorer, floors and ceiling included, under `COLUMNS`."""
    rows = []
    for name, row in [*found["scorers"].items(), *found["without_a_model"].items()]:
        three, two = ((row.get("calibrated") or {}).get(part) or {} for part in ("three_way", "decided"))
        numbers = [row.get("kendall_tau"), three.get("nll"), three.get("brier"), three.get("ece"), two.get("ece")]
        rows.append((name, *(interval_text(row.get(key)) for key in ("accuracy", "with_ties", "with_ties_oracle")), *(interval_text(value, percent=False) for value in numbers)))
    return [tuple("·" if cell == NOT_MEASURED else cell for cell in row) for row in rows]


COLUMNS = ("", "accuracy, no ties", "with ties", "with ties, oracle", "Kendall's tau-b", "NLL", "Brier", "ECE", "ECE, decided")


def as_text(results: Mapping[str, Any]) -> str:
    """The tables for a terminal."""
    lines = []
    for dim, found in results["dimensions"].items():
        lines += [*_aligned([(dim, *COLUMNS[1:]), *table_rows(found)]), ""]
    for name, table in results["metamorphic"].items():
        for dim, found in table.items():
            rows = [(f"{name} clips changed, {dim}", "must", "cases", "passed")]
            rows += [(row["check"], row["expect"], str(row["cases"]), interval_text(row["passed"])) for row in (*found["checks"], found["all"])]
            lines += [*_aligned(rows), ""]
    for dim, found in _best_of_n(results).items():
        lines += [*_aligned([(f"best of n, {dim}", *best_of_n.COLUMNS[1:]), *best_of_n.table_rows(found)]), best_of_n.sentence(found), ""]
    return "\n".join(lines)


def _best_of_n(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """dimension -> what was found of it."""
    return (results.get("best_of_n") or {"dimensions": {}})["dimensions"]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(size) for cell, size in zip(row, width, strict=True)).rstrip() for row in rows]


def charts(found: Mapping[str, Any]) -> dict[str, str]:
    """Reliability and accuracy by margin, as SVG; what has no point to draw is left out."""
    lines = [
        Series(outcome, look, tuple(row["predicted"] for row in bins), tuple(row["observed"] for row in bins))
        for (outcome, bins), look in zip(found["reliability"].items(), ("favourite", "tied", "other"), strict=True)
    ]
    drawn = {}
    if any(line.x for line in lines):
        diagonal = Series("as predicted", "diagonal", (0.0, 1.0), (0.0, 1.0))
        drawn["reliability"] = line_chart([diagonal, *lines], name="Reliability", x_label="predicted probability", percent=True)
    margins = found["margins"]
    if margins:
        x = tuple(row["mean"] for row in margins)
        promised = Series("as predicted", "diagonal", x, tuple(row["promised"] for row in margins))
        right = Series("decided as people did", "favourite", x, tuple(row["accuracy"]["mean"] for row in margins))
        drawn["margins"] = line_chart([promised, right], name="Accuracy by margin", x_label="difference of scores", percent=True, limit=0.5)
    return drawn


def render_page(results: Mapping[str, Any]) -> str:
    """report.html as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    room.filters.update(interval=interval_text, flat=flat)
    dims = results["dimensions"]
    return room.get_template("evaluate_reward.html").render(
        results=finite(results),
        columns=COLUMNS,
        tables={dim: table_rows(found) for dim, found in dims.items()},
        charts={dim: charts(found) for dim, found in dims.items()},
        best_of_n=[(dim, found, best_of_n.sentence(found), best_of_n.table_rows(found), best_of_n.chart(found)) for dim, found in _best_of_n(results).items()],
        best_of_n_columns=best_of_n.COLUMNS,
        unknown=NOT_MEASURED,
    )


NO_RANKINGS: dict[str, Any] = {"split": None, "validation": None, "clips": 0, "unscored_clips": 0, "not_judged": [], "metamorphic": {}, "dimensions": {}}
"""What `evaluate_model` would say without any."""


def second_scorer(cfg: Config) -> CalibratedScorer | None:
    """The guard; None where best of n is not asked for. Raises UserError, before any work, where takes or guard come alone or cannot be used, or the guard is the model itself."""
    if cfg.takes is None and cfg.guard is None:
        return None
    if cfg.takes is None or cfg.guard is None:
        raise UserError("takes and guard: best of n needs both, the clips and who looks at those that are picked. Give --takes STORE and --guard FOLDER")
    check_watches_another(cfg.guard, cfg.model)
    best_of_n.takes_of(ClipStore(cfg.takes))
    return load_scorer(cfg.guard, device=cfg.device)


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Judges the model, writes the report, prints the tables on standard error. `resume` changes nothing: a report is made anew."""
    check_can_write(cfg.out)
    if cfg.comparisons is None and cfg.takes is None:
        raise UserError("comparisons and takes: there is nothing to judge by. Give --comparisons FOLDER, or --takes STORE and --guard FOLDER")
    data = None if cfg.comparisons is None else load_comparisons(cfg.comparisons)
    card = card_of(cfg.model)
    model = load_scorer(cfg.model, fps=None if data is None else judged_rate(cfg, data, tier_of(card)), device=cfg.device)
    guard = second_scorer(cfg)
    results = NO_RANKINGS if data is None else evaluate_model(cfg, model, data, ClipStore(cfg.clips))
    answers = None if data is None else events_hash(usable_events(data))
    results = results | {
        "best_of_n": None if guard is None or cfg.takes is None else best_of_n.best_of_n_of(model, guard, ClipStore(cfg.takes), batch=cfg.batch, seed=cfg.seed),
        "trained_on_the_split_train_of_these_answers": None if answers is None else card.get("data_sha256") == answers,
        "lineage": {"weights_sha256": card["sha256"], "answers_sha256": answers, "trained_with": card.get("command")},
        "hardware": hardware(),
        **resolved(cfg),
    }
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_atomic(cfg.out / "report.json", (json.dumps(finite(results), indent=2) + "\n").encode())
    write_atomic(cfg.out / "report.html", render_page(results).encode())
    print(as_text(results), file=sys.stderr, flush=True)
    passed = {name: {dim: found["all"]["passed"] for dim, found in table.items()} for name, table in results["metamorphic"].items() if table}
    short = {"report": str(cfg.out / "report.html"), "metamorphic": passed, "unscored_clips": results["unscored_clips"]}
    if _best_of_n(results):
        short["best_of_n"] = {dim: best_of_n.sentence(found) for dim, found in _best_of_n(results).items()}
    return {**short, **{dim: _short(found) for dim, found in results["dimensions"].items()}}


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line says: the model between floor and ceiling."""
    model, beside = found["scorers"][MODEL], found["without_a_model"]["another person"]
    kept = ("accuracy", "with_ties", "with_ties_oracle", "kendall_tau")
    calibrated = model["calibrated"] or {"three_way": {"ece": math.nan, "ece_if_right": None}}
    return {
        **{key: model[key] for key in kept},
        "ece": calibrated["three_way"]["ece"],
        "ece_if_right": calibrated["three_way"]["ece_if_right"],
        "tie_share": found["tie_share"],
        "signals_only": found["scorers"].get(SIGNALS_ONLY, {}).get("accuracy"),
        "another_person": beside["accuracy"],
    }
