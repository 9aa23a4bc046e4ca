"""What Wan2.1-T2V-1.3B costs on one GPU with random weights, in bfloat16: a step of SFT, an update of GRPO, packed clips, beside what matrix products and attention alone reach.

SFT: one clip of 832x480, 81 frames, a batch of 1, the flow-matching loss of `rushes sft`. Full fine-tuning keeps float32 copies of its bfloat16 weights for a fused AdamW; LoRA
(rank 32, attention projections) trains float32 adapters under a frozen base, as peft makes them. RL: `rushes grpo` with one group of 8 clips that share their start, one noisy
step of 4, guided; a cheap score of the pixels stands for the reward. Packing: this project's own DiT at 1.3B. Texts are random states: no text encoder runs. Recipe: `rushes sft`
as a whole, on clips of one size and of mixed ones in packs; its text encoder is a toy.

model FLOPs: those of the forward pass, and of every gradient that training needs, once (`_wan_flops.py`): under LoRA none for the frozen weights. `mfu` is their share of the
GPU's published dense bfloat16 peak, `hfu` the same with what checkpointing computes a second time.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from align.advantage import group_advantage
from align.config import Count, Positive
from align.kernels import build_kernel
from align.objectives.regression import clip_error, flow_matching, packed_clip_error
from align.optimizers import build_optimizer
from align.run import read_metrics
from align.trajectory import rollout
from align.windows import fixed_window
from base_model.errors import UserError
from base_model.families.wan import TEXT_TOKENS, WanVideoModel
from base_model.families.wan_random import T2V_1_3B, VAE_2_1, random_transformer, random_vae, save_random
from base_model.flops import PEAKS
from base_model.guidance import Guided
from base_model.lora import add_lora
from base_model.networks.attention import Backend, attention_backend
from base_model.networks.dit import DiTConfig
from base_model.networks.packing import Segments
from base_model.paths import add_noise
from base_model.recompute import compile_blocks, recompute_blocks
from base_model.times import sampling_times, stratified_logit_normal
from base_model.types import ClipShape, Conditioning
from recipes.bench._results import Bench, Row, check_can_end, flat, here, write
from recipes.bench._wan_flops import step_flops
from recipes.bench.packing import Inputs, Networks, Work, draw_inputs
from recipes.grpo import Policy, lessons_of, losses_of

Part = Literal["ceiling", "sft", "rl", "packing", "variants", "recipe"]
PARTS: tuple[Part, ...] = get_args(Part)
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
UNSUPPORTED = ("no available kernel", "not supported", "unsupported", "no viable backend", "not implemented", "no execution plan", "only supports")
GIB = 2**30
TORCHS = "torch's choice"


class Config(Bench):
    parts: tuple[Part, ...] = PARTS
    """What is measured, in turn; `variants` are further rows of SFT (compiled blocks, fewer of them checkpointed, another attention)."""
    repeats: Count = 3
    """Measured steps of a row."""
    warmups: Count = 2
    """Steps before them."""
    rank: Count = 32
    """Rank of the adapters."""
    seconds: Positive = 270.0
    """No row is begun later than this; what is left out says so."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is, and where and in what precision it runs."""

    device: torch.device
    dtype: torch.dtype
    wan: dict[str, Any]
    vae: dict[str, Any]
    text_tokens: int
    matmul: int
    sft: ClipShape
    mixed: tuple[ClipShape, ...]  # for `rushes sft`, packed
    rl: tuple[ClipShape, ...]
    dit: DiTConfig
    packed: tuple[ClipShape, ...]  # forward only
    trained: tuple[ClipShape, ...]  # forward and backward


