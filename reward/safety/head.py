"""A clip filter that is trained: a small head on what a frozen encoder, or the video VAE, sees of a clip, with one output a policy.

    clip -> windows of about a second -> tokens [K,N,D] -> each with how far they differ in its window -> two layers [K,N,P] -> the largest of all -> probability [P]

A clip violates a policy if one place of one window does, so the largest logit decides. Training takes a smooth maximum instead, which tells every place where to go. A token
alone shows what a frame shows, the deviation within its window what happens over time (flashing, a cut). Probabilities are calibrated on held-out prompts (Platt). Two of them
are limits: below the first a clip is allowed, from the second on the policy's action is taken, and what lies between is for people.

    folder/filter.safetensors   weights, standardisation, calibration and limits
    folder/filter_card.json     what it looks through, its policies, limits, measurements, data and licences, and its version: the hash of all that decides a ruling

It is no cascade: every frame is covered by a window. The VAE and encoders of single frames (CLIP, SigLIP) see all frames of a window; encoders of video (X-CLIP, VideoMAE,
V-JEPA 2) see the 8 or 16 that they take and nothing between them. What none can see: harm that needs more than a window to show, sound, and what its training clips never showed.

Letters: B clips, T frames, K windows, N tokens of a window, D their width, M = K N tokens of a clip, P policies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import atomic_write, load_weights, read_json, save_weights
from base_model.errors import UserError
from base_model.tiny import WEIGHTS, LatentCodec, load_codec
from reward.encoders import Encoder, FrameEncoder, Sampler, load_encoder
from reward.model import golden_clips
from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.policy import Policy
from reward.types import same_rate

WEIGHTS_FILE, CARD_FILE = "filter.safetensors", "filter_card.json"
FORMAT = 1
PLACES = 4
"""The most places a side that are left of a latent frame."""
SHARPNESS = 4.0
"""Of the smooth maximum: it is at most ln(M) / SHARPNESS below the largest."""
GOLDEN_TOLERANCE = 1e-3  # of a probability, between machines
MADE_WITH = "Make them again with `rushes safety-train`"


# What it looks through


class Look(Protocol):
    """Something frozen that turns a window of frames into tokens."""

    @property
    def family(self) -> str: ...
    @property
    def identity(self) -> str:
        """Equal where the same frames give the same tokens."""
        ...

    @property
    def source(self) -> str:
        """Where it is found again."""
        ...

    @property
    def frames(self) -> int:
        """Frames of a window."""
        ...

    def tokens(self, windows: Tensor) -> Tensor:
        """[K,frames,3,H,W] in [0,1] -> [K,N,D] float32."""
        ...


class EncoderLook:
    """Through a frozen encoder (`encoders.py`), which sees the frames of a window that its sampler takes."""

    def __init__(self, encoder: Encoder, frames: int) -> None:
        self.encoder, self.frames = encoder, frames

    @property
    def family(self) -> str:
        return self.encoder.family

    @property
    def identity(self) -> str:
        return f"{self.encoder.identity} {self.encoder.sampler.frames} of {self.frames} frames"

    @property
    def source(self) -> str:
        return self.encoder.source

    def tokens(self, windows: Tensor) -> Tensor:
        return self.encoder.clips(windows).float()


class LatentLook:
    """Through the built-in video VAE, its latents averaged down to at most PLACES x PLACES a latent frame."""

    family = "latent"

    def __init__(self, codec: LatentCodec, source: str, digest: str, frames: int) -> None:
        self.codec, self.source, self.frames = codec, source, frames
        self.identity = f"latent@{digest} {frames} frames, {PLACES} places"

    @torch.no_grad()
    def tokens(self, windows: Tensor) -> Tensor:
        latents = self.codec.encode(windows)  # [K,C,F,h,w]
        _, _, f, h, w = latents.shape
        few = F.adaptive_avg_pool3d(latents, (f, min(h, PLACES), min(w, PLACES)))
        return few.flatten(2).transpose(1, 2)  # [K,N,C]


def load_look(source: str, *, fps: float, seconds: float) -> EncoderLook | LatentLook:
    """A folder or hub id of an encoder; an empty text or a safetensors file: the shipped VAE, or that one. Windows last about `seconds`."""
    frames = max(1, round(seconds * fps))
    if source and not source.endswith(".safetensors"):
        encoder = load_encoder(source, fps=fps)
        if isinstance(encoder, FrameEncoder):
            encoder.sampler = Sampler(frames, fps)  # all of a window
        return EncoderLook(encoder, frames)
    path = Path(source) if source else WEIGHTS / "vae.safetensors"
    codec = load_codec(path)
    stride = codec.vae.config.latents.time_stride
    return LatentLook(codec, source, hashlib.sha256(path.read_bytes()).hexdigest(), 1 + stride * max(1, round((frames - 1) / stride)))


def window_starts(frames: int, window: int) -> list[int]:
    """First frames of windows that follow each other; the last one ends with the clip."""
    return [*range(0, frames - window, window), max(0, frames - window)]


def clip_tokens(look: Look, clip: Tensor) -> Tensor:
    """[T,3,H,W] -> [K,N,D]; a clip shorter than a window stands still at its end."""
    if len(clip) < look.frames:
        clip = torch.cat([clip, clip[-1:].expand(look.frames - len(clip), -1, -1, -1)])
    return torch.cat([look.tokens(clip[begin : begin + look.frames][None]) for begin in window_starts(len(clip), look.frames)])


# The head


def with_deviation(tokens: Tensor) -> Tensor:
    """[...,N,D] -> [...,N,2D]: each token, and the standard deviation of its window's."""
    return torch.cat([tokens, tokens.std(-2, correction=0, keepdim=True).expand_as(tokens)], dim=-1)


