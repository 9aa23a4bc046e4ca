"""A reward model in another process: the same scores as in this one, and nan with a reason for everything else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import torch

from base_model.errors import GuardStop, UserError
from recipes.serve_reward import in_thread
from reward.judges.exchange import Endpoint, Patience
from reward.judges.remote import RemoteReward
from reward.types import Scorer
from tests.reward.judges.fake import QUICK
from tests.reward.serving.small import CARD, FPS, LIMITS, Known, levels, noise, server_of

TOKEN = "0123456789abcdef0123"
METADATA = {"schema": 1, "dims": ["grey", "length"], "fps": FPS, "limits": LIMITS._asdict(), **CARD}


def remote(url: str, *, fps: float = FPS, token: str | None = None, patience: Patience = QUICK, **options: Any) -> RemoteReward:
    return RemoteReward(Endpoint(url, token=token, patience=patience), fps=fps, **{"max_error_share": 1.0, **options})


def test_scores_are_those_of_the_model_itself_in_order_whatever_fits_into_a_request() -> None:
    known, video = Known(), noise(11).float() / 255
    prompts = [f"prompt {'x' * i}" for i in range(11)]
    with in_thread(server_of(known, token=TOKEN)) as url:
        scorer: Scorer = remote(url, token=TOKEN)
        scores = scorer(video, prompts)
    expected = Known()(video, prompts)
    assert torch.equal(scores.mean, expected.mean) and torch.equal(scores.spread, expected.spread)
    assert scorer.dims == ("grey", "length") and sum(shape[0] for shape in known.batches) == 11


def test_what_a_mixture_needs_comes_from_the_card() -> None:
    with in_thread(server_of(Known())) as url:
        scorer = remote(url)
    assert scorer.center.tolist() == [0.5, 3.0] and scorer.scale.tolist() == [0.25, 1.0] and scorer.temperature.tolist() == [2.0, 1.0]
    assert scorer.log_tie.tolist() == [[-1.0], [-2.0]] and scorer.card == "c0ffee"


def test_clips_are_sent_in_256_levels() -> None:
    video = torch.rand(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    with in_thread(server_of(Known())) as url:
        scores = remote(url)(video, ["a"] * 3)
    expected = (video.clamp(0, 1) * 255).round() / 255
    torch.testing.assert_close(scores.mean[:, 0], expected.flatten(1).mean(1), rtol=0, atol=1e-6)


def test_a_clip_without_a_score_is_nan_with_its_reason_and_the_others_have_theirs() -> None:
    video = noise(7).float() / 255
    video[2, 0, 0, 0, 0] = torch.inf
    prompts = ["ok", "refuse", "not finite", "nan", "ok", "crash", "x" * 101]
    with in_thread(server_of(Known())) as url:
        scorer = remote(url)
        scores = scorer(video, prompts)
    assert scores.mean.isfinite().all(1).tolist() == [True, False, False, False, True, False, False], "the last two came in one request, which was refused whole"
    assert torch.equal(scores.mean.isnan(), scores.spread.isnan())
    assert scorer.failures.reasons == {
        "the clip holds pixels that are not finite": 1, "the clip is too long for this model. Give a shorter one": 1, "the scorer gives no score in length": 1,
        "HTTP 413: a prompt of 101 characters is longer than the limit of 100": 2,
    }  # fmt: skip


def test_too_many_failures_stop_the_run() -> None:
    with in_thread(server_of(Known())) as url:
        scorer = remote(url, max_error_share=0.3)
        scorer(noise(4).float() / 255, ["ok", "ok", "nan", "ok"])
        with pytest.raises(GuardStop, match=r"^the reward server http://127\.0\.0\.1:\d+ failed on 2 of 4 \(limit 30\.0%\), most often: the scorer gives no score in length"):
            scorer(noise(4).float() / 255, ["ok", "nan", "nan", "ok"])


def test_clips_larger_than_a_request_are_failures_that_say_so() -> None:
    with in_thread(server_of(Known())) as url:
        scorer = remote(url)
        assert scorer(noise(2, frames=9).float(), ["a", "b"]).mean.isnan().all()
        assert scorer(noise(1, frames=8, height=40, width=40).float(), ["a"]).mean.isnan().all()
    long, large = scorer.failures.reasons
    assert "HTTP 413: 2 clips of 9 frames" in long and "HTTP 413: 1 clips of 8 frames of 40x40" in large


@pytest.mark.timed
def test_a_request_that_is_sent_again_is_not_computed_again() -> None:
    gate = threading.Event()
    known = Known(gate)
    with in_thread(server_of(known)) as url:
        scorer = remote(url, patience=Patience(seconds=0.3, tries=20, wait=0.0))
        threading.Timer(0.5, gate.set).start()
        assert scorer(noise(2).float() / 255, ["a", "b"]).mean.isfinite().all()
    assert known.batches == [(2, 3, 3, 8, 10)]


def test_a_server_that_cannot_be_used_is_refused_in_one_line_when_it_is_first_asked() -> None:
    with in_thread(server_of(Known(), token=TOKEN)) as url:
        for options, message in (
            ({}, "cannot ask the reward server .*: HTTP 401: a token is needed"),
            ({"token": TOKEN + "x"}, "HTTP 401"),
            ({"token": TOKEN, "fps": 24.0}, "scores clips of 12 frames a second, and these have 24"),
            ({"token": TOKEN, "card": "decaf"}, "serves the card c0ffee, not decaf"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                remote(url, **options)
            assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
        remote(url, token=TOKEN, fps=12.01, card="c0ffee")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=r"no connection: ConnectError: .*refused\. Start it with `rushes serve-reward`"):
        remote(f"http://127.0.0.1:{port}")


def answering(*replies: httpx2.Response | type[Exception]) -> tuple[Endpoint, list[str]]:
    """A server that gives its metadata, scores 1.0 and 2.0, or does what stands in `replies` first; and the paths it was asked for."""
    asked: list[str] = []
    todo = [*replies]
    right = {"schema": 1, "card": "c0ffee", "dims": ["grey", "length"], "scores": [{"status": "ok", "mean": [1.0, 2.0], "spread": [0.0, 0.5]} for _ in range(2)]}

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        reply = todo.pop(0) if todo else httpx2.Response(200, json=METADATA if request.url.path == "/metadata" else right)
        if isinstance(reply, type):
            raise reply("gone")
        return reply

    return Endpoint(f"http://reward-{len(replies)}.test", transport=httpx2.MockTransport(handle), patience=Patience(seconds=5, tries=1)), asked


def test_where_a_server_gives_no_answer_another_one_is_asked_from_then_on_and_that_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    dies, asked_first = answering(httpx2.Response(200, json=METADATA), *[httpx2.ConnectError] * 9)
    lives, asked_second = answering()
    scorer = RemoteReward(dies, lives, fps=FPS)
    for _ in range(3):
        assert scorer(levels(1, 2).float() / 255, ["a", "b"]).mean.tolist() == [[1, 2], [1, 2]]
    assert asked_first == ["/metadata", "/v1/score"] and asked_second == ["/v1/score"] * 3 and scorer.failures.failed == 0
    assert capsys.readouterr().err == "no answer from the reward server http://reward-10.test; going on with http://reward-0.test\n"


def test_a_server_of_another_model_is_passed_over_and_where_none_is_left_the_run_stops() -> None:
    other = {"schema": 1, "card": "decaf", "dims": ["grey", "length"], "scores": [{"status": "ok", "mean": [9.0, 9.0], "spread": [0.0, 0.0]} for _ in range(2)]}
    changed, _ = answering(httpx2.Response(200, json=METADATA), *[httpx2.Response(200, json=other)] * 9)
    mortal, _ = answering(httpx2.Response(503), httpx2.Response(503))
    scorer = RemoteReward(changed, mortal, fps=FPS)
    with pytest.raises(GuardStop, match=r"^the reward servers http://reward-10.test, http://reward-2.test failed on 2 of 2 \(limit 5\.0%\), most often: HTTP 503"):
        scorer(levels(1, 2).float() / 255, ["a", "b"])


def test_what_no_server_can_mend_is_asked_once() -> None:
    first, _ = answering(httpx2.Response(200, json=METADATA), httpx2.Response(413, json={"error": "too large"}))
    second, asked = answering()
    assert RemoteReward(first, second, fps=FPS, max_error_share=1.0)(levels(1, 2).float() / 255, ["a", "b"]).mean.isnan().all() and not asked


def test_one_server_that_is_there_when_a_run_begins_is_enough() -> None:
    dead, _ = answering(*[httpx2.ConnectError] * 9)
    assert RemoteReward(dead, answering()[0], fps=FPS).dims == ("grey", "length")
    with pytest.raises(UserError, match=r"^cannot ask the reward servers http://reward-9.test, http://reward-9.test: no connection"):
        RemoteReward(dead, dead, fps=FPS)


def scripted(answer: Callable[[dict[str, Any]], Any], metadata: dict[str, Any] = METADATA) -> RemoteReward:
    """A server whose answer to two clips is `answer` of the right one."""
    right = {"schema": 1, "card": "c0ffee", "dims": ["grey", "length"], "scores": [{"status": "ok", "mean": [1.0, 2.0], "spread": [0.0, 0.5]} for _ in range(2)]}

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/metadata":
            return httpx2.Response(200, json=metadata)
        told = answer(json.loads(json.dumps(right)))
        return told if isinstance(told, httpx2.Response) else httpx2.Response(200, content=json.dumps(told))

    return RemoteReward(Endpoint("http://reward.test", transport=httpx2.MockTransport(handle), patience=QUICK), fps=FPS, max_error_share=1.0)


def with_score(**change: Any) -> Callable[[dict[str, Any]], Any]:
    """The second clip's score with other values; a value of None takes the key away."""

    def answer(right: dict[str, Any]) -> dict[str, Any]:
        changed = {**right["scores"][1], **change}
        return {**right, "scores": [right["scores"][0], {key: value for key, value in changed.items() if value is not None}]}

    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (with_score(status="error", mean=[0.0, 0.0], reason="broken"), "broken"),
        (with_score(status="error"), "neither a score nor a reason"),
        (with_score(status=None), "neither a score nor a reason"),
        (with_score(status=0), "neither a score nor a reason"),
        (with_score(mean=None), "neither a score nor a reason"),
        (with_score(mean=[]), "neither a score nor a reason"),
        (with_score(mean=[0.0]), "neither a score nor a reason"),
        (with_score(mean=["0", "0"]), "neither a score nor a reason"),
        (with_score(mean=0), "neither a score nor a reason"),
        (with_score(mean=[1e400, 0.0]), "Infinity is no JSON"),
        (with_score(spread=[float("nan"), 0.0]), "NaN is no JSON"),
        (with_score(mean=[[0], [0]]), "neither a score nor a reason"),
        (lambda right: {**right, "scores": [right["scores"][0], "broken"]}, "neither a score nor a reason"),
        (lambda right: {**right, "scores": right["scores"][:1]}, "does not hold a score for each of 2 clips"),
        (lambda right: {**right, "scores": {}}, "does not hold a score for each of 2 clips"),
        (lambda right: {**right, "card": "other"}, "serves another model now"),
        (lambda right: {**right, "dims": ["length", "grey"]}, "serves another model now"),
        (lambda right: {**right, "schema": 2}, "serves another model now"),
        (lambda right: [right], "a JSON list"),
        (lambda right: httpx2.Response(200, text=json.dumps(right)[:-9]), "not JSON"),
        (lambda right: httpx2.Response(200, text="<html>login</html>"), "not JSON"),
        (lambda right: httpx2.Response(200, text='"' + "x" * 2**21 + '"'), "larger than"),
        (lambda right: httpx2.Response(503, json={"error": "busy"}), "HTTP 503: busy"),
        (lambda right: httpx2.Response(500, text="<html>oops"), "HTTP 500"),
    ],
)
def test_an_answer_that_is_no_score_is_nan_and_counted_never_0(answer: Callable[[dict[str, Any]], Any], reason: str) -> None:
    scorer = scripted(answer)
    scores = scorer(levels(1, 2).float() / 255, ["a", "b"])
    assert scores.mean[1].isnan().all() and scores.spread[1].isnan().all()
    assert all(reason in told for told in scorer.failures.reasons) and scorer.failures.failed == int(scores.mean.isnan().all(1).sum()) >= 1
    assert scores.mean[0].isnan().all() or scores.mean[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    "change", [{"schema": 2}, {"dims": 3}, {"dims": ["other"]}, {"limits": {}}, {"fps": None}, {"normalisation": []}, {"log_tie": {"grey": [1], "length": [1, 2]}}]
)
def test_what_is_no_reward_server_is_told_from_one(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is no reward server of schema 1"):
        scripted(lambda right: right, {**METADATA, **change})
