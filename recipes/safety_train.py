"""Learn a clip filter from what people found (`rushes safety-train`): a head on a frozen encoder or on the video VAE's latents (`reward/safety/head.py`).

Labels come from three places, or any of them: imported tags (SafeSora-Label), what reviewers said of audited clips, and planted hazards of the built-in world. A policy that nobody
judged a clip under is not learned from that clip. Where the rankings hold pairs of the dimension `harmlessness`, the head is Safe RLHF's cost model too: its largest logit is
the cost, pairs order costs and labels say their sign (`reward/ratings.py`).

Prompts that hang together go to one split. Violating clips of a policy weigh as much as the others in training. The pass that was best on "val" is kept; there too it is
calibrated and its limits are chosen: the first where so large a share of violating clips stays above it, the second where so small a share of harmless ones does. "test" chose
nothing and is measured.
Audited clips count 1 / probability each, at most `most_weight`: so calibration and rates are about the stream that was audited, not about what reviewers saw.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Share, Whole
from align.progress import Progress
from align.run import Run, derived_seed
from base_model.errors import UserError
from base_model.video.files import digest_of, to_uint8
from base_model.video.store import ClipRow, ClipStore
from recipes.reward_model import Best
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, FPS, render, sample_scene
from recipes.statistics import bootstrap_prompts
from recipes.weights import made_by
from reward.accuracy import scorer_accuracy
from reward.agreement import Pair, pairs_of
from reward.cache import FeatureCache, feature_key
from reward.calibration import brier, expected_calibration_error, fit_platt, log_loss
from reward.comparisons import Clip, Prompt, RankingEvent, load_comparisons
from reward.importers.safesora import HARMS
from reward.licences import standing
from reward.ranking import bradley_terry
from reward.ratings import cost_sign
from reward.safety.audit import by_clip, load_audit, violates
from reward.safety.head import Head, Look, clip_tokens, load_look, save_filter, smooth_max, with_deviation
from reward.safety.policy import Policy, load_policy
from reward.splits import SPLITS, assign_splits, components_of
from reward.types import one_rate

FLASHING = "P17"
CODES_OF_HARMS = {
    "porn": "P01",
    "animal_abuse": "P06",
    "child_abuse": "P04",
    "crime": "P11",
    "contraband": "P11",
    "controversial": "P16",
    "hate": "P09",
    "violence": "P05",
    "racism": "P08",
    "other_discrimination": "P08",
    "terrorism": "P10",
    "other_harmful": "P15",
}
"""The policy that a tag of SafeSora is a violation of: of those that name it in `policy.yaml` the one that says most nearly the same."""
PATIENCE = 5
"""Passes without a better loss on val before the end."""
CHUNK = 512
"""Clips scored at once."""
METRICS = {
    "loss": "Negative log-likelihood of a label, mean over the batch, violating clips of a policy weighing as much as the others; of pairs, weighted, too; nats.",
    "grad_norm": "Norm of the gradient before clipping.",
    "held_out_loss": "The same of the labels of the split val, by the largest logit instead of the smooth maximum.",
}

Array = NDArray[np.float64]


class Config(BaseConfig):
    out: Path = Path("runs/safety-head")
    """Folder of the run; `filter.safetensors` and `filter_card.json` appear in it."""
    comparisons: Path | None = None
    """Folder of imported tags (`rushes import-rankings safesora-label FILE --media FOLDER --clips STORE`), or of rankings that hold such tags beside pairs."""
    audits: tuple[Path, ...] = ()
    """Folders of audits; what reviewers said there overrules tags of the same clips."""
    clips: Path | None = None
    """Clip store with the clips of both."""
    shapes: Whole | None = None
    """Clips of the built-in world drawn in addition, a third of them with planted flashing (P17); none means 300 where nothing else is given to learn from."""
    policies: tuple[str, ...] = ()
    """Codes to rule on; none means all that have enough clips."""
    policy: Path | None = None
    """Policy file that the codes are of; none means the shipped one."""
    encoder: str = ""
    """Folder or hub id of a CLIP, SigLIP, X-CLIP, VideoMAE or V-JEPA 2 checkpoint; empty means the shipped video VAE, a safetensors file another one."""
    cache: Path = Path("runs/features")
    """Folder of features: what an encoder said of a clip is never computed twice."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    """How long a window is, about."""
    pairs: str = "harmlessness"
    """Dimension of pairs in which the preferred clip is the safer one."""
    pair_weight: NonNegative = 1.0
    """Weight of a batch of pairs beside a batch of labels; 0 learns from no pairs."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of violating clips of val that the first limit, below which clips are allowed, must stop."""
    false_positive_rate: Share = 0.01
    """Largest share of harmless clips of val above the second limit, from which the policy's action is taken."""
    most_weight: Annotated[float, Field(ge=1)] = 20.0
    """What an audited clip counts at most."""
    least: Count = 5
    """Violating and harmless clips of a policy that train and val need each."""
    shares: tuple[Share, Share, Share] = (0.6, 0.2, 0.2)
    """Of prompts without a split: to learn from, to calibrate on, to test on."""
    commercial: bool = False
    """Whether the filter is for commercial use: labels whose licence forbids that, or is not known, then stop the run."""
    seed: Seed = 0
    """Seed of the fresh head, of the order and of drawn clips."""
    width: Count = 32
    """Width of the head."""
    epochs: Count = 60
    """Passes over the labels; it stops earlier once val has been no better for five of them."""
    batch: Count = 64
    """Clips a step, and pairs a step."""
    learning_rate: Positive = 5e-3
    """Step size (linear to zero)."""
    decay: NonNegative = 0.05
    """Weight decay."""
    save_every: Count = 1000
    """Steps between checkpoints."""

    @field_validator("policies")
    @classmethod
    def _named_once(cls, policies: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(policies)) < len(policies):
            raise ValueError(f"a policy is named twice in {', '.join(policies)}")
        return policies

    @field_validator("shares")
    @classmethod
    def _shares_are_a_whole(cls, shares: tuple[float, float, float]) -> tuple[float, float, float]:
        if abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"shares add up to 1, and these to {sum(shares):g}")
        return shares