def smooth_max(logits: Tensor, there: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """logits [B,M,P], there [B,M] bool -> [B,P]: log of the mean of exp(sharpness x logit), over the sharpness. Between the mean and the largest."""
    masked = (sharpness * logits).masked_fill(~there[..., None], -torch.inf)
    return (masked.logsumexp(1) - there.sum(1, keepdim=True).to(logits).log()) / sharpness


class Head(nn.Module):
    """The trained part. slope and offset [P]: Platt's; low and high [P]: the limits of a probability."""

    mean: Tensor
    std: Tensor
    slope: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policies: Sequence[str], token_width: int, width: int) -> None:
        super().__init__()
        self.policies = tuple(policies)
        self.layers = nn.Sequential(nn.Linear(2 * token_width, width), nn.GELU(), nn.Linear(width, len(self.policies)))
        for name, size, value in (("mean", 2 * token_width, 0.0), ("std", 2 * token_width, 1.0)):
            self.register_buffer(name, torch.full((size,), value))
        for name, value in (("slope", 1.0), ("offset", 0.0), ("low", 0.5), ("high", 0.5)):
            self.register_buffer(name, torch.full((len(self.policies),), value))

    def forward(self, seen: Tensor) -> Tensor:
        """[...,2D] as `with_deviation` gives them -> logits [...,P]."""
        out: Tensor = self.layers(((seen - self.mean) / self.std).clamp(-5, 5))
        return out

    def calibrated(self, logits: Tensor) -> Tensor:
        """Largest logits [...,P] -> the logits of probabilities [...,P]."""
        return self.slope * logits + self.offset

    @torch.no_grad()
    def fit_standard(self, seen: Tensor) -> None:
        """Takes mean and deviation of training tokens [M,2D]."""
        self.mean.copy_(seen.mean(0))
        self.std.copy_(seen.std(0, correction=0).clamp(min=1e-4))


