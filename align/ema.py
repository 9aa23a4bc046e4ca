"""Exponential moving average of the parameters that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from align.sharding import spread_like


class EMA:
    """average <- d average + (1 - d) parameter, float32, over the named parameters of `network` that require a gradient.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update: a short run is not held back by its start. With `warm_up=False` d is `decay` throughout. Of a sharded network each
    process averages its own part (`sharding.py`); what is loaded is whole.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, *, warm_up: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be in [0, 1), got {decay}")
        self.decay, self.warm_up, self.num_updates = decay, warm_up, 0
        self._names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._averages = [parameter.detach().clone().float() for parameter in self._parameters]
        if not self._names:
            raise ValueError("EMA: the network has no trainable parameter")

    @torch.no_grad()
    def update(self) -> None:
        """Call once after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warm_up else self.decay
        torch._foreach_lerp_(self._averages, [parameter.detach().float() for parameter in self._parameters], 1 - decay)

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Inside, the network runs on the averages; outside on its own parameters again, also after an exception. Do not train inside."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    def apply(self) -> None:
        """Leaves the averages in the network, for good."""
        self._write(self._averages)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """name -> average float32, and `num_updates` []: only tensors, fit for safetensors."""
        return {**dict(zip(self._names, self._averages, strict=True)), "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the names differ."""
        if state.keys() != {*self._names, "num_updates"}:
            differ = sorted(state.keys() ^ {*self._names, "num_updates"})
            raise ValueError(f"EMA state does not fit this network: {len(differ)} names differ, first {differ[0]}")
        self.num_updates = int(state["num_updates"])
        with torch.no_grad():
            for name, average in zip(self._names, self._averages, strict=True):
                average.copy_(spread_like(state[name], average))
