"""Prompts -> clips in a content-addressed store (`rushes generate`).

The prompt filter speaks first; what is sampled goes through the clip filters, and its verdict is written beside it: only "allow" may be shown or learned from as good.
A clip that the store already holds for the same prompt, seed, sampler, model and visual prompt is not sampled again. Beside its text a clip can be made from an image, another
clip, two clips, a hole in a clip or a margin around it (`visual.py`), and can go on for as long as `visual.seconds` says.
With `expand` a language model makes the prompts long first: the filters are asked about either text, clips are made of the long one, and their rows keep both.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Seed, dump
from align.context_parallel import check_tokens, split
from align.kernels import ODE
from align.processes import broadcast, is_main, join, started
from align.progress import Progress
from align.run import derived_seed
from align.trajectory import rollout
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from base_model.guidance import Guided
from base_model.networks.packing import token_grid
from base_model.paths import add_noise
from base_model.prompts.conditions import give_frames
from base_model.prompts.expand import Expanded, Expander, load_expander
from base_model.threads import in_threads
from base_model.times import sampling_times
from base_model.tiny import SHIFT
from base_model.types import ClipShape, Conditioning, TrainableModel
from base_model.video.store import ClipRow, ClipStore, NewClip, request_key
from recipes.filters import NONE, Filters, load_filters
from recipes.models import encode_prompts, is_built_in, load_model, model_lineage, with_canvases
from recipes.provenance import Export, credentials_of, export, origin_of, origin_of_family
from recipes.stack import Stack, frame_shape, load_stack, sample_stack, stack_lineage
from recipes.visual import Prepared, Visual, head_frames, prepare
from reward.safety.contract import PromptFilter, SafetyRunner, VideoFilter, allowed, to_json
from reward.safety.policy import load_policy
from reward.safety.process import InProcess
from reward.safety.prompt import WordFilter
from reward.safety.transport import Limits
from reward.safety.video import DegenerateFilter, FlashFilter

BYTES_A_TOKEN = 40_000
"""What denoising and decoding hold at once for one token of 4 frames of 8x8 pixels, about."""
ISOLATED = Limits(seconds=60.0, memory=8 << 30)
EXPANDED_FROM = "expanded_from"
"""Of `extra_json` in a clip's row."""
UNSAFE = "the safety filters do not allow its expansion"
Side = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class Sampler(BaseConfig):
    """How a clip is denoised: the same for every model that is compared."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 6
    """Denoising steps of the probability-flow ODE."""
    shift: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Shift of a uniform time grid; above 1 spends more steps on noise. None: the model's own grid, which for the built-in one is a shift of 3."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Scale of classifier-free guidance; 1 is none, any other costs two passes a step."""
    frames: Annotated[int, Field(ge=1, le=1025)] = 13
    """Frames of a clip: 1 + a multiple of the model's stride in time, 4 for the built-in one."""
    height: Side = 32
    """Height in pixels, a multiple of 8; of 16 or 32 for most open families."""
    width: Side = 32
    """Width in pixels, likewise."""
    fps: Annotated[float, Field(ge=0.1, le=240)] = 12.0
    """Frames a second. Families but LTX-Video are not told: give the rate they were trained at."""
    batch: Count = 32
    """Clips denoised together; on a CPU every core has a batch of its own."""

    @property
    def clip(self) -> ClipShape:
        return ClipShape(self.frames, self.height, self.width)


