"""A reward model on frozen encoders: an ensemble of small heads that pool their tokens by attention.

    clip -> encoders -> tokens [B,N,D] each --> one learned question a dimension asks all of them --> linear --+
    clip, prompt -> encoders that read text -> cosine [B,E] -------------------------------------> linear ----+--> M heads -> mean and spread [B,R]

Every head has its own projections and questions and learns from its own bootstrap of the rankings; the spread is their standard
deviation. A cosine is a feature of its own, so alignment is there before anything is learned: heads begin at half the sum of the cosines, in standard deviations.

Letters: B clips, M heads, R dimensions, E encoders that read text, N tokens of an encoder and D their width, H width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.errors import UserError
from reward.encoders import Encoder, load_encoder
from reward.model import card_errors, check_golden, golden_scores, read_card, write_card
from reward.types import Scores, same_rate

TIER = "encoders"


@dataclass(frozen=True)
class Features:
    """What encoders say of B clips and their prompts."""

    tokens: tuple[Tensor, ...]  # of each encoder [B,N,D], in its dtype
    cosine: Tensor  # [B,E] float32, in the order of the encoders that read text

    def __len__(self) -> int:
        return len(self.cosine)

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return Features(tuple(each[rows] for each in self.tokens), self.cosine[rows])


def features_of(encoders: Sequence[Encoder], tokens: Sequence[Tensor], texts: Sequence[Tensor | None]) -> Features:
    """Of each encoder: the tokens of B clips [B,N,D] and what it says of their prompts [B,D], None where it reads no text."""
    cosines = [encoder.cosines(each, text) for encoder, each, text in zip(encoders, tokens, texts, strict=True) if text is not None]
    return Features(tuple(tokens), torch.stack(cosines, dim=-1) if cosines else tokens[0].new_zeros(len(tokens[0]), 0, dtype=torch.float32))


class PooledHeads(nn.Module):
    """M heads, evaluated together. sees [R, encoders]: which encoders' tokens a dimension may look at."""

    sees: Tensor

    def __init__(self, shapes: Sequence[tuple[int, int]], cosines: int, sees: Tensor, *, members: int, width: int) -> None:
        super().__init__()
        self.key, self.value = (nn.ParameterList(torch.randn(members, d, width) / d**0.5 for _, d in shapes) for _ in range(2))
        self.place = nn.ParameterList(0.1 * torch.randn(members, n, width) for n, _ in shapes)
        self.question = nn.Parameter(torch.randn(members, len(sees), width))
        self.weight = nn.Parameter(torch.zeros(members, len(sees), width))
        self.match = nn.Parameter(torch.full((members, len(sees), cosines), 0.5))
        self.register_buffer("sees", sees.repeat_interleave(torch.tensor([n for n, _ in shapes]), dim=1), persistent=False)  # [R, all tokens]

    def forward(self, tokens: Sequence[Tensor], cosine: Tensor) -> Tensor:
        """Standardised tokens of each encoder [B,N,D] and cosines [B,E] -> scores [M,B,R]."""
        key, value = (torch.cat([self._projected(x, w, p) for x, w, p in zip(tokens, weights, self.place, strict=True)], dim=2) for weights in (self.key, self.value))
        logit = torch.einsum("mrh,mbnh->mbrn", self.question, key) / key.shape[-1] ** 0.5
        share = logit.masked_fill(~self.sees[None, None], -torch.inf).softmax(-1)
        pooled = share @ F.gelu(value)  # [M,B,R,H]
        told = torch.einsum("mbrh,mrh->mbr", pooled, self.weight) / key.shape[-1] ** 0.5
        return told + torch.einsum("be,mre->mbr", cosine, self.match)

    def _projected(self, tokens: Tensor, weight: Tensor, place: Tensor) -> Tensor:
        """[B,N,D] -> [M,B,N,H], each place told apart from the others."""
        return torch.einsum("bnd,mdh->mbnh", tokens, weight) + place[:, None]


