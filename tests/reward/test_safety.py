"""Safety: no fault becomes an allow, a block stays a block, and the filters see what they should."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from base_model.errors import GuardStop, UserError
from base_model.video.files import from_uint8, read_video
from reward.safety.audit import candidate_of
from reward.safety.contract import INPUT_POLICY, Decision, PromptFilter, Reason, Ruling, SafetyRunner, Verdict, VideoFilter, allowed, check_error_rate, cost, costs, to_json
from reward.safety.policy import SHIPPED, load_policy
from reward.safety.prompt import WordFilter
from reward.safety.video import DegenerateFilter, FlashFilter, flash_risk

POLICY = load_policy()
CLIP = torch.linspace(0.2, 0.6, 32).expand(1, 5, 3, 32, 32).contiguous()


def ruling(verdict: Verdict, score: float, policy: str = "P17", who: str = "fake") -> Ruling:
    return Ruling(verdict, policy, score, (Reason("because"),), who, "1", 0.5)


ALLOW, REVIEW, BLOCK = ruling(Verdict.ALLOW, 0.1), ruling(Verdict.REVIEW, 0.6), ruling(Verdict.BLOCK, 0.9)


class Fake:
    """A filter for prompts and clips whose answer is any function of the number of items."""

    version = "1"
    threshold = 0.5

    def __init__(self, answer: Callable[[int], object], policies: tuple[str, ...] = ("P17",), name: str = "fake") -> None:
        self.answer, self.policies, self.id = answer, policies, name

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        return self.answer(len(prompts))  # type: ignore[return-value]

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        return self.answer(len(prompts))  # type: ignore[return-value]


def says(*rulings: Ruling, name: str = "fake") -> Fake:
    return Fake(lambda n: [list(rulings)] * n, tuple({each.policy for each in rulings}), name)


def raises(error: BaseException) -> Callable[[int], object]:
    def answer(n: int) -> object:
        raise error

    return answer


def sleeps(n: int) -> object:
    time.sleep(0.8)
    return [[ALLOW]] * n


FAULTS: dict[str, Callable[[int], object]] = {
    "exception": raises(RuntimeError("boom")),
    "out of memory": raises(MemoryError()),
    "exit": raises(SystemExit(0)),
    "interrupt": raises(KeyboardInterrupt()),
    "timeout": sleeps,
    "nan score": lambda n: [[replace(ALLOW, score=math.nan)]] * n,
    "infinite score": lambda n: [[replace(ALLOW, score=-math.inf)]] * n,
    "score above one": lambda n: [[replace(ALLOW, score=1.5)]] * n,
    "text for a score": lambda n: [[replace(ALLOW, score="0.1")]] * n,  # type: ignore[arg-type]
    "no answer": lambda n: None,
    "no rulings at all": lambda n: [],
    "one ruling too few": lambda n: [[ALLOW]] * (n - 1),
    "one ruling too many": lambda n: [[ALLOW]] * (n + 1),
    "no ruling for a clip": lambda n: [[]] * n,
    "None for a clip": lambda n: [None] * n,
    "a truth value for a ruling": lambda n: [[True]] * n,
    "an undeclared policy": lambda n: [[replace(ALLOW, policy="P01")]] * n,
    "an allow above its threshold": lambda n: [[replace(ALLOW, score=0.7)]] * n,
    "an allow with a threshold that no score reaches": lambda n: [[replace(ALLOW, score=1.0, threshold=math.inf)]] * n,
    "an allow with a nan threshold": lambda n: [[replace(ALLOW, threshold=math.nan)]] * n,
    "a number for a verdict": lambda n: [[replace(ALLOW, verdict=0)]] * n,  # type: ignore[arg-type]
    "a ruling that says error": lambda n: [[ruling(Verdict.ERROR, math.nan)]] * n,
}


def both(runner: SafetyRunner, n: int = 2) -> list[Decision]:
    return runner.check_prompts(["a red circle"] * n) + runner.check_videos(CLIP.expand(n, -1, -1, -1, -1), ["a red circle"] * n, 12.0)


@pytest.mark.timed
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_fault_is_an_error_and_never_an_allow(name: str, first: bool) -> None:
    filters = [Fake(FAULTS[name]), says(ALLOW, name="good")]
    decisions = both(SafetyRunner(filters if first else filters[::-1], POLICY, timeout=0.4 if name == "timeout" else 60.0))
    assert [each.verdict for each in decisions] == [Verdict.ERROR] * 4
    assert not any(map(allowed, decisions))
    assert all(math.isnan(cost(each, "P17")) for each in decisions)


@pytest.mark.timed
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_block_stays_a_block_whatever_else_fails(name: str, first: bool) -> None:
    filters = [Fake(FAULTS[name]), says(BLOCK, name="good")]
    decisions = both(SafetyRunner(filters if first else filters[::-1], POLICY, timeout=0.4 if name == "timeout" else 60.0))
    assert [each.verdict for each in decisions] == [Verdict.BLOCK] * 4
    assert [cost(each, "P17") for each in decisions] == [0.9] * 4


def test_every_order_and_mix_of_faults_and_verdicts_gives_the_worst() -> None:
    answers: dict[str, Fake] = {"allow": says(ALLOW), "review": says(REVIEW), "block": says(BLOCK), "error": Fake(FAULTS["exception"]), "short": Fake(FAULTS["no rulings at all"])}
    worst = {"allow": Verdict.ALLOW, "review": Verdict.REVIEW, "error": Verdict.ERROR, "short": Verdict.ERROR, "block": Verdict.BLOCK}
    for names in itertools.product(answers, repeat=3):
        decision = SafetyRunner([answers[name] for name in names], POLICY).check_videos(CLIP, ["x"], 12.0)[0]
        assert decision.verdict == max(worst[name] for name in names)
        assert allowed(decision) == (set(names) == {"allow"})


def test_verdicts_are_ordered() -> None:
    assert Verdict.ALLOW < Verdict.REVIEW < Verdict.ERROR < Verdict.BLOCK


def test_a_fault_in_one_ruling_keeps_the_block_beside_it_even_with_a_nan_score() -> None:
    decisions = both(SafetyRunner([Fake(lambda n: [[replace(BLOCK, score=math.nan), True]] * n)], POLICY))
    assert [each.verdict for each in decisions] == [Verdict.BLOCK] * 4
    assert [cost(each, "P17") for each in decisions] == [1.0] * 4


@pytest.mark.parametrize("score", [-3.0, 7.0, math.inf, math.nan])
def test_a_block_whose_score_is_no_probability_costs_1_and_can_be_audited(score: float) -> None:
    for decision in both(SafetyRunner([Fake(lambda n: [[replace(BLOCK, score=score)]] * n)], POLICY)):
        assert decision.verdict == Verdict.BLOCK and cost(decision, "P17") == 1.0
        candidate = candidate_of("a clip", to_json(decision))
        assert candidate is not None and candidate.pool == "blocked"


def test_without_a_filter_nothing_is_allowed() -> None:
    assert [each.verdict for each in both(SafetyRunner([], POLICY))] == [Verdict.ERROR] * 4
    assert Decision(()).verdict == Verdict.ERROR


def test_a_prompt_filter_alone_allows_no_clip_and_a_clip_filter_alone_no_prompt() -> None:
    assert not allowed(SafetyRunner([WordFilter(POLICY)], POLICY).check_videos(CLIP, ["x"], 12.0)[0])
    assert not allowed(SafetyRunner([FlashFilter(POLICY)], POLICY).check_prompts(["x"])[0])


def test_what_is_no_filter_is_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        SafetyRunner([object()], POLICY)  # type: ignore[list-item]
    assert isinstance(WordFilter(POLICY), PromptFilter) and isinstance(FlashFilter(POLICY), VideoFilter)


def test_a_policy_that_does_not_exist_is_an_error() -> None:
    fake = Fake(lambda n: [[replace(ALLOW, policy="P99")]] * n, ("P99",))
    assert [each.verdict for each in both(SafetyRunner([fake], POLICY))] == [Verdict.ERROR] * 4


@pytest.mark.parametrize(
    "video",
    [CLIP[:, :0], CLIP[..., :0], CLIP[:, :, :1], CLIP[0], (CLIP * 255).byte(), CLIP * 255, CLIP - 1, *(CLIP.masked_fill(CLIP > 0.5, bad) for bad in (torch.nan, torch.inf))],
    ids=["zero frames", "zero width", "one channel", "no batch", "bytes", "0 to 255", "negative", "nan", "inf"],
)
def test_a_clip_that_cannot_be_judged_is_an_error(video: Tensor) -> None:
    decisions = SafetyRunner([says(ALLOW)], POLICY).check_videos(video, ["x"] * len(video), 12.0)
    assert {each.verdict for each in decisions} == {Verdict.ERROR}
    assert all(math.isnan(cost(each, "P17")) for each in decisions)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_rate_is_an_error(fps: float) -> None:
    assert SafetyRunner([says(ALLOW)], POLICY).check_videos(CLIP, ["x"], fps)[0].verdict == Verdict.ERROR


def test_one_broken_clip_does_not_cost_its_neighbours_their_rulings() -> None:
    video = CLIP.repeat(3, 1, 1, 1, 1)
    video[1, 0, 0, 0, 0] = torch.nan
    assert [each.verdict for each in SafetyRunner([says(ALLOW)], POLICY).check_videos(video, ["x"] * 3, 12.0)] == [Verdict.ALLOW, Verdict.ERROR, Verdict.ALLOW]


def test_a_filter_cannot_change_what_the_next_one_sees() -> None:
    class Vandal(Fake):
        def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
            video.fill_(0.5)
            return [[ALLOW]] * len(video)

    video = flicker([0.0, 0.9] * 7)
    assert SafetyRunner([Vandal(lambda n: None), FlashFilter(POLICY)], POLICY).check_videos(video, ["x"], 12.0)[0].verdict == Verdict.BLOCK


@pytest.mark.timed
def test_a_late_answer_is_never_taken_for_another_clips() -> None:
    slow = Fake(sleeps)
    runner = SafetyRunner([slow], POLICY, timeout=0.4)
    assert runner.check_prompts(["first"])[0].verdict == Verdict.ERROR
    slow.answer = lambda n: [[BLOCK]] * n
    time.sleep(0.6)
    assert runner.check_prompts(["second"])[0].verdict == Verdict.BLOCK


def test_clips_and_prompts_must_come_in_pairs() -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        SafetyRunner([says(ALLOW)], POLICY).check_videos(CLIP, ["x", "y"], 12.0)


def test_costs_are_graded_probabilities_and_nan_only_where_unknown() -> None:
    p05 = ruling(Verdict.ERROR, math.nan, "P05")
    decisions = [Decision((ALLOW,)), Decision((ALLOW, REVIEW)), Decision((BLOCK,)), Decision((ALLOW, p05)), Decision((BLOCK, p05))]
    torch.testing.assert_close(costs(decisions, "P17"), torch.tensor([0.1, 0.6, 0.9, math.nan, 0.9]), equal_nan=True)
    assert math.isnan(cost(decisions[4], "P05"))
    with pytest.raises(ValueError, match="no filter ruled"):
        cost(decisions[0], "P01")


def test_rulings_are_stamped_and_counted_and_the_lineage_names_the_filters() -> None:
    runner = SafetyRunner([says(ALLOW, ruling(Verdict.REVIEW, 0.7, "P15"), name="a"), Fake(FAULTS["exception"], name="b")], POLICY)
    decision = both(runner)[-1]
    assert {each.policy_version for each in decision.rulings} == {POLICY.version} and all(each.seconds >= 0 for each in decision.rulings)
    assert runner.counts["clip.checked"] == runner.counts["clip.error"] == runner.counts["clip.P15.review"] == runner.counts["prompt.error"] == 2
    assert runner.counts["clip.error: b: RuntimeError: boom"] == 2
    assert [(each["filter"], each["version"], each["policy_version"]) for each in runner.lineage()] == [("a", "1", POLICY.version), ("b", "1", POLICY.version)]
    rows = to_json(decision)["rulings"]
    assert isinstance(rows, list) and [row["score"] for row in rows] == [0.1, 0.7, None]


def test_a_batch_stops_the_run_above_the_error_rate_and_not_at_it() -> None:
    runner = SafetyRunner([Fake(lambda n: [[ALLOW]] * n if n > 1 else None)], POLICY)
    one, many = runner.check_prompts(["x"]), runner.check_prompts(["x"] * 19)
    check_error_rate([*one, *many], 0.05)
    with pytest.raises(GuardStop, match="2 of 21") as caught:
        check_error_rate([*one, *many, *one], 0.05)
    assert "NoneType" in str(caught.value) and "\n" not in str(caught.value)


# --- policy


def test_the_shipped_policy_has_the_seventeen_codes_with_severity_action_and_mappings() -> None:
    codes = [rule.code for rule in POLICY.rules if rule.code.startswith("P")]
    assert codes == [f"P{i:02}" for i in range(1, 18)]
    blocked = {"P01", "P03", "P04", "P05", "P06", "P07", "P08", "P10", "P17"}
    assert {rule.code for rule in POLICY.rules if rule.action == "block"} == blocked
    assert [rule.code for rule in POLICY.rules if rule.escalate] == ["P04"] and POLICY.rule("P16").tag and POLICY.action("P16") == "allow"
    assert POLICY.rule("P04").severity == 4 and POLICY.rule("P04").mappings.llama_guard == ("S4",)
    assert [flag.code for flag in POLICY.flags] == ["T", "B"]
    assert "P17" in POLICY and "P18" not in POLICY and INPUT_POLICY not in POLICY


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["rules"][0].update(severty=1), r"rules\.0\.severty"),
        (lambda p: p["rules"][0].update(severity=5), r"rules\.0\.severity"),
        (lambda p: p["rules"][0].update(action="maybe"), r"rules\.0\.action"),
        (lambda p: p["rules"].append(p["rules"][0]), "P01 is defined twice"),
        (lambda p: p.pop("version"), "version"),
        (lambda p: p.update(rules=[]), "rules"),
        (lambda p: p["rules"][0]["mappings"].update(other=["1"]), r"mappings\.other"),
    ],
)
def test_a_wrong_policy_is_refused_naming_the_key(tmp_path: Path, change: Callable[[dict[str, object]], object], says: str) -> None:
    values = yaml.safe_load(SHIPPED.read_text())
    change(values)
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=says) as caught:
        load_policy(tmp_path / "policy.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [None, "a: [", "!!python/object/apply:os.system ['true']", "\x00", "just words"])
def test_a_policy_file_that_is_missing_or_no_policy_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_policy(tmp_path / "policy.yaml")
    assert "\n" not in str(caught.value)


# --- prompts


WORDS = WordFilter(POLICY)


def verdict(prompt: str) -> Verdict:
    return max(each.verdict for each in WORDS.check_prompts([prompt])[0])


@pytest.mark.parametrize(
    "prompt",
    [
        "a strobe light", "A STROBING circle", "flashing lights", "flashing-lights", "flashing\nlights", "this may cause a seizure", "the lamp flickers", "flicker",
        "ｓｔｒｏｂｅ", "𝓼𝓽𝓻𝓸𝓫𝓮", "Ⓢⓣⓡⓞⓑⓔ", "ﬂicker", "śtrőbė", "s̶t̶r̶o̶b̶e̶",
        "st\u200brobe", "st\u00adrobe", "\u202estrobe", "str\ufe0fobe", "ѕtrоbе", "ЅТRОВЕ", "ѕеіzurе", "ΝΑΚΕD", "strοbe",
        "s7r0b3", "$trobe", "fl1cker", "f|icker", "fl!cker", "se1zure", "flash1ng l1ghts", "STROOOOBE", "seizzzure",
        "s t r o b e", "a s t r o b e light", "s.t.r.o.b.e", "s_t_r_o_b_e", "stro-be", "s*t*r*o*b*e", "flickering candle in a strobe",
    ],
)  # fmt: skip
def test_listed_words_are_found_through_disguises(prompt: str) -> None:
    assert verdict(prompt) == Verdict.BLOCK


@pytest.mark.parametrize(
    "prompt",
    [
        "", "a red circle moves left", "a red circle in pulsing disco light", "a square, lights going on and off", "a flickering candle", "campfire flames flicker in the dark",
        "visible to the naked eye", "a b c d e", "5 dogs and 1 cat", "the lily flowers bloom", "Ein rotes Quadrat", "красный круг", "a photo shoot", "a nudge", "essex",
        "he grapes the wine", "a gun control debate",
    ],
)  # fmt: skip
def test_harmless_prompts_and_softer_wordings_pass(prompt: str) -> None:
    assert verdict(prompt) == Verdict.ALLOW


@pytest.mark.parametrize("prompt", ["a nude colourful woman", "a nude, colourful woman", "a naked, tree-climbing man", "a woman naked. Tree behind her", "flickering firestorm"])
def test_a_harmless_phrase_does_not_open_the_filter_for_what_only_begins_like_it(prompt: str) -> None:
    assert verdict(prompt) == Verdict.BLOCK


def test_a_hit_names_its_words_and_policy_and_there_is_one_ruling_for_each_policy() -> None:
    rulings = {each.policy: each for each in WordFilter(POLICY).check_prompts(["a strobing, sexy lamp about gun control"])[0]}
    assert set(rulings) == {f"P{i:02}" for i in range(1, 18)}
    hits = {code: (each.verdict, each.score, [reason.text for reason in each.reasons]) for code, each in rulings.items() if each.score}
    assert hits == {
        "P02": (Verdict.REVIEW, 1.0, ["the prompt says 'sexy'"]),
        "P16": (Verdict.ALLOW, 1.0, ["the prompt says 'gun control'"]),
        "P17": (Verdict.BLOCK, 1.0, ["the prompt says 'strobing'"]),
    }
    decision = SafetyRunner([WordFilter(POLICY)], POLICY).check_prompts(["a film about gun control"])[0]
    assert allowed(decision)


@pytest.mark.parametrize(
    "prompt",
    ["1 " * 3000, "a" * 200_000, "- " * 5000, "1-" * 20_000, "_" * 100_000, "ab-" * 20_000, "a" + "\u0301\u0316" * 20_000, "\ufdfa" * 5000, "nude" + "-" * 50_000],
    ids=lambda prompt: ascii(prompt[:6]),
)
def test_a_long_prompt_is_never_allowed_and_read_in_no_time(prompt: str) -> None:
    begun = time.perf_counter()
    assert verdict(prompt) > Verdict.ALLOW
    assert verdict(prompt[:2000]) >= Verdict.ALLOW
    assert time.perf_counter() - begun < 5


def test_a_word_is_found_in_the_part_of_a_long_prompt_that_is_read() -> None:
    assert verdict("a strobe light " + "and so on " * 1000) == Verdict.BLOCK
    assert verdict("and so on " * 1000 + "a strobe light") == Verdict.REVIEW
    assert verdict("a red circle " * 150) == Verdict.ALLOW


def test_real_prompts_are_rarely_stopped(real_data: Path) -> None:
    files = [path for path in real_data.rglob("*.txt") if "prompts" in path.parts]
    prompts = [line for path in files for line in path.read_text().splitlines() if line.strip()]
    assert len(prompts) >= 500
    assert sum(verdict(prompt) != Verdict.ALLOW for prompt in prompts) <= 0.02 * len(prompts)


# --- flashing


def to_srgb(linear: float) -> float:
    return 12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055


def flicker(luminances: Sequence[float], *, rows: int = 20, side: int = 20, rest: float = 0.3) -> Tensor:
    """A clip whose upper `rows` of `side` have the given relative luminance, frame by frame; the rest stays. [1,T,3,side,side]"""
    clip = torch.full((1, len(luminances), 3, side, side), to_srgb(rest))
    for t, luminance in enumerate(luminances):
        clip[0, t, :, :rows] = to_srgb(luminance)
    return clip


def square_wave(flashes_a_second: int, fps: int, seconds: float = 1.0, low: float = 0.1, high: float = 0.5) -> list[float]:
    return [high if math.floor(2 * flashes_a_second * (t / fps) + 1e-9) % 2 else low for t in range(round(fps * seconds) + 1)]


def flash_verdict(video: Tensor, fps: float = 12.0) -> Verdict:
    return FlashFilter(POLICY).check_videos(video, [""] * len(video), fps)[0][0].verdict


@pytest.mark.parametrize("fps", [8, 12, 24, 25, 30, 60])
@pytest.mark.parametrize("seconds", [1.0, 3.0])
def test_four_flashes_a_second_are_blocked_and_three_are_not(fps: int, seconds: float) -> None:
    assert flash_verdict(flicker(square_wave(3, fps, seconds)), fps) == Verdict.ALLOW
    assert flash_verdict(flicker(square_wave(4, fps, seconds)), fps) == Verdict.BLOCK


def test_flashing_every_frame_of_a_demo_clip_is_blocked() -> None:
    assert flash_verdict(flicker([0.05, 0.9] * 6 + [0.05], rows=8)) == Verdict.BLOCK


@pytest.mark.parametrize(("rows", "expected"), [(4, Verdict.ALLOW), (5, Verdict.BLOCK), (20, Verdict.BLOCK)])
def test_the_area_counts_from_a_quarter_of_the_frame(rows: int, expected: Verdict) -> None:
    assert flash_verdict(flicker(square_wave(6, 12), rows=rows)) == expected


@pytest.mark.parametrize(("low", "high", "blocked"), [(0.3, 0.395, False), (0.3, 0.405, True), (0.81, 1.0, False), (0.79, 1.0, True), (0.0, 0.105, True)])
def test_a_flash_needs_a_tenth_of_the_luminance_and_a_dark_side(low: float, high: float, blocked: bool) -> None:
    assert flash_verdict(flicker(square_wave(6, 12, low=low, high=high))) == (Verdict.BLOCK if blocked else Verdict.ALLOW)


def test_many_short_flashes_spread_over_seconds_are_allowed_and_a_burst_is_found_with_its_time() -> None:
    calm = square_wave(2, 12, 4.0)
    assert flash_verdict(flicker(calm)) == Verdict.ALLOW
    burst = [0.1] * 24 + square_wave(6, 12, 1.0) + [0.1] * 24
    only = FlashFilter(POLICY).check_videos(flicker(burst), [""], 12.0)[0][0]
    assert only.verdict == Verdict.BLOCK
    (reason,) = only.reasons
    assert reason.start is not None and reason.end is not None and reason.end - reason.start <= 1.0
    assert 1.0 < reason.start <= 2.2 and reason.end <= 3.1


def test_fades_over_many_frames_count_like_jumps() -> None:
    for flashes, expected in ((3, Verdict.ALLOW), (4, Verdict.BLOCK)):
        fade = [0.3 - 0.15 * math.cos(2 * math.pi * flashes * t / 48) for t in range(49)]
        assert flash_verdict(flicker(fade), 48.0) == expected
        assert max(abs(a - b) for a, b in itertools.pairwise(fade)) < 0.1  # no single step is a transition


def test_a_long_clip_is_measured_part_by_part_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    video = torch.rand(2, 130, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    video[1, 60:68:2] += 0.7  # a burst over the seam at frame 64
    in_parts = flash_risk(video, 12)
    monkeypatch.setattr("reward.safety.video.FRAMES_AT_ONCE", 1000)
    whole = flash_risk(video, 12)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(in_parts, whole, strict=True)) and whole.luminance[1] > 0.1 > whole.luminance[0]


def test_a_brightening_with_jitter_is_no_flashing() -> None:
    assert flash_verdict(flicker([0.05 + 0.05 * t + 0.04 * (t % 2) for t in range(13)])) == Verdict.ALLOW


def test_saturated_red_flashes_at_equal_luminance() -> None:
    red, grey = torch.tensor([0.5, 0.0, 0.0]), torch.full((3,), 0.5 * 0.2126)  # linear
    dull = torch.tensor([0.4, 0.06, 0.06])  # R/(R+G+B) = 0.77
    for other, expected in ((red, Verdict.BLOCK), (dull, Verdict.ALLOW)):
        frames = torch.stack([other if t % 2 else grey for t in range(13)])
        clip = frames.apply_(to_srgb)[None, :, :, None, None].expand(1, 13, 3, 8, 8)
        luminance = flash_risk(clip, 12.0).luminance[0]
        assert luminance < 0.1 and flash_verdict(clip) == expected


def test_a_red_that_hovers_around_saturation_does_not_flash() -> None:
    frames = torch.stack([torch.tensor([0.5, 0.06, 0.06 + 0.01 * (t % 2)]) for t in range(13)])
    assert flash_verdict(frames.apply_(to_srgb)[None, :, :, None, None].expand(1, 13, 3, 8, 8)) == Verdict.ALLOW


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_clips_too_short_for_four_flashes_are_allowed(frames: int) -> None:
    assert flash_verdict(flicker(([0.0, 1.0] * 4)[:frames])) == Verdict.ALLOW
    assert flash_verdict(flicker([0.0, 1.0] * 4 + [0.0])) == Verdict.BLOCK


def test_the_score_is_half_at_the_limit_and_rises_with_the_swing() -> None:
    swings = np.linspace(0.01, 0.7, 70)
    clips = torch.cat([flicker([0.1 + swing * (t % 2) for t in range(13)], side=8, rows=4) for swing in swings])
    scores = np.array([each[0].score for each in FlashFilter(POLICY).check_videos(clips, [""] * 70, 12.0)])
    assert np.all(np.diff(scores) >= 0) and len(set(scores)) >= 60
    assert np.all((scores >= 0.5) == (swings >= 0.1 - 1e-9))
    np.testing.assert_allclose(flash_risk(clips, 12.0).luminance, swings, rtol=0.02, atol=5e-4)
    np.testing.assert_allclose(scores, swings / (swings + 0.1), atol=0.005)


def test_a_batch_is_judged_like_its_clips_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(40, 13, 3, 1, 1, generator=generator) * torch.rand(40, 1, 1, 8, 8, generator=generator)
    together = [each[0].score for each in FlashFilter(POLICY).check_videos(clips, [""] * 40, 12.0)]
    alone = [FlashFilter(POLICY).check_videos(clip[None], [""], 12.0)[0][0].score for clip in clips]
    assert together == alone and 5 < sum(score >= 0.5 for score in together) < 40


def most_flashes(luminances: Sequence[float], fps: float, swing: float) -> int:
    """By definition: the longest chain of frames within any second in which neighbours differ by `swing`, the darker below 0.8, in turns up and down."""
    best = 0
    for begin in range(len(luminances)):
        window = [x for t, x in enumerate(luminances) if begin <= t and (t - begin) / fps <= math.ceil(fps) / fps + 1e-9]
        chains = {(0, up): 0 for up in (False, True)}
        for j, x in enumerate(window):
            for up in (False, True):
                ends = [chains[i, not up] + 1 for i, y in enumerate(window[:j]) if (x - y if up else y - x) >= swing and min(x, y) < 0.8]
                chains[j, up] = max(ends, default=0)
        best = max(best, *chains.values())
    return best // 2


def test_the_filter_agrees_with_the_definition_on_random_sequences() -> None:
    random = np.random.default_rng(0)
    compared, hazards = 0, 0
    for _ in range(120):
        fps = float(random.choice([7, 10, 12, 23.976, 30]))
        levels = random.uniform(0, 1, random.integers(2, 6))
        luminances: list[float] = (random.choice(levels, random.integers(9, 40)) if random.random() < 0.7 else random.uniform(0, 1, 20)).tolist()
        answers = {most_flashes(luminances, fps, swing) > 3 for swing in (0.099, 0.1, 0.101)}
        if len(answers) > 1:
            continue
        compared, hazards = compared + 1, hazards + answers.copy().pop()
        assert (flash_verdict(flicker(luminances, side=2, rows=2), fps) == Verdict.BLOCK) == answers.pop(), (fps, luminances)
    assert compared >= 90 and 25 <= hazards <= compared - 25


def test_large_frames_are_judged_like_small_ones() -> None:
    for rows, expected in ((40, Verdict.ALLOW), (60, Verdict.BLOCK)):
        assert flash_verdict(flicker(square_wave(6, 12), rows=rows, side=192)) == expected


def test_nan_pixels_never_pass_the_clip_filters_even_without_the_runner() -> None:
    for each in (FlashFilter(POLICY), DegenerateFilter(POLICY)):
        with pytest.raises(ValueError, match="nan"):
            each.check_videos(CLIP * torch.nan, ["x"], 12.0)


# --- broken clips


def quality(video: Tensor) -> Ruling:
    return DegenerateFilter(POLICY).check_videos(video, [""], 12.0)[0][0]


@pytest.mark.parametrize(
    ("video", "what"),
    [
        (torch.zeros(1, 13, 3, 32, 32), "black"),
        (torch.full((1, 13, 3, 32, 32), 0.6), "blank"),
        (torch.rand(13, 3, generator=torch.Generator().manual_seed(0))[None, :, :, None, None].expand(1, 13, 3, 32, 32), "blank"),
        (torch.rand(1, 13, 3, 32, 32, generator=torch.Generator().manual_seed(0)), "noise"),
        (torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(1, 13, 3, 32, 32), "frozen noise"),
        (torch.zeros(1, 1, 3, 16, 24), "black"),
    ],
)
def test_broken_clips_go_to_review(video: Tensor, what: str) -> None:
    only = quality(video)
    assert only.verdict == Verdict.REVIEW and only.policy == "Q01" and 0.5 <= only.score <= 1
    assert only.reasons[0].text == f"the clip is {what}"


def test_clips_with_something_in_them_pass_even_if_they_stand_still_or_differ_in_colour_only() -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = ((x - 16) ** 2 + (y - 16) ** 2 < 25).float()
    object_on_grey = 0.3 + 0.3 * disc.expand(1, 13, 3, 32, 32)
    equal_grey = torch.stack([0.4 + 0.2 * disc, 0.4 - 0.2 * disc, 0.4 + 0 * disc]).expand(1, 13, 3, 32, 32)
    for clip in (object_on_grey, equal_grey, CLIP, (object_on_grey + 0.03 * torch.randn(1, 13, 3, 32, 32)).clamp(0, 1)):
        assert quality(clip).verdict == Verdict.ALLOW and quality(clip).score < 0.1


def test_frames_too_small_to_look_for_a_grid_are_an_error_and_no_pass() -> None:
    small = torch.rand(1, 5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="12x12 are too small"):
        DegenerateFilter(POLICY, grid_above=14.0).check_videos(small, ["a"], 12.0)
    decision = SafetyRunner([WordFilter(POLICY), DegenerateFilter(POLICY, grid_above=14.0)], POLICY).check_videos(small, ["a"], 12.0)[0]
    assert not allowed(decision) and decision.verdict >= Verdict.ERROR


def test_other_limits_of_a_broken_clip_are_another_version() -> None:
    chosen: list[dict[str, float]] = [{}, {"blank_below": 0.02}, {"noise_above": 0.6}, {"grid_above": 14.0}, {"frozen": True}, {"grid_above": 14.0, "frozen": True}]
    versions = [DegenerateFilter(POLICY, **each).version for each in chosen]  # type: ignore[arg-type]
    assert versions[0] == "1" and len(set(versions)) == len(chosen)
    assert DegenerateFilter(POLICY, blank_below=0.01, noise_above=0.7, grid_above=math.inf, frozen=False).version == "1"


def test_frozen_clips_and_grids_are_broken_where_that_is_asked_for(real_data: Path) -> None:
    strict = DegenerateFilter(POLICY, grid_above=14.0, frozen=True)

    def says(clip: Tensor) -> str:
        ((only,),) = strict.check_videos(clip[None], [""], 8.0)
        assert only.verdict == (Verdict.REVIEW if only.score >= 0.5 else Verdict.ALLOW)
        return only.reasons[0].text if only.reasons else ""

    paths = sorted((real_data / "clips").glob("*.mp4"))
    assert len(paths) >= 5
    for path in paths:
        clip = from_uint8(read_video(path, max_frames=5).frames)
        lines = torch.zeros_like(clip)
        lines[..., ::8, :] += 20 / 255
        lines[..., :, ::8] += 20 / 255
        assert says(clip) == ""
        assert says((clip + lines).clamp(0, 1)) == "the clip is under a grid"
        assert says(clip[:1].expand(5, -1, -1, -1)) == "the clip is frozen"
