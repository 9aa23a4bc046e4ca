"""Clips scored a second: an encoder of ours beside the same checkpoint through transformers' own processor and model, and the reward model beside itself clip by clip.

Everything is measured in turn, repeat after repeat, in one process; the first repeat warms up; ratios are medians over the repeats, above 1 ours is faster. Scores of both
sides are compared: transformers' processor rounds to whole grey levels once along each axis, ours does not, so that cosines of the two are close and not equal.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.config import Count
from align.progress import Progress
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.types import ClipShape
from recipes.bench._results import Bench, Row, check_can_end, columns, here, paired_ratio, spread, timed, write
from recipes.match import SHIPPED
from recipes.quality import SHIPPED as QUALITY
from recipes.shapes.dataset import draw_clips
from reward.encoders import load_encoder
from reward.matcher import load_matcher
from reward.model import RewardModel
from reward.pooled import PooledModel
from reward.quality import load_quality

FPS = 12.0
SIDE, PATCH, WIDTH, LAYERS, HEADS = 64, 16, 128, 4, 4
"""Of the small CLIP that is measured where no checkpoint is given: pixels a side, of a patch, channels, layers and heads of both towers."""
TEXT_TOKENS = 24
SPECIAL = ("<pad>", "<s>", "<unk>")


class Config(Bench):
    encoder: Path | None = None
    """Folder of a CLIP or SigLIP checkpoint; none means a small CLIP with fresh weights, which costs what a trained one costs."""
    clips: Count = 64
    """Clips of one repeat."""
    group_size: Count = 8
    """Clips of one prompt, as RL makes them."""
    frames: Count = 13
    """Frames of a clip of 32x32 pixels."""
    repeats: Count = 9
    """Measured repeats. `quick` takes at most 3."""


class Task(NamedTuple):
    """What is scored."""

    video: Tensor  # [B,T,3,H,W] in [0,1]
    prompts: list[str]  # B


@dataclass
class Way:
    """One way to score all clips."""

    scorer: str
    name: str
    score: Callable[[Task], Tensor]  # [B]
    seconds: list[float] = field(default_factory=list)
    scores: Tensor = field(default_factory=partial(torch.empty, 0))  # [B]


def draw_task(cfg: Config) -> Task:
    drawn = draw_clips("curated", cfg.clips, seed=0, shape=ClipShape(cfg.frames, 32, 32))
    prompts = [drawn.texts[k // cfg.group_size] for k in range(cfg.clips)]
    return Task(torch.stack(drawn.videos).float() / 255, prompts)


# A small CLIP


def save_small_clip(folder: Path, prompts: Sequence[str]) -> Path:
    """A CLIP with fresh weights, a tokenizer that knows the words of `prompts` and a preprocessor's file, as transformers saves them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = [
        *SPECIAL,
        *sorted({word for prompt in prompts for word in prompt.replace(",", " , ").split()}),
        "</s>",
    ]  # the end is the greatest id: it is how the text tower finds it
    end = len(words) - 1  # the greatest id: it is how the text tower finds it
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    text = {**tower, "vocab_size": len(words), "max_position_embeddings": TEXT_TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": end}
    torch.manual_seed(0)
    network = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config={**tower, "image_size": SIDE, "patch_size": PATCH}, projection_dim=WIDTH))
    network.save_pretrained(str(folder))
    frames = {"do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
    levels = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor", **frames, **levels}))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", end)])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    saved.save_pretrained(str(folder))
    return folder


# Ways to score


def encoder_ways(folder: Path) -> list[Way]:
    """Mean cosine of a clip's frames and its prompt: ours, and what a user of transformers writes. Raises UserError for another family."""
    encoder = load_encoder(folder, fps=FPS)
    if encoder.family not in ("clip", "siglip"):
        raise UserError(f"an encoder of the family {encoder.family!r} is not measured, {folder}. Give --encoder FOLDER of a CLIP or SigLIP checkpoint")
    model = PooledModel([encoder], ("overall",))

    def ours(task: Task) -> Tensor:
        return model.features(task.video, task.prompts).cosine[:, 0]

    plain = plain_clip(folder, encoder.sampler.rows)
    return [
        Way("encoder", "ours", ours),
        Way("encoder", "transformers, one clip at a time", lambda task: torch.cat([plain(task.video[k : k + 1], task.prompts[k : k + 1]) for k in range(len(task.prompts))])),
        Way("encoder", "transformers, one batch", lambda task: plain(task.video, task.prompts)),
    ]


