"""How far can a reward model be optimised before gold falls: best of n against sqrt(KL), by rankings learned from, and RL that goes on when it should stop.

The built-in world has two golds. *People*: what the simulated panel, whose rankings taught the reward models, wants on average, without its noise and habits. *Judge*: whether
every attribute of the prompt is right on screen. Many clips of held-out prompts are made once by the shipped base; reward models learn from few and from many rankings, with the
shipped prior (stay near the matcher) and with a weak one (trust the rankings); each picks the best of n. Then NFT without limit and without guard climbs two of them, and is looked
at on the way. Equations: `reward/overoptimisation.py`. KL of RL: `align.trajectory.path_kl`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Count, dump
from align.kernels import Ancestral
from align.run import Run, derived_seed, read_metrics
from align.trajectory import path_kl, rollout
from base_model.checkpoint import load_weights, save_weights
from base_model.prompts.text import TextEncoder
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import TrainableModel
from base_model.video.files import write_atomic
from recipes import nft, reward_model
from recipes.bench._people import panel_worth, perceived, to_tensor
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._trained import PROMPT_SEED, Pace, Seeds, asked, kept
from recipes.best_of_n import verdict
from recipes.charts import Series, line_chart, page
from recipes.evaluate import clip_seeds
from recipes.feedback import Assessor, HeldOut, Look, standardised
from recipes.generate import Sampler, network_lineage, safety_runner, sample, seeded_noise, times_of
from recipes.guards import Guards
from recipes.match import SHIPPED
from recipes.quality import SHIPPED as QUALITY
from recipes.shapes.eye import WEIGHTS as EYE
from recipes.shapes.eye import Eye, Perception
from recipes.shapes.judge import judge
from recipes.shapes.labelers import REWARD_PANEL, Task, collect
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.weights import file_hash
from reward.matcher import load_matcher
from reward.model import INPUTS, EncodeText, RewardModel
from reward.overoptimisation import Curve, Form, clips_for_kl, curve_of, fit_gao, mean_gains, second_half
from reward.quality import load_quality

VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""
RANKED_SEED, K = 800_000, 4
"""Of the prompts that are ranked; clips a ranking."""
SHIPPED_PRIOR, WEAK = "as shipped", "weak"
PRIORS = {
    SHIPPED_PRIOR: {name: getattr(reward_model.Config(), name) for name in ("ridge", "signal_ridge", "intact", "intact_ridge")},
    WEAK: {"ridge": 0.05, "signal_ridge": 0.05, "intact": 0.0, "intact_ridge": 0.05},
}
TOLD_N = (4, 16)
"""Beside the largest."""
GOLDS = ("people", "judge")
WORDS = {"people": "what people want", "judge": "the judge"}
Array = NDArray[np.float64]
COLOURS = {"few": "#c2410c", "some": "#8a6a3d", "many": "#2f6fb3"}
MORE = ".promised .line,.none .line{stroke:#1a1c20;stroke-width:1.5;stroke-dasharray:2 4}.promised .dot,.none .dot{display:none}"


class Config(Bench):
    out: Path = Path("runs/bench-overoptimisation")
    """Folder of what was made of the clips, and of the RL runs: what is finished there is not repeated. `quick` keeps nothing."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of which prompts are ranked, by whom and with what noise. RL climbs reward models of the first. `quick` takes two."""
    rankings: Annotated[tuple[Count, ...], Field(min_length=1, max_length=3)] = (30, 120, 480)
    """Rankings of four clips that reward models learn from, increasing. `quick` takes at most 6, 12 and 18."""
    prompts: Count = 128
    """Held-out prompts of one object. `quick` takes at most 6."""
    clips: Annotated[int, Field(ge=4)] = 64
    """Clips of each, by the shipped base. `quick` takes at most 8."""
    policy: nft.Policy = nft.Policy(iterations=48, evaluate_every=4, save_every=8)
    """How NFT moves the base, further than is wise. `quick` takes 3 small rollouts."""
    kl_steps: Annotated[int, Field(ge=4)] = 12
    """Ancestral steps of the paths whose KL is told; more of them leave less noise, and give a larger KL."""
    kl_clips: Count = 32
    """Paths it is averaged over. `quick` takes at most 4."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""

    @field_validator("rankings")
    @classmethod
    def _rankings_increase(cls, rankings: tuple[int, ...]) -> tuple[int, ...]:
        if list(rankings) != sorted(set(rankings)):
            raise ValueError(f"expected increasing numbers, got {list(rankings)}")
        return rankings

    @field_validator("policy")
    @classmethod
    def _there_are_looks_on_the_way(cls, policy: nft.Policy) -> nft.Policy:
        if policy.iterations <= policy.evaluate_every:
            raise ValueError(f"expected more iterations than evaluate_every, {policy.evaluate_every}, to look at the policy on its way, got {policy.iterations}")
        return policy


# Clips, and what is known of them


@dataclass(frozen=True)
class Clips:
    """G clips of each of P prompts, those of one prompt in a row: what the reward model, the eye and the judge make of them."""

    prompts: Sequence[ShapesPrompt]  # P
    inputs: Tensor  # [P*G,26] of the reward model
    perception: Perception  # P*G
    right: Tensor  # [P*G] 1 where the judge finds every attribute right

    def by_prompt(self, values: Any) -> Array:
        """[P*G] -> [P,G]."""
        return np.asarray(values, dtype=np.float64).reshape(len(self.prompts), -1)

    def golds(self) -> dict[str, Array]:
        """[P,G] each."""
        return {"people": self.by_prompt(panel_worth(REWARD_PANEL, self.perception)), "judge": self.by_prompt(self.right)}


def make_clips(cfg: Config, prompts: Sequence[ShapesPrompt], number: int, seed: int) -> dict[str, Tensor]:
    """What there is to know of `number` clips of each prompt; minutes for thousands."""
    base, eye = load_tiny(None), Eye.load()
    model = RewardModel(load_matcher(SHIPPED["reward"]), load_quality(QUALITY["reward"]), ("overall",), base.text).eval()
    seeds = clip_seeds(seed, len(prompts) * number)
    found: dict[str, list[Tensor]] = {"inputs": [], "seen": [], "right": []}
    pace = Pace("overoptimisation, prompts", len(prompts))
    cond = base.encode_text([prompt.text for prompt in prompts])
    for i, prompt in enumerate(prompts):
        video = torch.cat(list(sample(base, cond[[i] * number], seeds[i * number : (i + 1) * number], cfg.sampler)))  # [G,T,3,H,W]
        with torch.no_grad():
            found["inputs"].append(model.inputs(video, [prompt.text] * number))
        found["seen"].append(to_tensor(eye.look(video, [prompt] * number)))
        found["right"].append(torch.tensor([float(one.all_right) for one in judge(video, [prompt] * number)]))
        if (i + 1) % 16 == 0:
            pace.advance("", 16, fresh=True)
    return {name: torch.cat(parts) for name, parts in found.items()}


def kept_clips(cfg: Config, out: Path, name: str, prompts: Sequence[ShapesPrompt], number: int, seed: int) -> Clips:
    """The same, made once for its settings and read from `out` ever after."""
    hashes = {name: file_hash(path) for name, path in (("matcher", SHIPPED["reward"]), ("quality", QUALITY["reward"]), ("eye", EYE))}
    origin = {"version": VERSION, "base": network_lineage(None), **hashes, "inputs": list(INPUTS)}
    settings = {**origin, "sampler": dump(cfg.sampler), "seed": seed, "clips": number, "prompts": [prompt.text for prompt in prompts]}
    path = out / f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        print(f"making {number} clips of each of {len(prompts)} prompts", file=sys.stderr, flush=True)
        save_weights(path, make_clips(cfg, prompts, number, seed), {})
    tensors, _ = load_weights(path)
    return Clips(prompts, tensors["inputs"], perceived(tensors["seen"]), tensors["right"])


# Reward models


def learn(ranked: Clips, prior: str, rankings: int, seed: int, encode: EncodeText) -> RewardModel:
    """A reward model from so many rankings, of one person each, by the likelihood and the penalty of `rushes reward-model`."""
    chosen = np.random.default_rng([seed, len(ranked.prompts)]).permutation(len(ranked.prompts))[:rankings]
    tasks = [Task(ranked.prompts[i].prompt_id, tuple(str(K * i + k) for k in range(K)), ranked.perception[range(K * i, K * i + K)]) for i in chosen]
    rows = collect(REWARD_PANEL, tasks, seed=seed, overlap=0, repeats=0, gold=0)
    clips, index = torch.tensor([[int(clip) for clip in row["clip_ids"]] for row in rows]).unique(return_inverse=True)  # [C], [E,K]
    model = RewardModel(load_matcher(SHIPPED["reward"]), load_quality(QUALITY["reward"]), ("overall",), encode, most_clips=K)
    reward_model.fit_standard(model, ranked.inputs[clips])
    ranks, number = torch.tensor([list(row["ranks"]) for row in rows]), torch.arange(len(rows))  # [E,K], [E]
    table = reward_model.Table(model.standardised(ranked.inputs[clips]), index, ranks, torch.zeros_like(number), torch.ones(len(rows)), number)
    with torch.no_grad():
        model.log_tie.copy_(reward_model.start_log_tie([table], K))
    reward_model.fit_head(reward_model.Config(**PRIORS[prior]), model, table)
    with torch.no_grad():
        reward_model.normalise(model, model.head(table.inputs)[None])
    return model.eval().requires_grad_(False)


def within(values: Array) -> float:
    """Standard deviation among clips of one prompt, [P,G]; 1 where all are alike."""
    return float(np.sqrt(values.var(axis=1, ddof=1).mean())) or 1.0


def scores(model: RewardModel, inputs: Tensor) -> Tensor:
    """[C]."""
    found: Tensor = model.head(model.standardised(inputs))[:, 0]
    return found


def accuracy(proxy: Array, worth: Array) -> float:
    """Share of pairs of clips of one prompt, [P,G], that the proxy orders as their worth does; equal proxies earn one half."""
    signs = [np.sign(part[:, :, None] - part[:, None, :])[:, *np.triu_indices(part.shape[1], 1)] for part in (proxy, worth)]
    return float((signs[0] * signs[1] / 2 + 0.5)[signs[1] != 0].mean())


# Best of n


class Arm(NamedTuple):
    """Best of n by one sort of reward model: curves of each seed, for each gold."""

    prior: str
    rankings: int | None
    accuracy: float | None  # mean over seeds, by what people want
    curves: Mapping[str, Sequence[Curve]]  # gold -> seeds

    def mean(self, gold: str) -> Curve:
        """The mean over the seeds, prompt by prompt."""
        ones = self.curves[gold]
        proxy = np.mean([one.proxy / (one.proxy_std or 1.0) for one in ones], axis=0)  # [P,K]
        return ones[0]._replace(proxy=proxy, proxy_std=1.0, gold=np.mean([one.gold for one in ones], axis=0))


MATCHER, ITSELF = "the matcher alone", "gold itself"


def arm_of(prior: str, rankings: int | None, proxies: Sequence[Array], golds: Mapping[str, Array]) -> Arm:
    right = float(np.mean([accuracy(proxy, golds["people"]) for proxy in proxies]))
    return Arm(prior, rankings, right, {name: [curve_of(list(proxy), list(gold), gold.shape[1]) for proxy in proxies] for name, gold in golds.items()})


def arms_of(cfg: Config, ranked: Clips, takes: Clips, encode: EncodeText) -> list[Arm]:
    """Every prior and number of rankings, and what frames them: nothing learned, and gold picked by itself."""
    golds = takes.golds()
    found = [arm_of(MATCHER, 0, [takes.by_prompt(takes.inputs[:, :3].sum(1))], golds)]
    for prior in PRIORS:
        for number in cfg.rankings:
            proxies = [takes.by_prompt(scores(learn(ranked, prior, number, seed, encode), takes.inputs)) for seed in cfg.seeds]
            found.append(arm_of(prior, number, proxies, golds))
    best = {name: [curve_of(list(gold), list(gold), gold.shape[1])] for name, gold in golds.items()}
    return [*found, Arm(ITSELF, None, None, best)]


# RL


@dataclass
class Watched(HeldOut):
    """Held-out looks that also tell how far the policy went."""

    prior: LatentVideoModel
    kl_steps: int
    kl_clips: int

    def watch(self, model: TrainableModel, assess: Assessor, iteration: int) -> Look:
        seen = super().watch(model, assess, iteration)
        return seen._replace(told=seen.told | {"path_kl": self.kl(model, self.kl_steps)[0]})

    def kl(self, model: TrainableModel, steps: int) -> tuple[float, float]:
        """Mean over paths of so many steps, nats a clip; and the sigma of the noise that is left before the last step."""
        cond = self.cond[: self.kl_clips]
        noise = seeded_noise(model, self.sampler.clip, [derived_seed(self.seed, "path", k) % 2**31 for k in range(len(cond))])  # [B,C,F,H,W]
        times = times_of(model, self.sampler.model_copy(update={"steps": steps}))  # [K+1]
        taken = rollout(model, Ancestral(), noise, times, cond, noise=torch.Generator().manual_seed(derived_seed(self.seed, "path noise", 0)))
        return float(path_kl(model, self.prior, Ancestral(), taken).mean()), float(model.path.sigma(times[-2]))


METRICS = {**nft.METRICS, "path_kl": "KL of the policy's ancestral paths from the base's, down to the noise that is left before the last step, nats per clip."}


class Climb(NamedTuple):
    """An RL run on one reward model: what was found at each of its looks, over P held-out prompts."""

    prior: str
    rankings: int
    iteration: list[int]  # [L]
    kl: Array  # [L] nats a clip
    values: Mapping[str, Array]  # proxy, people, judge -> [P,L]
    grids: list[Row]  # KL at the end by paths of other numbers of steps

    def gains(self, name: str, unit: float) -> Array:
        """[P,L] since the first look."""
        return (self.values[name] - self.values[name][:, :1]) / unit


def climb(cfg: Config, out: Path, model: RewardModel) -> dict[str, Any]:
    """NFT from the shipped base on this reward alone, in `out`: `Climb`, as it is kept."""
    prompts, _ = asked(cfg.prompts)
    settings = nft.Config(out=out, seed=cfg.seeds[0], constrained=False, pessimism=0, two_objects=0, strobe=0, guards=Guards(watch=False), policy=cfg.policy, sampler=cfg.sampler)
    run = Run(out, settings, seed=settings.seed, resume=(out / "run.json").exists(), metrics=METRICS)
    policy, base = (load_tiny(None).to(run.device) for _ in range(2))
    policy.network.requires_grad_(False)
    assess = Assessor(standardised(model), safety_runner(), cfg.sampler.fps)
    texts = [prompt.text for prompt in prompts]
    held_out = Watched(texts, policy.encode_text(texts), cfg.sampler, None, settings.seed, out / "held_out", base, cfg.kl_steps, cfg.kl_clips)
    nft.train(settings, run, policy, assess, held_out)
    run.log(**held_out.watch(policy, assess, run.iteration).told)
    kl = {int(line["iteration"]): line["path_kl"] for line in read_metrics(out) if "path_kl" in line}
    eye, looks = Eye.load(), []
    for iteration in sorted(kl):
        video = load_weights(out / "held_out" / f"{iteration:06d}.safetensors")[0]["video"].float() / 255  # [P,T,3,H,W]
        judged = [float(one.all_right) for one in judge(video, prompts)]
        people = panel_worth(REWARD_PANEL, eye.look(video, prompts))
        looks.append({"iteration": iteration, "kl": kl[iteration], "proxy": model(video, texts).mean[:, 0].tolist(), "people": people.tolist(), "judge": judged})
    grids = {steps: held_out.kl(policy, steps) for steps in (cfg.kl_steps // 2, cfg.kl_steps, 2 * cfg.kl_steps, 4 * cfg.kl_steps)}
    return {"looks": looks, "grids": [{"steps": steps, "noise_left": left, "kl_total": nats} for steps, (nats, left) in grids.items()]}


def kept_climb(cfg: Config, out: Path, ranked: Clips, takes: Clips, prior: str, rankings: int, encode: EncodeText) -> Climb:
    """The run on the reward model of the first seed, gone through once for its settings; the proxy in standard deviations among takes of one prompt."""
    model = learn(ranked, prior, rankings, cfg.seeds[0], encode)
    weights = hashlib.sha256(model.head.weight.detach().numpy().tobytes()).hexdigest()
    asked_for = {key: dump(cfg)[key] for key in ("prompts", "policy", "kl_steps", "kl_clips", "sampler")}
    settings = {"version": VERSION, "base": network_lineage(None), "reward": weights, "seed": cfg.seeds[0], **asked_for}
    folder = out / f"rl-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}"
    found = kept(folder / "looks.json", settings, partial(climb, cfg, folder / "run", model))
    values = {name: np.array([look[name] for look in found["looks"]]).T for name in ("proxy", *GOLDS)}
    values["proxy"] /= within(takes.by_prompt(scores(model, takes.inputs)))
    return Climb(prior, rankings, [look["iteration"] for look in found["looks"]], np.array([look["kl"] for look in found["looks"]]), values, found["grids"])


# Rows


def interval(name: str, found: Iterable[float]) -> Row:
    """Three columns; what is not finite is null."""
    return columns(name, [value if np.isfinite(value) else None for value in found])


def best_of_n_rows(arms: Sequence[Arm], units: Mapping[str, float]) -> list[Row]:
    rows = []
    for gold in GOLDS:
        for arm in arms:
            curve = arm.mean(gold)
            gain, sizes = curve.gold / units[gold], curve.n.tolist()
            measured = dict(zip(sizes, mean_gains(gain), strict=True))
            gains = {key: value for n in (*TOLD_N, sizes[-1]) if n in measured for key, value in interval(f"n_{n}", measured[n]).items()}
            later = second_half(curve.d, gain)
            row = {"gold": gold, "picked_by": arm.prior, "rankings": arm.rankings, "accuracy": arm.accuracy, "promised": float(curve.proxy[:, -1].mean()), **gains}
            rows.append({**row, **interval("second_half", later), "gold_then": verdict(later)})
    return rows


def form_row(form: Form, d: Array, gain: Array) -> Row:
    """Gao's form of one curve; a peak beyond the largest d is not told, since nothing was measured there."""
    found = fit_gao(form, d, gain)
    farthest = float(d.max())
    peak = [value if value <= farthest else np.inf for value in found.peak]
    clips = interval("peak_n", map(clips_for_kl, np.square(peak))) if form == "best_of_n" else {}
    parts = {**interval("alpha", found.alpha), **interval("beta", found.beta), **interval("peak_sqrt_kl", peak), **clips}
    return {**parts, "largest_sqrt_kl": farthest, "misfit": found.misfit}


