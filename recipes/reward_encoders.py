"""The part of `rushes reward-model` that learns on frozen encoders (`--encoders.checkpoints`): an ensemble of small heads that pool their tokens by attention.

Every clip is decoded and encoded once and kept in a cache, so passes over the rankings cost the heads alone. The heads learn the rankings by the Davidson-Luce likelihood,
each from its own bootstrap, and the weights that were best on held-out prompts ("val") are kept. Calibration and measurement are those of `reward_model.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.run import Run, derived_seed
from base_model.errors import UserError
from base_model.video.store import ClipStore
from recipes import reward_model
from recipes.reward_model import Answers, Best, Config, Table, as_tensors, held_out_nll, ranking_loss, start_log_tie
from recipes.weights import made_by
from reward import features as signals
from reward.cache import FeatureCache, clip_tokens, feature_key, text_features
from reward.comparisons import Comparisons, RankingEvent
from reward.encoders import Encoder, load_encoder
from reward.pooled import Features, PooledModel, features_of, save_pooled
from reward.types import one_rate

PATIENCE = 5
"""Passes without a better loss on val before the end."""
TOGETHER = 16
"""Clips decoded before the encoders see them."""
CHUNK = 256
"""Clips scored at once."""


@dataclass(frozen=True)
class Clips:
    """What is known of C clips."""

    clip_ids: tuple[str, ...]
    features: Features
    signals: Tensor  # [C,22]


@dataclass(frozen=True)
class Part:
    """The events of one split on their clips; the table's inputs are the signals."""

    clips: Clips
    table: Table


def encode_clips(events: Sequence[RankingEvent], data: Comparisons, store: ClipStore, encoders: Sequence[Encoder], cache: FeatureCache, device: torch.device) -> Clips:
    """Features of the clips of some events, on the CPU: kept ones, or computed now. A clip is decoded once, and only where something about it is not kept."""
    ids = tuple(sorted({clip_id for event in events for clip_id in event.clip_ids}))
    prompts = [data.prompts[data.clips[clip_id].prompt_id].text for clip_id in ids]

    @lru_cache(maxsize=TOGETHER)
    def load(clip_id: str) -> Tensor:
        return store.load(clip_id).to(device)

    revision = hashlib.sha256(Path(signals.__file__).read_bytes()).hexdigest()
    tokens: list[list[Tensor]] = [[] for _ in encoders]
    plain = []
    for begin in range(0, len(ids), TOGETHER):
        some = ids[begin : begin + TOGETHER]
        for encoder, found in zip(encoders, tokens, strict=True):
            found.append(clip_tokens(encoder, some, load, cache))
        keys = [feature_key("clip", clip_id, f"signals@{revision}", None, "float32") for clip_id in some]
        plain.append(cache.fetch(keys, lambda row, some=some: signals.signal_features(load(some[row])[None])[0]))  # type: ignore[misc]
    texts = [text_features(encoder, prompts, cache) if encoder.reads_text else None for encoder in encoders]
    return Clips(ids, features_of(encoders, [torch.cat(found) for found in tokens], texts), torch.cat(plain))


def part_of(clips: Clips, events: Sequence[RankingEvent], dims: tuple[str, ...], k: int) -> Part:
    """The clips of some events alone, and the events on them."""
    own = sorted({clip_id for event in events for clip_id in event.clip_ids})
    where = {clip_id: row for row, clip_id in enumerate(clips.clip_ids)}
    rows = torch.tensor([where[clip_id] for clip_id in own], dtype=torch.long)  # [C]
    tensors = as_tensors(events, {clip_id: row for row, clip_id in enumerate(own)}, dims, k, Counter(event.prompt_id for event in events))
    kept = Clips(tuple(own), clips.features[rows], clips.signals[rows])
    return Part(kept, Table(kept.signals, *tensors))


@torch.no_grad()
def scores_of(model: PooledModel, clips: Clips) -> Tensor:
    """Every head's score of every clip, [M,C,R]."""
    parts = [model.ensemble(clips.features[begin : begin + CHUNK]) for begin in range(0, len(clips.clip_ids), CHUNK)]
    return torch.cat(parts, dim=1) if parts else torch.zeros(len(model.heads.weight), 0, len(model.dims))


def start_heads(cfg: Config, encoders: Sequence[Encoder], dims: tuple[str, ...], k: int, train: Part) -> PooledModel:
    """Fresh heads, features standardised on the training clips, tie parameters from the share of ties."""
    settings = cfg.encoders
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(cfg.seed, "heads", 0))
        model = PooledModel(encoders, dims, members=settings.members, width=settings.width, motion_dims=settings.motion_dims, most_clips=k)
    model.fit_standard(train.clips.features)
    with torch.no_grad():
        model.log_tie.copy_(start_log_tie([train.table], k))
    return model


