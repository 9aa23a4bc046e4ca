"""FLOPs of clips beside closed forms, and beside what the counter says of a real pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import base_model.flops
from base_model.families.cogvideox import CogVideoXVideoModel
from base_model.families.hunyuan_video import HunyuanVideoModel
from base_model.families.ltx import LTXVideoModel
from base_model.families.mochi import MochiVideoModel
from base_model.families.wan import WanVideoModel
from base_model.families.wan_experts import Experts
from base_model.families.wan_packed import PackedWan, packed_velocity
from base_model.families.wan_random import T2V_1_3B, random_transformer
from base_model.flops import FlopCounter, peak_flops
from base_model.lora import add_lora
from base_model.networks.packing import forward_flops
from base_model.recompute import recompute_blocks
from base_model.tiny import build_tiny
from base_model.types import Conditioning, Known
from recipes.bench._wan_flops import step_flops
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan

CONFIG = {**T2V_1_3B, "num_attention_heads": 3, "attention_head_dim": 24, "text_dim": 40, "freq_dim": 32, "ffn_dim": 136, "num_layers": 3}
SHAPE = (16, 3, 10, 14)
TOKENS = 3 * 5 * 7


def network() -> Any:
    return random_transformer(CONFIG, device=torch.device("cpu"), dtype=torch.float32)


def text(tokens: int, width: int = 40, pooled: int | None = None) -> Conditioning:
    return Conditioning(("",), torch.randn(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool), None if pooled is None else torch.randn(1, pooled))


def test_wan_costs_what_the_closed_form_says_in_full_and_with_an_adapter() -> None:
    whole = FlopCounter(WanVideoModel(network().requires_grad_(True)))
    adapted = FlopCounter(WanVideoModel(add_lora(network(), rank=4, alpha=4, targets=("to_q", "to_k", "to_v", "to_out.0"))))
    for tokens in (5, 512):
        for counter, rank in ((whole, 0), (adapted, 4)):
            found, wanted = counter(SHAPE, text(tokens)), step_flops(CONFIG, TOKENS, text_tokens=tokens, lora_rank=rank)
            assert (found.forward, found.backward, found.trained) == (wanted.forward, wanted.backward, wanted.model)
        full = whole(SHAPE, text(tokens))
        assert full.forward == pytest.approx(forward_flops([TOKENS], width=72, depth=3, mlp_width=136, token_width=64, text_tokens=tokens, text_width=40), rel=0.05)
        assert 2.5 * full.forward < full.trained < 3 * full.forward, "of what comes in nothing needs a gradient"


def parts(kind: Any, pipeline: Any) -> Any:
    return kind(pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, scheduler=pipeline.scheduler)


def hunyuan_video() -> Any:
    found = tiny_hunyuan_video.tiny_pipeline()
    return HunyuanVideoModel(found.transformer, found.vae, found.text_encoder, found.tokenizer, found.text_encoder_2, found.tokenizer_2, found.scheduler)


FAMILIES: dict[str, tuple[Callable[[], Any], Conditioning, tuple[int, int, int, int]]] = {
    "ltx": (lambda: parts(LTXVideoModel, tiny_ltx.tiny_pipeline()), text(16, 32), (8, 2, 3, 5)),
    "mochi": (lambda: parts(MochiVideoModel, tiny_mochi.tiny_pipeline()), text(16, 32), (12, 2, 4, 6)),
    "cogvideox": (lambda: parts(CogVideoXVideoModel, tiny_cogvideox.tiny_pipeline("5b")), text(12, 16), (4, 3, 4, 8)),
    "hunyuan_video": (hunyuan_video, text(16, 16, 8), (4, 2, 4, 6)),
    "two experts": (lambda: WanVideoModel(Experts(tiny_wan.transformer(), tiny_wan.transformer(), 0.875)), text(20, 16), (16, 3, 4, 6)),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dora", [None, True], ids=["full", "DoRA"])
def test_six_small_clips_tell_what_any_clip_costs_to_the_last_flop(name: str, dora: bool | None) -> None:
    make, cond, shape = FAMILIES[name]
    model = make()
    model.network.requires_grad_(dora is None)
    if dora is not None:
        model.network = add_lora(model.network, rank=2, alpha=2, targets=model.lora_targets, dora=dora)
    counter = FlopCounter(model)
    found = counter(shape, cond)
    assert found == counter.count(shape, cond) and 0 < found.forward < found.backward + found.forward == found.trained


def test_a_packed_pass_costs_the_sum_of_its_clips_and_recomputation_is_not_counted() -> None:
    net = network().requires_grad_(True)
    recompute_blocks(net)
    model = WanVideoModel(net)
    clips, conds = [torch.randn(16, *size) for size in ((1, 4, 6), (3, 2, 4), (2, 6, 6))], [text(n) for n in (7, 7, 2)]  # equal texts, or those of equal clips would be padded
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel([SDPBackend.MATH]):
        packed_velocity(PackedWan(net), model, clips, torch.tensor([0.2, 0.4, 0.9]), conds)
    counted = FlopCounter(model)
    found = [counted((16, *clip.shape[1:]), cond) for clip, cond in zip(clips, conds, strict=True)]
    assert sum(each.forward for each in found) == counter.get_total_flops()
    assert all(each.trained < 3 * each.forward for each in found)


def test_a_given_frame_costs_a_time_a_token() -> None:
    model = WanVideoModel(network().requires_grad_(True))
    given = Conditioning(("",), torch.randn(1, 7, 40), torch.ones(1, 7, dtype=torch.bool), known=Known(torch.randn(1, *SHAPE), torch.zeros(1, *SHAPE[1:], dtype=torch.bool)))
    counter = FlopCounter(model)
    plain, more = counter(SHAPE, text(7)), counter(SHAPE, given)
    w = 72
    assert more.forward - plain.forward == 2 * (TOKENS - 1) * (32 * w + w * w + 6 * w * w) and more == counter.count(SHAPE, given)


def test_the_built_in_network_costs_what_its_closed_form_says() -> None:
    model = build_tiny()
    model.network.requires_grad_(True)
    config, cond = model.config, model.encode_text(["a red ball rolls"])
    words = int(cond.mask.sum())
    found = FlopCounter(model)((model.latents.channels, 2, 8, 6), cond)
    sizes = {"width": config.width, "depth": config.depth, "mlp_width": config.mlp_ratio * config.width, "token_width": config.token_width, "text_width": config.text_width}
    assert found.forward == forward_flops([2 * 4 * 3], text_tokens=words, **sizes)
    assert FlopCounter(model).count((model.latents.channels, 2, 8, 6), cond) == found


def test_conditions_of_several_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="a clip at a time, got conditions of 2"):
        FlopCounter(WanVideoModel(network()))(SHAPE, text(3).followed_by(text(3)))


def test_a_gpus_peak_is_the_published_one_and_another_devices_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda")) == (989.4e12, False)
    begun = time.monotonic()
    rate, measured = peak_flops(torch.device("cpu"))
    print(f"{rate / 1e9:.0f} GFLOP/s")
    assert measured and 1e9 < rate < 1e14 and time.monotonic() - begun > base_model.flops.MEASURED_SECONDS