def plain_clip(folder: Path, rows: Callable[[int], list[int]]) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """transformers alone: clips [B,T,3,H,W] and B prompts -> mean cosine over the frames that ours sees [B]."""
    import transformers

    network: Any = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, backend="pil")
    text_tokens = network.config.text_config.max_position_embeddings

    def score(video: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = video[:, rows(video.shape[1])]  # [B,F,3,H,W]
        pictures = [*(seen.flatten(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()]  # [H,W,3] each
        pixels = processor(pictures, return_tensors="pt", input_data_format="channels_last")["pixel_values"]  # [B F,3,h,w]
        words = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=text_tokens, return_tensors="pt")
        given = {name: words[name] for name in ("input_ids", *(["attention_mask"] if network.config.model_type == "clip" else []))}
        frames = network.get_image_features(pixel_values=pixels).pooler_output.unflatten(0, seen.shape[:2])  # [B,F,D]
        return torch.cosine_similarity(frames, network.get_text_features(**given).pooler_output[:, None], dim=-1).mean(1)

    return score


def reward_ways() -> list[Way]:
    """The shipped reward model, before anybody has ranked for it."""
    model = RewardModel(load_matcher(SHIPPED["reward"]), load_quality(QUALITY["reward"]), ("overall",), TextEncoder()).eval()

    def score(video: Tensor, prompts: Sequence[str]) -> Tensor:
        return model(video, prompts).mean[:, 0]

    return [
        Way("reward model", "ours", lambda task: score(task.video, task.prompts)),
        Way("reward model", "one clip at a time", lambda task: torch.cat([score(task.video[k : k + 1], task.prompts[k : k + 1]) for k in range(len(task.prompts))])),
    ]


# Measuring


@torch.no_grad()
def measure(ways: Sequence[Way], task: Task, *, repeats: int) -> list[Row]:
    """One row a way; they take turns. A first repeat warms up."""
    with Progress("score", total=(1 + repeats) * len(ways)) as progress:
        for repeat in range(1 + repeats):
            for k in range(len(ways)):
                way = ways[(k + repeat) % len(ways)]  # nobody is always first
                way.scores, seconds = timed(partial(way.score, task))
                if repeat:
                    way.seconds.append(seconds)
                progress.advance(f"{way.scorer}, {way.name}")
    ours = {way.scorer: way for way in ways if way.name == "ours"}
    return [_row(way, ours[way.scorer], task) for way in ways]


def _row(way: Way, ours: Way, task: Task) -> Row:
    seconds, ratio = spread(way.seconds), None if way is ours else paired_ratio(way.seconds, ours.seconds)
    return {
        "scorer": way.scorer,
        "name": way.name,
        "clips": len(task.prompts),
        "clip": "x".join(str(side) for side in (task.video.shape[1], *task.video.shape[3:])),
        "prompts": len(set(task.prompts)),
        **columns("seconds", seconds),
        "clips_per_second": len(task.prompts) / seconds.median,
        "times_slower_than_ours": ratio and ratio.median,
        "times_slower_low": ratio and ratio.low,
        "times_slower_high": ratio and ratio.high,
        "largest_difference": None if way is ours else float((way.scores - ours.scores).abs().max()),
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    small = cfg.model_copy(update={"repeats": min(cfg.repeats, 3)}) if cfg.quick else cfg
    task = draw_task(small)
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        ways = [*encoder_ways(cfg.encoder or save_small_clip(Path(folder) / "clip", task.prompts)), *reward_ways()]
        rows = measure(ways, task, repeats=small.repeats)
    if cfg.write:
        write(cfg, "score", here("score", cfg), "Scoring clips", {"Clips a second": rows})
    return {"rows": rows}