def full() -> Sizes:
    return Sizes(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        wan=T2V_1_3B,
        vae=VAE_2_1,
        text_tokens=TEXT_TOKENS,
        matmul=8192,
        sft=ClipShape(81, 480, 832),
        mixed=tuple(ClipShape(*sides) for sides in ((81, 480, 832), (49, 480, 480), (33, 320, 512), (17, 480, 832), (17, 256, 256), (65, 256, 448))),
        rl=(ClipShape(33, 240, 416), ClipShape(17, 480, 832)),
        dit=DiTConfig(channels=16, width=1536, depth=24, heads=12, text_width=4096, rotary_axes=(44, 42, 42)),
        packed=tuple(ClipShape(*sides) for sides in ((33, 480, 832), (17, 480, 832), (33, 320, 512), (17, 480, 480), (33, 256, 256), (17, 256, 256))),
        trained=tuple(ClipShape(*sides) for sides in ((17, 320, 512), (33, 256, 256), (17, 256, 256), (17, 256, 256))),
    )


def toy() -> Sizes:
    return Sizes(
        device=torch.device("cpu"),
        dtype=torch.float32,
        wan={**T2V_1_3B, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 16, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2},
        vae={"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        text_tokens=8,
        matmul=64,
        sft=ClipShape(5, 32, 48),
        mixed=(ClipShape(5, 32, 48), ClipShape(1, 32, 32), ClipShape(5, 32, 32)),
        rl=(ClipShape(5, 16, 16),),
        dit=DiTConfig(channels=16, width=32, depth=2, heads=2, text_width=16, rotary_axes=(4, 6, 6)),
        packed=(ClipShape(5, 32, 48), ClipShape(1, 32, 32), ClipShape(5, 32, 32)),
        trained=(ClipShape(5, 32, 48), ClipShape(1, 32, 32)),
    )


# Rows, one after another, of which none loses another


@dataclass
class Notebook:
    """Rows as they are measured, each told on standard error at once. A row that does not fit, or that this machine cannot compute, becomes a `note`."""

    sizes: Sizes
    seconds: float
    parts: dict[str, list[Row]] = field(default_factory=dict)
    bugs: list[Exception] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def row(self, part: Part, name: str, work: Callable[[], Row], **told: Any) -> None:
        """Adds the row of what `work` finds; `told` is known before. An error that is neither lack of memory nor of a kernel is noted, too, and kept in `bugs`."""
        begun, found = time.monotonic(), {}
        note: str | None = None
        peak: float | None = None
        if begun - self.began > self.seconds:
            note = f"left out: {self.seconds:g} seconds were over"
        else:
            forget(self.sizes.device)
            try:
                found = work()
            except Exception as error:
                note = self._noted(error)
            peak = torch.cuda.max_memory_allocated() / GIB if self.sizes.device.type == "cuda" else None
        row = {"what": name, **told, **found, "peak_gib": peak, "wall_seconds": time.monotonic() - begun, "note": note}
        self.parts.setdefault(part, []).append(row)
        print(json.dumps({"part": part, **row}), file=sys.stderr, flush=True)

    def _noted(self, error: Exception) -> str:
        said = " ".join(str(error).split())[:200]
        if isinstance(error, torch.OutOfMemoryError):
            return "out of memory"
        if isinstance(error, ModuleNotFoundError):
            return f"not installed here: {error.name}"
        if isinstance(error, RuntimeError) and is_unsupported(error):
            return f"not supported here: {said}"
        traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)  # which hold the row's tensors
        self.bugs.append(error)
        return f"failed: {type(error).__name__}: {said}"


def is_unsupported(error: RuntimeError) -> bool:
    """Whether an error says that this machine or this version has no such kernel, or cannot compile one."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) or any(words in str(error).lower() for words in UNSUPPORTED)


def forget(device: torch.device) -> None:
    """Frees what the last row left, and begins to count memory anew."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(device: torch.device) -> float:
    """The time once all that was asked of the device is done, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], object], device: torch.device, *, warmups: int, repeats: int) -> list[float]:
    """Seconds of each measured call, by the device's own clock where it has one."""
    for _ in range(warmups):
        work()
    found = []
    for _ in range(repeats):
        if device.type != "cuda":
            begun = time.perf_counter()
            work()
            found.append(time.perf_counter() - begun)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1000)
    return found


