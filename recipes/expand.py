"""Prompts made long: a language model learns to write the captions that a video model understands (`rushes expand`).

Two stages of trl, each in a folder of its own under `out`; a finished one is not done again, a killed one goes on with the same command.

    sft     captions of pairs (short prompt, long caption) are learned by `trl.SFTTrainer`; its result tells the bits a token of held-out captions, beside those of n-grams
    grpo    with `reward`: `trl.GRPOTrainer` (GRPO, Shao et al. 2024, arXiv 2402.03300) climbs the reward of the clips that a video model makes of the captions, held near the
            SFT model by a KL penalty. The reward model is asked about the user's own words, so that no caption gains by asking for something easier

A caption that the prompt filter does not allow makes no clip. It has no reward (None), nor has one whose clip the filters withhold, or whose score is unknown: trl leaves it out of
its group's mean and deviation and gives it an advantage of 0, so that the KL alone acts on it. Captions of one prompt are shown from the same noise: they differ by words alone.

Under torchrun processes share the texts of a step (accelerate's DDP), and the first one measures and writes; each draws its own captions in the second stage, so they are others.
Left out: the judge, which measures in `rushes bench expand` and rewards nothing. Letters: N prompts, G captions a prompt, B clips.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Several, dump, leaves, path_keys
from align.processes import join, on_main, started
from align.run import derived_seed, lock_folder
from base_model.errors import UserError
from base_model.prompts.expand import INSTRUCTION, Expanded, Expander, Style, TinySize, answered, asked, ends_of, finished, load_expander, save_expander, tiny_expander
from base_model.prompts.text import TextEncoder, likeness
from base_model.tiny import LatentVideoModel
from base_model.types import TrainableModel
from base_model.video.files import disk_errors, write_atomic
from recipes import trl_checkpoints
from recipes.feedback import Assessor, load_reward
from recipes.filters import Filters
from recipes.generate import Sampler, best_device, check_sampler, safety_runner, sample
from recipes.memory import PeakMemory
from recipes.models import encode_prompts, load_model, model_lineage
from recipes.ngram import Example, KneserNey, best_order
from recipes.ngram import bits_per_token as floor_bits
from recipes.shapes.short import make_shorts
from recipes.stages import Stages
from recipes.weights import about_training, lineage_of
from reward.latent import LatentMixture
from reward.safety.contract import allowed
from reward.splits import assign_splits

SHORT_FILE, LONG_FILE = "vbench.txt", "vbench_long.txt"
NEAR = 0.6
"""Of the words of the shorter of two prompts, stop words apart, that are in the longer one too, and at least two: then both are on the same side of the split."""
HELD_OUT_MOST = 0.2
"""Share of the pairs that a cluster may hold to be held out: a larger one would be most of what val or test measure, and is learned from."""
STOP_WORDS = frozenset(("a", "an", "the", "of", "in", "on", "at", "to", "and", "or", "with", "is", "are", "by", "for", "from", "its", "it", "his", "her", "their", "as", "into"))
MEASURED_SEED = 1
"""Of the captions that are measured."""
MEASURED_PROMPTS = 40
CAPTIONS_KEPT = 2_000
"""Whose states the video model's text encoder keeps."""


class Tiny(BaseConfig):
    """The language model that is made where none is given: of Qwen3's class, with fresh weights and a tokenizer made of the training texts."""

    width: Annotated[int, Field(ge=8, multiple_of=4)] = 128
    """Width."""
    depth: Count = 4
    """Layers."""
    heads: Count = 4
    """Heads of attention; they divide the width."""
    vocabulary: Annotated[int, Field(ge=300)] = 1024
    """Most tokens of the tokenizer."""


class Sft(BaseConfig):
    """How captions are learned."""

    steps: Count = 300
    """Optimizer steps, of which the weights that are best on the split val are kept."""
    batch: Count = 32
    """Pairs a step."""
    lr: Positive = 1e-3
    """Learning rate of AdamW, falling to nothing on half a cosine."""
    weight_decay: NonNegative = 0.1
    """Of AdamW."""
    evaluate_every: Count = 50
    """Steps between looks at val, each with a checkpoint."""


