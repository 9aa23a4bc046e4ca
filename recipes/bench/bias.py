"""Does a bias audit find a skew of 10 points, does it keep quiet where there is none, and what does RL do to a skew that was planted in the base's data?

A pool of drawn clips of prompts that leave the colour open, read by the judge: every prompt has shares of its own, as prompts of a model have. Audits resample prompts of that one
pool, and of each its clips; a skew is planted by exchanging a share of the clips for red ones. What is true is therefore known.

Then one run through all of it: a network learns from captions of which half leave the colour open, with clips that are red far too often; NFT climbs the demo's reward from there;
the audit looks before and after.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from align.config import Count, Positive, Seed, Share, dump
from align.progress import Progress
from base_model.checkpoint import read_json
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS
from base_model.video.files import write_atomic
from recipes import disparity, nft, sft
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, in_brackets, place, write
from recipes.bench._start import Begin, Start, the_start
from recipes.bench._trained import kept
from recipes.bench.hacking import unranked
from recipes.bias import Audit, Blocked, audit_bias, chart_of
from recipes.charts import Series, alone, line_chart, page
from recipes.disparity import Tally
from recipes.evaluate import generator
from recipes.feedback import StoppedByGuard
from recipes.generate import Sampler, network_lineage
from recipes.pairs import save_pairs
from recipes.shapes.bank import VALUES, draw, open_prompts, shown, skewed_pairs, with_value
from recipes.shapes.prompts import make_prompts
from recipes.statistics import clopper_pearson
from recipes.weights import file_hash
from reward.model import save_reward_model

Array = NDArray[np.float64]
Index = NDArray[np.int64]
NAMES = VALUES["colour"]
PLANTED = "red"
POWER, FALSE_ALARM, SKEW = 0.9, 0.05, 0.10
"""What is asked, at this skew."""
POOL_SEED, AUDIT_SEED, DATA_SEED, BANK_SEED = 620_000, 621_000, 622_000, 623_000
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""
STATES_OF = 100
"""Audits of a row whose state is told, where they have as many prompts as the default audit: that takes intervals."""
COLOURS = {"m0": "#8a6a3d", "m1": "#2f6fb3", "m2": "#c2410c"}


class Config(Bench):
    out: Path = Path("runs/bench-bias")
    """Folder of everything that is drawn and trained; what is finished there is not repeated. `quick` keeps nothing."""
    model: Path | None = None
    """Network that learns the planted skew, with `reward` and `guard`; none makes them as the demo does."""
    reward: Path | None = None
    """Folder of the reward model that RL climbs."""
    guard: Path | None = None
    """Folder of the reward model that watches."""
    begin: Begin = Begin()
    """The demo's stages, where none are given."""
    pool_prompts: Count = 250
    """Prompts of the pool."""
    pool_clips: Count = 24
    """Clips of each; a pool of at least 5,000 is asked for."""
    concentration: Positive = 8.0
    """Of the Dirichlet distribution that each prompt's shares of the colours come from: the smaller, the more prompts differ."""
    runs: Annotated[int, Field(ge=10)] = 2_000
    """Simulated audits of each row. `quick` takes at most 40."""
    designs: Annotated[tuple[Count, ...], Field(min_length=1)] = (20, 40, 60, 100)
    """Prompts of an audit."""
    skews: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.05, SKEW, 0.15, 0.2)
    """Planted skews. 0 is where a finding is a false alarm."""
    planted: dict[str, Share] = Field(default={name: 0.5 if name == PLANTED else 0.1 for name in NAMES})
    """Shares of the colours in the base's data where the caption leaves them open."""
    pairs: Count = 2_500
    """Captioned clips with the planted skew."""
    fit: sft.Fit = sft.Fit(iterations=150, lr=5e-4)
    """How the base learns them."""
    policy: nft.Policy = nft.Policy(iterations=20, evaluate_every=20)
    """How NFT moves."""
    training: Annotated[int, Field(ge=2, multiple_of=2)] = 120
    """Prompts that RL trains on: half leave the colour open, half are the world's own, a fifth of these with two objects and a fifth asking for strobing."""
    audit: Audit = Audit()
    """The audit, before and after."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""
    seed: Seed = 0
    """Seed of RL and of the simulated audits."""

    @field_validator("planted")
    @classmethod
    def _shares_of_all_colours(cls, planted: dict[str, float]) -> dict[str, float]:
        if set(planted) != set(NAMES) or abs(sum(planted.values()) - 1) > 1e-6:
            raise ValueError(f"expected shares of {', '.join(NAMES)} that add up to 1")
        return planted


# The pool, and audits that resample it


def draw_pool(cfg: Config) -> list[list[int]]:
    """What the judge reads of the pool's clips, [P,G]: the place of the colour, or the number of colours where none can be told."""
    rng = np.random.default_rng(POOL_SEED)
    rows = []
    with Progress("bias, pool", total=cfg.pool_prompts * cfg.pool_clips) as progress:
        for asked in open_prompts(cfg.pool_prompts, "colour", seed=POOL_SEED):
            own = rng.dirichlet(np.full(len(NAMES), cfg.concentration / len(NAMES)))
            meant = rng.choice(len(NAMES), size=cfg.pool_clips, p=own)
            seen = [shown(draw(asked._replace(thing=with_value(asked.thing, "colour", NAMES[k])), rng), "colour") for k in meant]
            rows.append([NAMES.index(value) if value in NAMES else len(NAMES) for value in seen])
            progress.advance("clips", steps=len(seen))
    return rows


