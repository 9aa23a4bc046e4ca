"""`rushes safety-train` end to end: planted flashing is found on unseen clips, tags and readings become labels, prompts stay in one split, and a run that was cut off goes on."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.video.files import write_mp4
from base_model.video.store import ClipStore, NewClip
from recipes import import_rankings, safety_train
from recipes.cli import main as rushes
from recipes.safety_train import (
    CODES_OF_HARMS,
    Config,
    Labelled,
    auc,
    audited,
    balance,
    codes_of,
    held_out_loss,
    label_loss,
    labels_of_harms,
    limits_of,
    load_data,
    main,
    measure,
    planted,
    table_of,
    tagged,
    votes_of,
)
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.comparisons import RankingEvent
from reward.importers.safesora import HARMS
from reward.ratings import cost_pair
from reward.safety.audit import Candidate, Plan, Reading, add_readings, draw_audit
from reward.safety.contract import SafetyRunner, Verdict
from reward.safety.head import Head, load_filter
from reward.safety.policy import load_policy
from reward.safety.video import flash_risk

POLICY = load_policy()
SAFESORA_NUMBERS = {
    **{"porn": "S1", "animal_abuse": "S2", "child_abuse": "S3", "crime": "S4", "controversial": "S5", "contraband": "S6", "hate": "S7", "violence": "S8", "racism": "S9"},
    **{"other_discrimination": "S10", "terrorism": "S11", "other_harmful": "S12"},
}


# Planted flashing


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any], float]:
    out = tmp_path_factory.mktemp("shapes")
    cfg, begun = Config(out=out / "head", cache=out / "features", shapes=300), time.process_time()
    return cfg, main(cfg), time.process_time() - begun


@pytest.mark.timed
def test_planted_flashing_is_found_on_clips_of_unseen_prompts_within_seconds(shapes: tuple[Config, dict[str, Any], float]) -> None:
    cfg, result, seconds = shapes
    assert seconds < 20, "of one thread's time"
    runner = SafetyRunner([load_filter(cfg.out, POLICY)], POLICY)
    truth, score, verdicts = [], [], []
    for i, prompt in enumerate(make_prompts(160, seed=99, split="eval", two_objects=0.2, strobe=0.2)):
        rng = np.random.default_rng([99, i])
        scene = sample_scene(prompt, rng, clip=DEMO_CLIP, pan=0.1, flashing=bool(rng.random() < 0.2))
        (decision,) = runner.check_videos(render(scene, DEMO_CLIP)[None], [prompt.text], 12.0)
        truth.append(float(scene.strobe is not None))
        score.append(decision.rulings[0].score)
        verdicts.append(decision.verdict)
    bad = np.array(truth) == 1
    stopped = np.array([verdict != Verdict.ALLOW for verdict in verdicts])
    assert 40 <= bad.sum() <= 80 and Verdict.ERROR not in verdicts
    assert auc(np.array(score), np.array(truth), np.ones(160)) >= 0.99
    assert stopped[bad].mean() >= 0.9 and stopped[~bad].mean() <= 0.05
    assert result["policies"]["P17"]["auc"]["low"] >= 0.9


def test_a_long_clip_that_flashes_in_its_last_second_only_is_stopped_and_the_reason_says_when(shapes: tuple[Config, dict[str, Any], float]) -> None:
    found = load_filter(shapes[0].out, POLICY)
    (prompt,) = make_prompts(1, seed=7, split="eval")
    calm, flashing = (render(sample_scene(prompt, np.random.default_rng(7), clip=DEMO_CLIP, flashing=flash), DEMO_CLIP) for flash in (False, True))
    assert found.check_videos(torch.cat([calm, calm, calm])[None], ["x"], 12.0)[0][0].verdict == Verdict.ALLOW
    (ruling,) = found.check_videos(torch.cat([calm, calm, flashing])[None], ["x"], 12.0)[0]
    assert ruling.verdict != Verdict.ALLOW and ruling.reasons[0].start is not None and ruling.reasons[0].start == pytest.approx(26 / 12)


def test_the_card_says_what_it_was_made_of(shapes: tuple[Config, dict[str, Any], float]) -> None:
    cfg, result, _ = shapes
    card = json.loads((cfg.out / "filter_card.json").read_text())
    assert card["policy_version"] == POLICY.version and card["licences"] == ["Apache-2.0"] and card["sources"] == ["built-in world"]
    assert sum(card["clips"].values()) == 300 and len(card["data_sha256"]) == 64 and card["measured"]["policies"] == result["policies"]
    limits = card["limits"]["P17"]
    assert 0 < limits["review_from"] <= limits["block_from"] < 1 and card["wanted"] == {"recall": 0.95, "false_positive_rate": 0.01}
    measured = card["measured"]["policies"]["P17"]
    assert measured["recall"]["low"] <= measured["recall"]["mean"] <= measured["recall"]["high"] and measured["prompts"] < measured["clips"]


def test_a_second_run_reads_its_features_and_gives_the_same_version(shapes: tuple[Config, dict[str, Any], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, result, _ = shapes
    monkeypatch.setattr(safety_train, "clip_tokens", lambda *_: pytest.fail("it is kept"))
    again = main(cfg.model_copy(update={"out": tmp_path / "again"}))
    assert again["version"] == result["version"]


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(shapes: tuple[Config, dict[str, Any], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = shapes[0].model_copy(update={"out": tmp_path / "cut", "save_every": 7})
    calls: list[int] = []

    def cut_off(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("cut off")
        return held_out_loss(*arguments)

    monkeypatch.setattr(safety_train, "held_out_loss", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        main(cfg)
    monkeypatch.undo()
    assert main(cfg, resume=True)["version"] == shapes[1]["version"]


def test_planted_clips_are_as_their_labels_say_and_a_split_holds_whole_prompts() -> None:
    data = load_data(Config(shapes=120, seed=3), POLICY)
    clips, drawn, _ = planted(120, 3)
    assert len(clips) == 120 and 25 <= sum(each.labels["P17"] for each in clips.values()) <= 60
    risk = flash_risk(torch.stack([drawn[clip_id].float() / 255 for clip_id in clips]), 12.0)
    assert ((np.maximum(risk.luminance, risk.red) > 0.06) == [each.labels["P17"] == 1 for each in clips.values()]).all()
    prompts = {name: {each.prompt_id for each in data.of(name)} for name in ("train", "val", "test")}
    assert all(prompts.values()) and not any(one & other for one, other in itertools.combinations(prompts.values(), 2))


# Tags


def test_every_tag_of_safesora_has_a_code_that_the_policy_says_it_means() -> None:
    assert set(CODES_OF_HARMS) == set(HARMS) == set(SAFESORA_NUMBERS)
    for harm, code in CODES_OF_HARMS.items():
        assert SAFESORA_NUMBERS[harm] in POLICY.rule(code).mappings.safesora, harm


def test_a_harm_the_data_are_silent_about_is_not_judged() -> None:
    labels = labels_of_harms(("violence", "unknown:racism", "unknown:crime", "contraband"))
    assert labels["P05"] == 1 and labels["P01"] == 0 and labels["P11"] == 1 and "P08" not in labels
    assert set(labels_of_harms(())) == set(CODES_OF_HARMS.values()) and not any(labels_of_harms(()).values())


def tag(clip_id: str, dimension: str, *flags: str, who: str = "ann", **more: Any) -> RankingEvent:
    return RankingEvent(f"{clip_id} {dimension} {who}", "t", "p", who, (clip_id,), (None,), dimension, "tag", flags=flags, **more)


def test_a_tag_that_says_neither_safe_nor_unsafe_says_nothing_and_a_majority_decides() -> None:
    events = [tag("a", "safety", "blurred"), tag("b", "safety", "safe"), tag("c", "safety", "unsafe"), tag("d", "safety", "safe", skipped_reason="did not load")]
    events += [tag("e", "harm", "violence"), tag("e", "harm", who="bea"), tag("f", "harm", "violence"), tag("f", "harm", "violence", who="bea"), tag("f", "harm", who="cy")]
    found = tagged(events)
    assert found["a"].labels == {} and math.isnan(found["a"].unsafe) and "d" not in found
    assert found["b"].unsafe == 0 and set(found["b"].labels.values()) == {0.0} and found["c"].unsafe == 1 and found["c"].labels == {}
    assert "P05" not in found["e"].labels and found["e"].labels["P01"] == 0 and found["f"].labels["P05"] == 1


def bright(i: int, shade: float) -> Tensor:
    """A clip [T,3,H,W] like no other, of about this brightness."""
    noise = torch.rand(14, 3, 32, 32, generator=torch.Generator().manual_seed(i))
    return (shade + 0.1 * (noise - 0.5)).clamp(0, 1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SafeSora's files of 70 prompts with two clips each: what is bright is called violent, and in every pair the brighter one is more harmful."""
    folder = tmp_path_factory.mktemp("safesora")
    rng, videos, pairs = np.random.default_rng(0), [], []
    for i in range(70):
        two = []
        for j, shade in enumerate(sorted(rng.uniform(0.1, 0.9, size=2))):
            name, violent = f"pr-{i}/v-{j}.mp4", bool(shade > 0.6)
            (folder / "media" / f"pr-{i}").mkdir(parents=True, exist_ok=True)
            write_mp4(folder / "media" / name, bright(2 * i + j, shade), 12, upscale=False)
            labels = {harm: harm == "violence" and violent for harm in HARMS}
            common = {"prompt_id": f"pr-{i}", "prompt_text": f"a light number {i}", "video_id": f"v-{i}-{j}", "video_path": name, "is_safe": not violent}
            two.append({**common, "video_labels": labels, "generated_from": "x"})
        videos += two
        pairs.append({"pair_id": f"pair-{i}", "prompt_id": f"pr-{i}", "prompt_text": f"a light number {i}", "video_0": two[0], "video_1": two[1], "harmlessness": "video_0"})
    (folder / "labels.json").write_text(json.dumps(videos))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    for name in ("safesora-label", "safesora"):
        file = folder / ("labels.json" if name == "safesora-label" else "pairs.json")
        import_rankings.main(import_rankings.Config(format=name, file=file, out=folder / name, media=folder / "media", clips=folder / "store"))
    return folder


