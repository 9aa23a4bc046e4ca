"""Packed attention against a softmax written out per segment, and its back ends against each other: those that run here run, CUDA's say why they do not."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from base_model.networks import attention
from base_model.networks.attention import Backend, attention_backend, automatic_backend, document_mask, packed_attention
from base_model.networks.packing import Segments, pack
from tests.base_model.test_networks import BOTH, SMALL, NetworkName, clips_and_texts, run_packed, trained_looking

MIXED = (Segments((3, 3, 2, 5)), Segments((4, 2, 2, 6)))
LONG = (Segments((200, 100, 130, 1, 300)), Segments((150, 7, 260, 140, 3)))
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen and flex with gradient are CUDA kernels, and there is no GPU")


def draw(queries: Segments, keys: Segments, *, width: int = 8, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(segments.total, 2, width, generator=generator) for segments in (queries, keys, keys))
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


def written_out(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """softmax(q k / sqrt(d)) v of every segment alone, in float64."""
    parts = zip(q.double().split(list(queries.lengths)), k.double().split(list(keys.lengths)), v.double().split(list(keys.lengths)), strict=True)
    return torch.cat([torch.einsum("hnm,mhd->nhd", (torch.einsum("nhd,mhd->hnm", a, b) / math.sqrt(a.shape[-1])).softmax(-1), c) for a, b, c in parts])


@pytest.mark.parametrize(("queries", "keys"), [MIXED, LONG, (Segments((4, 4, 4)), Segments((2, 5, 1))), (Segments.equal(3, 4), Segments.equal(3, 4))])
def test_the_loop_is_the_softmax_of_each_segment(queries: Segments, keys: Segments) -> None:
    q, k, v = draw(queries, keys)
    assert automatic_backend(v, queries, keys) == "loop"
    assert (packed_attention(q, k, v, queries, keys) - written_out(q, k, v, queries, keys)).abs().max() < 1e-6


def test_the_gradients_of_the_loop_are_those_of_the_softmax() -> None:
    q, k, v = (x.requires_grad_() for x in draw(*MIXED))
    weight = torch.randn(13, 2, 8, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((packed_attention(q, k, v, *MIXED) * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((written_out(q, k, v, *MIXED) * weight).sum(), (q, k, v))
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def test_queries_and_keys_take_the_precision_of_the_values() -> None:
    q, k, v = draw(*MIXED)
    out = packed_attention(q, k, v.bfloat16(), *MIXED)
    assert out.dtype == torch.bfloat16
    assert (out - written_out(q, k, v, *MIXED)).abs().max() < 0.03


# Back ends


@pytest.mark.parametrize(("queries", "keys"), [MIXED, LONG, (Segments((128, 128)), Segments((128, 128))), (Segments((1,) * 300), Segments((1,) * 300))])
def test_flex_lists_exactly_the_tiles_in_which_some_query_may_see_some_key(queries: Segments, keys: Segments) -> None:
    mask = document_mask(queries, keys, torch.device("cpu"))
    tiles = (-(-queries.total // 128) * 128, -(-keys.total // 128) * 128)
    sees = torch.zeros(tiles, dtype=torch.bool)
    sees[: queries.total, : keys.total] = queries.ids[:, None] == keys.ids
    wanted = sees.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)  # [tiles of queries, tiles of keys]
    assert torch.equal(mask.to_dense()[0, 0].bool(), wanted)
    assert torch.equal(mask.mask_mod(None, None, torch.arange(queries.total)[:, None], torch.arange(keys.total)), sees[: queries.total, : keys.total])


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_flex_compiled_on_a_cpu_agrees_with_the_loop_and_has_no_gradient() -> None:
    q, k, v = draw(*LONG, width=16)
    with attention_backend("flex"):
        out = packed_attention(q, k, v, *LONG)
        assert (out - written_out(q, k, v, *LONG)).abs().max() < 1e-6
        with pytest.raises(ValueError, match=r"'flex' has no gradient outside CUDA, got float32 on cpu. Use 'loop'"):
            packed_attention(q.requires_grad_(), k, v, *LONG)


def test_varlen_gets_offsets_and_longest_segments_as_torch_documents_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with torch's own signature, computed from the offsets."""
    import inspect

    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def stand_in(*given: Any, **named: Any) -> Tensor:
        told = signature.bind(*given, **named).arguments
        q_at, k_at = told["cu_seq_q"], told["cu_seq_k"]
        assert q_at.dtype == k_at.dtype == torch.int32
        assert (told["max_q"], told["max_k"]) == (int(q_at.diff().max()), int(k_at.diff().max()))
        lengths = (Segments(tuple(q_at.diff().tolist())), Segments(tuple(k_at.diff().tolist())))
        return written_out(told["query"], told["key"], told["value"], *lengths).to(told["query"])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_hindrance", lambda name, q, k, v: None)
    monkeypatch.setattr(attention, "_has_cudnn", lambda device: False)
    q, k, v = draw(*MIXED)
    assert automatic_backend(v, *MIXED) == "varlen"
    assert (packed_attention(q, k, v, *MIXED) - written_out(q, k, v, *MIXED)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((32760,), "loop"), ((7800, 5000, 9000, 3600), "loop"), ((2048,) * 16, "loop"), ((512,) * 64, "loop"), ((512,), "varlen"), (tuple(range(300, 1220, 23)), "varlen")],
)
def test_where_cudnn_is_faster_few_long_clips_go_one_after_another_and_many_short_ones_together(lengths: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_hindrance", lambda name, q, k, v: None)
    monkeypatch.setattr(attention, "_has_cudnn", lambda device: True)
    assert automatic_backend(torch.zeros(1), Segments(lengths), Segments(lengths)) == expected
    monkeypatch.setattr(attention, "_has_cudnn", lambda device: False)
    assert automatic_backend(torch.zeros(1), Segments(lengths), Segments(lengths)) == "varlen"


def test_torchs_varlen_takes_these_arguments_and_has_a_gradient() -> None:
    """On the meta device: shapes and autograd of the real function, no numbers."""
    q, k, v = (x.requires_grad_() for x in draw(*MIXED, dtype=torch.bfloat16, device="meta"))
    out = attention._varlen(q, k, v, *MIXED)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert [x.shape for x in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_a_back_end_that_cannot_run_here_says_so_in_one_line() -> None:
    with attention_backend("varlen"), pytest.raises(ValueError, match=r"'varlen' needs CUDA .*, got float32 on cpu. Use 'loop'"):
        packed_attention(*draw(*MIXED), *MIXED)


def test_a_back_end_is_asked_for_in_all_threads_and_only_inside() -> None:
    seen: list[str] = []

    def look() -> None:
        try:
            packed_attention(*draw(*MIXED), *MIXED)
        except ValueError as error:
            seen.append(str(error))

    with attention_backend("varlen"), attention_backend("loop"):
        look()
    with attention_backend("varlen"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    look()
    assert len(seen) == 1 and "varlen" in seen[0]


@cuda
@pytest.mark.gpu
def test_a_long_clip_on_a_gpu_of_hoppers_kind_runs_cudnns_kernel() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9 or more")
    segments = Segments((4096,))
    q, k, v = draw(segments, segments, width=64, dtype=torch.bfloat16, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        packed_attention(q, k, v, segments, segments)
        torch.cuda.synchronize()
    assert any("cudnn" in event.key for event in seen.key_averages()), [event.key for event in seen.key_averages()]


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "bound"), [("varlen", torch.bfloat16, 0.03), ("varlen", torch.float16, 4e-3), ("flex", torch.float32, 1e-3), ("flex", torch.bfloat16, 0.03)]
)
def test_the_back_ends_of_cuda_agree_with_the_loop_in_outputs_and_gradients(backend: Backend, dtype: torch.dtype, bound: float) -> None:
    found: dict[str, list[Tensor]] = {}
    for name in ("loop", backend):
        q, k, v = (x.requires_grad_() for x in draw(*LONG, width=32, dtype=dtype, device="cuda"))
        with attention_backend(name):
            out = packed_attention(q, k, v, *LONG)
        found[name] = [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
    for a, b in zip(found["loop"], found[backend], strict=True):
        off = float((a - b).detach().abs().max() / b.detach().abs().max())
        print(backend, dtype, off)
        assert off < bound


@cuda
@pytest.mark.gpu
@BOTH
def test_a_network_in_half_precision_on_cuda_uses_varlen_and_agrees_with_the_loop(name: NetworkName) -> None:
    network = trained_looking(name).cuda().bfloat16()
    clips, texts, t = clips_and_texts()
    packed = pack(clips, SMALL.patch)
    arguments = packed.tokens.cuda().bfloat16(), packed.positions.cuda(), packed.segments, t.cuda(), torch.cat(texts).cuda().bfloat16(), Segments(tuple(map(len, texts)))
    with attention_backend("loop"):
        loop = network(*arguments)
    assert (network(*arguments) - loop).abs().max() < 0.05 * loop.abs().max()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@BOTH
def test_a_network_in_half_precision_stays_close_to_single_precision(name: NetworkName) -> None:
    """Weights in bfloat16, and autocast over float32 weights."""
    network = trained_looking(name)
    clips, texts, t = clips_and_texts()
    exact = torch.cat([x.flatten() for x in run_packed(network, clips, texts, t)])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.cat([x.flatten() for x in run_packed(network, clips, texts, t)])
    half = torch.cat([x.flatten() for x in run_packed(network.bfloat16(), [x.bfloat16() for x in clips], [x.bfloat16() for x in texts], t)])
    for low in (mixed, half):
        off = float((low - exact).detach().norm() / exact.detach().norm())
        print(name, off)
        assert low.dtype == torch.bfloat16 and 0 < off < 0.02
