import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from base_model.types import ClipShape
from recipes.charts import Series, Whisker, interval_chart, line_chart, number, ticks
from recipes.report import CurveRun, ReportData, Shown, Take, finite, flat, interval_text, read_rows, render_page, write_report
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import render, sample_scene

CLIP = ClipShape(13, 32, 32)


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": max(0.0, mean - half), "high": mean + half}


def made_up_results() -> dict[str, Any]:
    attributes = {"shape": 0.9, "colour": 0.8, "motion": 0.7}
    return {
        "wall_seconds": 447.2,
        "peak_memory_bytes": 2_310_000_000,
        "judge": {"base": interval(0.31, 0.05), "sft": interval(0.52, 0.05), "rl": interval(0.68, 0.045), "rl_unconstrained": interval(0.7, 0.05)},
        "two_objects": {"base": interval(0.05, 0.03), "sft": interval(0.13, 0.05), "rl": interval(0.19, 0.05), "rl_unconstrained": interval(0.2, 0.05)},
        "per_attribute": {n: {m: interval(p + d, 0.04) for m, d in (("base", -0.2), ("sft", 0), ("rl", 0.08), ("rl_unconstrained", 0.09))} for n, p in attributes.items()},
        "flash_rate": {"base": interval(0.144, 0.02), "sft": interval(0.06, 0.015), "rl": interval(0.004, 0.003), "rl_unconstrained": interval(0.09, 0.02)},
        "flash_limit": 0.02,
        "diversity": {"base": interval(1.31, 0.09), "sft": interval(1.22, 0.05), "rl": interval(1.12, 0.05), "rl_unconstrained": interval(1.0, 0.05)},
        "diversity_ratio": interval(0.92, 0.05),
        "judge_gain": {"mean": 0.16, "low": 0.11, "high": 0.21},
        "judge_gain_sft": {"mean": 0.21, "low": 0.16, "high": 0.26},
        "guard": {"base": interval(0.2, 0.06), "sft": interval(0.61, 0.06), "rl": interval(0.93, 0.05), "rl_unconstrained": interval(0.9, 0.05)},
        "reward_model": {"accuracy": interval(0.79, 0.02), "floor": interval(0.55, 0.02), "ceiling": interval(0.82, 0.015)},
        "filtered": [
            {
                "where": "base data",
                "policy": "flash",
                "verdict": "block",
                "count": 212,
                "of": 2400,
                "examples": ["“a red bar floats upward”: 6.0 flashes a second over 91 % of the frame"],
            },
            {"where": "prompts", "policy": "words", "verdict": "review", "count": 0, "of": 240, "examples": []},
        ],
        "eye_judge_agreement": {"shape": interval(0.97, 0.01), "colour": 0.99, "motion": interval(0.94, 0.02)},
        "judge_accuracy": {"freshly drawn clips": {"shape": interval(0.996, 0.003), "colour": 1.0, "motion": interval(0.995, 0.004)}},
        "judge_confusion": {"shape": {"circle": {"circle": 98, "bar": 2}, "bar": {"bar": 99, "nothing": 1}, "pillar": {"pillar": 100}}},
        "stage_seconds": {"data": 11.0, "sft": 92.0, "candidates": 41.0, "rankings": 13.0, "reward": 62.0, "rl": 171.0, "report": 57.0},
        "commands": ["rushes demo --seed 0"],
        "config": {"rl": {"learning_rate": 1e-4, "group_size": 4}},
        "versions": {"torch": "2.13.0", "rushes": "0.1.0"},
        "lineage": {"base": {"weights": "9f2c" * 16, "from": ["pretrain"]}, "rl": {"adapter": "77ab" * 16, "commit": "8ff4e42"}},
    }


def made_up_run(label: str, model: str, reach: float) -> CurveRun:
    rng = np.random.default_rng(len(label))
    rows: list[dict[str, float]] = []
    for update in range(60):
        part = 1 - math.exp(-update / 20)
        row = {
            "forward_passes": 2304.0 * (update + 1),
            "seconds": 3.0 * (update + 1),
            "reward": reach * part + rng.normal(0, 0.15),
            "guard": 0.7 * reach * part + rng.normal(0, 0.15),
        }
        row |= {"kl_per_element": 2e-5 * update, "kl_total": 0.04 * update, "violation_rate": 0.12 * math.exp(-update / 9) + 0.01 * rng.random(), "multiplier": 0.1 + 0.9 * part}
        if update % 12 == 0:
            row |= {"judge": 0.52 + 0.2 * part, "diversity": 1.2 - 0.1 * part}
        rows.append(row)
    return CurveRun(label, model, rows)


