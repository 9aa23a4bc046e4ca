"""Which of two runs makes the better clips, told blind (`rushes compare RUN_A RUN_B --by judge`): the share of pairs that A wins, with its interval.

Both make clips of the same held-out prompts from the same noise; two clips of one prompt and one noise are a pair. Who decides, `--by`:

    judge    the built-in world's judge: the clip with every attribute right beats one that has not
    guard    a reward model that neither run was optimised by (`--guard FOLDER`): the higher score
    people   the first call writes what they are shown and asked; later ones read their answers

A tie counts half, and is told. Clips of a prompt are not independent of each other, so a prompt's value is its mean and the interval resamples prompts.

    out/people/clips  rankings  tasks.jsonl    what people may see: which clip is whose is nowhere in it; sides and order are drawn from the seed
    out/key.json                               which clip is whose; keep it from them
    out/compare.json  sheet.png                the rows, and some pairs side by side
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Seed, Share, Whole, dump
from base_model.checkpoint import atomic_write, check_can_write, read_json
from base_model.errors import UserError
from base_model.tiny import WEIGHTS
from base_model.video.files import digest_of, to_uint8
from base_model.video.store import ClipStore, NewClip
from recipes.bench.strip import Shown, draw
from recipes.evaluate import EVALUATION_SEED, clip_seeds, clips_of, kind_of, network_file, shown_prompts
from recipes.feedback import standardised
from recipes.generate import Sampler, network_lineage, safety_runner
from recipes.rankings import TASKS, Task, answers_to, ask, read_tasks
from recipes.reward_model import usable_events
from recipes.scorers import card_hash, check_watches_another, load_scorer
from recipes.shapes.judge import judge
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.statistics import bootstrap_mean
from reward.agreement import pairs_of
from reward.comparisons import Prompt, load_comparisons
from reward.safety.contract import Decision, allowed, to_json

Votes = list[list[float]]
"""Of each pair, prompts in order and the pairs of a prompt side by side: 1 for A, 0 for B, 0.5 for a tie, of everybody who could tell."""
STRATA = {"one": "one object", "two": "two objects", "strobe": "strobe"}
SHOWN_FRAMES, SCALE = 5, 2


class Config(BaseConfig):
    run_a: Path = Path("runs/nft")
    """Folder of a finished run, a network file, or `base`, the shipped base."""
    run_b: Path = Path("runs/sft")
    """The same."""
    by: Literal["judge", "guard", "people"] = "judge"
    """Who says which clip is better."""
    guard: Path | None = None
    """Folder of the reward model that decides."""
    out: Path = Path("runs/compare")
    """Folder of the rows, the picture, and of what people are asked."""
    seed: Seed = 0
    """Seed of prompts, noise, sides and order."""
    prompts: Count = 80
    """Held-out prompts."""
    clips_per_prompt: Count = 2
    """Pairs of each prompt."""
    two_objects: Share = 0.2
    """Share of prompts with two objects."""
    strobe: Share = 0.2
    """Share of prompts that ask for strobing."""
    captions: tuple[str, ...] = ()
    """Captions of real clips in place of the built-in world's prompts, which the judge does not know."""
    sampler: Sampler | None = None
    """How both runs' clips are denoised; none: each as its card says, and where that says nothing, as the other."""
    dimension: str = "overall"
    """Dimension of people's answers that counts."""
    shown: Whole = 6
    """Prompts in the picture, the first of each kind; nobody picks."""


# The two sides


class Side(NamedTuple):
    """One of the two runs."""

    network: Path | None
    sampler: Sampler


def network_of(run: Path) -> Path | None:
    """The network of a run; None is the shipped base. Raises UserError where there is none."""
    if (run / "run.json").is_file() and not (run / "network.safetensors").is_file():
        raise UserError(f"the run has no network, {run}: it has not come to its end. Go on with it (--resume), or give another")
    return network_file(run)


def sampler_of(network: Path | None) -> Sampler | None:
    """The sampler that the card of a network names; None where there is no card, or it names none."""
    card = (network or WEIGHTS / "dit.safetensors").with_suffix(".json")
    told = read_json(card, "the card of a network").get("config", {}) if card.is_file() else {}
    keys = {key.removeprefix("sampler."): value for key, value in told.items() if key.startswith("sampler.")}
    try:
        return Sampler.model_validate(keys) if keys else None
    except ValueError as error:
        raise UserError(f"the card names no sampler that is known, {card}. Say how clips are denoised: --sampler '{{steps: 6}}'") from error


