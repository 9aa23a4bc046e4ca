"""A latent reward: scores clips that are still latents, at any noise level, from the hidden states of the denoiser that makes them. Nothing is decoded.

    x_t, t, prompt -> denoiser, frozen, adapter off -> hidden states of a few blocks [N,w] each --+
    prompt -> token states [M,D], t ---------------------------------------------------------------+-> narrow blocks -> mean over a clip's tokens --+
    x_t, t, prompt -> sight (`sight.py`), of the small reward model alone: its 26 inputs [B,A] ------------------------------------------------------+-> mean, spread

It learns what a reward on pixels says of the finished clip (`recipes/latent_reward.py`), so it has that reward's units, constants of normalisation and tastes. At a noise
level where much of the clip is still open the best answer is the expectation, E[r | x_t, prompt]: there it differs less from clip to clip, and its spread is wide.
That denoisers are good readers of noised latents is shown for images by LPO (Zhang et al. 2025, arXiv 2502.01051), and for video, by frozen first blocks as
here, by PRFL (Mi et al. 2025, arXiv 2511.21541). Both learn from preferences, not from a reward on pixels.

Letters: B clips, N tokens of all clips together, M text tokens, D their width, w width of the denoiser, A inputs, R dimensions, Q noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import fingerprint
from base_model.errors import UserError
from base_model.lora import reference
from base_model.networks.attention import rotary_table
from base_model.networks.dit import Block, DiTConfig, Told
from base_model.networks.layers import time_features
from base_model.networks.packing import Segments
from base_model.paths import add_noise
from base_model.tiny import LatentVideoModel, packed, packed_text
from base_model.types import Conditioning
from reward.matcher import Matcher, MatcherSize
from reward.mixture import Mixed, Term, mix
from reward.model import INPUTS, card_errors, check_golden, golden_clips, read_card, write_card
from reward.sight import Sight
from reward.types import Scores

TIER = "latent"


@dataclass(frozen=True)
class LatentSize:
    """What the head reads and how large it is."""

    after: tuple[int, ...] = (3,)
    """The hidden states after so many of the denoiser's blocks, ascending; those behind the last are not computed."""
    width: int = 64
    depth: int = 1
    heads: int = 4
    sight: int = 2
    """Blocks of the codec's decoder that the sight begins with, where there is one."""


class Seen(NamedTuple):
    """What the head is told of B clips, by parts that do not learn with it."""

    hidden: Tensor  # (N,h) of the denoiser
    inputs: Tensor  # [B,A] of the reward model, told by the sight; A is 0 where there is none


class LatentHead(nn.Module):
    """Hidden states of packed clips -> one vector a clip, by blocks of its own that are told noise level and text as the denoiser's are."""

    def __init__(self, size: LatentSize, hidden_width: int, text_width: int) -> None:
        super().__init__()
        w = size.width
        self.config = DiTConfig(width=w, depth=size.depth, heads=size.heads, rotary_axes=rotary_axes(w // size.heads))
        self.hidden_in = nn.Sequential(nn.LayerNorm(hidden_width), nn.Linear(hidden_width, w))
        self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, w))
        self.text_pooled = nn.Linear(w, w)
        self.time_in = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(size.depth))
        self.out = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 2 * w), nn.GELU())

    def forward(self, hidden: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments) -> Tensor:
        """hidden (N,h), positions (N,3), segments of B clips, t [B], text (M,D) and its segments -> [B,2w]."""
        text = self.text_in(text)  # [M,w]
        told = Told(self.time_in(time_features(t, self.config.width)) + self.text_pooled(text_segments.mean(text)))  # [B,w]
        table = rotary_table(positions, self.config.rotary_axes)
        x = self.hidden_in(hidden)  # [N,w]
        for block in self.blocks:
            x = block(x, told, text, table, segments, text_segments)  # [N,w]
        found: Tensor = self.out(segments.mean(x))  # [B,2w]
        return found


