"""Samples on the way and the page of a run: fixed noise, what is written where, what is told where something is missing."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base_model.errors import UserError
from base_model.types import Conditioning
from base_model.video.files import read_video
from recipes import sample_grid as grid
from recipes.generate import Sampler, sample, seeded_noise
from recipes.models import encode_prompts
from recipes.sample_grid import Said, draw_film, draw_samples, draw_sheet, prompts_of, sample_grid, write_samples
from recipes.shapes.prompts import Thing, write_prompt
from recipes.shapes.render import DEMO_CLIP, FPS, render, sample_scene
from recipes.validation import Look, Shaped, Summary, append_look
from recipes.validation_page import SHEETS, change, chosen, render_page, shape_rows, write_page
from tests.recipes.small import SAMPLER, small_model

PROMPTS = ("a red circle moves to the left", "a blue bar grows", "<b> & a green cross")


# Samples


def test_the_same_prompts_get_the_same_noise_whatever_the_batch() -> None:
    model = small_model()
    model.network.requires_grad_(False)
    cond = encode_prompts(model, PROMPTS)
    clips = draw_samples(model, cond, SAMPLER, seed=3)
    assert clips.shape == (3, 5, 3, 16, 16)
    assert (clips - draw_samples(model, cond, SAMPLER.model_copy(update={"batch": 1}), seed=3)).abs().max() < 1e-4
    assert (clips - draw_samples(model, cond, SAMPLER, seed=4)).abs().max() > 0.01
    alone = torch.cat(list(sample(model, cond[:1], [grid.derived_seed(3, "sample", 0) % 2**31], SAMPLER)))
    assert (clips[:1] - alone).abs().max() < 1e-4 and not torch.equal(*seeded_noise(model, SAMPLER.clip, [grid.derived_seed(3, "sample", k) % 2**31 for k in (0, 1)]))


def test_a_sheet_and_a_film_are_written_whole(tmp_path: Path) -> None:
    model = small_model()
    model.network.requires_grad_(False)
    found = sample_grid(model, encode_prompts(model, PROMPTS), SAMPLER, seed=0, sheet=tmp_path / "samples" / "000100.png")
    assert found.right is None and sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["000100.mp4", "000100.png"]
    assert prompts_of(found.sheet) == list(PROMPTS)
    film = read_video(found.film)
    assert len(film.frames) == 5 and film.fps == SAMPLER.fps
    with Image.open(found.sheet) as sheet:
        assert sheet.height == 2 * grid.MARGIN + 3 * (96 + 2 * grid.LINE + grid.GAP) - grid.GAP
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    assert prompts_of(tmp_path / "other.png") == []


def colours(*rows: tuple[float, float, float]) -> torch.Tensor:
    """[N,T,3,4,6]: clip n is black at first and has its colour from the second frame on."""
    clips = torch.tensor(rows)[:, None, :, None, None].repeat(1, 5, 1, 4, 6)
    clips[:, 0] = 0
    return clips


def test_a_row_of_the_sheet_is_a_clip_and_its_columns_are_frames() -> None:
    clips = colours((1, 0, 0), (0, 1, 0))
    sheet = np.array(draw_sheet(clips, ["one", "two"], [Said("right", True), Said("wrong: colour", False)]))
    width, height = 96, 64  # six pixels by sixteen
    line = height + 2 * grid.LINE + grid.GAP
    for n, colour in enumerate(((255, 0, 0), (0, 255, 0))):
        for column in range(5):
            cell = sheet[grid.MARGIN + n * line :, grid.MARGIN + column * (width + grid.SEAM) :][:height, :width]
            assert (cell == ((0, 0, 0) if column == 0 else colour)).all()
        under = sheet[grid.MARGIN + n * line + height : grid.MARGIN + (n + 1) * line - grid.GAP]
        assert (under < 128).any(), "the prompt is written under its clip"
        assert ((under[..., 0].astype(int) - under[..., 1]) > 60).any() == (n == 1), "what is wrong is red"


def test_a_clip_that_flashes_stands_still_in_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = torch.linspace(0.2, 0.4, 12)[:, None, None, None].expand(12, 3, 8, 8)
    flashing = (torch.arange(12) % 2).float()[:, None, None, None].expand(12, 3, 8, 8)
    film = draw_film(torch.stack([calm, flashing]), ["calm", "flashing"], [Said("", True)] * 2, [False, True])
    left, right = (film[:, grid.MARGIN : grid.MARGIN + 96, begin : begin + 96] for begin in (grid.MARGIN, grid.MARGIN + 96 + grid.GAP))
    assert (right == 0).all() and (np.diff(left.mean((1, 2, 3))) > 0).all()
    held: list[list[bool]] = []
    monkeypatch.setattr(grid, "draw_film", lambda clips, prompts, said, still: held.append(still) or film)
    write_samples(torch.stack([calm, flashing]), ["calm", "flashing"], 12.0, sheet=tmp_path / "a.png")
    assert held == [[False, True]]


def test_the_judge_says_which_samples_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    asked = [write_prompt((Thing(shape, colour, "still"),), rng, split="train") for shape, colour in (("circle", "red"), ("bar", "blue"))]
    clips = torch.stack([render(sample_scene(asked[0], rng, clip=DEMO_CLIP), DEMO_CLIP)] * 2)
    found = write_samples(clips, [prompt.text for prompt in asked], FPS, sheet=tmp_path / "a.png", asked=asked)
    assert found.right == 0.5


def test_a_long_prompt_is_cut_and_a_large_clip_shrinks() -> None:
    sheet = draw_sheet(torch.rand(1, 2, 3, 300, 480), ["word " * 200], [Said("", True)])
    assert sheet.width == 2 * grid.MARGIN + 2 * (240 + grid.SEAM) - grid.SEAM and sheet.height == 2 * grid.MARGIN + 150 + 2 * grid.LINE
    right = np.array(sheet)[-grid.MARGIN - 2 * grid.LINE :, -grid.MARGIN :]
    assert (right == 255).all(), "nothing is written into the margin"


def test_a_size_that_cannot_be_made_is_told_before_anything_is_written(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(UserError, match=r"sampler of 6x16x16"):
        sample_grid(
            model, Conditioning(("a",), torch.zeros(1, 1, 384), torch.ones(1, 1, dtype=torch.bool)), Sampler(frames=6, height=16, width=16), seed=0, sheet=tmp_path / "a.png"
        )
    assert not list(tmp_path.iterdir())


# The page


def summary(scale: float, clips: int = 4) -> Summary:
    return Summary(
        clips, 0.3 * scale, 0.1 * scale, 0.5 * scale, (0.2, 0.5, 0.8), (0.1 * scale, 0.3 * scale, 0.5 * scale), {"13x32x32": Shaped(3, 0.2 * scale), "1x16x16": Shaped(1, 0.6)}
    )


def logged(out: Path, *lines: Mapping[str, Any]) -> None:
    (out / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, "seconds": 2.0 * i, **line}) + "\n" for i, line in enumerate(lines)))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))


def test_the_page_of_a_whole_run(tmp_path: Path) -> None:
    speed = {"clips_per_second": 20.0, "tokens_per_second": 1500.0, "mfu": 0.25, "data_wait": 0.03}
    logged(tmp_path, *({"loss": 0.4 - i / 1000, **speed} for i in range(40)))
    append_look(tmp_path, Look(10, summary(1.0), summary(1.1), 0.25))
    append_look(tmp_path, Look(40, summary(0.9), summary(0.55), 0.5))
    (tmp_path / "samples").mkdir()
    for n in (10, 40):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "samples" / f"{n:06d}.png")
    page = write_page(tmp_path).read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "samples", "validation.html", "validation.jsonl"]
    told = text_of(page)
    assert f"{tmp_path.name} After iteration 39, 1:18 of work, 4 clips held out." in told
    assert "Held-out loss 0.1650 Since the first look -50.0 %" in told and "MFU 25 %" in told and "Waiting for data 3 %" in told
    assert "13x32x32 3 0.2200 0.1100 -50.0 % 1x16x16 1 0.6000 0.6000 +0.0 %" in told and "of the averaged weights" in told
    for title in ("Training loss", "Held-out loss", "By noise level", "Each noise level since the first look", "Samples that are right", "Clips a second"):
        assert f"<h3>{title}</h3>" in page
    assert "iteration 10: 0.11 at first, 0.55 at last; iteration 40: 0.055 at first, 0.275 at last" in page
    assert page.count("t 0.80: 1 at first, 0.5 at last") == 1 and 'href="samples/000040.mp4"' in page
    pictures = [base64.b64decode(found) for found in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]
    assert [Image.open(io.BytesIO(picture)).getpixel((4, 4))[0] for picture in pictures] == pytest.approx([10, 40], abs=2)  # type: ignore[index]
    assert "http" not in page and "<script" not in page, "the page needs no network"


def test_a_run_that_has_only_some_of_it_has_a_page(tmp_path: Path) -> None:
    told = text_of(render_page(tmp_path))
    assert all(missing in told for missing in ("Nothing was logged yet.", "Nobody has looked at held-out clips yet.", "No samples yet.", "Not logged."))
    logged(tmp_path, {"loss": 0.5}, {"loss": None}, {"learning_rate": 1.0})
    told = text_of(render_page(tmp_path))
    assert "Training loss" in told and "nobody has looked" in told and "Held-out loss" not in told
    append_look(tmp_path, Look(2, summary(1.0)))
    told = text_of(render_page(tmp_path))
    assert "Held-out loss 0.3000 Since the first look +0.0 %" in told and "of the weights as they are" in told
    assert "By noise level" in told and "Each noise level since" not in told, "one look is no line"
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot read the metrics"):
        write_page(tmp_path)


def test_what_prompts_say_is_no_markup(tmp_path: Path) -> None:
    write_samples(torch.rand(3, 2, 3, 8, 8), PROMPTS, 12.0, sheet=tmp_path / "samples" / "000001.png")
    page = render_page(tmp_path)
    assert "&lt;b&gt; &amp; a green cross" in page and "<b> & a green" not in page


def test_few_sheets_are_shown_of_many_and_the_ends_are_among_them() -> None:
    files = [Path(f"{n}.png") for n in range(40)]
    assert len(chosen(files)) == SHEETS and chosen(files)[0] == files[0] and chosen(files)[-1] == files[-1] and chosen(files) == sorted(chosen(files), key=files.index)
    assert chosen(files[:3]) == files[:3] and chosen([]) == []


def test_a_shape_that_is_new_or_unknown_is_said_to_be() -> None:
    first = Look(1, Summary(1, 0.5, 0.5, 0.5, (0.5,), (0.5,), {"a": Shaped(1, 0.5)}))
    last = Look(2, Summary(1, 0.4, 0.4, 0.4, (0.5,), (0.4,), {"a": Shaped(0, float("nan")), "b": Shaped(1, 0.25)}))
    assert shape_rows([first, last]) == [("a", "0", "0.5000", "unknown", "unknown"), ("b", "1", "unknown", "0.2500", "unknown")]
    assert change(0.2, 0.19) == "-5.0 %" and change(0.0, 1.0) == "unknown"