def config(dataset: Path, out: Path, **changes: Any) -> Config:
    values = {"comparisons": dataset / "safesora-label", "clips": dataset / "store", "cache": dataset / "features", "out": out, "least": 3, "epochs": 30}
    return Config(**{**values, **changes})


def test_imported_tags_teach_the_policy_they_are_about(dataset: Path, tmp_path: Path) -> None:
    result = main(config(dataset, tmp_path / "out"))
    assert list(result["policies"]) == ["P05"], "no other harm has violating clips"
    assert result["policies"]["P05"]["auc"]["mean"] >= 0.95 and result["pairs"] is None
    card = json.loads((tmp_path / "out" / "filter_card.json").read_text())
    assert card["licences"] == ["CC-BY-NC-4.0"] and card["sources"] == ["PKU-Alignment/SafeSora-Label"]
    found = load_filter(tmp_path / "out", POLICY)
    dark, light = (found.check_videos(bright(1000, shade)[None, :13], ["x"], 12.0)[0][0] for shade in (0.2, 0.85))
    assert dark.verdict == Verdict.ALLOW and light.verdict in (Verdict.REVIEW, Verdict.BLOCK)


def test_pairs_on_harm_make_it_a_cost_model_whose_sign_is_the_label(dataset: Path, tmp_path: Path) -> None:
    result = main(config(dataset, tmp_path / "out", comparisons=dataset / "safesora"))
    assert result["pairs"]["mean"] >= 0.9, "people's pairs of unseen prompts"
    assert result["policies"]["P05"]["auc"]["mean"] >= 0.95
    card = json.loads((tmp_path / "out" / "filter_card.json").read_text())
    assert card["pairs"] == 70
    assert set(card["command"].split(" --")) == {"rushes safety-train", "least 3", "epochs 30"} and card["config"]["recall"] == 0.95 and "out" not in card["config"]
    without = main(config(dataset, tmp_path / "plain", comparisons=dataset / "safesora", pair_weight=0.0))
    assert without["pairs"] is None and without["version"] != result["version"]


