"""Our DDPO in a process that makes one epoch whenever it is told to: the functions of `rushes ddpo` on trl's model, with trl's settings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from align.advantage import group_advantage
from align.config import Config, Count
from align.kernels import Ancestral, Kernel
from align.objectives import Loss
from align.objectives.policy_gradient import METRICS, ppo_clip
from align.run import Run
from align.trajectory import Step, join_steps, replay, rollout
from base_model.guidance import Guided
from base_model.lora import add_lora
from base_model.predictions import convert
from base_model.threads import in_threads
from base_model.types import Conditioning, VideoModel
from recipes.bench._serve import Answer, Handlers, Passes, peak_bytes, serve
from recipes.bench._stable_diffusion import ATTENTION, CLIP, load

PEFT = "base_model.model."  # what peft puts before a parameter's name, and diffusers does not


class Spec(Config):
    """What both processes do."""

    model: Path
    """Folder of the pipeline."""
    out: Path
    """Folder for the run of ours."""
    prompts: tuple[str, ...]
    """Prompts, taken in turn."""
    train: Literal["lora", "full"] = "lora"
    """What trains: adapters of rank 4 on the attention's projections, or all of the UNet."""
    guidance: float = 5.0
    """Scale of guidance in rollout and update; 1 is none."""
    clips: Count = 16
    """Samples an epoch."""
    rollout_batch: Count = 4
    """Samples that are denoised at once, over all threads."""
    micro_batch: Count = 2
    """Samples that are forwarded and backwarded at once, over all threads."""
    steps: Count = 10
    """Denoising steps; all but one are trained."""
    steps_a_pass: Count = 1
    """Denoising steps of a sample in one forward and backward; trl knows 1 only."""
    threads: Count = 1
    """Threads of torch."""
    eta: float = 1.0
    """DDIM's share of noise."""
    lr: float = 3e-4
    """Learning rate of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    clip_range: float = 1e-4
    """PPO's clip range."""
    seed: int = 0
    """Seed of noise and fresh adapters."""


@dataclass(frozen=True)
class Part:
    """A micro-batch of b samples to learn from."""

    steps: Sequence[Step]
    cond: Conditioning
    advantage: Tensor  # by the steps' rows
    share: float  # of the update


def losses_of(spec: Spec, policy: VideoModel, kernel: Kernel, part: Part) -> Iterator[Loss]:
    """The losses of a part, `steps_a_pass` denoising steps in each: mean over all samples and steps of the update."""
    for k in range(0, len(part.steps), spec.steps_a_pass):
        step = join_steps(part.steps[k : k + spec.steps_a_pass])
        now = replay(policy, kernel, step, part.cond)
        loss = ppo_clip(now.log_prob(step.x_next), step.log_prob, part.advantage[step.rows], spec.clip_range)
        yield Loss(loss.value * part.share * len(step.rows) / sum(len(each.rows) for each in part.steps), loss.stats)


