"""Named adapters: a copy that follows the trained one, a switch that leaves no trace, state that resumes."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from align.config import Config
from align.ema import EMA
from align.objectives.regression import clip_error
from align.run import Run
from base_model.checkpoint import load_weights, save_weights
from base_model.lora import TRAINED, ShadowAdapter, adapter_state, add_lora, load_adapter_state, merge, reference, using
from base_model.networks.dit import DiTConfig
from base_model.quantize import to_nf4
from base_model.tiny import build_tiny


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return add_lora(net, rank=2, alpha=4, targets="[02]", seed=seed)


def shake(net: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=g))


def trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_a_shadow_starts_as_a_copy_and_trains_nothing() -> None:
    net = network()
    shake(net, 1)
    wanted, out = trained(net), net(X)
    random = torch.get_rng_state()
    shadow = ShadowAdapter(net, "old")
    assert torch.equal(torch.get_rng_state(), random), "a second adapter takes nothing from the global random numbers"
    assert trained(net) == wanted and all(f".{TRAINED}." in name for name in wanted)
    assert torch.equal(net(X), out)
    with using(net, "old"):
        assert torch.equal(net(X), out)
    assert shadow.state_dict().keys() == adapter_state(net).keys()


def test_what_trains_beside_the_adapter_goes_on_training_beside_a_shadow() -> None:
    net = network()
    net.base_model.model[0].base_layer.bias.requires_grad_(True)
    wanted = trained(net)
    ShadowAdapter(net, "old")
    assert trained(net) == wanted and "base_model.model.0.base_layer.bias" in wanted


def test_a_shadow_keeps_what_it_was_while_the_other_trains_until_it_follows() -> None:
    net = network()
    shake(net, 1)
    shadow, before = ShadowAdapter(net, "old"), net(X)
    optimizer = torch.optim.SGD([parameter for parameter in net.parameters() if parameter.requires_grad], lr=0.5)
    net(X).square().mean().backward()
    optimizer.step()
    after = net(X)
    assert not torch.equal(after, before)
    with using(net, "old"):
        assert torch.equal(net(X), before)
    shadow.follow(1.0)
    with using(net, "old"):
        assert torch.equal(net(X), after)


def test_following_by_a_share_is_the_moving_average_written_by_hand() -> None:
    net = network()
    shadow = ShadowAdapter(net, "ema")
    hand = {name: tensor.double() for name, tensor in adapter_state(net).items()}
    for n in range(20):
        shake(net, n)
        shadow.follow(0.1)
        hand = {name: 0.9 * value + 0.1 * adapter_state(net)[name].double() for name, value in hand.items()}
    for name, tensor in shadow.state_dict().items():
        assert (tensor.double() - hand[name]).abs().max() < 1e-5
    still = copies(shadow.state_dict())
    shadow.follow(0.0)
    assert all(torch.equal(tensor, still[name]) for name, tensor in shadow.state_dict().items())
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"share in \[0, 1\]"):
            shadow.follow(share)


def test_the_switch_leaves_no_trace_also_after_an_error_and_around_the_reference() -> None:
    net = network()
    base = net(X)
    shake(net, 1)
    ShadowAdapter(net, "old").follow(1.0)
    shake(net, 2)
    wanted, out = trained(net), net(X)
    with pytest.raises(RuntimeError, match="in the middle"), using(net, "old"):
        assert trained(net) == wanted
        with reference(net):
            assert torch.equal(net(X), base)
        raise RuntimeError("in the middle")
    assert trained(net) == wanted and net.active_adapter == TRAINED and torch.equal(net(X), out)
    with reference(net):
        pass
    assert trained(net) == wanted
    with pytest.raises(ValueError, match="no adapter 'older': there are default, old"), using(net, "older"):
        pass


def test_a_gradient_through_the_shadow_reaches_nothing_and_the_optimizer_goes_on() -> None:
    net = network()
    shake(net, 1)
    ShadowAdapter(net, "old")
    with using(net, "old"):
        u_old = net(X)
    error = clip_error(net(X), u_old).mean() + net(X).mean()
    error.backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert reached == trained(net)


def test_several_shadows_live_beside_each_other_and_files_hold_only_the_trained_one() -> None:
    net = network()
    shake(net, 1)
    old, ema = ShadowAdapter(net, "old"), ShadowAdapter(net, "ema")
    first = copies(adapter_state(net))
    shake(net, 2)
    ema.follow(0.5)
    assert all(torch.equal(old.state_dict()[name], first[name]) for name in first)
    assert all(torch.allclose(ema.state_dict()[name], (first[name] + tensor) / 2, atol=1e-6) for name, tensor in adapter_state(net).items())
    assert not any("old" in name or "ema" in name for name in adapter_state(net))
    out, plain = net(X), merge(net)
    assert not hasattr(plain, "peft_config") and all(parameter.requires_grad for parameter in plain.parameters())
    assert torch.allclose(plain(X), out, atol=1e-6)


def test_names_that_peft_would_mix_up_are_refused() -> None:
    net = network()
    ShadowAdapter(net, "old")
    with pytest.raises(ValueError, match="there is an adapter 'old' already"):
        ShadowAdapter(net, "old")
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        ShadowAdapter(net, TRAINED)
    for name in ("2", "weight", "lora_A", "a.b", ""):
        with pytest.raises(ValueError, match="cannot be called"):
            ShadowAdapter(net, name)
    shadow = ShadowAdapter(net, "layer")  # inside the name of a part, base_layer, but no part
    assert shadow.state_dict().keys() == adapter_state(net).keys()


def test_wrapping_a_network_warns_of_nothing_that_peft_does_for_itself() -> None:
    class OfTransformers(nn.Sequential):
        @property
        def is_gradient_checkpointing(self) -> bool:
            warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=2)
            return False

    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    add_lora(OfTransformers(nn.Linear(3, 4)), rank=2, alpha=4, targets="0")
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


def test_a_shadow_is_saved_and_comes_back_through_a_file(tmp_path: Path) -> None:
    net = network()
    shadow = ShadowAdapter(net, "old")
    shake(net, 1)
    shadow.follow(0.25)
    save_weights(tmp_path / "old.safetensors", shadow.state_dict(), {})
    shake(net, 2)
    again = network()
    load_adapter_state(again, copies(adapter_state(net)))
    other = ShadowAdapter(again, "old")
    other.load_state_dict(load_weights(tmp_path / "old.safetensors")[0])
    with using(net, "old"), using(again, "old"):
        assert torch.equal(net(X), again(X))
    assert torch.equal(net(X), again(X))
    load_adapter_state(again, copies(adapter_state(net)), "old")
    with using(again, "old"):
        assert torch.equal(again(X), net(X))
    with pytest.raises(ValueError, match="1 names differ"):
        other.load_state_dict({**other.state_dict(), "more": torch.zeros(1)})


def test_a_run_with_an_old_policy_resumes_bit_for_bit(tmp_path: Path) -> None:
    def go(iterations: int, *, resume: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        net = network()
        old = ShadowAdapter(net, "old")
        optimizer = torch.optim.AdamW([parameter for parameter in net.parameters() if parameter.requires_grad], lr=0.1)
        run = Run(tmp_path / "run", Config(), seed=0, resume=resume, metrics={}, quiet=True)
        run.register("network", net, trainable_only=True)
        run.register("old", old)
        run.register("optimizer", optimizer)
        for _ in run.iterations(iterations, save_every=2, label="test"):
            with using(net, "old"), torch.no_grad():
                u_old = net(X)
            run.backward((net(X) - u_old - 1).square().mean())
            run.step(optimizer, 1.0)
            old.follow(0.3)
        return copies(adapter_state(net)), copies(old.state_dict())

    half = go(2, resume=False)
    whole = go(4, resume=True)
    (tmp_path / "run").rename(tmp_path / "gone")
    at_once = go(4, resume=False)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(whole, at_once, strict=True) for name in a)
    assert not all(torch.equal(half[1][name], whole[1][name]) for name in half[1])


def test_shadows_work_on_the_packed_networks() -> None:
    model = build_tiny(DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)))
    torch.nn.init.normal_(model.network.tokens_out.weight)
    model.network = add_lora(model.network, rank=2, alpha=2)
    x, t, cond = torch.randn(1, 8, 1, 4, 4), torch.tensor([0.5]), model.encode_text(["a red circle"])
    before = model(x, t, cond)
    ShadowAdapter(model.network, "old")
    shake(model.network, 1)
    assert not torch.equal(model(x, t, cond), before)
    with using(model.network, "old"):
        assert torch.equal(model(x, t, cond), before)
    with pytest.raises(ValueError, match="cannot be called 'out'"):
        ShadowAdapter(model.network, "out")


def test_shadows_follow_adapters_on_four_bits_and_rows_of_an_embedding() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out_proj = nn.Embedding(10, 64), nn.Linear(64, 64)

        def get_input_embeddings(self) -> nn.Embedding:
            return self.embedding

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.out_proj(self.embedding(ids))
            return out

    net = Words()
    to_nf4(net, "out_proj")
    peft = add_lora(net, rank=1, alpha=1.0, targets=r".*_proj", token_rows=[3, 7])
    ids = torch.arange(10)
    before = peft(ids)
    shadow = ShadowAdapter(peft, "old")
    assert len(shadow.state_dict()) == 3
    shake(peft, 1)
    after = peft(ids)
    assert not torch.equal(after[3], before[3])
    with using(peft, "old"):
        assert torch.equal(peft(ids), before)
    shadow.follow(1.0)
    with using(peft, "old"):
        assert torch.equal(peft(ids), after)
    assert torch.equal(peft(ids), after)


def test_a_dora_is_the_norm_of_each_output_times_a_direction_and_merges_and_averages() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 5), torch.randn(3, 8)
    weight, bias, plain = linear.weight.detach().clone(), linear.bias.detach().clone(), linear(x)
    net = add_lora(nn.Sequential(linear), rank=2, alpha=4, targets=("0",), dora=True)
    assert torch.equal(net(x), plain), "fresh, it changes nothing"
    average = EMA(net, 0.5, warm_up=False)
    assert len(average.state_dict()) == 3 + 1
    layer = net.base_model.model[0]
    with torch.no_grad():
        a, b, m = layer.lora_A["default"].weight.normal_(), layer.lora_B["default"].weight.normal_(), layer.lora_magnitude_vector["default"].weight
        starting = m.clone()
        m.mul_(1.5)
    moved = weight + 4 / 2 * b @ a
    wanted = nn.functional.linear(x, 1.5 * weight.norm(dim=1, keepdim=True) * moved / moved.norm(dim=1, keepdim=True), bias)
    assert torch.allclose(net(x), wanted, atol=1e-6)
    assert adapter_state(net).keys() == {f"base_model.model.0.lora_{end}" for end in ("A.weight", "B.weight", "magnitude_vector")}
    average.update()
    with average.swap():
        assert torch.allclose(m, 1.25 * starting)
    assert torch.allclose(merge(net)(x), wanted, atol=1e-6)
