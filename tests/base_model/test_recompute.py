"""Gradient checkpointing of some blocks changes what is kept, never what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from base_model.errors import UserError
from base_model.families.wan_random import T2V_1_3B, random_transformer
from base_model.lora import add_lora
from base_model.recompute import recompute_blocks

TOY = {**T2V_1_3B, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 4}


def network_of(share: float | None) -> tuple[Any, list[int]]:
    """A toy of Wan with adapters, and how often each of its blocks runs."""
    torch.manual_seed(0)
    network = random_transformer(TOY, device=torch.device("cpu"), dtype=torch.float32)
    if share is not None:
        assert recompute_blocks(network, share) == round(4 * share)
    runs = [0] * 4
    for k, block in enumerate(network.blocks):
        block.attn1.norm_q.register_forward_hook(lambda *_, k=k: runs.__setitem__(k, runs[k] + 1))
    return add_lora(network, rank=2, alpha=2, targets=("to_q", "to_v")), runs


def gradients(network: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        nn.init.normal_(parameter, std=0.1, generator=generator)
    x, text = torch.randn(1, 16, 2, 4, 6, generator=generator), torch.randn(1, 5, 16, generator=generator)
    network(hidden_states=x, timestep=torch.tensor([300.0]), encoder_hidden_states=text, return_dict=False)[0].square().sum().backward()
    return [p.grad for p in trained]


@pytest.mark.parametrize(("share", "twice"), [(1.0, [2, 2, 2, 2]), (0.5, [1, 2, 1, 2]), (0.25, [1, 1, 1, 2]), (0.0, [1, 1, 1, 1])])
def test_the_share_of_blocks_is_computed_again_and_gradients_stay_bit_for_bit(share: float, twice: list[int]) -> None:
    network, runs = network_of(share)
    found = gradients(network)
    assert runs == twice
    assert all(torch.equal(mine, plain) for mine, plain in zip(found, gradients(network_of(None)[0]), strict=True))


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], not 1.5"):
        recompute_blocks(network_of(None)[0].get_base_model(), 1.5)
    with pytest.raises(UserError, match="Linear has no blocks to compute again"):
        recompute_blocks(nn.Linear(2, 2))
