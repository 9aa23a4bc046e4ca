"""The vision-language reward's recipe, end to end on tiny random models and a small clip store with a planted taste."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recipes.vlm_reward as recipe
from align.run import read_metrics
from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes.reward_model import Rankings
from recipes.vlm_reward import Asked, Config, Frames, main, set_nll, sets_of
from reward.comparisons import Clip, Prompt, RankingEvent, write_comparisons
from reward.ranking import plackett_luce
from reward.types import Scores
from reward.vlm.files import WEIGHTS, load_vlm_reward
from tests.reward.vlm.tiny import save_tiny

FRAMES = Frames(fps=4.0, min_frames=2, max_frames=16, min_pixels=64, max_pixels=1024)


def make_world(folder: Path, prompts: int, *, wishes: tuple[str, ...] = ("clip",)) -> Path:
    """Prompts that begin with a wish, three clips each of random brightness. Ranked by brightness, the darkest first where the wish is "dark"."""
    rng = np.random.default_rng(0)
    store, new, texts = ClipStore(folder / "clips"), [], []
    for i in range(prompts):
        texts.append(f"{wishes[i % len(wishes)]} {i}")
        for j in range(3):
            pixels = torch.from_numpy(rng.uniform(0.1, 0.9) + rng.uniform(-0.05, 0.05, (5, 3, 16, 16))).float()
            new.append(NewClip(pixels, texts[i], f"p{i}", j, {"steps": 1}, "test", 8.0))
    rows = store.add_many(new, preview=False)
    events = []
    for i, text in enumerate(texts):
        level = np.array([float(clip.video.mean()) for clip in new[3 * i : 3 * i + 3]]) * (-1 if text.startswith("dark") else 1)
        ranks = tuple(int((level > own).sum()) + 1 for own in level)
        events.append(RankingEvent(f"e{i}", f"t{i}", f"p{i}", "ann", tuple(row.clip_id for row in rows[3 * i : 3 * i + 3]), ranks, licence="CC0"))
    clips, asked = [Clip.of(row) for row in rows], [Prompt(f"p{i}", text) for i, text in enumerate(texts)]
    write_comparisons(folder / "rankings", events, clips=clips, prompts=asked)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), 28)
    for family in ("qwen2_5_vl", "qwen3_vl"):
        save_tiny(folder / family, family)
    return folder


def config(world: Path, out: Path, family: str = "qwen2_5_vl", **changes: Any) -> Config:
    fast: dict[str, Any] = {"rank": 4, "alpha": 8.0, "epochs": 4, "learning_rate": 0.02, "batch": 4, "frames": FRAMES}
    return Config.model_validate({"out": out, "comparisons": world / "rankings", "clips": world / "clips", "base": str(world / family), **fast, **changes})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_brighter_clips_are_learned_to_be_better_on_held_out_prompts(family: str, world: Path, tmp_path: Path) -> None:
    result = main(config(world, tmp_path / "out", family))
    first, last = (read_metrics(tmp_path / "out")[i]["held_out_nll"] for i in (0, -1))
    print(f"{family}: accuracy {result['accuracy']['mean']:.2f} on {result['pairs']} pairs, held-out nll {first:.2f} -> {last:.2f} of log 6 = {math.log(6):.2f}")
    assert result["pairs"] >= 15 and result["accuracy"]["mean"] >= 0.85  # chance is 0.5
    assert last < 1.0

    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["measured"]["accuracy"] == result["accuracy"] and card["fps"] == [8.0] and card["licences"] == ["CC0"]
    assert " --rank 4 " in card["command"] and " --learning_rate 0.02 " in card["command"] and card["config"]["epochs"] == 4
    assert card["sampler"]["fps"] == 4.0 and card["data_sha256"] and sum(card["answers"].values()) == 28
    model = load_vlm_reward(tmp_path / "out", clip_fps=8.0)
    levels = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1, 1).expand(3, 5, 3, 16, 16)
    scores = model(levels, ["clip 999"] * 3).mean[:, 0]
    assert scores[0] < scores[1] < scores[2]
    assert float(model.center[0]) == pytest.approx(card["normalisation"]["overall"]["center"])


@pytest.mark.slow
def test_what_the_prompt_asks_for_is_learned_where_brightness_alone_says_nothing(tmp_path: Path) -> None:
    make_world(tmp_path, 60, wishes=("bright", "dark"))
    save_tiny(tmp_path / "qwen2_5_vl", "qwen2_5_vl")
    result = main(config(tmp_path, tmp_path / "out", rank=8, epochs=10))
    print(result["accuracy"], result["floor"])
    assert result["floor"]["mean"] < 0.7 and result["accuracy"]["low"] > 0.7


def test_a_run_that_died_goes_on_to_the_same_weights_and_metrics(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"epochs": 2, "save_every": 2, "spread": True, "samples": 4}
    main(config(world, tmp_path / "whole", **small))
    counted, real = [], recipe.set_nll

    def dies(*arguments: Any) -> Any:
        counted.append(1)
        if len(counted) == 30:
            raise RuntimeError("power cut")
        return real(*arguments)

    monkeypatch.setattr(recipe, "set_nll", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        main(config(world, tmp_path / "broken", **small))
    result = main(config(world, tmp_path / "broken", **small), resume=True)
    assert (tmp_path / "broken" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert read_metrics(tmp_path / "broken", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)
    kept = sum(file.stat().st_size for file in (tmp_path / "whole" / "checkpoints").rglob("*.safetensors"))
    assert math.isfinite(result["accuracy"]["mean"]) and kept < 40 * (tmp_path / "whole" / WEIGHTS).stat().st_size, "a checkpoint does not hold the base"


def part_of(index: list[list[int]], ranks: list[list[int]], dim: list[int]) -> Rankings:
    clips = 1 + max(max(row) for row in index)
    names = tuple(f"c{i}" for i in range(clips))
    events = (torch.tensor(index), torch.tensor(ranks), torch.tensor(dim), torch.ones(len(index)), torch.zeros(len(index), dtype=torch.long))
    return Rankings(torch.zeros(clips, 1, 3, 2, 2), names, names, *events)


def test_rankings_of_the_same_clips_share_one_forward() -> None:
    """Two people, two dimensions, in another order; one that left a clip out; a filled-up pair."""
    part = part_of([[0, 1, 2], [2, 0, 1], [0, 1, 2], [3, 4, 0]], [[1, 2, 3], [1, 1, 2], [1, 2, 0], [2, 1, 0]], [0, 1, 0, 0])
    assert [(number, rows.tolist()) for number, rows in sets_of([part, part])] == [(n, rows) for n in (0, 1) for rows in ([0, 1], [2], [3])]


class Ties:
    log_tie = torch.full((2, 2), -math.inf)


def test_the_likelihood_of_a_set_is_plackett_luce_of_its_own_clips_and_dimension() -> None:
    part = part_of([[4, 2, 3], [3, 4, 2], [2, 3, 0]], [[1, 2, 3], [3, 2, 1], [2, 1, 0]], [0, 1, 1])
    clips, mean = torch.tensor([2, 3, 4]), torch.randn(3, 2, dtype=torch.float64)
    scores = Scores(mean, torch.zeros_like(mean))
    nll = set_nll(Ties(), scores, part, torch.arange(3), clips, torch.zeros(1, 3, 2))  # type: ignore[arg-type]
    for row, (order, dim) in enumerate((([2, 0, 1], 0), ([0, 2, 1], 1), ([1, 0], 1))):  # best first, places in `clips`
        expected = -plackett_luce(mean[order, dim][None], torch.arange(1, len(order) + 1)[None])[0]
        assert float(nll[row]) == pytest.approx(float(expected), abs=1e-10)


def test_with_spread_the_likelihood_is_the_average_over_the_doubt() -> None:
    """Of a pair: Gauss-Hermite quadrature of the logistic function under the difference of two normal scores."""
    part, generator = part_of([[0, 1]], [[1, 2]], [0]), torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([[0.7, 0.0], [-0.2, 0.0]], dtype=torch.float64), torch.tensor([[1.5, 1.0], [0.8, 1.0]], dtype=torch.float64)
    noise = torch.randn(200_000, 2, 2, generator=generator, dtype=torch.float64)
    found = set_nll(Ties(), Scores(mean, spread), part, torch.arange(1), torch.arange(2), noise)  # type: ignore[arg-type]
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    difference = 0.9 + math.hypot(1.5, 0.8) * nodes
    expected = -math.log(float((weights / (1 + np.exp(-difference))).sum() / weights.sum()))
    assert float(found[0]) == pytest.approx(expected, abs=3e-3)


def test_what_cannot_be_learned_is_one_line_before_anything_is_computed(world: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"dimensions": {"beauty": Asked()}}, "dimensions.beauty: nobody ranked clips in it"),
        ({"base": str(tmp_path / "nowhere")}, "cannot load the base"),
        ({"frames": FRAMES.model_copy(update={"fps": 9.0})}, r"clip [0-9a-f]{64}: a clip has 8 frames a second, and the reward model looks at 9"),
        ({"frames": FRAMES.model_copy(update={"fps": 8.0, "min_frames": 2, "max_frames": 4})}, "needs 5 frames at 8 a second"),
        ({"frames": FRAMES.model_copy(update={"min_frames": 40})}, "not a frame sampler"),
        ({"comparisons": tmp_path / "none"}, "no such file"),
    ]
    for number, (changes, match) in enumerate(cases):
        with pytest.raises(UserError, match=match) as error:
            main(config(world, tmp_path / str(number), **changes))
        assert "\n" not in str(error.value)
