"""Compare models on the same prompts, noise and sampler; write `report.json` and the report, `index.html` (`rushes evaluate`).

    rushes evaluate --models '{base: base, sft: runs/sft, rl: runs/ddpo}' --runs '{rl: runs/ddpo}' --out runs/evaluate
    rushes evaluate --models '{base: base, sft: runs/sft}' --world --out runs/world
    rushes evaluate --models '{base: base, rl: runs/nft}' --bias --out runs/bias

All filters are off while clips are made: the runner only says what it would have done, and decides which clips the page may play.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Seed, Share, Whole, resolved
from align.progress import Progress
from align.run import derived_seed
from base_model.checkpoint import check_can_write, load_weights, read_json
from base_model.errors import UserError
from base_model.tiny import WEIGHTS, load_codec, load_tiny
from base_model.video.files import write_atomic
from recipes.bias import Audit, audit_bias
from recipes.doctor import hardware
from recipes.feedback import Setting, standardised
from recipes.filters import Filters
from recipes.generate import Sampler, best_device, network_lineage, safety_runner, sample
from recipes.guards import read_history
from recipes.memory import PeakMemory
from recipes.report import NAMES, CurveRun, ReportData, Shown, Take, read_rows, write_report
from recipes.scorers import load_scorer
from recipes.shapes.eye import Eye
from recipes.shapes.measure import (
    Measured,
    PromptTakes,
    Values,
    check_judge,
    diversity_across,
    eye_agreement,
    means,
    measure,
    numbers,
    numbers_of_real_clips,
    shares,
)
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.statistics import bootstrap_mean, pool_prompts
from recipes.world import measure_world
from reward.mixture import Mixture
from reward.safety.contract import Decision, SafetyRunner, Verdict

Generate = Callable[[str, Sequence[str], Sequence[int]], Tensor]
"""(name of a model, B prompts, B seeds) -> clips [B,T,3,H,W] in [0,1]. The seed decides the noise: equal seeds, equal noise for every model."""
Score = Callable[[Tensor, Sequence[str]], Tensor]
"""(clips [B,T,3,H,W], B prompts) -> scores [B]; nan where unknown."""

MEASURED = "measured.json"
EXAMPLES = 3  # filtered clips named per model and verdict
EVALUATION_SEED = 900_000  # added to the seed, so that no stage before it drew these prompts or this noise
METRIC_NAMES = {
    "forward_passes": "forward_passes",
    "seconds": "seconds",
    "reward": "reward",
    "guard": "held_out_guard",
    "kl_per_element": "kl_per_element",
    "kl_total": "kl_total",
    "violation_rate": "violation_rate",
    "multiplier": "multiplier",
}
"""Names of the report's curves -> names in an RL run's metrics.jsonl."""


class Config(BaseConfig):
    out: Path = Path("runs/evaluate")
    """Folder of `report.json` and `index.html`."""
    seed: Seed = 0
    """Seed of prompts and noise."""
    models: dict[str, Path] = Field(default={"base": Path("base")})
    """Name -> network file, or the folder of a run that made one; `base` is the shipped base. The names base, sft, rl, rl_ddpo and rl_unconstrained are compared."""
    names: dict[str, str] = Field(default={})
    """Name -> what the report calls it, where that is not the usual."""
    runs: dict[str, Path] = Field(default={})
    """Name -> folder of the RL run whose curves are drawn."""
    prompts: Count = 80
    """Held-out prompts."""
    clips_per_prompt: Count = 3
    """Clips of each prompt and model."""
    two_objects: Share = 0.15
    """Share of prompts with two objects."""
    strobe: Share = 0.2
    """Share of prompts that ask for strobing light; they count for the flash rate only."""
    captions: tuple[str, ...] = ()
    """Captions of real clips in place of the built-in world's prompts. Nobody then knows what is on screen: the judge does not apply."""
    sampler: Sampler = Sampler()
    """How clips are denoised, the same for every model."""
    guard: Path | None = None
    """Folder of a second reward model, whose mean score is shown in standard deviations of its training clips."""
    flash_limit: Share = 0.02
    """The reported limit of the flash rate."""
    shown: Whole = 12
    """Prompts whose clips the page plays."""
    judge_check: Whole = 150
    """Freshly drawn clips for the judge's own accuracy and confusion table; 0 leaves it out."""
    world: bool = False
    """Measures what the models keep track of as well: things out of sight, a collision, depth under a panning camera, a thing over ten seconds (`recipes/world.py`)."""
    world_scenes: Count = 40
    """Unseen scenes of each event, for `world`."""
    bias: bool = False
    """Audits bias instead (`recipes/bias.py`): what models show where prompts leave an attribute open. Ends with status 3 where a margin agreed before is exceeded."""
    audit: Audit = Audit()
    """What the bias audit asks, and its margins."""
    filters: Filters = Filters()
    """Safety filters beside those that need no weights."""