class TrainedFilter:
    """A `VideoFilter`. Its version is the hash of the weights, the limits and what it looks through; `threshold` is the lowest of the policies' first limits.

    Raises ValueError, and so becomes an error of the runner, for clips of another rate and for logits that are not finite.
    """

    def __init__(self, head: Head, look: Look, policy: Policy, *, fps: float, version: str) -> None:
        unknown = [code for code in head.policies if code not in policy]
        if unknown or not head.policies:
            raise UserError(f"the trained filter rules on {unknown[0] if unknown else 'no policy'}, which the policy does not have. Train it again, or give its policy file")
        self.head, self.look, self.fps, self.version = head.eval().requires_grad_(False), look, fps, version
        self.id, self.policies, self.threshold = f"head-{look.family}", head.policies, float(head.low.min())
        self._names = {code: policy.rule(code).name for code in head.policies}
        self._hits = {code: VERDICT_OF[policy.action(code)] for code in head.policies}

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip and policy."""
        if not same_rate(fps, self.fps):
            raise ValueError(f"trained on clips of {self.fps:g} frames a second, and these have {fps:g}")
        return [self._check(clip.float()) for clip in video]

    @torch.no_grad()
    def window_probabilities(self, clip: Tensor) -> Tensor:
        """[T,3,H,W] -> [K,P]. Raises ValueError where a token or a logit is not finite: sigmoid would make a 0 of minus infinity."""
        tokens = clip_tokens(self.look, clip)
        logits = self.head.calibrated(self.head(with_deviation(tokens)).amax(1))
        if not bool(torch.isfinite(tokens).all() and torch.isfinite(logits).all()):
            raise ValueError("tokens or logits of the head are not finite")
        return logits.sigmoid()

    def _check(self, clip: Tensor) -> list[Ruling]:
        starts = window_starts(max(len(clip), self.look.frames), self.look.frames)
        found = self.window_probabilities(clip)  # [K,P]
        worst = found.argmax(0).tolist()
        span = [(starts[k] / self.fps, min(len(clip), starts[k] + self.look.frames) / self.fps) for k in worst]
        return [self._rule(p, float(found[k, p]), *span[p]) for p, k in enumerate(worst)]

    def _rule(self, p: int, score: float, start: float, end: float) -> Ruling:
        code, low, high = self.policies[p], float(self.head.low[p]), float(self.head.high[p])
        if score < low:
            return Ruling(Verdict.ALLOW, code, score, (), self.id, self.version, low)
        verdict = self._hits[code] if score >= high else min(self._hits[code], Verdict.REVIEW)
        text = f"{self._names[code]}: probability {score:.3f}, allowed below {low:.3f}, for people below {high:.3f}"
        return Ruling(verdict, code, score, (Reason(text, start, end),), self.id, self.version, low)


# Files


def save_filter(folder: Path, head: Head, look: Look, *, fps: float, seconds: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Writes weights and card (returned). facts: of its making (policy version, measurements, data, licences)."""
    path = folder / WEIGHTS_FILE
    head.eval()
    save_weights(path, head.state_dict(), {})
    decides = {
        "format": FORMAT,
        "policies": list(head.policies),
        "look": {"family": look.family, "source": look.source, "identity": look.identity},
        "fps": fps,
        "window_seconds": seconds,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    limits = {code: {"review_from": low, "block_from": high} for code, low, high in zip(head.policies, head.low.tolist(), head.high.tolist(), strict=True)}
    card = {**decides, "version": _version(decides), "limits": limits, "golden": _golden(head, look).tolist(), **facts}
    text = json.dumps(card, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    atomic_write(folder / CARD_FILE, text.encode())
    saved: dict[str, Any] = json.loads(text)
    return saved


def load_filter(folder: Path, policy: Policy, *, moved: str | None = None) -> TrainedFilter:
    """The filter in `folder`, ready to rule. moved: where the encoder's files are now, if no longer where the card says.

    Raises UserError where card, weights or encoder are missing, damaged or not those of the card, where the policy lacks one of its codes, and where it does not give the
    probabilities of two golden clips that its card holds: better no ruling than one by other weights.
    """
    card = read_json(folder / CARD_FILE, "the card of the trained filter")
    tensors, _ = load_weights(folder / WEIGHTS_FILE)
    try:
        decides = {key: card[key] for key in ("format", "policies", "look", "fps", "window_seconds", "sha256")}
        if decides["format"] != FORMAT:
            raise UserError(f"a trained filter of another format, {folder}. {MADE_WITH}")
        if hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest() != card["sha256"] or _version(decides) != card["version"]:
            raise UserError(f"the weights are not those of their card, {folder / WEIGHTS_FILE}. {MADE_WITH}")
        look = load_look(card["look"]["source"] if moved is None else moved, fps=float(card["fps"]), seconds=float(card["window_seconds"]))
        if look.identity != card["look"]["identity"]:
            there, named = look.source or "the shipped VAE", card["look"]["identity"]
            raise UserError(f"what the filter looks through, {there}, is not what its card names ({named}), {folder}. Give the same files")
        width, twice = tensors["layers.0.weight"].shape
        head = Head(card["policies"], twice // 2, width)
        head.load_state_dict(tensors)
        golden = torch.tensor(card["golden"])
        found = TrainedFilter(head, look, policy, fps=float(card["fps"]), version=str(card["version"])[:16])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"not a trained filter's card and weights, {folder}: {' '.join(str(error).split())[:200]}. {MADE_WITH}") from error
    here = _golden(head, look)
    if here.shape != golden.shape or not bool(((here - golden).abs() <= GOLDEN_TOLERANCE).all()):
        raise UserError(f"the filter does not give the golden probabilities of its card, {folder}: found {here.tolist()}, expected {golden.tolist()}. {MADE_WITH}")
    return found


def _version(decides: Mapping[str, Any]) -> str:
    """Where the encoder lies does not decide a ruling; which one it is does."""
    told = {**decides, "look": decides["look"]["identity"]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _golden(head: Head, look: Look) -> Tensor:
    """Probabilities of the golden clips [2,P]."""
    clips, _ = golden_clips()
    return head.calibrated(torch.stack([head(with_deviation(clip_tokens(look, clip))).amax((0, 1)) for clip in clips])).sigmoid()
