"""The bench of visual prompts: with a model that shows the truth every number is known, files hold what they should, and the sheet has one line a kind."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.config import load
from base_model.errors import UserError
from base_model.tiny import LatentVideoModel
from base_model.types import ClipShape, Conditioning
from recipes import cli
from recipes.bench import _sheet, visual
from recipes.generate import Sampler, Sampling
from recipes.shapes.prompts import is_held_out
from recipes.shapes.render import body_path, sample_scene
from recipes.visual import Prepared, Visual
from tests.recipes.small import save_small_network, small_model

KINDS = ["text", "image", "edit", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint", "one frame", "another size", "long"]
GIVEN = ["image", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint"]
JOINED = ["extend", "extend_back", "connect", "loop"]
TOY = ["--clips", "1", "--seconds", "1", "--sampler", "{steps: 1, frames: 9, height: 16, width: 16}"]
Found = dict[str, tuple[visual.Plan, list[visual.Made]]]


def made_by_one_who_knows(monkeypatch: pytest.MonkeyPatch, cfg: visual.Config, *, exact: bool) -> Found:
    """Clips of a model that shows the truth, as it is or as the autoencoder gives it back."""
    drawn: list[tuple[visual.Plan, visual.Truth]] = []
    draw_truth = visual.draw_truth

    def remember(plan: visual.Plan, *more: object) -> visual.Truth:
        drawn.append((plan, draw_truth(plan, *more)))  # type: ignore[arg-type]
        return drawn[-1][1]

    def sampling_of(asked: Visual, prepared: Prepared) -> Sampling:
        def sampling(model: LatentVideoModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
            plan, truth = drawn[-1]
            window = truth.clip[list(plan.window)]
            joined = prepared.join(window if exact else model.decode(model.encode(window[None]))[0])
            yield torch.cat([joined, truth.clip[len(joined) :]])[None]

        return sampling

    monkeypatch.setattr(visual, "draw_truth", remember)
    monkeypatch.setattr(visual, "visual_sampling", sampling_of)
    return visual.make_all(cfg)


@pytest.mark.parametrize("given", [5, 13])
def test_frames_are_put_together_to_the_clip_they_were_cut_from(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    found = made_by_one_who_knows(monkeypatch, visual.Config(clips=3, given=given, seconds=3), exact=True)
    assert list(found) == KINDS
    for kind, (plan, clips) in found.items():
        for made in clips:
            canvas = made.prepared.canvas
            assert torch.equal(made.clip, made.truth.clip), kind
            assert torch.equal(canvas.video.movedim(1, -1)[canvas.given], made.window.movedim(1, -1)[canvas.given]), kind
            assert bool(canvas.given.any()) == (kind in GIVEN) and (made.prepared.start is not None) == (kind == "edit")
        row = visual.row(kind, plan, clips)
        assert row["judge"] == row["judge_of_source"] == 1, kind
        assert row["psnr_of_given"] is None or row["psnr_of_given"] == row["psnr_of_rest"] == math.inf
        assert row["jump"] is None or 0.6 < row["jump"] < 1.7, (kind, row["jump"])
    extended, connected = (found[kind][1][0].clip for kind in ("extend", "connect"))
    assert len(extended) == given + 8 and len(connected) == 2 * given + 4


def test_what_only_the_autoencoder_touched_is_as_good_as_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {kind: visual.row(kind, plan, clips) for kind, (plan, clips) in made_by_one_who_knows(monkeypatch, visual.Config(clips=2), exact=False).items()}
    assert [kind for kind, row in rows.items() if row["psnr_of_given"] is not None] == GIVEN
    assert [kind for kind, row in rows.items() if row["jump"] is not None] == [*JOINED, "long"]
    for kind in GIVEN:
        assert rows[kind]["psnr_of_given"] == rows[kind]["psnr_codec"] and 20 < rows[kind]["psnr_codec"] < 45
    for kind in JOINED:
        assert rows[kind]["jump"] == rows[kind]["jump_codec"] and rows[kind]["jumps"] <= 2
    assert rows["text"]["judge"] == 1 and rows["long"]["jump_codec"] is None


def test_a_model_that_shows_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampling_of(asked: Visual, prepared: Prepared) -> Sampling:
        def sampling(model: LatentVideoModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
            joined = prepared.join(torch.zeros(sampler.frames, 3, sampler.height, sampler.width))
            longer = round(asked.seconds * sampler.fps) - len(joined)
            yield torch.cat([joined, joined[-1:].expand(max(0, longer), -1, -1, -1)])[None]

        return sampling

    monkeypatch.setattr(visual, "visual_sampling", sampling_of)
    for kind, (plan, clips) in visual.make_all(visual.Config(clips=2)).items():
        row = visual.row(kind, plan, clips)
        assert row["judge"] == 0 and row["judge_of_source"] == 1, kind
        assert row["psnr_of_given"] is None or row["psnr_of_given"] < row["psnr_codec"] - 5, kind
        assert kind not in JOINED or row["jump"] > 3 * row["jump_codec"], kind


def test_the_numbers_are_what_they_say() -> None:
    clip, where = torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.bool)
    where[1, 0, 1] = True
    other = torch.full_like(clip, 0.5)
    other[1, :, 0, 1] = 0.1
    assert visual.psnr(other, clip, where) == pytest.approx(20) and visual.psnr(other, clip, ~where) == pytest.approx(-20 * math.log10(0.5))
    steady, jumping = (torch.tensor(levels).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2) for levels in ([0.0, 0.1, 0.2, 0.3], [0.0, 0.1, 0.4, 0.5]))
    assert visual.jump(steady, steady, [2]) == pytest.approx(1) and visual.jump(jumping, steady, [2]) == pytest.approx(3)
    assert visual.jump(jumping, steady, [1, 4]) == pytest.approx((1 + 5) / 2), "a joint at the end leads back to the first frame"
    assert visual.jump(jumping, steady, []) is None and visual.jump(jumping, clip, [2]) is None


def test_prompts_are_held_out_and_loops_close() -> None:
    prompts = visual.held_out_prompts(60, visual.ENDLESS, seed=3)
    assert len({prompt.text for prompt in prompts}) > 50
    assert all(is_held_out(thing) and thing.motion in visual.ENDLESS and len(prompt.things) == 1 for prompt in prompts for thing in prompt.things)
    for k, prompt in enumerate(prompts[:12]):
        scene = visual.closed(sample_scene(prompt, np.random.default_rng(k), clip=ClipShape(17, 32, 32)), 17)
        path, radius = body_path(scene.bodies[0], np.arange(18, dtype=np.float32) / 16)
        assert np.abs(path[17] - path[0]).max() < 1e-5 and radius[17] == radius[0]
        assert prompt.things[0].motion == "still" or np.abs(path[8] - path[0]).max() > 0.05


def test_a_hole_and_a_middle_lie_where_tokens_begin() -> None:
    assert [visual.middle(side) for side in (16, 24, 32, 48)] == [slice(0, 8), slice(8, 16), slice(8, 24), slice(8, 32)]


def test_clips_too_short_to_connect_are_the_users_error() -> None:
    with pytest.raises(UserError, match=r"5 are too few to connect two clips\. Give --sampler\.frames 9"):
        visual.plans(visual.Config(sampler=Sampler(frames=5)), 4)


# The sheet


def test_some_kinds_can_be_asked_for_and_others_do_not_exist() -> None:
    kinds = visual.plans(visual.Config(), 4)
    assert list(visual.chosen(kinds, ["loop", "image"])) == ["image", "loop"] and visual.chosen(kinds, ()) == kinds
    with pytest.raises(UserError, match=r"there is no imag\. Give some of text, image"):
        visual.chosen(kinds, ["imag"])


def test_what_is_given_is_framed_on_its_inner_side() -> None:
    frames, given = torch.zeros(3, 3, 12, 16), torch.zeros(3, 12, 16, dtype=torch.bool)
    given[0] = True
    given[1, 2:10, :] = True
    given[2] = True
    given[2, 5:7, 6:10] = False
    lined = (_sheet.outlined(frames, given) == torch.tensor(_sheet.GIVEN)[:, None, None]).all(1)  # [3,12,16]
    assert lined.sum((1, 2)).tolist() == [12 * 16 - 8 * 12, 8 * 16 - 4 * 12, (12 * 16 - 8 * 12) + (6 * 8 - 2 * 4)]
    assert not (lined & ~given).any()
    assert torch.equal(_sheet.outlined(frames, torch.zeros_like(given)), frames)


def test_frames_are_spread_over_the_clip_enlarged_with_pixels_repeated() -> None:
    clip = torch.arange(13).div(255).reshape(13, 1, 1, 1).expand(13, 3, 4, 4)
    picture = np.asarray(_sheet.film(clip, torch.zeros(13, 4, 4, dtype=torch.bool), 5))
    assert picture.shape == (8, 5 * 10 - 2, 3) and picture[0, ::10, 0].tolist() == [0, 3, 6, 9, 12]
    assert (picture[:, 8:10] == 255).all()
    assert _sheet.film(clip[:1], torch.zeros(1, 4, 4, dtype=torch.bool), 5).size == (8, 8)


def test_the_sheet_has_one_line_a_kind_with_given_frames_framed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made_by_one_who_knows(monkeypatch, visual.Config(clips=1), exact=True)
    lines = {kind: visual.shown(plan, made[0]) for kind, (plan, made) in found.items()}
    assert not any(line.wrong for line in lines.values())
    whole_frames = {kind: line.clip_given.all(2).all(1).nonzero().flatten().tolist() for kind, line in lines.items()}
    assert whole_frames["image"] == [0] and whole_frames["extend"] == [0, 1, 2, 3, 4] and whole_frames["extend_back"] == [9, 10, 11, 12, 13]
    assert whole_frames["connect"] == [0, 1, 2, 3, 4, 9, 10, 11, 12, 13] and whole_frames["loop"] == list(range(9))
    assert not any(lines[kind].clip_given.any() for kind in ("text", "edit", "one frame", "another size", "long"))
    assert int(lines["outpaint"].clip_given[0].sum()) == 32 * 16 and int((~lines["inpaint"].clip_given[0]).sum()) == 16 * 16
    assert [kind for kind, line in lines.items() if _sheet.prompt_film(line) is None] == ["text", "one frame", "another size", "long"]
    picture = _sheet.draw(list(lines.values()))
    assert picture.height == _sheet.MARGIN + sum(_sheet.CAPTION + _sheet.LABEL + 2 * line.clip.shape[-2] + _sheet.GAP for line in lines.values())
    line = _sheet.CAPTION + _sheet.LABEL + 64 + _sheet.GAP
    strip = np.asarray(picture)[_sheet.MARGIN + 3 * line :][:line]
    orange = (strip == np.array([255, 128, 0])).all(-1).sum(0) > 60  # upright lines
    assert orange[_sheet.MARGIN] and orange.sum() == 4 * (1 + 4), "the first of three frames given; the first four of nine shown"


# The command


def test_the_bench_runs_at_toy_size_in_flat_rows_and_draws_the_same_sheet_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "visual", "--quick", "--json", "--model", str(save_small_network(tmp_path / "network.safetensors")), *TOY]
    outputs = []
    for name in ("a.png", "b.png"):
        more = ["--sheet", str(tmp_path / name), *(["--write", "--results", str(tmp_path), "--date", "2026-11"] if name == "a.png" else [])]
        assert cli.main([*words, *more]) == 0
        outputs.append(json.loads(capsys.readouterr().out)["rows"])
    rows = outputs[0]
    assert rows == outputs[1] and (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert [row["kind"] for row in rows] == KINDS and all(set(row) == set(rows[0]) for row in rows)
    assert all(value is None or isinstance(value, int | float | str) for row in rows for value in row.values())
    assert [row["clip"] for row in rows if row["kind"] in ("text", "one frame", "another size", "long")] == ["9x16x16", "1x16x16", "9x24x48", "12x16x16"]
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height == _sheet.MARGIN + 12 * (_sheet.CAPTION + _sheet.LABEL + _sheet.GAP) + 2 * (11 * 16 + 24)
    (text,) = (path.read_text() for path in tmp_path.glob("2026-11_*_visual.md"))
    assert "| extend_back |" in text and "rushes bench visual --quick" in text


def test_quick_makes_two_clips_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(visual, "make_all", lambda cfg: asked.append(cfg.clips) or {})
    visual.main(load(visual.Config, None, ["--quick"]))
    visual.main(load(visual.Config, None, ["--quick", "--clips", "1"]))
    assert asked == [2, 1]


def test_the_small_stand_in_keeps_what_is_given_even_untrained() -> None:
    """Known latents come out of the sampler as they went in: nothing but the autoencoder stands between."""
    model, plan = small_model(), visual.plans(visual.Config(sampler=Sampler(steps=1)), 4)["image"]
    made = visual.make(model, plan, visual.held_out_prompts(1, plan.motions, 0)[0], 0, np.random.default_rng(0))
    row = visual.row("image", plan, [made])
    assert row["psnr_of_given"] == pytest.approx(row["psnr_codec"], abs=0.01) and row["psnr_of_rest"] < row["psnr_codec"] - 3
