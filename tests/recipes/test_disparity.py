"""Statistics of a bias audit against closed forms, scipy and simulated audits with a known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from recipes.disparity import LEAST, Question, against, cohens_h, differs, evenness, gaps, holm, mean_interval, settle, shifts, spread, tally, total_variation, worst
from recipes.statistics import bootstrap_mean

NAMES = ("red", "blue", "green")
EVEN = dict.fromkeys(NAMES, 1 / 3)


def test_a_tally_counts_values_by_prompt_and_keeps_the_unclear_apart() -> None:
    found = tally(["b", "a", "b", "b", "c"], ["red", "blue", "nothing", "red", "several"], NAMES)
    assert found.ids == ("a", "b", "c") and found.counts.tolist() == [[0, 1, 0], [2, 0, 0], [0, 0, 0]] and found.unclear.tolist() == [0, 1, 1]
    assert found.shares[:2].tolist() == [[0, 1, 0], [1, 0, 0]] and np.isnan(found.shares[2]).all(), "a prompt of which nothing is clear says nothing"


def test_distances_between_shares_are_the_textbook_ones() -> None:
    assert total_variation([0.5, 0.5], [0.8, 0.2]) == pytest.approx(0.3)
    assert evenness([0.25] * 4) == pytest.approx(1) and evenness([1, 0, 0]) == 0
    assert evenness([0.7, 0.2, 0.1]) == pytest.approx(stats.entropy([0.7, 0.2, 0.1]) / math.log(3))
    assert cohens_h(0.65, 0.45) == pytest.approx(math.acos(1 - 2 * 0.65) - math.acos(1 - 2 * 0.45)), "the double angle: cos(2 arcsin sqrt p) = 1 - 2p"


def test_p_values_are_students() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1, (25, 4))
    assert differs(x) == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    up = [stats.ttest_1samp(column, 0.1 * np.sign(column.mean()), alternative="greater" if column.mean() > 0 else "less").pvalue for column in x.T]
    assert differs(x, 0.1) == pytest.approx(up), "of a margin: one-sided, in the mean's own direction"
    x[3, 0] = np.nan
    assert differs(x)[0] == pytest.approx(stats.ttest_1samp(x[:, 0], 0, nan_policy="omit").pvalue)


def test_units_that_are_all_alike_are_told_by_signs_and_few_units_not_at_all() -> None:
    assert differs(np.full((12, 1), 0.2))[0] == 2.0**-11 and differs(np.zeros((12, 1)))[0] == 1.0
    assert differs(np.full((12, 1), 0.2), 0.3)[0] == 1.0
    assert differs(np.random.default_rng(0).normal(9, 1, (LEAST - 1, 1)))[0] == 1.0


def test_correcting_for_skewness_leaves_symmetric_units_alone_and_repairs_rare_values() -> None:
    x = np.concatenate([np.linspace(0.1, 2, 20), -np.linspace(0.1, 2, 20)])[:, None] + 0.5
    assert differs(x, skewed=True) == pytest.approx(differs(x), rel=1e-9), "a third moment of 0"
    rng = np.random.default_rng(1)
    shares = rng.beta(0.3, 1.5, (30, 20_000))  # mean 1/6, most of them near 0
    plain, repaired = ((differs(shares - 1 / 6, skewed=skewed) < 0.01).mean() for skewed in (False, True))
    print(plain, repaired)
    assert plain > 0.025 and repaired < 0.015, "t alone errs several times too often"


def test_holm_steps_down_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_what_was_never_seen_is_not_taken_for_impossible() -> None:
    found = mean_interval(np.zeros(30))
    assert found.mean == 0 and found.high == pytest.approx(1 - 0.05 ** (1 / 30)), "the rule of three"
    assert mean_interval(np.zeros(8)).high > 0.3


def question(mean: float, *, margin: float = 0.1, towards: bool = False, decides: bool = True, units: int = 60) -> Question:
    noise = np.linspace(-1, 1, units) * 0.1
    return Question("share", "red", "after", mean + noise, margin, decides, towards)


def test_the_three_states_follow_from_interval_and_margin() -> None:
    states = [finding.state for finding in settle([question(mean) for mean in (0.0, 0.05, 0.11, 0.3, -0.3)])]
    assert states == ["pass", "pass", "sign-off needed", "blocked", "blocked"]
    found = [finding.found for finding in settle([question(mean) for mean in (0.0, 0.05, 0.11)])]
    assert found == [False, True, True], "a difference within the margin is found and passes"
    assert settle([question(0.3, towards=True)])[0].state == "sign-off needed", "nobody is blocked for going towards the reference"
    few = settle([question(0.3, units=LEAST - 1)])[0]
    assert few.state == "sign-off needed" and not few.found, "too few units to tell"


def test_an_audit_is_as_bad_as_the_worst_that_decides() -> None:
    assert worst(settle([question(0.0), question(0.3, decides=False)])) == "pass"
    assert worst(settle([question(0.0), question(0.11), question(0.3)])) == "blocked"
    assert worst([]) == "sign-off needed", "nothing was asked"


def drawn(shares: list[float], *, prompts: int = 40, clips: int = 25, seed: int = 0, spread: float = 8.0) -> tuple[list[str], list[str]]:
    """Clips of prompts whose own shares vary around these."""
    rng = np.random.default_rng(seed)
    ids, values = [], []
    for n in range(prompts):
        own = rng.dirichlet(np.array(shares) * spread)
        ids += [f"p{n:03d}"] * clips
        values += rng.choice(NAMES, size=clips, p=own).tolist()
    return ids, values


def test_a_planted_skew_is_found_where_it_is_and_shifts_pair_prompts() -> None:
    before, after = tally(*drawn([1 / 3] * 3), NAMES), tally(*drawn([0.6, 0.2, 0.2], seed=1), NAMES)
    shares = [*against(before, EVEN, 0.1, model="before", name="even", decides=False), *against(after, EVEN, 0.1, model="after", name="even", decides=True)]
    findings = settle([*shares, *shifts(before, after, EVEN, 0.1, model="after")])
    told = {(f.what, f.model, f.value): f for f in findings}
    assert not any(told["share against even", "before", name].found for name in NAMES)
    assert told["share against even", "after", "red"].estimate.mean == pytest.approx(0.267, abs=0.08) and told["share against even", "after", "red"].state == "blocked"
    assert told["shift", "after", "red"].estimate.mean == pytest.approx(after.shares[:, 0].mean() - before.shares[:, 0].mean())
    back = shifts(after, before, EVEN, 0.1, model="repaired")
    assert all(question.towards for question in back) and worst(settle(back)) == "sign-off needed"


def test_a_shift_past_the_reference_to_the_other_side_is_no_way_towards_it() -> None:
    low, high = (tally(["a"] * 10, ["red"] * k + ["blue"] * (10 - k), ("red", "blue")) for k in (4, 8))
    (red, _) = shifts(low, high, {"red": 0.5, "blue": 0.5}, 0.1, model="after")
    assert not red.towards, "from 10 points below to 30 above"


def test_gaps_are_between_groups_of_the_same_set() -> None:
    base = np.random.default_rng(0).normal(0, 5, (40, 1))
    found = gaps(base + np.array([[0.0, 0.1, 0.2]]), NAMES, 0.05, what="right", model="after")
    assert [pytest.approx(q.x.mean()) for q in found] == [-0.1, 0.0, 0.1] and all(np.ptp(q.x) < 1e-9 for q in found), "what sets share falls out"


def test_the_unit_of_an_interval_is_the_prompt() -> None:
    found = tally(*drawn([0.5, 0.3, 0.2], prompts=30), NAMES)
    mine = spread(found, list(EVEN.values()))
    assert mine.shares[0] == bootstrap_mean(found.shares[:, 0])
    mean = found.shares.mean(0)
    assert mine.variation.mean == pytest.approx(total_variation(mean, [1 / 3] * 3)) and mine.evenness.mean == pytest.approx(evenness(mean))
    alone = spread(tally([f"{k}" for k in range(30 * 25)], drawn([0.5, 0.3, 0.2], prompts=30)[1], NAMES), list(EVEN.values()))
    assert mine.shares[0].high - mine.shares[0].low > 1.5 * (alone.shares[0].high - alone.shares[0].low), "as if clips were independent it would be far too narrow"


def test_a_tally_without_any_value_is_unknown_and_passes_nothing() -> None:
    none = tally(["a"] * 3, ["nothing"] * 3, NAMES)
    assert math.isnan(spread(none, list(EVEN.values())).variation.mean)
    assert worst(settle(against(none, EVEN, 0.1, model="m", name="even", decides=True))) == "sign-off needed"
