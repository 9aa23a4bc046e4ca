"""The thread with the model: who is scored with whom, and that nobody waits for ever or pays for another's failure."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from base_model.errors import UserError
from reward.serving.batching import Batcher, Scored, Unscored, outcomes, score_batch
from reward.types import Scores
from tests.reward.serving.small import Known, levels, noise

MANY = 10**6


@pytest.mark.timed
def test_clips_that_wait_together_are_scored_together_size_by_size_in_order() -> None:
    gate = threading.Event()
    scorer = Known(gate)
    batcher = Batcher(scorer, batch=4, pixels=MANY, wait=0.0)
    small, large = levels(*range(0, 250, 25)), levels(7, 9, height=12)
    futures = batcher.submit([(small[0], "first")])
    time.sleep(0.05)  # the first is being scored, the others wait
    futures += batcher.submit([(small[i], "x" * i) for i in range(1, 6)])
    futures += batcher.submit([(large[0], "large"), (small[6], "x" * 6), (large[1], "large")])
    gate.set()
    found = [future.result(5) for future in futures]
    batcher.close()
    assert [shape[0] for shape in scorer.batches] == [1, 4, 2, 2] and batcher.batches == 4
    assert [shape[-2] for shape in scorer.batches] == [8, 8, 8, 12]
    greys = [0, 25, 50, 75, 100, 125, 7, 150, 9]
    assert [outcome.mean[0] for outcome in found if isinstance(outcome, Scored)] == pytest.approx([grey / 255 for grey in greys], abs=1e-7)
    assert [outcome.mean[1] for outcome in found if isinstance(outcome, Scored)] == [5, 1, 2, 3, 4, 5, 5, 6, 5]


@pytest.mark.timed
def test_a_clip_waits_for_those_on_their_way_but_not_for_ever_and_never_alone_or_for_more_than_a_batch() -> None:
    scorer = Known()
    batcher = Batcher(scorer, batch=2, pixels=MANY, wait=0.5)

    def seconds(*values: int) -> float:
        begun = time.monotonic()
        for future in batcher.submit([(clip, "a") for clip in levels(*values)]):
            future.result(5)
        return time.monotonic() - begun

    assert seconds(1) < 0.4
    with batcher.expecting():
        assert seconds(1) >= 0.5 and seconds(1, 2) < 0.4
        (first,) = batcher.submit([(levels(1)[0], "a")])
        (second,) = batcher.submit([(levels(1)[0], "a")])
        assert first.result(5) == second.result(5)
        (last,) = batcher.submit([(levels(1)[0], "a")])
        begun = time.monotonic()
    last.result(5)
    assert time.monotonic() - begun < 0.4, "the others went elsewhere"
    batcher.close()
    assert [shape[0] for shape in scorer.batches] == [1, 1, 2, 2, 1]


def test_a_batch_has_at_most_so_many_pixels_but_always_one_clip() -> None:
    scorer = Known()
    batcher = Batcher(scorer, batch=100, pixels=2 * 3 * 8 * 10 + 1, wait=0.01)
    for future in batcher.submit([(clip, "a") for clip in levels(1, 2, 3, 4, 5)]) + batcher.submit([(levels(1, height=90)[0], "b")]):
        assert isinstance(future.result(5), Scored)
    batcher.close()
    assert [shape[0] for shape in scorer.batches] == [2, 2, 1, 1]


def test_the_failure_of_one_clip_is_its_own() -> None:
    video, prompts = levels(10, 20, 30, 40), ["ok", "refuse", "nan", "crash"]
    first, second, third, fourth = score_batch(Known(), list(video), prompts)
    assert first == Scored([pytest.approx(10 / 255), 2.0], [pytest.approx(1 / 255), 0.0])
    assert second == Unscored("the clip is too long for this model. Give a shorter one")
    assert third == Unscored("the scorer gives no score in length")
    assert fourth == Unscored("the scorer failed: ZeroDivisionError: division by zero")


def test_scores_of_the_wrong_shape_are_no_scores() -> None:
    class Wrong(Known):
        def __call__(self, video: torch.Tensor, prompts: object) -> Scores:
            return Scores(torch.zeros(len(video), 1), torch.zeros(len(video), 1))

    with pytest.raises(UserError, match=r"shape \[2, 1\] where \[2, 2\] belongs"):
        outcomes(Wrong(), noise(2).float(), ["a", "b"])
    assert isinstance(score_batch(Wrong(), list(noise(2)), ["a", "b"])[1], Unscored)


@pytest.mark.timed
def test_what_nobody_waits_for_is_not_scored() -> None:
    gate = threading.Event()
    scorer = Known(gate)
    batcher = Batcher(scorer, batch=8, pixels=MANY, wait=0.0)
    (first,) = batcher.submit([(levels(1)[0], "a")])
    time.sleep(0.05)
    left = batcher.submit([(clip, "b") for clip in levels(1, 2, 3)])
    errand = batcher.call(lambda: 1)
    assert left[0].cancel() and left[2].cancel() and errand.cancel() and not first.cancel()
    gate.set()
    assert isinstance(left[1].result(5), Scored) and isinstance(first.result(5), Scored)
    batcher.close()
    assert [shape[0] for shape in scorer.batches] == [1, 1]


def test_errands_go_first_in_the_thread_of_the_model_and_their_errors_come_back() -> None:
    batcher = Batcher(Known(), batch=8, pixels=MANY, wait=5.0)
    with batcher.expecting():
        (waiting,) = batcher.submit([(levels(1)[0], "a")])
        assert batcher.call(lambda: threading.current_thread().name).result(2) == "scorer" and not waiting.done()
        with pytest.raises(ZeroDivisionError):
            batcher.call(lambda: 1 // 0).result(2)
        batcher.close()
    assert isinstance(waiting.result(0), Scored), "what waits when it is closed is still scored, at once"
    for late in (lambda: batcher.submit([]), lambda: batcher.call(lambda: None)):
        with pytest.raises(RuntimeError, match="closed"):
            late()


@pytest.mark.timed
def test_closing_does_not_wait_for_ever_for_a_scorer_that_hangs() -> None:
    gate = threading.Event()
    batcher = Batcher(Known(gate), batch=8, pixels=MANY, wait=0.0)
    batcher.submit([(levels(1)[0], "a")])
    begun = time.monotonic()
    batcher.close(0.1)
    assert 0.1 <= time.monotonic() - begun < 2
    gate.set()
    batcher.close()