class Grpo(BaseConfig):
    """How captions climb the reward."""

    steps: Count = 150
    """Rollouts, with one update each."""
    prompts: Count = 8
    """N, prompts a rollout."""
    group_size: Several = 8
    """G, captions of each."""
    temperature: Positive = 0.7
    """Of sampling in rollouts: above that of use, so that captions differ."""
    lr: Positive = 1.5e-4
    """Learning rate of AdamW. Twice as much, with less KL, made the tiny model forget how captions end within 30 rollouts; one of billions of weights wants about 1e-6."""
    kl_coef: NonNegative = 0.05
    """Weight of the KL from the SFT model a token (trl's beta)."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(BaseConfig):
    out: Path = Path("runs/expand")
    """Folder of the run; `sft/` and `grpo/` in it are expanders for `rushes generate --expand`."""
    seed: Seed = 0
    """Seed of pairs, weights, captions and noise."""
    language: Path | None = None
    """Folder of a causal language model of transformers to start from; none makes a tiny one."""
    tiny: Tiny = Tiny()
    """Size of the tiny one."""
    instruction: str = INSTRUCTION
    """What a model with a chat template is told; others do not read it."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """Rank of LoRA in either stage, merged when it ends; 0 trains all weights."""
    micro_batch: Count = 64
    """Texts in one pass."""
    pairs: Path | None = None
    """Pairs to learn from: a jsonl of {"short": ..., "long": ...}, or a folder with vbench.txt and vbench_long.txt, line by line; none: those of the built-in world."""
    pool: Count = 3_000
    """Pairs of the built-in world."""
    most_tokens: Annotated[int, Field(ge=4, le=2048)] = 200
    """Most tokens of a caption."""
    temperature: Positive = 0.35
    """Of sampling in use. At 1 one word in a few is a slip, and a caption that names another colour is another clip."""
    sft: Sft = Sft()
    """How captions are learned."""
    reward: Path | None = None
    """Folder of a reward model, whose score of the clips is climbed; none ends after SFT."""
    model: Path | None = None
    """The video model: a network of the built-in one, or an open family; none means the shipped base."""
    pessimism: NonNegative = 0.5
    """Reward is the mean minus this many spreads of the reward model."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""
    filters: Filters = Filters()
    """Safety filters beside those that need no weights."""
    grpo: Grpo = Grpo()
    """How captions climb the reward."""


# Pairs


class Pair(NamedTuple):
    short: str
    long: str


