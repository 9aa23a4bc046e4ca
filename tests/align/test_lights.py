"""Lights against scipy's own tests, in every unit, and how often they leave green where nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from align.lights import Change, Light, Rule, Way, change, changes, in_words, overall, paired_t

NAN = float("nan")
GREEN, AMBER, RED = Light.GREEN, Light.AMBER, Light.RED


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("wrong", "alternative"), [("falls", "less"), ("rises", "greater"), ("changes", "two-sided")])
def test_the_paired_test_is_that_of_scipy(wrong: Way, alternative: str) -> None:
    for n, shift in ((2, 0.1), (5, -0.3), (64, 0.2)):
        now, first = drawn(n, seed=n) + shift, drawn(n, seed=n + 1)
        assert paired_t(now - first, wrong) == pytest.approx(stats.ttest_rel(now, first, alternative=alternative).pvalue, rel=1e-9)


def test_a_test_of_nothing_or_of_one_prompt_proves_nothing_and_a_sure_change_is_sure() -> None:
    assert paired_t(torch.zeros(8), "falls") == paired_t(torch.tensor([-3.0]), "falls") == 1
    assert paired_t(torch.full((8,), -0.5), "falls") == 0 == paired_t(torch.full((8,), -0.5), "changes")
    assert paired_t(torch.full((8,), -0.5), "rises") == 1


def test_each_unit_counts_as_it_says() -> None:
    first = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3
    now = first - torch.tensor([1.4, 1.6, 1.4, 1.6])
    found = {unit: change(now, first, Rule("falls", 0.1, 0.2, unit), 0.01) for unit in ("%", "log %", "points", "log-odds", "nats per element")}
    expected = {"%": -0.5, "log %": math.exp(-1.5) - 1, "points": -1.5, "log-odds": -1.5, "nats per element": -1.5}
    assert {unit: one.size for unit, one in found.items() if one} == pytest.approx(expected)
    halved = change((first / 2).log(), first.log(), Rule("falls", 0.1, 0.2, "log %"), 0.01)
    assert halved is not None and halved.size == pytest.approx(-0.5, abs=1e-6), "of logarithms, half of everything is half"


@pytest.mark.parametrize(("wrong", "up", "down"), [("falls", GREEN, RED), ("rises", RED, GREEN), ("changes", RED, RED), ("is spent", RED, GREEN)])
def test_only_the_wrong_way_counts(wrong: Way, up: Light, down: Light) -> None:
    first, rule = drawn(64), Rule(wrong, 0.5, 1.0, "points")
    lights = [change(first + shift + 0.01 * drawn(64, seed=1), first, rule, 0.01) for shift in (2.0, -2.0)]
    assert [one and one.light for one in lights] == [up, down]


def test_a_light_needs_both_a_large_change_and_a_sure_one() -> None:
    first, rule = drawn(64), Rule("falls", 0.5, 1.0, "points")

    def light(shift: float, noise: float) -> Light | None:
        found = change(first - shift + noise * (drawn(64, seed=2) - drawn(64, seed=2).mean()), first, rule, 1e-3)
        return found and found.light

    assert [light(shift, 0.1) for shift in (0.49, 0.51, 0.99, 1.01)] == [GREEN, AMBER, AMBER, RED]
    assert light(0.49, 1e-6) == GREEN, "sure, but small"
    assert light(1.5, 10.0) == GREEN, "large, but by chance"


def test_what_is_spent_is_a_budget_and_needs_no_test() -> None:
    first = torch.zeros(2)
    rule = Rule("is spent", 0.05, 0.1, "nats per element")
    lights = [change(torch.tensor(kl), first, rule, 1e-9) for kl in ([0.0, 0.0], [0.02, 0.06], [0.0, 0.12], [0.02, 0.2])]
    assert [one and one.light for one in lights] == [GREEN, GREEN, AMBER, RED]


def test_what_cannot_be_told_any_more_is_red_and_what_never_could_is_not_watched() -> None:
    first, rule = drawn(8), Rule("falls", 0.5, 1.0, "points")
    gone = first.clone()
    gone[:5] = NAN
    lost = change(gone, first, rule, 0.01)
    assert lost is not None and lost.light == RED and math.isnan(lost.size)
    gone[4] = first[4]
    half = change(gone, first, rule, 0.01)
    assert half is not None and half.light == GREEN and half.size == 0, "half of the prompts are enough"
    assert change(first, torch.full((8,), NAN), rule, 0.01) is None
    missing = changes({"other": first}, {"m": first, "other": first}, {"m": rule, "other": rule, "never": rule}, 0.01)
    assert overall(missing) == RED and in_words(missing, {"m": rule, "other": rule}) == "red: m cannot be told" and set(missing) == {"m", "other"}
    share = Rule("rises", 0.5, 1.0, "%")
    none, from_none = change(torch.zeros(8), torch.zeros(8), share, 0.01), change(torch.ones(8), torch.zeros(8), share, 0.01)
    assert none is not None and from_none is not None and (none.size, from_none.size) == (0, math.inf)


def test_noise_hardly_ever_turns_a_light_of_an_unchanged_policy() -> None:
    """Every measure's prompts are drawn twice from one distribution, plain or heavy-tailed, and any change however small would count: the level alone holds the lights."""
    rules = {f"m{k}": Rule(("falls", "rises", "changes")[k % 3], 1e-12, 2e-12, "points") for k in range(11)}
    looks = 1000
    for heavy in (False, True):
        x = drawn(looks, 2, 11, 64, seed=3)
        x = 0.5 * (x**3 if heavy else x) + drawn(looks, 1, 11, 64, seed=4)  # [looks, before or now, measure, prompt]
        alarms = sum(overall(changes(*({name: values[k] for k, name in enumerate(rules)} for values in look), rules, 0.01)) > GREEN for look in x)
        print(f"heavy {heavy}: {alarms} false alarms of {looks} looks at 11 measures")
        assert (2 if not heavy else 0) <= alarms <= 20


