"""Small stand-ins of the shipped weights: a denoiser and a reward model with fresh weights, made in a second; and small runs of the recipes that move a policy."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.run import Run, read_metrics
from base_model.networks.dit import DiT, DiTConfig
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentVideoModel, load_codec, save_network
from base_model.types import Conditioning
from recipes.feedback import Assessor, HeldOut, Look, SafetyLimit, metrics_of, told_apart
from recipes.generate import Sampler, safety_runner
from recipes.guards import Guards
from reward.matcher import Matcher
from reward.mixture import Mixture, Term
from reward.model import RewardModel, save_reward_model
from reward.quality import Quality
from reward.safety.contract import Ruling, SafetyRunner, Verdict
from reward.safety.policy import load_policy
from reward.safety.prompt import WordFilter
from reward.types import Scores


def small_model(seed: int = 0) -> LatentVideoModel:
    """A denoiser of 48 channels and two blocks on the shipped autoencoder's latents."""
    torch.manual_seed(seed)
    config = DiTConfig(width=48, depth=2, heads=2, rotary_axes=(8, 8, 8))
    network = DiT(config)
    for parameter in network.tokens_out.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return LatentVideoModel(network, load_codec(WEIGHTS / "vae.safetensors"), TextEncoder(), config)


def save_small_network(path: Path, seed: int = 0) -> Path:
    save_network(path, small_model(seed))
    return path


def save_small_reward_model(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_reward_model(folder, RewardModel(Matcher(), Quality(), ("overall",), TextEncoder()), {})
    return folder


class Brightness:
    """A scorer with a known answer: the mean of all pixels."""

    dims = ("overall",)
    differentiable = True

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        mean = video.flatten(1).mean(1)[:, None]  # [B,1]
        return Scores(mean, torch.zeros_like(mean))


BRIGHT = Mixture({"signal": Brightness()}, (Term("signal", "overall", scale=0.1),))
SAMPLER = Sampler(steps=4, frames=5, height=16, width=16)


class Dazzle:
    """A filter with a known answer: the score is 0.5 at the brightness `limit`, and what is brighter is blocked."""

    id, version, threshold, policies = "dazzle", "1", 0.5, ("P17",)

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        scores = torch.sigmoid(40 * (video.flatten(1).mean(1) - self.limit)).tolist()
        return [[Ruling(Verdict.BLOCK if score > 0.5 else Verdict.ALLOW, "P17", score, (), self.id, self.version, self.threshold)] for score in scores]


def dazzled(limit: float) -> SafetyRunner:
    """Every prompt is allowed, and every clip that is not brighter than `limit`."""
    policy = load_policy()
    return SafetyRunner([WordFilter(policy), Dazzle(limit)], policy)


@dataclass
class Counting(LatentVideoModel):
    """Counts clips through the network: "trained" with a gradient, "asked" without."""

    counted: Counter[str] = field(default_factory=Counter)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.counted["trained" if torch.is_grad_enabled() else "asked"] += len(x_t)
        return super().__call__(x_t, t, cond)


def counting_model() -> Counting:
    model = small_model()
    return Counting(model.network, model.codec, model.text, model.config)


class NoLook(HeldOut):
    """Nothing held out, so that every pass counted is of rollout or replay."""

    def watch(self, *_: Any) -> Look:
        return Look(dict.fromkeys(("held_out_reward", "held_out_guard", "held_out_violation_rate"), 0.0), torch.zeros(0, 5, 3, 16, 16), None)


def no_look() -> NoLook:
    return NoLook((), Conditioning((), torch.zeros(0, 1, 384), torch.ones(0, 1, dtype=torch.bool)), SAMPLER, None, 0, Path())


def run_small(
    recipe: Any,
    out: Path,
    policy: Mapping[str, Any],
    *,
    reward: Any = BRIGHT,
    runner: SafetyRunner | None = None,
    model: Any = None,
    held_out: HeldOut | None = None,
    sampler: Sampler = SAMPLER,
    resume: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """What `recipe.train` logged, without times, of a small model on six prompts; unconstrained where nothing else is said."""
    common = {"iterations": 1, "micro_batch": 12, "lr": 1e-2, "evaluate_every": 100, "save_every": 100}
    limit = SafetyLimit(limit=0.2, initial=5.0, cap=20.0)
    told = {"prompt_pool": 6, "strobe": 0.0, "two_objects": 0.0, "constrained": False, "safety": limit, "sampler": sampler, "guards": Guards(watch=False), **settings}
    cfg = recipe.Config(out=out, policy=recipe.Policy(**{**common, **policy}), **told)
    model = model or small_model()
    model.network.requires_grad_(False)
    run = Run(out, cfg, seed=cfg.seed, resume=resume, metrics=metrics_of(cfg, recipe.METRICS), quiet=True)
    (model.to if isinstance(model, LatentVideoModel) else model.network.to)(run.device)
    assess = Assessor(reward, runner or safety_runner(), 12.0, max_error_share=1.0, dimensions=told_apart(cfg), limited=tuple(cfg.limits))
    recipe.train(cfg, run, model, assess, held_out or no_look())
    return read_metrics(out, wall_clock=False)


def mean_over(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """A metric's mean over the first three rollouts and over the last three."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values[:3]) / 3, sum(values[-3:]) / 3


def noting_device(seen: list[str], answer: Any) -> Callable[..., Any]:
    """A stand-in for what takes a model first: notes where the model lies, and gives `answer`."""

    def call(model: LatentVideoModel, *more: Any) -> Any:
        seen.append(model.device.type)
        return answer

    return call


def save_small_start(folder: Path) -> list[str]:
    """A network, a reward model and a guard for a benchmark of RL, as words of a command line."""
    rewards = [save_small_reward_model(folder / name, seed=seed) for name, seed in (("reward", 1), ("guard", 2))]
    return ["--model", str(save_small_network(folder / "network.safetensors")), "--reward", str(rewards[0]), "--guard", str(rewards[1])]
