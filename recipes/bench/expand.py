"""Prompts made long: what a small language model learns of captions, and whether the clips made of its captions show what people asked for.

On pairs of real prompts (`--pairs`): bits a token of held-out captions, beside n-grams of the same tokens. In the built-in world: clips of short prompts as they are typed, of
their captions after SFT, and after GRPO against a reward model's score of the clips. The judge, which rewarded nobody, says whether a clip shows all that the *short* prompt names
and nothing else; combinations and wordings are held out of both stages, and all arms are shown from the same noise.

Letters: S seeds, N held-out short prompts, G clips a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from align.config import Count, dump
from base_model.errors import UserError
from base_model.prompts.expand import Expanded, load_expander
from recipes import expand
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, in_brackets, place, write
from recipes.bench._start import Begin, the_start
from recipes.bench._trained import Pace, Seeds, kept
from recipes.evaluate import clip_seeds
from recipes.generate import UNSAFE, Sampler, best_device, expand_prompts, safety_runner, sample
from recipes.models import encode_prompts, load_model, model_lineage
from recipes.shapes.judge import Judgement, judge
from recipes.shapes.prompts import ShapesPrompt
from recipes.shapes.short import Short, make_shorts, said
from recipes.statistics import bootstrap_crossed
from recipes.weights import file_hash

Array = NDArray[np.float64]
EVALUATION_SEED = 930_000
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""
TYPED, SFT, GRPO = "as typed", "SFT", "GRPO"
KINDS = {"all": (True, False), "motion named": (True,), "motion open": (False,)}
WORLD = expand.Config(
    pool=8_000,
    most_tokens=40,
    tiny=expand.Tiny(width=96, depth=3, heads=4, vocabulary=512),
    sft=expand.Sft(steps=500, batch=64, lr=2e-3, evaluate_every=125),
    grpo=expand.Grpo(),
)
REAL = expand.Config(most_tokens=240, sft=expand.Sft(steps=500, batch=16, lr=2e-3, evaluate_every=50))


class Config(Bench):
    out: Path = Path("runs/bench-expand")
    """Folder of everything that is trained; what is finished there is not repeated. `quick` keeps nothing."""
    pairs: Path | None = None
    """Pairs of real prompts, as `rushes expand --pairs` takes them; none leaves that part out."""
    model: Path | None = None
    """Network that makes the clips; with `reward`. None: that of the demo's SFT."""
    reward: Path | None = None
    """Folder of the reward model that GRPO climbs. None: the demo's, made here."""
    begin: Begin = Begin()
    """How much of the demo is done for them."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of pairs, weights, captions and noise."""
    tiny: expand.Tiny = WORLD.tiny
    """The language model of the built-in world."""
    sft: expand.Sft = WORLD.sft
    """How it learns captions."""
    grpo: expand.Grpo = WORLD.grpo
    """How it climbs the reward."""
    real_tiny: expand.Tiny = REAL.tiny
    """The language model of the real pairs."""
    real_sft: expand.Sft = REAL.sft
    """How it learns them."""
    prompts: Count = 240
    """N, half of them with a motion."""
    clips: Count = 2
    """G, each of a caption of its own."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""


class Seen(NamedTuple):
    """What was made of N short prompts, G times: each [N,G]."""

    right: list[list[float]]  # 1 where the clip shows all that is asked, and nothing else
    keeps: list[list[float]]  # 1 where the words say all that is asked
    words: list[list[float]]
    typed: list[list[float]]  # 1 where the prompt was kept as it was
    unsafe: list[list[float]]  # 1 where it was kept because its caption is not allowed
    texts: list[list[str]]


def shorts_of(cfg: Config) -> list[Short]:
    """The held-out prompts. Raises UserError where there are not so many."""
    try:
        return make_shorts(cfg.prompts, seed=EVALUATION_SEED, split="eval")
    except ValueError as error:
        raise UserError(f"prompts: {error}. Give fewer --prompts") from error


def shows(short: Short, judged: Judgement) -> bool:
    """Whether all that the short prompt names is right, in one piece, with nothing else on screen."""
    reading = judged.readings[0]
    named = judged.shape_right[0] and judged.colour_right[0] and (judged.motion_right[0] or not short.motion_named)
    return named and reading is not None and reading.blobs == 1 and judged.extra == 0


@torch.no_grad()
def look(cfg: Config, network: Path | None, expander: Path | None, shorts: Sequence[Short]) -> dict[str, Any]:
    """Clips of the prompts, expanded where there is an expander, and what the judge says of them."""
    texts = [short.text for short in shorts]
    if expander is None:
        told = [[Expanded(text, text, "as typed")] * cfg.clips for text in texts]
    else:
        writer, runner = load_expander(expander, device=best_device()), safety_runner()
        drawn = [expand_prompts(writer, texts, runner, seed=EVALUATION_SEED + g) for g in range(cfg.clips)]
        told = [list(row) for row in zip(*drawn, strict=True)]
    flat_told = [each for row in told for each in row]  # N*G
    asked = [ShapesPrompt(str(n), short.text, (short.thing,), False, "eval") for n, short in enumerate(shorts) for _ in range(cfg.clips)]
    model = load_model(network, device=best_device())
    videos = sample(model, encode_prompts(model, [each.text for each in flat_told]), clip_seeds(EVALUATION_SEED, len(flat_told)), cfg.sampler)
    judged = judge(torch.cat(list(videos)), asked)

    def table(values: Sequence[float]) -> list[list[float]]:
        return np.array(values, dtype=float).reshape(len(shorts), cfg.clips).tolist()

    owners = [short for short in shorts for _ in range(cfg.clips)]
    return Seen(
        table([shows(short, each) for short, each in zip(owners, judged, strict=True)]),
        table([said(each.text).keeps(short) if expander else 1.0 for short, each in zip(owners, flat_told, strict=True)]),
        table([len(each.text.split()) for each in flat_told]),
        table([bool(each.note) for each in flat_told]),
        table([each.note == UNSAFE for each in flat_told]),
        [[each.text for each in row] for row in told],
    )._asdict()


def looked(cfg: Config, out: Path, name: str, network: Path | None, expander: Path | None, shorts: Sequence[Short]) -> Seen:
    """The same, kept for its settings."""
    settings = {
        "version": VERSION,
        "network": model_lineage(network),
        "expander": file_hash(expander / "model.safetensors") if expander else "",
        "prompts": cfg.prompts,
        "clips": cfg.clips,
        "sampler": dump(cfg.sampler),
    }
    return Seen(**kept(out / "looks" / f"{name}.json", settings, partial(look, cfg, network, expander, shorts)))


# Runs


def start_of(cfg: Config, out: Path) -> tuple[Path, Path]:
    """The network and the reward model. Raises UserError where one is given alone."""
    if cfg.model is not None and cfg.reward is not None:
        return cfg.model, cfg.reward
    if cfg.model is not None or cfg.reward is not None:
        raise UserError("model and reward: one needs the other. Give both, or none")
    made = the_start(cfg.begin, out / "start", None, None, None, strobe=0.0, sampler=cfg.sampler)
    return made.model, made.reward


def world_config(cfg: Config, out: Path, network: Path, reward: Path, seed: int) -> expand.Config:
    told = {"tiny": cfg.tiny, "sft": cfg.sft, "grpo": cfg.grpo, "sampler": cfg.sampler, "model": network, "reward": reward}
    return WORLD.model_copy(update={**told, "out": out / "runs" / f"world-{seed}", "seed": seed})


def real_config(cfg: Config, out: Path, pairs: Path, seed: int) -> expand.Config:
    return REAL.model_copy(update={"tiny": cfg.real_tiny, "sft": cfg.real_sft, "pairs": pairs, "out": out / "runs" / f"real-{seed}", "seed": seed})


# Rows


def language_row(data: str, found: Sequence[Mapping[str, Any]]) -> Row:
    """Bits a token of held-out captions: mean over the seeds, with the smallest and the largest."""
    bits, floor = [one["bits"] for one in found], [one["ngram_bits"] for one in found]
    gaps = [a - b for a, b in zip(bits, floor, strict=True)]
    return {
        "pairs": data,
        "seeds": len(found),
        "held_out": round(fmean(one["pairs"]["test"] for one in found)),
        **_spread("sft_bits", bits),
        **_spread("ngram_bits", floor),
        "ngram_order": max(one["ngram_order"] for one in found),
        "unigram_bits": fmean(one["unigram_bits"] for one in found),
        **_spread("sft_minus_ngram", gaps),
        "sft_is_better": True if max(gaps) < 0 else False if min(gaps) > 0 else None,
        **{name: fmean(one[name] for one in found) for name in ("words", "most_words", "likeness", "likeness_of_pairs", "kept_prompts", "unsafe")},
    }


def _spread(name: str, values: Sequence[float]) -> Row:
    return columns(name, (fmean(values), min(values), max(values)))


def rows_of(kind: Sequence[bool], shorts: Sequence[Short]) -> list[int]:
    return [n for n, short in enumerate(shorts) if short.motion_named in kind]


def by_prompt(seeds: Sequence[Seen], field: str, rows: Sequence[int]) -> Array:
    """[S,N] means over the clips of a prompt."""
    return np.array([[fmean(getattr(one, field)[n]) for n in rows] for one in seeds])


def clip_rows(arms: Mapping[str, Sequence[Seen]], shorts: Sequence[Short]) -> list[Row]:
    """An arm and a kind of prompts each: what the judge says, and what the captions are like."""
    found = []
    for kind, members in KINDS.items():
        rows = rows_of(members, shorts)
        for arm, seeds in arms.items():
            texts = [[text for n in rows for text in one.texts[n]] for one in seeds]
            found.append({
                "prompts": kind,
                "captions": arm,
                "seeds": len(seeds),
                **columns("right", bootstrap_crossed(by_prompt(seeds, "right", rows))),
                "meaning_kept": float(by_prompt(seeds, "keeps", rows).mean()),
                "words": float(by_prompt(seeds, "words", rows).mean()),
                "most_words": max(max(one.words[n]) for one in seeds for n in rows),
                "different": fmean(len(set(each)) / len(each) for each in texts),
                "kept_prompts": float(by_prompt(seeds, "typed", rows).mean()),
                "unsafe": float(by_prompt(seeds, "unsafe", rows).mean()),
            })  # fmt: skip
    return found


def difference_rows(arms: Mapping[str, Sequence[Seen]], shorts: Sequence[Short]) -> list[Row]:
    """One arm's share of right clips less another's, paired over seeds and prompts."""
    found = []
    for kind, members in KINDS.items():
        rows = rows_of(members, shorts)
        for after, before in ((GRPO, SFT), (SFT, TYPED), (GRPO, TYPED)):
            gap = by_prompt(arms[after], "right", rows) - by_prompt(arms[before], "right", rows)  # [S,N], a single look at what is typed being that of all seeds
            known = bootstrap_crossed(gap)
            better = True if known.low > 0 else False if known.high < 0 else None
            found.append({"prompts": kind, "captions": f"{after} - {before}", **columns("right", known), "is_better": better})
    return found


def training_rows(found: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Row]:
    """What GRPO itself says of each seed."""
    names = ("reward_first", "reward_last", "kl_last", "unsafe_share", "missing_reward_share")
    return [{"seed": seed, **{name: one[name] for name in names}} for seed, one in zip(seeds, found, strict=True)]


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    tiny = expand.Tiny(width=32, depth=1, heads=2, vocabulary=400)
    sft = expand.Sft(steps=4, batch=8, evaluate_every=4)
    sampler = cfg.sampler.model_copy(update={"steps": min(2, cfg.sampler.steps)})
    small = {"tiny": tiny, "real_tiny": tiny, "sft": sft, "real_sft": sft, "grpo": expand.Grpo(steps=2, prompts=2, group_size=2, save_every=2), "sampler": sampler}
    begin = Begin(pairs=min(24, cfg.begin.pairs), iterations=min(2, cfg.begin.iterations), prompts=min(10, cfg.begin.prompts))
    return cfg.model_copy(update={**small, "begin": begin, "prompts": min(6, cfg.prompts), "clips": 1, "seeds": cfg.seeds[:1]})


def run_all(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    shorts = shorts_of(cfg)
    network, reward = start_of(cfg, out)
    pace = Pace("expand, runs", len(cfg.seeds) * (2 if cfg.pairs else 1))
    arms: dict[str, list[Seen]] = {TYPED: [looked(cfg, out, "typed", network, None, shorts)] * len(cfg.seeds), SFT: [], GRPO: []}
    world, real = [], []
    for seed in cfg.seeds:
        fresh = not (out / "looks" / f"grpo-{seed}.json").exists()
        told = expand.main(world_config(cfg, out, network, reward, seed))
        world.append(told)
        for arm, stage in ((SFT, "sft"), (GRPO, "grpo")):
            arms[arm].append(looked(cfg, out, f"{stage}-{seed}", network, Path(told[stage]["expander"]), shorts))
        pace.advance(f"world, seed {seed}", 1, fresh=fresh)
        if cfg.pairs is not None:
            setting = real_config(cfg, out, cfg.pairs, seed)
            fresh = not (setting.out / "sft" / "stage.json").exists()
            real.append(expand.main(setting)["sft"])
            pace.advance(f"real pairs, seed {seed}", 1, fresh=fresh)
    language = [language_row("the built-in world", [one["sft"] for one in world]), *([language_row("real prompts", real)] if real else [])]
    return {
        "clips": clip_rows(arms, shorts),
        "difference": difference_rows(arms, shorts),
        "training": training_rows([one["grpo"] for one in world], cfg.seeds),
        "language": language,
    }


def verdicts(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """What was asked, and whether it holds."""
    words = {True: "raises", False: "lowers", None: "cannot be told to change"}
    found = [
        f"{row['captions'].replace(' - ', ' against ')}: {words[row['is_better']]} the share of clips that show what was typed: {100 * row['right']:+.1f} points "
        f"[{100 * row['right_low']:+.1f}, {100 * row['right_high']:+.1f}]."
        for row in parts["difference"]
        if row["prompts"] == "all"
    ]
    beats = {True: "foretells held-out captions better than", False: "foretells held-out captions worse than", None: "is not told apart, over all seeds, from"}
    return found + [
        f"Pairs of {row['pairs']}: the language model {beats[row['sft_is_better']]} n-grams of the same tokens, {row['sft_bits']:.2f} bits a token against {row['ngram_bits']:.2f}."
        for row in parts["language"]
    ]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = run_all(small, out)
    if cfg.write:
        remarks = [*verdicts(parts), f"{len(small.seeds)} seeds. What each number is: [how to read](../README.md#how-to-read-expand)."]
        write(cfg, "expand", here("expand", cfg), "Prompts made long", {part.capitalize(): in_brackets(rows) for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