def made_up(prompts: int = 4) -> ReportData:
    rng = np.random.default_rng(0)
    shown = []
    for index, prompt in enumerate(make_prompts(prompts, seed=3, split="eval", strobe=0.25)):
        takes = []
        for model in ("base", "sft", "rl"):
            flashing = prompt.strobe and model == "base"
            clip = render(sample_scene(replace(prompt, strobe=False), rng, clip=CLIP, flashing=flashing), CLIP)
            verdict, reason = ("block", "6.0 flashes a second over 100 % of the frame") if flashing else ("allow", "")
            right = model != "base"
            takes.append(Take(model, clip, verdict, reason, flashing, None if prompt.strobe else right, () if right else ("motion",)))
        shown.append(Shown(prompt.text, 1000 + index, tuple(takes), prompt.strobe))
    return ReportData(made_up_results(), shown, [made_up_run("RL", "rl", 1.0), made_up_run("RL, no limit", "rl_unconstrained", 1.2)])


class Page(HTMLParser):
    """Collects what the tests ask of a page: tags with their attributes, ids, and whether every opened tag is closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "hr", "line", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def data() -> ReportData:
    return made_up()


@pytest.fixture(scope="module")
def text(data: ReportData) -> str:
    return render_page(data)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_well_formed_and_its_ids_and_links_meet(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for a in page.all("a")]
    assert links and all(link and link[1:] in ids for link in links)
    labelled = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(labelled) <= set(ids)


def test_the_page_asks_the_network_for_nothing(text: str, page: Page) -> None:
    addresses = [a[key] for _, a in page.tags for key in ("src", "href", "poster", "srcset", "data", "action") if a.get(key)]
    assert all(address is not None and address.startswith(("data:", "#")) for address in addresses)
    without_data = re.sub(r'"data:[^"]*"', '""', text)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", without_data)
    assert not page.all("link")


def test_it_is_small(text: str, data: ReportData) -> None:
    assert len(text) < 6_000_000 * len(data.shown) / 24


def test_a_flashing_clip_is_a_still_frame_and_nowhere_in_the_page_as_a_video(data: ReportData, page: Page) -> None:
    playable = sum(take.playable for shown in data.shown for take in shown.takes)
    stills = sum(not take.playable for shown in data.shown for take in shown.takes)
    assert stills == 1
    assert len(page.all("video")) == playable
    images = page.all("img")
    assert len(images) == stills and "not played" in str(images[0]["alt"])


@pytest.mark.parametrize(
    ("verdict", "flashing", "playable"),
    [("allow", False, True), ("allow", None, True), ("allow", True, False), ("review", False, False), ("error", False, False), ("block", False, False)],
)
def test_only_what_the_runner_allows_and_the_judge_sees_still_is_playable(data: ReportData, verdict: str, flashing: bool | None, playable: bool) -> None:
    take = data.shown[0].takes[0]
    assert replace(take, verdict=verdict, flashing=flashing).playable is playable
    assert not Take("rl", take.video).playable


def test_no_video_starts_by_an_attribute_and_every_picture_has_words(page: Page) -> None:
    for video in page.all("video"):
        assert "autoplay" not in video and "loop" not in video and "muted" in video
        assert video["aria-label"]
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))


def test_headings_descend_without_a_gap_and_tables_have_headers(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.all("th") and all("scope" in header for header in page.all("th"))


def test_motion_stops_where_the_system_asks_for_less(text: str) -> None:
    assert 'matchMedia("(prefers-reduced-motion: reduce)")' in text


def test_an_embedded_clip_decodes_to_the_frames_it_was_made_of(data: ReportData, page: Page, tmp_path: Path) -> None:
    import base64

    from base_model.video.files import read_video

    source = str(page.all("video")[0]["src"])
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(source.removeprefix("data:video/mp4;base64,")))
    video = read_video(path)
    first = data.shown[0].takes[0].video.permute(0, 2, 3, 1).numpy()  # [T,H,W,3]
    assert video.fps == 12 and video.frames.shape == (13, 128, 128, 3)
    assert np.abs(video.frames[:, 2::4, 2::4] / 255 - first).mean() < 0.02


def test_the_numbers_of_the_results_stand_in_the_page(text: str) -> None:
    for said in ("68.0 % [63.5, 72.5]", "+16.0 points", "0.4 % [0.1, 0.7]", "1.120 [1.070, 1.170]", "79.0 % [77.0, 81.0]", "7:27", "2.15 GiB", "rushes demo --seed 0", "77ab" * 16):
        assert said in text, said


def test_simulated_labelers_are_called_so_wherever_their_output_appears(text: str) -> None:
    for section in ("curves", "reward", "judge", "measured"):
        body = text[text.index(f'<section id="{section}"') :]
        assert "simulated labelers" in body[: body.index("</section>")], section


def test_an_empty_report_says_what_was_not_measured_instead_of_failing() -> None:
    text = render_page(ReportData({}))
    Page(text)
    assert text.count("not measured") > 10
    assert "Nothing was measured yet." in text
    assert "Not measured in these runs: Judge, held-out prompts; Reward;" in text


def test_any_single_part_may_be_missing_or_null(data: ReportData) -> None:
    small = replace(data, shown=(), runs=data.runs[:1])
    for key in data.results:
        assert Page(render_page(replace(small, results={k: v for k, v in data.results.items() if k != key}))).open == []
        assert Page(render_page(replace(small, results=dict(data.results) | {key: None}))).open == []


def test_unknown_numbers_inside_an_interval_are_not_measured(data: ReportData) -> None:
    unknown = {"mean": None, "low": None, "high": None}
    results = dict(data.results) | {"judge": {"sft": unknown, "rl": unknown}, "judge_gain": unknown, "diversity_ratio": unknown, "flash_rate": {"rl": unknown}}
    assert "nan" not in render_page(replace(data, shown=(), results=results))


def test_models_are_called_what_the_page_is_told_and_both_policies_are_compared() -> None:
    data = made_up(1)
    both = {**data.results, "judge": {**data.results["judge"], "rl_ddpo": interval(0.55, 0.05)}, "judge_gain_ddpo": interval(0.034, 0.05)}
    text = render_page(replace(data, results=both, names={"base": "Base", "sft": "SFT", "rl": "RL (NFT)", "rl_ddpo": "RL (DDPO)"}))
    assert "RL (NFT) − SFT, every attribute right, one object" in text and "RL (NFT) gained 16.0 points" in text
    assert re.search(r"RL \(DDPO\) − SFT, every attribute right, one object</th><td class=\"value\">\+3\.4 points", text)
    assert "DDPO" not in render_page(data)


def test_the_guards_of_each_run_have_a_row_of_lights_that_colour_alone_does_not_tell(data: ReportData) -> None:
    evil = "red: <b>grid</b> +0.3"
    said = ((0, "green", "green"), (10, "amber", "amber: motion -45%"), (20, "red", evil))
    looks = [{"iteration": i, "light": light, "said": words} for i, light, words in said]
    text = render_page(replace(data, shown=(), results=dict(data.results) | {"lights": {"rl": looks, "other": looks[:1]}}))
    assert Page(text).open == [] and "<b>" not in text
    row = text[text.index('class="lights"') :].partition("</table>")[0]
    assert [row.count(mark) for mark in ("● 0", "▲ 10", "■ 20")] == [2, 1, 1] and 'title="amber: motion -45%"' in row
    assert "red: &lt;b&gt;grid&lt;/b&gt; +0.3</td>" in row and '<th scope="row">RL</th>' in row and '<th scope="row">other</th>' in row
    assert 'class="lights"' not in render_page(replace(data, shown=(), results=dict(data.results) | {"lights": {}}))


def test_each_seed_has_its_row(data: ReportData) -> None:
    seeds = [{key: data.results[key] for key in ("judge", "judge_gain", "flash_rate")}] * 3
    text = render_page(replace(data, shown=(), results=dict(data.results) | {"seeds": seeds}))
    assert Page(text).open == [] and text.count("52.0 % [47.0, 57.0]") == 4


def test_real_clips_say_that_the_judge_does_not_apply(data: ReportData) -> None:
    none = {model: "not applicable" for model in ("base", "sft", "rl")}
    results = dict(data.results) | {"judge": none, "judge_gain": "not applicable", "diversity": none, "two_objects": none, "per_attribute": {}}
    text = render_page(replace(data, results=results, shown=()))
    assert text.count("not applicable") >= 7
    assert "the judge does not apply" in text


def test_words_from_outside_cannot_become_markup() -> None:
    evil = '<script>alert("x")</script>'
    take = Take("rl", made_up(1).shown[0].takes[0].video, "block", evil)
    run = CurveRun(evil, "rl", [{"seconds": 1.0, "reward": 1.0}, {"seconds": 2.0, "reward": 2.0}])
    text = render_page(ReportData({"lineage": {evil: evil}, "notes": [evil], "per_attribute": {evil: {"rl": evil}}}, [Shown(evil, 0, (take,))], [run], title=evil))
    assert evil not in text and len(Page(text).all("script")) == 1


def test_a_page_that_would_grow_too_large_leaves_prompts_out_and_says_so(data: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.report.CLIP_BUDGET", 60_000)
    text = render_page(data)
    shown = len(Page(text).all("figure"))
    assert 1 <= shown < len(data.shown)
    assert f"{len(data.shown) - shown} more prompts are in the clip store" in text


def test_writing_leaves_a_page_and_the_same_numbers_as_json(data: ReportData, tmp_path: Path) -> None:
    results = dict(data.results) | {"odd": math.nan, "path": Path("a/b"), "pair": (1, 2)}
    page = write_report(tmp_path / "report", replace(data, results=results, shown=()))
    assert page == tmp_path / "report" / "index.html"
    stored = json.loads((tmp_path / "report" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert stored["judge"] == data.results["judge"]
    assert (stored["odd"], stored["path"], stored["pair"]) == (None, "a/b", [1, 2])


def test_metrics_are_read_under_the_reports_names_and_a_torn_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward/mean": 0.5, "t": 2.0, "odd": null}\n{"step": 2, "reward/mean": null, "t": 4.0}\n{"step": 3, "rew')
    assert read_rows(path, {"reward": "reward/mean", "seconds": "t", "guard": "odd"}) == [{"reward": 0.5, "seconds": 2.0}, {"seconds": 4.0}]


def test_values_in_words() -> None:
    assert interval_text({"mean": 0.5, "low": 0.25, "high": 0.75}) == "50.0 % [25.0, 75.0]"
    assert interval_text({"mean": 1.5, "low": 1.0, "high": 2.0}, False) == "1.500 [1.000, 2.000]"
    assert interval_text(None) == interval_text({"mean": None}) == interval_text({"mean": math.nan}) == "not measured"
    assert interval_text("not applicable") == "not applicable"
    assert list(flat({"a": {"b": 1, "c": [2, None]}})) == [("a.b", "1"), ("a.c.0", "2"), ("a.c.1", "not measured")]
    assert finite({"a": (math.inf, 1.0, None, True)}) == {"a": [None, 1.0, None, True]}
    assert [number(v) for v in (0.0, 0.01234, 12.0, 1500.0, 2_400_000.0)] == ["0", "0.0123", "12", "1.5k", "2.4M"]
    assert number(0.123, percent=True) == "12.3 %"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.137), (-3.1, 8.2), (0.0, 138_240.0), (1e-7, 2.4e-5), (5.0, 5.0), (0.0, 0.0)])
def test_ticks_are_round_few_and_cover_the_data(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    step = marks[1] - marks[0]
    assert np.allclose(np.diff(marks), step)
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_a_chart_places_its_points_on_a_linear_scale_and_leaves_unknown_ones_out() -> None:
    svg = line_chart([Series("RL", "rl", (0.0, 1.0, 2.0, 4.0), (0.0, 1.0, math.nan, 4.0))], name="Reward", x_label="seconds")
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in ElementTree.fromstring(svg).iter("circle")]
    assert len(dots) == 3
    (x0, y0), (x1, y1), (x4, y4) = dots
    assert (x4 - x0) == pytest.approx(4 * (x1 - x0), abs=0.3) and (y4 - y0) == pytest.approx(4 * (y1 - y0), abs=0.3)
    assert y4 < y0 < 200 and 0 < x0 < x4 < 340


def test_a_chart_of_intervals_draws_each_whisker_from_low_to_high() -> None:
    svg = interval_chart([Whisker("SFT", "sft", 0.5, 0.4, 0.6), Whisker("RL", "rl", 1.0, 0.8, 1.0)], name="Judge", percent=True, limit=0.2)
    root = ElementTree.fromstring(svg)
    (a, b) = [(float(line.get("x1", "")), float(line.get("x2", ""))) for line in root.iter("line") if line.get("class") == "whisker"]
    assert (b[1] - b[0]) == pytest.approx(a[1] - a[0], abs=0.2)
    assert "SFT: 50 % [40 %, 60 %]" in svg


def test_a_chart_without_a_finite_point_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="Reward: no finite point"):
        line_chart([Series("RL", "rl", (0.0,), (math.nan,))], name="Reward", x_label="seconds")
    with pytest.raises(ValueError, match="nothing to draw"):
        interval_chart([], name="Judge")


def test_the_page_says_whose_rankings_the_reward_model_learned_from() -> None:
    simulated, people = (render_page(ReportData({**made_up_results(), **more})) for more in ({}, {"ranked_by": {"rankings": 41, "people": 3}}))
    assert "rankings by <strong>simulated labelers</strong>" in simulated and "from other simulated labelers" in simulated
    assert "41 rankings by <strong>people</strong> (3 of them)" in people and "how far the people agree with each other" in people
    assert "not people" not in people and "from other simulated labelers" not in people
    unknown = render_page(ReportData({**made_up_results(), "reward_model": None}, runs=made_up().runs))
    sections = {name: unknown[unknown.index(f'<section id="{name}"') :].partition("</section>")[0] for name in ("curves", "reward", "measured")}
    assert not any("simulated" in body for body in sections.values()), "`rushes evaluate` is not told who ranked"
    assert "from other labelers" in sections["measured"] and "Learnt from labelers that had no part in the reward" in sections["curves"]