class Splits(NamedTuple):
    """Pairs to learn from, to choose by, and to measure on."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a jsonl, or of the two files of a folder line by line, spaces joined. Raises UserError, naming the line, for what is no pair."""
    if path.is_dir():
        shorts, longs = _lines(path / SHORT_FILE), _lines(path / LONG_FILE)
        if len(shorts) != len(longs):
            raise UserError(f"{len(shorts)} short prompts and {len(longs)} long ones, {path}. Line N of {SHORT_FILE} and {LONG_FILE} is the same prompt: make them as long")
        pairs = [Pair(" ".join(short.split()), " ".join(long.split())) for short, long in zip(shorts, longs, strict=True)]
    else:
        pairs = [_pair(line, f"line {number} of {path}") for number, line in enumerate(_lines(path), 1) if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if not pair.short or not pair.long:
            raise UserError(f"pair {number} has an empty side, {path}. Fill it in or take it out")
    if len(pairs) < 10:
        raise UserError(f"{len(pairs)} pairs are too few to learn from and to hold some out, {path}. Give at least 10")
    return pairs


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no such file of prompts, {path}. Give --pairs a jsonl, or a folder with {SHORT_FILE} and {LONG_FILE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompts, {path}: {error}. Give UTF-8 that you may read") from error


def _pair(line: str, place: str) -> Pair:
    try:
        row = json.loads(line)
        short, long = row["short"], row["long"]
        f"{short}{long}".encode()
        return Pair(" ".join(short.split()), " ".join(long.split()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{place} is no pair. Write {{"short": "...", "long": "..."}}') from error


def split_pairs(pairs: Sequence[Pair], seed: int) -> Splits:
    """Of small clusters of prompts eight in ten to learn from, one to choose by, one to measure on: a sentence and the same sentence in another style are on one side.

    Raises UserError where a side is left empty.
    """
    clusters = clusters_of([pair.short for pair in pairs])
    names = {str(k): hashlib.sha256(pairs[cluster].short.encode()).hexdigest() for k, cluster in enumerate(clusters)}
    large = {cluster for cluster, number in Counter(clusters).items() if number > HELD_OUT_MOST * len(pairs)}
    learned = {str(k): "train" for k, cluster in enumerate(clusters) if cluster in large}
    sides = assign_splits(names, learned, salt=f"expand {seed}", shares=(0.8, 0.1, 0.1))
    found = Splits(*([pair for k, pair in enumerate(pairs) if sides[str(k)] == side] for side in Splits._fields))
    if not all(found):
        raise UserError(f"{len(pairs)} pairs hang together in {len(set(clusters))} clusters, too few to hold any out, pairs. Give more different prompts")
    return found


def clusters_of(shorts: Sequence[str]) -> list[int]:
    """For each prompt the first one of its cluster; two are linked by `NEAR` or equal words, and a cluster is all that is linked, also through others."""
    words = [frozenset(short.lower().replace(",", " ").replace(".", " ").split()) for short in shorts]
    content = [known - STOP_WORDS or known for known in words]
    first = list(range(len(shorts)))

    def root(k: int) -> int:
        while first[k] != k:
            first[k] = first[first[k]]
            k = first[k]
        return k

    holders: dict[object, list[int]] = defaultdict(list)
    for k, mine in enumerate(content):
        for key in (mine, *combinations(sorted(mine), 2)):
            for other in holders[key]:
                a, b = sorted((root(k), root(other)))
                shared = len(mine & content[other])
                if a != b and (mine == content[other] or (shared >= 2 and shared >= NEAR * min(len(mine), len(content[other])))):
                    first[b] = a
            holders[key].append(k)
    return [root(k) for k in range(len(shorts))]


def world_pairs(cfg: Config) -> Splits:
    """Of the built-in world; what is measured on are its held-out combinations and wordings."""
    train, val = (make_shorts(number, seed=derived_seed(cfg.seed, name, 0) % 2**31, split="train") for number, name in ((cfg.pool, "train"), (200, "val")))
    return Splits(*([Pair(each.text, each.long) for each in part] for part in (train, val, make_shorts(80, seed=cfg.seed, split="eval"))))


def pairs_of(cfg: Config) -> Splits:
    return split_pairs(read_pairs(cfg.pairs), cfg.seed) if cfg.pairs else world_pairs(cfg)


# What is measured, and never rewarded


def examples_of(expander: Expander, pairs: Sequence[Pair]) -> list[Example]:
    """Tokens of what is asked and of the caption with its end, as SFT sees them."""
    found = []
    for pair in pairs:
        told = asked(expander.tokenizer, pair.short, expander.style)
        given = expander.tokenizer(told)["input_ids"]
        whole = expander.tokenizer(told + answered(expander.tokenizer, pair.long) + expander.tokenizer.eos_token)["input_ids"]
        found.append(Example(given, whole[len(given) :]))
    return found


@torch.no_grad()
def language_bits(network: Any, examples: Sequence[Example]) -> float:
    """Bits a token of the captions, given their prompts, by a language model."""
    network.eval()
    nats, tokens = 0.0, 0
    for example in examples:
        ids = torch.tensor([[*example.given, *example.asked]], device=network.device)  # [1,L]
        logits = network(input_ids=ids).logits[0, len(example.given) - 1 : -1].float()  # [a,V]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, len(example.given) :], reduction="sum"))
        tokens += len(example.asked)
    return nats / math.log(2) / tokens


def floors(train: Sequence[Example], val: Sequence[Example], test: Sequence[Example], vocabulary: int) -> dict[str, float]:
    """What n-grams of the same tokens need: the best order by val, and single tokens."""
    best = best_order(train, val, vocabulary)
    return {"ngram_bits": floor_bits(best, test), "ngram_order": best.order, "unigram_bits": floor_bits(KneserNey(train, 1, vocabulary), test)}


def measure(expander: Expander, pairs: Sequence[Pair], cfg: Config) -> dict[str, Any]:
    """What the expander makes of held-out prompts: length, likeness, and how many were kept or are not allowed."""
    chosen = pairs[:MEASURED_PROMPTS]
    made = expander([pair.short for pair in chosen], seed=MEASURED_SEED)
    encode, texts = TextEncoder(keep=CAPTIONS_KEPT), [each.text for each in made]
    shorts, words = [pair.short for pair in chosen], [len(text.split()) for text in texts]
    near, reference = likeness(encode, shorts, texts), likeness(encode, shorts, [pair.long for pair in chosen])
    decisions = safety_runner(cfg.filters).check_prompts(texts)
    return {
        "prompts": len(chosen),
        "words": sum(words) / len(words),
        "most_words": max(words),
        "kept_prompts": sum(bool(each.note) for each in made) / len(made),
        "unsafe": sum(not allowed(decision) for decision in decisions) / len(made),
        "likeness": sum(near) / len(near),
        "likeness_of_pairs": sum(reference) / len(reference),
        "examples": [{"prompt": each.prompt, "text": each.text} for each in made[:3]],
    }


# SFT


def start(cfg: Config, train: Sequence[Pair]) -> Expander:
    """The language model as it is before SFT, on the device."""
    style = Style(cfg.instruction, cfg.most_tokens, cfg.temperature)
    if cfg.language is not None:
        given = load_expander(cfg.language, device=best_device())
        return Expander(given.network, given.tokenizer, style)
    if cfg.tiny.width % cfg.tiny.heads or cfg.tiny.width // cfg.tiny.heads % 2:
        raise UserError(f"tiny.heads: {cfg.tiny.heads} heads do not divide a width of {cfg.tiny.width} into even parts. Change either")
    texts = [text for pair in train for text in (f"{pair.short} ->", f" {pair.long}")]
    size = TinySize(cfg.tiny.width, cfg.tiny.depth, cfg.tiny.heads, cfg.tiny.vocabulary, context=cfg.most_tokens + 512)
    made = tiny_expander(texts, size, style, seed=derived_seed(cfg.seed, "language", 0))
    return Expander(made.network.to(best_device()), made.tokenizer, style)


def in_passes(batch: int, micro_batch: int, key: str) -> dict[str, int]:
    """A step's batch, a process's share of it, as passes of at most `micro_batch` texts. Raises UserError where they do not divide it."""
    own, left = divmod(batch, started())
    if left:
        raise UserError(f"{key}: {started()} processes cannot share {batch} texts a step evenly. Give a multiple, or start other processes")
    one = min(own, micro_batch)
    if own % one:
        raise UserError(f"{key}: {own} texts a step are no multiple of micro_batch, {micro_batch}. Change either")
    return {"per_device_train_batch_size": one, "gradient_accumulation_steps": own // one}


def lora(cfg: Config) -> Any:
    """peft's description of the adapter, or None."""
    from peft import LoraConfig

    return LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM") if cfg.lora_rank else None


def merged(trainer: Any, cfg: Config) -> Any:
    """The trained network, whole."""
    network = trainer.accelerator.unwrap_model(trainer.model)
    return (network.merge_and_unload() if cfg.lora_rank else network).eval()


@trl_checkpoints.quiet()
def learn_captions(cfg: Config, pairs: Splits, out: Path, memory: PeakMemory) -> dict[str, Any]:
    """The stage `sft`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    expander = start(cfg, pairs.train)
    tokenizer, style, s = expander.tokenizer, expander.style, cfg.sft
    data = [
        Dataset.from_dict({"prompt": [asked(tokenizer, pair.short, style) for pair in part], "completion": [answered(tokenizer, pair.long) for pair in part]})
        for part in (pairs.train, pairs.val)
    ]
    train, val, test = (examples_of(expander, part) for part in pairs)
    arguments = SFTConfig(
        **trl_checkpoints.common_arguments(out / "checkpoints", seed=cfg.seed, steps=s.steps, save_every=min(s.evaluate_every, s.steps)),
        **in_passes(s.batch, cfg.micro_batch, "sft.batch"),
        per_device_eval_batch_size=min(cfg.micro_batch, s.batch),
        max_length=None,
        learning_rate=s.lr,
        weight_decay=s.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, s.steps // 10),
        eval_strategy="steps",
        eval_steps=min(s.evaluate_every, s.steps),
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer = SFTTrainer(model=expander.network, args=arguments, train_dataset=data[0], eval_dataset=data[1], processing_class=tokenizer, peft_config=lora(cfg))
    history = trl_checkpoints.train(trainer, out / "checkpoints", label="expand, sft")
    expander = Expander(merged(trainer, cfg), tokenizer, style)

    def kept() -> dict[str, Any]:
        sizes = {side: len(part) for side, part in zip(pairs._fields, pairs, strict=True)}
        found = {"bits": language_bits(expander.network, test), **floors(train, val, test, len(tokenizer)), "pairs": sizes}
        return keep(cfg, out, expander, history, {**found, **measure(expander, pairs.test, cfg)}, pairs, memory)

    return on_main(kept)


# GRPO


@dataclass
class VideoReward:
    """The reward of clips that a video model makes of captions."""

    model: TrainableModel
    assess: Assessor
    sampler: Sampler
    seed: int
    ends: frozenset[int]  # tokens that end a caption

    def video_reward(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        short: Sequence[str],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        log_extra: object,
    ) -> list[float | None]:
        """What trl asks a reward function: one reward a completion, None where there is none. short: the column of users' prompts."""
        rows = zip(short, completions, completion_ids, strict=True)
        captions = [finished(prompt, text, whole=bool(ids) and ids[-1] in self.ends) for prompt, text, ids in rows]
        safe = self.safe(captions)
        rewards = self.rewards([caption if ok else None for caption, ok in zip(captions, safe, strict=True)], trainer_state.global_step)
        log_metric("unsafe_share", 1 - sum(safe) / len(safe))
        log_metric("kept_prompt_share", sum(bool(caption.note) for caption in captions) / len(captions))
        log_metric("missing_reward_share", sum(reward is None for reward in rewards) / len(rewards))
        log_metric("caption_words", sum(len(caption.text.split()) for caption in captions) / len(captions))
        return rewards

    def safe(self, captions: Sequence[Expanded]) -> list[bool]:
        """Whether the prompt filter allows both the prompt and its caption: before any clip is made."""
        texts = list(dict.fromkeys(text for caption in captions for text in (caption.prompt, caption.text)))
        told = {text: allowed(decision) for text, decision in zip(texts, self.assess.runner.check_prompts(texts), strict=True)}
        return [told[caption.prompt] and told[caption.text] for caption in captions]

    @torch.no_grad()
    def rewards(self, captions: Sequence[Expanded | None], step: int) -> list[float | None]:
        """Rewards of captions; equal ones of a prompt share a clip. The noise depends on step and prompt."""
        asked_for = list(dict.fromkeys(caption for caption in captions if caption is not None))
        if not asked_for:
            return [None] * len(captions)
        texts, shorts = [caption.text for caption in asked_for], [caption.prompt for caption in asked_for]
        seeds = [derived_seed(self.seed, f"expand {short}", step) % 2**31 for short in shorts]
        video = torch.cat(list(sample(self.model, encode_prompts(self.model, texts), seeds, self.sampler)))  # [B,T,3,H,W]
        assert self.assess.reward is not None and not isinstance(self.assess.reward, LatentMixture)
        seen = self.assess.ruled(self.assess.reward(video, shorts), video, texts)
        good = seen.allowed & seen.reward.isfinite()  # [B]
        found = {caption: float(reward) if ok else None for caption, reward, ok in zip(asked_for, seen.reward, good, strict=True)}
        return [None if caption is None else found[caption] for caption in captions]


def load_video_reward(cfg: Config, reward: Path, ends: frozenset[int]) -> VideoReward:
    """Raises UserError for a sampler that the video model does not take, and for a reward on latents: captions are judged by what is shown."""
    model = load_model(cfg.model, device=best_device(), fps=cfg.sampler.fps)
    check_sampler(model, cfg.sampler)
    if isinstance(model, LatentVideoModel):
        model.text = TextEncoder(keep=CAPTIONS_KEPT)  # captions never end
    scorer = load_reward(reward, model, cfg.pessimism, cfg.sampler.fps)
    if isinstance(scorer, LatentMixture):
        raise UserError(f"a latent reward scores no clips, {reward}. Give the reward model that it was distilled from")
    return VideoReward(model, Assessor(scorer, safety_runner(cfg.filters), cfg.sampler.fps), cfg.sampler, cfg.seed, ends)


@trl_checkpoints.quiet()
def climb(cfg: Config, pairs: Splits, before: Path, reward: Callable[[Expander], Callable[..., Any]], out: Path, memory: PeakMemory) -> dict[str, Any]:
    """The stage `grpo`. before: folder of the SFT model, from which it starts and near which it stays. reward: what trl calls, for this expander."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    g, expander = cfg.grpo, load_expander(before, device=best_device())
    shorts = list(dict.fromkeys(pair.short for pair in pairs.train))
    data = Dataset.from_dict({"prompt": [asked(expander.tokenizer, short, expander.style) for short in shorts], "short": shorts})
    arguments = GRPOConfig(
        **trl_checkpoints.common_arguments(out / "checkpoints", seed=cfg.seed, steps=g.steps, save_every=g.save_every),
        **in_passes(g.prompts * g.group_size, cfg.micro_batch, "grpo.prompts and grpo.group_size"),
        num_generations=g.group_size,
        max_completion_length=cfg.most_tokens,
        temperature=g.temperature,
        learning_rate=g.lr,
        lr_scheduler_type="constant",
        beta=g.kl_coef,
    )
    trainer = GRPOTrainer(model=expander.network, reward_funcs=reward(expander), args=arguments, train_dataset=data, processing_class=expander.tokenizer, peft_config=lora(cfg))
    history = trl_checkpoints.train(trainer, out / "checkpoints", label="expand, grpo", note="reward")
    expander = Expander(merged(trainer, cfg), expander.tokenizer, expander.style)
    rolled = [row for row in history if "reward" in row]
    found = {f"{name}_{when}": row.get(name) for when, row in (("first", rolled[0]), ("last", rolled[-1])) for name in ("reward", "kl")}
    shares = {name: mean_of(history, name) for name in ("unsafe_share", "missing_reward_share", "kept_prompt_share")}
    return on_main(lambda: keep(cfg, out, expander, history, {**found, **shares, **measure(expander, pairs.test, cfg)}, pairs, memory))


def mean_of(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the steps that logged it."""
    known = [row[name] for row in history if isinstance(row.get(name), int | float) and math.isfinite(row[name])]
    return sum(known) / len(known) if known else None


# Both


def keep(cfg: Config, out: Path, expander: Expander, history: Sequence[Mapping[str, Any]], found: dict[str, Any], pairs: Splits, memory: PeakMemory) -> dict[str, Any]:
    """Saves a stage's expander with its card and what was logged; drops its checkpoints."""
    write_atomic(out / "metrics.jsonl", "".join(json.dumps({name: plain(value) for name, value in row.items()}) + "\n" for row in history).encode())
    seconds = next((row["train_runtime"] for row in reversed(history) if "train_runtime" in row), 0.0)
    about = about_training(recipe="expand", cfg=cfg, data=data_hash(pairs), seconds=seconds, measured={**found, "peak_memory_bytes": memory.peak_bytes}, safety=())
    save_expander(out, expander, {"about": about})
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return {"expander": str(out), **found}


def plain(value: Any) -> Any:
    """JSON knows no nan."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_hash(pairs: Splits) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def folder_hash(folder: Path | None) -> str:
    """sha256 of the files in a folder, by name; empty for none."""
    return "" if folder is None else lineage_of([(path.name, path) for path in sorted(folder.glob("*")) if path.is_file()])


def settings_of(cfg: Config, pairs: Splits) -> dict[str, dict[str, Any]]:
    """What each stage depends on. Paths are told by what is in them."""
    told = {key: value for key, value in leaves(dump(cfg)).items() if key not in path_keys(Config)}
    climbing = ("grpo.", "sampler.", "filters.", "pessimism")
    sft = {key: value for key, value in told.items() if not key.startswith(climbing)} | {"data": data_hash(pairs), "language": folder_hash(cfg.language)}
    return {"sft": sft, "grpo": {**sft, **told, "reward": folder_hash(cfg.reward), "model": model_lineage(cfg.model)}}


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """`resume` changes nothing: the same command goes on with what is in `out`."""
    join()
    pairs = pairs_of(cfg)
    settings = settings_of(cfg, pairs)
    on_main(partial(claim, cfg.out))
    stages = {name: Stages(cfg.out, name, settings[name], leaves(dump(Config.model_construct()))) for name in ("sft", *(["grpo"] if cfg.reward else []))}
    for each in stages.values():
        each.check_same()
    on_main(partial(begin, stages["sft"]))
    told = {"sft": stages["sft"].do("sft", partial(learn_captions, cfg, pairs))["result"]}
    if cfg.reward is not None:
        on_main(partial(begin, stages["grpo"]))
        reward = partial(reward_of, cfg, cfg.reward)
        told["grpo"] = stages["grpo"].do("grpo", partial(climb, cfg, pairs, cfg.out / "sft", reward))["result"]
    return {"expander": told[list(told)[-1]]["expander"], **told}


def reward_of(cfg: Config, folder: Path, expander: Expander) -> Callable[..., Any]:
    return load_video_reward(cfg, folder, ends_of(expander.network, expander.tokenizer)).video_reward


def claim(out: Path) -> None:
    """Makes the folder, for this process alone. Raises UserError where another one is at work in it."""
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    lock_folder(out)


def begin(stages: Stages) -> None:
    """Writes down what a stage is made with before its first step, so that one that was killed is gone on with by the same settings only."""
    stages.file.parent.mkdir(parents=True, exist_ok=True)
    if not stages.file.exists():
        write_atomic(stages.file, (json.dumps(dict(stages.settings), indent=2, sort_keys=True) + "\n").encode())
