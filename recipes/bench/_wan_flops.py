"""FLOPs of Wan's matrix products (2 for a multiplication and an addition) in closed form: of a forward pass, and of what a backward pass has to compute.

Counted are linears, the patch convolution and the two products of attention; norms, rotations and activations are not. Wan's configuration is that of `WanTransformer3DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Product(NamedTuple):
    """One matrix product of a forward pass. A backward pass computes as much again for each factor that has a gradient."""

    flops: int
    gradients: int  # factors with a gradient: 0, 1 or 2
    in_block: bool  # where checkpointing computes it a second time


class StepFlops(NamedTuple):
    """FLOPs of one training step."""

    forward: int
    backward: int
    recomputed: int  # the forward pass of the blocks whose activations are checkpointed

    @property
    def model(self) -> int:
        return self.forward + self.backward


def step_flops(config: Mapping[str, Any], tokens: int, *, text_tokens: int, lora_rank: int = 0, clips: int = 1, checkpointed: int = 0) -> StepFlops:
    """A training step over `clips` clips of `tokens` tokens. lora_rank: of adapters on the attention projections, base frozen; 0 trains all. checkpointed: how many blocks."""
    found = list(_products(config, tokens, text_tokens, lora_rank))
    forward, backward = sum(p.flops for p in found), sum(p.flops * p.gradients for p in found)
    in_blocks = sum(p.flops for p in found if p.in_block)
    return StepFlops(clips * forward, clips * backward, clips * in_blocks * checkpointed // config["num_layers"])


def _products(config: Mapping[str, Any], n: int, text: int, rank: int) -> Iterator[Product]:
    w = config["num_attention_heads"] * config["attention_head_dim"]
    patch = math.prod(config["patch_size"])
    trains = not rank

    def linear(rows: int, into: int, out: int, *, moves: bool, block: bool = True) -> Product:
        """moves: whether its input has a gradient."""
        return Product(2 * rows * into * out, trains + moves, block)

    def projection(rows: int, *, moves: bool) -> Iterator[Product]:
        """An attention projection, with its adapter where there is one."""
        yield linear(rows, w, w, moves=moves)
        if rank:
            yield Product(2 * rows * w * rank, 1 + moves, True)
            yield Product(2 * rows * rank * w, 2, True)

    yield linear(n, config["in_channels"] * patch, w, moves=False, block=False)
    yield linear(1, config["freq_dim"], w, moves=False, block=False)
    yield linear(1, w, w, moves=trains, block=False)
    yield linear(1, w, 6 * w, moves=trains, block=False)
    yield linear(text, config["text_dim"], w, moves=False, block=False)
    yield linear(text, w, w, moves=trains, block=False)
    for block in range(config["num_layers"]):
        before = trains or block > 0  # under a frozen base nothing before the first block's projections has a gradient
        for moves in (before, before, before, True):
            yield from projection(n, moves=moves)  # q, k, v, out
        yield Product(4 * n * n * w, 2, True)
        for rows, moves in ((n, True), (text, trains), (text, trains), (n, True)):
            yield from projection(rows, moves=moves)
        yield Product(4 * n * text * w, 2, True)
        yield linear(n, w, config["ffn_dim"], moves=True)
        yield linear(n, config["ffn_dim"], w, moves=True)
    yield linear(n, w, config["out_channels"] * patch, moves=True, block=False)