# Labels


@dataclass(frozen=True)
class Labelled:
    """A clip and what is known of it."""

    clip_id: str
    prompt_id: str
    labels: Mapping[str, float] = field(default_factory=dict)  # code -> 1 violates, 0 does not; nobody judged it under the others
    unsafe: float = math.nan  # whether it violates any
    weight: float = 1.0
    licence: str = ""
    source: str = ""


@dataclass
class Data:
    """Everything that is learned from. `drawn`: clips that lie in no store, uint8 [T,3,H,W]."""

    clips: dict[str, Labelled]
    rows: dict[str, ClipRow]
    prompts: dict[str, Prompt]
    pairs: list[RankingEvent]
    split: dict[str, str]  # prompt_id -> train, val, test
    component: dict[str, str]
    drawn: dict[str, Tensor]
    fps: float

    def of(self, name: str) -> list[Labelled]:
        return [each for each in self.clips.values() if self.split[each.prompt_id] == name]


def tagged(events: Sequence[RankingEvent]) -> dict[str, Labelled]:
    """Clips with tags of kind "tag", as the importer of SafeSora-Label writes them: harms found or not, and safe or unsafe. What no tag speaks of is not judged, nor is what as
    many people say as deny."""
    of: dict[str, list[RankingEvent]] = {}
    for event in events:
        if event.kind == "tag" and event.dimension in ("safety", "harm") and len(event.clip_ids) == 1 and not event.skipped_reason:
            of.setdefault(event.clip_ids[0], []).append(event)
    found = {}
    for clip_id, some in of.items():
        said: dict[str, list[float]] = {}
        for event in some:
            for key, value in (labels_of_harms(event.flags) if event.dimension == "harm" else safety_of(event.flags)).items():
                said.setdefault(key, []).append(value)
        shares = {key: sum(values) / len(values) for key, values in said.items()}
        labels = {key: float(share > 0.5) for key, share in shares.items() if share != 0.5}
        unsafe = labels.pop("unsafe", math.nan)
        if unsafe == 0:
            labels = {**dict.fromkeys(CODES_OF_HARMS.values(), 0.0), **labels}
        found[clip_id] = Labelled(clip_id, some[0].prompt_id, labels, unsafe, licence=some[0].licence, source=some[0].source_dataset)
    return found


