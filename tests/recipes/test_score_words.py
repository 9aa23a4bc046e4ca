"""Scores said behind captions: places among the kept, and what is not known is not said."""

import math

import numpy as np
import pytest

from recipes.score_words import place, tenths, with_scores


def test_places_of_a_thousand_numbers_are_ten_equally_large_parts() -> None:
    values = np.random.default_rng(0).lognormal(size=1000)
    edges = tenths(values)
    places = [place(value, edges) for value in values]
    assert [places.count(k) for k in range(10)] == [100] * 10
    assert [places[k] for k in np.argsort(values)] == sorted(places), "a larger number never has a lower place"


def test_equal_numbers_share_a_place_and_unknown_ones_do_not_count() -> None:
    edges = tenths([0.0] * 90 + [1.0] * 10 + [math.nan] * 50)
    assert place(0.0, edges) == 0 and place(1.0, edges) == 9 and place(-5.0, edges) == 0 and place(7.0, edges) == 9
    with pytest.raises(ValueError, match="no number"):
        tenths([math.nan])


def test_words_follow_the_caption_in_the_order_of_the_edges_and_leave_out_what_is_not_known() -> None:
    edges = {"camera_motion": tenths(range(100)), "sharpness": tenths(range(10))}
    assert with_scores("a red ball", {"sharpness": 100.0, "camera_motion": 55.0}, edges) == "a red ball, camera motion 5 of 9, sharpness 9 of 9"
    assert with_scores("a red ball", {"sharpness": math.nan, "camera_motion": None}, edges) == "a red ball"
    assert with_scores("", {}, {}) == ""
