"""The repeated blocks of a transformer: their activations computed again for memory, a share of them; and compiled, one for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base_model.errors import UserError
from base_model.networks.attention import leave_out_of_graphs


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network is made of, in its own order: of diffusers' transformers as these say, of the built-in networks the list `blocks`. Wrappers are looked into."""
    kinds = {kind for module in network.modules() for kind in _repeated_kinds(module)}
    listed = [module for modules in network.modules() if isinstance(modules, nn.ModuleList) for module in modules]
    return [module for module in listed if type(module).__name__ in kinds]


def _repeated_kinds(module: nn.Module) -> tuple[str, ...]:
    """Names of the classes of its blocks; of Mochi and CogVideoX only the second list is told."""
    kind = type(module)
    return tuple(getattr(kind, "_repeated_blocks", None) or getattr(kind, "_no_split_modules", None) or ())


def recompute_blocks(network: Any, share: float = 1.0) -> int:
    """From now on a backward pass computes the activations of `share` of the repeated blocks of a diffusers transformer again, evenly spread; those of the others are kept.

    Returns how many that are. Call it before peft wraps the network. Raises ValueError for a share outside [0, 1], UserError for a network that does not checkpoint.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the blocks lies in [0, 1], not {share}")
    blocks = repeated_blocks(network)
    if not blocks or not getattr(network, "_supports_gradient_checkpointing", False):
        raise UserError(f"{type(network).__name__} has no blocks to compute again. Train it without gradient checkpointing")
    chosen = {id(block) for k, block in enumerate(blocks) if int((k + 1) * share + 1e-9) > int(k * share + 1e-9)}

    def run(block: nn.Module, *args: Any) -> Tensor:
        found: Tensor = checkpoint(block, *args, use_reentrant=False) if id(block) in chosen else block(*args)
        return found

    network.enable_gradient_checkpointing(run)
    return len(chosen)


WITHOUT = {"triton.mix_order_reduction": False}
"""On a GPU torch 2.10 to 2.13 fuses the sums behind a block's modulation in a way that fails, or in silence gives wrong gradients of Wan's `scale_shift_table`
(pytorch/pytorch issues 178080 and 193061)."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """From now on the repeated blocks run compiled, one compilation a kind and a second for any length; names of weights stay. Returns how many they are.

    Raises UserError where there are none.
    """
    blocks = repeated_blocks(network)
    if not blocks:
        raise UserError(f"{type(network).__name__} has no blocks to compile. Train it without compiled")
    leave_out_of_graphs()
    for block in blocks:
        block.compile(backend=backend, options=WITHOUT if backend == "inductor" else None)
    return len(blocks)