def form_rows(arms: Sequence[Arm], units: Mapping[str, float]) -> list[Row]:
    curves = [(gold, arm, arm.mean(gold)) for gold in GOLDS for arm in arms]
    return [{"gold": gold, "picked_by": arm.prior, "rankings": arm.rankings, **form_row("best_of_n", curve.d, curve.gold / units[gold])} for gold, arm, curve in curves]


def rl_form_rows(climbs: Sequence[Climb], units: Mapping[str, float]) -> list[Row]:
    """The form, and what gold did in the second half of each run."""
    rows = []
    for gold in GOLDS:
        for one in climbs:
            d, gain = np.sqrt(one.kl), one.gains(gold, units[gold])
            later = second_half(d, gain)
            row = {"gold": gold, "reward_model": one.prior, "rankings": one.rankings, **form_row("rl", d, gain)}
            rows.append({**row, **interval("second_half", later), "gold_then": verdict(later)})
    return rows


def rl_rows(climbs: Sequence[Climb], units: Mapping[str, float], elements: int) -> list[Row]:
    """One row a look."""
    rows = []
    for one in climbs:
        found = {name: mean_gains(one.gains(name, units[name])) for name in one.values}
        for k, iteration in enumerate(one.iteration):
            kl = {"kl_total": float(one.kl[k]), "kl_per_element": float(one.kl[k]) / elements, "sqrt_kl": float(np.sqrt(one.kl[k]))}
            gains = {key: value for name, each in found.items() for key, value in interval("promised" if name == "proxy" else name, each[k]).items()}
            rows.append({"reward_model": one.prior, "rankings": one.rankings, "iteration": iteration, **kl, **gains})
    return rows


