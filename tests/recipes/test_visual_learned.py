"""The shipped base obeys visual prompts: what is given stays, the prompt is still shown, and joints are hard to see."""

from statistics import fmean

import pytest

from base_model.tiny import load_tiny
from recipes.bench import visual
from recipes.bench._results import Row
from recipes.generate import Sampler
from recipes.world import continue_cases, draw_cases, gather

CLIPS, IMAGES = 24, 96  # a kind
LOST_DB = 1.5  # of what is given, against what the autoencoder alone gives back
JUDGE_MARGIN = 0.15  # share of right clips, below text alone; the standard error of a difference of 24 clips is about 0.14 unpaired
JUMP = {"extend": 1.25, "connect": 1.25, "loop": 1.25, "extend_back": 1.75}  # at joints, times that of the truth through the autoencoder
JUMP_LONG = 2.0  # where one made part follows another, times the truth's
SECONDS = 2.0


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    kinds = tuple(kind for kind in visual.plans(visual.Config(), stride=4) if kind != "one frame")
    found = visual.make_all(visual.Config(clips=CLIPS, seconds=SECONDS, kinds=kinds)) | visual.make_all(visual.Config(clips=IMAGES, kinds=("one frame",)))
    return {kind: visual.row(kind, plan, made) for kind, (plan, made) in found.items()}


@pytest.mark.parametrize("kind", ["image", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint"])
def test_what_is_given_stays(rows: dict[str, Row], kind: str) -> None:
    assert rows[kind]["psnr_of_given"] >= rows[kind]["psnr_codec"] - LOST_DB, rows[kind]


@pytest.mark.parametrize("kind", ["image", "edit", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint", "one frame", "another size"])
def test_the_prompt_is_shown_about_as_often_as_from_text_alone(rows: dict[str, Row], kind: str) -> None:
    assert rows[kind]["judge"] >= rows["text"]["judge"] - JUDGE_MARGIN, (rows[kind], rows["text"]["judge"])


@pytest.mark.parametrize("kind", JUMP)
def test_joints_are_hard_to_see(rows: dict[str, Row], kind: str) -> None:
    assert rows[kind]["jump"] <= JUMP[kind] * rows[kind]["jump_codec"], rows[kind]


def test_a_long_clip_goes_on_smoothly(rows: dict[str, Row]) -> None:
    assert rows["long"]["jump"] <= JUMP_LONG, rows["long"]


@pytest.mark.parametrize(("guidance", "measure", "least"), [(1.0, "permanence", 0.75), (2.0, "identity", 0.4)])
def test_going_on_keeps_what_is_hidden_at_the_last_given_frame(guidance: float, measure: str, least: float) -> None:
    cases = draw_cases("occlusion", 24, seed=7)
    made = continue_cases(load_tiny(), cases, Sampler(guidance=guidance), words=True, seed=7)
    assert fmean(gather(cases, made)[measure]) >= least
