"""Learn a vision-language reward from ranked clips (`rushes vlm-reward`).

A Qwen2-VL, Qwen2.5-VL or Qwen3-VL reads each clip and a rubric with one token a reward dimension; LoRA on its language part, the tokens' rows and a linear head
learn the rankings by the Davidson-Luce likelihood with learned tie parameters, as `reward_model.py` does. All clips of a ranking go through the model together, and
all dimensions they were ranked in are read off that one pass. The weights that were best on held-out prompts ("val") are kept; temperature and tie parameters are
then fitted on "val", and accuracy is measured on "test".

Under torchrun processes share the sets of a step, and the clips that are looked at on the way; `shard` spreads the frozen weights over them.
Left out: training of the vision tower (its features would be the next thing to adapt).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed
from align.objectives import Loss
from align.run import Run
from base_model.errors import UserError
from base_model.prompts.vision import Precision
from base_model.video.store import ClipStore
from recipes.reward_model import (
    Best,
    Rankings,
    Table,
    calibrate,
    event_nll,
    events_hash,
    facts_of,
    filters_behind,
    held_out_nll,
    joined,
    load_answers,
    load_rankings,
    measure,
    normalise,
    sizes_of,
    start_log_tie,
)
from recipes.weights import made_by
from reward.comparisons import Comparisons
from reward.types import Scores
from reward.vlm.files import save_vlm_reward
from reward.vlm.frames import FrameSampler, frame_indices
from reward.vlm.model import CLIPS_AT_ONCE, Learned, VlmReward, load_base
from reward.vlm.prompt import Dimension

METRICS = {
    "loss": "Davidson-Luce negative log-likelihood of a ranking, mean over the weighted rankings of the batch, plus 0.01 times the squared mean score; nats.",
    "grad_norm": "Norm of the gradient before clipping.",
    "held_out_nll": "The same likelihood of the mean score on the prompts of the split val, nats a ranking, before calibration.",
}


class Frames(BaseConfig):
    fps: Positive = 2.0
    """Frames seen a second; part of the model's contract, clips at another rate are refused."""
    min_frames: Count = 4
    """Frames seen of a short clip."""
    max_frames: Count = 64
    """A clip that needs more is refused."""
    min_pixels: Count = 128 * 28 * 28
    """Pixels a frame; smaller frames grow."""
    max_pixels: Count = 448 * 448
    """Pixels a frame; larger frames shrink."""


class Asked(BaseConfig):
    rubric: str = ""
    """What the model is told about the dimension."""
    sees_prompt: bool = True
    """Whether the score may depend on the prompt; false puts its token before the prompt."""


class Config(BaseConfig):
    may_change = BaseConfig.may_change | {"recompute", "shard"}

    out: Path = Path("runs/vlm-reward")
    """Folder of the run; `vlm_reward.safetensors` and `reward_card.json` appear in it."""
    comparisons: Path = Path("runs/rankings")
    """Folder of rankings, as `reward/comparisons.py` writes it."""
    clips: Path = Path("runs/candidates")
    """Clip store with the ranked clips."""
    commercial: bool = False
    """Whether the model is for commercial use: answers whose licence forbids that, or is not known, then stop the run."""
    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL. A hub id is downloaded only where HF_HUB_OFFLINE is 0."""
    revision: str = ""
    """Revision of the base on the hub."""
    dtype: Precision = "float32"
    """Precision of the frozen base; bfloat16 on a GPU. What is learned is float32."""
    nf4: bool = False
    """The language model's frozen weights in four bits."""
    recompute: bool = False
    """Computes the activations of the language model's layers again in the backward pass: less memory, about a third more time."""
    shard: bool = False
    """Spreads the base's frozen weights over the processes (FSDP2), where one device has no room for them; what learns stays whole."""
    dimensions: dict[str, Asked] = Field(default_factory=dict)
    """Rubric of each dimension that people ranked; a dimension that is not named sees the prompt and has no rubric."""
    frames: Frames = Frames()
    """Which frames of a clip are seen, and how large."""
    rank: Count = 16
    """Rank of the adapter."""
    alpha: Positive = 32.0
    """The adapter's update is scaled by alpha / rank."""
    spread: bool = False
    """Learn the score's own doubt too: the likelihood is then averaged over samples of the scores."""
    samples: Count = 16
    """Samples of the scores, with `spread`."""
    seed: Seed = 0
    """Seed of the adapter, the order and the samples."""
    epochs: Count = 2
    """Passes over the rankings."""
    learning_rate: Positive = 1e-4
    """Step size (AdamW, linear to zero)."""
    weight_decay: NonNegative = 0.01
    """Of AdamW."""
    batch: Count = 8
    """Sets of ranked clips a step; each is one forward."""
    save_every: Count = 100
    """Steps between checkpoints."""