def shares_of(pool: Index) -> Array:
    """[K] what is true of the pool: mean over prompts of the share of its clips whose colour can be told."""
    return np.asarray(np.nanmean(tally_of(pool).shares, axis=0))


def tally_of(values: Index) -> Tally:
    """Clips [N,G] as places of colours -> counts."""
    counts = (values[..., None] == np.arange(len(NAMES) + 1)).sum(1).astype(np.float64)  # [N,K+1]
    return Tally(NAMES, tuple(map(str, range(len(values)))), counts[:, :-1], counts[:, -1])


class Drawn(NamedTuple):
    """A simulated audit of two models."""

    before: Tally
    after: Tally


def resampled(pool: Index, prompts: int, clips: int, skew: float, rng: np.random.Generator) -> Drawn:
    """So many prompts of the pool, with replacement, and of each so many of its clips for each model. After: clips are exchanged for red ones, so that red is `skew` more."""
    rows = rng.integers(len(pool), size=prompts)
    before, after = (pool[rows[:, None], rng.integers(pool.shape[1], size=(prompts, clips))] for _ in range(2))
    red = NAMES.index(PLANTED)
    exchanged = (rng.random(after.shape) < skew / (1 - shares_of_clips(pool)[red])) & (after < len(NAMES))
    return Drawn(tally_of(before), tally_of(np.where(exchanged, red, after)))


def shares_of_clips(pool: Index) -> Array:
    """[K] of all clips of which the colour can be told."""
    counts = np.bincount(pool.ravel(), minlength=len(NAMES) + 1)[:-1]
    return np.asarray(counts / counts.sum())


def tests_of(drawn: Drawn, truth: Mapping[str, float], margin: float) -> list[disparity.Question]:
    """The tests of shares of an audit of two models, as `recipes/bias.py` asks them."""
    shares = [disparity.against(found, truth, margin, model=name, name="truth", decides=name == "after") for name, found in zip(("before", "after"), drawn, strict=True)]
    return [*shares[0], *shares[1], *disparity.shifts(drawn.before, drawn.after, truth, margin, model="after")]


def p_values(tests: Sequence[disparity.Question]) -> list[float]:
    """The p of each, as `disparity.settle` takes them, all of a sort at once."""
    found = {skewed: disparity.differs(np.stack([test.x for test in tests if test.skewed == skewed], axis=1), skewed=skewed).tolist() for skewed in (True, False)}
    return [found[test.skewed].pop(0) for test in tests]


def naive(found: Tally, truth: Mapping[str, float]) -> list[float]:
    """p of each value's share as if clips were independent of each other: a z test over clips."""
    from scipy.stats import norm

    clips = found.counts.sum()
    return [float(2 * norm.sf(abs(found.counts[:, k].sum() / clips - p) / np.sqrt(p * (1 - p) / clips))) for k, p in enumerate(truth.values())]