def sides_of(cfg: Config) -> tuple[Side, Side]:
    """A and B. Raises UserError where one has no network, or their clips have different sizes or rates."""
    networks = [network_of(run) for run in (cfg.run_a, cfg.run_b)]
    named = [cfg.sampler or sampler_of(network) for network in networks]
    usual = next((one for one in named if one is not None), Sampler())
    first, second = (Side(network, one or usual) for network, one in zip(networks, named, strict=True))
    sizes = [f"{side.sampler.frames} frames of {side.sampler.height}x{side.sampler.width} at {side.sampler.fps:g} a second" for side in (first, second)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{cfg.run_a} makes clips of {sizes[0]}, {cfg.run_b} of {sizes[1]}. Compare runs of one size, or name one for both: --sampler '{{frames: 13}}'")
    return first, second


def prompts_of(cfg: Config) -> list[ShapesPrompt]:
    """What both are asked for."""
    if cfg.captions:
        return [ShapesPrompt(text, text, (), False, "eval") for text in cfg.captions]
    return make_prompts(cfg.prompts, seed=cfg.seed + EVALUATION_SEED, split="eval", two_objects=cfg.two_objects, strobe=cfg.strobe)


# Who decides


def vote(a: float, b: float) -> list[float]:
    """The one vote of who gives scores; none where one is unknown (nan)."""
    return [] if math.isnan(a) or math.isnan(b) else [(float(np.sign(a - b)) + 1) / 2]


@torch.no_grad()
def votes_by_scores(cfg: Config, clips: Sequence[Tensor], asked: Sequence[ShapesPrompt], fps: float) -> Votes:
    """Of the judge or the guard, about the clips [P,T,3,H,W] of both sides and their P prompts."""
    if cfg.by == "judge":
        scores = [[float(one.all_right) for one in judge(video, asked)] for video in clips]
    else:
        assert cfg.guard is not None
        guard, texts = standardised(load_scorer(cfg.guard, fps=fps)), [prompt.text for prompt in asked]
        scores = [[float(x) for k in range(0, len(video), 64) for x in guard(video[k : k + 64], texts[k : k + 64]).reward] for video in clips]
    return [vote(a, b) for a, b in zip(*scores, strict=True)]


def ask_people(cfg: Config, clips: Sequence[Tensor], asked: Sequence[ShapesPrompt], ruled: Sequence[Sequence[Decision]], fps: float) -> dict[str, Any]:
    """Writes what people see, and returns the key: task -> pair, and the clips of A and B. Pairs of equal clips, and such that may not be shown, are asked of nobody."""
    people, rng = cfg.out / "people", np.random.default_rng([cfg.seed, 1])
    ids = [[digest_of(frames) for frames in map(to_uint8, video)] for video in clips]
    order = [int(i) for i in rng.permutation(len(asked)) if ids[0][i] != ids[1][i] and all(allowed(side[i]) for side in ruled)]
    turned = rng.random(len(asked)) < 0.5  # [P] whether B is shown first
    made, tasks, key = [], [], {}
    for number, i in enumerate(order):
        prompt, task_id = asked[i], f"pair-{number:05d}"
        pair = (1, 0) if turned[i] else (0, 1)
        for place, side in enumerate(pair):
            made.append(NewClip(clips[side][i], prompt.text, prompt.prompt_id, number, {"place": place}, "blind", fps, safety=to_json(ruled[side][i])))
        tasks.append(Task(task_id, prompt.prompt_id, prompt.text, tuple(ids[side][i] for side in pair)))
        key[task_id] = {"pair": i, "a": ids[0][i], "b": ids[1][i]}
    rows = ClipStore(people / "clips").add_many(made)
    prompts = [Prompt(prompt.prompt_id, prompt.text) for prompt in {prompt.prompt_id: prompt for prompt in asked}.values()]
    ask(people / "rankings", people, tasks, rows, prompts, shares=(0.0, 0.0, 1.0))
    alike = [i for i in range(len(asked)) if ids[0][i] == ids[1][i]]
    return {"tasks": key, "alike": alike}


def votes_of_people(cfg: Config, key: dict[str, Any], pairs: int) -> Votes:
    """What people answered so far. Equal clips tie, once there is any answer, or nothing to ask."""
    people = cfg.out / "people"
    votes: Votes = [[] for _ in range(pairs)]
    data = load_comparisons(people / "rankings")
    usable = {event.event_id for event in usable_events(data)}
    for task_id, events in answers_to(data, read_tasks(people)).items():
        mine = key["tasks"][task_id]
        for pair in pairs_of(event for event in events if event.event_id in usable and event.dimension == cfg.dimension):
            turn = 1 if pair.first == mine["a"] else -1
            votes[mine["pair"]] += [(turn * answer + 1) / 2 for answer in pair.votes.values()]
    alike = set(key["alike"]) if any(votes) or not key["tasks"] else set()
    return [[0.5] if i in alike else said for i, said in enumerate(votes)]


# Rows


def rows_of(cfg: Config, votes: Votes, asked: Sequence[ShapesPrompt], blocked: Sequence[Sequence[bool]]) -> list[dict[str, Any]]:
    """One row for all pairs and one for each kind of prompt. asked: the prompt of each pair."""
    kinds = [kind_of(prompt) for prompt in asked]
    groups = {"all": range(len(asked))} | ({} if cfg.captions else {name: [i for i, kind in enumerate(kinds) if kind == each] for each, name in STRATA.items()})
    return [{"prompts_of": name, **_row(list(rows), votes, asked, blocked)} for name, rows in groups.items() if rows]


def _row(rows: Sequence[int], votes: Votes, asked: Sequence[ShapesPrompt], blocked: Sequence[Sequence[bool]]) -> dict[str, Any]:
    of: dict[str, list[float]] = {}
    for i in rows:
        of.setdefault(asked[i].prompt_id, []).extend([float(np.mean(votes[i]))] if votes[i] else [])
    rate = bootstrap_mean([float(np.mean(means)) if means else math.nan for means in of.values()])
    said = [one for i in rows for one in votes[i]]
    interval = {f"a_wins{end}": value for end, value in zip(("", "_low", "_high"), rate.as_json().values(), strict=True)}
    counts = {name: sum(one == value for one in said) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    shares = {f"blocked_{name}": float(np.mean([side[i] for i in rows])) for name, side in zip("ab", blocked, strict=True)}
    return {"prompts": len(of), "pairs": len(rows), "votes": len(said), "decided_by_nobody": sum(not votes[i] for i in rows), **interval, **counts, **shares}


def verdict(row: dict[str, Any]) -> str:
    """Which run is better, in words."""
    if row["a_wins"] is None:
        return "nobody has decided anything yet"
    better = "A is better" if row["a_wins_low"] > 0.5 else "B is better" if row["a_wins_high"] < 0.5 else "it cannot be told which is better"
    share = f"{100 * row['a_wins']:.1f} % [{100 * row['a_wins_low']:.1f}, {100 * row['a_wins_high']:.1f}]"
    return f"A wins {share} of the pairs, a tie counting half ({row['wins']} wins, {row['ties']} ties, {row['losses']} losses): {better}"


# The picture


def picture(cfg: Config, clips: Sequence[Tensor], votes: Votes, prompts: Sequence[ShapesPrompt]) -> bytes:
    """The first pair of the first prompts of each kind, A at the left."""
    chosen = shown_prompts(prompts, cfg.shown) if not cfg.captions else list(range(min(cfg.shown, len(prompts))))
    first = [n * cfg.clips_per_prompt for n in chosen]
    mean = [float(np.mean(votes[i])) if votes[i] else math.nan for i in first]
    sides = {name: [_shown(clips[side][i], turn * (share - 0.5)) for i, share in zip(first, mean, strict=True)] for side, (name, turn) in enumerate((("A", 1), ("B", -1)))}
    buffer = io.BytesIO()
    draw([prompts[n].text for n in chosen], sides, SHOWN_FRAMES, SCALE, words=("preferred", "not preferred")).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _shown(video: Tensor, lead: float) -> Shown:
    return Shown(video, lead > 0, "nobody decided" if math.isnan(lead) else "a tie" if lead == 0 else "")


# The command


def settings(cfg: Config, sides: Iterable[Side]) -> dict[str, Any]:
    """What the clips that people see depend on."""
    kept = {name: dump(cfg)[name] for name in ("seed", "prompts", "clips_per_prompt", "two_objects", "strobe", "captions")}
    return kept | {f"run_{name}": [network_lineage(side.network), dump(side.sampler)] for name, side in zip("ab", sides, strict=True)}


def check(cfg: Config) -> None:
    """Raises UserError, before any work, where nobody could decide."""
    if cfg.by == "judge" and cfg.captions:
        raise UserError("by is judge, who knows the built-in world alone, and captions are given. Use --by guard or --by people")
    if cfg.by == "guard" and cfg.guard is None:
        raise UserError("by is guard, and no reward model is given. Add --guard FOLDER")
    if cfg.by == "guard" and cfg.guard is not None:
        for run in (cfg.run_a, cfg.run_b):
            check_climbed_another(cfg.guard, run)
    check_can_write(cfg.out)


def check_climbed_another(guard: Path, run: Path) -> None:
    """Raises UserError where a run, as far as its folder tells, was optimised by the guard: by the card it noted, or the reward model where it says one lies."""
    file = run / "run.json"
    told = read_json(file, "the description of a run") if file.is_file() else {}
    config = told.get("config") or {}
    climbed = None if config.get("comparisons") else config.get("reward")  # of stored rankings a run learns itself, and its reward only scores the looks
    if climbed and told.get("reward") == card_hash(guard):
        raise UserError(f"the guard is what {run} was optimised by, {guard}: it would like that run. Give --guard another one")
    if climbed and "reward" not in told and (Path(climbed) / "reward_card.json").is_file():
        check_watches_another(guard, Path(climbed))


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: what people were asked stays, and all else is made anew."""
    check(cfg)
    started, sides, prompts = time.monotonic(), sides_of(cfg), prompts_of(cfg)
    asked = [prompt for prompt in prompts for _ in range(cfg.clips_per_prompt)]
    key_file, told, fps = cfg.out / "key.json", settings(cfg, sides), sides[0].sampler.fps
    key = read_json(key_file, "the key to what people were asked") if cfg.by == "people" and key_file.exists() else None
    if key is not None and key.get("settings") != told:
        raise UserError(f"people were asked about other clips in {cfg.out}. Give the same runs and settings, or another --out")
    texts, seeds = [prompt.text for prompt in asked], clip_seeds(cfg.seed + EVALUATION_SEED, len(asked))
    clips = [clips_of(side.network, texts, seeds, side.sampler) for side in sides]  # from the same noise
    ruled = [rulings_of(video, asked, fps) for video in clips]
    if cfg.by == "people":
        if key is None:
            key = {"settings": told, "run_a": str(cfg.run_a), "run_b": str(cfg.run_b), **ask_people(cfg, clips, asked, ruled, fps)}
            atomic_write(key_file, (json.dumps(key, indent=1) + "\n").encode())
        votes = votes_of_people(cfg, key, len(asked))
    else:
        votes = votes_by_scores(cfg, clips, asked, fps)
    blocked = [[not allowed(decision) for decision in side] for side in ruled]
    rows = rows_of(cfg, votes, asked, blocked)
    result: dict[str, Any] = {"a": str(cfg.run_a), "b": str(cfg.run_b), "by": cfg.by, "verdict": verdict(rows[0]), "rows": rows}
    if key is not None:
        result |= asked_of_people(cfg, key, votes)
    if any(votes) and cfg.shown:
        atomic_write(cfg.out / "sheet.png", picture(cfg, clips, votes, prompts))
        result["picture"] = str(cfg.out / "sheet.png")
    atomic_write(cfg.out / "compare.json", (json.dumps(result, indent=1) + "\n").encode())
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}


def rulings_of(video: Tensor, asked: Sequence[ShapesPrompt], fps: float) -> list[Decision]:
    """What the filters say of each of the clips [P,T,3,H,W], or of its prompt where that is worse."""
    runner, texts = safety_runner(), [prompt.text for prompt in asked]
    both = zip(runner.check_videos(video, texts, fps), runner.check_prompts(texts), strict=True)
    return [max(decisions, key=lambda decision: decision.verdict) for decisions in both]


def asked_of_people(cfg: Config, key: dict[str, Any], votes: Votes) -> dict[str, Any]:
    """How far they are, and where their answers go."""
    answered = sum(bool(votes[task["pair"]]) for task in key["tasks"].values())
    return {
        "answered": f"{answered} of {len(key['tasks'])} pairs",
        "tasks": str(cfg.out / "people" / TASKS),
        "answers_go_into": str(cfg.out / "people" / "rankings"),
        "keep_from_them": str(cfg.out / "key.json"),
    }