def peak_of(device: torch.device) -> float | None:
    """Published dense bfloat16 FLOP/s of the GPU; None where it is not known."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    return next((peak for kind, peak in PEAKS.items() if kind in name), None)


def speed(flops: float, seconds: Sequence[float], device: torch.device) -> Row:
    """A row's seconds and TFLOP/s."""
    median, peak = statistics.median(seconds), peak_of(device)
    rate = flops / median
    return {"seconds": median, "seconds_low": min(seconds), "seconds_high": max(seconds), "tflops_per_second": rate / 1e12, "mfu": rate / peak if peak else None}


def kernels(name: str | None) -> AbstractContextManager[Any]:
    """Inside, torch's attention uses this kernel or none at all; what torch itself chooses where `name` is None."""
    return sdpa_kernel([SDPA[name]]) if name else nullcontext()


# What matrix products and attention alone reach


def ceiling(cfg: Config, s: Sizes, notebook: Notebook) -> None:
    def matmul() -> Row:
        a, b = (torch.randn(s.matmul, s.matmul, device=s.device, dtype=s.dtype) for _ in range(2))
        return speed(2 * s.matmul**3, seconds_of(lambda: a @ b, s.device, warmups=5, repeats=20), s.device)

    notebook.row("ceiling", f"matmul {s.matmul}^3", matmul)
    tokens = tokens_of(s.sft)
    for backend in (*SDPA, "varlen"):
        for trained in (False, True):
            name = "attention, forward and backward" if trained else "attention, forward"
            notebook.row("ceiling", name, partial(attention, s, tokens, backend, trained=trained), attention=backend, tokens=tokens)


def attention(s: Sizes, tokens: int, backend: str, *, trained: bool) -> Row:
    """Self-attention of one clip with Wan's heads; a backward pass is two forward passes, whatever it computes again."""
    heads, width = s.wan["num_attention_heads"], s.wan["attention_head_dim"]
    q, k, v = (torch.randn(tokens, heads, width, device=s.device, dtype=s.dtype, requires_grad=trained) for _ in range(3))
    segments = Segments((tokens,))

    def once() -> None:
        if backend == "varlen":
            if s.device.type != "cuda":
                raise RuntimeError("varlen attention is not supported on a CPU")
            from torch.nn.attention.varlen import varlen_attn

            offsets = torch.tensor(segments.offsets, dtype=torch.int32, device=s.device)
            out = varlen_attn(q, k, v, offsets, offsets, tokens, tokens)
            assert isinstance(out, Tensor)
        else:
            with kernels(backend):
                out = scaled_dot_product_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])  # [1,h,n,d]
        if trained:
            out.backward(torch.ones_like(out))

    flops = 4 * tokens**2 * heads * width * (3 if trained else 1)
    return speed(flops, seconds_of(once, s.device, warmups=2, repeats=5), s.device)


# A step of SFT


def tokens_of(clip: ClipShape) -> int:
    """Wan's patches in a clip."""
    return (1 + (clip.frames - 1) // 4) * (clip.height // 16) * (clip.width // 16)


def encoder_of(s: Sizes) -> Callable[[Sequence[str]], tuple[Tensor, Tensor]]:
    """Prompts -> random states [B,L,D], the same for the same number of prompts, all of them of a prompt [B,L]."""

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(prompts[0]))
        states = torch.randn(len(prompts), s.text_tokens, s.wan["text_dim"], generator=generator).to(s.device, s.dtype)
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=s.device)

    return encode


@dataclass(frozen=True)
class Way:
    """One way to take a step of SFT."""

    train: Literal["lora", "full"]
    attention: str | None = None
    checkpointing: float = 1.0  # share of the blocks
    compiled: bool = False
    adapters: Literal["float32", "bfloat16"] | None = None
    frames: int | None = None  # another length of the clip

    @property
    def told(self) -> Row:
        return {"train": self.train, "attention": self.attention or TORCHS, "checkpointing": self.checkpointing, "compiled": self.compiled, "adapters": self.adapters}


