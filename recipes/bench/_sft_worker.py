"""A tiny Wan that is fine-tuned in a process of its own, by `rushes sft`'s functions or by a plain loop of diffusers, peft and accelerate, a step whenever it is told to.

Both have the same weights, clips, states of texts, and as many clips a step; `compare` gives the plain loop the very noise and times that ours drew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import pad

from align.config import Config, Count
from align.optimizers import build_optimizer
from align.run import Run
from base_model.errors import UserError
from base_model.families.wan import LORA_TARGETS, WanVideoModel
from base_model.families.wan_random import random_transformer
from base_model.lora import add_lora
from base_model.networks.packing import balanced_packs, forward_flops
from base_model.types import Conditioning
from recipes.bench._examples import InMemory
from recipes.bench._packing_wan import CHANNELS, PATCH, TEXT_TOKENS, Grid, largest
from recipes.bench._serve import Answer, Handlers, peak_bytes, serve
from recipes.examples import Velocities, num_tokens
from recipes.fit import Fit, clips_loss, whole_of

WAN: dict[str, Any] = {
    "patch_size": PATCH,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 768,
    "num_layers": 4,
}
"""Wan2.1-1.3B's shape, 12 times as narrow and 7 times as shallow: 1.3 million parameters."""
RANK, LR, MAX_NORM = 8, 1e-4, 1.0
Arm = Literal["ours", "one batch", "padded", "one by one"]
"""Ours, and what a plain loop does with a step's clips: all in one batch, in a batch padded to the largest, or one after the other with the gradients added up."""


class Spec(Config):
    """What a process does."""

    arm: Arm = "ours"
    """Who trains."""
    train: Literal["full", "lora"] = "full"
    """All weights, or adapters of rank 8."""
    grids: tuple[Grid, ...]
    """Tokens of every clip: frames, rows, columns."""
    batch: Count = 8
    """Clips of a step."""
    threads: Count = 1
    """Threads of torch."""
    out: Path
    """Folder for the run of ours."""
    seed: int = 0
    """Seed of weights, clips, noise and times."""


def draw_examples(spec: Spec) -> InMemory:
    generator = torch.Generator().manual_seed(spec.seed)
    clips = [torch.randn(CHANNELS, f, PATCH[1] * h, PATCH[2] * w, generator=generator) for f, h, w in spec.grids]
    text, mask = torch.randn(len(clips) + 1, TEXT_TOKENS, WAN["text_dim"], generator=generator), torch.ones(len(clips) + 1, TEXT_TOKENS, dtype=torch.bool)
    return InMemory(clips, Conditioning(("",) * len(text), text, mask), [str(k) for k in range(len(clips))])


def rows_of(spec: Spec, step: int) -> list[int]:
    """The clips of a step, in their order, again and again."""
    return [(step * spec.batch + k) % len(spec.grids) for k in range(spec.batch)]


def trained(network: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def same_adapters(network: torch.nn.Module, seed: int) -> None:
    """Fresh adapters change nothing, and half of their gradients are zero: those of both sides get the same random values instead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(trained(network).items()):
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


class Asked(NamedTuple):
    """What ours asked its network about one clip."""

    x_t: Tensor  # [C,F,H,W]
    t: Tensor  # []


class Recording(Velocities):
    """Keeps what it is asked."""

    def __init__(self, model: WanVideoModel) -> None:
        super().__init__(model)
        self.asked: list[Asked] = []

    def __call__(self, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
        self.asked += map(Asked, x_t, t)
        return super().__call__(x_t, t, conds)


class Ours:
    """What `rushes sft` does in a step of a family, without averaged weights."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.examples = spec, draw_examples(spec)
        torch.manual_seed(spec.seed)
        network = random_transformer(WAN, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(spec.train == "full")
        self.model = WanVideoModel(add_lora(network, rank=RANK, alpha=RANK, targets=LORA_TARGETS, seed=spec.seed) if spec.train == "lora" else network)
        same_adapters(self.model.network, spec.seed)
        self.fit, self.velocities = Fit(iterations=1, lr=LR, text_dropout=0.0), Velocities(self.model)
        self.optimizer = build_optimizer(self.model.network, "adamw", lr=LR, fused=True)
        self.run = Run(spec.out, spec, seed=spec.seed, resume=False, metrics={"loss": "Mean error of the step's clips."}, quiet=True)
        self.iterations = self.run.iterations(10**9, save_every=10**9, label="sft")

    def parts(self, rows: Sequence[int], step: int) -> list[tuple[list[int], torch.Generator]]:
        """The step's clips in about as many packs as there are threads, all of the same cost."""
        lengths = [num_tokens(self.examples.shapes[row], PATCH) for row in rows]
        costs = [forward_flops([n], width=128, depth=4, mlp_width=768, text_tokens=TEXT_TOKENS) for n in lengths]
        room = sum(lengths) if self.spec.threads == 1 else -(-sum(lengths) * 11 // (10 * self.spec.threads))
        packs = balanced_packs(lengths, costs, room)
        return [([rows[k] for k in pack], self.run.generator("noise", 1000 * step + n)) for n, pack in enumerate(packs)]

    def learn(self, velocities: Velocities, step: int) -> Tensor:
        """Leaves the step's gradient; returns its loss []."""
        rows = rows_of(self.spec, step)
        whole = whole_of(self.fit, [num_tokens(self.examples.shapes[row], PATCH) for row in rows])
        losses = self.run.backward_each(self.optimizer, partial(clips_loss, self.fit, velocities, self.examples, whole), self.parts(rows, step))
        return torch.stack([loss.value for loss in losses]).sum()

    def step(self) -> Tensor:
        loss = self.learn(self.velocities, next(self.iterations))
        self.run.step(self.optimizer, MAX_NORM)
        self.run.log(loss=loss)
        return loss

    def capture(self, file: str) -> Answer:
        """Writes what the first step asks its network, its loss and its gradient into `file`; changes no weight."""
        before, self.spec = self.spec, self.spec.model_copy(update={"threads": 1})  # one pack, so that clips are asked about in its order
        recording = Recording(self.model)
        order = [row for rows, _ in self.parts(rows_of(self.spec, 0), 0) for row in rows]
        loss = self.learn(recording, 0)
        self.spec = before
        asked = dict(zip(order, recording.asked, strict=True))
        told = {f"x_t.{row}": one.x_t for row, one in asked.items()} | {f"t.{row}": one.t for row, one in asked.items()}
        gradients = {f"gradient.{name}": p.grad for name, p in trained(self.model.network).items() if p.grad is not None}
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in (told | gradients | {"loss": loss}).items()}, file)
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss)}


