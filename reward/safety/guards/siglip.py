"""A SigLIP encoder with a small head over seven classes, in the published shape of Cosmos' video guard (NVIDIA Cosmos, `video_content_safety_filter`), as a clip filter.

    clip -> frames at `rate` a second -> SigLIP's embedding, of length 1 -> Linear 512, BatchNorm, ReLU, Linear 256, BatchNorm, ReLU, Linear 7 -> softmax

There the largest class decides, a frame that fails is skipped, and no probability is told. Here a class's score is p / (p + p of safe) of its worst frame: 0.5 where it begins to
beat "safe", so at the threshold of 0.5 the same frames are stopped, and a frame that fails is an error. `head.py` trains a head of one's own on the same encoder.

    head.safetensors    network.layers.{0,3,6}.{weight,bias}, network.layers.{1,4}.{weight,bias,running_mean,running_var}

It is published as a pickled `safety_filter.pt`, which is refused. Where you trust its source, save the tensors under its key `model` as safetensors once.

Checked against the source of cosmos-predict2 and of packages that carry it on: layers, their names, the seven classes and their order, the embedding divided by its length,
google/siglip-so400m-patch14-384, 2 frames a second. Nothing ran on real weights. Code Apache-2.0, weights under NVIDIA's terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.checkpoint import load_weights
from base_model.errors import UserError
from reward.encoders import FrameEncoder, load_encoder
from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.guards.loading import check_limits, frames_at, version_of
from reward.safety.policy import Policy

CLASSES = ("safe", "sexual", "violence", "drugs", "child abuse", "hate", "self-harm")
CODES: dict[str, tuple[str, ...]] = {"sexual": ("P01",), "violence": ("P05",), "drugs": ("P11",), "child abuse": ("P04",), "hate": ("P08", "P09"), "self-harm": ("P07",)}
"""The policies a class is a violation of, in the policy's own mapping."""


class Classifier(nn.Module):
    """The published layers: embeddings [N,D] -> logits [N,classes]."""

    def __init__(self, width: int, classes: int = len(CLASSES)) -> None:
        super().__init__()
        hidden = [nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def load_classifier(path: Path, width: int) -> Classifier:
    """Raises UserError for a pickle, for truncated weights, and for other layers, widths or classes than those above."""
    tensors, _ = load_weights(path)
    network = Classifier(width)
    named = {name.removeprefix("network."): value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = sorted({*named} ^ {*own}) or [name for name, value in own.items() if named[name].shape != value.shape]
    if wrong:
        there = tuple(named[wrong[0]].shape) if wrong[0] in named else "missing"
        needed = tuple(own[wrong[0]].shape) if wrong[0] in own else "no such layer"
        told = f"not the head of this guard, {path}: {wrong[0]} is {there}, needed is {needed}"
        raise UserError(f"{told}. Give the head that was trained on this encoder, for {len(CLASSES)} classes")
    network.load_state_dict(named, strict=False)
    return network.eval().requires_grad_(False)


class SiglipGuard:
    """A `VideoFilter`. From `threshold` on a clip is for people, from `block_from` on the policy's action is taken.

    Raises ValueError, and so becomes an error of the runner, for logits that are not finite.
    """

    id = "siglip-guard"
    policies = tuple(sorted({code for codes in CODES.values() for code in codes}))

    def __init__(self, encoder: str, head: Path, policy: Policy, *, threshold: float = 0.5, block_from: float = 0.5, rate: float = 2.0) -> None:
        """encoder: folder or hub id of a SigLIP checkpoint, or of its vision tower alone; head: the file above. Raises UserError where one of them cannot be used."""
        check_limits(threshold, block_from)
        loaded = load_encoder(encoder, fps=1.0, frames=1)
        if not isinstance(loaded, FrameEncoder) or loaded.family == "clip":
            raise UserError(f"the guard's head stands on a SigLIP encoder, and this is {loaded.family}, {encoder}. Give google/siglip-so400m-patch14-384")
        self.encoder, self.classifier = loaded, load_classifier(head, loaded.shape[1])
        unknown = [code for code in self.policies if code not in policy]
        if unknown:
            raise UserError(f"the guard rules on {unknown[0]}, which the policy does not have. Give the shipped policy or one with its codes")
        self.threshold, self.block_from, self.rate = threshold, block_from, rate
        self.version = version_of(loaded.revision, head.read_bytes(), (threshold, block_from, rate))
        self._hits = {code: VERDICT_OF[policy.action(code)] for code in self.policies}

    @torch.no_grad()
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip and policy."""
        return [self._check(clip, fps) for clip in video]

    def _check(self, clip: Tensor, fps: float) -> list[Ruling]:
        rows = frames_at(len(clip), fps, self.rate)
        worst, at = self.scores(clip[rows]).max(0)  # [classes - 1] each
        found: dict[str, tuple[float, float, str]] = {}
        for name, score, k in zip(CLASSES[1:], worst.tolist(), at.tolist(), strict=True):
            for code in CODES[name]:
                found[code] = max(found.get(code, (-1.0, 0.0, "")), (score, rows[k] / fps, name))
        return [self._rule(code, *found[code]) for code in self.policies]

    def _rule(self, code: str, score: float, when: float, name: str) -> Ruling:
        if score < self.threshold:
            return Ruling(Verdict.ALLOW, code, score, (), self.id, self.version, self.threshold)
        verdict = self._hits[code] if score >= self.block_from else min(self._hits[code], Verdict.REVIEW)
        return Ruling(verdict, code, score, (Reason(f"{name} against safe {score:.3f}", when, when),), self.id, self.version, self.threshold)

    def scores(self, frames: Tensor) -> Tensor:
        """[F,3,H,W] -> p / (p + p of safe) of every other class [F,classes - 1]."""
        embedding = self.encoder.clips(frames[:, None])[:, 0].float()  # [F,D]
        logits = self.classifier(F.normalize(embedding, dim=-1))  # [F,classes]
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the guard's logits are not finite")
        return torch.sigmoid(logits[:, 1:] - logits[:, :1])