LORA, FULL = Way("lora", adapters="float32"), Way("full")
MAIN = (replace(LORA, attention="flash"), replace(LORA, attention="cudnn"), replace(FULL, attention="cudnn"))
CUDNN_LORA, CUDNN_FULL = MAIN[1], MAIN[2]
FURTHER = (
    replace(CUDNN_FULL, compiled=True, checkpointing=0.0),
    replace(CUDNN_FULL, compiled=True, checkpointing=0.5),
    replace(CUDNN_FULL, checkpointing=0.5),
    replace(CUDNN_LORA, compiled=True, checkpointing=0.0),
    replace(CUDNN_LORA, checkpointing=0.5),
    replace(CUDNN_FULL, compiled=True),
    replace(CUDNN_LORA, compiled=True, checkpointing=0.0, adapters="bfloat16"),
    replace(CUDNN_FULL, checkpointing=0.0),
    replace(CUDNN_LORA, frames=17),
    replace(CUDNN_LORA, frames=17, checkpointing=0.0),
    replace(LORA, attention="efficient"),
)


def sft(cfg: Config, s: Sizes, notebook: Notebook, *, part: Part, ways: Sequence[Way]) -> None:
    for way in ways:
        if cfg.quick:  # compiling takes a minute, and a CPU has few kernels: one row shows what becomes of one that is missing
            way = replace(way, compiled=False, attention=way.attention if way is MAIN[1] else None)
        clip = replace(s.sft, frames=way.frames or s.sft.frames)
        notebook.row(part, "SFT step", partial(sft_step, cfg, s, clip, way), clip=str(clip), tokens=tokens_of(clip), **way.told)


def sft_step(cfg: Config, s: Sizes, clip: ClipShape, way: Way) -> Row:
    """Seconds and FLOPs of a step: draw noise and a time, forward, backward, clip the gradient, step the optimizer."""
    network = random_transformer(s.wan, device=s.device, dtype=s.dtype)
    checkpointed = recompute_blocks(network, way.checkpointing) if way.checkpointing else 0
    if way.compiled:
        torch._dynamo.reset()
        compile_blocks(network)
    if way.train == "lora":
        model = WanVideoModel(add_lora(network, rank=cfg.rank, alpha=cfg.rank, targets=TARGETS), encoder=encoder_of(s))
    else:
        model = WanVideoModel(network.requires_grad_(True), encoder=encoder_of(s))
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    if way.adapters == "bfloat16":
        for parameter in trained:
            parameter.data = parameter.data.to(s.dtype)
    optimizer = build_optimizer(model.network, "adamw", lr=1e-4 if way.train == "lora" else 1e-5, fused=True)
    x0, cond = torch.randn(1, *model.latents.shape(clip), device=s.device), model.encode_text(["a clip"])
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        t = stratified_logit_normal(model.path, 1, shift=3.0, generator=generator).to(s.device)  # [1]
        eps = torch.randn_like(x0)
        u = model(add_noise(model.path, x0, eps, t), t, cond)  # [1,C,F,H,W]
        flow_matching(clip_error(u, model.path.velocity(x0, eps, t))).value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with kernels(way.attention):
        began = wait(s.device)
        step()
        first = wait(s.device) - began
        seconds = seconds_of(step, s.device, warmups=cfg.warmups - 1, repeats=cfg.repeats)
    flops = step_flops(s.wan, tokens_of(clip), text_tokens=s.text_tokens, lora_rank=cfg.rank if way.train == "lora" else 0, checkpointed=checkpointed)
    found, peak = speed(flops.model, seconds, s.device), peak_of(s.device)
    again = (flops.model + flops.recomputed) / found["seconds"]
    return {
        **found,
        "hfu": again / peak if peak else None,
        "model_tflops": flops.model / 1e12,
        "recomputed_tflops": flops.recomputed / 1e12,
        "first_step_seconds": first,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "trained_parameters": sum(p.numel() for p in trained),
    }


