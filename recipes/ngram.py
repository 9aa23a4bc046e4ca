"""Interpolated Kneser-Ney n-grams over tokens: what a language model has to beat. Pure counts, no command.

    p(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) p(w | h without its first token)          Kneser & Ney 1995; Chen & Goodman 1998, eq. (29)

c counts occurrences at the highest order and different predecessors below it, N(h) is the number of different tokens seen behind h, D = n1 / (n1 + 2 n2) of each order (a half
where nothing was counted once), and the lowest order backs off to the same probability for every token of the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

Tokens = Sequence[int]


class Example(NamedTuple):
    """Tokens that are given, and those that are to be foretold."""

    given: Tokens
    asked: Tokens


class _Order(NamedTuple):
    behind: dict[tuple[int, ...], tuple[Counter[int], int]]  # each history: counts and their sum
    discount: float


class KneserNey:
    """An n-gram model of order `order`. Counts are taken in all tokens of the examples, given ones too."""

    def __init__(self, examples: Sequence[Example], order: int, vocabulary: int) -> None:
        """Raises ValueError for an order below 1."""
        if order < 1:
            raise ValueError(f"an n-gram model has an order of at least 1, got {order}")
        self.order, self.vocabulary = order, vocabulary
        seen = [_grams(examples, n) for n in range(1, order + 1)]
        self._orders = [_as_order(seen[n] if n == order - 1 else Counter(gram[1:] for gram in seen[n + 1])) for n in range(order)]

    def probability(self, history: Tokens, token: int) -> float:
        """p(token | the last order - 1 tokens of the history)."""
        found = 1 / self.vocabulary
        for n, (behind, discount) in enumerate(self._orders):
            if n <= len(history) and (there := behind.get(tuple(history[len(history) - n :]))):
                counts, total = there
                found = max(counts[token] - discount, 0) / total + discount * len(counts) / total * found
        return found

    def bits(self, example: Example) -> float:
        """Bits of the asked tokens, in sum."""
        whole, begin = [*example.given, *example.asked], len(example.given)
        return -sum(math.log2(self.probability(whole[max(0, k - self.order + 1) : k], whole[k])) for k in range(begin, len(whole)))


def bits_per_token(model: KneserNey, examples: Sequence[Example]) -> float:
    """Mean over the asked tokens of all examples."""
    return sum(map(model.bits, examples)) / sum(len(example.asked) for example in examples)


def best_order(train: Sequence[Example], val: Sequence[Example], vocabulary: int, most: int = 5) -> KneserNey:
    """Of the orders up to `most` the one that foretells `val` best."""
    return min((KneserNey(train, order, vocabulary) for order in range(1, most + 1)), key=lambda model: bits_per_token(model, val))


def _grams(examples: Sequence[Example], n: int) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for example in examples:
        tokens = (*example.given, *example.asked)
        found.update(tokens[k : k + n] for k in range(len(tokens) - n + 1))
    return found


def _as_order(grams: Counter[tuple[int, ...]]) -> _Order:
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for gram, count in grams.items():
        counts[gram[:-1]][gram[-1]] += count
    once, twice = (sum(count == times for count in grams.values()) for times in (1, 2))
    return _Order({history: (each, each.total()) for history, each in counts.items()}, once / (once + 2 * twice) if once else 0.5)