def test_a_change_of_a_standard_deviation_is_seen() -> None:
    rules = {"m": Rule("falls", 0.5, 1.0, "points"), **{f"other{k}": Rule("rises", 0.5, 1.0, "points") for k in range(10)}}
    seen = 0
    for look in range(200):
        first = {name: drawn(64, seed=50 * look + k) for k, name in enumerate(rules)}
        now = {name: values + 0.5 * drawn(64, seed=50 * look + 25 + k) - 1.25 * (name == "m") for k, (name, values) in enumerate(first.items())}
        seen += changes(now, first, rules, 0.01)["m"].light == RED
    print(f"seen: {seen} of 200")
    assert seen > 190


def test_the_worst_light_counts_and_is_told_first() -> None:
    rules = {"a": Rule("falls", 0.5, 1.0, "points"), "b": Rule("rises", 0.1, 0.2, "points"), "c": Rule("falls", 0.25, 0.5, "%"), "d": Rule("falls", 0.5, 1.0, "log-odds")}
    found = {"a": Change(0.1, 0.5, GREEN), "b": Change(0.12, 0.0, AMBER), "c": Change(-0.612, 0.0, RED), "d": Change(NAN, NAN, RED)}
    assert overall(found) == RED and overall({"b": found["b"]}) == AMBER and overall({}) == GREEN
    assert in_words(found, rules) == "red: c -61%, d cannot be told, b +0.12 (amber)"
    assert in_words({"b": found["b"]}, rules) == "amber: b +0.12" and in_words({"a": found["a"]}, rules) == "green"


def test_a_rule_that_makes_no_sense_is_refused() -> None:
    for amber, red in ((0.0, 1.0), (1.0, 0.5), (-1.0, 1.0), (NAN, 1.0)):
        with pytest.raises(ValueError, match="amber"):
            Rule("falls", amber, red, "sd")