# An update of GRPO

GROUP, STEPS, GUIDANCE, SHIFT = 8, 4, 5.0, 3.0


@dataclass
class CountedWan(WanVideoModel):
    """Counts clips through the network: without gradient for the rollout and for the reference, with one for training."""

    kind: str = "rolled"
    counts: dict[str, int] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        kind = "trained" if torch.is_grad_enabled() else self.kind
        self.counts[kind] = self.counts.get(kind, 0) + len(x_t)
        return super().__call__(x_t, t, cond)


def detail(video: Tensor) -> Tensor:
    """The reward: mean difference of neighbouring pixels less that of neighbouring frames, [B,T,3,H,W] -> [B] on the CPU."""
    sharp = (video.diff(dim=3).abs().mean((1, 2, 3, 4)) + video.diff(dim=4).abs().mean((1, 2, 3, 4))) / 2  # [B]
    return (sharp - video.diff(dim=1).abs().mean((1, 2, 3, 4))).cpu()


def rl(cfg: Config, s: Sizes, notebook: Notebook) -> None:
    for clip in s.rl:
        told = {"clip": str(clip), "tokens": tokens_of(clip), "attention": TORCHS, "checkpointing": 1.0, "group_size": GROUP, "steps": STEPS, "guidance": GUIDANCE}
        notebook.row("rl", "GRPO update", partial(rl_update, cfg, s, clip), **told)