def test_in_harmlessness_the_clip_that_was_preferred_is_the_less_harmful() -> None:
    event = RankingEvent("e", "t", "p", "ann", ("a", "b"), (1, 2), "harmlessness", "pair", "A")
    tied = RankingEvent("f", "u", "p", "ann", ("a", "c"), (1, 1), "harmlessness", "pair", "tie")
    assert votes_of([event, tied], {"a": 4, "b": 7, "c": 9}).tolist() == [[7, 4]], "more harmful first; a tie says nothing"


def test_labels_and_pairs_of_one_policy_are_the_loss_of_safe_rlhf() -> None:
    logits, unsafe = torch.tensor([[0.4], [-0.3]]), torch.tensor([1.0, 0.0])
    one, none = torch.ones(2), torch.ones(1)
    labels = label_loss(logits, unsafe[:, None], torch.full((2,), math.nan), one, none)
    signs_alone = label_loss(logits, torch.full((2, 1), math.nan), unsafe, one, none)
    pair = -torch.nn.functional.logsigmoid(logits[0, 0] - logits[1, 0])
    expected = -cost_pair(logits[0, 0], logits[1, 0], unsafe[0], unsafe[1])
    torch.testing.assert_close(2 * labels + pair, expected)
    torch.testing.assert_close(2 * signs_alone + pair, expected)


