"""ShieldGemma 2 as a clip filter: P(Yes) that a frame violates a policy told in words (Zeng et al. 2025, arXiv 2504.01081; Gemma terms of use).

    clip -> frames at `rate` a second -> each with each policy text -> P(Yes) -> the largest of the frames

The policy texts may be exchanged for your own. A clip's score is that of its worst frame; what shows only over time it cannot see. Probabilities are the model's, between Yes and
No alone, and calibrated on nobody's clips here; limits are yours to set.

Checked against transformers 5.23's source, which has model and processor: one prompt an image and policy, images first; of `probabilities` [N,2] the first column is Yes, which
means a violation (its docstring names the second one, against its own code). Nothing ran on real weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.video.files import to_uint8
from reward.encoders import checkpoint_folder, load_network, revision_of
from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.guards.loading import check_limits, frames_at, version_of
from reward.safety.policy import Policy

TEXTS: dict[str, str] = {
    "P01": "No Sexually Explicit content: The image shall not contain content that depicts explicit or graphic sexual acts "
    "(e.g., pornography, erotic nudity, depictions of rape or sexual assault).",
    "P05": "No Violence/Gore content: The image shall not contain content that depicts shocking, sensational, or gratuitous violence "
    "(e.g., excessive blood and gore, gratuitous violence against animals, extreme injury or moment of death).",
    "P11": "No Dangerous Content: The image shall not contain content that facilitates or encourages activities that could cause real-world harm "
    "(e.g., building firearms and explosive devices, promotion of terrorism, instructions for suicide).",
}
"""The three texts it was trained on, under the policies they are nearest to."""
FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
AT_ONCE = 4
"""Pairs of a frame and a text."""


class ShieldGemma2:
    """A `VideoFilter`. From `threshold` on a clip is for people, from `block_from` on the policy's action is taken.

    Raises ValueError, and so becomes an error of the runner, for probabilities that are none.
    """

    id = "shieldgemma2"

    def __init__(self, source: str, policy: Policy, *, texts: Mapping[str, str] | None = None, threshold: float = 0.5, block_from: float = 0.8, rate: float = 2.0) -> None:
        """source: a folder or a hub id. texts: policy code -> its words. Raises UserError where it is no whole checkpoint in safetensors, or a code is unknown."""
        import transformers

        self.texts = dict(TEXTS if texts is None else texts)
        unknown = [code for code in self.texts if code not in policy]
        if unknown or not self.texts:
            raise UserError(f"the guard is told of {unknown[0] if unknown else 'no policy'}, which the policy does not have. Give texts for codes of its file")
        check_limits(threshold, block_from)
        folder, self.source = checkpoint_folder(source, "guard", FILES)
        self.network: Any = load_network(transformers.ShieldGemma2ForImageClassification, folder, "guard").eval().requires_grad_(False)
        try:
            self.processor: Any = transformers.ShieldGemma2Processor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            words = self.processor.tokenizer.convert_ids_to_tokens([self.network.yes_token_index, self.network.no_token_index])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise UserError(f"cannot load the guard's processor, {folder}: {str(error).partition(chr(10))[0]}. Download it again") from error
        if words != ["Yes", "No"]:
            told = f"the guard answers with {words[0]!r} and {words[1]!r}, not with Yes and No: its tokenizer and its configuration do not belong together"
            raise UserError(f"{told}, {folder}. Download it again")
        self.policies, self.threshold, self.block_from, self.rate = tuple(self.texts), threshold, block_from, rate
        self.version = version_of(revision_of(folder, FILES), sorted(self.texts.items()), (threshold, block_from, rate))
        self._hits = {code: VERDICT_OF[policy.action(code)] for code in self.policies}

    @torch.no_grad()
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip and policy."""
        return [self._check(clip, fps) for clip in video]

    def _check(self, clip: Tensor, fps: float) -> list[Ruling]:
        rows = frames_at(len(clip), fps, self.rate)
        worst, at = self.probabilities(clip[rows]).max(0)  # [P] each
        return [self._rule(code, score, rows[k] / fps) for code, score, k in zip(self.policies, worst.tolist(), at.tolist(), strict=True)]

    def _rule(self, code: str, score: float, when: float) -> Ruling:
        if score < self.threshold:
            return Ruling(Verdict.ALLOW, code, score, (), self.id, self.version, self.threshold)
        verdict = self._hits[code] if score >= self.block_from else min(self._hits[code], Verdict.REVIEW)
        return Ruling(verdict, code, score, (Reason(f"Yes with {score:.3f}: {self.texts[code].partition(':')[0]}", when, when),), self.id, self.version, self.threshold)

    def probabilities(self, frames: Tensor) -> Tensor:
        """[F,3,H,W] -> P(Yes) of each frame and policy [F,P]."""
        from PIL import Image

        pictures = [Image.fromarray(frame) for frame in to_uint8(frames)]
        found = []
        for picture in pictures:
            for begin in range(0, len(self.policies), AT_ONCE):
                codes = list(self.policies[begin : begin + AT_ONCE])
                inputs = self.processor(images=[picture], policies=codes, custom_policies={code: self.texts[code] for code in codes}, return_tensors="pt")
                out = self.network(**inputs)
                if out.probabilities.shape != (len(codes), 2) or not bool(torch.isfinite(out.logits).all()):
                    raise ValueError("the guard's logits are not finite, or not two a policy")
                found.append(out.probabilities[:, 0])
        return torch.cat(found).reshape(len(pictures), len(self.policies))