class Config(BaseConfig):
    out: Path = Path("runs/generate")
    """Folder of the clip store."""
    model: Path | None = None
    """Network of the built-in model, or an open family: a folder that diffusers saved, a short name (wan2.1-1.3b) or owner/name on the hub. None means the shipped base."""
    adapter: Path | None = None
    """LoRA of an open family that the clips are made with, in diffusers' format: the `adapter.safetensors` of a run."""
    nf4: bool = False
    """Attention and mlp of a family's network in four bits."""
    stack: Path | None = None
    """Folder of a stack of small models (`recipes/stack.py`), which makes the clips instead; finished at the size the sampler says."""
    prompts: tuple[str, ...] = ("a red circle moves to the left", "a blue bar grows")
    """What to show, one clip set each."""
    expand: Path | None = None
    """Folder of a prompt expander (`rushes expand`), or of any causal language model of transformers: it makes the prompts long. None: they are taken as they are."""
    clips_per_prompt: Count = 4
    """Clips of every prompt, with seeds seed, seed + 1, ..."""
    seed: Seed = 0
    """First seed."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""
    visual: Visual = Visual()
    """What clips are made from beside their text."""
    export: Export = Export()
    """Signed copies (`recipes/provenance.py`); `rushes verify FILE` reads them."""
    filters: Filters = Filters()
    """Safety filters beside those that need no weights."""
    context_parallel: bool = False
    """Under torchrun: spreads the tokens of every clip over the processes (Ulysses), where clips of a Wan are too long for one device. The first one keeps the store."""


@dataclass(frozen=True)
class Request:
    """One clip to make."""

    prompt: str  # what the clip is made of
    prompt_id: str
    seed: int
    short: str = ""  # what the user typed, where that was expanded


def safety_runner(filters: Filters = NONE, *, isolated: bool = False) -> SafetyRunner:
    """Every filter that needs no weights, and those that are named, under the shipped policy. isolated: each in a process of its own, with a limit on memory."""
    policy = load_policy()
    chosen: list[PromptFilter | VideoFilter] = [WordFilter(policy), FlashFilter(policy), DegenerateFilter(policy), *load_filters(filters, policy)]
    if not isolated:
        return SafetyRunner(chosen, policy)
    return SafetyRunner(chosen, policy, limits={each.id: ISOLATED for each in chosen}, transport=InProcess)


def latent_shape(model: TrainableModel, clip: ClipShape) -> tuple[int, int, int, int]:
    """(C, F, H, W) of a clip. Raises UserError where it does not fit the latent grid or the model's patches."""
    try:
        shape = model.latents.shape(clip)
        token_grid(shape, model.patch)
    except ValueError as error:
        raise UserError(f"sampler of {clip}: {error}. Change sampler.frames, sampler.height or sampler.width.") from error
    return shape


def times_of(model: TrainableModel, sampler: Sampler) -> Tensor:
    """The sampling grid, [K+1] from noise to 0. Raises UserError where the model is not sampled in so many steps, or not at this size."""
    if sampler.shift is not None:
        return sampling_times(model.path, sampler.steps, shift=sampler.shift)
    try:
        return model.times(sampler.steps, sampler.clip)
    except ValueError as error:
        raise UserError(f"sampler of {sampler.steps} steps and {sampler.clip}: {error}. Change sampler.steps, or sampler.height and sampler.width") from error


def check_sampler(model: TrainableModel, sampler: Sampler) -> None:
    """Raises UserError for clips that the model cannot make, before anything is made."""
    latent_shape(model, sampler.clip)
    times_of(model, sampler)


def seeded_noise(model: TrainableModel, clip: ClipShape, seeds: Sequence[int]) -> Tensor:
    """One stream a seed, whatever the batch: [B,C,F,H,W]. Raises UserError where the clip does not fit the latent grid."""
    shape = latent_shape(model, clip)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(model.device)


def sample(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, start: Tensor | None = None, strength: float = 1.0) -> Iterator[Tensor]:
    """Denoises and decodes B clips, yielded in order in batches [b,T,3,H,W] on the CPU; two batches a core are made at a time.

    start: latents [C,F,H,W] that are noised to `strength` of the way and denoised from there (SDEdit, Meng et al. 2022, arXiv 2108.01073), instead of noise alone.
    """
    for _, video in sample_with_latents(model, cond, seeds, sampler, start, strength):
        yield video