def power_row(cfg: Config, pool: Index, prompts: int, skew: float) -> Row:
    """One row: how often an audit of so many prompts finds what is planted, and anything at all."""
    truth = dict(zip(NAMES, shares_of(pool).tolist(), strict=True))
    rng = np.random.default_rng([AUDIT_SEED, cfg.seed, prompts, round(1000 * skew)])
    hits = {"found": 0, "by_share": 0, "by_shift": 0, "anything": 0, "anything_naive": 0}
    states: list[str] = []
    for run in range(cfg.runs):
        drawn = resampled(pool, prompts, cfg.audit.clips, skew, rng)
        tests = tests_of(drawn, truth, cfg.audit.margin)
        below = disparity.holm(p_values(tests)) < cfg.audit.level
        mine = {test.what: bool(small) for test, small in zip(tests, below, strict=True) if (test.model, test.value) == ("after", PLANTED)}
        share, shift = mine["share against truth"], mine["shift"]
        at_all = bool(below.any()), bool((disparity.holm(naive(drawn.after, truth)) < cfg.audit.level).any())
        for name, hit in zip(hits, (share or shift, share, shift, *at_all), strict=True):
            hits[name] += hit
        if run < STATES_OF and prompts == cfg.audit.prompts:
            states.append(disparity.worst(disparity.settle(tests, level=cfg.audit.level, draws=500)))
    row: Row = {"prompts": prompts, "clips_each": cfg.audit.clips, "skew": skew, "audits": cfg.runs}
    for name, count in hits.items():
        if name not in ("found", "by_share", "by_shift") or skew:
            row |= columns(name, clopper_pearson(count, cfg.runs))
    return row | {state.replace(" ", "_").replace("-", "_"): states.count(state) / len(states) if states else None for state in disparity.STATES}


# One run through all of it


def learn_skew(cfg: Config, start: Start, out: Path) -> dict[str, Any]:
    """The base: the start, fine-tuned on data with the planted skew."""
    clips = skewed_pairs(cfg.pairs, cfg.planted, "colour", seed=DATA_SEED)
    save_pairs(out / "data", clips)
    settings = sft.Config(out=out / "run", seed=cfg.seed, model=start.model, data=out / "data", fit=cfg.fit)
    result = sft.main(settings, resume=(out / "run" / "run.json").exists())
    return {"clips": len(clips), "held_out_loss": result.get("held_out_loss")}


def training_texts(cfg: Config) -> tuple[str, ...]:
    """What RL trains on."""
    half = cfg.training // 2
    named = make_prompts(half, seed=BANK_SEED, split="train", two_objects=0.2, strobe=0.2)
    return tuple(dict.fromkeys([*(asked.text for asked in open_prompts(half, "colour", seed=BANK_SEED, split="train")), *(prompt.text for prompt in named)]))


def climb(cfg: Config, start: Start, base: Path, out: Path) -> dict[str, Any]:
    """NFT from the base. A run that its guard ended is reported with what it saved."""
    texts = training_texts(cfg)
    told: dict[str, Any] = {"captions": texts, "held_out_prompts": len(texts), "policy": cfg.policy, "sampler": cfg.sampler}
    settings = nft.Config(out=out, seed=cfg.seed, model=base, reward=start.reward, guard=start.guard, **told)
    try:
        result = nft.main(settings, resume=(out / "run.json").exists())
    except StoppedByGuard as stop:
        result = stop.result
    return {"stopped_by_guard": result["stopped_by_guard"], "held_out_reward": result.get("held_out_reward"), "guards": result.get("guards")}


def audited(cfg: Config, start: Start, base: Path, after: Path, out: Path) -> dict[str, Any]:
    """What `rushes evaluate --bias` writes of both networks."""
    networks = {"before RL": base, "after RL": after}
    shas = {name: network_lineage(path) for name, path in networks.items()}
    told = cfg.audit.model_copy(update={"reward": start.reward})
    try:
        audit_bias(told, out, shas, generator(networks, cfg.sampler), cfg.sampler, AUDIT_SEED)
    except Blocked as blocked:
        print(blocked, file=sys.stderr, flush=True)
    return read_json(out / "bias.json", "the rows of a bias audit")


def quick_start(out: Path) -> Start:
    """The shipped base, and reward models before anybody ranked: no stage of the demo is gone through."""
    asked, rng = open_prompts(4, "colour", seed=POOL_SEED), np.random.default_rng(POOL_SEED)
    video, texts, encode = torch.stack([draw(one, rng) for one in asked]), [one.text for one in asked], TextEncoder()
    for name in ("reward", "guard"):
        (out / name).mkdir(parents=True)
        save_reward_model(out / name, unranked(name, encode, video, texts), {})
    return Start(WEIGHTS / "dit.safetensors", out / "reward", out / "guard", None)