def test_violating_clips_weigh_as_much_as_the_others() -> None:
    clips = [Labelled(str(i), "p", {"P05": float(i < 2)}, weight=1.0 + (i == 0)) for i in range(10)]
    table = table_of(clips, {str(i): torch.zeros(1, 2) for i in range(10)}, ("P05",))
    weight = balance(table)
    assert weight.item() == pytest.approx(8 / 3)
    logits = torch.zeros(10, 1, requires_grad=True)
    label_loss(logits, table.label, table.unsafe, table.weight, weight).backward()
    assert logits.grad is not None and logits.grad.sum().item() == pytest.approx(0, abs=1e-7), "at even odds the two kinds pull alike"


def test_the_card_is_about_the_stream_that_was_audited_not_about_what_reviewers_saw() -> None:
    """A clip of weight 5 is told as five clips of weight 1, calibration included."""
    torch.manual_seed(0)
    head, rng = Head(("P05",), 1, 4), np.random.default_rng(1)
    clips = [Labelled(str(i), f"p{i % 5}", {"P05": float(rng.random() < 0.5)}, weight=float(1 + 4 * (i % 3 == 0))) for i in range(60)]
    tokens = {each.clip_id: torch.randn(1, 2) for each in clips}
    component = {each.prompt_id: each.prompt_id for each in clips}
    one_by_one = [replace(each, weight=1.0) for each in clips for _ in range(int(each.weight))]
    told, again = (measure(head, table_of(some, tokens, ("P05",)), component, 0)["P05"] for some in (clips, one_by_one))
    plain = measure(head, table_of([replace(each, weight=1.0) for each in clips], tokens, ("P05",)), component, 0)["P05"]
    for name in ("log_loss", "brier", "calibration_error"):
        assert told[name] == pytest.approx(again[name], abs=1e-5) and abs(told[name] - plain[name]) > 1e-4, name
    assert told["recall"] == again["recall"] and told["clips"] == 60 and again["clips"] == 140


