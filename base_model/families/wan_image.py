"""Wan image to video (2.1 and 2.2 A14B): beside x_t the network is given which latents are shown and the latents of a clip that is the image and then grey.

2.1 is told the states of a CLIP image encoder as well. Nothing is forced: unlike a known token elsewhere, the first frame has the noise level of all and is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.families.wan import Ask, WanVideoModel
from base_model.prompts.conditions import Canvas, known_mask
from base_model.types import Conditioning, Known


class ImageStates(nn.Module):
    """The image encoder as Wan's pipeline calls it."""

    def __init__(self, processor: Any, clip: Any) -> None:
        super().__init__()
        self.processor, self.clip = processor, clip

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B,3,H,W] in [0,1] -> states [B,M,E] of the last layer but one; images are rounded to 256 levels first, as a picture file is."""
        pixels = [(image * 255).round().byte().permute(1, 2, 0).cpu().numpy() for image in images]  # [H,W,3] each
        found: Tensor = self.clip(self.processor(pixels, return_tensors="pt").pixel_values.to(self.clip.device), output_hidden_states=True).hidden_states[-2]
        return found


@dataclass
class WanImageVideoModel(WanVideoModel):
    """A `VideoModel` whose conditions come from `with_canvases`."""

    eye: ImageStates | None = None

    def through(self, ask: Ask, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32. Raises UserError where no image is told."""
        if cond.known is None or (cond.image is None and self.network.config.image_dim is not None):
            raise UserError("this Wan makes clips from an image, and none is told. Put it into the conditions with model.with_canvases")
        shown = cond.known.mask[:, None].expand(-1, self.latents.time_stride, -1, -1, -1)  # [B,4,F,H,W]
        given = torch.cat([x_t, shown.to(x_t), cond.known.values.to(x_t)], dim=1)  # [B,2C+4,F,H,W]
        return ask(given, t)

    def with_canvases(self, cond: Conditioning, canvases: Sequence[Canvas]) -> Conditioning:
        """B texts and B canvases that give their first frame, and others as far as whole latents. `known.values` holds the whole grey-filled clip, also where the mask is False."""
        given = torch.stack([canvas.given for canvas in canvases])  # [B,T,H,W]
        video = torch.stack([torch.where(canvas.given[:, None], canvas.video, 0.5) for canvas in canvases])  # [B,T,3,H,W]
        mask, spec = known_mask(given, self.latents, self.network.config.patch_size), self.latents  # [B,F,H,W]
        cells = int(given.sum()) + (spec.time_stride - 1) * int(given[:, 0].sum())  # the first frame stands for a whole latent
        if not given[:, 0].all() or cells != int(mask.sum()) * spec.time_stride * spec.space_stride**2:
            raise UserError(f"Wan goes on from whole frames, the first and then {spec.time_stride} at a time. Give the whole first frame")
        image = None if self.eye is None else self.eye(video[:, 0])  # [B,M,E]
        values = self.encode(video)  # [B,C,F,H,W]
        return replace(cond, known=Known(values, mask.to(values.device)), image=image)
