"""Optimizers and the one learning-rate schedule of the recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from align.sharding import is_sharded
from base_model.errors import UserError

OptimizerName = Literal["adamw", "adamw8bit", "muon"]
BETAS = (0.9, 0.95)
HALF = (torch.bfloat16, torch.float16)


def build_optimizer(network: nn.Module, name: OptimizerName, *, lr: float, weight_decay: float = 0.01, fused: bool = False) -> Any:
    """An optimizer of the parameters of `network` that train.

    adamw: torch's (Loshchilov & Hutter 2017, arXiv 1711.05101). adamw8bit: bitsandbytes', with 8-bit states for tensors of 4,096 elements and more. muon: Muon for the
    matrices inside the network's `blocks`, AdamW for all else, at one learning rate. fused: `adamw` in one kernel, the same step to rounding, on a CPU twice as fast or more.
    Weights in half precision are stepped in float32 (`InFloat32`). Raises UserError where muon finds no such matrix or nothing else, as with LoRA, and for adamw8bit on sharded
    weights.
    """
    trainable = {key: p for key, p in network.named_parameters() if p.requires_grad}
    if not any(p.dtype in HALF for p in trainable.values()):
        return _of(trainable, name, lr=lr, weight_decay=weight_decay, fused=fused)
    stepped = {key: nn.Parameter(p.detach().float()) if p.dtype in HALF else p for key, p in trainable.items()}
    optimizer = _of(stepped, name, lr=lr, weight_decay=weight_decay, fused=fused)
    return InFloat32(list(trainable.values()), list(stepped.values()), optimizer)


def _of(trainable: Mapping[str, nn.Parameter], name: OptimizerName, *, lr: float, weight_decay: float, fused: bool) -> Any:
    if name == "muon":
        matrices = {key: p for key, p in trainable.items() if p.dim() == 2 and ".blocks." in f".{key}"}
        others = [p for key, p in trainable.items() if key not in matrices]
        return MuonWithAdamW(list(matrices.values()), others, lr=lr, weight_decay=weight_decay)
    if name == "adamw8bit":
        if any(is_sharded(p) for p in trainable.values()):
            raise UserError("optimizer adamw8bit keeps its state in blocks that cannot be cut with sharded weights. Use adamw, or leave sharding off")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(list(trainable.values()), lr=lr, betas=BETAS, weight_decay=weight_decay)
    return torch.optim.AdamW(trainable.values(), lr=lr, betas=BETAS, weight_decay=weight_decay, fused=fused)


class InFloat32(torch.optim.Optimizer):
    """Steps float32 copies of weights in half precision, and rounds them into the weights (Micikevicius et al. 2017, arXiv 1710.03740, section 3.1).

    Without copies a step that is smaller than half the distance of two neighbouring bfloat16 numbers, 1/512 of a weight, is lost: nearly all are at the learning rates of full
    fine-tuning.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], stepped: Sequence[nn.Parameter], optimizer: Any) -> None:
        """stepped: for each of the parameters its copy, or itself where it is float32; what `optimizer` steps."""
        super().__init__(parameters, {"lr": optimizer.param_groups[0]["lr"]})
        self.parts = (optimizer,)
        self.copied = [(parameter, copy) for parameter, copy in zip(parameters, stepped, strict=True) if copy is not parameter]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._tell_rate()
        for parameter, copy in self.copied:  # one after another: all gradients twice would take as much as the copies
            copy.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        self.parts[0].step()
        for parameter, copy in self.copied:
            parameter.copy_(copy)
            copy.grad = None

    def _tell_rate(self) -> None:
        """Schedules set the rate here."""
        for group in self.parts[0].param_groups:
            group["lr"] = self.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        self._tell_rate()
        return {"parts": [part.state_dict() for part in self.parts], "copies": [copy.detach() for _, copy in self.copied]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.parts[0].load_state_dict(state_dict["parts"][0])
        for (_, copy), kept in zip(self.copied, state_dict["copies"], strict=True):
            copy.copy_(kept)
        self.param_groups[0]["lr"] = self.parts[0].param_groups[0]["lr"]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024; scaled to AdamW's step as in Liu et al. 2025, arXiv 2502.16982, eq. 4) on matrices, AdamW on the others, stepping as one.

    Raises UserError where there is no matrix, or nothing else.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        if not matrices or not others:
            raise UserError(f"optimizer muon needs matrices inside blocks and other parameters, but {len(matrices)} and {len(others)} train. Use adamw")
        super().__init__([*matrices, *others], {"lr": lr})
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, torch.optim.AdamW(others, lr=lr, betas=BETAS, weight_decay=weight_decay))
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._gather()


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
