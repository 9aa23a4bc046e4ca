"""From rewards to advantages. An unknown reward is nan: it is left out of every statistic, gets advantage 0, is not `valid`, and is counted.

Which clips are compared is said by `groups`: the number of clips of each prompt, which then lie side by side, or an integer id for each clip [B], in any order
and groups of any size. Ids are numbers, never the prompt's text: two prompts may share their words.
Letters: B clips, N groups (prompts), G clips of the largest group, R reward dimensions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

METRICS = {
    "advantage/unknown_share": "Share of clips whose reward is unknown (nan) and that were left out.",
    "advantage/zero_std_share": "Share of groups (clips, for per-prompt statistics) whose rewards are all alike, so that they teach nothing.",
    "advantage/group_std": "Mean standard deviation of the reward within a prompt's group, in the reward's unit.",
    "advantage/batch_fallback_share": "Share of clips standardised with the batch because their prompt was seen too rarely.",
}

ROUNDING = 1e-6
"""An advantage, in standard deviations, that is no more than this is what is left of 0."""
DivideBy = Literal["group_std", "global_std", "max_group_std", "none"]
Groups = int | Tensor  # clips of each prompt, side by side; or an integer id for each clip [B]


class Advantage(NamedTuple):
    """Who did better than expected."""

    advantage: Tensor  # [B]; 0 where not valid
    valid: Tensor  # [B] bool; False where the reward is unknown or has nothing to be compared with
    stats: dict[str, float]


@dataclass(frozen=True)
class Grouping:
    """B clips as a table with a row a group. Where groups have ids, rows are in the order of the ids, and short rows end in nan."""

    rows: int  # N
    columns: int  # G
    place: Tensor | None  # [B] cell of each clip; None where the clips fill the table in their own order

    def fill(self, x: Tensor) -> Tensor:
        """[B] -> [N,G]; a bool becomes a float. Cells without a clip are nan."""
        x = x if x.is_floating_point() else x.float()
        if self.place is None:
            return x.reshape(self.rows, self.columns)
        return x.new_full((self.rows * self.columns,), torch.nan).scatter(0, self.place, x).reshape(self.rows, self.columns)

    def read(self, table: Tensor) -> Tensor:
        """[N,G], or [N,1] (one value for each clip of a row) -> [B]."""
        cells = table.expand(self.rows, self.columns).reshape(-1)
        return cells if self.place is None else cells[self.place]

    def all(self, flags: Tensor) -> Tensor:
        """Whether every clip of a group is True, bool [B] -> [N,1]."""
        return (self.fill(flags) != 0).all(1, keepdim=True)


def grouping(x: Tensor, groups: Groups) -> Grouping:
    """How x [B] lies in its groups. Raises ValueError where x does not divide into groups of at least two, or the ids are not one integer a clip."""
    if isinstance(groups, int):
        if groups < 2 or len(x) % groups:
            raise ValueError(f"{len(x)} clips do not make groups of {groups}: a group has at least two clips and every group the same number")
        return Grouping(len(x) // groups, groups, None)
    if groups.shape != (len(x),) or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(f"{len(x)} clips need as many integer group ids, got {groups.dtype} {list(groups.shape)}")
    _, row, sizes = groups.to(x.device).unique(return_inverse=True, return_counts=True)  # [B], [N]
    order = row.argsort(stable=True)  # [B] clips, group after group
    column = torch.arange(len(x), device=x.device) - (sizes.cumsum(0) - sizes)[row[order]]  # [B]
    largest = int(sizes.max()) if len(sizes) else 0
    return Grouping(len(sizes), largest, torch.empty_like(row).scatter(0, order, row[order] * largest + column))


def _masked_mean(x: Tensor, known: Tensor) -> Tensor:
    """Mean over the last axis of the known values; 0 where none is known."""
    return torch.where(known, x, 0).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp_min(1)


def _masked_std(x: Tensor, known: Tensor) -> Tensor:
    """Standard deviation (divided by n, not n - 1) over the last axis of the known values."""
    return _masked_mean((x - _masked_mean(x, known)).square(), known).sqrt()


class _Centred(NamedTuple):
    """Rewards of N groups, less their group's mean and scaled."""

    value: Tensor  # [N,G]; 0 where not valid or flat
    valid: Tensor  # [N,G] bool
    std: Tensor  # [N,1]
    flat: Tensor  # [N,1] bool, whether a group's rewards are known and all alike


