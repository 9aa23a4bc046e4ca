"""The strip of before and after: the report's prompts in its order, the report's noise, and what the judge says above every clip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.config import dump
from base_model.errors import UserError
from recipes import evaluate
from recipes.bench import strip
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene


def finished_demo(folder: Path, cfg: evaluate.Config) -> Path:
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "report.json").write_text(json.dumps({"config": dump(cfg)}))
    return folder


def test_frames_are_spread_over_the_clip_and_pixels_repeated() -> None:
    video = torch.arange(13).div(255).reshape(13, 1, 1, 1).expand(13, 3, 2, 4)
    picture = np.asarray(strip.film(video, frames=5, scale=3))
    assert picture.shape == (6, 72, 3)
    assert picture[0, ::15, 0].tolist() == [0, 3, 6, 9, 12]
    assert (picture[:, :12] == 0).all() and (picture[:, 12:15] == 255).all() and (picture[:, 60:] == 12).all()


def test_rows_are_the_first_prompts_of_the_report_with_its_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = evaluate.Config(seed=3, prompts=10, clips_per_prompt=4, two_objects=0.2)
    asked = make_prompts(10, seed=900_003, split="eval", two_objects=0.2, strobe=0.2)[:3]
    rng = np.random.default_rng(0)
    drawn = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in asked])
    noise: dict[str, Sequence[int]] = {}

    def generator(models: object, sampler: object) -> evaluate.Generate:
        def generate(name: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            assert list(texts) == [prompt.text for prompt in asked]
            noise[name] = seeds
            return torch.zeros_like(drawn) if name == "base" else drawn

        return generate

    monkeypatch.setattr(evaluate, "generator", generator)
    out = tmp_path / "strip.png"
    rows = strip.main(strip.Config(run=finished_demo(tmp_path / "demo", cfg), out=out, prompts=3))["rows"]
    assert isinstance(rows, list)
    assert [(row["model"], row["right"]) for row in rows] == [("base", False)] * 3 + [("sft", True)] * 3 + [("rl", True)] * 3
    assert noise["base"] == noise["sft"] == noise["rl"] == evaluate.clip_seeds(900_003, 40)[0:12:4]
    assert [row["strobing_prompt"] for row in rows[:3]] == [prompt.strobe for prompt in asked]

    picture = np.asarray(Image.open(out))
    film = np.asarray(strip.film(drawn[1], 5, 2))
    left = strip.MARGIN + film.shape[1] + strip.GAP
    top = strip.MARGIN + strip.HEADER + 2 * (strip.CAPTION + strip.LABEL) + film.shape[0] + strip.GAP
    assert (picture[top : top + 64, left : left + film.shape[1]] == film).all()


def test_what_is_wrong_and_what_flashes_is_said() -> None:
    calm, wild = make_prompts(2, seed=0, split="eval"), make_prompts(1, seed=0, split="eval", strobe=1.0)
    rng = np.random.default_rng(1)
    clips = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in (calm[0], *wild)])
    shown = strip.judged(clips, [calm[1], *wild])
    assert not shown[0].right and shown[0].remark
    assert shown[1].remark.endswith("flashes")


def test_a_folder_without_a_report_or_with_real_clips_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no report of a finished demo, .*Run `rushes demo"):
        strip.evaluation_of(tmp_path)
    with pytest.raises(UserError, match="a demo on real clips"):
        strip.evaluation_of(finished_demo(tmp_path / "real", evaluate.Config(captions=("a horse",))))