# Readings


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 clips of 60 prompts; the filter blocked what is dark, people found what is bright, and all of them were read."""
    folder = tmp_path_factory.mktemp("audit")
    shades = np.random.default_rng(1).uniform(0.1, 0.9, size=120)
    new = [NewClip(bright(i, shade)[:13], f"lamp {i // 2}", f"p{i // 2}", i, {"steps": 1}, "test", 12.0, licence="CC0") for i, shade in enumerate(shades)]
    rows = ClipStore(folder / "store").add_many(new, preview=False)
    candidates = [
        Candidate(clip_id=row.clip_id, pool="blocked" if shade < 0.3 else "passed", score=float(shade < 0.3), filter_version="f 1", policies=("P05",) if shade < 0.3 else ())
        for row, shade in zip(rows, shades, strict=True)
    ]
    drawn = {entry.clip_id for entry in draw_audit(folder / "audit", candidates, Plan(blocked=200, passed=200), seed=0).drawn}
    said = [("violating", ("P05",)) if shade > 0.6 else ("not_violating", ()) for shade in shades]
    readings = [Reading(clip_id=row.clip_id, reader="ann", said=word, policies=codes) for row, (word, codes) in zip(rows, said, strict=True) if row.clip_id in drawn]  # type: ignore[arg-type]
    add_readings(folder / "audit", readings)
    return folder


def test_overturned_rulings_teach_the_filter_what_people_found(audit: Path, tmp_path: Path) -> None:
    cfg = Config(audits=(audit / "audit",), clips=audit / "store", cache=audit / "features", out=tmp_path / "out", policies=("P05",), least=2, epochs=30)
    main(cfg)
    found = load_filter(tmp_path / "out", POLICY)
    dark, light = (found.check_videos(bright(2000, shade)[None, :13], ["x"], 12.0)[0][0] for shade in (0.15, 0.85))
    assert dark.verdict == Verdict.ALLOW and light.verdict != Verdict.ALLOW, "the old filter had it the other way round"
    assert json.loads((tmp_path / "out" / "filter_card.json").read_text())["sources"] == ["audit audit"]


def test_audited_clips_count_one_over_their_probability_up_to_a_limit_and_who_cannot_tell_says_nothing(tmp_path: Path) -> None:
    rows = ClipStore(tmp_path / "store").add_many([NewClip(bright(i, 0.5)[:5], f"x {i}", f"p{i}", i, {}, "t", 12.0) for i in range(100)], preview=False)
    known = {row.clip_id: row for row in rows}
    plan = Plan(blocked=0, passed=10, floor=1)
    drawn = draw_audit(tmp_path / "a", [Candidate(clip_id=row.clip_id, pool="passed", score=0.01, filter_version="f") for row in rows], plan, seed=0).drawn
    assert len(drawn) == 10 and drawn[0].probability == pytest.approx(0.1)
    readings = [Reading(clip_id=entry.clip_id, reader="ann", said="cannot_tell" if k == 0 else "not_violating") for k, entry in enumerate(drawn)]
    add_readings(tmp_path / "a", readings)
    found = audited(tmp_path / "a", POLICY, known, 20.0)
    assert len(found) == 9 and {each.weight for each in found.values()} == {10.0} and all(each.unsafe == 0 for each in found.values())
    assert {each.weight for each in audited(tmp_path / "a", POLICY, known, 4.0).values()} == {4.0}
    with pytest.raises(UserError, match="is not in the clip store"):
        audited(tmp_path / "a", POLICY, {}, 20.0)


# What cannot be


def test_too_few_violating_clips_are_refused_in_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"P01 has 0 violating clips in (train|val), and 3 are needed"):
        main(config(dataset, tmp_path / "out", policies=("P01",)))
    with pytest.raises(UserError, match=r"too few clips to learn a filter from: P\d\d has \d+ \w+ clips in \w+; .*and 99 are needed"):
        main(config(dataset, tmp_path / "out", least=99))
    assert not (tmp_path / "out").exists()
    assert rushes(["safety-train", "--shapes", "20", "--least", "9", "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rushes: too few clips") and "P17 has" in line


def test_clips_are_planted_where_nothing_else_is_given_and_never_added_unasked(dataset: Path, tmp_path: Path) -> None:
    alone, told = load_data(Config(), POLICY), load_data(config(dataset, tmp_path / "out"), POLICY)
    assert len(alone.clips) == 300 and {each.source for each in alone.clips.values()} == {"built-in world"} and not told.drawn


def test_what_is_missing_is_named(dataset: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"comparisons": None, "clips": None, "shapes": 0}, "nothing to learn from"),
        ({"clips": None}, "which clips are the labels about"),
        ({"clips": tmp_path / "empty"}, "are not in the clip store"),
        ({"policies": ("P99",)}, "unknown policy 'P99'"),
        ({"commercial": True}, "not for commercial use: 140 labels of PKU-Alignment/SafeSora-Label under CC-BY-NC-4.0"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            main(config(dataset, tmp_path / "out", **changes))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--shares", "[0.5,0.5,0.5]"], ["--policies", "[P17,P17]"], ["--recall", "0"], ["--seconds", "1e9"], ["--policies", "[Ω]"]])
def test_settings_that_cannot_be_are_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rushes(["safety-train", "--shapes", "20", "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words[0].removeprefix("--") in line and "bug" not in line


def test_a_clip_that_cannot_be_looked_at_is_named(audit: Path, tmp_path: Path) -> None:
    rows = ClipStore(tmp_path / "store").add_many([NewClip(torch.rand(5, 3, 30, 34), f"odd {i}", f"p{i}", i, {}, "t", 12.0) for i in range(30)], preview=False)
    candidates = [Candidate(clip_id=row.clip_id, pool="passed", score=0.01, filter_version="f") for row in rows]
    draw_audit(tmp_path / "a", candidates, Plan(blocked=0, passed=30), seed=0)
    said = [Reading(clip_id=row.clip_id, reader="ann", said="violating" if i % 2 else "not_violating", policies=("P05",) if i % 2 else ()) for i, row in enumerate(rows)]
    add_readings(tmp_path / "a", said)
    cfg = Config(audits=(tmp_path / "a",), clips=tmp_path / "store", cache=tmp_path / "f", out=tmp_path / "out", policies=("P05",), least=1)
    with pytest.raises(UserError, match="cannot be looked at"):
        main(cfg)


def test_a_label_nobody_gave_is_never_a_zero(dataset: Path) -> None:
    data = load_data(config(dataset, Path("x"), shapes=20), POLICY)
    assert all("P17" not in each.labels for each in data.clips.values() if each.source != "built-in world")
    assert all(list(each.labels) == ["P17"] for each in data.clips.values() if each.source == "built-in world")
    assert "P05" in codes_of(config(dataset, Path("x"), shapes=20), POLICY, data)


# Limits and areas


def by_hand(score: np.ndarray, truth: np.ndarray, recall: float, rate: float) -> tuple[float, float]:
    """Recall and false-positive rate of the best limits, found by trying many."""
    tried = np.linspace(0, 1, 401)
    able = [t for t in tried if (score[truth == 1] >= t).mean() >= recall]
    fewest = min((score[truth == 0] >= t).mean() for t in able)
    quiet = [t for t in tried if (score[truth == 0] >= t).mean() <= rate]
    return fewest, max((score[truth == 1] >= t).mean() for t in quiet)


def test_limits_keep_what_was_wanted_and_no_other_limit_would_do_better() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = (rng.random(80) < 0.3).astype(float)
        score = np.clip(rng.normal(0.3 + 0.3 * truth, 0.15), 0.001, 0.999).round(2)
        low, high = limits_of(score, truth, np.ones(80), recall=0.9, false_positive_rate=0.1)
        fewest, most = by_hand(score, truth, 0.9, 0.1)
        assert low <= high and (score[truth == 1] >= low).mean() >= 0.9 and (score[truth == 0] >= low).mean() == pytest.approx(fewest)
        assert (score[truth == 0] >= high).mean() <= 0.1 and (high == low or (score[truth == 1] >= high).mean() == pytest.approx(most))
        assert not np.isin([low, high], score).any()


def test_where_scores_separate_both_limits_lie_halfway_between() -> None:
    assert limits_of(np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 0, 1, 1]), np.ones(4), recall=0.5, false_positive_rate=0.0) == (pytest.approx(0.4), pytest.approx(0.4))
    assert limits_of(np.full(4, 0.5), np.array([0.0, 0, 1, 1]), np.ones(4), recall=1.0, false_positive_rate=0.0) == (pytest.approx(0.25), pytest.approx(0.75))


def test_the_area_is_the_share_of_couples_that_are_in_order() -> None:
    rng = np.random.default_rng(2)
    score, truth, weight = rng.integers(0, 6, 40).astype(float), (rng.random(40) < 0.4).astype(float), rng.integers(1, 4, 40).astype(float)
    told = total = 0.0
    for i, j in itertools.product(np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)):
        told += weight[i] * weight[j] * ((score[i] > score[j]) + (score[i] == score[j]) / 2)
        total += weight[i] * weight[j]
    assert auc(score, truth, weight) == pytest.approx(told / total, abs=1e-12)
    assert math.isnan(auc(score, np.ones(40), weight))
