"""How well a clip and a text belong together: the pre-trained part of every reward model.

A prompt asks S times (slots; one for each thing it may name). Each question is a gate over places, so the text decides where to look before anything is summed up:

    prompt -> slots -> gate query, shape query, motion query
    clip -> pixel features -> gate (where is it?) -> how the gate moves and grows over time   -> motion . query  -+
                                                  -> deep features under the gate             -> shape . query   -+-> logit
                                                  -> how surely and how much of it is there                      -+

Lengths are in halves of the frame's shorter side and frames are counted as they come, so any clip size goes in.
Letters: B clips, C texts held against each, M texts in all, S slots, Q = B C S questions, T frames, E width of an answer, L D text tokens/width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError


@dataclass(frozen=True)
class MatcherSize:
    """Widths of the matcher."""

    slots: int = 2
    pixels: int = 24
    deep: int = 48
    time: int = 48
    answer: int = 48
    text: int = 96
    text_width: int = 384
    words: int = 256
    shape_frames: int = 3

PARTS = ("match_shape", "match_motion", "match_presence")
"""What a match is the sum of, in the order of `Matcher.parts`."""


class Answers(NamedTuple):
    """What was found for Q questions."""

    shape: Tensor  # [Q,E]
    motion: Tensor  # [Q,E]
    presence: Tensor  # [Q]


class Slots(nn.Module):
    """Token states of a prompt -> S summaries, each by its own learned question (attention pooling)."""

    def __init__(self, size: MatcherSize, out: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(size.text_width, size.text), nn.Linear(size.text_width, size.text)
        self.question = nn.Parameter(0.3 * torch.randn(size.slots, size.text))
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(size.text, out))

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """text [M,L,D], mask [M,L] bool -> [M,S,out]."""
        score = self.question @ self.key(text).transpose(1, 2) / self.question.shape[1] ** 0.5  # [M,S,L]
        weight = score.masked_fill(~mask[:, None], -1e9).softmax(-1)
        asked: Tensor = self.out(weight @ self.value(text))
        return asked


class Matcher(nn.Module):
    """See the module's text."""

    def __init__(self, size: MatcherSize | None = None) -> None:
        super().__init__()
        self.size = z = size or MatcherSize()
        self.gate_query, self.shape_query, self.motion_query = Slots(z, z.pixels + 1), Slots(z, z.answer), Slots(z, z.answer)
        self.pixels = nn.Sequential(
            nn.Conv2d(3, z.pixels // 2, 3, padding=1), nn.SiLU(), nn.Conv2d(z.pixels // 2, z.pixels, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(z.pixels, z.pixels, 1), nn.SiLU()
        )
        first, second, third = (nn.Conv2d(a, z.deep, 3, padding=1) for a in (z.pixels, z.deep, z.deep))
        self.deep = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third, nn.SiLU())
        self.shape = nn.Sequential(nn.Linear(2 * z.deep, 64), nn.SiLU(), nn.Linear(64, z.answer))
        self.track = nn.ModuleList(nn.Conv1d(a, z.time, 3, padding=d, dilation=d, padding_mode="replicate") for a, d in ((12, 1), (z.time, 1), (z.time, 2), (z.time, 4)))
        self.motion = nn.Sequential(nn.Linear(2 * z.time, 64), nn.SiLU(), nn.Linear(64, z.answer))
        self.presence = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
        self.words = nn.Sequential(nn.SiLU(), nn.Linear(2 * z.answer, z.words))

    def forward(self, video: Tensor, text: Tensor, mask: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
        """Clips [B,T,3,H,W], texts [M,L,D] with mask [M,L], which C texts to hold against each clip [B,C] -> logits [B,C] and word logits [B,W].

        The word logits say what the first text's questions saw, in words: an auxiliary task that gives shapes and motions a gradient from the start.
        """
        answers, shape, motion = self._ask(self.see(video), text, mask, caption)
        saw = torch.cat([answers.shape, answers.motion], dim=1).unflatten(0, (*caption.shape, -1))[:, 0]  # [B,S,2E]
        return self._parts(answers, shape, motion).sum(1).unflatten(0, tuple(caption.shape)), self.words(saw.mean(1))

    def parts(self, video: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """One text a clip -> the parts of its logit, in the order of `PARTS`, [B,3]; their sum is the logit."""
        return self.parts_of(self.see(video), text, mask)

    def see(self, video: Tensor) -> Tensor:
        """Clips [B,T,3,H,W] -> pixel features [B,T,c,h,w], all that is known of them."""
        seen: Tensor = self.pixels((2 * video - 1).flatten(0, 1).contiguous(memory_format=torch.channels_last))  # [B T,c,h,w]
        return seen.unflatten(0, tuple(video.shape[:2]))

    def parts_of(self, seen: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The parts [B,3] of pixel features."""
        answers, shape, motion = self._ask(seen, text, mask, torch.arange(len(seen), device=seen.device)[:, None])
        return self._parts(answers, shape, motion)

    def _ask(self, seen: Tensor, text: Tensor, mask: Tensor, caption: Tensor) -> tuple[Answers, Tensor, Tensor]:
        """seen [B,T,c,h,w] -> the answers, and the shape and motion queries [Q,E] they are compared with."""
        query = self.gate_query(text, mask)[caption].flatten(1, 2)  # [B,C S,c+1]
        logit = torch.einsum("btchw,bqc->bqthw", seen, query[..., :-1]) + query[..., -1, None, None, None]  # [B,C S,T,h,w]
        logit = logit.flatten(0, 1)  # [Q,T,h,w]
        gate = logit.sigmoid()
        answers = Answers(self._shape(seen.flatten(0, 1), gate), self._motion(gate), self._presence(logit, gate))
        return answers, self.shape_query(text, mask)[caption].flatten(0, 2), self.motion_query(text, mask)[caption].flatten(0, 2)

    def _parts(self, answers: Answers, shape: Tensor, motion: Tensor) -> Tensor:
        """[Q,..] -> [B C,3]: agreement in shape and in motion, and presence, summed over the slots."""
        each = torch.stack([(answers.shape * shape).sum(1) / 4, (answers.motion * motion).sum(1) / 4, answers.presence], dim=1)  # [Q,3]
        return each.unflatten(0, (-1, self.size.slots)).sum(1)

    def _presence(self, logit: Tensor, gate: Tensor) -> Tensor:
        """[Q,T,h,w] -> [Q]: how strong the strongest places are, and how many."""
        strongest = logit.flatten(2).topk(8, dim=2).values.mean(2)  # [Q,T]
        told = torch.stack([strongest.mean(1), strongest.amin(1), strongest.amax(1), 10 * gate.mean((1, 2, 3))], dim=1)  # [Q,4]
        return self.presence(told)[:, 0] + 0.3 * strongest.mean(1)

    def _motion(self, gate: Tensor) -> Tensor:
        """[Q,T,h,w] -> [Q,E]: size, centre and spread of the gate, and their distance from the clip's mean, through convolutions over time."""
        h, w = gate.shape[2:]
        half = min(h, w) / 2
        y, x = ((torch.arange(n, device=gate.device) + 0.5 - n / 2) / half for n in (h, w))  # [h], [w]
        mass = gate.sum((2, 3)) + 1e-3  # [Q,T]
        columns, rows = gate.sum(2), gate.sum(3)  # [Q,T,w], [Q,T,h]
        cx, cy = columns @ x / mass, rows @ y / mass  # [Q,T]
        sx, sy = ((part @ axis.square() / mass - centre.square()).clamp_min(1e-6).sqrt() for part, axis, centre in ((columns, x, cx), (rows, y, cy)))
        frames = torch.stack([mass.sqrt() / half, cx, cy, sx, sy, sx * sy], dim=2)  # [Q,T,6]
        z = torch.cat([frames, 4 * (frames - frames.mean(1, keepdim=True))], dim=2).transpose(1, 2)  # [Q,12,T]
        for i, step in enumerate(self.track):
            z = F.silu(step(z)) + (z if i else 0)  # [Q,time,T]
        told: Tensor = self.motion(torch.cat([z.mean(2), z.amax(2)], dim=1))
        return told

    def _shape(self, seen: Tensor, gate: Tensor) -> Tensor:
        """seen [B T,c,h,w], gate [Q,T,h,w] -> [Q,E]: deep features of a few frames, pooled under the gate."""
        t = gate.shape[1]
        frames = torch.linspace(0, t - 1, min(t, self.size.shape_frames), device=gate.device).round().long()  # [P]
        x = self.deep(seen.unflatten(0, (-1, t))[:, frames].flatten(0, 1)).flatten(2).unflatten(0, (-1, len(frames))).transpose(2, 3)  # [B,P,h w,deep]
        under = gate[:, frames].flatten(2)  # [Q,P,h w]
        mass = under.sum(2, keepdim=True) + 1e-3  # [Q,P,1]
        weight = (under / mass).unflatten(0, (len(x), -1)).transpose(1, 2)  # [B,P,C S,h w]
        mean = (weight @ x).transpose(1, 2).flatten(0, 1)  # [Q,P,deep]
        square = (weight @ x.square()).transpose(1, 2).flatten(0, 1)  # [Q,P,deep]
        share = mass / mass.sum(1, keepdim=True)  # [Q,P,1]
        told: Tensor = self.shape((torch.cat([mean, (square - mean.square()).clamp_min(1e-6).sqrt()], dim=2) * share).sum(1))
        return told


def save_matcher(path: Path, matcher: Matcher) -> None:
    """Writes the weights, with the widths in the metadata."""
    save_weights(path, matcher.state_dict(), {"size": json.dumps(asdict(matcher.size))})


def load_matcher(path: Path) -> Matcher:
    """Raises UserError where `path` holds anything else than a matcher."""
    tensors, metadata = load_weights(path)
    try:
        matcher = Matcher(MatcherSize(**json.loads(metadata["size"])))
        matcher.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"not a video-text matcher, {path}. Give a file written by `rushes match`") from error
    return matcher.eval()
