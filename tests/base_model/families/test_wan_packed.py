"""Wan over packed clips beside the same network called on each clip alone: outputs, gradients, and what may not reach another clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.families.wan import LORA_TARGETS, MLP_TARGETS, PromptStates, WanVideoModel
from base_model.families.wan_experts import Experts
from base_model.families.wan_image import WanImageVideoModel
from base_model.families.wan_packed import PackedWan, packed_velocity
from base_model.families.wan_random import random_transformer
from base_model.lora import add_lora, reference
from base_model.networks.packing import Segments, pack, take_tokens, unpack
from base_model.quantize import to_nf4
from base_model.recompute import recompute_blocks
from base_model.types import Conditioning, Known
from tests.base_model.families import tiny_wan

SIZES = [(3, 4, 6), (1, 6, 4), (2, 6, 6), (2, 8, 2)]  # 18, 6, 18 and 8 tokens: the first and the third are as long and not alike
TIMES = torch.tensor([0.9, 0.2, 0.55, 0.2])
PROMPTS = ["a red ball", "", "a blue cube rolls to the left slowly and then stops", "a circle"]
WORDS = [4, 1, 12, 3]
Build = Callable[[], WanVideoModel]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clips(channels: int = 16) -> list[Tensor]:
    return [draw(channels, *size, seed=k) for k, size in enumerate(SIZES)]


def conditions(tokens: Sequence[int] = (20, 20, 20, 20)) -> list[Conditioning]:
    """Texts of `WORDS` tokens in so many places each; what stands behind their end is not zero."""
    return [Conditioning((prompt,), draw(1, n, 16, seed=k), torch.arange(n)[None] < words) for k, (prompt, words, n) in enumerate(zip(PROMPTS, WORDS, tokens, strict=True))]


def plain(**changes: Any) -> WanVideoModel:
    torch.manual_seed(0)
    return WanVideoModel(tiny_wan.transformer(**changes))


def adapted(model: WanVideoModel) -> WanVideoModel:
    """With an adapter that changes what the network says."""
    model.network = add_lora(model.network, rank=2, alpha=4, targets=(*LORA_TARGETS, *MLP_TARGETS))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def quantized() -> WanVideoModel:
    model = plain()
    to_nf4(model.network, r"blocks\..*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)")
    return adapted(model)


BUILDS: dict[str, Build] = {"full": plain, "LoRA": lambda: adapted(plain()), "LoRA on four bits": quantized}


def alone(model: WanVideoModel, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
    return [model(x[None], t[k : k + 1], conds[k])[0] for k, x in enumerate(x_t)]


def together(model: WanVideoModel, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
    return packed_velocity(PackedWan(model.network), model, x_t, t, conds)


def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    assert [part.shape for part in found] == [part.shape for part in wanted] and all(part.dtype is want.dtype for part, want in zip(found, wanted, strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in zip(found, wanted, strict=True))


def gradients(model: WanVideoModel, velocity: Callable[..., list[Tensor]], conds: Sequence[Conditioning] | None = None) -> dict[str, Tensor]:
    """Of the sum of every clip's mean error, by the name of each trainable parameter that has one."""
    x_t = clips(int(model.network.config.out_channels))
    found = velocity(model, x_t, TIMES, conditions() if conds is None else conds)
    loss = torch.stack([(u - draw(*u.shape, seed=9)).square().mean() for u in found]).sum()
    named = {name: parameter for name, parameter in model.network.named_parameters() if parameter.requires_grad}
    parts = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: part for name, part in zip(named, parts, strict=True) if part is not None}


