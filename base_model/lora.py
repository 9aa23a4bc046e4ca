"""LoRA through peft: add an adapter, look at the model without it, merge it for good; and further adapters that follow it, for old and averaged policies.

The adapter that trains is `TRAINED`. All adapters share the base weights: a second policy costs a few per cent of a second model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from base_model.quantize import dequantized, from_nf4, is_nf4

TRAINED = "default"
LORA_TARGETS = ("qkv", "q", "kv", "out", "mlp_in", "mlp_out", "skip")


def add_lora(
    network: nn.Module,
    *,
    rank: int,
    alpha: float,
    targets: tuple[str, ...] | str = LORA_TARGETS,
    dora: bool = False,
    token_rows: Sequence[int] = (),
    seed: int = 0,
) -> Any:
    """Wraps `network` so that only low-rank updates B A of the target linears train (Hu et al. 2021, arXiv 2106.09685, eq. 3); B = 0 at the start.

    targets: ends of the linears' names, or a pattern for whole names. dora: the norm of each output's weights trains too, beside their direction W + B A (Liu et al. 2024,
    arXiv 2402.09353, eq. 5). token_rows: rows of the input embedding that train too.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports, and which warns of an optional kernel of 4-bit inference
    from peft import LoraConfig, get_peft_model

    names, rows = targets if isinstance(targets, str) else list(targets), list(token_rows) or None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft asks transformers' models by the old name
        torch.manual_seed(seed)
        return get_peft_model(network, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, use_dora=dora, trainable_token_indices=rows))


@contextmanager
def reference(network: Any) -> Iterator[None]:
    """The same network with its adapter switched off: the policy that training started from. One without an adapter stays as it is."""
    with network.disable_adapter() if hasattr(network, "disable_adapter") else nullcontext():
        yield


def merge(network: Any) -> nn.Module:
    """Adds the adapter into the weights it adapts and returns the plain network. Weights in four bits become plain ones, in the dtype that they compute in: added to as they were
    rounded for training, and not rounded to four bits again."""
    for name, module in [(name, module) for name, module in network.named_modules() if hasattr(module, "lora_A") and is_nf4(module.get_base_layer())]:
        network.set_submodule(name, _merged_in_full(module))
    merged: nn.Module = network.merge_and_unload()
    from_nf4(merged)
    return merged.requires_grad_(True)


@torch.no_grad()
def _merged_in_full(layer: Any) -> nn.Linear:
    """The plain linear that peft's layer on a 4-bit one computes: W + s B A, of a DoRA m (W + s B A) / |W + s B A| row by row; computed in float32."""
    plain = dequantized(layer.get_base_layer())
    weight = plain.weight.float()
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).float()  # [out,in]
        if name in layer.lora_magnitude_vector:
            weight = weight * (layer.lora_magnitude_vector[name].weight.float() / weight.norm(dim=1))[:, None]
    plain.weight.copy_(weight)
    return plain


def adapter_state(network: Any, name: str = TRAINED) -> dict[str, Tensor]:
    """The tensors of an adapter under peft's file names, which do not hold the adapter's own name."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(network, adapter_name=name))


def load_adapter_state(network: Any, tensors: dict[str, Tensor], name: str = TRAINED) -> None:
    """Puts tensors by peft's names into the adapter `name` of a network that has it."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(network, tensors, adapter_name=name)


@contextmanager
def using(network: Any, name: str) -> Iterator[None]:
    """Inside, the network runs on the adapter of that name; outside on those it had, with every parameter trainable or not as before, also after an exception.

    Switch outside of threads: the network is one, and so is its active adapter. Raises ValueError where there is no such adapter.
    """
    if name not in network.peft_config:
        raise ValueError(f"no adapter {name!r}: there are {', '.join(network.peft_config)}")
    before, trainable = network.active_adapter, {parameter: parameter.requires_grad for parameter in network.parameters()}

    def switch(to: str) -> None:
        network.set_adapter(to)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)

    switch(name)
    try:
        yield
    finally:
        switch(before)


class ShadowAdapter:
    """A second adapter that never trains and follows the first: the policy that made the clips ("old"), or its moving average ("ema").

    Starts as a copy of the trained adapter. `follow` and `using(network, name)` are all there is to it; `state_dict` makes it something a run can register and
    resume. Raises ValueError for a name that is taken, or that names a part of the network (peft tells adapters by their name in a tensor's name).
    """

    def __init__(self, network: Any, name: str) -> None:
        if name in network.peft_config:
            raise ValueError(f"there is an adapter {name!r} already")
        if not name or "." in name or any(name in place.split(".") for place in network.state_dict()):
            raise ValueError(f"an adapter cannot be called {name!r}: parts of the network are, or it is no single word")
        with torch.random.fork_rng(devices=[]):
            network.add_adapter(name, network.peft_config[TRAINED])
        self.network, self.name = network, name
        self.follow(1.0)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """shadow <- shadow + share (trained - shadow): 1 copies the trained adapter, 0.001 is an average with decay 0.999. Raises ValueError outside [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f"an adapter follows by a share in [0, 1], got {share}")
        trained, shadow = adapter_state(self.network), adapter_state(self.network, self.name)
        for name, tensor in shadow.items():
            tensor.lerp_(trained[name], share)

    def state_dict(self) -> dict[str, Tensor]:
        return adapter_state(self.network, self.name)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError where the names differ."""
        shadow = adapter_state(self.network, self.name)
        if state.keys() != shadow.keys():
            differ = sorted(state.keys() ^ shadow.keys())
            raise ValueError(f"state does not fit the adapter {self.name!r}: {len(differ)} names differ, first {differ[0]}")
        for name, tensor in shadow.items():
            tensor.copy_(state[name])