def _centre(table: Tensor, divide_by: DivideBy, min_std: float) -> _Centred:
    known = table.isfinite()  # [N,G]
    valid = known & (known.sum(1, keepdim=True) >= 2)  # [N,G]
    centred = torch.where(valid, table - _masked_mean(table, known), 0)  # [N,G]
    std = _masked_std(table, known)  # [N,1]
    flat = valid.any(1, keepdim=True) & (std < min_std)  # [N,1]
    scale = _scale(table, valid, std, divide_by)  # [N,1] or [1,1]
    return _Centred(torch.where(flat, 0, centred / scale.clamp_min(min_std)), valid, std, flat)


def group_advantage(
    reward: Tensor, groups: Groups, *, divide_by: DivideBy = "group_std", clamp: float | None = 5.0, min_std: float = 1e-6, drop_flat: bool = False
) -> Advantage:
    """GRPO's advantage: (reward - mean of its group) / a standard deviation (Shao et al. 2024, arXiv 2402.03300, 4.1.2). reward [B].

    divide_by: group_std (GRPO); global_std, of all known rewards of the batch, prompts' differences included (Flow-GRPO on images);
    max_group_std, the largest group's (LongCat-Video, arXiv 2510.22200); none (Dr. GRPO, arXiv 2503.20783). Standard deviations divide by n.
    A group whose std is below `min_std` (unit of the reward) says nothing: its advantages are 0 and it is counted. With `drop_flat` its clips are not valid
    either: objectives are means over valid clips, so that the others weigh more (DAPO's filter, arXiv 2503.14476, eq. 11). Leave it False where a cost joins
    the reward, or a KL term should see every clip. `clamp` bounds |advantage|. Unknown rewards (nan) are masked; a group with fewer than two known rewards is
    not valid. With several ranks, gather first.
    """
    cells = grouping(reward, groups)
    scores = _centre(cells.fill(_wide(reward)), divide_by, min_std)
    valid = scores.valid & ~scores.flat if drop_flat else scores.valid  # [N,G]
    compared = scores.valid.any(1)  # [N]
    stats = {
        "advantage/unknown_share": float((~reward.isfinite()).float().mean()),
        "advantage/zero_std_share": float(scores.flat.float().mean()),
        "advantage/group_std": float(scores.std[compared].mean()) if bool(compared.any()) else float("nan"),
    }
    return Advantage(_clamp(cells.read(scores.value), clamp), cells.read(valid), stats)


def gdpo_advantage(
    rewards: Tensor,
    weights: Sequence[float],
    groups: Groups,
    *,
    normalise: bool = True,
    clamp: float | None = 5.0,
    min_std: float = 1e-6,
    drop_flat: bool = False,
) -> Advantage:
    """GDPO: standardise each reward dimension within its group, weigh, add, standardise the batch (arXiv 2601.05242, eq. 4-6). rewards [B,R].

    So a dimension counts by its weight, whatever its unit and spread; one reward made of the sum would be ruled by the dimension with the largest spread.
    Without `normalise` it is the weighted sum of advantages of MixGRPO (arXiv 2507.21802) and LongCat-Video. A clip with an unknown reward in a dimension of
    weight other than 0 is not valid. A group is flat where it is in every such dimension; its advantages are 0. Raises ValueError where the weights are not R numbers, some not 0.
    """
    if rewards.dim() != 2 or rewards.shape[1] != len(weights) or not any(weights):
        raise ValueError(f"rewards {list(rewards.shape)} need a weight for each of their dimensions, not all of them 0, got {list(weights)}")
    cells = grouping(rewards[:, 0], groups)
    counted = [k for k, weight in enumerate(weights) if weight]
    scores = [_centre(cells.fill(_wide(rewards[:, k])), "group_std", min_std) for k in counted]
    valid = torch.stack([score.valid for score in scores]).all(0)  # [N,G]
    flat = torch.stack([score.flat for score in scores]).all(0)  # [N,1]
    total = sum((weights[k] * score.value for k, score in zip(counted, scores, strict=True)), torch.zeros_like(scores[0].value))  # [N,G]
    valid = cells.read(valid & ~flat if drop_flat else valid)  # [B]
    advantage = cells.read(total).where(valid, 0)  # [B]
    stats = {
        "advantage/unknown_share": float((~rewards[:, counted].isfinite().all(1)).float().mean()),
        "advantage/zero_std_share": float(flat.float().mean()),
    }
    if normalise:
        advantage = batch_normalise(advantage, valid, min_std=min_std).where(~cells.read(flat.expand_as(total)), 0)
    return Advantage(_clamp(advantage, clamp), valid, stats)