def rotary_axes(head_width: int) -> tuple[int, int, int]:
    """A head's width over frames, rows and columns, in even parts: 32 -> (8, 12, 12). Raises ValueError where it is odd or too small."""
    if head_width % 2 or head_width < 8:
        raise ValueError(f"a head of {head_width} channels cannot be turned along three axes: give an even width of at least 8")
    side = 2 * (head_width // 2 * 3 // 8)
    return head_width - 2 * side, side, side


class LatentReward(nn.Module):
    """(x_t [B,C,F,H,W], t [B], conditions of B clips) -> scores [B,R], by a head on the hidden states of `model`'s network.

    The network is no part of its weights. It is read with its adapter off, so a policy that trains as an adapter is scored by what it started from; once an adapter is
    merged, or the network trains by itself, a score raises ValueError. Scores have a gradient into the latents.
    The spread is the standard deviation of what the reward on pixels may say of the finished clip: that reward's own doubt and the error of this one, learned together from
    x_t and t, and widened by `widening` [Q,R] between the noise levels `levels` [Q] (`recipes/latent_reward.py` fits it on held-out prompts).
    `temperature`, `center`, `scale` and `log_tie` are those of the reward it imitates. `matcher`: that of the small reward model, if it is the one; there is a sight then.
    """

    temperature: Tensor
    center: Tensor
    scale: Tensor
    levels: Tensor
    widening: Tensor

    def __init__(
        self, model: LatentVideoModel, size: LatentSize, dims: Sequence[str], *, levels: Sequence[float], most_clips: int = 4, matcher: Matcher | None = None
    ) -> None:
        super().__init__()
        depth, w = model.config.depth, model.config.width
        if not size.after or list(size.after) != sorted(set(size.after)) or not 0 <= size.after[0] <= size.after[-1] <= depth:
            raise ValueError(f"after must be ascending numbers of blocks from 0 to {depth}, got {size.after}")
        if not dims or not levels:
            raise ValueError(f"dimensions and noise levels are at least one each, got {list(dims)} and {list(levels)}")
        self.size, self.dims = size, tuple(dims)
        self.head = LatentHead(size, len(size.after) * w, model.config.text_width)
        self.sight = None if matcher is None else Sight(model.codec, size.sight, matcher)
        self.trust = None if matcher is None else nn.Linear(size.width, len(INPUTS))  # by noise level, all of it at the start
        if self.trust is not None:
            nn.init.zeros_(self.trust.weight)
            nn.init.ones_(self.trust.bias)
        self.told = 2 * size.width + (0 if self.sight is None else len(INPUTS))
        self.mean, self.log_spread = (nn.Linear(self.told, len(self.dims)) for _ in range(2))
        self.log_tie = nn.Parameter(torch.full((len(self.dims), most_clips - 1), -1.0), requires_grad=False)  # [R,K-1]
        for name, value in (("temperature", 1.0), ("center", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((len(self.dims),), value))
        self.register_buffer("levels", torch.tensor(sorted(levels)))
        self.register_buffer("widening", torch.ones(len(levels), len(self.dims)))
        self._model = [model]  # in a list, so that its weights are not taken for ours
        self._witness = [(parameter, _first(parameter).clone()) for parameter in model.network.parameters()]

    @property
    def model(self) -> LatentVideoModel:
        return self._model[0]

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Scores:
        """nan for a clip whose latents or noise level are not finite.

        Raises ValueError for a visual prompt, a noise level outside the path, or a network that is no longer the one it learned from.
        """
        t = t.expand(len(x_t))  # [B]
        usable = torch.isfinite(x_t).flatten(1).all(-1) & torch.isfinite(t)  # [B]
        x_t, t = torch.where(usable[:, None, None, None, None], x_t, 0.0), torch.where(usable, t, 0.0)
        mean, spread = self.read(self.summary(self.seen(x_t, t, cond), x_t, t, cond), t)
        unknown = ~usable[:, None]
        return Scores(mean.masked_fill(unknown, torch.nan), spread.masked_fill(unknown, torch.nan))

    def seen(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Seen:
        """All that the head is told."""
        return Seen(self.hidden(x_t, t, cond), x_t.new_zeros(len(x_t), 0) if self.sight is None else self.sight(x_t, t, cond)[1])

    def hidden(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the head reads of the denoiser: the hidden states after the blocks `size.after`, beside each other, (N, h)."""
        if cond.known is not None:
            raise ValueError("a latent reward scores clips made from text alone, and these have a visual prompt")
        if bool(((t < 0) | (t > self.model.path.t_max)).any()):
            raise ValueError(f"noise levels from 0 to {self.model.path.t_max:g} are known, got {t.tolist()}")
        if not all(torch.equal(_first(parameter), kept.to(parameter.device)) for parameter, kept in self._witness):
            raise ValueError("the network is no longer the one this latent reward reads: score before an adapter is merged, and train adapters only")
        network: Any = self.model.network
        with reference(network):
            states = network.hidden(*packed(x_t, self.model.config.patch), t, *packed_text(cond), after=self.size.after)
        return torch.cat([state.float() for state in states], dim=-1)

    def summary(self, seen: Seen, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What the head makes of the hidden states, beside the inputs as far as they are trusted at t, [B,2w+A]; of `x_t` the shape alone is read."""
        _, positions, segments = packed(x_t, self.model.config.patch)
        found = self.head(seen.hidden, positions, segments, t, *packed_text(cond))  # [B,2w]
        return found if self.trust is None else torch.cat([found, seen.inputs * self.trust(time_features(t, self.size.width))], dim=1)

    def read(self, summary: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """[B,2w+A], [B] -> mean and spread [B,R]. What the spread learns does not reach the head."""
        return self.mean(summary), self.log_spread(summary.detach()).exp() * between(self.levels, self.widening, t)


def _first(parameter: Tensor) -> Tensor:
    return parameter.detach().flatten()[:8]


def between(levels: Tensor, values: Tensor, t: Tensor) -> Tensor:
    """Values [Q,R] at ascending levels [Q], on straight lines between them and constant beyond, at t [B] -> [B,R]."""
    right = torch.searchsorted(levels, t.contiguous()).clamp(1, max(1, len(levels) - 1)).clamp(max=len(levels) - 1)  # [B]
    left = (right - 1).clamp_min(0)
    share = ((t - levels[left]) / (levels[right] - levels[left]).clamp_min(1e-12)).clamp(0, 1)[:, None]  # [B,1]
    return values[left] + share * (values[right] - values[left])


@dataclass(frozen=True)
class LatentMixture:
    """The terms of one latent reward as one reward a clip; finished latents are scored at noise level 0."""

    scorer: LatentReward
    terms: tuple[Term, ...]

    def __call__(self, x0: Tensor, cond: Conditioning) -> Mixed:
        """x0 [B,C,F,H,W] of B conditions -> Mixed, on the CPU."""
        scores = self.scorer(x0, torch.zeros(len(x0), device=x0.device), cond)
        name = self.terms[0].scorer
        return mix({name: (self.scorer.dims, Scores(*(part.cpu() for part in scores)))}, self.terms)


# Files


@torch.no_grad()
def golden_scores(scorer: LatentReward) -> dict[str, list[list[float]]]:
    """What it says of the golden clips, through the model's codec, text encoder and network, finished and half noised: [4,R]."""
    video, prompts = golden_clips()
    latents, patch = scorer.model.latents, scorer.model.config.patch
    sides = [-(-side // (latents.space_stride * p)) * latents.space_stride * p for side, p in zip(video.shape[-2:], patch[1:], strict=True)]
    frames = 1 + latents.time_stride * (patch[0] * -(-2 // patch[0]) - 1)
    video = F.pad(video, (0, sides[1] - video.shape[-1], 0, sides[0] - video.shape[-2]), value=0.2)[:, torch.arange(frames) % video.shape[1]]
    x0 = scorer.model.encode(video)  # [2,C,F,H,W]
    cond = scorer.model.encode_text(prompts)
    half = torch.full((2,), scorer.model.path.t_max / 2, device=x0.device)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    found = [scorer(x0, torch.zeros_like(half), cond), scorer(add_noise(scorer.model.path, x0, eps, half), half, cond)]
    return {"mean": torch.cat([each.mean for each in found]).tolist(), "spread": torch.cat([each.spread for each in found]).tolist()}


def save_latent_reward(folder: Path, scorer: LatentReward, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights and card (returned) into `folder`. The card says which network's hidden states are read; the network stays where it is."""
    scorer.eval()
    matcher = None if scorer.sight is None else asdict(scorer.sight.matcher.size)
    told = {"tier": TIER, "base": fingerprint(scorer.model.network), "size": asdict(scorer.size), "matcher": matcher, "levels": scorer.levels.tolist(), **facts}
    return write_card(folder, scorer, scorer.state_dict(), told, golden_scores(scorer))


def load_latent_reward(folder: Path, model: LatentVideoModel) -> LatentReward:
    """The latent reward in `folder`, ready to score what `model`, whose network has no adapter yet, and adapters on it make.

    Raises UserError where card or weights are missing, damaged or of different runs, where the network is another than the one whose hidden states it learned from, and
    where the golden scores differ (another codec or text encoder).
    """
    card, tensors = read_card(folder, TIER)
    with card_errors(folder):
        if card["base"] != fingerprint(model.network):
            raise UserError(f"the latent reward reads another network than this model's, {folder}. Give --model that network, or distil one from this with `rushes latent-reward`")
        size = LatentSize(**{**card["size"], "after": tuple(card["size"]["after"])})
        matcher = Matcher(MatcherSize(**card["matcher"])) if card.get("matcher") else None
        scorer = LatentReward(model, size, card["dims"], levels=card["levels"], most_clips=card["most_clips"], matcher=matcher)
        scorer.load_state_dict(tensors)
    scorer.to(model.device).eval().requires_grad_(False)
    check_golden(folder, card, golden_scores(scorer))
    return scorer