def differ(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest norm of the difference of a parameter's gradient, over the norm of that gradient."""
    assert found.keys() == wanted.keys() and all(bool(part.any()) for part in wanted.values())
    worst = max(float((found[name] - part).norm() / part.norm()) for name, part in wanted.items())
    print(f"{len(wanted)} gradients differ by at most {worst:.1e} of their norm")
    return worst


def whole(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"all": torch.cat([part.flatten() for part in parts.values()])}


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Callable[[WanVideoModel], WanVideoModel]:
    """Turns a model to float64, and what it computes in float32 whatever its weights are (norms, residuals, velocities) too: what is left is no rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def turned(model: WanVideoModel) -> WanVideoModel:
        model.network.double()
        return model

    return turned


# Packed is separate


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_clips_of_all_sizes_times_and_texts_say_packed_what_they_say_alone(build: Build) -> None:
    model, conds = build(), conditions()
    wanted = alone(model, clips(), TIMES, conds)
    assert largest(together(model, clips(), TIMES, conds), wanted) < 1e-5
    assert min(float(u.detach().std()) for u in wanted) > 0.1
    if hasattr(model.network, "disable_adapter"):
        with reference(model.network):
            bare = together(model, clips(), TIMES, conds)
            assert largest(bare, alone(model, clips(), TIMES, conds)) < 1e-5 and largest(bare, wanted) > 0.01


@pytest.mark.parametrize("build", [plain, BUILDS["LoRA"]], ids=["full", "LoRA"])
def test_gradients_of_every_parameter_are_those_of_the_clips_alone(double: Any, build: Build) -> None:
    model = double(build())
    wanted = gradients(model, alone)
    assert {part.dtype for part in wanted.values()} == {torch.float64} and len(wanted) == sum(parameter.requires_grad for parameter in model.network.parameters())
    assert differ(gradients(model, together), wanted) < 1e-11


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_in_float32_the_gradient_as_a_whole_is_that_of_the_clips_alone(build: Build) -> None:
    model = build()
    assert differ(whole(gradients(model, together)), whole(gradients(model, alone))) < 1e-5


def test_prompts_of_the_encoder_keep_the_zeros_behind_them() -> None:
    model = plain()
    model.encoder = PromptStates(tiny_wan.tokenizer(), tiny_wan.text_encoder())
    conds = [model.encode_text([prompt]) for prompt in PROMPTS]
    wanted = alone(model, clips(), TIMES, conds)
    assert [cond.text.shape[1] for cond in conds] == [512] * 4 and largest(together(model, clips(), TIMES, conds), wanted) < 1e-5
    trimmed = [replace(cond, text=cond.text[:, : int(cond.mask.sum())], mask=cond.mask[:, : int(cond.mask.sum())]) for cond in conds]
    assert largest(together(model, clips(), TIMES, trimmed), wanted) > 0.1, "without its zeros this network says something else"


def test_texts_in_places_of_different_numbers_stay_apart() -> None:
    conds = conditions((4, 30, 12, 7))
    assert largest(together(plain(), clips(), TIMES, conds), alone(plain(), clips(), TIMES, conds)) < 1e-5


def test_half_precision_differs_no_more_than_its_rounding() -> None:
    torch.manual_seed(0)
    model = WanVideoModel(random_transformer(tiny_wan.TRANSFORMER, device=torch.device("cpu"), dtype=torch.bfloat16))
    exact = WanVideoModel(random_transformer(tiny_wan.TRANSFORMER, device=torch.device("cpu"), dtype=torch.float32))
    exact.network.load_state_dict(model.network.state_dict())
    found, wanted, truth = (velocity(one, clips(), TIMES, conditions()) for velocity, one in ((together, model), (alone, model), (alone, exact)))
    rounding = largest(wanted, truth)
    print(f"packed {largest(found, wanted):.1e}, rounding {rounding:.1e}")
    assert largest(found, wanted) <= rounding < 0.1 and all(u.dtype is torch.float32 for u in found)


# Prompts that are seen


def test_given_tokens_have_time_0_and_are_led_to_their_values_as_in_ti2v(double: Any) -> None:
    model, conds = plain(in_channels=48, out_channels=48), conditions()
    for k, (f, h, w) in enumerate(SIZES[:3]):
        mask = torch.zeros(1, f, h, w, dtype=torch.bool)
        mask[:, :1, : 2 * (k + 1)] = True
        conds[k] = replace(conds[k], known=Known(draw(1, 48, f, h, w, seed=20 + k), mask))
    wanted = alone(model, clips(48), TIMES, conds)
    assert largest(together(model, clips(48), TIMES, conds), wanted) < 1e-5
    assert largest(wanted, alone(model, clips(48), TIMES, conditions())) > 0.1
    model = double(model)
    assert differ(gradients(model, together, conds), gradients(model, alone, conds)) < 1e-11


@pytest.mark.parametrize("eye", [True, False], ids=["2.1", "2.2"])
def test_clips_from_images_are_told_theirs(double: Any, eye: bool) -> None:
    torch.manual_seed(0)
    changes = {"image_dim": 16, "added_kv_proj_dim": 64} if eye else {}
    model, conds = WanImageVideoModel(tiny_wan.transformer(in_channels=36, **changes)), conditions()
    for k, size in enumerate(SIZES):
        known = Known(draw(1, 16, *size, seed=20 + k), torch.zeros(1, *size, dtype=torch.bool).index_fill(1, torch.tensor([0]), True))
        conds[k] = replace(conds[k], known=known, image=draw(1, 5, 16, seed=30 + k) if eye else None)
    wanted = alone(model, clips(), TIMES, conds)
    assert largest(together(model, clips(), TIMES, conds), wanted) < 1e-5
    if eye:
        swapped = [replace(cond, image=other.image) for cond, other in zip(conds, conds[1:] + conds[:1], strict=True)]
        assert largest(together(model, clips(), TIMES, swapped), wanted) > 0.01
    model = double(model)
    assert differ(gradients(model, together, conds), gradients(model, alone, conds)) < 1e-11


# Clips do not meet


def test_the_order_of_clips_does_not_matter() -> None:
    model, conds, order = plain(), conditions(), [2, 0, 3, 1]
    found = together(model, clips(), TIMES, conds)
    moved = together(model, [clips()[k] for k in order], TIMES[order], [conds[k] for k in order])
    assert largest(moved, [found[k] for k in order]) < 1e-5


@pytest.mark.parametrize("changed", range(4))
def test_another_clip_in_a_pack_changes_no_bit_of_the_others(changed: int) -> None:
    model, x_t, t, conds = plain(), clips(), TIMES.clone(), conditions()
    before = together(model, x_t, t, conds)
    x_t[changed], t[changed] = 1000 * x_t[changed] + 1, 0.7
    conds[changed] = replace(conds[changed], text=conds[changed].text + 5)
    after = together(model, x_t, t, conds)
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [k != changed for k in range(4)]


# The network stays what it was


@pytest.mark.parametrize("share", [None, 1.0, 0.5], ids=["all, by diffusers", "all", "half"])
def test_activations_that_are_computed_again_change_no_gradient(share: float | None) -> None:
    model = plain()
    if share is None:
        model.network.enable_gradient_checkpointing()
    else:
        assert recompute_blocks(model.network, share) == 2 * share
    runs = [0, 0]
    for k, block in enumerate(model.network.blocks):
        block.attn1.norm_q.register_forward_hook(lambda *_, k=k: runs.__setitem__(k, runs[k] + 1))
    found, wanted = gradients(adapted(model), together), gradients(adapted(plain()), together)
    assert runs == ([1, 2] if share == 0.5 else [2, 2])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_dense_calls_stay_bit_for_bit_what_they_were_and_a_network_is_prepared_once() -> None:
    model, conds = plain(), conditions()
    before = alone(model, clips(), TIMES, conds)
    state = set(model.network.state_dict())
    PackedWan(model.network)
    processors = list(model.network.attn_processors.values())
    PackedWan(adapted(model).network)
    assert list(model.network.attn_processors.values()) == processors
    with reference(model.network):
        assert all(torch.equal(a, b) for a, b in zip(alone(model, clips(), TIMES, conds), before, strict=True))
    assert set(plain().network.state_dict()) == state
    model.network.set_attention_backend("_native_math")
    assert all(processor.stock._attention_backend == "_native_math" for processor in processors)
    model.network.reset_attention_backend()
    assert all(processor._attention_backend is None for processor in processors)


def test_tokens_carry_their_positions_and_times_wherever_they_stand() -> None:
    model = plain()
    network, packed = PackedWan(model.network), pack(clips(), (1, 2, 2))
    text, texts = draw(9, 16), Segments((4, 1, 3, 1))
    found = network(*packed, TIMES, text, texts)
    assert torch.allclose(network(*packed, packed.segments.spread(TIMES), text, texts), found, atol=1e-6)
    order = torch.cat([offset + torch.randperm(n) for offset, n in zip(packed.segments.offsets, packed.segments.lengths, strict=False)])
    moved = network(packed.tokens[order], packed.positions[order], packed.segments, packed.segments.spread(TIMES)[order], text, texts)
    assert torch.allclose(moved, found[order], atol=1e-5)


def test_a_clip_that_keeps_the_tokens_of_one_frame_is_a_clip_of_that_frame() -> None:
    model, conds = plain(), conditions((4, 4, 12, 4))
    packed, (whole, *others) = pack(clips(), (1, 2, 2)), clips()
    few = take_tokens(packed, torch.cat([torch.arange(6), torch.arange(18, packed.segments.total)]))
    text = torch.cat([model.states(cond)[0][0] for cond in conds])
    found = unpack(PackedWan(model.network)(*few, TIMES, text, Segments((4, 4, 12, 4))), [whole[:, :1], *others], (1, 2, 2))
    assert largest(found, alone(model, [whole[:, :1], *others], TIMES, conds)) < 1e-5


# What is refused


def test_experts_and_fused_projections_are_refused_in_one_line() -> None:
    torch.manual_seed(0)
    two = Experts(tiny_wan.transformer(), tiny_wan.transformer(), 0.875)
    for network in (two, add_lora(two, rank=2, alpha=2, targets=LORA_TARGETS)):
        with pytest.raises(UserError, match="two experts cannot share a packed sequence"):
            PackedWan(network)
    fused = tiny_wan.transformer()
    fused.fuse_qkv_projections()
    with pytest.raises(UserError, match="projections are fused"):
        PackedWan(fused)
    fused.unfuse_qkv_projections()
    PackedWan(fused)


def test_as_many_clips_as_times_and_conditions_or_none_at_all_are_said() -> None:
    model = plain()
    for count in (0, 3):
        with pytest.raises(ValueError, match="empty" if count == 0 else "shorter"):
            together(model, clips()[:count], TIMES[:count], conditions()[: count and 2])


# Clips as long as each other


def test_clips_as_long_as_each_other_share_their_own_vectors_and_say_what_they_say_alone(double: Any) -> None:
    """Two lie and one stands: as many tokens, other places."""
    model = double(plain())
    x_t, t, conds = [draw(16, *size, seed=k).double() for k, size in enumerate([(2, 4, 6), (2, 6, 4), (2, 4, 6)])], TIMES[:3].double(), conditions()[:3]
    told: list[tuple[int, ...]] = []
    model.network.blocks[0].register_forward_pre_hook(lambda block, given: told.append((*given[0].shape[:2], *given[2].shape[:-1])))
    found, wanted = together(model, x_t, t, conds), alone(model, x_t, t, conds)
    assert told[0] == (3, 12, 3, 6) and largest(found, wanted) < 1e-12
    parameters = list(model.network.parameters())
    of_packed, of_alone = (torch.autograd.grad(torch.stack([u.square().mean() for u in some]).sum(), parameters) for some in (found, wanted))
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(of_packed, of_alone, strict=True)) < 1e-11
    mask = torch.zeros(1, 2, 4, 6, dtype=torch.bool)
    mask[:, 0] = True
    pair, times, given = [x_t[0], x_t[2]], t[[0, 2]], [replace(conds[k], known=Known(x_t[2 - k][None], mask)) for k in (0, 2)]
    assert largest(together(model, pair, times, given), alone(model, pair, times, given)) < 1e-12, "where tokens have times of their own"
    assert told[-3] == (1, 24, 1, 24, 6)
