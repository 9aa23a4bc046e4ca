"""Attention over packed sequences and the rotary positions of video tokens.

Three back ends give the same numbers. The loop over segments is exact everywhere, the fastest on a CPU, and what the others are tested against; `varlen` is torch's flash
attention for packed sequences (CUDA, half precision); `flex` compiles a kernel that skips other clips (CUDA in any precision; on a CPU without gradient). On a GPU of Hopper's or
a later kind the loop runs cuDNN's kernel, which is faster than flash's by more than the loop loses between few long clips.

Letters: S segments, N query tokens, M key tokens, h heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from base_model.networks.packing import Segments

Backend = Literal["loop", "varlen", "flex"]
HALF = (torch.float16, torch.bfloat16)
BLOCK = 128  # rows and columns of a tile that flex computes or skips as a whole
CUDNN_FROM = 2300
"""Tokens of a clip from which on cuDNN's kernel saves more than starting it once more in the loop costs. On an H200 with 12 heads of 128, forward and backward, 1 x 32,760 tokens
take 43 ms against 71 of `varlen`, 12 of 2,100 to 4,000 6.0 against 8.5, 64 x 512 1.2 against 1.9, but 40 of 300 to 1,200 7.5 against 2.5. A length seen first costs 0.1 s more."""
_forced: list[Backend] = []


def packed_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Every query attends to the keys of its own segment only; an N x M mask is never built.

    q [N,h,d], k and v [M,h,d] -> [N,h,d] in the precision of v. Raises ValueError where a back end that was asked for cannot compute this.
    """
    return _attend(q, k, v, queries, keys)


