"""Judging a reward model, end to end: a scorer with a known answer on clips and answers made for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import load
from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import cli
from recipes.evaluate_reward import COLUMNS, MODEL, PROMPT_ONLY, SIGNALS_ONLY, Config, as_text, evaluate_model, judged_rate, main, render_page, table_rows
from recipes.reward_model import usable_events
from reward.accuracy import best_threshold
from reward.agreement import pairs_of
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent, load_comparisons, write_comparisons
from reward.encoders import load_encoder
from reward.pooled import PooledModel, save_pooled
from reward.types import Scores
from tests.recipes.small import save_small_reward_model
from tests.reward import tiny_encoders

PROMPTS, K = 60, 4


class Brightness:
    """Scores are eight times the mean pixel; who asks is noted. Clips in `unknown` have no score."""

    differentiable = False

    def __init__(self, dims: tuple[str, ...] = ("overall",), unknown: float = math.inf) -> None:
        self.dims, self.unknown = dims, unknown
        self.log_tie = torch.full((len(dims), K - 1), -1.0)
        self.batches: list[tuple[int, ...]] = []
        self.seen: list[tuple[str, float]] = []

    def __call__(self, video: Tensor, prompts: list[str]) -> Scores:
        mean = video.flatten(1).mean(1)  # [B]
        self.batches.append(tuple(video.shape))
        self.seen += zip(prompts, mean.tolist(), strict=True)
        scores = torch.where(mean > self.unknown, torch.nan, 8 * mean)[:, None].expand(-1, len(self.dims))
        return Scores(scores, torch.zeros_like(scores))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prompts, 4 clips each of two generators and two sizes. Three people rank by brightness with noise; what is close ties. One is asked about motion too."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    new, worth = [], {}
    for i in range(PROMPTS):
        side = 16 if i % 3 else 24
        for k in range(K):
            level = float(rng.uniform(0.2, 0.8))
            video = (level + 0.05 * torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(10 * i + k))).clamp(0, 1)
            new.append(NewClip(video, f"scene {i}", f"p{i}", k, {}, "rev", 8.0))
            worth[i, k] = 8 * level
    rows = ClipStore(folder / "clips").add_many(new, preview=False)
    clips = [replace(Clip.of(row), generator="wan" if n % 2 else "<b>ltx</b>") for n, row in enumerate(rows)]
    events = []
    for i in range(PROMPTS):
        ids = tuple(row.clip_id for row in rows[K * i : K * i + K])
        for person in ("ann", "bob", "cat"):
            seen = np.array([worth[i, k] for k in range(K)]) + rng.gumbel(size=K)
            events.append(RankingEvent(f"{i}{person}", f"t{i}", f"p{i}", person, ids, tuple(1 + sum(bool(other > own + 0.7) for other in seen) for own in seen)))
        events.append(RankingEvent(f"{i}motion", f"m{i}", f"p{i}", "ann", ids[:2], (1, 1 + i % 2), dimension="motion"))
    write_comparisons(folder / "rankings", events, clips=clips, prompts=[Prompt(f"p{i}", f"scene {i}") for i in range(PROMPTS)], shares=(0.4, 0.2, 0.4))
    return folder


def config(world: Path, **changes: Any) -> Config:
    return Config(out=world / "out", model=world / "model", comparisons=world / "rankings", clips=world / "clips", drawn=0).model_copy(update=changes)


def judged(world: Path, scorer: Brightness, **changes: Any) -> dict[str, Any]:
    cfg = config(world, **changes)
    return evaluate_model(cfg, scorer, load_comparisons(cfg.comparisons), ClipStore(cfg.clips))  # type: ignore[arg-type]


def by_hand(world: Path, data: Comparisons, split: str) -> list[tuple[int, float]]:
    """Answers and differences of brightness, counted pair by pair."""
    store = ClipStore(world / "clips")
    levels = {row.clip_id: 8 * store.load(row.clip_id).flatten()[None].mean(1).item() for row in store.rows() if data.split[row.prompt_id] == split}
    found = []
    for event in data.events:
        if data.split[event.prompt_id] == split and event.dimension == "overall":
            level = [levels[clip] for clip in event.clip_ids]
            for i in range(K):
                for j in range(i):
                    found.append((int(np.sign(event.ranks[j] - event.ranks[i])), level[i] - level[j]))  # type: ignore[operator]
    return found


# What is measured


def test_a_scorer_with_a_known_answer_gets_what_counting_by_hand_gives(world: Path) -> None:
    data = load_comparisons(world / "rankings")
    found = judged(world, Brightness())["dimensions"]["overall"]
    answers = by_hand(world, data, "test")
    model = found["scorers"][MODEL]
    assert found["answers"] == len(answers) > 200 and found["tie_share"] == pytest.approx(np.mean([a == 0 for a, _ in answers]))
    assert model["accuracy"]["mean"] == pytest.approx(np.mean([a * d > 0 for a, d in answers if a]))
    epsilon = best_threshold(*(np.array(part) for part in zip(*by_hand(world, data, "val"), strict=True))).epsilon
    assert model["threshold"] == pytest.approx(epsilon, abs=1e-5)
    assert model["with_ties"]["mean"] == pytest.approx(np.mean([(0 if abs(d) <= model["threshold"] + 1e-6 else np.sign(d)) == a for a, d in answers]))
    assert model["with_ties"]["mean"] <= model["with_ties_oracle"] <= 1 and model["rankings"] > 50
    assert 0.6 < model["kendall_tau"]["mean"] < 1 and model["accuracy"]["low"] < model["accuracy"]["mean"] < model["accuracy"]["high"]


def test_the_scorer_stands_between_floors_and_a_ceiling(world: Path) -> None:
    found = judged(world, Brightness())["dimensions"]["overall"]
    scorers, beside, ties = found["scorers"], found["without_a_model"], found["tie_share"]
    assert scorers[PROMPT_ONLY]["accuracy"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert scorers[PROMPT_ONLY]["with_ties"]["mean"] == scorers[PROMPT_ONLY]["with_ties_oracle"] == pytest.approx(ties)
    assert math.isnan(scorers[PROMPT_ONLY]["kendall_tau"]["mean"]) and scorers[PROMPT_ONLY]["calibrated"]["temperature"] == math.inf
    assert beside["coin flip"] == {"accuracy": 0.5, "with_ties": pytest.approx((1 - ties) / 2)}
    assert scorers[SIGNALS_ONLY]["accuracy"]["mean"] > 0.8, "brightness is one of the signals"
    assert 0.6 < beside["another person"]["accuracy"]["mean"] < scorers[MODEL]["accuracy"]["mean"] + 0.05
    nll = {name: row["calibrated"]["three_way"]["nll"] for name, row in scorers.items()}
    assert nll[MODEL] < nll[PROMPT_ONLY] < math.log(3) + 0.05 and found["as_stored"]["temperature"] == 1


def test_every_clip_is_scored_once_in_batches_of_one_size(world: Path) -> None:
    scorer = Brightness()
    judged(world, scorer, batch=7)
    data = load_comparisons(world / "rankings")
    wanted = {clip for event in data.events for clip in event.clip_ids if data.split[event.prompt_id] in ("test", "val") and event.dimension == "overall"}
    assert len(scorer.seen) == len(wanted) == len({level for _, level in scorer.seen})
    assert {shape[0] for shape in scorer.batches} >= {7} and max(shape[0] for shape in scorer.batches) == 7 and {shape[-1] for shape in scorer.batches} == {16, 24}


def test_a_missing_score_is_counted_and_left_out(world: Path) -> None:
    whole, some = judged(world, Brightness()), judged(world, Brightness(unknown=0.7))
    row = some["dimensions"]["overall"]["scorers"][MODEL]
    assert some["unscored_clips"] > 5 and 0 < row["unscored_answers"] < some["dimensions"]["overall"]["answers"] == whole["dimensions"]["overall"]["answers"]
    assert sum(each["answers"] for each in some["dimensions"]["overall"]["generators"]) == some["dimensions"]["overall"]["answers"] - row["unscored_answers"]
    assert sum(each["unscored_answers"] for each in some["dimensions"]["overall"]["generators"]) == row["unscored_answers"]
    for name in (SIGNALS_ONLY, PROMPT_ONLY):
        assert json.dumps(some["dimensions"]["overall"]["scorers"][name]) == json.dumps(whole["dimensions"]["overall"]["scorers"][name])
    nothing = judged(world, Brightness(unknown=-1.0))["dimensions"]["overall"]
    assert math.isnan(nothing["scorers"][MODEL]["accuracy"]["mean"]) and nothing["scorers"][MODEL]["calibrated"] is None and nothing["margins"] == []


def test_pairs_of_generators_are_told_apart_and_oriented(world: Path) -> None:
    rows = judged(world, Brightness())["dimensions"]["overall"]["generators"]
    assert [(row["first"], row["second"]) for row in rows] == [("<b>ltx</b>", "<b>ltx</b>"), ("<b>ltx</b>", "wan"), ("wan", "wan")]
    assert rows[0]["people_prefer_first"] is None and rows[1]["people_prefer_first"] == pytest.approx(rows[1]["model_prefers_first"], abs=0.15)
    data = load_comparisons(world / "rankings")
    votes = []
    for event in data.events:
        if data.split[event.prompt_id] == "test" and event.dimension == "overall":
            for i in range(K):
                for j in range(K):
                    makers = [data.clips[event.clip_ids[n]].generator for n in (i, j)]
                    if makers == ["<b>ltx</b>", "wan"] and event.ranks[i] != event.ranks[j]:
                        votes.append(event.ranks[i] < event.ranks[j])  # type: ignore[operator]
    assert rows[1]["people_prefer_first"] == pytest.approx(np.mean(votes))


def test_several_dimensions_are_judged_each_by_itself_and_others_are_named(world: Path) -> None:
    found = judged(world, Brightness(("motion", "beauty", "overall")))
    assert list(found["dimensions"]) == ["motion", "overall"] and found["not_judged"] == ["beauty"]
    assert found["dimensions"]["overall"]["scorers"][MODEL] == judged(world, Brightness())["dimensions"]["overall"]["scorers"][MODEL]
    assert math.isnan(found["dimensions"]["motion"]["without_a_model"]["another person"]["accuracy"]["mean"])
    assert judged(world, Brightness())["not_judged"] == ["motion"]


def test_without_validation_answers_nothing_is_chosen_and_the_page_says_so(world: Path, tmp_path: Path) -> None:
    data = load_comparisons(world / "rankings")
    events = [event for event in usable_events(data) if data.split[event.prompt_id] == "test"]
    write_comparisons(tmp_path / "r", events, clips=data.clips.values(), prompts=data.prompts.values(), shares=(0.0, 0.0, 1.0))
    found = judged(world, Brightness(), comparisons=tmp_path / "r")
    row = found["dimensions"]["overall"]["scorers"][MODEL]
    assert math.isnan(row["with_ties"]["mean"]) and row["calibrated"] is None and row["with_ties_oracle"] > 0.5 and SIGNALS_ONLY not in found["dimensions"]["overall"]["scorers"]
    assert "not measured: no answers in the split val" in page_of(found)


def test_changed_clips_are_held_against_the_spread_within_prompts(world: Path, tmp_path: Path) -> None:
    found = judged(world, Brightness(), drawn=3)
    (table,) = found["metamorphic"]["drawn"].values()
    passed = {row["check"]: row["passed"]["mean"] for row in table["checks"]}
    assert passed["mirrored, sides swapped in the prompt"] == 1 and passed["under a wrong prompt"] == 0 and passed["gridded"] == 0  # brightness knows no better
    assert found["metamorphic"]["footage"] == {}
    page = page_of(found)
    assert "under a wrong prompt" in page and "Real footage" not in page and "under a wrong prompt" in as_text(found)


# What is written


def page_of(results: dict[str, Any]) -> str:
    return render_page(
        {"trained_on_the_split_train_of_these_answers": True, "lineage": {}, "config": {}, "commit": "", "versions": {}, "hardware": {}, **results}
    )


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.outside += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "line", "polyline", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "polyline", "circle", "rect"):
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(world: Path) -> None:
    results = judged(world, Brightness())
    page, links = page_of(results), Links()
    links.feed(page)
    assert not links.outside and not links.open
    assert page.count("<svg") == 2 and "&lt;b&gt;ltx&lt;/b&gt;" in page and "<b>ltx" not in page and ">None<" not in page and "nan" not in page
    for row in table_rows(results["dimensions"]["overall"]):
        assert len(row) == len(COLUMNS) and all(cell in page for cell in row)


def test_the_table_for_a_terminal_is_aligned(world: Path) -> None:
    lines = as_text(judged(world, Brightness())).splitlines()
    assert [line.split("  ")[0] for line in lines[:6]] == ["overall", MODEL, SIGNALS_ONLY, PROMPT_ONLY, "coin flip", "another person"]
    at = lines[0].index("with ties")
    assert all(line[at - 1] == " " and line[at] != " " for line in lines[:6])


def test_the_command_writes_a_report_that_repeats(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_small_reward_model(tmp_path / "model")
    words = ["--model", str(model), "--comparisons", str(world / "rankings"), "--clips", str(world / "clips")]
    for name in "ab":
        assert cli.main(["evaluate-reward", *words, "--out", str(tmp_path / name), "--json"]) == 0
        said = capsys.readouterr()
        result = json.loads(said.out)
        assert "accuracy, no ties" in said.err and result["report"] == str(tmp_path / name / "report.html") and 0 < result["overall"]["accuracy"]["mean"] < 1
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    assert reports[0] | {"config": 0} == reports[1] | {"config": 0}
    assert result["metamorphic"]["drawn"]["overall"] == reports[0]["metamorphic"]["drawn"]["overall"]["all"]["passed"] and "drawn clips changed, overall" in said.err
    assert reports[0]["trained_on_the_split_train_of_these_answers"] is False and reports[0]["dimensions"]["overall"]["scorers"][PROMPT_ONLY]["kendall_tau"]["mean"] is None
    assert "whether it has seen these prompts is not known" in (tmp_path / "a" / "report.html").read_text()


def test_a_model_of_another_tier_is_judged_on_clips_of_the_rate_it_scores(world: Path, tmp_path: Path) -> None:
    def saved(fps: float) -> Path:
        folder = tmp_path / f"model at {fps:g}"
        folder.mkdir()
        torch.manual_seed(0)
        encoder = load_encoder(tiny_encoders.save("clip", tmp_path / f"clip at {fps:g}"), fps=fps)
        save_pooled(folder, PooledModel([encoder], ("overall",), members=2, width=8), {"fps": [fps]})
        return folder

    assert main(config(world, model=saved(8.0), out=tmp_path / "out"))["unscored_clips"] == 0
    judged_on = json.loads((tmp_path / "out" / "report.json").read_text())
    assert judged_on["dimensions"]["overall"]["scorers"][MODEL]["unscored_answers"] == 0
    with pytest.raises(UserError, match="is for clips of 12 frames a second, and these have 8"):
        main(config(world, model=saved(12.0), out=tmp_path / "out"))
    data = load_comparisons(world / "rankings")
    clip_id = next(event.clip_ids[0] for event in data.events if data.split[event.prompt_id] == "test")
    mixed = replace(data, clips={**data.clips, clip_id: replace(data.clips[clip_id], fps=24.0)})
    assert judged_rate(config(world), data, "encoders") == 8.0 and judged_rate(config(world), mixed, "matcher") is None
    with pytest.raises(UserError, match="have 8, 24 frames a second, and the reward model scores clips of one rate"):
        judged_rate(config(world), mixed, "encoders")


# What is refused


def test_what_cannot_be_judged_is_one_line(world: Path, tmp_path: Path) -> None:
    data = load_comparisons(world / "rankings")
    empty = tmp_path / "train only"
    write_comparisons(empty, usable_events(data), clips=data.clips.values(), prompts=data.prompts.values(), shares=(1.0, 0.0, 0.0))
    for changes, scorer, message in (
        ({}, Brightness(("beauty",)), "the model scores beauty, people were asked about motion, overall"),
        ({"split": "val"}, Brightness(), "split and validation are both val"),
        ({"comparisons": empty}, Brightness(), "no rankings in the split test"),
        ({"clips": tmp_path / "nowhere"}, Brightness(), r"of \d+ ranked clips are not in the clip store, .*mkv"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            judged(world, scorer, **changes)
        assert "\n" not in str(caught.value) and not scorer.seen
    with pytest.raises(UserError, match="no reward model"):
        main(config(world, model=tmp_path / "no model", out=tmp_path / "out"))
    with pytest.raises(UserError, match="split"):
        load(Config, None, ["--split", "everything"])


def test_training_answers_can_validate(world: Path) -> None:
    found = judged(world, Brightness(), split="val", validation="train")["dimensions"]["overall"]
    assert found["validation_answers"] > found["answers"] == sum(len(pair.votes) for pair in pairs_of(e for e in val_events(world)))


def val_events(world: Path) -> list[RankingEvent]:
    data = load_comparisons(world / "rankings")
    return [event for event in data.events if data.split[event.prompt_id] == "val" and event.dimension == "overall"]
