"""The tokens of one clip spread over the processes of a run, for clips that are too long for one: diffusers' own context parallelism, DeepSpeed-Ulysses (arXiv 2309.14509).

    split(network, device, processes)             # from now on all processes call it together, on the same clips, and get the same velocities
    with whole(network):                          # every process holds all tokens again for a while: what one calls by itself
        ...

Every process holds all weights and a share of the tokens; attention exchanges tokens for heads and back. A gradient is that of the process's own tokens: added up over the
processes (`Run.backward_each`) it is the gradient of one. `enable_parallelism` of diffusers 0.42 does the same where there is an accelerator, and divides by their number, which
is zero on a CPU; so its parts are put together here. Its ring variant asks attention for a normaliser that torch's own does not give.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from base_model.errors import UserError


def check_can_split(network: Any, processes: int) -> None:
    """Raises UserError for a network whose tokens diffusers cannot spread, and for heads that are no multiple of the processes."""
    plain = _plain(network)
    plan = getattr(plain, "_cp_plan", None)
    if plan is None or "encoder_attention_mask" in plan.get("", {}):  # of LTX-Video: a mask of all heads meets a share of them
        told = f"the tokens of {type(plain).__name__} cannot be spread over processes, context_parallel: diffusers has no plan for it that holds"
        raise UserError(f"{told}. Leave it out, or give a Wan of one expert")
    heads = plain.config.num_attention_heads
    if heads % processes:
        raise UserError(f"{heads} attention heads are no multiple of {processes} processes, context_parallel. Start as many as divide them")


def check_tokens(tokens: int, processes: int, what: str) -> None:
    """Raises UserError where a clip's tokens cannot be shared evenly. what: names the clip."""
    if tokens % processes:
        raise UserError(f"{what} has {tokens:,} tokens, no multiple of {processes} processes, context_parallel. Change its size, or the number of processes")


def split(network: Any, device: torch.device, processes: int) -> None:
    """Spreads the tokens of what is asked of `network` over the processes, in place. peft's wrapper is looked into."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    check_can_split(network, processes)
    warnings.filterwarnings("ignore", r"`torch.distributed._functional_collectives.all_gather_tensor` is deprecated", FutureWarning)  # which diffusers calls
    logging.getLogger("diffusers.hooks.context_parallel").setLevel(logging.ERROR)  # it tells that one time a clip is not spread
    plain, spread = _plain(network), ContextParallelConfig(ulysses_degree=processes)
    mesh = init_device_mesh(device.type, spread.mesh_shape, mesh_dim_names=spread.mesh_dim_names)
    config = ParallelConfig(context_parallel_config=spread)
    config.setup(torch.distributed.get_rank(), processes, device, mesh=mesh)
    plain._parallel_config = config
    apply_context_parallel(plain, spread, plain._cp_plan)
    _tell_attention(plain, config)


@contextmanager
def whole(network: Any) -> Iterator[None]:
    """Inside, every process holds all tokens of a network whose tokens are spread."""
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

    plain = _plain(network)
    config: Any = plain._parallel_config
    remove_context_parallel(plain, plain._cp_plan)
    _tell_attention(plain, None)
    try:
        yield
    finally:
        apply_context_parallel(plain, config.context_parallel_config, plain._cp_plan)
        _tell_attention(plain, config)


def unsplit(network: Any) -> None:
    """Makes the network a plain one again, for good."""
    from diffusers.hooks.context_parallel import remove_context_parallel

    plain = _plain(network)
    remove_context_parallel(plain, plain._cp_plan)
    _tell_attention(plain, None)
    plain._parallel_config = None


def _plain(network: Any) -> Any:
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _tell_attention(network: Any, config: Any) -> None:
    for module in network.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