class PooledModel(nn.Module):
    """Encoders and heads on them: a `Scorer`. The encoders are no part of its weights.

    The score is in calibrated log-odds and `center` and `scale` are constants for a mixture, as in `model.py`. Scores have no gradient into the pixels.
    Raises ValueError where encoders are for different frame rates, and UserError where a dimension has nothing to look at.
    """

    differentiable = False
    temperature: Tensor
    center: Tensor
    scale: Tensor
    cosine_mean: Tensor
    cosine_std: Tensor

    def __init__(self, encoders: Sequence[Encoder], dims: Sequence[str], *, members: int = 5, width: int = 64, motion_dims: Sequence[str] = (), most_clips: int = 4) -> None:
        super().__init__()
        if len({encoder.sampler.fps for encoder in encoders}) != 1:
            raise ValueError(f"encoders for one frame rate are needed, got {[encoder.sampler.fps for encoder in encoders]}")
        self.encoders, self.dims, self.motion_dims = tuple(encoders), tuple(dims), tuple(motion_dims)
        shapes, cosines = [encoder.shape for encoder in encoders], sum(encoder.reads_text for encoder in encoders)
        self.heads = PooledHeads(shapes, cosines, sights(encoders, self.dims, self.motion_dims), members=members, width=width)
        self.log_tie = nn.Parameter(torch.full((len(self.dims), most_clips - 1), -1.0))  # [R, K-1] see ranking.davidson_luce
        self.token_mean, self.token_std = (nn.ParameterList(nn.Parameter(torch.full((d,), value), requires_grad=False) for _, d in shapes) for value in (0.0, 1.0))
        for name, value in (("cosine_mean", 0.0), ("cosine_std", 1.0)):
            self.register_buffer(name, torch.full((cosines,), value))
        for name, value in (("temperature", 1.0), ("center", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((len(self.dims),), value))

    @property
    def fps(self) -> float:
        """Frame rate of the clips it scores."""
        return self.encoders[0].sampler.fps

    @torch.no_grad()
    def forward(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1], one prompt a clip -> scores [B,R]; nan for a clip with pixels that are not finite."""
        if len(video) != len(prompts):
            raise ValueError(f"{len(video)} clips and {len(prompts)} prompts: give one prompt a clip")
        usable = torch.isfinite(video).flatten(1).all(-1)  # [B]
        heads = self.ensemble(self.features(torch.where(usable[:, None, None, None, None], video, 0.5), prompts)) / self.temperature  # [M,B,R]
        unknown = ~usable[:, None]
        return Scores(heads.mean(0).masked_fill(unknown, torch.nan), heads.std(0, correction=0).masked_fill(unknown, torch.nan))

    def features(self, video: Tensor, prompts: Sequence[str]) -> Features:
        """video [B,T,3,H,W], one prompt a clip -> what the encoders say."""
        each = list(dict.fromkeys(prompts))
        rows = torch.tensor([each.index(prompt) for prompt in prompts], device=video.device)  # [B]
        tokens = [encoder.clips(video) for encoder in self.encoders]
        return features_of(self.encoders, tokens, [encoder.texts(each)[rows] if encoder.reads_text else None for encoder in self.encoders])

    def ensemble(self, features: Features) -> Tensor:
        """Every head's uncalibrated score, [M,B,R]."""
        tokens = [self.standardised(x, mean, std) for x, mean, std in zip(features.tokens, self.token_mean, self.token_std, strict=True)]
        out: Tensor = self.heads(tokens, self.standardised(features.cosine, self.cosine_mean, self.cosine_std))
        return out

    @staticmethod
    def standardised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """In deviations of the training clips, cut at three, so that no single number can be driven without end."""
        return ((x.float() - mean) / std).clamp(-3, 3)

    @torch.no_grad()
    def fit_standard(self, features: Features) -> None:
        """Takes mean and deviation of the training clips, of each channel of the tokens and each cosine."""
        for x, mean, std in zip((*features.tokens, features.cosine), (*self.token_mean, self.cosine_mean), (*self.token_std, self.cosine_std), strict=True):
            flat = x.float().flatten(0, -2)  # [B N,D] or [B,E]
            mean.copy_(flat.mean(0))
            std.copy_((flat - mean).square().mean(0).sqrt().clamp(min=1e-4) if len(flat) > 1 else torch.ones_like(std))


def sights(encoders: Sequence[Encoder], dims: Sequence[str], motion_dims: Sequence[str]) -> Tensor:
    """Whose tokens a dimension may look at, [R, encoders] bool: those of motion feed the `motion_dims` alone, where any are named.

    Raises UserError for a motion dimension that is none of the dimensions, and for a dimension that would see nothing.
    """
    unknown = sorted(set(motion_dims) - set(dims))
    if unknown:
        raise UserError(f"no dimension {unknown[0]!r} among {', '.join(dims)}, in the motion dimensions. Name some of these")
    sees = torch.tensor([[not motion_dims or not encoder.motion or dim in motion_dims for encoder in encoders] for dim in dims])
    blind = [dim for dim, row in zip(dims, sees.tolist(), strict=True) if not any(row)]
    if blind:
        raise UserError(f"the dimension {blind[0]!r} may not look at motion, and no encoder tells of anything else. Add CLIP, SigLIP or X-CLIP, or make it a motion dimension")
    return sees


# Files


def save_pooled(folder: Path, model: PooledModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights and card (returned) into `folder`. The card names the encoders, their revisions and what they see; the encoders' files stay where they are."""
    model.eval()
    encoders = [
        {"source": e.source, "family": e.family, "revision": e.revision, "sampler": asdict(e.sampler), "pixels": asdict(e.pixels), "dtype": e.dtype, "motion": e.motion}
        for e in model.encoders
    ]
    size = {"members": len(model.heads.weight), "width": model.heads.weight.shape[-1], "motion_dims": list(model.motion_dims)}
    return write_card(folder, model, model.state_dict(), {"tier": TIER, "encoders": encoders, **size, **facts}, golden_scores(model))


def load_pooled(folder: Path, *, fps: float, moved: Mapping[str, str | Path] | None = None) -> PooledModel:
    """The model in `folder`, ready to score clips of `fps` frames a second. moved: where the files of an encoder are now, by its `source` in the card.

    Raises UserError where the card is for another frame rate, where card, weights or encoders are missing, damaged or not those of the card, and where the
    model does not give the golden scores of its card.
    """
    card, tensors = read_card(folder, TIER)
    with card_errors(folder):
        made = [(str(each["source"]), str(each["revision"]), each["sampler"], each["dtype"]) for each in card["encoders"]]
        trained = float(made[0][2]["fps"])
        if not same_rate(trained, fps):
            raise UserError(f"the reward model is for clips of {trained:g} frames a second, and these have {fps:g}, {folder}. Resample the clips or train it again")
        encoders = [load_encoder((moved or {}).get(source, source), fps=float(sampler["fps"]), frames=int(sampler["frames"]), dtype=dtype) for source, _, sampler, dtype in made]
        for encoder, (source, revision, _, _) in zip(encoders, made, strict=True):
            if encoder.revision != revision:
                raise UserError(f"the encoder {encoder.source} is not the one of the reward model's card ({source}, revision {revision[:12]}), {folder}. Give the same files")
        options = {"members": card["members"], "width": card["width"], "motion_dims": card["motion_dims"], "most_clips": card["most_clips"]}
        model = PooledModel(encoders, card["dims"], **options)
        model.load_state_dict(tensors)
    model.eval().requires_grad_(False)
    check_golden(folder, card, golden_scores(model))
    return model
