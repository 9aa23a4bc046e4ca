"""Keyframes, two interpolations, decoding, upsampling: clips from a stack of small models (Video LDM, arXiv 2304.08818, section 3.3).

A stack is a folder: `keyframes/` and `interpolation/` as `rushes temporal` leaves them and, if there is one, `upsample/` of `rushes upsample`. Frames are latents of
single images until they are decoded. Every frame a stage was given survives to the end of the frame models bit by bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from align.kernels import ODE
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.guidance import Guided
from base_model.networks.packing import token_grid
from base_model.stages import FrameModel, UpsampleStage, load_frames, load_stage, tell_frames
from base_model.times import sampling_times
from base_model.types import ClipShape, Conditioning
from recipes.upsample import super_resolve
from recipes.weights import file_hash

STRIDES = (4, 2, 1)
"""Frames of the finished clip from one frame to the next: keyframes, after interpolation I, after interpolation II."""


def change(video: Tensor) -> float:
    """Mean squared difference of consecutive frames, video [B,T,3,H,W] in [0,1]: how much moves, and how much frames disagree. Real clips say what is right."""
    return float((video[:, 1:] - video[:, :-1]).square().mean())


@torch.no_grad()
def sample_frames(model: FrameModel, noise: Tensor, cond: Conditioning, *, steps: int, shift: float, guidance: float = 1.0) -> Tensor:
    """noise [B,C,T,H,W] -> latents [B,C,T,H,W]; frames that are given come back as they are."""
    x0 = rollout(Guided(model, guidance), ODE(), noise, sampling_times(model.path, steps, shift=shift), cond, noise=torch.Generator()).x0
    return x0 if cond.known is None else torch.where(cond.known.mask[:, None], cond.known.values, x0)


def between(values: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [B,C,T,H,W] at half the rate -> (latents [B,C,2T-1,H,W] with zeros between them, which are known [2T-1])."""
    count = 2 * values.shape[2] - 1
    wide = values.new_zeros(*values.shape[:2], count, *values.shape[3:])
    wide[:, :, ::2] = values
    return wide, torch.arange(count, device=values.device) % 2 == 0


@dataclass(frozen=True)
class Stack:
    """The stages, in order."""

    keyframes: FrameModel
    interpolation: FrameModel
    upsample: UpsampleStage | None = None

    @property
    def enlarges(self) -> int:
        """By how much the last stage enlarges height and width."""
        return 1 if self.upsample is None else 2

    def to(self, device: torch.device) -> Stack:
        """Moves every stage."""
        for stage in (self.keyframes, self.interpolation, self.upsample):
            if stage is not None:
                stage.to(device)
        return self


def load_stack(folder: Path) -> Stack:
    """Raises UserError where a stage is missing or damaged, and for an upsampling stage that makes more frames."""
    keyframes, interpolation = (load_frames(folder / name / "network.safetensors") for name in ("keyframes", "interpolation"))
    last = folder / "upsample" / "network.safetensors"
    stage = load_stage(last) if last.exists() else None
    if stage is not None and stage.axis != "space":
        raise UserError(f"{last} makes more frames, where a stack enlarges them. Train it with --axis space")
    return Stack(replace(keyframes, stride=STRIDES[0]), interpolation, stage)


def stack_lineage(folder: Path) -> str:
    """One hash of all the stages' files."""
    files = [folder / name / "network.safetensors" for name in ("keyframes", "interpolation", "upsample")]
    return hashlib.sha256("".join(file_hash(file) for file in files if file.exists()).encode()).hexdigest()


@torch.no_grad()
def sample_stack(
    stack: Stack,
    cond: Conditioning,
    clip: ClipShape,
    *,
    seeds: Sequence[int],
    steps: int,
    shift: float,
    guidance: float = 1.0,
    together: int = 4,
    level: float = 0.1,
) -> Tensor:
    """B prompts -> clips [B,T,3,H,W] of the size `clip`, on the CPU; every clip has noise of its own seed.

    together: the most keyframes made at once, at least 2; more of them are predicted, each lot from the last `together // 2` before it.
    level: how much the decoded clip is corrupted before it is enlarged. Raises UserError where the clip does not suit the stages.
    """
    shape = frame_shape(stack, clip)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise(frames: int) -> Tensor:
        return torch.stack([torch.randn((shape[0], frames, *shape[2:]), generator=g) for g in generators]).to(stack.keyframes.device)  # [B,C,frames,H,W]

    make = partial(sample_frames, steps=steps, shift=shift, guidance=guidance)
    number = 1 + (clip.frames - 1) // STRIDES[0]
    x0 = make(stack.keyframes, noise(min(together, number)), cond)  # [B,C,k,H,W]
    while x0.shape[2] < number:
        kept = x0[:, :, -(together // 2) :]  # [B,C,k,H,W]
        fresh = noise(min(together - kept.shape[2], number - x0.shape[2]))  # [B,C,f,H,W]
        both = torch.cat([kept, fresh], dim=2)  # [B,C,k+f,H,W]
        known = torch.arange(both.shape[2], device=x0.device) < kept.shape[2]
        x0 = torch.cat([x0, make(stack.keyframes, both, tell_frames(cond, both, known))[:, :, kept.shape[2] :]], dim=2)
    for stride in STRIDES[1:]:  # interpolation I and II
        values, known = between(x0)
        x0 = make(replace(stack.interpolation, stride=stride), noise(values.shape[2]), tell_frames(cond, values, known))
    video = stack.interpolation.decode(x0)  # [B,T,3,H,W]
    if stack.upsample is None:
        return video.cpu()
    return super_resolve(stack.upsample, video, cond, seeds=seeds, level=level, steps=2)


def frame_shape(stack: Stack, clip: ClipShape) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents behind a clip. Raises UserError where its frames or sides do not suit the stages."""
    try:
        if (clip.frames - 1) % STRIDES[0] or clip.height % stack.enlarges or clip.width % stack.enlarges:
            raise ValueError(f"frames must be 1 + a multiple of {STRIDES[0]}, sides a multiple of {stack.enlarges}")
        shape = stack.keyframes.latents.shape(ClipShape(clip.frames, clip.height // stack.enlarges, clip.width // stack.enlarges))
        token_grid(shape, stack.keyframes.network.config.patch)
    except ValueError as error:
        raise UserError(f"sampler of {clip} in a stack that enlarges {stack.enlarges} times: {error}. Change sampler.frames, sampler.height or sampler.width") from error
    return shape
