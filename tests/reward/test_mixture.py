"""One reward out of several scorers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from reward.mixture import Mixture, Term, mix
from reward.types import Scores

QUALITY = Scores(torch.tensor([[1.0, 5.0], [3.0, 5.0], [math.nan, 5.0]]), torch.tensor([[0.5, 0.0], [1.0, 0.0], [0.1, 0.0]]))
MOTION = Scores(torch.tensor([[10.0], [20.0], [30.0]]), torch.zeros(3, 1))
SCORES = {"rm": (("overall", "spare"), QUALITY), "flow": (("motion",), MOTION)}


class Fixed:
    differentiable = False

    def __init__(self, dims: tuple[str, ...], scores: Scores) -> None:
        self.dims, self.scores, self.calls = dims, scores, 0

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        self.calls += 1
        return self.scores


def test_terms_are_standardised_with_stored_constants_made_pessimistic_weighted_and_added() -> None:
    terms = [Term("rm", "overall", 2.0, center=1.0, scale=4.0, pessimism=0.5), Term("flow", "motion", -0.1, center=20.0, scale=10.0)]
    mixed = mix(SCORES, terms)
    torch.testing.assert_close(mixed.reward[:2], torch.tensor([2 * (0.75 - 1) / 4 + 0.1, 2 * (2.5 - 1) / 4]))
    torch.testing.assert_close(mixed.parts["flow.motion"], torch.tensor([-1.0, 0.0, 1.0]))


def test_unknown_stays_unknown_and_is_never_zero() -> None:
    mixed = mix(SCORES, [Term("rm", "overall"), Term("flow", "motion")])
    assert mixed.unknown.tolist() == [False, False, True] and math.isnan(mixed.reward[2])
    infinite = {"rm": (("overall",), Scores(torch.tensor([[math.inf], [0.0]]), torch.zeros(2, 1)))}
    assert mix(infinite, [Term("rm", "overall")]).reward.isnan().tolist() == [True, False]


def test_a_term_of_weight_zero_is_reported_and_changes_nothing() -> None:
    mixed = mix(SCORES, [Term("rm", "overall", 0.0), Term("flow", "motion")])
    assert mixed.reward.tolist() == [10.0, 20.0, 30.0] and "rm.overall" in mixed.parts


def test_a_blocked_clip_cannot_buy_itself_back() -> None:
    blocked = torch.tensor([False, True, True])
    mixed = mix(SCORES, [Term("rm", "overall", 100.0)], blocked, blocked_reward=-4.0)
    assert mixed.reward.tolist() == [100.0, -4.0, -4.0]
    assert mix(SCORES, [Term("rm", "overall", -100.0)], blocked, blocked_reward=-4.0).reward.tolist()[1] == -300.0


def test_a_mixture_calls_each_scorer_it_needs_once() -> None:
    scorers = {name: Fixed(*pair) for name, pair in SCORES.items()} | {"idle": Fixed(("x",), MOTION)}
    mixture = Mixture(scorers, (Term("rm", "overall"), Term("rm", "spare"), Term("flow", "motion")))
    assert mixture(torch.zeros(3, 1, 3, 8, 8), ["a"] * 3).reward.tolist()[:2] == [16.0, 28.0]
    assert [scorer.calls for scorer in scorers.values()] == [1, 1, 0]


@pytest.mark.parametrize(
    ("term", "message"), [(Term("x", "overall"), "no scorer 'x'"), (Term("rm", "motion"), "the dimensions"), (Term("rm", "overall", scale=0.0), "positive")]
)
def test_a_mixture_that_makes_no_sense_is_refused(term: Term, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({name: Fixed(*pair) for name, pair in SCORES.items()}, (term,))
    with pytest.raises(ValueError, match="at least one"):
        Mixture({}, ())