def fit(cfg: Config, run: Run, model: PooledModel, train: Part, val: Part, bags: Tensor) -> None:
    """Learns the heads and the tie parameters; bags [M,E] says how often each head sees an event. The weights that are best on val are kept, the start included."""
    settings, table = cfg.encoders, train.table
    groups = [{"params": model.heads.parameters(), "weight_decay": settings.decay}, {"params": [model.log_tie], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    best = Best(model)
    for name, thing in (("model", model), ("optimizer", optimizer), ("best", best)):
        run.register(name, thing)
    run.count_forwards(model.heads)
    per_epoch = -(-len(table.index) // cfg.batch)
    best.worse_for(held_out_nll(model, scores_of(model, val.clips), val.table))
    for i in run.iterations(settings.epochs * per_epoch, save_every=cfg.save_every, label="reward model"):
        rows = torch.randperm(len(table.index), generator=run.generator("order", i // per_epoch)).split(cfg.batch)[i % per_epoch]
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - i / (settings.epochs * per_epoch))
        clips, index = table.index[rows].unique(return_inverse=True)
        weight = (bags[:, rows] * table.weight[rows]).clamp(min=1e-6)  # [M,E]
        loss = ranking_loss(model, model.ensemble(train.clips.features[clips]), index, table.ranks[rows], table.dim[rows], weight)
        run.backward(loss)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if (i + 1) % per_epoch == 0:
            held_out = held_out_nll(model, scores_of(model, val.clips), val.table)
            run.log(loss=loss.detach(), grad_norm=norm, held_out_nll=held_out)
            if best.worse_for(held_out) >= PATIENCE:
                run.stop()
    best.restore()


def frame_rate_of(data: Comparisons, events: Sequence[RankingEvent]) -> float:
    """The frame rate of the ranked clips. Raises UserError where they have several: a head cannot tell a slow clip from one with more frames a second."""
    rates = [data.clips[clip_id].fps for event in events for clip_id in event.clip_ids]
    rate = one_rate(rates)
    if rate is None:
        raise UserError(f"the ranked clips have {', '.join(f'{rate:g}' for rate in sorted(set(rates)))} frames a second. Learn from clips of one frame rate")
    return rate


def learn(cfg: Config, answers: Answers, store: ClipStore, *, resume: bool) -> dict[str, Any]:
    """Trains and measures; writes weights and card into `out` and returns what the report shows."""
    data, usable, dims, k = answers.data, answers.usable, answers.dims, answers.most_clips
    settings, fps = cfg.encoders, frame_rate_of(data, usable)
    encoders = [load_encoder(checkpoint, fps=fps, dtype=settings.dtype) for checkpoint in settings.checkpoints]
    cache = FeatureCache(settings.cache)
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=reward_model.METRICS)
    run.note("safety", reward_model.filters_behind(usable, store))
    run.note("answers", reward_model.events_hash(usable))
    clips = encode_clips(usable, data, store, encoders, cache, run.device)
    parts = {name: part_of(clips, events, dims, k) for name, events in answers.splits.items()}
    train, val, test = parts["train"], parts["val"] if answers.splits["val"] else parts["train"], parts["test"]

    model = start_heads(cfg, encoders, dims, k, train)
    events = len(train.table.index)
    bags = torch.poisson(torch.ones(settings.members, events), generator=run.generator("bags", 0)) if settings.members > 1 else torch.ones(1, events)  # [M,E]
    fit(cfg, run, model, train, val, bags)
    model.eval()
    reward_model.calibrate(model, scores_of(model, val.clips), val.table)
    reward_model.normalise(model, scores_of(model, train.clips))

    scores = scores_of(model, test.clips).mean(0) / model.temperature  # [C,R]
    floor = reward_model.signal_only(train.table, len(dims), k)(test.clips.signals)  # [C,R]
    found, plain = (reward_model.by_clip([test.clips.clip_ids], [each], dims) for each in (scores, floor))
    facts = {
        "measured": reward_model.compare(answers, found, plain, {}),
        "seconds": round(run.seconds, 1),
        "cache": {"hits": cache.hits, "misses": cache.misses, "damaged": cache.damaged},
        **made_by("reward-model", cfg),
        "seed": cfg.seed,
        **reward_model.facts_of(answers),
    }
    return reward_model.outcome(cfg, save_pooled(cfg.out, model, facts))
