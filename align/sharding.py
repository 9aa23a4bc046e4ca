"""A network's weights, gradients and optimizer state spread over the processes of a run: torch's FSDP2 (`fully_shard`) block by block.

    velocities = Velocities(model)                    # what the recipe calls is the root, so that its weights are gathered when it is called
    run.shard(velocities.network)                     # before optimizer and average are built: parameters are others afterwards
    ...
    with run.whole():                                 # every process holds all weights for a while: sampling, held-out clips, on one process or on all
        ...
    run.unshard()                                     # plain again, for good: merging and saving

Parameters become DTensors, cut along their first axis. A pass gathers one block after another and frees it again, so all processes must make equally many passes through the
same modules. Gradients are *added up* over the processes, as `Run.backward_each` does without sharding. State is gathered for a checkpoint and spread again behind it, so its
files are those of a run that is not sharded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.families.wan_experts import Experts
from base_model.recompute import repeated_blocks


def check_can_shard(network: nn.Module) -> None:
    """Raises UserError for weights in four bits, which cannot be cut, and for two experts, of which processes would call different ones."""
    if any(isinstance(module, Experts) for module in network.modules()):
        raise UserError("two experts cannot be sharded: processes would wait for each other in different ones. Train transformer or transformer_2 alone, or leave sharding off")
    if any(type(module).__name__ == "Linear4bit" for module in network.modules()):
        raise UserError("weights in four bits cannot be sharded: their blocks of 64 do not follow the cuts. Leave nf4 or sharding off")


def shard(network: nn.Module, device: torch.device, processes: int, *, frozen: bool = False) -> None:
    """Spreads the weights of `network`, which are the same in all processes, in place: every repeated block by itself, the rest with the root, which is what must be called.

    frozen: only those that do not train; an adapter on them stays whole, so that its gradients are those of any other. It may still lie on the CPU: blocks reach the device one by
    one. Gradients are added up in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)  # nothing here works in place on a velocity
    kept = {parameter for parameter in network.parameters() if frozen and parameter.requires_grad}
    for parameter in kept:
        parameter.data = parameter.data.to(device)  # nobody else moves them
    for module in (*reversed(repeated_blocks(network)), network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), ignored_params=kept)
    for unit in _units(network):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    root: Any = network
    root._get_fsdp_state()._lazy_init()  # else whatever is called first, be it a block, becomes the root


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of a sharded network, and may call it, or any part of it, as often as it likes, without gradient. All processes enter and leave.

    Parameters are plain tensors there, but `state_dict` would cut them again.
    """
    root: Any = network
    root.set_reshard_after_forward(False)
    for unit in _units(network):
        unit.unshard()
    try:
        yield
    finally:
        root.reset_iter_state()  # cuts again, and forgets which passes were made, or gradients would be prefetched by their order
        root.set_reshard_after_forward(True)


def unshard(network: nn.Module) -> None:
    """Makes a sharded network a plain one again, in place and for good: every process holds all weights. Optimizers and averages of before know the cut ones."""
    for unit in _units(network):
        state = unit._get_fsdp_state()
        unit.unshard()
        for group in state._fsdp_param_groups:
            for handle in chain(group._module_to_pre_save_state_dict_hook_handle.values(), group._module_to_pre_load_state_dict_hook_handle.values()):
                handle.remove()
            for each in group.fsdp_params:
                place, name = each._module_info.module, each._module_info.param_name
                full = getattr(place, name)
                setattr(place, name, nn.Parameter(full.detach().clone(), requires_grad=full.requires_grad))
            group._to_sharded = lambda: None  # nothing is cut again
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        unit.__class__ = type(unit).__mro__[unit._orig_cls_mro_index]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut. Its class takes half a second to import, and is not imported where nothing is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Any, *, keep: bool = True) -> Tensor:
    """A cut tensor as a whole one, on the CPU; any other as it is. All processes call it, in the same order. keep: whether this one wants it; else it gets an empty one."""
    if not is_sharded(tensor):
        found: Tensor = tensor
        return found
    full: Tensor = tensor.full_tensor()
    return full.cpu() if keep else torch.empty(0)


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, the same in all processes, cut as `like` is; as it is where that is not cut."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def spread_network(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Whole tensors of a network's state, cut as its own are."""
    own = network.state_dict()
    return {name: spread_like(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}


def spread_optimizer(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The state of an optimizer, whole, cut as its parameters are: of every tensor that is shaped as its parameter is."""
    if "parts" in state:
        parts = {"parts": [spread_optimizer(part, each) for part, each in zip(state["parts"], optimizer.parts, strict=True)]}
        copies = {"copies": [spread_like(kept, copy) for kept, (_, copy) in zip(state["copies"], optimizer.copied, strict=True)]} if "copies" in state else {}
        return parts | copies
    numbers, parameters = (list(chain(*(group["params"] for group in groups))) for groups in (state["param_groups"], optimizer.param_groups))
    of = dict(zip(numbers, parameters, strict=True))

    def cut(value: Any, parameter: Tensor) -> Any:
        return spread_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

    return state | {"state": {number: {key: cut(value, of[number]) for key, value in entry.items()} for number, entry in state["state"].items()}}


def _units(network: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]
