"""Which clips make up which batch: a pure function of the seed and the iteration, so a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from base_model.networks.packing import balanced_packs, first_fit_decreasing


class PackSampler:
    """Packs of at most `capacity` tokens over endless epochs; every clip occurs exactly once an epoch, in the same pack only with clips of its window.

    `sampler[i]` is the list of clip indices of iteration i. Windows of `window` shuffled clips are packed by first-fit decreasing, then the packs are shuffled.

    With several `ranks`, `sampler[i]` is the pack of `rank` and `step(i)` those of all. Attention is quadratic in a clip, so packs of equally many tokens may cost twice as much as
    each other: windows are packed to equal cost (`balanced_packs`), packs of similar cost make up a step, steps are shuffled. `costs` are what each clip costs, such as its FLOPs
    (`base_model/flops.py`). Where packs do not divide by ranks, an epoch's last ones share a step with the first ones of the next: at any step, no clip is ahead of another by more
    than one visit.

    About half a pack stays empty at the end of a window: packs 99 % full ask for windows of some hundred packs. In a window of all clips, the same ones meet every epoch.

    buckets: what clips of one pack have in common, one a clip, where a network takes clips of one shape only. The window is then the epoch, so that no bucket leaves more than one
    small pack in it: none is dropped and none waits for others to fill it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        *,
        seed: int,
        window: int = 192,
        ranks: int = 1,
        rank: int = 0,
        costs: Sequence[float] = (),
        buckets: Sequence[Hashable] = (),
    ) -> None:
        """Raises ValueError for no clips, a rank that is none of the ranks, several ranks without one cost a clip, and buckets that are not one a clip."""
        if not lengths:
            raise ValueError("no clips to sample from")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is none of {ranks}")
        if ranks > 1 and len(costs) != len(lengths):
            raise ValueError(f"{ranks} ranks get packs of equal cost, but there are {len(costs)} costs for {len(lengths)} clips: give the FLOPs of each")
        if buckets and len(buckets) != len(lengths):
            raise ValueError(f"{len(buckets)} buckets for {len(lengths)} clips: give one a clip")
        self.lengths, self.capacity, self.seed, self.window = list(lengths), capacity, seed, len(lengths) if buckets else window
        self.ranks, self.rank, self.costs, self.buckets = ranks, rank, list(costs), list(buckets)
        self._steps: list[list[list[int]]] = []
        self._left: list[list[int]] = []
        self._epochs = 0

    def __getitem__(self, iteration: int) -> list[int]:
        return self.step(iteration)[self.rank]

    def step(self, iteration: int) -> list[list[int]]:
        """The packs of all ranks at an iteration. Of fewer packs an epoch than ranks, several epochs make a step."""
        while len(self._steps) <= iteration:
            self._steps.extend(self._epoch(self._epochs))
            self._epochs += 1
        return self._steps[iteration]

    def _epoch(self, epoch: int) -> list[list[list[int]]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths)).tolist()
        windows = [order[begin : begin + self.window] for begin in range(0, len(order), self.window)]
        packs = [[clips[j] for j in pack] for window in windows for clips in self._by_bucket(window) for pack in self._pack(clips)]
        first, steps = ([], [[pack] for pack in packs]) if self.ranks == 1 else self._similar(packs)
        return first + [steps[j] for j in rng.permutation(len(steps))]

    def _by_bucket(self, clips: list[int]) -> list[list[int]]:
        if not self.buckets:
            return [clips]
        found: dict[Hashable, list[int]] = {}
        for clip in clips:
            found.setdefault(self.buckets[clip], []).append(clip)
        return list(found.values())

    def _pack(self, clips: list[int]) -> list[list[int]]:
        lengths = [self.lengths[c] for c in clips]
        return first_fit_decreasing(lengths, self.capacity) if self.ranks == 1 else balanced_packs(lengths, [self.costs[c] for c in clips], self.capacity)

    def _similar(self, packs: list[list[int]]) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
        """An epoch's packs as (the step that the last epoch left incomplete, if any; steps of packs of similar cost). What is left over now is kept."""
        if len(self._left) + len(packs) < self.ranks:
            self._left += packs
            return [], []
        packs = sorted(packs, key=self._cost)
        first = [self._left + self._take(packs, self.ranks - len(self._left), self._mean_cost(self._left))] if self._left else []
        self._left = self._take(packs, len(packs) % self.ranks, self._mean_cost(packs))
        return first, [packs[k : k + self.ranks] for k in range(0, len(packs), self.ranks)]

    def _take(self, packs: list[list[int]], number: int, cost: float) -> list[list[int]]:
        """Removes `number` neighbours from the sorted `packs`: those whose mean cost is nearest to `cost`."""
        begin = min(range(len(packs) - number + 1), key=lambda k: abs(self._mean_cost(packs[k : k + number]) - cost))
        taken, packs[begin : begin + number] = packs[begin : begin + number], []
        return taken

    def _mean_cost(self, packs: list[list[int]]) -> float:
        return sum(map(self._cost, packs)) / max(1, len(packs))

    def _cost(self, pack: list[int]) -> float:
        return sum(self.costs[clip] for clip in pack)


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
