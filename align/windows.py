"""Which steps of a rollout take noise, and so are trained: all of them, a window, or one step a prompt. Never the last one, whose noise would stay in the picture.

Each is a pure function of its arguments, of the iteration or of a generator made for it: a resumed run sees the windows it would have seen. What they return is
`stochastic` of `rollout`. Draw once a rollout, never once a clip: clips of a prompt that take noise at different steps are told apart by the step, not by the noise.

Letters: N prompts, K denoising steps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _noisy_at_most(num_steps: int, width: int, first: int | None) -> int:
    """How many of the first steps may take noise. Raises ValueError where `width` of them do not exist."""
    last = num_steps - 1 if first is None else min(first, num_steps - 1)
    if not 1 <= width <= last:
        raise ValueError(f"a window of {width} noisy steps does not fit the first {last} of {num_steps} steps, the last of which is deterministic")
    return last


def all_steps(num_steps: int) -> list[int]:
    """Every step but the last: DDPO (Black et al. 2023, arXiv 2305.13301), Flow-GRPO (arXiv 2505.05470)."""
    return list(range(_noisy_at_most(num_steps, num_steps - 1, None)))


def fixed_window(num_steps: int, start: int, width: int) -> list[int]:
    """Steps start .. start + width - 1. Raises ValueError where it would be empty or reach the last step."""
    if start < 0 or width < 1 or start + width > num_steps - 1:
        raise ValueError(f"a window of {width} noisy steps from step {start} on does not fit {num_steps} steps, the last of which is deterministic")
    return list(range(start, start + width))


def random_window(num_steps: int, width: int, generator: torch.Generator, *, first: int | None = None) -> list[int]:
    """`width` consecutive steps of the first `first` (default all but the last), anywhere (Flow-GRPO-Fast, arXiv 2505.05470; MixGRPO's random strategy, arXiv 2507.21802)."""
    last = _noisy_at_most(num_steps, width, first)
    start = int(torch.randint(last - width + 1, (1,), generator=generator))
    return list(range(start, start + width))


def sliding_window(num_steps: int, width: int, iteration: int, *, every: int = 25, stride: int = 1, first: int | None = None) -> list[int]:
    """MixGRPO's progressive window (arXiv 2507.21802): from noise to detail, `stride` steps on every `every` iterations.

    At the end of the first `first` steps (default all but the last) it begins anew, as in the authors' script; theirs shrinks to nothing there, ours keeps its width.
    """
    last = _noisy_at_most(num_steps, width, first)
    starts = range(0, last - width + 1, stride)
    start = starts[iteration // every % len(starts)]
    return list(range(start, start + width))


def one_step_a_prompt(num_steps: int, prompts: int, generator: torch.Generator, *, first: int | None = None) -> Tensor:
    """One step a prompt, drawn from the first `first` (default all but the last) and shared by its clips: bool [K,N] (Flash-GRPO's iso-temporal rule, arXiv 2605.15980)."""
    drawn = torch.randint(_noisy_at_most(num_steps, 1, first), (prompts,), generator=generator)  # [N]
    return torch.arange(num_steps)[:, None] == drawn  # [K,N]
