"""Kneser-Ney by hand: probabilities of a text of six tokens, sums over the vocabulary, and which order is chosen."""

import math

import numpy as np
import pytest

from recipes.ngram import Example, KneserNey, best_order, bits_per_token

A, B, C, D = range(4)
TEXT = [Example([A], [B, A, B, A, C])]


def test_a_bigram_model_is_that_of_the_formula_worked_out_by_hand() -> None:
    # bigrams: ab 2, ba 2, ac 1. n1 = 1, n2 = 2: D = 1/5. Behind a: b 2, c 1. Each token has one predecessor: n1 = 3, n2 = 0, so D = 1 below, and all of it backs off to 1/4.
    model = KneserNey(TEXT, 2, 4)
    for token, count in ((A, 0), (B, 2), (C, 1), (D, 0)):
        assert model.probability([A], token) == pytest.approx(max(count - 0.2, 0) / 3 + 0.2 * 2 / 3 * 0.25)
    assert model.probability([B], A) == pytest.approx((2 - 0.2) / 2 + 0.2 * 1 / 2 * 0.25)
    assert model.probability([D], A) == pytest.approx(0.25), "a history that was never seen"
    assert model.bits(Example([A], [B, C])) == pytest.approx(-math.log2(model.probability([A], B)) - math.log2(model.probability([B], C)))


def test_single_tokens_are_counted_as_they_occur() -> None:
    # a 3, b 2, c 1: n1 = 1, n2 = 1, D = 1/3
    model = KneserNey(TEXT, 1, 4)
    assert [model.probability([C, A], token) for token in range(4)] == pytest.approx([(count - (count > 0) / 3) / 6 + 1 / 3 * 3 / 6 * 0.25 for count in (3, 2, 1, 0)])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_of_all_tokens_sum_to_one_behind_any_history(order: int) -> None:
    rng = np.random.default_rng(order)
    texts = [Example([], rng.integers(0, 6, size=rng.integers(3, 30)).tolist()) for _ in range(8)]
    model = KneserNey(texts, order, 7)
    for _ in range(30):
        history = rng.integers(0, 7, size=int(rng.integers(0, 6))).tolist()
        told = [model.probability(history, token) for token in range(7)]
        assert math.fsum(told) == pytest.approx(1) and min(told) > 0


def test_the_order_that_foretells_val_best_is_chosen() -> None:
    rng = np.random.default_rng(0)
    second_order = [0, 1]
    for _ in range(400):
        second_order.append((second_order[-1] + 2 * second_order[-2]) % 5 if rng.random() < 0.8 else int(rng.integers(5)))
    for tokens, orders in ((second_order, {3}), (rng.integers(0, 5, size=400).tolist(), {1})):
        train, val = [Example(tokens[:1], tokens[1:300])], [Example(tokens[300:301], tokens[301:])]
        chosen = best_order(train, val, 5)
        assert chosen.order in orders
        assert bits_per_token(chosen, val) == min(bits_per_token(KneserNey(train, order, 5), val) for order in range(1, 6))
    with pytest.raises(ValueError, match="at least 1"):
        KneserNey(TEXT, 0, 4)
