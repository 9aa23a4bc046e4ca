"""Fine-tunes a captioner on captioned clips with `trl.SFTTrainer` (`rushes caption-train`): all weights of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, or LoRA on its language model.

The loss is the negative log-likelihood of the caption's tokens and of its end, nothing else. Frames are taken and cut into patches by `base_model/prompts/caption.py`, since
transformers' own video processors need torchvision. Without a model and a folder, a tiny one of random weights learns the built-in world. The result is a folder that transformers,
`rushes caption` and this command read.
Under torchrun processes share the clips of a step (accelerate's DDP); the first one looks at held-out clips and writes.
What it leaves out: any choice of the best step: what the last step left is kept.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Whole, dump, leaves, path_keys, resolved
from align.optimizers import MuonWithAdamW, build_optimizer, warmup_cosine
from align.processes import join, on_main, started
from align.run import derived_seed, lock_folder
from base_model.checkpoint import atomic_write, check_can_write, disk_errors, read_json
from base_model.errors import UserError
from base_model.lora import add_lora, merge
from base_model.prompts.caption import Captioner, Taken, clip_patches, take_frames
from base_model.prompts.vision import LANGUAGE_LINEARS, Precision, Vlm, load_vlm
from recipes import trl_checkpoints
from recipes.caption import CARD, Frames, settings_of
from recipes.caption import Config as Asked
from recipes.clip_folder import find_clips, read_frames
from recipes.shapes import captions as shapes

MODEL = "model"
PREPROCESSOR = "preprocessor_config.json"


class Config(BaseConfig):
    may_change = BaseConfig.may_change | {"steps"}

    out: Path = Path("runs/captioner")
    """Folder of the run; the captioner ends up in `model` there."""
    model: str | None = None
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL to start from; none means a tiny one of random weights, for the built-in world."""
    revision: str = ""
    """Revision of the model on the hub."""
    dtype: Precision = "float32"
    """Precision of the weights. On a GPU what is computed is bfloat16 in any case."""
    data: Path | None = None
    """Folder of captioned clips, as `rushes sft --data` reads it; none draws `clips` of the built-in world."""
    clips: Count = 40_000
    """Clips of the built-in world, where there is no `data`: drawn when they are looked at."""
    held_out: Count = 200
    """Clips that are not learned from, with all their captions; their loss is told before and after."""
    instruction: str | None = None
    """What is asked; none means what the model was taught before, or else a request for everything that can be seen."""
    frames: Frames | None = None
    """Frames that are seen; none means those the model was trained on, or else two a second."""
    lora_rank: Whole = 0
    """Rank of a LoRA adapter on the language model, merged into it in the end; 0 trains every weight."""
    steps: Count = 1_000
    """Optimizer steps."""
    batch: Count = 32
    """Clips a step."""
    together: Count = 32
    """Clips of a step that are worked on at once; gradients of the others are added up."""
    recompute: bool = False
    """Computes activations again in the backward pass: less memory, at most a third more time."""
    lr: Positive = 3e-3
    """Peak learning rate, warmed up, then a cosine."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """`muon` for the matrices of blocks, from random weights; `adamw` for models that know much already, and with LoRA."""
    seed: Seed = 0
    """Seed of weights, order and held-out clips."""
    save_every: Count = 500
    """Steps between checkpoints."""


# What is learned from


@dataclass(frozen=True)
class Pairs:
    """N captions, and what is seen of their clips when it is asked for."""

    texts: Sequence[str]
    take: Callable[[int], Taken]

    def __len__(self) -> int:
        return len(self.texts)

    def some(self, rows: Sequence[int]) -> Pairs:
        """Those of them."""
        return Pairs([self.texts[row] for row in rows], lambda k: self.take(rows[k]))


SPLIT = 2
"""How it is chosen what is held out; one more wherever that changes."""


def split(names: Sequence[str], held_out: int, *, seed: int) -> tuple[list[int], list[int]]:
    """(rows to learn from, rows held out) of the captions of these clips, both ascending: of a clip all its captions or none. The hash of a clip's name decides, so one that was
    learned from is not held out when others come."""
    chosen = set(sorted(set(names), key=lambda name: (derived_seed(seed, f"held out/{name}", 0), name))[:held_out])
    return [row for row, name in enumerate(names) if name not in chosen], [row for row, name in enumerate(names) if name in chosen]


def pairs_of(cfg: Config, frames: Frames, vlm: Vlm) -> tuple[Pairs, Pairs]:
    """What is learned from, and what is held out. Raises UserError where too few clips are captioned."""
    if cfg.data is None:
        drawn = [shapes.Drawn(number, seed=cfg.seed + k, split="train") for k, number in ((0, cfg.clips), (1_000_003, cfg.held_out))]
        learned, held_out = (Pairs(each.texts, lambda row, each=each: take_frames(each.frames(row), frames.sight, vlm.patches)) for each in drawn)  # type: ignore[misc]
        return learned, held_out
    folder = cfg.data
    found, _ = find_clips(folder)
    if (clips := len({clip.name for clip in found})) <= cfg.held_out:
        raise UserError(f"{clips} captioned clips, of which {cfg.held_out} are to be held out, {folder}. Give more clips, or a smaller held_out")
    everything = Pairs([clip.text for clip in found], lambda row: take_frames(read_frames(folder / found[row].name), frames.sight, vlm.patches))
    rows, left_out = split([clip.name for clip in found], cfg.held_out, seed=cfg.seed)
    return everything.some(rows), everything.some(left_out)


@torch.no_grad()
def held_out_loss(captioner: Captioner, pairs: Pairs, batch: int) -> float:
    """Mean over the captions of their negative log-likelihood, nats a token."""
    losses: list[Tensor] = []
    for begin in range(0, len(pairs), batch):
        rows = range(begin, min(begin + batch, len(pairs)))
        losses.append(captioner.losses([clip_patches(pairs.take(row), captioner.vlm.patches) for row in rows], [pairs.texts[row] for row in rows]))
    return float(torch.cat(losses).mean())


# How


def optimizer_of(cfg: Config, network: nn.Module) -> Any:
    """Of what trains. Raises UserError for muon where an adapter alone trains."""
    if cfg.optimizer == "adamw":
        return build_optimizer(network, "adamw", lr=cfg.lr)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trainable.items() if p.dim() == 2 and (".blocks." in name or ".layers." in name)}
    if cfg.lora_rank:
        raise UserError("optimizer muon is for all weights, and lora_rank trains an adapter. Give --optimizer adamw, or --lora-rank 0")
    return MuonWithAdamW(list(matrices.values()), [p for name, p in trainable.items() if name not in matrices], lr=cfg.lr, weight_decay=0.01)


@trl_checkpoints.quiet()
def fit(cfg: Config, captioner: Captioner, pairs: Pairs) -> list[float]:
    """Trains what trains of `captioner.vlm.network`, from the newest checkpoint in `out/checkpoints` where there is one. Returns the loss of every tenth part of the steps, nats a
    token."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which trl imports, and which warns of an optional kernel of 4-bit inference
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    network, patches, folder = captioner.vlm.network, captioner.vlm.patches, cfg.out / "checkpoints"
    optimizer = optimizer_of(cfg, network)

    def collate(rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        chosen = [row["row"] for row in rows]
        return captioner.learned([clip_patches(pairs.take(row), patches) for row in chosen], [pairs.texts[row] for row in chosen])

    own, left = divmod(cfg.batch, started())
    if left:
        raise UserError(f"{started()} processes cannot share the {cfg.batch} clips of a step evenly, batch. Give a multiple, or start other processes")
    together = min(cfg.together, own)
    usual = trl_checkpoints.common_arguments(folder, seed=cfg.seed % 2**32, steps=cfg.steps, save_every=cfg.save_every)
    told = {"activation_checkpointing": cfg.recompute, "logging_steps": max(1, cfg.steps // 10)}
    settings = SFTConfig(
        **{**usual, **told},
        per_device_train_batch_size=together,
        gradient_accumulation_steps=-(-own // together),
        max_grad_norm=1.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    last = on_main(lambda: trl_checkpoints.whole_checkpoint(folder))
    if last is not None:
        restore(cfg, network, last)
    trainer = SFTTrainer(
        network,
        settings,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"row": list(range(len(pairs)))}),
        processing_class=captioner.vlm.tokenizer,
        optimizers=(optimizer, warmup_cosine(optimizer, cfg.steps)),
    )
    with disk_errors(cfg.out):
        history = trl_checkpoints.train(trainer, folder, label="caption-train")
    return [line["loss"] for line in history if "loss" in line]


def restore(cfg: Config, network: Any, checkpoint: Path) -> None:
    """All weights of a checkpoint. transformers 5.23 saves vision-language models under other names than they have in memory, and its own trainer finds none of them again."""
    from transformers import AutoModelForImageTextToText

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)  # it would tell of each
    if not cfg.lora_rank:
        saved = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=network.dtype, use_safetensors=True, trust_remote_code=False)
        network.load_state_dict(saved.state_dict())


# The command


def captioner_to_train(cfg: Config) -> tuple[Captioner, Frames]:
    """The model with what trains of it, what it is asked, and of which frames."""
    if cfg.model is None:
        frames = cfg.frames or Frames.model_validate(vars(shapes.SIGHT))
        vlm, instruction = shapes.tiny_vlm(seed=cfg.seed), cfg.instruction or shapes.INSTRUCTION
    else:
        instruction, frames = settings_of(Asked(model=cfg.model, instruction=cfg.instruction, frames=cfg.frames))
        vlm = load_vlm(cfg.model, revision=cfg.revision, dtype=cfg.dtype, what="captioner")
    vlm.network.to("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.lora_rank:
        vlm.network = add_lora(vlm.network, rank=cfg.lora_rank, alpha=2 * cfg.lora_rank, targets=LANGUAGE_LINEARS, seed=cfg.seed)
    else:
        vlm.network.requires_grad_(True)
    return Captioner(vlm, instruction=instruction), frames


def save(folder: Path, captioner: Captioner, frames: Frames) -> None:
    """The model as transformers saves it, its tokenizer, the constants of its frames, and what it was asked; the whole folder or nothing."""
    from transformers.utils.logging import disable_progress_bar

    partial = folder.with_name(f".{folder.name}.partial")
    disable_progress_bar()
    with disk_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        captioner.vlm.network.save_pretrained(partial)
        captioner.vlm.tokenizer.save_pretrained(partial)
        form = captioner.vlm.patches
        sizes = {"patch_size": form.patch, "temporal_patch_size": form.frames, "merge_size": form.merge}
        atomic_write(partial / PREPROCESSOR, (json.dumps({"image_mean": form.mean, "image_std": form.std, **sizes}, indent=2) + "\n").encode())
        atomic_write(partial / CARD, (json.dumps({"instruction": captioner.instruction, "frames": dump(frames)}, indent=2, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def claim(cfg: Config, resume: bool) -> None:
    """Writes `run.json`. Raises UserError where the folder holds a run and `resume` is off, and where it was begun with another configuration."""
    check_can_write(cfg.out)
    with disk_errors(cfg.out):
        cfg.out.mkdir(parents=True, exist_ok=True)
    lock_folder(cfg.out)
    file = cfg.out / "run.json"
    if file.exists():
        told = read_json(file, "the description of the run")
        before, before_split = leaves(told.get("config")), told.get("split")
        now, free = leaves(dump(cfg)), path_keys(Config)
        differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key) and key not in free and key.rpartition(".")[2] not in cfg.may_change)
        if not resume:
            raise UserError(f"{cfg.out} already holds a run. Go on with --resume, or choose another --out")
        if cfg.data is not None and before_split != SPLIT:
            raise UserError(f"{cfg.out} held out other clips, as an earlier version chose them. Begin again in another --out")
        if differ:
            raise UserError(f"{cfg.out} was begun with another {', '.join(differ)}. Go on with what it was begun with, or begin again in another --out")
    atomic_write(file, (json.dumps({"seed": cfg.seed, "split": SPLIT, **resolved(cfg)}, indent=2) + "\n").encode())


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    begun = time.monotonic()
    join()
    on_main(partial(claim, cfg, resume))
    captioner, frames = captioner_to_train(cfg)
    pairs, held_out = pairs_of(cfg, frames, captioner.vlm)
    before = on_main(partial(held_out_loss, captioner, held_out, cfg.together))
    curve = fit(cfg, captioner, pairs)
    captioner.vlm.network.eval()
    if cfg.lora_rank:
        captioner.vlm.network = merge(captioner.vlm.network)

    def saved() -> dict[str, Any]:
        after = held_out_loss(captioner, held_out, cfg.together)
        save(cfg.out / MODEL, captioner, frames)
        found = {"held_out_loss": after, "held_out_loss_before": before, "loss": curve, "clips": len(pairs), "wall_seconds": round(time.monotonic() - begun, 1)}
        atomic_write(cfg.out / "captioner.json", (json.dumps({**resolved(cfg), "measured": found}, indent=2) + "\n").encode())
        return found

    return {"model": str(cfg.out / MODEL), **on_main(saved)}
