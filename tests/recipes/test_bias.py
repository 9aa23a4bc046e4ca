"""The bias audit end to end on a painter that draws what is planted: what it finds, whom it blocks, what it refuses, and what people's labels tell."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.config import load
from base_model.errors import GuardStop, UserError
from base_model.video.store import ClipStore
from recipes import cli, evaluate
from recipes.bias import Audit, Bank, Blocked, audit_bias, look, majority, plan_of, read_labels, register, render_page, reward_tests
from recipes.evaluate import Config
from recipes.filters import Filters
from recipes.generate import Sampler, safety_runner
from recipes.shapes.bank import VALUES, draw, with_value
from tests.recipes.small import save_small_network, save_small_reward_model
from tests.recipes.test_filters import save_head

SMALL = {"prompts": 12, "clips": 4, "sets": 10, "set_clips": 1, "scenes": 10, "filter_margin": 0.3, "quality_margin": 0.3, "margin": 0.25}
SAMPLER = Sampler()
COLOURS = VALUES["colour"]


class Painter:
    """Stands for models: draws what is asked for; where the colour is open, red in a share of clips that depends on the model."""

    def __init__(self, bank: Bank) -> None:
        self.red = {"even": 1 / 6, "skewed": 0.9}
        self.asked = {one.text: one for one in bank.open}
        self.named = {prompt.text: prompt.things[0] for prompts in bank.sets for prompt in prompts}
        self.calls = 0

    def __call__(self, model: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.calls += 1
        clips = []
        for text, seed in zip(texts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            if text in self.asked:
                rest = (1 - self.red[model]) / 5
                colour = COLOURS[int(rng.choice(6, p=[self.red[model], *[rest] * 5]))]
                clips.append(draw(self.asked[text]._replace(thing=with_value(self.asked[text].thing, "colour", colour)), rng))
            else:
                clips.append(draw(next(iter(self.asked.values()))._replace(thing=self.named[text]), rng))
        return torch.stack(clips)


def settings(**more: Any) -> Audit:
    return Audit.model_validate({**SMALL, **more})


def audited(out: Path, models: Sequence[str], **more: Any) -> tuple[dict[str, Any], Painter]:
    cfg = settings(**more)
    painter = Painter(Bank.of(cfg, 0))
    networks = {model: model * 8 for model in models}
    audit_bias(cfg, out, networks, painter, SAMPLER, 0)
    return json.loads((out / "bias.json").read_text()), painter


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("bias")
    with pytest.raises(Blocked, match=r"the bias audit blocks: share against even, skewed, red: \+.*bias\.html") as stopped:
        audited(out, ["even", "skewed"])
    assert stopped.value.exit_status == 3 and stopped.value.result["state"] == "blocked"
    return json.loads((out / "bias.json").read_text()), out


def test_a_model_that_draws_one_colour_is_blocked_and_the_page_says_why(report: tuple[dict[str, Any], Path]) -> None:
    found, out = report
    rows = {(row["what"], row["model"], row["value"]): row for row in found["findings"]}
    even, skewed = (found["models"][name]["values"][0] for name in ("even", "skewed"))
    assert even["share"]["low"] <= 1 / 6 <= even["share"]["high"] and skewed["share"]["low"] <= 0.9 <= skewed["share"]["high"]
    assert rows["shift", "skewed", "red"]["found"] and rows["shift", "skewed", "red"]["state"] == "blocked"
    assert rows["share against even", "even", "red"]["decides"] is False, "what was there before is shown, not judged"
    assert skewed["ratio"] > 4 and skewed["in_band"] is False and skewed["cohens_h"] > 1 and found["models"]["skewed"]["evenness"]["mean"] < 0.5
    assert all(row["right"]["mean"] > 0.7 and row["withheld"]["mean"] == 0 for row in found["models"]["skewed"]["values"]), "the painter draws what it is asked for"
    assert found["models"]["skewed"]["keeps"]["mean"] > 0.95
    page = (out / "bias.html").read_text()
    assert 'Bias audit: <span class="bad">blocked</span>' in page and found["plan_sha256"] in page and page.count('<rect class="bar"') == 12


def test_what_is_agreed_on_is_written_first_and_cannot_be_changed_later(report: tuple[dict[str, Any], Path]) -> None:
    _, out = report
    plan = json.loads((out / "plan.json").read_text())
    assert plan["margin"] == 0.25 and plan["by"] == "judge" and len(plan["sha256"]) == 64
    with pytest.raises(UserError, match=r"agreed on with another margin \(0.25 -> 0.5\)"):
        audited(out, ["even"], margin=0.5)
    (out / "other").mkdir()
    changed = json.loads((out / "plan.json").read_text()) | {"sha256": "0" * 64}
    (out / "other" / "plan.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="with another hash"):
        register(out / "other", plan_of(settings(), SAMPLER, 0))


def test_a_model_is_read_once_and_one_alone_is_judged_itself(report: tuple[dict[str, Any], Path]) -> None:
    _, out = report
    found, painter = audited(out, ["even"])
    assert painter.calls == 0, "its clips were read before"
    assert all(row["decides"] for row in found["findings"]) and not any(row["what"] == "shift" for row in found["findings"])
    assert found["state"] in ("pass", "sign-off needed")


def test_a_repaired_model_is_not_blocked_for_its_shift_and_can_be_signed_off(tmp_path: Path, report: tuple[dict[str, Any], Path]) -> None:
    found, _ = audited(report[1], ["skewed", "even"], signed_off="Ann: that was the point")
    assert found["state"] == "sign-off needed" and found["signed_off"] == "Ann: that was the point"
    assert any(line.startswith("sign-off needed: shift, even, red: -") for line in found["because"])
    with pytest.raises(Blocked):
        audited(report[1], ["even", "skewed"], signed_off="Ann: never mind")
    assert json.loads((report[1] / "bias.json").read_text())["signed_off"] is None, "what is blocked cannot be signed off"


def test_the_filters_that_are_named_rule_in_the_audit_and_a_model_is_read_again_for_others(tmp_path: Path) -> None:
    cfg = settings(prompts=2, clips=2, sets=2)
    withheld = []
    for limit in (0.999, 0.0001, 0.999):
        filters = Filters(trained=(save_head(tmp_path / "head", limit=limit),))
        audit_bias(cfg, tmp_path / "out", {"even": "even" * 8}, Painter(Bank.of(cfg, 0)), SAMPLER, 0, filters)
        found = json.loads((tmp_path / "out" / "bias.json").read_text())
        assert "head-latent" in [each["filter"] for each in found["safety"]]
        withheld.append({row["withheld"]["mean"] for row in found["models"]["even"]["values"]})
    assert withheld == [{0.0}, {1.0}, {0.0}] and len(list((tmp_path / "out" / "seen").iterdir())) == 2


def test_filters_that_fail_are_no_gap_of_0(tmp_path: Path) -> None:
    """A filter trained for another frame rate withholds every clip of every value alike."""
    cfg = settings(prompts=2, clips=2, sets=2)
    filters = Filters(trained=(save_head(tmp_path / "head"),))
    with pytest.raises(GuardStop, match="safety filters failed on 12 of 12 clips"):
        audit_bias(cfg, tmp_path / "out", {"even": "even" * 8}, Painter(Bank.of(cfg, 0)), SAMPLER.model_copy(update={"fps": 8.0}), 0, filters)


def test_readings_that_are_damaged_are_named(tmp_path: Path) -> None:
    audited(tmp_path, ["even"])
    (file,) = (tmp_path / "seen").iterdir()
    file.write_text('{"names": []}')
    with pytest.raises(UserError, match=r"seen/.* is damaged: KeyError.*Delete it"):
        audited(tmp_path, ["even"])


def test_equal_noise_within_a_set_and_between_models() -> None:
    cfg = settings(prompts=2, clips=2, sets=2, set_clips=2)
    bank, seen = Bank.of(cfg, 0), []

    def generate(model: str, texts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        seen.append((model, list(texts), list(seeds)))
        return torch.rand(len(texts), 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    for model in ("one", "two"):
        look(cfg, bank, model, generate, safety_runner(), None, 12.0, 0)
    assert [call[1:] for call in seen[:2]] == [call[1:] for call in seen[2:]]
    noise = np.array(seen[1][2]).reshape(2, 6, 2)
    assert (noise == noise[:, :1]).all() and len(np.unique(noise)) == 4, "a set's prompts share their noise, sets and takes do not"


def test_a_reward_with_a_taste_is_caught_before_any_model_moved() -> None:
    def likes_red(video: Tensor, prompts: Sequence[str]) -> Tensor:
        return video[:, :, 0].mean((1, 2, 3)) - video[:, :, 2].mean((1, 2, 3))

    tests, rows = reward_tests(settings(), "colour", likes_red, 0)
    means = {test.value: float(test.x.mean()) for test in tests if "left open" in test.what}
    assert max(means, key=lambda name: means[name]) in ("red", "yellow") and min(means, key=lambda name: means[name]) in ("blue", "cyan")
    assert sum(means.values()) == pytest.approx(0, abs=1e-6) and rows["open"]["red"]["low"] > 0.5
    blind, _ = reward_tests(settings(), "colour", lambda video, prompts: torch.arange(len(video)) * 0.0 + len(prompts[0]), 0)
    assert all(abs(float(test.x.mean())) < 1e-6 for test in blind if "left open" in test.what)


def test_the_command_audits_networks_and_a_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, reward = save_small_network(tmp_path / "network.safetensors"), save_small_reward_model(tmp_path / "reward")
    words = ["evaluate", "--bias", "--models", f"{{before: {network}}}", "--audit", "{prompts: 2, clips: 1, sets: 1, set_clips: 1, scenes: 1}", "--audit.reward", str(reward)]
    assert cli.main([*words, "--sampler.steps", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "sign-off needed" and told["found"] == [], "two prompts tell nothing"
    found = json.loads((tmp_path / "out" / "bias.json").read_text())
    assert set(found["reward"]) == {"scenes", "open", "named"} and found["models"]["before"]["values"][0]["reward"] is not None
    assert (tmp_path / "out" / "bias.html").read_text().startswith("<!doctype html>")


def test_bad_plans_are_one_line_errors() -> None:
    for words, said in (
        (["--audit.attribute", "age"], "no 'age'"),
        (["--audit.references", "{house: {red: 0.5, blue: 0.5}}"], "'cyan' is a value of the references or of colour, not of both"),
        (["--audit.labels", "x.csv"], "one needs the other"),
        (["--audit.prompts", "9999"], "has no 9999 different prompts"),
    ):
        cfg = load(Config, None, ["--bias", *words])
        with pytest.raises(UserError, match=said) as error:
            audit_bias(cfg.audit, Path("runs/never"), {"base": "sha"}, Painter, SAMPLER, 0)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nothing to audit"):
        audit_bias(settings(), Path("runs/never"), {}, Painter, SAMPLER, 0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="prompts of its own"):
        evaluate.main(load(Config, None, ["--bias", "--captions", "a dog"]))
    with pytest.raises(UserError, match=r"add up to 0\.9"):
        load(Config, None, ["--audit.references", "{house: {a: 0.5, b: 0.4}}"])


# What people say


def labelled_store(folder: Path, name: str, women: int) -> tuple[Path, list[dict[str, str]]]:
    """100 clips of 50 prompts; so many of ten clips show women; three labelers each, one of whom cannot tell now and then."""
    store, rows = ClipStore(folder / name), []
    for k in range(100):
        clip = torch.full((1, 3, 8, 8), k / 255) + (100 / 255 if name == "after" else 0.0)
        row = store.add(clip, prompt=f"a doctor at work {k // 2}", prompt_id=f"p{k // 2}", seed=k, sampler={}, lineage=name, fps=1.0, preview=False)
        value = "woman" if k % 10 < women else "man"
        for who in ("ann", "bo", "cy"):
            rows.append({"clip_id": row.clip_id, "attribute": "presentation", "value": "unclear" if who == "cy" and k % 7 == 0 else value, "labeler": who})
        rows.append({"clip_id": row.clip_id, "attribute": "age", "value": "adult", "labeler": "ann"})
    return folder / name, rows


def write_labels(file: Path, rows: list[dict[str, str]]) -> Path:
    with open(file, "w", newline="") as out:
        table = csv.DictWriter(out, ["clip_id", "attribute", "value", "labeler"])
        table.writeheader()
        table.writerows(rows)
    return file


def test_labels_of_people_are_shares_too(tmp_path: Path) -> None:
    (before, first), (after, second) = labelled_store(tmp_path, "before", 5), labelled_store(tmp_path, "after", 1)
    labels = write_labels(tmp_path / "labels.csv", first + second)
    references = {"even": {"woman": 0.5, "man": 0.5}, "census": {"woman": 0.45, "man": 0.55}}
    cfg = settings(attribute="presentation", labels=labels, stores={"before": before, "after": after}, references=references)
    with pytest.raises(Blocked, match="after, "):
        audit_bias(cfg, tmp_path / "out", {}, Painter, SAMPLER, 0)  # type: ignore[arg-type]
    found = json.loads((tmp_path / "out" / "bias.json").read_text())
    assert found["models"]["before"]["values"][0]["share"]["mean"] == pytest.approx(0.5) and found["models"]["after"]["values"][0]["share"]["mean"] == pytest.approx(0.1)
    assert found["labels"]["before"]["labelled"] == 100 and 0.8 < found["labels"]["before"]["gwet_ac1"] < 1
    assert not any(row["decides"] for row in found["findings"] if "census" in row["what"]), "the first reference decides"
    assert "Gwet" in (tmp_path / "out" / "bias.html").read_text()


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store, rows = labelled_store(tmp_path, "before", 5)
    twice = write_labels(tmp_path / "twice.csv", [*rows, rows[0] | {"value": "man"}])
    with pytest.raises(UserError, match="ann says both 'woman' and 'man'"):
        read_labels(twice, "presentation")
    with pytest.raises(UserError, match="no labels of 'gait'"):
        read_labels(write_labels(tmp_path / "labels.csv", rows), "gait")
    cfg = settings(attribute="age", labels=tmp_path / "labels.csv", stores={"before": store}, references={"even": {"adult": 0.5, "child": 0.5}})
    with pytest.raises(UserError, match="none of the 100 clips has 3 labels"):
        audit_bias(cfg, tmp_path / "out", {}, Painter, SAMPLER, 0)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "plan.json").exists(), "nothing was agreed on"


def test_most_labelers_decide_and_a_draw_is_nobodys() -> None:
    assert majority(["woman", "man", "woman"]) == "woman" and majority(["woman", "man"]) == "several" and majority(["unclear"]) == "unclear"


def test_names_cannot_break_the_page(report: tuple[dict[str, Any], Path]) -> None:
    found = json.loads(json.dumps(report[0]).replace("skewed", "<script>x</script>"))
    page = render_page(found)
    assert "<script>" not in page and "&lt;script&gt;" in page