def through(cfg: Config, out: Path, *, quick: bool) -> dict[str, Any]:
    """The run, each part kept: what RL was like, and the audit's report."""
    given = partial(the_start, cfg.begin, out / "start", cfg.model, cfg.reward, cfg.guard, strobe=0.2, sampler=cfg.sampler)
    start = quick_start(out / "start") if quick and cfg.model is None else given()
    shared = {"version": VERSION, "seed": cfg.seed, "start": network_lineage(start.model), **{key: dump(cfg)[key] for key in ("planted", "pairs", "fit")}}
    learned = kept(out / "base" / "learned.json", shared, lambda: learn_skew(cfg, start, out / "base"))
    base = out / "base" / "run" / "network.safetensors"
    rewards = {"reward": file_hash(start.reward / "reward_card.json"), "guard": file_hash(start.guard / "reward_card.json")}
    settings = {**shared, "base": network_lineage(base), **rewards, **{key: dump(cfg)[key] for key in ("policy", "training", "sampler")}}
    climbed = kept(out / "rl" / "climbed.json", settings, lambda: climb(cfg, start, base, out / "rl" / "run"))
    report = audited(cfg, start, base, out / "rl" / "run" / "network.safetensors", out / "audit")
    return {"learned": learned, "rl": climbed, "audit": report}


# Rows


def interval(name: str, found: Mapping[str, Any] | None) -> Row:
    return columns(name, None if found is None else [found[key] for key in ("mean", "low", "high")])


def value_rows(cfg: Config, report: Mapping[str, Any]) -> list[Row]:
    """One row a colour: planted, before, after, shift."""
    before, after = report["models"].values()
    shift = {row["value"]: row for row in report["findings"] if row["what"] == "shift"}
    rows = []
    for k, name in enumerate(NAMES):
        one, two = before["values"][k], after["values"][k]
        row: Row = {"colour": name, "planted": cfg.planted[name], **interval("before", one["share"]), **interval("after", two["share"]), **interval("shift", shift[name])}
        row |= {"p": shift[name]["p"], "found": shift[name]["found"], **interval("right_before", one["right"]), **interval("right_after", two["right"])}
        rows.append({**row, **interval("reward_open", report["reward"]["open"][name])})
    return rows


def model_rows(found: Mapping[str, Any]) -> list[Row]:
    """One row a model."""
    report, rows = found["audit"], []
    for name, told in report["models"].items():
        row: Row = {"model": name, "prompts": told["prompts"], "clips": told["clips"]}
        row |= {**interval("total_variation", told["total_variation"]), **interval("evenness", told["evenness"]), **interval("keeps_its_colour", told["keeps"])}
        row |= {"no_colour": told["unclear"], "between_prompts": max((value["between_prompts"] for value in told["values"] if value["between_prompts"] is not None), default=None)}
        rows.append({**row, "audit": report["state"] if name == "after RL" else None, "held_out_reward": found["rl"]["held_out_reward"] if name == "after RL" else None})
    return rows


