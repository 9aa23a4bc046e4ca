"""Optimizers and the one learning-rate schedule of the recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adamw", "adamw8bit"]


def build_optimizer(parameters: Iterable[nn.Parameter], name: OptimizerName, *, lr: float, weight_decay: float = 0.01) -> Any:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with betas (0.9, 0.95): torch's, or bitsandbytes' with 8-bit states for tensors of 4,096 elements and more."""
    trainable = [p for p in parameters if p.requires_grad]
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    return torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def warmup_cosine(optimizer: Any, iterations: int, *, warmup: int = 50, final: float = 0.02) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear from `final` to 1 over `warmup` steps, then a cosine back to `final` at the last iteration (factors of the learning rate).

    The factor depends on the step alone: a run resumed with more iterations follows the longer schedule from where it is.
    """
    warmup = min(warmup, max(1, iterations // 2))

    def factor(step: int) -> float:
        if step < warmup:
            return final + (1 - final) * step / warmup
        done = min(1.0, (step - warmup) / max(1, iterations - warmup))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
