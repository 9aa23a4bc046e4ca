"""Windows of noisy steps: never the last step, the right width, everywhere equally often, and the same again after a resume."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from align.windows import all_steps, fixed_window, one_step_a_prompt, random_window, sliding_window


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_all_steps_are_all_but_the_last_and_a_fixed_window_is_where_it_was_put() -> None:
    assert all_steps(5) == [0, 1, 2, 3] and all_steps(2) == [0]
    assert fixed_window(8, 3, 2) == [3, 4] and fixed_window(8, 0, 7) == list(range(7)) and fixed_window(8, 6, 1) == [6]


def test_a_random_window_begins_at_every_possible_place_equally_often() -> None:
    g = seeded()
    for first, starts in ((None, 6), (4, 3), (100, 6)):
        drawn = [random_window(8, 2, g, first=first) for _ in range(600)]
        assert all(window == [window[0], window[0] + 1] for window in drawn)
        seen = Counter(window[0] for window in drawn)
        print(first, sorted(seen.items()))
        assert sorted(seen) == list(range(starts))
        assert max(abs(count - 600 / starts) for count in seen.values()) < 4 * (600 / starts) ** 0.5


def test_the_sliding_window_goes_from_noise_to_detail_and_begins_anew() -> None:
    starts = [sliding_window(8, 4, i, every=3) for i in range(15)]
    assert starts[:12] == [[0, 1, 2, 3]] * 3 + [[1, 2, 3, 4]] * 3 + [[2, 3, 4, 5]] * 3 + [[3, 4, 5, 6]] * 3, "the last one ends before the last step"
    assert starts[12:] == starts[:3]
    assert [sliding_window(8, 2, i, every=1, stride=2) for i in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert [sliding_window(8, 2, i, every=1, first=3)[0] for i in range(3)] == [0, 1, 0]
    assert sliding_window(8, 4, 24) == [0, 1, 2, 3] and sliding_window(8, 4, 25) == [1, 2, 3, 4], "MixGRPO moves by one step every 25 iterations"
    assert all(len(sliding_window(25, 4, i)) == 4 for i in range(2000))


def test_one_step_a_prompt_is_one_of_the_first_and_all_of_them_in_the_long_run() -> None:
    noisy = one_step_a_prompt(6, 1000, seeded(), first=4)
    assert noisy.shape == (6, 1000) and noisy.dtype == torch.bool and bool((noisy.sum(0) == 1).all())
    share = noisy.float().mean(1)
    assert share[4:].tolist() == [0, 0] and float((share[:4] - 0.25).abs().max()) < 0.06
    whole = one_step_a_prompt(6, 1000, seeded()).float().mean(1)
    assert whole[5] == 0 and float((whole[:5] - 0.2).abs().max()) < 0.06
    assert torch.equal(one_step_a_prompt(6, 9, seeded()), one_step_a_prompt(6, 9, seeded()))
    assert not bool(one_step_a_prompt(3, 50, seeded(), first=9)[2].any()), "the last step is deterministic, whatever is asked"


def test_a_window_that_does_not_fit_is_refused() -> None:
    for call in (
        lambda: all_steps(1),
        lambda: fixed_window(4, 2, 2),
        lambda: fixed_window(4, 0, 0),
        lambda: fixed_window(4, -1, 2),
        lambda: fixed_window(4, 9, 1),
        lambda: random_window(4, 4, seeded()),
        lambda: random_window(8, 3, seeded(), first=2),
        lambda: sliding_window(4, 4, 0),
        lambda: one_step_a_prompt(1, 2, seeded()),
        lambda: one_step_a_prompt(4, 2, seeded(), first=0),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            call()


def test_of_two_steps_the_first_is_the_window() -> None:
    g = seeded()
    assert one_step_a_prompt(2, 3, g).tolist() == [[True] * 3, [False] * 3]
    assert random_window(2, 1, g) == sliding_window(2, 1, 7, every=1) == fixed_window(2, 0, 1) == [0]