def safety_of(flags: Sequence[str]) -> dict[str, float]:
    """Whether anything is violated; nothing where the tag says neither."""
    return {"unsafe": 1.0} if "unsafe" in flags else {"unsafe": 0.0} if "safe" in flags else {}


def labels_of_harms(flags: Sequence[str]) -> dict[str, float]:
    """Policy code -> 1 where one of its harms was found, 0 where none was; left out where one of them is unknown and none was found."""
    said: dict[str, list[float]] = {}
    for harm in HARMS:
        value = 1.0 if harm in flags else math.nan if f"unknown:{harm}" in flags else 0.0
        said.setdefault(CODES_OF_HARMS[harm], []).append(value)
    return {code: 1.0 if 1.0 in values else 0.0 for code, values in said.items() if 1.0 in values or not any(math.isnan(value) for value in values)}


def audited(folder: Path, policy: Policy, rows: Mapping[str, ClipRow], most_weight: float) -> dict[str, Labelled]:
    """Drawn clips that reviewers could tell of, counted 1 / probability each. Under every version of the filter a clip is the same: its largest probability counts."""
    audit = load_audit(folder, policy)
    said, found = by_clip(audit.readings), {}
    probability: dict[str, float] = {}
    for entry in audit.drawn:
        probability[entry.clip_id] = max(entry.probability, probability.get(entry.clip_id, 0.0))
    for clip_id in sorted(probability.keys() & said.keys()):
        row = rows.get(clip_id)
        if row is None:
            raise UserError(f"the audited clip {clip_id} is not in the clip store, {folder}. Give the store that the audit was drawn from, --clips")
        answers = {rule.code: violates(said[clip_id], rule.code) for rule in policy.rules}
        labels = {code: float(answer) for code, answer in answers.items() if answer is not None}
        if labels:
            unsafe = violates(said[clip_id])
            weight = min(1 / probability[clip_id], most_weight)
            found[clip_id] = Labelled(clip_id, row.prompt_id, labels, math.nan if unsafe is None else float(unsafe), weight, row.licence, f"audit {folder.name}")
    return found


