"""The held-out loss of SFT: what it is by hand for every model, that it depends on nothing but weights and clips, who is held out, and the file of looks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from align.run import derived_seed
from base_model.errors import UserError
from base_model.families.ltx import LTXVideoModel
from base_model.families.wan import WanVideoModel
from base_model.types import Conditioning, Known, TrainableModel
from recipes.bench._examples import InMemory
from recipes.examples import Velocities
from recipes.validation import LOOKS, Look, Shaped, Summary, Validation, append_look, batches_of, read_looks, split
from tests.base_model.families import tiny_ltx, tiny_wan
from tests.recipes.small import small_model

SHAPES = ((2, 4, 4), (1, 6, 4), (2, 4, 4), (3, 2, 4), (2, 4, 4))
SOURCES = ("a.mp4", "b.mp4", "a.mp4", "c.mp4", "d.mp4")
ROWS = (3, 0, 2, 1)


def texts(lengths: Iterable[int], width: int) -> Conditioning:
    """One condition a length and the empty one of length 1; what is behind the end is masked."""
    lengths = [*lengths, 1]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Conditioning(tuple(f"text {k}" for k in range(len(lengths))), torch.randn(*mask.shape, width), mask)


def drawn(channels: int, conds: Conditioning) -> InMemory:
    generator = torch.Generator().manual_seed(0)
    return InMemory([torch.randn(channels, *shape, generator=generator) for shape in SHAPES], conds, SOURCES)


def built_in() -> tuple[TrainableModel, InMemory]:
    model = small_model()
    return model, drawn(8, model.encode_text(["a red circle", "a blue bar", "a green bar grows", "a red bar", "a cross", ""]))


def wan() -> tuple[TrainableModel, InMemory]:
    return WanVideoModel(tiny_wan.transformer()), drawn(16, texts([5] * 5, 16))


def ltx() -> tuple[TrainableModel, InMemory]:
    pipeline = tiny_ltx.tiny_pipeline()
    model = LTXVideoModel(pipeline.transformer, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder, pipeline.scheduler)
    return model, drawn(tiny_ltx.CHANNELS, texts([5, 5, 2, 5, 5], tiny_ltx.WIDTH))


MODELS = {"built-in": built_in, "wan": wan, "ltx": ltx}


def looked(model: TrainableModel, examples: InMemory, **settings: Any) -> Validation:
    return Validation(**{"velocities": Velocities(model), "examples": examples, "rows": ROWS, "seed": 7, "quantiles": 4, "capacity": 40, **settings})


@torch.no_grad()
def by_hand(model: TrainableModel, examples: InMemory, rows: Iterable[int] = ROWS, *, seed: int = 7, quantiles: int = 4, shift: float = 3.0) -> Tensor:
    """Each clip alone through the model itself, on the rectified path; which of its source an example is, is counted here."""
    found = []
    for q in range(quantiles):
        odds = shift * math.exp(norm.ppf((q + 0.5) / quantiles))
        t = odds / (1 + odds)
        line = []
        for row in rows:
            number = list(SOURCES[:row]).count(SOURCES[row])
            x0 = examples.latent(row)
            eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(derived_seed(seed, f"validation/{SOURCES[row]}/{number}", q)))
            u = model(((1 - t) * x0 + t * eps)[None], torch.tensor([t]), examples.cond(row))[0]
            line.append((u - (eps - x0)).square().mean())
        found.append(torch.stack(line))
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
def test_the_errors_are_those_of_each_clip_alone_at_the_quantiles(name: str) -> None:
    model, examples = MODELS[name]()
    validation = looked(model, examples)
    found, wanted = validation.errors(), by_hand(model, examples)
    print(f"{name}: {(found - wanted).abs().max():.1e} apart, errors {wanted.min():.2f} to {wanted.max():.2f}")
    assert found.shape == (4, 4) and (found - wanted).abs().max() < 2e-5 * wanted.max()
    assert torch.equal(found, validation.errors()), "a second look at the same weights"
    assert (found - by_hand(model, examples, seed=8)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_and_processes_change_nothing(name: str) -> None:
    model, examples = MODELS[name]()
    alone, together = (looked(model, examples, capacity=capacity).errors() for capacity in (1, 10_000))
    assert (alone - together).abs().max() < 2e-5 * alone.max()
    validation = looked(model, examples, capacity=24)
    told: list[Any] = []
    for rank in range(3):  # what three processes would tell one another

        def share(batches: list[list[int]], rank: int = rank) -> list[list[int]]:
            return batches[len(batches) * rank // 3 : len(batches) * (rank + 1) // 3]

        def gather(items: Iterable[Any]) -> list[Any]:
            told.extend(items)
            return told

        last = validation.errors(share=share, gather=gather)
    assert len(batches_of(validation.velocities, [examples.shapes[row] for row in ROWS], 24)) > 1
    assert torch.equal(last, validation.errors())


def test_the_noise_of_a_clip_does_not_hang_on_other_clips() -> None:
    model, examples = built_in()
    fewer = InMemory([examples.clips[k] for k in (1, 3)], examples.conds[[1, 3, 5]], ("b.mp4", "c.mp4"))
    found, before = looked(model, fewer, rows=(0, 1)).errors(), looked(model, examples, rows=(1, 3)).errors()
    assert (found - before).abs().max() < 1e-5
    assert not torch.equal(*(looked(model, examples, rows=(row,)).errors() for row in (0, 2))), "two windows of one file have noise of their own"


def test_what_a_visual_prompt_gives_takes_no_part() -> None:
    """A frame is given that is not the clip's own: the network is told it, and only the rest is compared."""
    model, examples = built_in()
    x0 = examples.clips[0]
    mask = torch.zeros(1, *x0.shape[1:], dtype=torch.bool)
    mask[:, 0] = True
    given = Known(torch.full_like(x0, 0.5)[None], mask)

    class Given(InMemory):
        def cond(self, row: int | None) -> Conditioning:
            cond = super().cond(row)
            return replace(cond, known=given) if row == 0 else cond

    told = Given(examples.clips, examples.conds, SOURCES)
    validation = looked(model, told, rows=(0, 2))
    found = validation.errors()
    t, eps = validation.times[:, 0], [torch.randn(x0.shape, generator=validation.generator(0, q)) for q in range(4)]
    for q, noise in enumerate(eps):
        with torch.no_grad():
            u = model(((1 - t[q]) * x0 + t[q] * noise)[None], t[q : q + 1], told.cond(0))[0]
        assert float(found[q, 0]) == pytest.approx(float((u - (noise - x0))[:, 1:].square().mean()), rel=1e-5)
    assert (found[:, 1] - looked(model, examples, rows=(0, 2)).errors()[:, 1]).abs().max() < 1e-5, "its neighbour has its text alone"
    mask[:] = True
    known = validation.summary(validation.errors())
    assert known.clips == 1 and known.by_shape["5x16x16"].clips == 1 and math.isfinite(known.mean), "who gives all has no error"