def rl_update(cfg: Config, s: Sizes, clip: ClipShape) -> Row:
    """Means over the steps that may take the noise, which GRPO draws with equal chances; an update that is not counted comes first."""
    transformer = random_transformer(s.wan, device=s.device, dtype=s.dtype)
    recompute_blocks(transformer)
    network = add_lora(transformer, rank=cfg.rank, alpha=cfg.rank, targets=TARGETS)
    model = CountedWan(network, random_vae(s.vae, device=s.device, dtype=s.dtype), encoder_of(s))
    p = Policy(prompts=1, group_size=GROUP, same_noise=True, lora_rank=cfg.rank, lr=1e-4)
    policy, optimizer = Guided(model, GUIDANCE), build_optimizer(network, "adamw", lr=p.lr, weight_decay=0.0)
    kernel, times = build_kernel(p.kernel, p.noise_level), sampling_times(model.path, STEPS, shift=SHIFT)
    cond = model.encode_text(["a prompt"])
    shape = model.latents.shape(clip)

    def update(noisy: list[int]) -> Row:
        laps, moments = {}, [wait(s.device)]

        def lap(phase: str) -> None:
            moments.append(wait(s.device))
            laps[f"{phase}_seconds"] = moments[-1] - moments[-2]

        model.counts, model.kind = {}, "rolled"
        x, injected = torch.randn(1, *shape, device=s.device), torch.randn(GROUP, *shape, device=s.device)
        taken = rollout(policy, kernel, x, times, cond, noise=lambda k: injected, stochastic=noisy, branches=GROUP)
        lap("rollout")
        with torch.no_grad():
            video = model.decode(taken.x0)  # [G,T,3,H,W]
        lap("decode")
        relative = group_advantage(detail(video), GROUP)
        lap("reward")
        model.kind = "reference"
        lessons = lessons_of(p, policy, kernel, taken, relative.advantage, torch.ones(GROUP, dtype=torch.bool))
        for loss in losses_of(p, policy, kernel, float(GROUP), lessons):
            loss.value.backward()
        nn.utils.clip_grad_norm_([q for q in network.parameters() if q.requires_grad], p.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lap("update")
        forwards = {f"{kind}_forwards_per_clip": model.counts.get(kind, 0) / GROUP for kind in ("rolled", "reference", "trained")}
        return {**laps, **forwards}

    windows = [fixed_window(STEPS, first, 1) for first in range(min(p.first_steps, STEPS - 1))]
    update(windows[-1])
    updates = [update(window) for window in windows]
    mean = {key: statistics.fmean(found[key] for found in updates) for key in updates[0]}
    totals = [sum(value for key, value in found.items() if key.endswith("_seconds")) for found in updates]
    equivalents = mean["rolled_forwards_per_clip"] + mean["reference_forwards_per_clip"] + 3 * mean["trained_forwards_per_clip"]
    seconds = {"seconds": statistics.fmean(totals), "seconds_low": min(totals), "seconds_high": max(totals), "seconds_per_clip": statistics.fmean(totals) / GROUP}
    return {**seconds, **mean, "forward_equivalents_per_clip": equivalents}


# Packed clips

SCHEMES: tuple[tuple[str, Backend], ...] = (("packed", "varlen"), ("packed", "loop"), ("padded", "loop"), ("one by one", "loop"), ("one by one", "varlen"))


def packing(cfg: Config, s: Sizes, notebook: Notebook) -> None:
    for trained, clips in ((False, s.packed), (True, s.trained)):
        reference: list[Tensor] = []
        for scheme, backend in (SCHEMES[3], *SCHEMES[:3], SCHEMES[4]):
            name = f"{scheme}, forward and backward" if trained else f"{scheme}, forward"
            backend_told = "sdpa with a mask" if scheme == "padded" else backend
            work = partial(packed_row, cfg, s, clips, scheme, backend, reference, trained=trained)
            notebook.row("packing", name, work, attention=backend_told, clips=len(clips), tokens=sum(map(tokens_of, clips)))


def networks_of(s: Sizes, scheme: str) -> Networks:
    """The DiT with every weight drawn: as it is initialised its output is zero. One copy is kept, the one that the scheme needs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(s.dtype)
    try:
        with torch.device(s.device):
            networks = Networks(s.dit)
            for parameter in networks.packed.parameters():
                if parameter.dim() == 2 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
    finally:
        torch.set_default_dtype(before)
    if scheme == "padded":
        networks.padded.load_state_dict(networks.packed.state_dict())
        networks.packed = networks.padded
    networks.padded = networks.packed
    forget(s.device)
    return networks


def inputs_of(s: Sizes, clips: Sequence[ClipShape], scheme: str) -> list[Inputs]:
    """The same tokens, times and texts for every scheme."""
    grids = tuple((1 + (clip.frames - 1) // 4, clip.height // 16, clip.width // 16) for clip in clips)
    drawn = draw_inputs(Work(grids, padded=scheme == "padded"), s.dit, torch.Generator().manual_seed(0), text_tokens=s.text_tokens)
    moved = replace(
        drawn,
        tokens=drawn.tokens.to(s.device, s.dtype),
        positions=drawn.positions.to(s.device),
        keep=None if drawn.keep is None else drawn.keep.to(s.device),
        t=drawn.t.to(s.device),
        text=drawn.text.to(s.device, s.dtype),
    )
    return list(_alone(moved)) if scheme == "one by one" else [moved]


def _alone(x: Inputs) -> Iterator[Inputs]:
    """Each clip of a pack on its own."""
    for k, (length, text_length) in enumerate(zip(x.segments.lengths, x.text_segments.lengths, strict=True)):
        here, text = slice(x.segments.offsets[k], x.segments.offsets[k + 1]), slice(x.text_segments.offsets[k], x.text_segments.offsets[k + 1])
        yield Inputs(x.tokens[here], x.positions[here], Segments((length,)), None, x.t[k : k + 1], x.text[text], Segments((text_length,)))


def packed_row(cfg: Config, s: Sizes, clips: Sequence[ClipShape], scheme: str, backend: Backend, reference: list[Tensor], *, trained: bool) -> Row:
    """Seconds, and how far velocities [N,c] are from those of the first scheme, which fills `reference`."""
    torch.manual_seed(0)
    networks, inputs = networks_of(s, scheme), inputs_of(s, clips, scheme)
    if backend == "varlen" and s.device.type != "cuda":
        raise RuntimeError("varlen attention is not supported on a CPU")

    def once() -> None:
        for x in inputs:
            error = packed_clip_error(networks(x), x.tokens, x.segments.ids.to(s.device), len(x.segments), keep=x.keep)
            if trained:
                error.sum().backward()
        networks.packed.zero_grad()

    with attention_backend(backend), torch.set_grad_enabled(trained):
        seconds = seconds_of(once, s.device, warmups=1, repeats=cfg.repeats)
        with torch.no_grad():
            parts = [networks(x) if x.keep is None else networks(x)[x.keep] for x in inputs]
    u = torch.cat(parts).float().cpu()  # [N,c]
    if not reference:
        reference.append(u)
    useful, computed = len(u), sum(x.segments.total for x in inputs)
    difference = float((u - reference[0]).norm() / reference[0].norm())
    bound = 0.02 if s.dtype == torch.bfloat16 else 1e-4
    found = speed(1, seconds, s.device)
    return {
        **{key: value for key, value in found.items() if key.startswith("seconds")},
        "useful_share": useful / computed,
        "tokens_per_second": useful / found["seconds"],
        "relative_difference": difference,
        "within_bound": difference <= bound,
        "bound": bound,
        "parameters": sum(p.numel() for p in networks.packed.parameters()),
    }


# `rushes sft` itself


class Recipe(NamedTuple):
    """A way to run it."""

    name: str
    mixed: bool  # sizes
    changes: dict[str, Any]
    fit: dict[str, Any]


LORA_RUN: dict[str, Any] = {"lora_rank": 32, "recompute": 1.0}
RECIPES = (
    Recipe("all weights", False, {"recompute": 0.0, "compiled": True}, {"lr": 1e-5}),
    Recipe("all weights", True, {"recompute": 0.5, "compiled": True}, {"lr": 1e-5, "packs": 2, "iterations": 10}),
    Recipe("QLoRA, 8-bit AdamW", True, {**LORA_RUN, "nf4": True}, {"lr": 1e-4, "packs": 2, "iterations": 10, "optimizer": "adamw8bit"}),
    Recipe("LoRA", False, {**LORA_RUN, "recompute": 0.0, "compiled": True}, {"lr": 1e-4}),
    Recipe("LoRA", False, LORA_RUN, {"lr": 1e-4}),
)
SETTLED = 2  # steps before those that are reported


def recipe(cfg: Config, s: Sizes, notebook: Notebook) -> None:
    """The recipe from a folder of clips to what it saves: read, encoded by the VAE, learned from, looked at, exported."""
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as name:
        checkpoint = Path(name) / "wan"
        save_random(checkpoint, s.wan, s.vae, device=s.device, dtype=s.dtype)
        for number, way in enumerate(RECIPES):
            changes = {**way.changes, "compiled": not cfg.quick and way.changes.get("compiled", False)}
            told = {"train": way.name, "clip": "mixed" if way.mixed else str(s.sft), "checkpointing": changes["recompute"], "compiled": changes["compiled"]}
            notebook.row("recipe", "rushes sft", partial(recipe_run, s, checkpoint, Path(name) / str(number), way._replace(changes=changes)), **told)
            shutil.rmtree(Path(name) / str(number), ignore_errors=True)


def recipe_run(s: Sizes, checkpoint: Path, folder: Path, way: Recipe) -> Row:
    """Medians over its steps but the first ones, as it logs them, and what it took as a whole."""
    from recipes import sft as rushes_sft  # which reads videos: a package that a rented machine may lack

    torch._dynamo.reset()
    settings: dict[str, Any] = {
        "out": folder / "out",
        "model": checkpoint,
        "data": captioned_clips(folder / "clips", 2 * s.mixed if way.mixed else 4 * (s.sft,)),
        "cache": folder / "latents",
        "windows": {"frames": s.sft.frames, "area": s.sft.height * s.sft.width, "fps": FPS},
        "samples": {"steps": 2, "prompts": ("a ball",)},
        **way.changes,
        "fit": {"iterations": 6, "packs": 1, "capacity": tokens_of(s.sft), "held_out": 1, "evaluate_every": 100, **way.fit},
    }
    done = rushes_sft.main(rushes_sft.Config.model_validate(settings))
    steps = [line for line in read_metrics(folder / "out") if "tokens" in line][SETTLED:]
    seconds = [step["tokens"] / step["tokens_per_second"] for step in steps]
    spread = {"seconds": statistics.median(seconds), "seconds_low": min(seconds), "seconds_high": max(seconds)}
    medians = {name: statistics.median(step[name] for step in steps) for name in ("clips", "tokens", "tokens_per_second")}
    known = {"mfu": statistics.median(step["mfu"] for step in steps)} if peak_of(s.device) else {}
    return {**spread, **medians, **known, "held_out_loss": done["held_out_loss"]}


FPS = 16.0


def captioned_clips(folder: Path, clips: Sequence[ClipShape]) -> Path:
    """One colour running into another, once over each clip, each with its caption."""
    from base_model.video.files import write_mp4

    folder.mkdir(parents=True)
    for k, clip in enumerate(clips):
        time, row, column = (torch.linspace(0, 1, side) for side in (clip.frames, clip.height, clip.width))
        level = (time[:, None, None] + row[:, None] / 2 + (1 + k) * column) % 1  # [T,H,W]
        write_mp4(folder / f"{k}.mp4", torch.stack((level, level.flip(1), level.flip(2)), 1), FPS, upscale=False)
        (folder / f"{k}.txt").write_text("a ball rolls to the left")
    return folder


# The whole

TITLES: dict[Part, str] = {
    "ceiling": "What matrix products and attention alone reach",
    "sft": "A step of SFT",
    "rl": "An update of GRPO",
    "packing": "Clips of mixed sizes in one sequence",
    "variants": "A step of SFT in other ways",
    "recipe": "rushes sft from a folder of clips to what it saves",
}


def sizes_of(cfg: Config) -> Sizes:
    """Raises UserError where what is asked for cannot run here."""
    missing = [name for name in ("diffusers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench gpu needs the package {missing[0]!r}, which is not installed. See `rushes doctor`")
    if cfg.quick:
        return toy()
    if not torch.cuda.is_available():
        raise UserError(f"bench gpu needs a CUDA device, and torch {torch.__version__} finds none here. Run it on a machine with a GPU, or give --quick for toy sizes on the CPU")
    return full()


def measure(cfg: Config, s: Sizes) -> Notebook:
    """All parts of the configuration, in its order."""
    notebook = Notebook(s, cfg.seconds)
    work: dict[Part, Callable[[Config, Sizes, Notebook], None]] = {
        "ceiling": ceiling,
        "sft": partial(sft, part="sft", ways=MAIN),
        "rl": rl,
        "packing": packing,
        "variants": partial(sft, part="variants", ways=FURTHER),
        "recipe": recipe,
    }
    for part in cfg.parts:
        work[part](cfg, s, notebook)
    return notebook


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew. An error that is a bug is raised behind the last row."""
    if not cfg.parts:
        raise UserError(f"nothing to measure: name parts, one or more of {', '.join(PARTS)}. Give --parts '[\"sft\"]'")
    sizes = sizes_of(cfg)
    check_can_end(cfg)
    notebook = measure(cfg, sizes)
    if cfg.write:
        write(cfg, "gpu", here("gpu", cfg), "Wan2.1-T2V-1.3B on one GPU", {TITLES[part]: flat({part: rows}) for part in cfg.parts if (rows := notebook.parts.get(part))})
    if notebook.bugs:
        raise notebook.bugs[0]
    return {"rows": flat(notebook.parts)}