def planted(number: int, seed: int) -> tuple[dict[str, Labelled], dict[str, Tensor], dict[str, Prompt]]:
    """Clips of the built-in world, two a prompt: a fifth of the prompts ask for flashing, a sixth of the other clips flash uninvited."""
    prompts = make_prompts(-(-number // 2), seed=seed, split="train", two_objects=0.2, strobe=0.2)
    clips, drawn = {}, {}
    for i in range(number):
        prompt, rng = prompts[i // 2], np.random.default_rng([seed, i])
        scene = sample_scene(prompt, rng, clip=DEMO_CLIP, pan=0.1, flashing=bool(rng.random() < 1 / 6))
        frames = to_uint8(render(scene, DEMO_CLIP))  # [T,H,W,3]
        clip_id, label = digest_of(frames), float(scene.strobe is not None)
        drawn[clip_id] = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [T,3,H,W]
        clips[clip_id] = Labelled(clip_id, prompt.prompt_id, {FLASHING: label}, math.nan, licence="Apache-2.0", source="built-in world")
    return clips, drawn, {prompt.prompt_id: Prompt(prompt.prompt_id, prompt.text, source="built-in world") for prompt in prompts}


def load_data(cfg: Config, policy: Policy) -> Data:
    """All labels, split by prompt. Raises UserError where there are none, or where something they need is missing."""
    shapes = cfg.shapes if cfg.shapes is not None else 0 if cfg.comparisons or cfg.audits else 300
    if cfg.comparisons is None and not cfg.audits and not shapes:
        raise UserError("nothing to learn from, comparisons, audits and shapes. Give --comparisons FOLDER or --audits '[FOLDER]' with --clips STORE, or --shapes 240")
    if (cfg.comparisons or cfg.audits) and cfg.clips is None:
        raise UserError("which clips are the labels about? Give --clips, the store that holds them")
    told = load_comparisons(cfg.comparisons) if cfg.comparisons else None
    rows = {row.clip_id: row for row in ClipStore(cfg.clips).rows()} if cfg.clips else {}
    clips: dict[str, Labelled] = {}
    prompts: dict[str, Prompt] = {}
    pairs: list[RankingEvent] = []
    if told:
        clips |= tagged(told.events)
        pairs = [event for event in told.events if event.kind in ("pair", "rank") and event.dimension == cfg.pairs and not event.skipped_reason and cfg.pair_weight]
        prompts |= told.prompts
    for folder in cfg.audits:
        clips |= audited(folder, policy, rows, cfg.most_weight)
    for clip_id in {clip_id for event in pairs for clip_id in event.clip_ids} - clips.keys():
        clips[clip_id] = Labelled(clip_id, told.clips[clip_id].prompt_id, licence=told.clips[clip_id].licence)  # type: ignore[union-attr]
    missing = sorted(clips.keys() - rows.keys())
    if missing:
        raise UserError(f"{len(missing)} of {len(clips)} labelled clips are not in the clip store, the first is {missing[0]}, {cfg.clips}. Import with --media and --clips")
    prompts |= {row.prompt_id: Prompt(row.prompt_id, row.prompt) for clip_id, row in rows.items() if clip_id in clips and row.prompt_id not in prompts}
    known = [Clip.of(rows[clip_id]) for clip_id in clips]
    fps = one_rate(rows[clip_id].fps for clip_id in clips) if clips else FPS
    drawn: dict[str, Tensor] = {}
    if shapes:
        more, drawn, asked = planted(shapes, cfg.seed)
        fps = fps if fps is None or not clips else one_rate([fps, FPS])
        clips, prompts = more | clips, asked | prompts
    if not clips:
        raise UserError(f"no clip has a label, {cfg.comparisons or cfg.audits[0]}. Import tags (safesora-label), or have audited clips read")
    if fps is None:
        raise UserError("the labelled clips have several frame rates. Learn from clips of one: import them with one --fps")
    check_licences(cfg, clips.values())
    before = told.component if told else {}
    component = components_of(prompts.values(), [*(told.events if told else ())], known, before=before)
    earlier = {prompt_id: name for prompt_id, name in told.split.items() if name} if told else {}
    return Data(clips, rows, prompts, pairs, assign_splits(component, earlier, salt="rushes", shares=cfg.shares), component, drawn, fps)


def check_licences(cfg: Config, clips: Iterable[Labelled]) -> None:
    """Raises UserError where the filter is for commercial use and a licence does not allow that."""
    refused = Counter((each.source, each.licence) for each in clips if cfg.commercial and standing(each.licence) != "commercial")
    if refused:
        listed = "; ".join(f"{n} labels of {source or 'an unnamed source'} under {licence or 'no licence'}" for (source, licence), n in sorted(refused.items()))
        raise UserError(f"not for commercial use: {listed}. Leave them out, or do without --commercial")


def codes_of(cfg: Config, policy: Policy, data: Data) -> tuple[str, ...]:
    """The policies that can be learned. Raises UserError, in one line with the counts, where one that was asked for, or each, has too few clips."""
    unknown = [code for code in cfg.policies if code not in policy]
    if unknown:
        raise UserError(f"unknown policy {unknown[0]!r}, policies. Known are {', '.join(rule.code for rule in policy.rules)}")
    counts = {code: fewest(data, code) for code in sorted({code for each in data.clips.values() for code in each.labels if code in policy} | set(cfg.policies))}
    enough = tuple(code for code, (number, _) in counts.items() if number >= cfg.least)
    few = [code for code in cfg.policies if code not in enough] or ([] if enough else sorted(counts, key=lambda code: -counts[code][0])[:3])
    if few or not enough:
        told = "; ".join(f"{code} has {counts[code][1]}" for code in few) or "no clip was judged under any policy"
        raise UserError(f"too few clips to learn a filter from: {told}, and {cfg.least} are needed. Have more clips read or tagged, or lower --least")
    return cfg.policies or enough


def fewest(data: Data, code: str) -> tuple[int, str]:
    """Of violating and harmless clips in train and val: how many of the rarest kind, and which."""
    found = []
    for name in ("train", "val"):
        labels = [each.labels[code] for each in data.of(name) if code in each.labels]
        found += [(sum(labels), f"violating clips in {name}"), (len(labels) - sum(labels), f"harmless clips in {name}")]
    number, kind = min(found)
    return int(number), f"{int(number)} {kind}"


# Features


class Table(NamedTuple):
    """C clips: what the head sees of them [C,M,2D] and where there is something [C,M], labels [C,P] (nan = not judged), whether any policy is violated [C], weights [C], ids."""

    seen: Tensor
    there: Tensor
    label: Tensor
    unsafe: Tensor
    weight: Tensor
    clips: tuple[Labelled, ...]

    def __len__(self) -> int:
        return len(self.clips)


def features_of(data: Data, look: Look, cache: FeatureCache, store: ClipStore | None) -> dict[str, Tensor]:
    """Clip id -> what the head sees of its places [M,2D]; kept tokens, or computed now."""

    def load(clip_id: str) -> Tensor:
        if clip_id in data.drawn:
            return data.drawn[clip_id].float() / 255
        assert store is not None
        return store.load(clip_id)

    def see(clip_id: str) -> Tensor:
        try:
            return clip_tokens(look, load(clip_id))
        except ValueError as error:
            raise UserError(f"the clip {clip_id} cannot be looked at: {error}, {store.folder if store else 'drawn'}. Import clips whose sides are multiples of 8") from error

    sizes: dict[tuple[int, ...], list[str]] = {}
    for clip_id in sorted(data.clips):
        row = data.rows.get(clip_id)
        size = tuple(data.drawn[clip_id].shape) if row is None else (row.num_frames, 3, row.height, row.width)
        sizes.setdefault(size, []).append(clip_id)
    found: dict[str, Tensor] = {}
    with Progress("features", total=len(data.clips)) as progress:
        for ids in sizes.values():
            for some in (ids[begin : begin + 16] for begin in range(0, len(ids), 16)):
                keys = [feature_key("clip", clip_id, f"windows of {look.identity}", None, "float32") for clip_id in some]
                tokens = cache.fetch(keys, lambda row, some=some: see(some[row]))  # type: ignore[misc]
                found |= zip(some, with_deviation(tokens).flatten(1, 2), strict=True)
                progress.advance(f"{cache.hits} kept", steps=len(some))
    return found


def table_of(clips: Sequence[Labelled], features: Mapping[str, Tensor], policies: Sequence[str]) -> Table:
    seen = [features[each.clip_id] for each in clips]
    lengths = torch.tensor([len(each) for each in seen], dtype=torch.long)
    label = torch.tensor([[each.labels.get(code, math.nan) for code in policies] for each in clips]).reshape(len(clips), len(policies))
    there = torch.arange(int(lengths.max()) if len(seen) else 0) < lengths[:, None]
    padded = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True) if seen else torch.zeros(0, 0, next(iter(features.values())).shape[-1])
    return Table(padded, there, label, torch.tensor([each.unsafe for each in clips]), torch.tensor([each.weight for each in clips]), tuple(clips))


@torch.no_grad()
def largest(head: Head, table: Table) -> Tensor:
    """Every clip's largest logit of each policy, [C,P]."""
    parts = [head(seen).masked_fill(~there[..., None], -torch.inf).amax(1) for seen, there in zip(table.seen.split(CHUNK), table.there.split(CHUNK), strict=True)]
    return torch.cat(parts) if parts else torch.zeros(0, len(head.policies))


# Learning


def balance(table: Table) -> Tensor:
    """Weights [P] of a violating clip, by which both kinds of a policy weigh the same in train."""
    known, weight = ~table.label.isnan(), table.weight[:, None]
    positive, judged = ((weight * part).sum(0) for part in (table.label.nan_to_num(), known.float()))  # [P] each
    return (judged - positive) / positive


def label_loss(logits: Tensor, label: Tensor, unsafe: Tensor, weight: Tensor, positive: Tensor) -> Tensor:
    """Logits [B,P] of clips with labels [B,P], unsafe [B], weights [B] -> []. Where a clip is only known to be unsafe, or safe, the largest logit bears the sign."""
    only = torch.where(label.isnan().all(1), unsafe, torch.nan)  # [B]
    values = torch.cat([-cost_sign(logits, label), -cost_sign(logits.amax(1), only)[:, None]], dim=1)  # [B,P+1]
    weights = weight[:, None] * torch.cat([torch.where(label == 1, positive, (~label.isnan()).float()), (~only.isnan()).float()[:, None]], dim=1)
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


def votes_of(events: Sequence[RankingEvent], where: Mapping[str, int]) -> Tensor:
    """Rows [V,2] of the more harmful and the less harmful clip, one of every decided answer; in harmlessness the preferred clip is the safer one."""
    rows = []
    for pair in pairs_of(events):
        first, second = where[pair.first], where[pair.second]
        rows += [(second, first) if vote > 0 else (first, second) for vote in pair.votes.values() if vote]
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2)


def fit(cfg: Config, run: Run, head: Head, train: Table, val: Table, votes: Tensor) -> None:
    """Learns the head; votes [V,2]: rows of train. The weights that are best on val are kept, the start included."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.learning_rate, weight_decay=cfg.decay)
    best, positive = Best(head), balance(train)
    for name, thing in (("head", head), ("optimizer", optimizer), ("best", best)):
        run.register(name, thing)
    run.count_forwards(head)
    labelled = torch.arange(len(train))[~(train.label.isnan().all(1) & train.unsafe.isnan())]
    per_epoch = max(-(-len(labelled) // cfg.batch), -(-len(votes) // cfg.batch))
    best.worse_for(held_out_loss(head, val, positive))
    for i in run.iterations(cfg.epochs * per_epoch, save_every=cfg.save_every, label="safety"):
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * (1 - i / (cfg.epochs * per_epoch))
        rows = batch_of(len(labelled), i, per_epoch, cfg.batch, run)
        some = labelled[rows]
        loss = label_loss(smooth_max(head(train.seen[some]), train.there[some]), train.label[some], train.unsafe[some], train.weight[some], positive)
        if len(votes):
            two = votes[batch_of(len(votes), i, per_epoch, cfg.batch, run)].flatten()  # [2b]
            cost = smooth_max(head(train.seen[two]), train.there[two]).amax(1).unflatten(0, (-1, 2))  # [b,2]
            loss = loss - cfg.pair_weight * bradley_terry(cost[:, 0] - cost[:, 1]).mean()
        run.backward(loss)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if (i + 1) % per_epoch == 0:
            held_out = held_out_loss(head, val, positive)
            run.log(loss=loss.detach(), grad_norm=norm, held_out_loss=held_out)
            if best.worse_for(held_out) >= PATIENCE:
                run.stop()
    best.restore()


def batch_of(number: int, i: int, per_epoch: int, size: int, run: Run) -> Tensor:
    """Rows of the i-th batch: passes in an order of their own, begun anew within a pass where there are fewer than it takes."""
    order = torch.randperm(number, generator=run.generator(f"order of {number}", i // per_epoch))
    size = min(size, number)
    begin = (i % per_epoch) * size % number
    return torch.cat([order, order])[begin : begin + size]


def held_out_loss(head: Head, val: Table, positive: Tensor) -> float:
    return float(label_loss(largest(head, val), val.label, val.unsafe, val.weight, positive))


# Calibration, limits, measurement


@torch.no_grad()
def calibrate(cfg: Config, head: Head, val: Table) -> None:
    """Platt's two numbers and the two limits of every policy, on val."""
    logits = largest(head, val)
    for p in range(len(head.policies)):
        score, truth, weight = judged(logits, val, p)
        head.slope[p], head.offset[p] = fit_platt(score, truth, weight)
    probability = head.calibrated(logits).sigmoid()
    for p in range(len(head.policies)):
        low, high = limits_of(*judged(probability, val, p), recall=cfg.recall, false_positive_rate=cfg.false_positive_rate)
        head.low[p], head.high[p] = low, high


def judged(values: Tensor, table: Table, p: int) -> tuple[Array, Array, Array]:
    """Values [C,P], labels and weights of the clips that were judged under the p-th policy, [n] each."""
    known = ~table.label[:, p].isnan()
    score, truth, weight = (part[known].double().numpy() for part in (values[:, p], table.label[:, p], table.weight))
    return score, truth, weight


def limits_of(score: Array, truth: Array, weight: Array, *, recall: float, false_positive_rate: float) -> tuple[float, float]:
    """(low, high) from n clips: at least a `recall` of the violating ones reach `low`, and at most a `false_positive_rate` of the harmless ones `high`, which is not below it.

    Of such limits `low` lets the most harmless clips below it, and then is as low as that allows; `high` is the smallest. Both lie halfway between the scores of two clips.
    """
    values = np.unique(score)
    between = np.concatenate([values[:1] / 2, (values[1:] + values[:-1]) / 2, (values[-1:] + 1) / 2])  # [L] rising, they tell all clips apart
    reached = score[None] >= between[:, None]  # [L,n]
    found, alarms = ((reached * part * weight).sum(1) / (part * weight).sum() for part in (truth, 1 - truth))  # [L] falling
    most = alarms[np.flatnonzero(found >= recall - 1e-9)[-1]]
    low = float(between[np.flatnonzero(alarms <= most + 1e-9)[0]])
    return low, max(low, float(between[np.flatnonzero(alarms <= false_positive_rate + 1e-9)[0]]))


def measure(head: Head, table: Table, component: Mapping[str, str], seed: int) -> dict[str, Any]:
    """What a policy's rulings on the clips of test are worth, with intervals over prompts; null where test has no such clips."""
    probability = head.calibrated(largest(head, table)).sigmoid()
    groups = np.array([component[each.prompt_id] for each in table.clips])
    found: dict[str, Any] = {}
    for p, code in enumerate(head.policies):
        score, truth, weight = judged(probability, table, p)
        group = groups[(~table.label[:, p].isnan()).numpy()]
        found[code] = {"clips": len(score), "violating": int(truth.sum()), "prompts": len(set(group.tolist()))}
        statistics = rates_of(score, truth, weight, float(head.low[p]), float(head.high[p]))
        found[code] |= {name: bootstrap_prompts(statistic, group, seed=seed, draws=300).as_json() if len(score) else None for name, statistic in statistics.items()}
        told, happened = np.stack([score, 1 - score], 1), np.stack([truth, 1 - truth], 1)
        errors = {"log_loss": log_loss, "brier": brier, "calibration_error": expected_calibration_error}
        found[code] |= {name: round(error(told, happened, weight=weight), 5) if len(score) else None for name, error in errors.items()}
    return found


def rates_of(score: Array, truth: Array, weight: Array, low: float, high: float) -> dict[str, Callable[[NDArray[np.int64]], float]]:
    """Statistics of rows of n clips, as `bootstrap_prompts` takes them: what is not allowed reaches `low`, what is blocked `high`."""

    def above(limit: float, of: Array) -> Callable[[NDArray[np.int64]], float]:
        return lambda rows: share(score[rows] >= limit, of[rows])

    violating, harmless = truth * weight, (1 - truth) * weight
    return {
        "auc": lambda rows: auc(score[rows], truth[rows], weight[rows]),
        "recall": above(low, violating),
        "false_positive_rate": above(low, harmless),
        "recall_blocked": above(high, violating),
        "false_positive_rate_blocked": above(high, harmless),
    }


def share(hit: NDArray[np.bool_], weight: Array) -> float:
    """Of the weight, nan where there is none."""
    return float((hit * weight).sum() / weight.sum()) if weight.sum() > 0 else math.nan


def auc(score: Array, truth: Array, weight: Array) -> float:
    """Chance that a violating clip scores higher than a harmless one, a tie counting one half; nan without clips of both kinds. [n] each."""
    order = np.argsort(score, kind="stable")
    _, group = np.unique(score[order], return_inverse=True)
    positive, negative = (np.bincount(group, weights=(part * weight)[order]) for part in (truth, 1 - truth))
    below = np.cumsum(negative) - negative / 2
    whole = positive.sum() * negative.sum()
    return float((positive * below).sum() / whole) if whole > 0 else math.nan


def pair_accuracy(head: Head, table: Table, data: Data) -> dict[str, Any] | None:
    """How often the cost orders a pair of test as people did; null without pairs."""
    pairs: list[Pair] = [pair for pair in pairs_of(data.pairs) if data.split[pair.prompt_id] == "test"]
    if not pairs:
        return None
    cost = dict(zip([each.clip_id for each in table.clips], largest(head, table).amax(1).tolist(), strict=True))
    dimension = pairs[0].dimension
    return scorer_accuracy(pairs, {(dimension, clip_id): -value for clip_id, value in cost.items()}, data.component)._asdict()


def labels_hash(data: Data) -> str:
    """sha256 of who violates what, of pairs, and of which prompts were held out."""
    said = [(each.clip_id, each.prompt_id, data.split[each.prompt_id], sorted(each.labels.items()), str(each.unsafe), each.weight) for each in data.clips.values()]
    return hashlib.sha256(json.dumps([sorted(said), sorted((event.event_id, event.clip_ids, event.ranks) for event in data.pairs)]).encode()).hexdigest()


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains, calibrates and measures; writes weights and card into `out` and returns what was measured."""
    policy = load_policy(cfg.policy)
    data = load_data(cfg, policy)
    policies = codes_of(cfg, policy, data)
    look = load_look(cfg.encoder, fps=data.fps, seconds=cfg.seconds)
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    features = features_of(data, look, FeatureCache(cfg.cache), ClipStore(cfg.clips) if cfg.clips else None)
    train, val, test = (table_of(data.of(name), features, policies) for name in SPLITS)

    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(cfg.seed, "head", 0))
        head = Head(policies, train.seen.shape[-1] // 2, cfg.width)
    head.fit_standard(train.seen[train.there])
    where = {each.clip_id: row for row, each in enumerate(train.clips)}
    fit(cfg, run, head, train, val, votes_of([event for event in data.pairs if data.split[event.prompt_id] == "train"], where))
    calibrate(cfg, head, val)

    measured = {"policies": measure(head, test, data.component, cfg.seed), "pairs": pair_accuracy(head, test, data)}
    facts = {
        "policy_version": policy.version,
        "measured": measured,
        "wanted": {"recall": cfg.recall, "false_positive_rate": cfg.false_positive_rate},
        "clips": {name: len(data.of(name)) for name in SPLITS},
        "pairs": len(data.pairs),
        "data_sha256": labels_hash(data),
        "sources": sorted({each.source for each in data.clips.values() if each.source}),
        "licences": sorted({each.licence or "unknown" for each in data.clips.values()}),
        "seed": cfg.seed,
        "seconds": round(run.seconds, 1),
        **made_by("safety-train", cfg),
    }
    card = save_filter(cfg.out, head, look, fps=data.fps, seconds=cfg.seconds, facts=facts)
    return {"out": str(cfg.out), "version": card["version"], "limits": card["limits"], "seconds": facts["seconds"], **measured}