def test_micro_batches_hold_their_tokens_and_one_shape_where_a_model_does_not_pack() -> None:
    for name, stride, large in (("built-in", 2, (8, 9, 10, 10)), ("ltx", 1, (8, 9, 9, 9))):
        velocities, shapes = Velocities(MODELS[name]()[0]), [*((8, *shape) for shape in SHAPES), large]
        tokens = [math.prod(shape[1:]) // stride**2 for shape in shapes]
        batches = batches_of(velocities, shapes, 20)
        assert sorted(k for batch in batches for k in batch) == list(range(6)) and batches[0] == [5], "the costliest first, alone"
        assert all(sum(tokens[k] for k in batch) <= 20 for batch in batches[1:] if len(batch) > 1)
        mixed = any(len({shapes[k] for k in batch}) > 1 for batch in batches)
        assert mixed == velocities.packs == (name == "built-in")


def test_times_follow_the_shift_of_each_clip() -> None:
    model, examples = built_in()
    one, each = looked(model, examples, shift=3.0), looked(model, examples, shift=torch.tensor([1.0, 3.0, 9.0, 3.0]))
    assert one.times.shape == each.times.shape == (4, 4) and torch.allclose(one.times[:, 1], each.times[:, 1])
    assert bool((each.times[:, 0] < each.times[:, 1]).all()) and bool((each.times[:, 1] < each.times[:, 2]).all()) and bool((one.times.diff(dim=0) > 0).all())


def test_a_summary_adds_up() -> None:
    model, examples = built_in()
    validation = looked(model, examples)
    errors = torch.arange(16.0).reshape(4, 4)
    errors[0, 3] = torch.nan
    found = validation.summary(errors)
    assert found.clips == 4 and found.mean == pytest.approx((120 - 3) / 15) and found.low_noise == 1 and found.high_noise == 13.5
    assert found.by_quantile == (1, 5.5, 9.5, 13.5) and found.times == pytest.approx(validation.times[:, 0].tolist())
    assert list(found.by_shape) == ["9x8x16", "1x24x16", "5x16x16"], "the smallest clip first"
    assert found.by_shape["5x16x16"] == Shaped(2, pytest.approx((1 + 5 + 9 + 13 + 2 + 6 + 10 + 14) / 8))
    assert found.by_shape["1x24x16"] == Shaped(1, pytest.approx((7 + 11 + 15) / 3))


# Who is held out


def sourced(names: Iterable[str]) -> InMemory:
    names = list(names)
    return InMemory([torch.zeros(1, 1, 1, 1)] * len(names), texts([1] * len(names), 1), names)


def sides(names: list[str], held_out: float, seed: int = 0) -> tuple[set[str], set[str]]:
    examples = sourced(names)
    training, kept = split(examples, held_out, seed=seed)
    assert sorted([*training, *kept]) == list(range(len(names))) and training == sorted(training) and kept == sorted(kept)
    return {names[row] for row in training}, {names[row] for row in kept}


@pytest.mark.parametrize("held_out", [0.001, 0.2, 0.999, 1, 3, 40, 10_000])
def test_a_file_is_on_one_side_and_neither_side_is_empty(held_out: float) -> None:
    names = [f"{k % 20}.mp4" for k in range(60)]
    training, kept = sides(names, held_out)
    assert training and kept and not training & kept and len(training | kept) == 20
    assert sides(names, held_out) == (training, kept)
    assert any(sides(names, held_out, seed=seed)[1] != kept for seed in range(1, 6))
    if held_out >= 1:
        assert len(kept) == min(math.ceil(held_out / 3), 10), "whole files, three windows each, at most half of them"


def test_a_share_is_met_and_no_clip_changes_sides_when_others_come() -> None:
    names = [f"{k}.mp4" for k in range(2000)]
    training, kept = sides(names, 0.1)
    assert len(kept) / 2000 == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 2000))
    more = [f"new {k}.mp4" for k in range(500)]
    then, later = sides([*more, *names], 0.1)
    assert kept == later - set(more) and training == then - set(more)