def batch_normalise(advantage: Tensor, valid: Tensor, *, min_std: float = 1e-6) -> Tensor:
    """(advantage - mean) / std over the valid entries, any shape; 0 elsewhere, and everywhere where the std is below min_std.

    PPO's usual step after GAE, GDPO's last one (arXiv 2601.05242, eq. 6). With several ranks, gather first.
    """
    flat, known = advantage.reshape(-1), valid.reshape(-1)
    std = _masked_std(flat, known)  # [1]
    centred = (flat - _masked_mean(flat, known)) / std
    return torch.where(known & (std >= min_std), centred, 0).reshape(advantage.shape)


def _wide(reward: Tensor) -> Tensor:
    return reward.detach().to(torch.promote_types(reward.dtype, torch.float32))


def _clamp(advantage: Tensor, clamp: float | None) -> Tensor:
    return advantage if clamp is None else advantage.clamp(-clamp, clamp)


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


def best_and_worst(advantage: Tensor, groups: Groups, keep: int, *, valid: Tensor | None = None) -> Tensor:
    """Which clips to train on: of each group the better half of `keep` and the worse half, bool [B] (DanceGRPO's best-of-n, arXiv 2505.07818: 8 of 24).

    advantage, valid [B]. The advantages are those of the whole group: its mean is the baseline of what is kept, too. A clip that is not valid is never kept; where
    fewer are valid, all of those are. Among equals the first ones are the better. Known failure: of normal rewards the outer 8 of 24 carry 80 % of the
    gradient, so their mean is 2.4 times as long as the whole group's; of skewed rewards the kept advantages do not add up to 0.
    Raises ValueError where keep is not in 2 .. the clips of the largest group.
    """
    cells = grouping(advantage, groups)
    table = cells.fill(advantage if valid is None else advantage.where(valid, torch.nan))  # [N,G]
    if not 2 <= keep <= cells.columns:
        raise ValueError(f"cannot keep {keep} of {cells.columns} clips: keep at least 2, a good one and a bad one, and at most the group")
    known = table.isfinite()  # [N,G]
    place = table.where(known, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [N,G] 0 is the best; unknown ones come last
    worst = known.sum(1, keepdim=True) - keep // 2  # [N,1]
    return cells.read(known & ((place < keep - keep // 2) | (place >= worst)))  # [B]


def varied(advantage: Tensor, groups: Groups) -> Tensor:
    """Clips of groups in which some advantage [B] is more than rounding, bool [B]: the other groups teach nothing, and where they are left out those weigh more that do.

    DAPO's filter (arXiv 2503.14476, eq. 11) for what is left of the advantage under a constraint: a group whose rewards are alike may still differ in its costs.
    """
    cells = grouping(advantage, groups)
    table = cells.fill(advantage)  # [N,G]
    return cells.read((table.abs() > ROUNDING).any(1, keepdim=True).expand_as(table))  # [B]; an unknown one is not above it


def leave_one_out(value: Tensor, groups: Groups) -> Tensor:
    """Mean of the OTHER clips of the same prompt, [B] -> [B] (Kool et al. 2019, RLOO). nan values are left out; nan where no other is known."""
    cells = grouping(value, groups)
    table = cells.fill(value)  # [N,G]
    known = table.isfinite()
    kept = torch.where(known, table, 0)
    others = known.sum(1, keepdim=True) - known.long()  # [N,G] how many others are known
    mean = (kept.sum(1, keepdim=True) - kept) / others  # [N,G]
    return cells.read(torch.where(others > 0, mean, torch.nan))  # [B]


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
        reward = _wide(reward)
        if len(prompt_ids) != len(reward):
            raise ValueError(f"{len(prompt_ids)} prompt ids for {len(reward)} rewards")
        valid = reward.isfinite()  # [B]
        for prompt_id, value in zip(prompt_ids, reward.tolist(), strict=True):
            if value - value == 0:
                self._buffers.setdefault(prompt_id, deque(maxlen=self.buffer_size)).append(value)
        batch = _moments(reward[valid].cpu())
        moments = torch.stack([self._moments(prompt_id, batch) for prompt_id in prompt_ids]).to(reward)  # [B,2]
        flat = moments[:, 1] < self.min_std
        advantage = torch.where(valid & ~flat, (reward - moments[:, 0]) / moments[:, 1], 0)
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
    """-> (mean, std) [2]; zeros where there is nothing."""
    return torch.stack([values.mean(), values.std(correction=0)]) if len(values) else values.new_zeros(2)
