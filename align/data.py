"""Which clips make up which batch: a pure function of the seed and the iteration, so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from base_model.networks.packing import first_fit_decreasing


class PackSampler:
    """Packs of at most `capacity` tokens over endless epochs; every clip occurs exactly once an epoch, in the same pack only with clips of its window.

    `sampler[i]` is the list of clip indices of iteration i. Windows of `window` shuffled clips are packed by first-fit decreasing, then the packs are shuffled.
    """

    def __init__(self, lengths: Sequence[int], capacity: int, *, seed: int, window: int = 192) -> None:
        if not lengths:
            raise ValueError("no clips to sample from")
        self.lengths, self.capacity, self.seed, self.window = list(lengths), capacity, seed, window
        self._packs: list[list[int]] = []
        self._epochs = 0

    def __getitem__(self, iteration: int) -> list[int]:
        while len(self._packs) <= iteration:
            self._packs.extend(self._epoch(self._epochs))
            self._epochs += 1
        return self._packs[iteration]

    def _epoch(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths)).tolist()
        packs = []
        for begin in range(0, len(order), self.window):
            clips = order[begin : begin + self.window]
            packs += [[clips[j] for j in pack] for pack in first_fit_decreasing([self.lengths[c] for c in clips], self.capacity)]
        return [packs[j] for j in rng.permutation(len(packs))]


class PromptSampler:
    """Batches of `batch` indices out of `number` over endless shuffled epochs; `sampler[i]` is the batch of iteration i."""

    def __init__(self, number: int, batch: int, *, seed: int) -> None:
        if number < 1 or batch < 1:
            raise ValueError(f"cannot draw batches of {batch} out of {number}")
        self.number, self.batch, self.seed = number, batch, seed

    def __getitem__(self, iteration: int) -> list[int]:
        begin = iteration * self.batch
        return [self._order(k // self.number)[k % self.number] for k in range(begin, begin + self.batch)]

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.number).tolist()
        return order