def sets_of(parts: Sequence[Rankings]) -> list[tuple[int, Tensor]]:
    """(part, rows of its events) for every set of clips that was ranked, however many people ranked it in however many dimensions."""
    found: dict[tuple[int, frozenset[int]], list[int]] = {}
    for number, part in enumerate(parts):
        for row, (index, ranks) in enumerate(zip(part.index.tolist(), part.ranks.tolist(), strict=True)):
            ranked = frozenset(clip for clip, rank in zip(index, ranks, strict=True) if rank > 0)
            found.setdefault((number, ranked), []).append(row)
    return [(number, torch.tensor(rows)) for (number, _), rows in found.items()]


def score_clips(model: VlmReward, data: Comparisons, part: Rankings, clips: Tensor) -> Scores:
    """Scores [C,R] of some clips of a part, in one forward."""
    chosen = clips.tolist()
    rates = [data.clips[part.clip_ids[c]].fps for c in chosen]
    return model.scores(part.pixels(clips), [part.prompts[c] for c in chosen], rates)


def set_nll(model: VlmReward, scores: Scores, part: Rankings, rows: Tensor, clips: Tensor, noise: Tensor) -> Tensor:
    """Negative log-likelihood [E] of the events `rows` on the scores [C,R] of their clips, averaged over scores `mean + spread * noise`; noise [M,C,R]."""
    place = torch.zeros(len(part.video), dtype=torch.long)
    place[clips] = torch.arange(len(clips))
    device = scores.mean.device
    index, ranks, dim = (values[rows].to(device) for values in (place[part.index], part.ranks, part.dim))
    nll = event_nll(scores.mean + scores.spread * noise.to(device), index, ranks, dim, model.log_tie)  # [M,E]
    return math.log(len(nll)) - torch.logsumexp(-nll, dim=0)


@torch.no_grad()
def scored(run: Run, model: VlmReward, data: Comparisons, parts: Sequence[Rankings]) -> tuple[Tensor, Table]:
    """The mean score of every clip [1,C,R], and the table of the events on them."""
    chunks = [(part, clips) for part in parts for clips in torch.arange(len(part.video)).split(CLIPS_AT_ONCE)]
    with run.whole():
        found = run.gather(score_clips(model, data, part, clips).mean.cpu() for part, clips in run.share(chunks, paced=True))
    means = list(torch.cat(found).split([len(part.video) for part in parts]))
    table = joined(parts, means).to(model.temperature.device)
    return table.inputs[None], table


Set = tuple[int, tuple[int, Tensor]]
"""Which of a step's sets it is; its part, and the rows of its events."""


def set_losses(cfg: Config, run: Run, model: VlmReward, data: Comparisons, train: Sequence[Rankings], batch: Sequence[tuple[int, Tensor]], own: Sequence[Set]) -> Iterator[Loss]:
    """The loss of each of some sets of a step, as its share of that of the whole `batch`."""
    weight = sum(float(train[number].weight[rows].sum()) for number, rows in batch)
    for j, (number, rows) in own:
        part = train[number]
        clips = part.index[rows][part.ranks[rows] > 0].unique()  # [C]
        scores = score_clips(model, data, part, clips)  # [C,R]
        noise = torch.randn(cfg.samples, *scores.mean.shape, generator=run.generator(f"doubt {j}", run.iteration)) if cfg.spread else torch.zeros(1, *scores.mean.shape)
        nll = set_nll(model, scores, part, rows, clips, noise)  # [E]
        pull = 0.01 * scores.mean.mean(0).square().mean()  # fixes what rankings leave free: only differences count
        yield Loss((nll * part.weight[rows].to(nll)).sum() / weight + pull / len(batch), {})


def idle_pass(model: VlmReward, data: Comparisons, part: Rankings) -> None:
    """A pass of one clip, forward and back, that teaches nothing: so a process keeps pace with others (`Run.keep_pace`)."""
    scores = score_clips(model, data, part, torch.zeros(1, dtype=torch.long)).mean
    torch.autograd.grad(scores.sum(), [parameter for parameter in model.network.parameters() if parameter.requires_grad], allow_unused=True)