def compact(rows: Sequence[Row]) -> list[Row]:
    """For the file: a mean and its interval in one cell. A peak that is not told lies beyond what was measured."""

    def text(value: float | None) -> str:
        return "beyond" if value is None else f"{value:.3g}"

    def cell(row: Row, name: str) -> Any:
        return f"{text(row[name])} [{text(row[f'{name}_low'])}, {text(row[f'{name}_high'])}]" if f"{name}_low" in row else row[name]

    return [{name: cell(row, name) for name in row if not name.endswith(("_low", "_high"))} for row in rows]


# Drawing


def panels(cfg: Config, arms: Sequence[Arm], climbs: Sequence[Climb], units: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Best of n by gold and prior, then RL by gold and run: a weak prior at the left, the shipped one at the right."""
    looks = dict(zip(cfg.rankings, ("few", "some", "many")[-len(cfg.rankings) :], strict=True))
    drawn = []
    for gold in GOLDS:
        for prior in (WEAK, SHIPPED_PRIOR):
            mine = [(arm, arm.mean(gold)) for arm in arms if arm.prior in (MATCHER, prior)]
            lines = [Series(str(arm.rankings), looks.get(arm.rankings or 0, "none"), *points(curve.d, curve.gold / units[gold])) for arm, curve in mine]
            legend = f"prior {prior}; orange to blue: {', '.join(map(str, cfg.rankings))} rankings"
            drawn.append(panel(f"Best of n: {WORDS[gold]}", legend, lines, gold))
    for gold in GOLDS:
        for one in climbs:
            shown = {"people": ("people", "proxy"), "judge": ("judge",)}[gold]
            lines = [Series(name, "promised" if name == "proxy" else looks[one.rankings], *points(np.sqrt(one.kl), one.gains(name, units[name]))) for name in shown]
            drawn.append(panel(f"RL: {WORDS[gold]}", f"prior {one.prior}, {one.rankings} rankings", lines, gold))
    return drawn


def panel(title: str, legend: str, lines: Sequence[Series], gold: str) -> tuple[str, str, str]:
    return title, legend, line_chart(lines, name=f"{title}, {legend}", x_label="sqrt(KL)", percent=gold == "judge")


def points(d: Array, gain: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Gains [P,K] as the means to draw."""
    return tuple(d.tolist()), tuple(gain.mean(0).tolist())


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    small = {"iterations": 3, "evaluate_every": 1, "prompts": 2, "group_size": 4, "micro_batch": 8, "updates": 1, "lora_rank": 4}
    policy = cfg.policy.model_copy(update={key: min(value, getattr(cfg.policy, key)) for key, value in small.items()})
    rankings = tuple(dict.fromkeys(min(6 * (k + 1), number) for k, number in enumerate(cfg.rankings)))
    less = {"prompts": min(6, cfg.prompts), "clips": min(8, cfg.clips), "kl_clips": min(4, cfg.kl_clips), "kl_steps": min(4, cfg.kl_steps)}
    return cfg.model_copy(update={"seeds": cfg.seeds[:2], "rankings": rankings, "policy": policy, **less})


def measure(cfg: Config, out: Path) -> tuple[dict[str, list[Row]], list[str], str]:
    """The rows of each part, what is to be said of them, and the chart."""
    prompts, _ = asked(cfg.prompts)
    encode = TextEncoder()
    takes = kept_clips(cfg, out, "takes", prompts, cfg.clips, PROMPT_SEED)
    ranked = kept_clips(cfg, out, "ranked", make_prompts(cfg.rankings[-1], seed=RANKED_SEED, split="train"), K, RANKED_SEED)
    worth = takes.golds()["people"]
    units = {"proxy": 1.0, "people": within(worth), "judge": 1.0}
    arms = arms_of(cfg, ranked, takes, encode)
    climbs = [kept_climb(cfg, out, ranked, takes, prior, number, encode) for prior, number in ((WEAK, cfg.rankings[0]), (SHIPPED_PRIOR, cfg.rankings[-1]))]
    elements = int(np.prod(load_tiny(None).latents.shape(cfg.sampler.clip)))
    parts = {
        "best of n": best_of_n_rows(arms, units),
        "Gao's form, best of n": form_rows(arms, units),
        "RL": rl_rows(climbs, units, elements),
        "Gao's form, RL": rl_form_rows(climbs, units),
        "KL at the end, by grid": [{"reward_model": one.prior, "rankings": one.rankings, **row} for one in climbs for row in one.grids],
    }
    remarks = [
        f"{len(prompts)} held-out prompts, {cfg.clips} clips each; {float(takes.right.mean()):.1%} of the clips are right. The judge's gains are in shares of clips, people's in "
        f"standard deviations among clips of one prompt ({units['people']:.2f} of their utility). Intervals are 95 % bootstraps over prompts; best of n is the mean over "
        f"{len(cfg.seeds)} seeds, RL one run each.",
    ]
    return parts, remarks, page(panels(cfg, arms, climbs, units), COLOURS, more=MORE)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    with place(cfg, cfg.out) as out:
        parts, remarks, drawn = measure(shrunk(cfg) if cfg.quick else cfg, out)
    if cfg.write:
        sections = {heading[0].upper() + heading[1:]: compact(rows) for heading, rows in parts.items()}
        remarks = ["![Gold against sqrt(KL)](overoptimisation.svg)", *remarks]
        write(cfg, "overoptimisation", here("overoptimisation", cfg), "How far a reward can be optimised", sections, remarks=remarks)
        write_atomic(cfg.results / "overoptimisation.svg", drawn.encode())
        print(f"wrote {cfg.results / 'overoptimisation.svg'}", file=sys.stderr)
    return {"rows": flat(parts)}