class Arm:
    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(spec.threads)
        self.spec, self.model, self.kernel = spec, load(spec.model), Ancestral(spec.eta)
        self.passes = Passes(self.model.network)
        if spec.train == "lora":
            self.model.network = add_lora(self.model.network.requires_grad_(False), rank=4, alpha=4, targets=ATTENTION, seed=spec.seed)
        self.model.network.train()
        self.policy: VideoModel = Guided(self.model, spec.guidance, joined=True)
        self.optimizer = self.new_optimizer()
        self.run = Run(spec.out, spec, seed=spec.seed, resume=False, metrics={"reward": "Mean reward.", **METRICS}, quiet=True)
        self.iterations = self.run.iterations(10**9, save_every=10**9, label="ddpo")
        self.cond = self.model.encode_text([spec.prompts[k % len(spec.prompts)] for k in range(spec.clips)])
        self.times = self.model.times(spec.steps)

    def new_optimizer(self) -> torch.optim.AdamW:
        trained = [parameter for parameter in self.model.network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.spec.lr, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)

    def each(self, together: int) -> int:
        """Samples of one thread, where so many are worked on at once."""
        return max(1, together // self.spec.threads)

    def epoch(self) -> Answer:
        spec, run = self.spec, self.run
        self.passes.take()
        moments, cpu = [time.perf_counter()], time.process_time()

        # 1. Roll out.
        generator = run.generator("rollout", next(self.iterations))
        size = self.model.latents.shape(CLIP)  # C F H W
        noise = torch.randn(spec.clips, *size, generator=generator)  # [B,C,F,H,W]
        injected = torch.randn(spec.steps, spec.clips, *size, generator=generator)  # [K,B,C,F,H,W]
        batches = list(torch.arange(spec.clips).split(self.each(spec.rollout_batch)))
        made = in_threads(lambda rows: self.roll_out(rows, noise[rows], injected[:, rows]), batches, run.device)
        moments.append(time.perf_counter())

        # 2. Reward and advantage.
        reward = torch.cat([video.mean((1, 2, 3, 4)) for _, video in made])  # [B]
        advantage = group_advantage(reward, spec.clips, divide_by="group_std").advantage
        moments.append(time.perf_counter())

        # 3. Move the policy.
        parts = []
        for rows, (steps, _) in zip(batches, made, strict=True):
            for some in torch.arange(len(rows)).split(self.each(spec.micro_batch)):
                parts.append(Part([step.select(some) for step in steps], self.cond[rows], advantage[rows], len(some) / spec.clips))
        losses = run.backward_each(self.optimizer, lambda part: losses_of(spec, self.policy, self.kernel, part), parts)
        run.step(self.optimizer, spec.max_grad_norm)
        run.log(reward=reward.mean(), **losses[0].stats)
        moments.append(time.perf_counter())

        rollout_seconds, _, update = (after - before for before, after in pairwise(moments))
        seconds, cpu = moments[-1] - moments[0], time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "rollout": rollout_seconds, "update": update, **self.passes.take(), "peak_bytes": peak_bytes()}

    @torch.no_grad()
    def roll_out(self, rows: Tensor, noise: Tensor, injected: Tensor) -> tuple[list[Step], Tensor]:
        """The noisy steps of the samples `rows` [b], and their pictures [b,1,3,H,W]."""
        taken = rollout(self.policy, self.kernel, noise, self.times, self.cond[rows], noise=lambda k: injected[k])
        return taken.steps(), self.model.decode(taken.x0)

    def compare(self, file: str) -> Answer:
        """What ours makes of an epoch that `_trl_worker.capture` wrote: largest differences of log-probabilities, of gradients and of the step.

        The gradient's is the largest over the parameters' tensors of |ours - trl's| / |trl's|, where a norm below a thousandth of the largest counts as that: a bias before a
        norm of its channel has a gradient of nothing but rounding. The step's is that of all parameters together.
        """
        tensors = load_file(file)
        parameters = {name.removeprefix(PEFT): p for name, p in self.model.network.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"before.{name}"])
        calls = [{name: tensors[f"{n:04d}.{name}"] for name in NAMES} for n in range(sum(name.endswith(".now") for name in tensors))]
        found = {"log_prob_difference": 0.0, "kernel_difference": 0.0}
        parts = []
        for k in range(0, len(calls), self.spec.steps - 1):
            part = self.part_of(calls[k : k + self.spec.steps - 1])
            parts.append(part)
            with torch.no_grad():
                together = join_steps(part.steps)
                now = torch.cat([call["now"] for call in calls[k : k + self.spec.steps - 1]])
                eps = torch.cat([call["eps"] for call in calls[k : k + self.spec.steps - 1]])[:, :, None]
                alone = self.kernel(self.model.path, together.x, convert(self.model.path, eps, together.x, together.t, kind="eps", to="u"), together.t, together.s)
                replayed = replay(self.policy, self.kernel, together, part.cond)
            for name, step in (("kernel_difference", alone), ("log_prob_difference", replayed)):
                found[name] = max(found[name], float((step.log_prob(together.x_next) - now).abs().max()))
        optimizer = self.new_optimizer()
        self.run.backward_each(optimizer, lambda part: losses_of(self.spec, self.policy, self.kernel, part), parts)
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        self.run.step(optimizer, self.spec.max_grad_norm)
        return {**found, **differences(tensors, gradients, parameters)}

    def part_of(self, calls: Sequence[Mapping[str, Tensor]]) -> Part:
        """trl's losses of one micro-batch of b samples."""
        rows = torch.arange(len(calls[0]["latents"]))  # [b]
        text = calls[0]["embeds"][-len(rows) :]  # [b,L,D]; under guidance the empty prompt stands before
        stride = len(self.model.angles) // self.spec.steps

        def step(call: Mapping[str, Tensor]) -> Step:
            t, s = (self.model.angles[n] for n in (call["timesteps"], (call["timesteps"] - stride).clamp_min(0)))
            return Step(call["latents"][:, :, None], call["next_latents"][:, :, None], t, s, call["log_probs"], rows, rows)

        cond = Conditioning(("",) * len(rows), text, torch.ones(text.shape[:2], dtype=torch.bool))
        return Part([step(call) for call in calls], cond, calls[0]["advantages"].clamp(-5, 5).float(), len(rows) / self.spec.clips)


NAMES = ("latents", "timesteps", "next_latents", "log_probs", "advantages", "embeds", "eps", "now")


def differences(theirs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Answer:
    """Of gradients, of the step and of parameters, between ours and the tensors of `_trl_worker.capture`."""
    norms = {name: float(theirs[f"gradient.{name}"].norm()) for name in gradients}
    least = max(norms.values()) / 1000
    gradient = max(float((gradients[name] - theirs[f"gradient.{name}"]).norm()) / max(norm, least) for name, norm in norms.items())
    apart = torch.cat([(after[name].detach() - theirs[f"after.{name}"]).flatten() for name in gradients])
    moved = torch.cat([(theirs[f"after.{name}"] - theirs[f"before.{name}"]).flatten() for name in gradients])
    return {"gradient_difference": gradient, "update_difference": float(apart.norm() / moved.norm()), "parameter_difference": float(apart.abs().max())}


def build(spec: dict[str, Any]) -> Handlers:
    arm = Arm(Spec(**spec))
    return {"epoch": arm.epoch, "compare": arm.compare}


if __name__ == "__main__":
    serve(build)
