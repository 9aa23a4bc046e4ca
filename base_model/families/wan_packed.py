"""Wan's own transformer over clips of any sizes in one sequence, each with its time, its positions and its text: what it says of each clip alone, in outputs and gradients.

The sequence goes through the network's own layers and blocks, so LoRA, four bits, gradient checkpointing and whatever hangs on them do what they always do. Attention alone
is replaced: by `packed_attention` where it is given `Places` or `Texts`; elsewhere, as in sampling, it stays what it was.

Texts are as long as their `Conditioning` says, 512 tokens by Wan's own encoder: the network looks at the zeros behind a prompt, and equality asks for the same here.
What it costs beside a dense batch of one time a row: every token has six modulation vectors of its own, in float32, as in TI2V, but where all clips are as long as each other.
Checkpointed blocks keep none.

Letters: S clips, N tokens of all clips together, c values of a token, w width of the network, h heads, d width of a head, M text tokens of all clips together, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.families.wan import WanVideoModel
from base_model.families.wan_experts import Experts
from base_model.networks.attention import packed_attention
from base_model.networks.packing import Segments, pack, unpack
from base_model.types import Conditioning


@dataclass(frozen=True)
class Places:
    """What self-attention is told: where each token lies in its clip, as rotary angles, and where clips begin."""

    cos: Tensor  # [N,1,d/2]
    sin: Tensor  # [N,1,d/2]
    segments: Segments

    def turn(self, x: Tensor) -> Tensor:
        """Turns the pairs (x_2i, x_2i+1) of x [N,h,d]."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # [N,h,d/2] each
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Texts:
    """What cross-attention is told: the texts of all clips, and the states of their images where the network takes any."""

    states: Tensor  # [M,w]
    segments: Segments
    image: Tensor | None  # [S,m,w]
    queries: Segments


class PackedProcessor:
    """Attention of a Wan block: packed where it is told `Places` or `Texts`, else `stock`."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    @property
    def _attention_backend(self) -> Any:
        """diffusers' choice of a kernel for dense batches, which it sets from outside."""
        return self.stock._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, name: Any) -> None:
        self.stock._attention_backend = name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Tensor | None = None, rotary_emb: Any = None) -> Tensor:
        if isinstance(rotary_emb, Places):
            found = _self_attention(attn, hidden_states.flatten(0, 1), rotary_emb)  # [N,w]
        elif isinstance(encoder_hidden_states, Texts):
            found = _cross_attention(attn, hidden_states.flatten(0, 1), encoder_hidden_states)  # [N,w]
        else:
            dense: Tensor = self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return dense
        out: Tensor = attn.to_out[1](attn.to_out[0](found))
        return out.unflatten(0, hidden_states.shape[:2])  # as it came, [1,N,w] or [S,n,w]


def _heads(x: Tensor, attn: Any) -> Tensor:
    """[N,w] -> [N,h,d]."""
    return x.unflatten(-1, (attn.heads, -1))


def _self_attention(attn: Any, x: Tensor, places: Places) -> Tensor:
    q, k = (places.turn(_heads(norm(linear(x)), attn)) for norm, linear in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))  # [N,h,d] each
    return packed_attention(q, k, _heads(attn.to_v(x), attn), places.segments, places.segments).flatten(1)  # [N,w]


def _cross_attention(attn: Any, x: Tensor, texts: Texts) -> Tensor:
    q, k = _heads(attn.norm_q(attn.to_q(x)), attn), _heads(attn.norm_k(attn.to_k(texts.states)), attn)  # [N,h,d], [M,h,d]
    found = packed_attention(q, k, _heads(attn.to_v(texts.states), attn), texts.queries, texts.segments)  # [N,h,d]
    if texts.image is not None:
        seen, segments = texts.image.flatten(0, 1), Segments.equal(*texts.image.shape[:2])  # [S m,w]
        k, v = _heads(attn.norm_added_k(attn.add_k_proj(seen)), attn), _heads(attn.add_v_proj(seen), attn)  # [S m,h,d] each
        found = found + packed_attention(q, k, v, texts.queries, segments)
    return found.flatten(1)  # [N,w]