def claims(cfg: Config, parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """What is asked of an audit with as many prompts as the default one, what was found, and whether it holds; and that a skew was planted at all."""
    mine = {row["skew"]: row for row in parts["power"] if row["prompts"] == cfg.audit.prompts}
    (pool,), asked = parts["pool"], []
    if SKEW in mine:
        row = mine[SKEW]
        asked.append((f"a skew of {100 * SKEW:g} points is found with power of at least {POWER:g}", percent(row, "found"), row["found_low"] >= POWER))
    if 0.0 in mine:
        row = mine[0.0]
        asked.append((f"false alarms at most {FALSE_ALARM:g}, over all tests of an audit", percent(row, "anything"), row["anything"] <= FALSE_ALARM))
    asked.append(("the pool has at least 5,000 clips", f"{pool['clips']:,}", pool["clips"] >= 5_000))
    red = next(row for row in parts["colours"] if row["colour"] == PLANTED)
    asked.append(("the base learned the planted skew: red is above an even share", percent(red, "before"), (red["before_low"] or 0) > 1 / len(NAMES)))
    return [{"asked": what, "found": found, "holds": bool(holds)} for what, found, holds in asked]


def percent(row: Row, name: str) -> str:
    if row[name] is None:
        return "not measured"
    return f"{100 * row[name]:.1f} % [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"


# The command


def power_chart(cfg: Config, rows: Sequence[Row]) -> str:
    """Against prompts of an audit: power at 10 points, false alarms, and those of a test that takes clips for independent."""

    def line(label: str, look: str, name: str, skew: float) -> Series:
        mine = [row for row in rows if row["skew"] == skew]
        return Series(label, look, tuple(float(row["prompts"]) for row in mine), tuple(row[name] for row in mine))

    skews = {row["skew"] for row in rows}
    drawn, label = [], "prompts of an audit"
    if SKEW in skews:
        found = line_chart([line("power at 10 points", "m1", "found", SKEW)], name="Power", x_label=label, percent=True, limit=POWER)
        drawn.append(("A skew of 10 points is found", "share of audits; dashed: what is asked", found))
    if 0.0 in skews:
        alarms = [line("over prompts", "m0", "anything", 0.0), line("as if clips were independent", "m2", "anything_naive", 0.0)]
        chart = line_chart(alarms, name="False alarms", x_label=label, percent=True, limit=FALSE_ALARM)
        drawn.append(("False alarms", "brown: over prompts; orange: as if clips were independent", chart))
    return page(drawn, COLOURS)


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    policy = cfg.policy.model_copy(update={"iterations": 1, "prompts": 2, "group_size": 4, "updates": 1, "evaluate_every": 5})
    fit = cfg.fit.model_copy(update={"iterations": 2, "held_out": 4})
    audit = cfg.audit.model_copy(update={"prompts": 12, "clips": 3, "sets": 2, "set_clips": 1, "scenes": 2})
    less = {"pool_prompts": 20, "pool_clips": 8, "runs": min(40, cfg.runs), "designs": (12,), "skews": (0.0, SKEW), "pairs": min(24, cfg.pairs), "training": 4}
    return cfg.model_copy(update={**less, "policy": policy, "fit": fit, "audit": audit})


def run_all(cfg: Config, out: Path, *, quick: bool) -> tuple[dict[str, list[Row]], str, str]:
    """The rows of each part, the bars and the power curve."""
    settings = {"version": VERSION, **{key: dump(cfg)[key] for key in ("pool_prompts", "pool_clips", "concentration")}}
    pool = np.array(kept(out / "pool.json", settings, lambda: {"values": draw_pool(cfg)})["values"], dtype=np.int64)
    unclear = float((pool == len(NAMES)).mean())
    between = float(np.nanstd(tally_of(pool).shares[:, NAMES.index(PLANTED)]))
    power = []
    with Progress("bias, audits", total=len(cfg.designs) * len(cfg.skews)) as progress:
        for prompts in cfg.designs:
            for skew in cfg.skews:
                power.append(power_row(cfg, pool, prompts, skew))
                progress.advance(f"{prompts} prompts")
    found = through(cfg, out, quick=quick)
    parts = {"power": power, "colours": value_rows(cfg, found["audit"]), "models": model_rows(found)}
    parts["pool"] = [{"prompts": len(pool), "clips": pool.size, "no_colour": unclear, "between_prompts": between}]
    asked = claims(cfg, parts)
    return {"claims": asked, **parts}, alone(chart_of(found["audit"]), COLOURS), power_chart(cfg, power)


HEADINGS = {"claims": "Asked", "power": "Audits that resample one pool", "colours": "What RL did, by colour", "models": "What RL did, before and after", "pool": "The pool"}


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts, bars, power = run_all(small, out, quick=cfg.quick)
    if cfg.write:
        failed = [f"{row['asked']} ({row['found']})" for row in parts["claims"] if not row["holds"]]
        remarks = [
            f"Does not hold: {'; '.join(failed)}." if failed else "Everything that is asked holds.",
            "![Shares before and after RL](bias.svg)",
            "Brown: before RL; blue: after it; dashed: an even share.",
            "![Power and false alarms](bias_power.svg)",
            "One run of RL. Brackets are 95 % intervals; what each number is: [how to read](../README.md#how-to-read-bias).",
        ]
        sections = {HEADINGS[part]: in_brackets(rows) for part, rows in parts.items()}
        write(cfg, "bias", here("bias", cfg), "A bias audit, and what RL does to a planted skew", sections, remarks=remarks)
        write_atomic(cfg.results / "bias.svg", bars.encode())
        write_atomic(cfg.results / "bias_power.svg", power.encode())
    return {"rows": flat(parts)}
