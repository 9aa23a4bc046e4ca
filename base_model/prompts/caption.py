"""Captions of clips by a vision-language model: Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers (`recipes/caption.py` is the command, `recipes/caption_train.py` trains one).

    frames as they are decoded -> take_frames -> uint8 [F,3,h,w] -> clip_patches -> Patches -+
    instruction ----------------------------------------------------------------------------+-> Captioner -> Caption

What a model says is bounded in tokens; what was cut off there ends with its last whole sentence. Openings that say nothing ("The video shows") are taken away, all else stays.

Letters: F sampled frames, P frames a temporal patch, B clips, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.errors import UserError
from base_model.prompts.vision import (
    OPENING,
    PROMPT,
    Patches,
    PatchFormat,
    Vlm,
    encode,
    fitted_size,
    normalise,
    patchify,
    resize_frames,
    spread_frames,
    times_of_patches,
    video_text,
)
from base_model.video.files import Frame

INSTRUCTION = (
    "Describe this video in one paragraph of plain sentences: what is in it and what it looks like, what moves and how, where it is, the light, the style, "
    "and how the camera moves. Say only what can be seen."
)
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
ENDS = (END, "<|endoftext|>")
IGNORED = -100
"""A label that no loss is taken of, as transformers has it."""
SPARE = 8
"""Frames that are kept of a long clip while it is decoded, for each that is seen in the end."""

_CLIP = r"(?:the|this) (?:short |brief )?(?:video|clip|footage|scene|animation|sequence|image|picture)(?: clip| sequence| footage)?"
_SHOWS = r"(?:shows|depicts|features|captures|presents|displays|portrays|begins with|opens with|starts with)"
BOILERPLATE = (
    r"(?:sure|certainly|of course|okay)[,.!:]\s+",  # Sure! A dog runs.
    r"here(?:'s| is) (?:a|an|the)(?: \w+){0,3} (?:description|caption)(?: (?:of|for) (?:the|this) (?:video|clip|scene|image))?[:.]\s+",  # Here is a caption: A dog runs.
    r"(?:caption|description):\s+",  # Caption: A dog runs.
    rf"{_CLIP} {_SHOWS} (?!(?:that|how|us)\b)",  # The video shows a dog that runs.
    rf"(?:in|throughout|across) {_CLIP}, (?:we (?:can )?see (?!(?:that|how)\b)|there (?:is|are) )?",  # In this video, we see a dog that runs.
)
"""What is taken away at the beginning of a caption, again and again, in small or capital letters; nowhere else."""
_OPENINGS = tuple(re.compile(pattern, re.IGNORECASE) for pattern in BOILERPLATE)
_SENTENCE = re.compile(r"[.!?…][\"'”’)\]]*(?=\s|$)|[。！？]")


# What is seen of a clip


@dataclass(frozen=True)
class Sight:
    """Which frames of a clip are seen, and how large. Of a clip that is too long for its rate fewer frames a second are seen."""

    fps: float = 2.0  # frames seen a second
    min_frames: int = 4  # of a short clip, closer together then
    max_frames: int = 32
    min_pixels: int = 128 * 28 * 28  # of a frame; smaller ones grow
    max_pixels: int = 448 * 448

    def __post_init__(self) -> None:
        if not (self.fps > 0 and 1 <= self.min_frames <= self.max_frames and 1 <= self.min_pixels <= self.max_pixels):
            raise UserError(f"frames that cannot be: {self}. Give a rate above 0, and least values that are not above the largest")


class Taken(NamedTuple):
    """The frames of a clip that are seen."""

    frames: Tensor  # uint8 [F,3,h,w]; F is a multiple of P
    times: tuple[float, ...]  # seconds into the clip, F
    seconds: float  # between the starts of two temporal patches


def take_frames(frames: Iterable[tuple[Frame, float]], sight: Sight, form: PatchFormat) -> Taken:
    """What is seen of a clip that comes frame by frame with its rate (0 of an image): evenly spaced frames, already of the size that is looked at.

    What is held does not grow with the clip: where it would be more than `SPARE` times the largest number, every second one is let go, and those nearest to the right places are
    taken in the end.
    Raises UserError for frames too long and thin, a clip without frames, and what the frames themselves raise.
    """
    held: list[tuple[int, Tensor]] = []
    stride, count, rate = 1, 0, 0.0
    for frame, fps in frames:
        rate = fps
        if count % stride == 0:
            held.append((count, _seen(frame, sight, form)))
        if len(held) > SPARE * max(sight.max_frames, form.frames):
            held, stride = held[::2], 2 * stride
        count += 1
    if not held:
        raise UserError("a clip without a frame. Give a clip that shows something")
    wanted = count / rate * sight.fps if rate else 1
    places = [_nearest(place, stride, len(held)) for place in spread_frames(count, wanted, sight.min_frames, sight.max_frames, form.frames)]
    times = tuple(held[place][0] / rate if rate else 0.0 for place in places)
    seconds = form.frames * (times[-1] - times[0]) / max(len(times) - 1, 1) or form.frames / (rate or sight.fps)
    return Taken(torch.stack([held[place][1] for place in places]), times, seconds)


def _nearest(frame: int, stride: int, held: int) -> int:
    return min(round(frame / stride), held - 1)


def _seen(frame: Frame, sight: Sight, form: PatchFormat) -> Tensor:
    """[H,W,3] -> uint8 [3,h,w]."""
    size = fitted_size(frame.shape[0], frame.shape[1], form.side, sight.min_pixels, sight.max_pixels)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)  # [3,H,W]
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    return resize_frames(pixels[None].float() / 255, size)[0].mul_(255).round_().to(torch.uint8)


def clip_patches(taken: Taken, form: PatchFormat) -> Patches:
    """What the vision tower takes: `pixel_values_videos` and the row of `video_grid_thw`."""
    values, grid = patchify(normalise(taken.frames.float() / 255, form), form)
    return Patches(values, grid, times_of_patches(taken.times, form.frames), taken.seconds)


# What is said of it


class Caption(NamedTuple):
    """What a model said of a clip."""

    text: str  # "" where it said nothing, or no whole sentence within its tokens
    whole: bool  # it came to an end by itself


class Captioner:
    """A vision-language model that is asked one thing of every clip. Greedy: the same caption for the same clip, up to rounding beside others in a batch."""

    def __init__(self, vlm: Vlm, *, instruction: str = INSTRUCTION, max_tokens: int = 256) -> None:
        self.vlm, self.instruction, self.max_tokens = vlm, instruction, max_tokens
        known = vlm.tokenizer.get_vocab()
        self.ends = [known[mark] for mark in ENDS if mark in known]
        if END not in known:
            raise UserError(f"the tokenizer of {vlm.name} does not know the end of an answer, {END}. Give the model's own tokenizer")

    @torch.no_grad()
    def __call__(self, clips: Sequence[Patches]) -> list[Caption]:
        """Captions of B clips of any sizes, in one batch."""
        from transformers import GenerationConfig

        # what is not said here, a penalty of repetition, is the checkpoint's
        greedy = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50, eos_token_id=self.ends, pad_token_id=self._padding
        )
        inputs = self.inputs(clips, [[]] * len(clips), side="left")
        del inputs["labels"]
        said = self.vlm.network.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]  # [B,l]
        return [self._caption(row) for row in said.tolist()]

    def losses(self, clips: Sequence[Patches], captions: Sequence[str]) -> Tensor:
        """Negative log-likelihood of each caption and its end, nats a token, [B]."""
        inputs = self.learned(clips, captions)
        labels = inputs.pop("labels")[:, 1:]  # [B,L-1]
        logits = self.vlm.network(**inputs, use_cache=False).logits[:, :-1].float()  # [B,L-1,V]
        nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # [B,L-1]
        return nll.sum(1) / (labels != IGNORED).sum(1)

    def learned(self, clips: Sequence[Patches], captions: Sequence[str]) -> dict[str, Tensor]:
        """What transformers' model takes to learn B captions, padded on the right; `labels` are the captions' tokens and their end, and `IGNORED` elsewhere."""
        return self.inputs(clips, [[*self._plain(caption), self.ends[0]] for caption in captions], side="right")

    def inputs(self, clips: Sequence[Patches], answers: Sequence[Sequence[int]], *, side: str) -> dict[str, Tensor]:
        """Token ids [B,L] of instruction and answer, what goes with them, and labels [B,L] of the answers alone. side: where shorter rows are padded."""
        network, device = self.vlm.network, self.vlm.network.device
        asked = [self.asked(clip) for clip in clips]
        rows = [torch.tensor([*question, *answer]) for question, answer in zip(asked, answers, strict=True)]
        labels = [torch.tensor([*[IGNORED] * len(question), *answer]) for question, answer in zip(asked, answers, strict=True)]
        ids, labelled = (nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=value, padding_side=side) for some, value in ((rows, self._padding), (labels, IGNORED)))
        there = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)  # [B,L]
        inputs = {
            "input_ids": ids,
            "attention_mask": there,
            "mm_token_type_ids": 2 * (ids == network.config.video_token_id).int(),  # 2 is transformers' number for video
            "pixel_values_videos": torch.cat([clip.values for clip in clips]),
            "video_grid_thw": torch.tensor([clip.grid for clip in clips]),
            "labels": labelled,
        }
        if self.vlm.family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([clip.seconds for clip in clips])
        return {name: value.to(device) for name, value in inputs.items()}

    def asked(self, clip: Patches) -> list[int]:
        """Token ids up to where the answer begins: the clip, then the instruction, as the family's chat template writes them. Whatever the instruction says, it stays text."""
        timestamps = self.vlm.family == "qwen3_vl"
        opening = "<|im_start|>user\n" if timestamps else OPENING
        return encode(self.vlm.tokenizer, opening + video_text(clip, self.vlm.patches.merge, timestamps=timestamps) + PROMPT + CLOSING, self.instruction)

    @property
    def _padding(self) -> int:
        known = self.vlm.tokenizer.pad_token_id
        return self.ends[-1] if known is None else int(known)

    def _plain(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are not read."""
        ids: list[int] = self.vlm.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _caption(self, ids: Sequence[int]) -> Caption:
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        text = self.vlm.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        return Caption(without_boilerplate(text if end is not None else whole_sentences(text)), end is not None)


def whole_sentences(text: str) -> str:
    """Up to the last end of a sentence, "" where there is none. Example: "A dog runs. It is br" -> "A dog runs."."""
    ends = [found.end() for found in _SENTENCE.finditer(text)]
    return text[: ends[-1]] if ends else ""


def without_boilerplate(text: str) -> str:
    """A caption without the openings of `BOILERPLATE`; what then begins it gets its capital letter. Example: "In this video, we see a dog that runs." -> "A dog that runs."."""
    rest = text
    while found := next((match for pattern in _OPENINGS if (match := pattern.match(rest)) and match.end() < len(rest)), None):
        rest = rest[found.end() :].lstrip()
    return text if rest == text else rest[:1].upper() + rest[1:]
