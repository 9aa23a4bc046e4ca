"""NF4 against the sixteen levels of the paper, and LoRA on top of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.lora import add_lora
from base_model.quantize import to_nf4

LEVELS = torch.tensor(  # Dettmers et al. 2023, appendix E
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0]
    + [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 4, bias=False))


def nearest_levels(weight: Tensor) -> Tensor:
    """Blocks of 64 weights, each scaled by its largest."""
    blocks = weight.flatten().view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    return (LEVELS[((blocks / scale)[..., None] - LEVELS).abs().argmin(-1)] * scale).view_as(weight)


def test_each_weight_becomes_the_nearest_of_sixteen_levels_of_its_block() -> None:
    net, x = network(), torch.randn(5, 64)
    expected = nn.functional.linear(x, nearest_levels(net[0].weight.data), net[0].bias)
    assert to_nf4(net, "0") == 1
    assert net[0].weight.dtype == torch.uint8 and net[0].weight.numel() == 64 * 128 // 2 and type(net[2]) is nn.Linear
    torch.testing.assert_close(net[0](x), expected, rtol=0, atol=2e-2)  # the scales themselves are rounded to 8 bits
    assert (net[0](x) - expected).norm() / expected.norm() < 5e-3


def test_scoring_between_steps_leaves_the_weights_as_they_were() -> None:
    net, x = network(), torch.randn(5, 64)
    to_nf4(net, "[02]")
    before, packed = net(x), net[0].weight.data.clone()
    with torch.no_grad():
        net.eval()(x)
    assert torch.equal(net[0].weight.data, packed) and torch.equal(net.train()(x), before)


def test_lora_learns_on_four_bits_and_nothing_else_moves() -> None:
    net = network()
    to_nf4(net, "[02]")
    peft, packed = add_lora(net, rank=4, alpha=8.0, targets="[02]"), net[0].base_layer.weight.data.clone()
    x, y = torch.randn(64, 64), torch.randn(64, 4)
    trained = [p for p in peft.parameters() if p.requires_grad]
    assert {"lora_A.default", "lora_B.default"} == {".".join(n.split(".")[-3:-1]) for n, p in peft.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (peft(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and torch.equal(net[0].base_layer.weight.data, packed)


def test_what_cannot_be_kept_in_four_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer is called 1"):
        to_nf4(network(), "1")
    net = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    with pytest.raises(UserError, match="1 has rows that are no multiple of 64"):
        to_nf4(net, "[01]")
    assert type(net[0]) is nn.Linear


def test_rows_of_the_embedding_can_learn_beside_the_adapter() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out_proj = nn.Embedding(10, 8), nn.Linear(8, 1)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.out_proj(self.embedding(ids))
            return out

    net = Words()
    before = net.embedding.weight.detach().clone()
    peft = add_lora(net, rank=1, alpha=1.0, targets=r".*_proj", token_rows=[3, 7])
    ids = torch.arange(10)
    peft(ids).square().sum().backward()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    now = net.embedding(ids)
    changed = (now != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 7] and torch.equal(net.embedding.token_adapter.base_layer.weight, before)