class Plain:
    """What a user of diffusers, peft and accelerate would write."""

    def __init__(self, spec: Spec) -> None:
        from accelerate import Accelerator
        from diffusers import WanTransformer3DModel
        from peft import LoraConfig, get_peft_model

        self.spec, self.examples = spec, draw_examples(spec)
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(spec.seed)
        network = WanTransformer3DModel(**WAN)
        if spec.train == "lora":
            network.requires_grad_(False)
            network = get_peft_model(network, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LORA_TARGETS)))
        same_adapters(network, spec.seed)
        optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=LR)
        self.network, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.steps = 0

    def batches(self, rows: Sequence[int]) -> list[list[int]]:
        return [[row] for row in rows] if self.spec.arm == "one by one" else [list(rows)]

    def noised(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x0 [B,C,F,H,W] -> (x_t, target, sigma [B])."""
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(len(x0)) + 1.0986)  # a shift of 3
        s = sigma[:, None, None, None, None]
        return (1 - s) * x0 + s * noise, noise - x0, sigma

    def loss(self, rows: Sequence[int], told: Mapping[str, Tensor] | None = None) -> Tensor:
        """Mean over clips of the mean square error; padding is left out of it. told: x_t and t that ours drew."""
        clips, text = [self.examples.latent(row) for row in rows], self.examples.conds.text[list(rows)]
        sides = largest([x.shape[1:] for x in clips])
        x0 = torch.stack([pad(x, [k for axis in (2, 1, 0) for k in (0, sides[axis] - x.shape[axis + 1])]) for x in clips])  # [B,C,F,H,W]
        x_t, target, sigma = self.noised(x0) if told is None else as_told(x0, rows, told)
        prediction = self.network(hidden_states=x_t, timestep=1000 * sigma, encoder_hidden_states=text, return_dict=False)[0]
        if self.spec.arm != "padded":
            return F.mse_loss(prediction.float(), target.float())
        errors = [(u - v)[:, : x.shape[1], : x.shape[2], : x.shape[3]].square().mean() for u, v, x in zip(prediction, target, clips, strict=True)]
        return torch.stack(errors).mean()

    def learn(self, rows: Sequence[int], told: Mapping[str, Tensor] | None = None) -> float:
        """Leaves the step's gradient; returns its loss."""
        batches, total = self.batches(rows), 0.0
        for batch in batches:
            loss = self.loss(batch, told) / len(batches)
            self.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    def step(self) -> float:
        loss = self.learn(rows_of(self.spec, self.steps))
        self.accelerator.clip_grad_norm_(self.network.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def compare(self, file: str) -> Answer:
        """What the plain loop makes of the clips, noise and times in `file`: its loss, and the largest over the parameters' tensors of |ours - its gradient| / |its gradient|.

        A norm below a thousandth of the largest counts as that. Changes no weight.
        """
        told = load_file(file)
        loss = self.learn(rows_of(self.spec, 0), told)
        own = {name: p.grad for name, p in trained(self.network).items() if p.grad is not None}
        if {f"gradient.{name}" for name in own} != {name for name in told if name.startswith("gradient.")}:
            raise UserError("the two sides train different parameters, which is a bug of this bench. Report it")
        least = max(float(g.norm()) for g in own.values()) / 1000
        apart = max(float((g - told[f"gradient.{name}"]).norm()) / max(float(g.norm()), least) for name, g in own.items())
        self.optimizer.zero_grad()
        return {"loss": loss, "loss_difference": abs(loss - float(told["loss"])) / loss, "gradient_difference": apart}


def as_told(x0: Tensor, rows: Sequence[int], told: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The noise that leads from x0 [B,C,F,H,W] to what ours asked about, in double precision: (x_t, target, sigma [B])."""
    x_t, sigma = torch.stack([told[f"x_t.{row}"] for row in rows]), torch.stack([told[f"t.{row}"] for row in rows])
    s = sigma.double()[:, None, None, None, None]
    noise = ((x_t.double() - (1 - s) * x0.double()) / s).float()
    return x_t, noise - x0, sigma


def steps(arm: Ours | Plain, number: int) -> Answer:
    """Makes so many steps."""
    begun, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        arm.step()
    return {"seconds": (time.perf_counter() - begun) / number, "cpu": (time.process_time() - cpu) / number, "peak_bytes": peak_bytes()}


def build(told: dict[str, Any]) -> Handlers:
    spec = Spec(**told)
    torch.set_num_threads(spec.threads)
    if spec.arm == "ours":
        ours = Ours(spec)
        return {"steps": partial(steps, ours), "capture": ours.capture}
    plain = Plain(spec)
    return {"steps": partial(steps, plain), "compare": plain.compare}


if __name__ == "__main__":
    serve(build)
