"""How a Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers is given a clip: frames cut into patches, and the special tokens that stand for them in a text.

transformers' own video processors need torchvision, which this project does without; here everything is torch, and the gradient passes through.

Letters: F sampled frames, P frames a temporal patch, p pixels a side of a patch, m patches a side of a merged token, N patches of a clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.checkpoint import check_runs_no_code, fingerprint, read_json
from base_model.errors import UserError

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LANGUAGE_LINEARS = r"(.*\.)?language_model\..*_proj"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Qwen2-VL, Qwen2.5-VL
HALF = (0.5, 0.5, 0.5)  # Qwen3-VL, mean and standard deviation
PREPROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
LONGEST_SIDE_RATIO = 200
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Precision = Literal["float32", "bfloat16"]

PROMPT = "{prompt}"
VIDEO = "<|video_pad|>"
VIDEO_BEGIN, VIDEO_END = "<|vision_start|>", "<|vision_end|>"
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"  # as Qwen2-VL's chat template begins
SPECIAL = re.compile(r"(<\|\w+\|>)")


@dataclass(frozen=True)
class PatchFormat:
    """How a vision tower wants its patches: from the model's configuration, the constants of normalisation from its preprocessor's."""

    patch: int  # p
    frames: int  # P
    merge: int  # m
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        """Heights and widths are multiples of it."""
        return self.patch * self.merge


class Patches(NamedTuple):
    """A clip as the vision tower takes it."""

    values: Tensor  # [N, 3 P p p]
    grid: tuple[int, int, int]  # N = its product: temporal patches, rows, columns
    times: tuple[float, ...]  # seconds into the clip, one a temporal patch: the mean of its first and last frame
    seconds: float  # between the starts of two temporal patches


def fitted_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `factor`, the pixels within the limits, the aspect as near as that allows (Qwen2-VL, `smart_resize`)."""
    if max(height, width) > LONGEST_SIDE_RATIO * min(height, width):
        raise UserError(f"a frame of {height}x{width} is too long and thin for a vision-language model. Give frames of at most {LONGEST_SIDE_RATIO} : 1")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def spread_frames(num_frames: int, wanted: float, least: int, most: int, multiple: int) -> list[int]:
    """About `wanted` of a clip's frames, at least `least` and at most `most` where there are so many: evenly spaced from the first to the last, their number a multiple of P.

    VideoReward's rule (VideoAlign, `smart_nframes`, sample type "uniform"). A clip of fewer frames than P repeats its last one.
    """
    if num_frames < multiple:
        return [*range(num_frames), *[num_frames - 1] * (multiple - num_frames)]
    count = min(max(round(wanted / multiple), -(-least // multiple)), max(1, min(num_frames, most) // multiple)) * multiple
    return [int(i) for i in torch.linspace(0, num_frames - 1, count).round()]


def resize_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """[F,3,H,W] in [0,1] -> [F,3,h,w], bicubic with antialiasing, as the processors do but for their rounding to 8 bits."""
    if tuple(frames.shape[-2:]) == size:
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def normalise(frames: Tensor, form: PatchFormat) -> Tensor:
    """[F,3,H,W] in [0,1], less the mean and over the deviation of each channel."""
    mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (form.mean, form.std))
    return (frames - mean) / std


def patchify(video: Tensor, form: PatchFormat) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised frames [F,3,H,W] -> patches [N, 3 P p p] and their grid, in the order of transformers' processors: the m x m patches of a token together.

    F must be a multiple of P, H and W of p m.
    """
    p, m = form.patch, form.merge
    f, c, h, w = video.shape
    grid = (f // form.frames, h // p, w // p)
    x = video.reshape(grid[0], form.frames, c, grid[1] // m, m, p, grid[2] // m, m, p)  # [t,P,c,h/m,m,p,w/m,m,p]
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid  # [t h w, c P p p]


def times_of_patches(times: Sequence[float], frames: int) -> tuple[float, ...]:
    """Seconds of F frames -> of their temporal patches, each the mean of its first and last of `frames` frames: what Qwen3-VL writes before it."""
    return tuple((first + last) / 2 for first, last in zip(times[::frames], times[frames - 1 :: frames], strict=True))


# Texts


def video_text(clip: Patches, merge: int, *, timestamps: bool) -> str:
    """The special tokens that stand for a clip, as many as the vision tower makes of it.

    timestamps: every temporal patch stands alone behind its time, as Qwen3-VL was trained, instead of all in one block.
    """
    t, h, w = clip.grid
    frame = VIDEO * (h * w // merge**2)
    blocks = [(f"<{time:.1f} seconds>", frame) for time in clip.times] if timestamps else [("", frame * t)]
    return "".join(f"{time}{VIDEO_BEGIN}{pads}{VIDEO_END}" for time, pads in blocks)


def encode(tokenizer: Any, text: str, prompt: str) -> list[int]:
    """Token ids of `text` with the prompt in its place. Whatever the prompt says, it stays text: special tokens are read in `text` alone."""
    ids: list[int] = []
    for piece in filter(None, SPECIAL.split(text)):
        if SPECIAL.fullmatch(piece):
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += tokenizer(piece.replace(PROMPT, prompt), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


# Models


@dataclass
class Vlm:
    """A vision-language model with its language head, its tokenizer, and what identifies both."""

    network: Any  # transformers' Qwen2VLForConditionalGeneration, Qwen2_5_VL... or Qwen3VL...
    tokenizer: Any
    patches: PatchFormat
    name: str  # a folder or a hub id
    revision: str  # of the hub, "" for a folder
    dtype: Precision

    @property
    def family(self) -> str:
        return str(self.network.config.model_type)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they were loaded, the language head's included."""
        return fingerprint(self.network)


def load_vlm(name: str | Path, *, revision: str = "", dtype: Precision = "float32", what: str = "base", head: bool = True) -> Vlm:
    """The model in a folder or under a hub id (downloaded only where HF_HUB_OFFLINE is 0), frozen.

    what: how errors call it. head: whether its language head is needed. Raises UserError where it cannot be had or is of another family than Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pin = revision or None
    try:
        if Path(name).is_dir():
            check_runs_no_code(Path(name))
        family = AutoConfig.from_pretrained(name, revision=pin, trust_remote_code=False).model_type
        if family not in FAMILIES:
            raise UserError(f"the {what} {name} is of the family {family}; known here are {', '.join(FAMILIES)}. Choose another {what}")
        tokenizer = AutoTokenizer.from_pretrained(name, revision=pin, trust_remote_code=False)
        network, found = AutoModelForImageTextToText.from_pretrained(
            name, revision=pin, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"cannot load the {what} {name}: {reason}. Give a folder with the model and its tokenizer, or a hub id with HF_HUB_OFFLINE=0") from error
    missing = sorted(set(found["missing_keys"]) - (set() if head else {"lm_head.weight"}))
    if missing:
        raise UserError(f"the weights in {name} lack {missing[0]}. Download the {what} again")
    if tokenizer.convert_tokens_to_ids(VIDEO) != network.config.video_token_id:
        raise UserError(f"the tokenizer of {name} does not know the video token of its model, {VIDEO}. Give the model's own tokenizer")
    network.eval().requires_grad_(False)
    commit = getattr(network.config, "_commit_hash", None) or revision
    return Vlm(network, tokenizer, patch_format(name, pin, network.config), str(name), commit, dtype)


def patch_format(name: str | Path, revision: str | None, config: Any) -> PatchFormat:
    """The sizes of a vision tower's patches, and the constants its frames are normalised by: the preprocessor's, or else the family's. Raises UserError where that is damaged."""
    from transformers.utils import cached_file

    mean, std = constants_of(config)
    for file in PREPROCESSORS:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
        found = read_json(Path(path), "the preprocessor's settings") if path else {}
        if "image_mean" in found:
            mean, std = tuple(found["image_mean"]), tuple(found["image_std"])
            break
    vision = config.vision_config
    return PatchFormat(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size, mean, std)


def constants_of(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which a family's frames are normalised."""
    return (HALF, HALF) if config.model_type == "qwen3_vl" else (CLIP_MEAN, CLIP_STD)