def learn(cfg: Config, run: Run, model: VlmReward, data: Comparisons, train: Sequence[Rankings], val: Sequence[Rankings]) -> None:
    """Adapter, tokens, head and tie parameters learn; the weights that are best on val are kept."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    learned = Learned(model)
    best = Best(learned)
    for name, thing in (("model", learned), ("optimizer", optimizer), ("best", best)):
        run.register(name, thing)
    run.count_forwards(model.head)
    sets = sets_of(train)
    per_epoch = -(-len(sets) // cfg.batch)
    total = cfg.epochs * per_epoch
    best.worse_for(held_out_nll(model, *scored(run, model, data, val)))
    for i in run.iterations(total, save_every=cfg.save_every, label="vision-language reward"):
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * (1 - i / total)
        order = torch.randperm(len(sets), generator=run.generator("order", i // per_epoch)).split(cfg.batch)[i % per_epoch]
        batch = [sets[k] for k in order.tolist()]
        own = run.share(list(enumerate(batch)), paced=True)
        run.keep_pace(len(own), partial(idle_pass, model, data, train[0]))
        losses = run.backward_each(optimizer, partial(set_losses, cfg, run, model, data, train, batch), [own], one_by_one=True)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if (i + 1) % max(1, per_epoch // 2) == 0 or i + 1 == total:
            held_out = held_out_nll(model, *scored(run, model, data, val))
            run.log(loss=sum(float(loss.value) for loss in losses), grad_norm=norm, held_out_nll=held_out)
            if best.worse_for(held_out) >= 3:
                run.stop()
    best.restore()


def asked_dimensions(cfg: Config, dims: Sequence[str]) -> list[Dimension]:
    """The dimensions people ranked, with the rubrics of the configuration. Raises UserError where it names another one."""
    unknown = sorted(set(cfg.dimensions) - set(dims))
    if unknown:
        raise UserError(f"dimensions.{unknown[0]}: nobody ranked clips in it. The rankings in {cfg.comparisons} are in {', '.join(dims)}")
    return [Dimension(name, **(cfg.dimensions.get(name) or Asked()).model_dump()) for name in dims]


def check_rates(data: Comparisons, parts: Sequence[Rankings], sampler: FrameSampler) -> None:
    """Raises UserError, naming the clip, where one cannot be seen at the sampler's rate: before a model is loaded."""
    for part in parts:
        for clip_id in part.clip_ids:
            try:
                frame_indices(part.video.shape[1], data.clips[clip_id].fps, sampler, 1)
            except UserError as error:
                raise UserError(f"clip {clip_id}: {error}") from error


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains and measures; writes weights and card into `out` and returns what the report shows."""
    answers = load_answers(cfg.comparisons, commercial=cfg.commercial)
    data, dimensions = answers.data, asked_dimensions(cfg, answers.dims)
    sampler = FrameSampler(**cfg.frames.model_dump())
    parts = {name: load_rankings(events, data, ClipStore(cfg.clips), answers.dims, answers.most_clips) for name, events in answers.splits.items()}
    train, val, test = parts["train"], parts["val"] or parts["train"], parts["test"]
    check_rates(data, [*train, *val, *test], sampler)
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    run.note("safety", filters_behind(answers.usable, ClipStore(cfg.clips)))
    run.note("answers", events_hash(answers.usable))
    model = VlmReward(
        load_base(cfg.base, revision=cfg.revision, dtype=cfg.dtype),
        dimensions,
        sampler=sampler,
        clip_fps=data.clips[train[0].clip_ids[0]].fps,  # not used here: every clip is read at its own rate
        rank=cfg.rank,
        alpha=cfg.alpha,
        nf4=cfg.nf4,
        spread=cfg.spread,
        most_clips=answers.most_clips,
        seed=cfg.seed,
    )
    if cfg.shard:
        run.shard(model.network, frozen=True)
    model.to(run.device)
    with torch.no_grad():
        model.log_tie.copy_(start_log_tie(train, answers.most_clips))
    if cfg.recompute:
        model.recompute()
    learn(cfg, run, model, data, train, val)
    run.unshard()
    model.eval()
    calibrate(model, *scored(run, model, data, val))
    normalise(model, scored(run, model, data, train)[0])

    scores = [(scored(run, model, data, [part])[0][0] / model.temperature).cpu() for part in test]  # [C,R] each
    result = run.on_main(lambda: measure(answers, train, test, scores, {}))
    facts = {
        "measured": result,
        **made_by("vlm-reward", cfg),
        "seed": cfg.seed,
        "seconds": round(run.seconds, 1),
        "clips": sizes_of(train),
        **facts_of(answers),
    }
    card = run.on_main(lambda: save_vlm_reward(cfg.out, model, facts))
    return {"out": str(cfg.out), "normalisation": card["normalisation"], "temperature": card["temperature"], "seconds": facts["seconds"], **result}