@torch.no_grad()
def sample_with_latents(
    model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, start: Tensor | None = None, strength: float = 1.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """`sample`, with the finished latents [b,C,F,H,W], where the model is, before each batch of clips."""
    times = times_of(model, sampler) * strength  # [K+1]
    guided = Guided(model, sampler.guidance)
    if sampler.guidance != 1:
        guided.unprompted  # noqa: B018 (kept from here on: what guidance needs is not encoded in several threads)

    def make(begin: int) -> tuple[Tensor, Tensor]:
        part = slice(begin, begin + sampler.batch)
        noise = seeded_noise(model, sampler.clip, seeds[part])  # [b,C,F,H,W]
        if start is not None:
            noise = add_noise(model.path, start.expand_as(noise), noise, times[:1].to(noise))
        x0 = rollout(guided, ODE(), noise, times, cond[part], noise=torch.Generator()).x0  # [b,C,F,H,W]
        return x0, model.decode(x0).cpu()

    begins = list(range(0, len(seeds), sampler.batch))
    together = 2 * torch.get_num_threads()
    for k in range(0, len(begins), together):
        yield from in_threads(make, begins[k : k + together], model.device)


Sampling = Callable[[TrainableModel, Conditioning, Sequence[int], Sampler], Iterator[Tensor]]


def stack_sampling(stack: Stack) -> Sampling:
    """`sample`, but by the stack; of the model it uses nothing."""

    def sampling(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
        shift = SHIFT if sampler.shift is None else sampler.shift
        for begin in range(0, len(seeds), sampler.batch):
            part = slice(begin, begin + sampler.batch)
            yield sample_stack(stack, cond[part], sampler.clip, seeds=seeds[part], steps=sampler.steps, shift=shift, guidance=sampler.guidance)

    return sampling


def visual_sampling(visual: Visual, prepared: Prepared) -> Sampling:
    """`sample`, but from what is given; clips may be longer than the sampler's."""

    def sampling(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
        yield make_clips(model, cond, seeds, sampler, visual, prepared)

    return sampling


def make_clips(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, visual: Visual, prepared: Prepared) -> Tensor:
    """B clips [B,T',3,H,W], joined to what was given and as long as `visual` asks."""
    start = None if prepared.start is None else model.encode(prepared.start[None].to(model.device))  # [1,C,F,H,W]
    told = with_canvases(model, cond, [prepared.canvas] * len(cond)) if prepared.canvas.given.any() else cond
    made = torch.cat(list(sample(model, told, seeds, sampler, start, visual.strength if start is not None else 1.0)))  # [B,T,3,H,W]
    clips, frames = torch.stack([prepared.join(clip) for clip in made]), round(visual.seconds * sampler.fps)  # [B,T',3,H,W]
    return go_on(model, cond, seeds, sampler, clips, frames=frames, ahead=visual.frames) if frames else clips


def go_on(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, clips: Tensor, *, frames: int, ahead: int) -> Tensor:
    """[B,t,3,H,W] -> [B,frames,3,H,W]: clips go on from their last `ahead` frames, at most, a clip of the sampler's at a time, again and again."""
    there, stride = clips.shape[1], model.latents.time_stride
    ahead = head_frames(ahead, min(there, sampler.frames), sampler.frames - stride, stride)
    clips = torch.cat([clips, clips.new_empty(len(clips), max(0, frames - there), *clips.shape[2:])], dim=1)  # all the room at once
    for k, begin in enumerate(range(there, frames, max(1, sampler.frames - ahead))):
        told = with_canvases(model, cond, [give_frames(sampler.clip, {0: clip[begin - ahead : begin]}) for clip in clips])
        more = torch.cat(list(sample(model, told, [derived_seed(seed, "extension", k) % 2**31 for seed in seeds], sampler)))  # [B,T,3,H,W]
        clips[:, begin : begin + sampler.frames - ahead] = more[:, ahead : ahead + frames - begin]
    return clips[:, :frames]


def in_all(sampling: Sampling) -> Sampling:
    """`sampling` where every process makes every clip, each with its share of the tokens: the first one tells the others, which `follow`, what is asked for."""

    def asked(model: TrainableModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
        broadcast((cond.to(torch.device("cpu")), list(seeds)))
        yield from sampling(model, cond, seeds, sampler)

    return asked


def follow(sampling: Sampling, model: TrainableModel, sampler: Sampler) -> None:
    """What the other processes do until the first one says that it has all clips."""
    while (told := broadcast(None)) is not None:
        cond, seeds = told
        for _ in sampling(model, cond.to(model.device), seeds, sampler):
            pass


def fill_store(
    store: ClipStore,
    model: TrainableModel,
    requests: Sequence[Request],
    *,
    lineage: str,
    sampler: Sampler,
    runner: SafetyRunner,
    label: str = "generate",
    preview: bool = True,
    sampling: Sampling = sample,
    given: str = "",
) -> list[ClipRow | None]:
    """One row a request, in order; None where the prompt, or what it was expanded from, is blocked, also where the store holds the clip. Made in batches, each committed to the
    store: a killed run goes on, and ends with the clips of one that was not killed. Clips that were there, but that not all filters of the runner ruled on, are shown to them.

    given: what names a visual prompt, part of a clip's identity.
    """
    told = getattr(model, "fps", None)  # LTX-Video's, once 25 whatever the clips had
    settings = {key: value for key, value in dump(sampler).items() if key != "batch"} | ({"visual": given} if given else {}) | ({} if told is None else {"told_fps": told})
    texts = list(dict.fromkeys(r.prompt for r in requests))
    typed = list(dict.fromkeys(r.short for r in requests if r.short and r.short not in texts))
    passed = {text for text, decision in zip([*texts, *typed], runner.check_prompts([*texts, *typed]), strict=True) if allowed(decision)}
    cond = encode_prompts(model, texts)
    row_of = {text: k for k, text in enumerate(texts)}
    keys = [request_key(r.prompt, r.seed, settings, lineage) for r in requests]
    served = [i for i, r in enumerate(requests) if {r.prompt, r.short or r.prompt} <= passed]
    missing = {i for i in served if store.find(keys[i]) is None}
    with Progress(label, total=len(requests), done=len(requests) - len(missing)) as progress:
        together = sampler.batch * torch.get_num_threads()
        for begin in range(0, len(served), together):
            batch = served[begin : begin + together]
            new = [k for k, i in enumerate(batch) if i in missing]
            if not new:
                continue
            asked = [requests[i] for i in batch]  # all of them, whatever is there: beside others a clip's last bits would be others
            video = torch.cat(list(sampling(model, cond[[row_of[r.prompt] for r in asked]], [r.seed for r in asked], sampler)))  # [b,T,3,H,W]
            video = video if len(new) == len(batch) else video[new]
            made = [asked[k] for k in new]
            decisions = runner.check_videos(video, [r.prompt for r in made], sampler.fps)
            clips = [
                NewClip(clip, r.prompt, r.prompt_id, r.seed, settings, lineage, sampler.fps, safety=to_json(decision))
                for clip, r, decision in zip(video, made, decisions, strict=True)
            ]
            store.add_many(clips, preview=preview)
            progress.advance(f"{len(made)} clips", steps=len(made))
    may_see = set(served)
    rows = [store.find(key) if i in may_see else None for i, key in enumerate(keys)]  # a clip that is there may be of a time when its prompt was allowed
    again = {row.request_key: row for row in rows if row is not None and not ruled_by(row, runner)}
    for begin in range(0, len(again), sampler.batch):
        part = list(again.values())[begin : begin + sampler.batch]
        decisions = [runner.check_videos(store.load(row.clip_id)[None], [row.prompt], row.fps)[0] for row in part]
        again |= {row.request_key: row for row in store.rule_again(part, [to_json(decision) for decision in decisions])}
    return with_shorts(store, requests, [again.get(row.request_key, row) if row is not None else None for row in rows])


def with_shorts(store: ClipStore, requests: Sequence[Request], rows: Sequence[ClipRow | None]) -> list[ClipRow | None]:
    """The rows of requests, with what was expanded to their prompts kept beside them."""
    typed: dict[str, set[str]] = {}
    for request, row in zip(requests, rows, strict=True):
        if row is not None and request.short:
            typed.setdefault(row.request_key, set(expanded_from(row))).add(request.short)
    new = {row.request_key: row for row in rows if row is not None and typed.get(row.request_key, set()) > set(expanded_from(row))}
    told = store.tell_again(list(new.values()), [{**json.loads(row.extra_json), EXPANDED_FROM: sorted(typed[key])} for key, row in new.items()]) if new else []
    again = {row.request_key: row for row in told}
    return [again.get(row.request_key, row) if row is not None else None for row in rows]


def expanded_from(row: ClipRow) -> tuple[str, ...]:
    """The short prompts, as users typed them, whose expansion the clip was made of; none where it was made of what was typed."""
    return tuple(json.loads(row.extra_json).get(EXPANDED_FROM, ()))


def expand_prompts(expander: Expander, prompts: Sequence[str], runner: SafetyRunner, *, seed: int) -> list[Expanded]:
    """The prompts made long. An expansion that the filters do not allow is dropped, and the prompt kept: the filters are asked about that too before any clip is made of it."""
    made = expander(prompts, seed=seed)
    decisions = runner.check_prompts([each.text for each in made])
    return [each if allowed(decision) else Expanded(each.prompt, each.prompt, UNSAFE) for each, decision in zip(made, decisions, strict=True)]


def ruled_by(row: ClipRow, runner: SafetyRunner) -> bool:
    """Whether all filters of the runner, in their versions and under its policy, decided about a stored clip; an error is no decision."""
    told = json.loads(row.safety_json)
    named = {(each["filter"], each["policy_version"]) for each in told.get("rulings", [])}
    return told.get("verdict") not in (None, "error") and runner.clip_rulers <= named


def memory_of_token(model: Path | None) -> int:
    """What a token takes of the memory that `check_memory` looks at: nothing where an open family runs on a GPU."""
    return BYTES_A_TOKEN if is_built_in(model) or best_device().type == "cpu" else 0


def check_memory(sampler: Sampler, clips: int, seconds: float, *, bytes_a_token: int = BYTES_A_TOKEN) -> None:
    """Raises UserError where so many clips, as many as are made together, would not fit the memory that is free."""
    import psutil

    tokens = (1 + sampler.frames // 4) * (sampler.height // 8) * (sampler.width // 8)
    together = min(clips, sampler.batch * torch.get_num_threads())
    finished = 12 * sampler.height * sampler.width * max(sampler.frames, round(seconds * sampler.fps))  # bytes of a clip's pixels; filters and writers hold up to three copies more
    needed, free = together * (tokens * bytes_a_token + 4 * finished), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"clips of {sampler.clip} need about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free. "
            "Lower sampler.frames, sampler.height, sampler.width, sampler.batch or visual.seconds"
        )


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network_lineage(path: Path | None) -> str:
    """sha256 of the network's file: what names the built-in model in the store."""
    return model_lineage(path)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what the store holds is never made again."""
    if not cfg.prompts:
        raise UserError("no prompts, prompts. Give at least one: --prompts '[\"a red circle grows\"]'")
    if cfg.stack is not None and cfg.model is not None:
        raise UserError("model and stack: both make clips. Give one of them")
    if cfg.stack is not None and cfg.visual != Visual():
        raise UserError("stack and visual: a stack makes clips from text alone. Give one of them")
    if cfg.context_parallel and (cfg.stack is not None or is_built_in(cfg.model)):
        raise UserError("context_parallel is for open families: the built-in model's clips are small. Leave it out, or give --model a checkpoint that diffusers saved")
    if started() > 1 and not cfg.context_parallel:
        told = f"rushes generate works in one process, and torchrun started {started()}, WORLD_SIZE"
        raise UserError(f"{told}. Start it without torchrun, or spread long clips over processes, --context-parallel true")
    begun = time.monotonic()
    processes = join().num_processes if cfg.context_parallel else 1
    check_can_write(cfg.out)
    signer = credentials_of(cfg.export, cfg.out) if cfg.export.folder and is_main() else None
    check_memory(cfg.sampler, len(cfg.prompts) * cfg.clips_per_prompt, cfg.visual.seconds, bytes_a_token=memory_of_token(cfg.model))
    expander = load_expander(cfg.expand, device=best_device()) if cfg.expand else None
    model = load_model(cfg.model, device=best_device(), nf4=cfg.nf4, adapter=cfg.adapter, fps=cfg.sampler.fps)
    runner, store = safety_runner(cfg.filters), ClipStore(cfg.out)
    sampling: Sampling = sample
    lineage, given = model_lineage(cfg.model, cfg.adapter), ""
    if cfg.stack is not None:
        stack = load_stack(cfg.stack).to(model.device)
        frame_shape(stack, cfg.sampler.clip)
        sampling, lineage = stack_sampling(stack), stack_lineage(cfg.stack)
    elif cfg.visual != Visual():
        prepared = prepare(cfg.visual, cfg.sampler.clip, cfg.sampler.fps, model.latents, model.patch)
        sampling, given = visual_sampling(cfg.visual, prepared), prepared.key
    if cfg.stack is None:
        check_sampler(model, cfg.sampler)
    if processes > 1:
        check_tokens(math.prod(token_grid(latent_shape(model, cfg.sampler.clip), model.patch)), processes, f"a clip of {cfg.sampler.clip}")
        split(model.network, model.device, processes)
        if not is_main():
            follow(sampling, model, cfg.sampler)
            return {}
        sampling = in_all(sampling)
    asked = expand_prompts(expander, cfg.prompts, runner, seed=cfg.seed) if expander else [Expanded(prompt, prompt, "") for prompt in cfg.prompts]
    requests = [Request(each.text, each.prompt, cfg.seed + g, each.prompt if each.text != each.prompt else "") for each in asked for g in range(cfg.clips_per_prompt)]
    rows = fill_store(store, model, requests, lineage=lineage, sampler=cfg.sampler, runner=runner, sampling=sampling, given=given)
    if processes > 1:
        broadcast(None)
    made = [row for row in rows if row is not None]
    origin = {"stack": lineage} if cfg.stack else origin_of(cfg.model) if is_built_in(cfg.model) else origin_of_family(lineage, cfg.adapter)
    signed = {"signed": [str(file) for file in export(cfg.export, store, made, origin, signer)]} if signer else {}
    return {
        "store": str(cfg.out),
        "clips": [str(store.preview_path(row.clip_id)) for row in made],
        **({"expanded": [each._asdict() for each in asked]} if expander else {}),
        **signed,
        "blocked_prompts": len({request.prompt_id for request, row in zip(requests, rows, strict=True) if row is None}),
        "safety": dict(runner.counts),
        "wall_seconds": round(time.monotonic() - begun, 2),
    }