class PackedWan(nn.Module):
    """A Wan transformer that is called on a packed sequence, as `DiT` is; the weights are those of `network`, which goes on to work by itself too.

    network: `WanTransformer3DModel`, or peft's wrapper of it. Raises UserError for one that is no single transformer, or whose projections are fused.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        if isinstance(self.core, Experts):
            raise UserError("two experts cannot share a packed sequence: each clip goes through one of them. Pack for transformer or transformer_2 alone")
        for attn in (attn for block in self.core.blocks for attn in (block.attn1, block.attn2)):
            if attn.fused_projections:
                raise UserError("this Wan's projections are fused, and packs go through them one by one. Call unfuse_qkv_projections() first")
            if not isinstance(attn.processor, PackedProcessor):
                attn.set_processor(PackedProcessor(attn.processor))

    @property
    def core(self) -> Any:
        """The transformer itself."""
        unwrap = getattr(self.network, "get_base_model", None)
        return self.network if unwrap is None else unwrap()

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, image: Tensor | None = None) -> Tensor:
        """tokens [N,c] by `pack`, positions [N,3], t [S] or [N], text [M,D], image [S,m,E] -> velocity [N,c'], float32. c and c' are as many channels as go in and come out."""
        core, dtype, patch = self.core, self.core.dtype, self.core.config.patch_size
        level, row = (t, segments.ids.to(t.device)) if len(t) == len(segments) else t.unique(return_inverse=True)  # [R], [N]
        image = None if image is None else image.to(dtype)
        time, modulation, states, image = core.condition_embedder(1000 * level, text.to(dtype), image)  # [R,w], [R,6w], [M,w], [S,m,w]
        modulation, ends = modulation.unflatten(1, (6, -1)), core.scale_shift_table + time[:, None]  # [R,6,w], [R,2,w]
        x = core.patch_embedding(_in_a_row(tokens.to(dtype), patch)).flatten(2).transpose(1, 2).contiguous()  # [1,N,w]
        if len(t) == len(segments) and len(segments.stretches) == 1:  # clips as long as each other, a time each: a batch, whose tokens share their clip's vectors
            x, ends = x[0].unflatten(0, (len(segments), -1)), ends[:, None]  # [S,n,w], [S,1,2,w]
        else:
            modulation, ends = modulation[row][None], ends[row][None]  # [1,N,6,w], [1,N,2,w]
        beside = Texts(states, text_segments, image, segments), modulation, _places(core.rope, positions, segments)
        again = core._gradient_checkpointing_func if core.gradient_checkpointing and torch.is_grad_enabled() else None
        for block in core.blocks:
            x = block(x, *beside) if again is None else again(block, x, *beside)  # [1,N,w] or [S,n,w]
        shift, scale = ends.unbind(2)
        u = core.proj_out((core.norm_out(x.float()) * (1 + scale) + shift).to(x.dtype)).flatten(0, 1)  # [N,c'] channels last
        return u.float().unflatten(1, (*patch, -1)).movedim(-1, 1).flatten(1)  # [N,c']


def _in_a_row(tokens: Tensor, patch: Sequence[int]) -> Tensor:
    """[N,c] -> [1,C,pf,ph,N pw]: the patches side by side, which a convolution cuts apart again, several times as fast as N images of one patch."""
    return tokens.unflatten(1, (-1, *patch)).permute(1, 2, 3, 0, 4).flatten(3)[None]


def _places(rope: Any, positions: Tensor, segments: Segments) -> Places:
    """The rows of Wan's own table of angles, one axis after another; it holds every value twice."""

    def at(table: Tensor) -> Tensor:
        parts = table.split([rope.t_dim, rope.h_dim, rope.w_dim], dim=1)  # [largest,d_axis] each
        return torch.cat([part[place] for part, place in zip(parts, positions.long().to(table.device).unbind(1), strict=True)], dim=1)[:, None, ::2]  # [N,1,d/2]

    return Places(at(rope.freqs_cos), at(rope.freqs_sin), segments)


# Clips


def packed_velocity(network: PackedWan, model: WanVideoModel, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
    """u [C,F,H,W] of S clips x_t [C,F,H,W], times t [S] and conditions of one clip each: `model(x_t[k][None], t[k : k + 1], conds[k])[0]`, in one pass.

    network: that of `model`. Visual prompts are told as `model` tells them. Raises ValueError where there are not as many clips as times and conditions.
    """
    patch, clips = tuple(network.core.config.patch_size), list(zip(x_t, t, conds, strict=True))
    asked = [_asked(model, *clip) for clip in clips]
    packed = pack([latents for latents, _ in asked], patch)
    times = [times for _, times in asked]
    if any(len(some) > 1 for some in times):
        times = [some.expand(n) for some, n in zip(times, packed.segments.lengths, strict=True)]  # [n] each
    level = torch.cat(times)  # [S], or [N] where a clip has more than one
    texts, images = zip(*(model.states(cond) for cond in conds), strict=True)  # [1,L,D], and [1,m,E] or None
    text, text_segments = torch.cat([one[0] for one in texts]), Segments(tuple(one.shape[1] for one in texts))  # [M,D]
    image = None if images[0] is None else torch.cat(images)  # [S,m,E]
    tokens = network(packed.tokens, packed.positions.to(level.device), packed.segments, level, text, text_segments, image)  # [N,c']
    return [_answered(model, u, *clip) for u, clip in zip(unpack(tokens, x_t, patch), clips, strict=True)]


def _asked(model: WanVideoModel, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """What the model would ask its network about a clip: latents [C',F,H,W], and one time [1] or one a token [n]."""
    asked: list[tuple[Tensor, Tensor]] = []

    def ask(x: Tensor, times: Tensor) -> Tensor:
        asked.append((x[0], times.flatten()))
        return torch.zeros_like(x_t)[None]

    model.through(ask, x_t[None], t[None], cond)
    return asked[0]


def _answered(model: WanVideoModel, u: Tensor, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """What the model makes of the network's answer u [C,F,H,W]."""
    return model.through(lambda x, times: u[None], x_t[None], t[None], cond)[0]