@dataclass(frozen=True)
class Evaluation:
    """What the models did. `measured` is empty for real clips."""

    measured: dict[str, Measured]
    clips: dict[str, list[Tensor]]  # of real clips only: each model's, [T,3,H,W]
    shown: tuple[Shown, ...]
    filtered: list[dict[str, Any]]  # rows of the report's table
    scores: dict[str, dict[str, Values]]  # scorer -> model -> prompt -> mean score
    agreement: dict[str, list[Values]]  # attribute -> one mapping a model: prompt -> share on which eye and judge agree

    def score_intervals(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """{scorer: {model: {mean, low, high}}}."""
        return {name: means(models) for name, models in self.scores.items()}

    def agreement_intervals(self) -> dict[str, dict[str, float | None]]:
        """{attribute: {mean, low, high}} over the clips of all models."""
        return {name: bootstrap_mean(list(pool_prompts(models).values())).as_json() for name, models in self.agreement.items()}


def evaluate(
    models: Sequence[str],
    prompts: Sequence[ShapesPrompt] | Sequence[str],
    clips_per_prompt: int,
    *,
    seed: int,
    fps: float,
    generate: Generate,
    runner: SafetyRunner,
    scorers: Mapping[str, Score] | None = None,
    eye: Eye | None = None,
    shown: int = 12,
) -> Evaluation:
    """Make `clips_per_prompt` clips of every prompt with every model from the same seeds, and read them: prompts of the built-in world by the judge (and the
    eye), captions of real clips by nobody.

    Shown are the first prompts of their kind with their first clip; nobody picked them. Raises UserError for an empty list of prompts or models.
    """
    if not prompts or not models:
        raise UserError(f"nothing to evaluate: {len(models)} models and {len(prompts)} prompts. Give at least one of each")
    known = [prompt for prompt in prompts if isinstance(prompt, ShapesPrompt)]
    words = [prompt.text if isinstance(prompt, ShapesPrompt) else prompt for prompt in prompts]
    seeds = clip_seeds(seed, len(prompts) * clips_per_prompt)
    texts = [text for text in words for _ in range(clips_per_prompt)]
    chosen = shown_prompts(known, shown) if known else list(range(min(shown, len(words))))
    asked = [prompt for prompt in known for _ in range(clips_per_prompt)]
    measured: dict[str, Measured] = {}
    real: dict[str, list[Tensor]] = {}
    takes: dict[str, list[Take]] = {}
    filtered: list[dict[str, Any]] = []
    scores: dict[str, dict[str, Values]] = {name: {} for name in scorers or {}}
    agreement: dict[str, list[Values]] = {}
    with Progress("evaluate", total=len(models) * len(texts)) as progress:
        for model in models:
            clips = generate(model, texts, seeds)  # [N*G,T,3,H,W]
            decisions = runner.check_videos(clips, texts, fps)
            filtered += filtered_rows(f"evaluation clips of {model} (told, not removed)", decisions, texts)
            if known:
                measured[model] = measure(clips, known, clips_per_prompt, fps=fps)
            else:
                real[model] = list(clips)
            first = {n: n * clips_per_prompt for n in chosen}
            takes[model] = [_take(model, clips[i], decisions[i], measured[model].takes[n] if known else None) for n, i in first.items()]
            for name, score in (scorers or {}).items():
                scores[name][model] = _per_prompt(score(clips, texts), known, words)
            if eye is not None and known:
                for name, values in eye_agreement(eye.look(clips, asked), measured[model]).items():
                    agreement.setdefault(name, []).append(values)
            progress.advance(model, steps=len(texts))
    rows = [Shown(words[n], seeds[n * clips_per_prompt], tuple(takes[model][i] for model in models), n < len(known) and known[n].strobe) for i, n in enumerate(chosen)]
    return Evaluation(measured, real, tuple(rows), filtered, scores, agreement)


def clip_seeds(seed: int, clips: int) -> list[int]:
    """One seed a clip, the same for every model."""
    return [derived_seed(seed, "evaluate", index) % 2**31 for index in range(clips)]


def kind_of(prompt: ShapesPrompt) -> str:
    """strobe, or how many things are asked for: one, two."""
    return "strobe" if prompt.strobe else "one" if len(prompt.things) == 1 else "two"


def shown_prompts(prompts: Sequence[ShapesPrompt], number: int) -> list[int]:
    """Indices of the prompts to show: the first of each kind; of eight, six ask for one object, one for two, one for strobing."""
    kinds: dict[str, list[int]] = {"one": [], "two": [], "strobe": []}
    for index, prompt in enumerate(prompts):
        kinds[kind_of(prompt)].append(index)
    few = -(-number // 8)
    rest = kinds["two"][:few] + kinds["strobe"][:few]
    return (kinds["one"][: max(0, number - len(rest))] + rest)[:number]


def filtered_rows(where: str, decisions: Sequence[Decision], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the report's table of what was filtered: for each policy and verdict but allow how many, and a few examples with the filter's reason."""
    counts: Counter[tuple[Verdict, str]] = Counter()
    examples: dict[tuple[Verdict, str], list[str]] = {}
    for decision, text in zip(decisions, texts, strict=True):
        for ruling in decision.rulings:
            key = (ruling.verdict, ruling.policy)
            if ruling.verdict == Verdict.ALLOW:
                continue
            counts[key] += 1
            said = f"“{text}”: {'; '.join(reason.text for reason in ruling.reasons)}"
            if len(kept := examples.setdefault(key, [])) < EXAMPLES and said not in kept:
                kept.append(said)
    rows = [
        {"where": where, "policy": policy, "verdict": verdict.name.lower(), "count": count, "of": len(decisions), "examples": examples[verdict, policy]}
        for (verdict, policy), count in sorted(counts.items(), reverse=True)
    ]
    return rows or [{"where": where, "policy": "any", "verdict": "not allow", "count": 0, "of": len(decisions), "examples": []}]


def _take(model: str, clip: Tensor, decision: Decision, reading: PromptTakes | None) -> Take:
    reasons = "; ".join(reason.text for ruling in decision.rulings if ruling.verdict == decision.verdict for reason in ruling.reasons)
    verdict = decision.verdict.name.lower()
    if reading is None:
        return Take(model, clip.clone(), verdict, reasons)
    flashing = bool(reading.flashing[0])
    if reading.prompt.strobe:
        return Take(model, clip.clone(), verdict, reasons, flashing)
    return Take(model, clip.clone(), verdict, reasons, flashing, bool(reading.right[0]), reading.wrong[0])


def _per_prompt(scores: Tensor, known: Sequence[ShapesPrompt], words: Sequence[str]) -> Values:
    ids = [prompt.prompt_id for prompt in known] or list(words)
    rows = scores.detach().double().reshape(len(ids), -1).nanmean(1)  # [N]
    return dict(zip(ids, rows.tolist(), strict=True))


# The command


def network_file(path: Path) -> Path | None:
    """The network a name in `models` stands for; None is the shipped base. Raises UserError where there is none."""
    if str(path) == "base":
        return None
    file = path / "network.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no such network, {file}. Give a file or the folder of a finished `rushes sft` or `rushes ddpo`")
    return file


def generator(models: Mapping[str, Path], sampler: Sampler) -> Generate:
    """Loads one network at a time and samples with it."""

    def generate(name: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return clips_of(network_file(models[name]), texts, seeds, sampler)

    return generate


@torch.no_grad()
def clips_of(network: Path | None, texts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> Tensor:
    """[B,T,3,H,W] of B texts by a network, None is the shipped base: each from the noise of its seed."""
    model = load_tiny(network).to(best_device())
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    cond = model.encode_text(list(row_of))[[row_of[text] for text in texts]]
    return torch.cat(list(sample(model, cond, seeds, sampler)))


def lineage(models: Mapping[str, Path]) -> dict[str, Any]:
    """Of each model the hash of its network and the card that was written beside it."""
    return {name: {"network_sha256": network_lineage(network_file(path)), **_card(network_file(path))} for name, path in models.items()}


def _card(file: Path | None) -> dict[str, Any]:
    card = (file or WEIGHTS / "dit.safetensors").with_suffix(".json")
    return {"card": read_json(card, "the card of a network")} if card.is_file() else {}


def read_run(folder: Path, model: str, label: str, *, judged: bool = True) -> CurveRun:
    """An RL run's curves: what it logged and, `judged`, what the judge says now of the held-out clips it kept on the way.

    Raises UserError where there is no run.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"no metrics.jsonl of a run, {folder}. Give the folder of a `rushes nft`, `rushes ddpo` or another recipe of alignment")
    rows = read_rows(folder / "metrics.jsonl", METRIC_NAMES)
    return CurveRun(label, model, [*rows, *(_judged_on_the_way(folder) if judged else [])])


def _judged_on_the_way(folder: Path) -> list[dict[str, float]]:
    """One row for each look at the held-out prompts, {forward_passes, seconds, judge, diversity}.

    The look before iteration i is placed where i - 1 ended, the one after a run that its guard ended early at the end of the run.
    """
    try:
        told = Setting.model_validate({key: read_json(folder / "run.json", "the description of the run")["config"][key] for key in ("held_out_prompts", "seed", "strobe")})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the description of an RL run, {folder / 'run.json'}. Give the folder of a `rushes nft`, `rushes ddpo` or another recipe of alignment") from error
    prompts = make_prompts(told.held_out_prompts, seed=told.seed + 1, split="eval", strobe=told.strobe)
    columns = ("iteration", "forward_passes", "seconds")
    ends = {int(row["iteration"]) + 1: row for row in read_rows(folder / "metrics.jsonl", {name: name for name in columns}) if len(row) == len(columns)}
    start, end = {"forward_passes": 0, "seconds": 0.0}, max(ends.values(), key=lambda row: row["seconds"], default={})
    rows = []
    for file in sorted((folder / "held_out").glob("[0-9]*.safetensors")):
        video = load_weights(file)[0].get("video")
        if video is None or not file.stem.isdigit() or video.dim() != 5 or len(video) != len(prompts):
            raise UserError(f"not the held-out clips of this run, {file}. Delete the file, or give the folder of another run")
        at = ends.get(int(file.stem), end or start) if int(file.stem) else start
        seen = measure(video.float() / 255, prompts, 1)
        right = bootstrap_mean(list(shares(seen).values())).mean
        rows.append({"forward_passes": at["forward_passes"], "seconds": at["seconds"], "judge": right, "diversity": diversity_across(seen)})
    return rows


def read_measured(folder: Path) -> dict[str, Measured]:
    """The judge's readings behind a report, by model. Example: `numbers([read_measured(folder) for folder in reports])` pools several seeds.

    Raises UserError where the folder holds no report.
    """
    try:
        values = json.loads((folder / MEASURED).read_text())
        return {name: Measured.from_json(measured) for name, measured in values.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no readings of an evaluation, {folder / MEASURED}: {error}. Give the folder of a finished `rushes evaluate`") from error


def report(cfg: Config, extra: Callable[[], Mapping[str, Any]] = dict) -> dict[str, Any]:
    """Evaluates, writes `report.json`, `index.html` and the judge's readings, `measured.json`, into `cfg.out`; returns the content of `report.json`.

    extra: called last, so that it can tell the wall time and the peak memory so far; its entries are added to report.json or replace what is there
    (`filtered` rows are put in front). See `ReportData` for the entries the page shows.
    """
    check_can_write(cfg.out)
    files = {name: network_file(path) for name, path in cfg.models.items()}
    origins = lineage(cfg.models)
    seed = cfg.seed + EVALUATION_SEED
    prompts = make_prompts(cfg.prompts, seed=seed, split="eval", two_objects=cfg.two_objects, strobe=cfg.strobe)
    scorers: dict[str, Score] = {}
    if cfg.guard is not None:
        guard = standardised(load_scorer(cfg.guard, fps=cfg.sampler.fps))
        scorers["guard"] = lambda clips, texts: _in_batches(guard, clips, texts, cfg.sampler.batch)
    found = evaluate(
        list(files),
        cfg.captions or prompts,
        cfg.clips_per_prompt,
        seed=seed,
        fps=cfg.sampler.fps,
        generate=generator(cfg.models, cfg.sampler),
        runner=safety_runner(cfg.filters),
        scorers=scorers,
        eye=None if cfg.captions else Eye.load(),
        shown=cfg.shown,
    )
    results = _readings(cfg, found)
    if cfg.world:
        results["world"] = measure_world({name: load_tiny(file).to(best_device()) for name, file in files.items()}, cfg.sampler, scenes=cfg.world_scenes, seed=seed)
    results["lights"] = {name: looks for name, path in cfg.runs.items() if (looks := read_history(path))}
    results |= {"lineage": origins, "hardware": hardware(), "reward_model": None, **resolved(cfg)}
    names = {**NAMES, **cfg.names}
    runs = [read_run(path, name, names.get(name, name), judged=not cfg.captions) for name, path in cfg.runs.items()]
    told = dict(extra())
    results |= told | {"filtered": [*told.get("filtered", []), *found.filtered]}
    write_report(cfg.out, ReportData(results, found.shown, runs, cfg.sampler.fps, names=names))
    write_atomic(cfg.out / MEASURED, json.dumps({name: measured.to_json() for name, measured in found.measured.items()}).encode())
    return results


@torch.no_grad()
def _in_batches(scorer: Mixture, clips: Tensor, texts: Sequence[str], batch: int) -> Tensor:
    """The scores [B]."""
    parts = [scorer(clips[start : start + batch], texts[start : start + batch]).reward for start in range(0, len(clips), batch)]
    return torch.cat(parts)


def _readings(cfg: Config, found: Evaluation) -> dict[str, Any]:
    if cfg.captions:
        return numbers_of_real_clips(found.clips, cfg.sampler.fps, flash_limit=cfg.flash_limit) | found.score_intervals()
    results = numbers([found.measured], flash_limit=cfg.flash_limit) | found.score_intervals() | {"eye_judge_agreement": found.agreement_intervals()}
    if cfg.judge_check:
        codec = load_codec(WEIGHTS / "vae.safetensors")
        drawn = check_judge(cfg.judge_check, seed=cfg.seed)
        decoded = check_judge(cfg.judge_check, seed=cfg.seed, through=lambda clips: codec.decode(codec.encode(clips)))
        results |= {"judge_confusion": drawn.confusion, "judge_accuracy": {"freshly drawn clips": drawn.accuracy, "the same through the VAE": decoded.accuracy}}
    return results


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: a report is made anew. Raises `recipes.bias.Blocked` where a bias audit blocks."""
    if cfg.bias and cfg.captions:
        raise UserError("captions and bias: a bias audit has prompts of its own. Give one of them")
    if cfg.bias:
        networks = {} if cfg.audit.stores else {name: network_lineage(network_file(path)) for name, path in cfg.models.items()}
        return audit_bias(cfg.audit, cfg.out, networks, generator(cfg.models, cfg.sampler), cfg.sampler, cfg.seed + EVALUATION_SEED, cfg.filters)
    started = time.monotonic()
    with PeakMemory() as memory:
        results = report(cfg, lambda: {"wall_seconds": time.monotonic() - started, "peak_memory_bytes": memory.sample(), "commands": [f"rushes evaluate --out {cfg.out}"]})
    kept = ("world",) * cfg.world + ("judge", "judge_gain", "two_objects", "flash_rate", "diversity", "diversity_ratio", "counts", "wall_seconds")
    return {"report": str(cfg.out / "index.html"), **{key: results[key] for key in kept}}
