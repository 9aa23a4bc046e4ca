"""What a training step costs, counted: a model's own network runs on torch's meta device, which computes nothing, under torch's counter; and what a device can do at most.

Counted are matrix products, convolutions and attention, 2 for a multiplication and an addition; norms, rotations and activations are not. A pass over packed clips costs the sum
of what each of them costs alone. Memory-saving recomputation is no part of it: these are the FLOPs that model-FLOP utilisation (MFU) is told in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from base_model.families.wan_experts import Experts
from base_model.networks.packing import Segments, token_grid
from base_model.tiny import LatentVideoModel, build_network, packed
from base_model.types import Conditioning, Known

PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s as published, SXM."""
META = torch.device("meta")
Shape = tuple[int, int, int, int]
"""[C,F,H,W] of a clip's latents."""
MEASURED_SECONDS = 0.1


class ClipFlops(NamedTuple):
    """Of one clip."""

    forward: int
    trained: int  # forward and backward: of every gradient that what trains needs, once

    @property
    def backward(self) -> int:
        return self.trained - self.forward


class Peak(NamedTuple):
    """FLOP/s of one device."""

    rate: float
    measured: bool  # on this machine just now, with a large matrix product, where it is not published


class FlopCounter:
    """The FLOPs of clips for a model, whatever their sizes and texts.

    Of a transformer they are a polynomial of second degree in n, the tokens of the clip, and L, those of its text: six small clips are counted, and the rest is exact arithmetic.
    Make it before the network is sharded: what trains is what trains then. An adapter's own products are counted, its base's weights get no gradient. Of two experts each clip
    sees one, and both are alike.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._found = replace(model, network=_on_meta(model)), dict[bool, tuple[Polynomial, Polynomial]]()

    def __call__(self, shape: Shape, cond: Conditioning) -> ClipFlops:
        """shape: [C,F,H,W] of its latents; cond: of one clip, anywhere. Raises ValueError for conditions of several."""
        if len(cond) != 1:
            raise ValueError(f"FLOPs are counted a clip at a time, got conditions of {len(cond)}")
        given = cond.known is not None
        if given not in self._found:
            self._found[given] = self._fitted(shape[0], cond)
        n, words = math.prod(token_grid(shape, self._model.patch)), int(cond.mask.sum()) if self._built_in else cond.text.shape[1]
        forward, trained = (each(n, words) for each in self._found[given])
        return ClipFlops(forward, trained)

    @property
    def _built_in(self) -> bool:
        return isinstance(self._model, LatentVideoModel)

    def _fitted(self, channels: int, cond: Conditioning) -> tuple[Polynomial, Polynomial]:
        f, h, w = self._model.patch
        small = [(channels, f, h * rows, w * COLUMNS) for rows in ROWS]  # no network has no places for so few
        found = [self.count(small[i], _text_of(cond, WORDS[k], small[i])) for i, k in LATTICE]
        return Polynomial([each.forward for each in found]), Polynomial([each.trained for each in found])

    def count(self, shape: Shape, cond: Conditioning) -> ClipFlops:
        """What the counter says of one clip as it is, which takes a second and more of a large network."""
        with _as_meta_has_it(), FlopCounterMode(display=False) as counter:
            u = self._velocity(shape, cond)
            forward = counter.get_total_flops()
            if u.requires_grad:
                u.sum().backward()
        return ClipFlops(forward, counter.get_total_flops())

    def _velocity(self, shape: Shape, cond: Conditioning) -> Tensor:
        x, t = torch.empty(1, *shape, device=META), torch.empty(1, device=META)
        if self._built_in:  # how many tokens there are is told by numbers, not by a mask
            words = int(cond.mask.sum())
            found: Tensor = self._model.network(*packed(x, self._model.patch), t, torch.empty(words, cond.text.shape[2], device=META), Segments((words,)))
            return found
        answered: Tensor = self._model(x, t, cond.to(META))
        return answered


ROWS, COLUMNS, WORDS = (1, 2, 3), 2, (8, 16, 24)  # n = rows times columns, and L, of the clips that are counted
LATTICE = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2))  # which of them together: as many as a polynomial of second degree needs


class Polynomial:
    """Of second degree in n and L, through whole numbers at the six points of `LATTICE`; exact."""

    def __init__(self, values: Sequence[int]) -> None:
        v = dict(zip(LATTICE, values, strict=True))
        self._terms = (v[0, 0], v[1, 0] - v[0, 0], v[0, 1] - v[0, 0])
        self._second = (v[2, 0] - 2 * v[1, 0] + v[0, 0], v[1, 1] - v[1, 0] - v[0, 1] + v[0, 0], v[0, 2] - 2 * v[0, 1] + v[0, 0])

    def __call__(self, n: int, words: int) -> int:
        """Newton's form on a lattice of equal steps."""
        x, y = Fraction(n, COLUMNS) - ROWS[0], Fraction(words - WORDS[0], WORDS[1] - WORDS[0])
        base, along_n, along_words = self._terms
        quadratic, mixed, of_words = self._second
        return round(base + along_n * x + along_words * y + quadratic * x * (x - 1) / 2 + mixed * x * y + of_words * y * (y - 1) / 2)


def peak_flops(device: torch.device) -> Peak:
    """What the device reaches at most: as published for dense bfloat16, else measured: a product of large matrices, in float32 on a CPU and in bfloat16 elsewhere, for 100 ms."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for kind, rate in PEAKS.items():
            if kind in name:
                return Peak(rate, measured=False)
    side, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    (a @ b).sum().item()  # the first is slower, and is waited for
    products, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < MEASURED_SECONDS:
        (a @ b)[0, 0].item()
        products += 1
    return Peak(products * 2 * side**3 / spent, measured=True)


@contextmanager
def _as_meta_has_it() -> Iterator[None]:
    """What Mochi asks of a device and the meta device has not: autocast, and where a mask is true, which is taken to be everywhere: its texts count in their padded length."""
    from torch.fx.experimental import _config

    with mock.patch("torch.autocast", lambda *_, **__: nullcontext()), mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True):
        yield


def _on_meta(model: Any) -> Any:
    """Another network of the same class and configuration, without weights, with an adapter where there is one; what trains there trains here."""
    network: Any = model.network
    wrapped = hasattr(network, "peft_config")
    base = network.get_base_model() if wrapped else network
    base = base.transformer if isinstance(base, Experts) else base
    with META:
        bare: nn.Module = build_network(model.config) if isinstance(model, LatentVideoModel) else type(base).from_config(dict(base.config))
        if wrapped:
            bare = _with_adapter(bare, network)
    trains = {name.removeprefix("transformer."): parameter.requires_grad for name, parameter in network.named_parameters()}
    for name, parameter in bare.named_parameters():
        parameter.requires_grad_(trains.get(name, trains.get(name.replace("base_model.model.", "base_model.model.transformer.", 1), False)))
    return bare.eval()


def _with_adapter(bare: nn.Module, network: Any) -> nn.Module:
    from peft import get_peft_model

    config = next(iter(network.peft_config.values()))
    return get_peft_model(bare, replace(config))


def _text_of(cond: Conditioning, words: int, shape: Shape) -> Conditioning:
    """Conditions of the same kind, with so many tokens of text, for a clip of that shape."""
    text, mask = cond.text.new_empty(1, words, cond.text.shape[2], device=META), torch.ones(1, words, dtype=torch.bool)
    known = None if cond.known is None else Known(torch.empty(1, *shape, device=META), torch.empty(1, *shape[1:], dtype=torch.bool, device=META))
    return Conditioning(cond.prompts, text, mask, cond.pooled, known, cond.image)
