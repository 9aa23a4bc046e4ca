"""From rewards to advantages. An unknown reward is nan: it is left out of every statistic, gets advantage 0, is not `valid`, and is counted.

Letters: B clips, N prompts, G clips a prompt (B = N G; the clips of one prompt lie next to each other).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

METRICS = {
    "advantage/unknown_share": "Share of clips whose reward is unknown (nan) and that were left out.",
    "advantage/zero_std_share": "Share of groups (clips, for per-prompt statistics) whose rewards are all alike, so that they teach nothing.",
    "advantage/group_std": "Mean standard deviation of the reward within a prompt's group, in the reward's unit.",
    "advantage/batch_fallback_share": "Share of clips standardised with the batch because their prompt was seen too rarely.",
}

DivideBy = Literal["group_std", "global_std", "max_group_std", "none"]


class Advantage(NamedTuple):
    """Who did better than expected."""

    advantage: Tensor  # [B]; 0 where not valid
    valid: Tensor  # [B] bool; False where the reward is unknown or has nothing to be compared with
    stats: dict[str, float]


def _in_groups(x: Tensor, group_size: int) -> Tensor:
    """[B] -> [N,G]."""
    if group_size < 2 or len(x) % group_size:
        raise ValueError(f"{len(x)} clips do not make groups of {group_size}: a group has at least two clips and every group the same number")
    return x.reshape(-1, group_size)  # [N,G]


def _masked_mean(x: Tensor, known: Tensor) -> Tensor:
    """Mean over the last axis of the known values; 0 where none is known."""
    return torch.where(known, x, 0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp_min(1)


def _masked_std(x: Tensor, known: Tensor) -> Tensor:
    """Standard deviation (divided by n, not n - 1) over the last axis of the known values."""
    return _masked_mean((x - _masked_mean(x, known)).square(), known).sqrt()


def group_advantage(
    reward: Tensor, group_size: int, *, divide_by: DivideBy = "group_std", clamp: float | None = 5.0, min_std: float = 1e-6
) -> Advantage:
    """GRPO's advantage: (reward - mean of its group) / a standard deviation (Shao et al. 2024, arXiv 2402.03300, 4.1.2). reward [B].

    divide_by: group_std (GRPO); global_std, of all known rewards of the batch, prompts' differences included (Flow-GRPO on images);
    max_group_std, the largest group's (LongCat-Video); none (Dr. GRPO, arXiv 2503.20783). Standard deviations divide by n.
    A group whose std is below `min_std` (unit of the reward) says nothing: its advantages are 0 and it is counted. `clamp` bounds
    |advantage|. Unknown rewards (nan) are masked; a group with fewer than two known rewards is not valid. With several ranks, gather first.
    """
    groups = _in_groups(reward.detach().to(torch.promote_types(reward.dtype, torch.float32)), group_size)  # [N,G]
    known = groups.isfinite()  # [N,G]
    valid = known & (known.sum(1, keepdim=True) >= 2)  # [N,G]
    centred = torch.where(valid, groups - _masked_mean(groups, known), 0)  # [N,G]
    std = _masked_std(groups, known)  # [N,1]
    flat = valid.any(1, keepdim=True) & (std < min_std)  # [N,1]
    scale = _scale(groups, valid, std, divide_by)  # [N,1] or [1,1]
    centred = torch.where(flat, 0, centred / scale.clamp_min(min_std))
    if clamp is not None:
        centred = centred.clamp(-clamp, clamp)
    stats = {
        "advantage/unknown_share": float((~known).float().mean()),
        "advantage/zero_std_share": float(flat.float().mean()),
        "advantage/group_std": float(std[valid.any(1)].mean()) if bool(valid.any()) else float("nan"),
    }
    return Advantage(centred.reshape(-1), valid.reshape(-1), stats)


def _scale(groups: Tensor, valid: Tensor, std: Tensor, divide_by: DivideBy) -> Tensor:
    if divide_by == "group_std":
        return std
    if divide_by == "global_std":
        return _masked_std(groups.reshape(1, -1), valid.reshape(1, -1))  # [1,1]
    if divide_by == "max_group_std":
        return torch.where(valid.any(1, keepdim=True), std, 0).amax(0, keepdim=True)  # [1,1]
    if divide_by == "none":
        return torch.ones_like(std)
    raise ValueError(f"divide_by {divide_by!r} is unknown: use group_std, global_std, max_group_std or none")


def best_and_worst(advantage: Tensor, group_size: int, keep: int, *, valid: Tensor | None = None) -> Tensor:
    """Which clips to train on: of each group the better half of `keep` and the worse half, bool [B] (DanceGRPO's best-of-n, arXiv 2505.07818: 8 of 24).

    advantage, valid [B]. The advantages are those of the whole group: its mean is the baseline of what is kept, too. A clip that is not valid is never kept; where
    fewer are valid, all of those are. Among equals the first ones are the better. Known failure: of normal rewards the outer 8 of 24 carry 80 % of the
    gradient, so their mean is 2.4 times as long as the whole group's; of skewed rewards the kept advantages do not add up to 0.
    Raises ValueError where keep is not in 2 .. group_size.
    """
    groups = _in_groups(advantage.detach(), group_size)  # [N,G]
    if not 2 <= keep <= group_size:
        raise ValueError(f"cannot keep {keep} of {group_size} clips: keep at least 2, a good one and a bad one, and at most the group")
    known = groups.isfinite() if valid is None else groups.isfinite() & valid.reshape(groups.shape)  # [N,G]
    place = groups.where(known, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [N,G] 0 is the best; unknown ones come last
    worst = known.sum(1, keepdim=True) - keep // 2  # [N,1]
    return (known & ((place < keep - keep // 2) | (place >= worst))).reshape(-1)  # [B]


def leave_one_out(value: Tensor, group_size: int) -> Tensor:
    """Mean of the OTHER clips of the same prompt, [B] -> [B] (Kool et al. 2019, RLOO). nan values are left out; nan where no other is known."""
    groups = _in_groups(value, group_size)  # [N,G]
    known = groups.isfinite()
    kept = torch.where(known, groups, 0)
    others = known.sum(1, keepdim=True) - known.long()  # [N,G] how many others are known
    mean = (kept.sum(1, keepdim=True) - kept) / others.clamp_min(1)  # [N,G]
    return torch.where(others > 0, mean, torch.nan).reshape(-1)  # [B]


class PromptStatistics:
    """DDPO's running mean and std per prompt (Black et al. 2023, arXiv 2305.13301, section 4.3; constants of ddpo-pytorch).

    Each prompt keeps its last `buffer_size` known rewards; while it has fewer than `min_count`, the mean and std of the current batch
    stand in. Known failure: until its buffer is filled, a prompt's difficulty looks like an advantage.
    """

    def __init__(self, *, buffer_size: int = 32, min_count: int = 16, clamp: float | None = 5.0, min_std: float = 1e-6) -> None:
        if not 0 < min_count <= buffer_size:
            raise ValueError(f"PromptStatistics: min_count must be in 1..buffer_size, got {min_count} and {buffer_size}")
        self.buffer_size, self.min_count, self.clamp, self.min_std = buffer_size, min_count, clamp, min_std
        self._buffers: dict[int | str, deque[float]] = {}

    def advantage(self, prompt_ids: Sequence[int | str], reward: Tensor) -> Advantage:
        """Add reward [B] to the buffers, then standardise it. -> advantages [B]; unknown rewards (nan) are masked and enter no buffer."""
        reward = reward.detach().to(torch.promote_types(reward.dtype, torch.float32))
        if len(prompt_ids) != len(reward):
            raise ValueError(f"{len(prompt_ids)} prompt ids for {len(reward)} rewards")
        valid = reward.isfinite()  # [B]
        for prompt_id, value in zip(prompt_ids, reward.tolist(), strict=True):
            if value - value == 0:
                self._buffers.setdefault(prompt_id, deque(maxlen=self.buffer_size)).append(value)
        batch = _moments(reward[valid].cpu())
        moments = torch.stack([self._moments(prompt_id, batch) for prompt_id in prompt_ids]).to(reward)  # [B,2]
        flat = moments[:, 1] < self.min_std
        advantage = torch.where(valid & ~flat, (reward - moments[:, 0]) / moments[:, 1].clamp_min(self.min_std), 0)
        if self.clamp is not None:
            advantage = advantage.clamp(-self.clamp, self.clamp)
        fallback = [len(self._buffers.get(prompt_id, ())) < self.min_count for prompt_id in prompt_ids]
        stats = {
            "advantage/unknown_share": float((~valid).float().mean()),
            "advantage/zero_std_share": float(flat.float().mean()),
            "advantage/batch_fallback_share": sum(fallback) / len(fallback),
        }
        return Advantage(advantage, valid, stats)

    def _moments(self, prompt_id: int | str, batch: Tensor) -> Tensor:
        buffer = self._buffers.get(prompt_id, ())
        return _moments(torch.tensor(list(buffer), dtype=torch.float64)) if len(buffer) >= self.min_count else batch

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, in order: fit for JSON, and exact (ids keep their type)."""
        return {"buffers": [[prompt_id, list(values)] for prompt_id, values in self._buffers.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffers = {prompt_id: deque(values, maxlen=self.buffer_size) for prompt_id, values in state["buffers"]}


def _moments(values: Tensor) -> Tensor:
    """-> (mean, std) float64 [2]; zeros where there is nothing."""
    values = values.double()
    return torch.stack([values.mean(), values.std(correction=0)]) if len(values) else values.new_zeros(2)