def _by_segments(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    q, k = q.to(v.dtype), k.to(v.dtype)
    name = _forced[-1] if _forced else automatic_backend(v, queries, keys)
    if (why := _hindrance(name, q, k, v)) is not None:
        raise ValueError(f"attention back end {name!r} {why}, got {str(v.dtype).removeprefix('torch.')} on {v.device.type}. Use 'loop'")
    return BACKENDS[name](q, k, v, queries, keys)


_attend = _by_segments


def leave_out_of_graphs() -> None:
    """From now on compiled blocks call `packed_attention` between their graphs: lengths of clips are numbers in a graph, so there would be another one for every pack."""
    global _attend
    _attend = torch.compiler.disable(_by_segments)


@contextmanager
def attention_backend(name: Backend) -> Iterator[None]:
    """Inside, every `packed_attention` of this process uses this back end, in all threads."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def automatic_backend(v: Tensor, queries: Segments, keys: Segments) -> Backend:
    """`varlen` where it can run, but the loop where cuDNN has enough to do in each of its calls; else the loop. `flex` is never chosen by itself: it compiles first, for most of a
    minute."""
    if _hindrance("varlen", v, v, v):
        return "loop"
    work = sum(n * m for n, m in zip(queries.lengths, keys.lengths, strict=True))
    return "loop" if _has_cudnn(v.device) and work >= len(queries.stretches) * CUDNN_FROM**2 else "varlen"


def _has_cudnn(device: torch.device) -> bool:
    """Whether torch's dense attention runs cuDNN's kernel there."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _hindrance(name: Backend, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this back end cannot compute these inputs; None where it can."""
    if name == "varlen":
        fits = v.is_cuda and v.dtype in HALF and v.shape[-1] % 8 == 0 and v.shape[-1] <= 256 and torch.cuda.get_device_capability(v.device) >= (8, 0)
        return None if fits else "needs CUDA of compute capability 8 or more, half precision and heads of 8, 16, ... 256"
    if name == "flex" and not v.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "has no gradient outside CUDA"
    return None


# The loop


def _loop(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Segments of one length that follow each other run as one dense batch, so a dense batch costs one call and a mixed pack one call per length.

    Keys of different lengths under equal queries (texts) are padded and masked.
    """
    out = []
    runs = zip(queries.stretches, _runs(q, queries, queries), _runs(k, keys, queries), _runs(v, keys, queries), strict=True)
    for (first, last, length), q_rows, k_rows, v_rows in runs:
        q_run = q_rows.unflatten(0, (last - first, length)).transpose(1, 2)  # [s,h,n,d]
        k_run, mask = _batched(k_rows, keys.lengths[first:last])  # [s,h,m,d], [s,1,1,m] or None
        v_run, _ = _batched(v_rows, keys.lengths[first:last])  # [s,h,m,d]
        attended = scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask)  # [s,h,n,d]
        out.append(attended.transpose(1, 2).flatten(0, 1))  # [s n,h,d]
    return out[0] if len(out) == 1 else torch.cat(out)


def _runs(x: Tensor, segments: Segments, queries: Segments) -> Sequence[Tensor]:
    """Tokens of each stretch of the queries: one split, whose backward pass is one concatenation, where that of slices would be a sum of as many tensors of the whole's size."""
    sizes = [segments.offsets[last] - segments.offsets[first] for first, last, _ in queries.stretches]
    return (x,) if len(sizes) == 1 else x.split(sizes)


def _batched(rows: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    if len(set(lengths)) == 1:
        return rows.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2), None
    longest = max(lengths)
    padded = torch.stack([pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in rows.split(list(lengths))])  # [s,m,h,d]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [s,m]
    return padded.transpose(1, 2), mask[:, None, None].to(rows.device)


# Flash attention of packed sequences


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, _offsets(queries, v.device), _offsets(keys, v.device), max(queries.lengths), max(keys.lengths))  # [N,h,d]
    assert isinstance(out, Tensor)
    return out


@lru_cache(maxsize=64)
def _offsets(segments: Segments, device: torch.device) -> Tensor:
    """[S+1] int32, copied to the device once."""
    return torch.tensor(segments.offsets, dtype=torch.int32, device=device)


# Flex attention


def _flex(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    dense = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1,h,N,d], [1,h,M,d] twice
    return _compiled_flex()(*dense, block_mask=document_mask(queries, keys, v.device))[0].transpose(0, 1)  # [N,h,d]


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def document_mask(queries: Segments, keys: Segments, device: torch.device) -> Any:
    """flex's `BlockMask` of one document a segment. A tile of queries meets the tiles of keys from its first segment to its last one, so the list of tiles comes from the
    offsets alone: torch's own `create_block_mask` would fill an N x M mask first."""
    from torch.nn.attention.flex_attention import BlockMask

    begins = torch.arange(0, queries.total, BLOCK)  # [tiles of queries]
    ends = (begins + BLOCK).clamp(max=queries.total) - 1
    offsets = torch.tensor(keys.offsets)  # [S+1]
    first = offsets[queries.ids[begins]] // BLOCK
    behind = (offsets[queries.ids[ends] + 1] + BLOCK - 1) // BLOCK
    every = torch.arange((keys.total + BLOCK - 1) // BLOCK)  # [tiles of keys]
    column = (first[:, None] + every).clamp(max=len(every) - 1)  # only the first `behind - first` of a row are read
    query_ids, key_ids = queries.ids.to(device), keys.ids.to(device)

    def same_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query_ids[query] == key_ids[key]

    number, column = (behind - first)[None, None].int().to(device), column[None, None].int().to(device)
    return BlockMask.from_kv_blocks(number, column, BLOCK_SIZE=BLOCK, mask_mod=same_segment, seq_lengths=(queries.total, keys.total))


BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Segments, Segments], Tensor]] = {"loop": _loop, "varlen": _varlen, "flex": _flex}


# Positions


def rotary_table(positions: Tensor, axes: tuple[int, int, int], theta: float = 100.0) -> tuple[Tensor, Tensor]:
    """Factorised 3-D rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34, one block of frequencies per axis).

    positions [N,3] -> cos, sin [N,1,d/2] with d = sum(axes); `theta` is small since the built-in clips are.
    """
    angles = []
    for axis, width in enumerate(axes):
        frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width)  # [width/2]
        angles.append(positions[:, axis, None].float() * frequency)  # [N,width/2]
    angle = torch.cat(angles, dim=-1)[:, None]  # [N,1,d/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (x_i, x_{i+d/2}) of x [N,h,d] by their token's angles, in float32 at least."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)  # [N,h,d/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
