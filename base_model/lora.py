"""LoRA through peft: add an adapter, look at the model without it, merge it for good."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

LORA_TARGETS = ("qkv", "q", "kv", "out", "mlp_in", "mlp_out", "skip")


def add_lora(
    network: nn.Module, *, rank: int, alpha: float, targets: tuple[str, ...] | str = LORA_TARGETS, token_rows: Sequence[int] = (), seed: int = 0
) -> Any:
    """Wraps `network` so that only low-rank updates B A of the target linears train (Hu et al. 2021, arXiv 2106.09685, eq. 3); B = 0 at the start.

    targets: ends of the linears' names, or a pattern for whole names. token_rows: rows of the input embedding that train too.
    """
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports, and which warns of an optional kernel of 4-bit inference
    from peft import LoraConfig, get_peft_model

    names, rows = targets if isinstance(targets, str) else list(targets), list(token_rows) or None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks transformers' models by the old name
        torch.manual_seed(seed)
        return get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, trainable_token_indices=rows))


@contextmanager
def reference(network: Any) -> Iterator[None]:
    """The same network with its adapter switched off: the policy that training started from. One without an adapter stays as it is."""
    with network.disable_adapter() if hasattr(network, "disable_adapter") else nullcontext():
        yield


def merge(network: Any) -> nn.Module:
    """Adds the adapter into the weights it adapts and returns the plain network."""
    merged: nn.Module = network.merge_and_unload()
    return merged.requires_grad_(True)


def adapter_state(network: Any) -> dict[str, Tensor]:
    """The adapter's tensors under peft's file names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network))


def load_adapter_state(network: Any, tensors: dict[str, Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(network, tensors)