@pytest.mark.parametrize("held_out", [0.1, 25])
def test_a_clip_that_was_learned_from_is_never_held_out_later(held_out: float) -> None:
    names = [f"{k}.mp4" for k in range(100)]
    training, _ = sides(names, held_out)
    _, later = sides([*names, *(f"new {k}" for k in range(300))], held_out)
    assert later and not later & training


def test_one_clip_cannot_be_on_both_sides() -> None:
    with pytest.raises(UserError, match=r"3 examples of 1 source.*at least two"):
        split(sourced(["a.mp4"] * 3), 0.5, seed=0)


# Looks on disk


def summary(mean: float) -> Summary:
    return Summary(3, mean, 0.1, math.nan, (0.2, 0.8), (0.1, mean), {"5x16x16": Shaped(2, mean), "13x32x32": Shaped(1, 0.5)})


def looks(*numbers: int) -> list[Look]:
    return [Look(number, summary(number / 7), summary(number / 9) if number % 2 else None, 0.25 if number > 2 else None) for number in numbers]


def same(a: list[Look], b: list[Look]) -> bool:
    return repr(a) == repr(b)  # nan is not equal to itself


def test_looks_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_looks(tmp_path) == []
    for look in looks(1, 2, 3):
        append_look(tmp_path, look)
    assert same(read_looks(tmp_path), looks(1, 2, 3))
    lines = (tmp_path / LOOKS).read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["raw"]["high_noise"] is None, "JSON knows no nan"
    assert sorted(file.name for file in tmp_path.iterdir()) == [LOOKS]


def test_a_resumed_run_has_no_look_twice(tmp_path: Path) -> None:
    for look in looks(1, 3, 5):
        append_look(tmp_path, look)
    append_look(tmp_path, looks(3)[0])
    assert same(read_looks(tmp_path), looks(1, 3)), "those after it are of weights that are gone"


@pytest.mark.parametrize("text", ["{", "[]\n", "{}\n", '{"iteration": 1, "raw": {}}\n', "\x00"])
def test_a_damaged_file_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / LOOKS).write_text(text)
    with pytest.raises(UserError, match=r"cannot read the held-out losses, .*validation\.jsonl: [^\n]*Restore"):
        read_looks(tmp_path)
