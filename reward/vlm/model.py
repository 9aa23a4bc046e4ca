"""A vision-language reward: Qwen2-VL, Qwen2.5-VL or Qwen3-VL reads a clip and a rubric; each reward dimension is a linear score of the hidden state at its own token.

    clip -> patches -> vision tower (frozen) --+
    rubric, prompt, one token a dimension -----+-> language model (frozen, LoRA) -> hidden states at the tokens [B,R,D] -> fp32 head -> mean, log-spread [B,R]

The hidden states come from transformers' own module, called as it is. What is learned, and all that is kept on disk (`files.py`): the adapter, the rows of the
tokens, the head, the tie parameters.

Letters: B clips, C clips of a batch of rankings, R dimensions, L tokens, D hidden width, K clips of a ranking, M samples of the scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from base_model.checkpoint import fingerprint
from base_model.lora import add_lora
from base_model.prompts.vision import LANGUAGE_LINEARS, PatchFormat, Precision, encode, load_vlm
from base_model.quantize import to_nf4
from reward.types import Scores
from reward.vlm.frames import FrameSampler, read_clip
from reward.vlm.prompt import Dimension, chat_text, check_rubric, rubric_of

CLIPS_AT_ONCE = 16
Positions = Literal["grid", "flat"]
"""How the language model numbers the tokens of a clip: by frame, row and column as the families were trained, or one after the other as `videoreward.py` says."""


@dataclass
class Base:
    """A vision-language model without its language head, its tokenizer, and what identifies both."""

    network: Any  # transformers' Qwen2VLModel, Qwen2_5_VLModel or Qwen3VLModel
    tokenizer: Any
    patches: PatchFormat
    name: str  # a folder or a hub id
    revision: str  # of the hub, "" for a folder
    fingerprint: str  # of the weights
    dtype: Precision

    @property
    def family(self) -> str:
        return str(self.network.config.model_type)


def load_base(name: str | Path, *, revision: str = "", dtype: Precision = "float32") -> Base:
    """The model in a folder or under a hub id (downloaded only where HF_HUB_OFFLINE is 0).

    Raises UserError where it cannot be had or is of another family than Qwen2-VL, Qwen2.5-VL and Qwen3-VL.
    """
    found = load_vlm(name, revision=revision, dtype=dtype, head=False)
    network = found.network.model
    return Base(network, found.tokenizer, found.patches, found.name, found.revision, fingerprint(network), dtype)


class Head(nn.Module):
    """fp32 scores of hidden states, dimension r by its own row; every clip scores 0 before it has learned. No bias: only differences count."""

    def __init__(self, dims: int, width: int, *, spread: bool) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(dims, width))  # [R,D]
        self.log_spread = nn.Parameter(torch.zeros(dims, width)) if spread else None  # [R,D]

    def forward(self, states: Tensor) -> Scores:
        """[B,R,D] -> scores [B,R]; a head without spread is sure of itself: 0."""
        mean = torch.einsum("brd,rd->br", states.float(), self.mean)
        if self.log_spread is None:
            return Scores(mean, torch.zeros_like(mean))
        return Scores(mean, torch.einsum("brd,rd->br", states.float(), self.log_spread).clamp(-6, 6).exp())


class VlmReward(nn.Module):
    """A vision-language model with dimension tokens and a head: a `Scorer`, in calibrated log-odds like the small reward model.

    Takes `base` over: its tokenizer gets the dimensions' tokens, its network LoRA of `rank` and `alpha` (and NF4 weights with `nf4`). `clip_fps` is the true frame
    rate of the clips that `forward` is given. `rubric` is what is read after the clip, `rubric_of(dimensions)` if none is given. With `spread` the head also tells its
    own doubt. `keeps_vision`: the vision tower is not the base's and belongs to what was learned. `most_clips`: K of the largest ranking, for the tie parameters.
    `center` and `scale` are the mean and standard deviation of the score over the training clips: constants for a mixture, not applied here.
    """

    differentiable = True
    temperature: Tensor
    center: Tensor
    scale: Tensor

    def __init__(
        self,
        base: Base,
        dimensions: Sequence[Dimension],
        *,
        sampler: FrameSampler,
        clip_fps: float,
        rubric: str | None = None,
        rank: int = 16,
        alpha: float = 32.0,
        nf4: bool = False,
        spread: bool = False,
        keeps_vision: bool = False,
        positions: Positions = "grid",
        most_clips: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.base, self.dimensions, self.sampler, self.clip_fps = base, tuple(dimensions), sampler, clip_fps
        self.dims = tuple(d.name for d in dimensions)
        self.tokens = tuple(d.token for d in dimensions)
        self.rubric = rubric if rubric is not None else rubric_of(dimensions)
        self.rank, self.alpha, self.nf4, self.keeps_vision, self.positions = rank, alpha, nf4, keeps_vision, positions
        check_rubric(self.rubric, self.tokens)
        self.token_ids = add_tokens(base, self.tokens, self.dims)
        if nf4:
            to_nf4(base.network, LANGUAGE_LINEARS)
        self.network = add_lora(base.network, rank=rank, alpha=alpha, targets=LANGUAGE_LINEARS, token_rows=self.token_ids, seed=seed)
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # small steps vanish in bf16
        self._takes_seconds = "second_per_grid_ts" in inspect.signature(base.network.forward).parameters
        self.head = Head(len(self.dims), base.network.config.text_config.hidden_size, spread=spread)
        self.log_tie = nn.Parameter(torch.full((len(self.dims), most_clips - 1), -1.0))  # [R,K-1] see ranking.davidson_luce
        for name, value in (("temperature", 1.0), ("center", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((len(self.dims),), value))

    def forward(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1] at `clip_fps`, one prompt a clip -> scores [B,R] where the clips are; nan for a clip with pixels that are not finite."""
        if len(video) != len(prompts):
            raise ValueError(f"{len(video)} clips and {len(prompts)} prompts: give one prompt a clip")
        usable = torch.isfinite(video).flatten(1).all(-1)  # [B]
        video = torch.where(usable[:, None, None, None, None], video, 0.5)
        chunks = [slice(i, i + CLIPS_AT_ONCE) for i in range(0, len(video), CLIPS_AT_ONCE)]
        parts = [self.scores(video[chunk], prompts[chunk], [self.clip_fps] * len(video[chunk])) for chunk in chunks]
        mean, spread = ((torch.cat(values) / self.temperature).to(video.device).masked_fill(~usable[:, None], torch.nan) for values in zip(*parts, strict=True))
        return Scores(mean, spread)

    def scores(self, videos: Sequence[Tensor] | Tensor, prompts: Sequence[str], fps: Sequence[float]) -> Scores:
        """B clips [T,3,H,W] of any sizes and rates -> uncalibrated scores [B,R], all of them in one forward of the language model."""
        return self.read(self.inputs(videos, prompts, fps))

    def read(self, inputs: Mapping[str, Tensor]) -> Scores:
        """What `inputs` gives -> uncalibrated scores [B,R]: the hidden states at the dimensions' tokens, through the head."""
        hidden = self.network(**inputs, use_cache=False).last_hidden_state  # [B,L,D]
        at = inputs["input_ids"][:, None, :] == torch.tensor(self.token_ids, device=hidden.device)[:, None]  # [B,R,L]
        where = at.int().argmax(-1)  # [B,R]
        scores: Scores = self.head(hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1])))
        return scores

    def inputs(self, videos: Sequence[Tensor] | Tensor, prompts: Sequence[str], fps: Sequence[float]) -> dict[str, Tensor]:
        """What transformers' model takes, padded on the right. Raises UserError as `read_clip` does."""
        device, form, tokenizer = self.head.mean.device, self.base.patches, self.base.tokenizer
        clips = [read_clip(video.to(device), rate, self.sampler, form) for video, rate in zip(videos, fps, strict=True)]
        texts = [chat_text(self.rubric, self.tokens, clip, form.merge, timestamps=self.base.family == "qwen3_vl") for clip in clips]
        rows = [torch.tensor(encode(tokenizer, text, prompt)) for text, prompt in zip(texts, prompts, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0).to(device)  # [B,L]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long(),
            "mm_token_type_ids": 2 * (ids == self.base.network.config.video_token_id).int(),  # 2 is transformers' number for video
            "pixel_values_videos": torch.cat([clip.values for clip in clips]),
            "video_grid_thw": torch.tensor([clip.grid for clip in clips], device=device),
        }
        if self._takes_seconds:
            inputs["second_per_grid_ts"] = torch.tensor([clip.seconds for clip in clips], device=device)
        if self.positions == "flat":
            inputs["position_ids"] = torch.arange(ids.shape[1], device=device).expand(3, len(ids), -1)  # [3,B,L]
        return inputs

    def recompute(self) -> None:
        """From now on, until `eval`, a backward pass computes the activations of the language model's layers again: less memory, the same gradients."""
        language = self.base.network.language_model
        language.activation_checkpointing_enable({"use_reentrant": False})
        for layer in language.layers:
            layer.training = True  # transformers asks this of the layer alone; what is inside it, dropout too, stays as it is

    def learned(self) -> dict[str, Tensor]:
        """All that training changed, by name; of the base nothing, but the vision tower where it is not the base's (`keeps_vision`)."""
        return {name: value for name, value in self.state_dict().items() if self._is_learned(name)}

    def load_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `learned`. Raises ValueError where names or shapes are others."""
        own = self.learned()
        wrong = sorted(name for name in {*own, *tensors} if name not in own or name not in tensors or own[name].shape != tensors[name].shape)
        if wrong:
            raise ValueError(f"not what this model learns: {wrong[0]}")
        self.load_state_dict(dict(tensors), strict=False)

    def _is_learned(self, name: str) -> bool:
        vision = self.keeps_vision and ".visual." in name
        return not name.startswith("network.") or ".lora_" in name or "trainable_tokens_delta" in name or vision


@dataclass(frozen=True)
class Learned:
    """What a model learned, as a checkpoint keeps it: without the base."""

    model: VlmReward

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.learned()

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        self.model.load_learned(state)


def add_tokens(base: Base, tokens: Sequence[str], names: Sequence[str]) -> list[int]:
    """Teaches tokenizer and embedding one token a dimension; its row begins at the mean of the rows of the dimension's name. Returns the ids."""
    from transformers import AddedToken

    base.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = [int(base.tokenizer.convert_tokens_to_ids(token)) for token in tokens]
    if max(ids) >= base.network.get_input_embeddings().num_embeddings:
        base.network.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    rows = base.network.get_input_embeddings().weight.data
    for i, name in zip(ids, names, strict=True):
        rows[i] = rows[base.tokenizer(name.replace("_", " "), add_special_tokens=False)["input_ids"]].float().mean(0)
    return ids
