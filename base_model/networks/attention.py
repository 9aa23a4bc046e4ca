"""Attention over packed sequences and the rotary positions of video tokens.

Letters: S segments, N query tokens, M key tokens, h heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from base_model.networks.packing import Segments


def packed_attention(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """Every query attends to the keys of its own segment only.

    q [N,h,d], k and v [M,h,d] -> [N,h,d]. Segments of one length that follow each other run as one dense batch, so a dense batch costs one call and a
    mixed pack one call per length; an N x N mask is never built. Keys of different lengths under equal queries (texts) are padded and masked.
    """
    out = []
    for first, last, length in queries.stretches:
        number = last - first
        q_run = q[queries.offsets[first] : queries.offsets[last]].unflatten(0, (number, length)).transpose(1, 2)  # [s,h,n,d]
        k_run, mask = _batched(k, keys, first, last)  # [s,h,m,d], [s,1,1,m] or None
        v_run, _ = _batched(v, keys, first, last)  # [s,h,m,d]
        attended = scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask)  # [s,h,n,d]
        out.append(attended.transpose(1, 2).flatten(0, 1))  # [s n,h,d]
    return out[0] if len(out) == 1 else torch.cat(out)


def _batched(x: Tensor, segments: Segments, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    lengths = segments.lengths[first:last]
    rows = x[segments.offsets[first] : segments.offsets[last]]
    if len(set(lengths)) == 1:
        return rows.unflatten(0, (last - first, lengths[0])).transpose(1, 2), None
    longest = max(lengths)
    padded = torch.stack([pad(part, (0, 0, 0, 0, 0, longest - len(part))) for part in rows.split(list(lengths))])  # [s,m,h,d]
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [s,m]
    return padded.transpose(1, 2), mask[:, None, None].to(x.device)


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
    """Turns the pairs (x_i, x_{i+d/2}) of x [N,h,d] by their token's angles."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)  # [N,h,d/2] each
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
