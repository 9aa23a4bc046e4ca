"""A server asked over ASGI and over a socket: who is let in, how much at once, one answer a key, and no score that is made up."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from base_model.errors import UserError
from base_model.video.files import write_mp4
from recipes.serve_reward import in_thread
from reward.serving.answers import Answers
from reward.serving.clips import Refused
from reward.serving.wire import TENSORS, tensors_body
from reward.types import one_rate, same_rate
from tests.reward.serving.small import CARD, FPS, LIMITS, Ask, Known, clips, get, json_request, levels, named, noise, server_of

TOKEN = "0123456789abcdef0123"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
GREY = clips(levels(51), ["four"])


@pytest.fixture
def known() -> Known:
    return Known()


@pytest.fixture
def ask(known: Known) -> Iterator[Ask]:
    with Ask(server_of(known)) as asked:
        yield asked


def errors(reply: httpx2.Response) -> str:
    message = reply.json()["error"] if reply.headers["content-type"] == "application/json" else reply.text
    assert isinstance(message, str) and "\n" not in message and len(message) <= 160 and TOKEN not in reply.text
    return message


# What is answered


def test_scores_metadata_and_health(ask: Ask) -> None:
    scores, metadata, health = ask(clips(levels(51, 102), ["four", "three"]), get("/metadata"), get("/health"))
    assert scores.status_code == metadata.status_code == health.status_code == 200
    told = scores.json()
    assert {key: told[key] for key in ("schema", "card", "dims")} == {"schema": 1, "card": "c0ffee", "dims": ["grey", "length"]}
    first, second = told["scores"]
    assert first["status"] == "ok" and first["mean"] == pytest.approx([0.2, 4], abs=1e-7) and first["spread"] == pytest.approx([0.02, 0], abs=1e-8)
    assert second["mean"] == pytest.approx([0.4, 5], abs=1e-7)
    assert metadata.json() == {"schema": 1, "dims": ["grey", "length"], "fps": 12.0, "limits": LIMITS._asdict(), **CARD}
    assert health.json() == {"status": "ok"}


def test_a_clip_without_a_score_says_why_and_holds_no_number(ask: Ask) -> None:
    (reply,) = ask(clips(levels(1, 2, 3, 4), ["ok", "nan", "refuse", "crash"]))
    first, *others = reply.json()["scores"]
    assert reply.status_code == 200 and first["status"] == "ok"
    assert [set(other) for other in others] == [{"status", "reason"}] * 3 and {other["status"] for other in others} == {"error"}
    assert [other["reason"] for other in others] == [
        "the scorer gives no score in length", "the clip is too long for this model. Give a shorter one", "the scorer failed: ZeroDivisionError: division by zero",
    ]  # fmt: skip


def test_files_are_scored_by_path_and_a_missing_one_is_its_own_error(tmp_path: Path, known: Known) -> None:
    write_mp4(tmp_path / "a.mp4", torch.full((3, 3, 16, 16), 0.5), FPS, upscale=False)
    with Ask(server_of(known, roots=(tmp_path.resolve(),))) as ask:
        both, outside = ask(json_request([named(tmp_path / "a.mp4"), named(tmp_path / "b.mp4")]), json_request([named(tmp_path / "a.mp4"), named("/etc/passwd")]))
    first, second = both.json()["scores"]
    assert first["mean"] == pytest.approx([0.5, 1], abs=0.01) and second["status"] == "error" and "No such file" in second["reason"]
    assert outside.status_code == 403 and "may read" in errors(outside)


@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        ({**GREY, "headers": {"Content-Type": "text/plain"}}, 415, "not 'text/plain'"),
        ({**GREY, "headers": {}}, 415, "not ''"),
        ({**GREY, "headers": {"Content-Type": TENSORS, "Content-Encoding": "gzip"}}, 415, "compressed"),
        ({**GREY, "content": b"x" * (LIMITS.body_bytes + 1)}, 413, "Too Large"),
        (clips(levels(1), ["a"], fps=24.0), 422, "of 12 frames a second, and these have 24"),
        (clips(levels(1, 2, 3, 4, 5), ["a"] * 5), 413, "5 clips in a request, where 1 to 4 belong"),
        (json_request([], more=1), 400, "more: Extra inputs"),
        (clips(levels(1), ["a"], key="x" * 129), 400, "an idempotency key is"),
        (clips(levels(1), ["a"], key=""), 400, "an idempotency key is"),
        ({"method": "GET", "url": "/v1/score"}, 405, "Method Not Allowed"),
        (get("/v1/../metadata/..%2f..%2fetc/passwd"), 404, "Not Found"),
        (get("/"), 404, "Not Found"),
        (get("/docs"), 404, "Not Found"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(ask: Ask, known: Known, request_: dict[str, Any], status: int, reason: str) -> None:
    (reply,) = ask(request_)
    assert reply.status_code == status and reason in errors(reply) and not known.batches


def test_a_rate_of_24000_over_1001_is_24() -> None:
    assert same_rate(24000 / 1001, 24) and not same_rate(24, 25) and not same_rate(12, float("nan"))
    assert one_rate([24, 23.976, 24]) == 24 and one_rate([24, 24, 25]) is None and one_rate([]) is None and one_rate([0.0, 24]) is None


# Who is let in


def test_without_the_token_nothing_but_health_is_told(known: Known) -> None:
    with Ask(server_of(known, token=TOKEN)) as ask:
        wrong: list[dict[str, Any]] = [{}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}]
        wrong += [{"Authorization": f"Bearer {TOKEN[:-1]}"}, {"Authorization": f"Bearer {TOKEN.upper()}"}, {"X-Token": TOKEN}, {"Cookie": f"token={TOKEN}"}]
        wrong += [{"Authorization": "Bearer schlüssel".encode()}]
        for headers in wrong:
            for reply in ask({**GREY, "headers": {**GREY["headers"], **headers}}, get("/metadata", **headers)):
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer" and "a token is needed" in errors(reply)
        assert not known.batches
        health, scores, metadata = ask(get("/health"), {**GREY, "headers": {**GREY["headers"], **BEARER}}, get("/metadata", Host="anything.example", **BEARER))
        assert (health.status_code, scores.status_code, metadata.status_code) == (200, 200, 200)


def test_without_a_token_a_page_that_names_this_machine_its_own_way_is_turned_down(ask: Ask) -> None:
    """DNS rebinding: a browser sends the name that the page came from."""
    names = ("evil.example", "evil.example:8011", "127.0.0.1.evil.example", "10.0.0.1", "")
    assert [reply.status_code for reply in ask(*(get("/metadata", Host=name) for name in names))] == [400] * 5
    assert [reply.status_code for reply in ask(*(get("/metadata", Host=name) for name in ("localhost:8011", "127.0.0.1", "[::1]:8011", "LOCALHOST")))] == [200] * 4


def test_the_token_is_asked_for_before_a_byte_of_the_body_is_read(known: Known) -> None:
    with in_thread(server_of(known, token=TOKEN)) as url:
        head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: {TENSORS}\r\nContent-Length: 150000\r\n\r\n"
        assert talk(url, head.encode()).startswith(b"HTTP/1.1 401 ")


# Sizes that lie


def talk(url: str, sent: bytes, *, hang_up: bool = False) -> bytes:
    """What a server answers to these bytes until it hangs up."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        if hang_up:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def chunked(parts: int, size: int) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (size, b"x" * size) for _ in range(parts)) + b"0\r\n\r\n"


@pytest.mark.timed
def test_an_answer_does_not_wait_for_an_acknowledgement(known: Known) -> None:
    with in_thread(server_of(known, wait_seconds=0.0)) as url, httpx2.Client(trust_env=False) as client:
        seconds = []
        for _ in range(10):
            begun = time.perf_counter()
            assert client.get(f"{url}/metadata").status_code == 200
            seconds.append(time.perf_counter() - begun)
    print("seconds:", seconds)
    assert min(seconds[1:]) < 0.03, "40 ms are what Nagle's algorithm and a delayed acknowledgement take together"


@pytest.mark.timed
def test_a_body_is_counted_whatever_its_length_says(known: Known) -> None:
    body = tensors_body(levels(51), ["a"], FPS)
    head = f"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {TENSORS}\r\n"
    with in_thread(server_of(known, body_seconds=0.5)) as url:

        def status(headers: str, content: bytes, **options: Any) -> bytes:
            return talk(url, f"{head}{headers}\r\n".encode() + content, **options).partition(b"\r\n")[0].partition(b" ")[2]

        assert status(f"Content-Length: {len(body)}\r\n", body) == b"200 OK"
        assert status("Content-Length: 200001\r\n", b"x").startswith(b"413 ")
        assert status("Transfer-Encoding: chunked\r\n", chunked(100, 4096)).startswith(b"413 ")
        assert status(f"Content-Length: {len(body) + 10}\r\n", body).startswith(b"408 "), "the rest never comes"
        assert status(f"Content-Length: {len(body) - 10}\r\n", body).startswith(b"400 "), "cut to what was said"
        assert status("Content-Length: -5\r\n", b"").startswith(b"400 ")
        assert status("Content-Length: 99999999999999999999999\r\n", b"").startswith(b"400 ")
        assert status(f"Content-Length: {len(body) + 10}\r\n", body, hang_up=True) in (b"", b"400 Bad Request")
        assert talk(url, b"\x16\x03\x01\x02\x00 hello").startswith(b"HTTP/1.1 400 ")
        assert httpx2.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}
    assert known.batches == [(1, 3, 3, 8, 10)]


# Many at once


@pytest.mark.timed
def test_requests_at_the_same_time_are_scored_together_as_if_each_came_alone() -> None:
    video, gate = noise(24), threading.Event()
    prompts = [f"prompt {'x' * i}" for i in range(24)]
    alone = Known()(video.float() / 255, prompts)
    known = Known(gate)
    with Ask(server_of(known, batch=8, requests=24)) as ask:
        threading.Timer(0.3, gate.set).start()  # the first batch is held until all are there
        replies = ask(*(clips(video[i : i + 1], prompts[i : i + 1]) for i in range(24)))
    found = [reply.json()["scores"][0] for reply in replies]
    assert [score["mean"] for score in found] == alone.mean.tolist() and [score["spread"] for score in found] == alone.spread.tolist()
    assert sum(shape[0] for shape in known.batches) == 24 and len(known.batches) <= 4 and max(known.batches)[0] == 8


@pytest.mark.timed
def test_sizes_are_not_mixed_and_every_request_gets_its_own() -> None:
    small, large, gate = noise(6), noise(6, height=12, frames=2, seed=1), threading.Event()
    requests = [clips(each[i : i + 2], ["a", "bb"]) for i in (0, 2, 4) for each in (small, large)]
    known = Known(gate)
    with Ask(server_of(known, batch=6)) as ask:
        threading.Timer(0.2, gate.set).start()
        replies = ask(*requests)
    for at, reply in enumerate(replies):
        own = (small, large)[at % 2][2 * (at // 2) :][:2]
        assert [score["mean"] for score in reply.json()["scores"]] == Known()(own.float() / 255, ["a", "bb"]).mean.tolist()
    assert len(known.batches) <= 4 and {shape[1:] for shape in known.batches} == {(2, 3, 12, 10), (3, 3, 8, 10)}


@pytest.mark.timed
def test_more_requests_than_it_answers_at_once_wait_and_are_told_to_come_back_where_that_takes_too_long() -> None:
    gate = threading.Event()
    with Ask(server_of(Known(gate), requests=2, wait_seconds=0.0, turn_seconds=0.1)) as ask:
        threading.Timer(1.0, gate.set).start()
        replies = ask(*[clips(levels(1), ["a"])] * 5)
        busy = [reply for reply in replies if reply.status_code == 503]
        assert len(busy) == 3 and all(reply.headers["retry-after"] == "1" and "busy: 2 requests" in errors(reply) for reply in busy)
    with Ask(server_of(Known(), requests=2, wait_seconds=0.0)) as ask:
        assert {reply.status_code for reply in ask(*[GREY] * 40)} == {200}


@pytest.mark.timed
def test_a_scorer_that_hangs_is_a_failure_and_health_says_so() -> None:
    gate = threading.Event()
    with Ask(server_of(Known(gate), score_seconds=0.1, wait_seconds=0.0)) as ask:
        (late,), (health,) = ask(GREY), ask(get("/health"))
        assert late.status_code == 504 and "not scored within 0.1 s" in errors(late)
        assert health.status_code == 503 and health.json() == {"status": "failed", "reason": "the scorer does not answer within 0.1 s"}
        gate.set()


# Health


def test_health_is_what_the_check_finds_looked_at_once_in_a_while() -> None:
    looked: list[float] = []
    wrong: list[BaseException] = []

    def check() -> None:
        looked.append(time.monotonic())
        if wrong:
            raise wrong[0]

    with Ask(server_of(Known(), check=check, health_seconds=1000)) as ask:
        assert {reply.status_code for reply in ask(*[get("/health")] * 20)} == {200} and len(looked) == 1
        wrong.append(UserError("the model does not give the golden scores\nof its card"))
        assert ask(get("/health"))[0].status_code == 200, "what was found holds for a while"
        object.__setattr__(ask.server.settings, "health_seconds", 0)
        (reply,) = ask(get("/health"))
        assert reply.status_code == 503 and reply.json() == {"status": "failed", "reason": "the model does not give the golden scores of its card"}
        wrong[0] = RuntimeError("CUDA\nerror")
        assert ask(get("/health"))[0].json()["reason"] == "the scorer failed: RuntimeError: CUDA error"


# Idempotency


def test_the_same_request_is_computed_once_also_while_it_is_computed(known: Known) -> None:
    with Ask(server_of(known, wait_seconds=0.0)) as ask:
        replies = ask(*[clips(levels(51), ["four"], key="k")] * 8)
        assert {reply.text for reply in replies} == {replies[0].text} and {reply.status_code for reply in replies} == {200} and len(known.batches) == 1
        assert ask(clips(levels(51), ["four"], key="k"))[0].text == replies[0].text and len(known.batches) == 1
        ask(clips(levels(51), ["four"], key="other"), clips(levels(51), ["four"]))
        assert sum(shape[0] for shape in known.batches) == 3


def test_a_key_with_another_body_is_refused_at_any_time(known: Known) -> None:
    with Ask(server_of(known)) as ask:
        first, second = ask(clips(levels(51), ["four"], key="k"), clips(levels(52), ["four"], key="k"))
        later = ask(clips(levels(51), ["five"], key="k"), json_request([{"prompt": "a", "mp4": ""}]) | {"headers": {"Idempotency-Key": "k"}})
        assert sorted((first.status_code, second.status_code)) == [200, 409] and [reply.status_code for reply in later] == [409, 409]
        assert "used for another request" in errors(later[0]) and len(known.batches) == 1


def test_an_answer_with_a_failure_is_given_to_all_who_wait_and_then_computed_again(known: Known) -> None:
    with Ask(server_of(known, wait_seconds=0.0)) as ask:
        request = clips(levels(51, 52), ["crash", "b"], key="k")
        assert {reply.json()["scores"][0]["status"] for reply in ask(request, request)} == {"error"}
        once = len(known.batches)
        ask(request)
        assert len(known.batches) == 2 * once
        assert [reply.status_code for reply in ask(*[clips(levels(1), ["a"], fps=5.0, key="k")] * 2)] == [422, 422], "nor is a refusal kept"
        assert ask(clips(levels(1), ["a"], key="k"))[0].status_code == 200


def test_only_so_many_answers_are_kept_the_last_used_ones(known: Known) -> None:
    with Ask(server_of(known, wait_seconds=0.0, answers=3)) as ask:
        for key in ("a", "b", "c", "a", "d"):
            ask(clips(levels(51), ["four"], key=key))
        assert len(known.batches) == 4
        ask(clips(levels(51), ["four"], key="a"))
        assert len(known.batches) == 4, "a was used since b"
        ask(clips(levels(51), ["four"], key="b"))
        assert len(known.batches) == 5, "b was the oldest"


def test_one_who_leaves_does_not_stop_the_answer_for_those_who_wait() -> None:
    async def scenario() -> None:
        answers, computed, gate = Answers(8), [], asyncio.Event()

        async def compute() -> dict[str, Any]:
            computed.append(1)
            await gate.wait()
            return {"scores": [{"status": "ok"}]}

        leaver, stayer = (asyncio.create_task(answers.once("k", "d", compute)) for _ in range(2))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.sleep(0)
        with pytest.raises(Refused):
            await answers.once("k", "another", compute)
        gate.set()
        assert await stayer == {"scores": [{"status": "ok"}]} and len(computed) == 1 and len(answers) == 1

        async def fail() -> dict[str, Any]:
            raise Refused(413, "too much")

        for _ in range(2):
            with pytest.raises(Refused, match="too much"):
                await answers.once("l", "d", fail)
        assert len(answers) == 1

    asyncio.run(scenario())


def test_why_a_model_is_not_healthy_is_told_to_those_with_a_token() -> None:
    def check() -> None:
        raise UserError("/srv/secret/model is not what it was")

    with Ask(server_of(Known(), token=TOKEN, check=check)) as ask:
        stranger, friend = ask(get("/health"), get("/health", **BEARER))
        assert (stranger.status_code, stranger.json()) == (503, {"status": "failed"})
        assert (friend.status_code, friend.json()) == (503, {"status": "failed", "reason": "/srv/secret/model is not what it was"})


def test_a_bug_is_a_500_of_one_line_without_its_insides(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ask(server_of(known)) as ask:
        monkeypatch.setattr(ask.server.batcher, "submit", lambda clips: 1 // 0)
        (reply,) = ask(GREY)
        assert reply.status_code == 500 and errors(reply) == "this is a bug of the server: ZeroDivisionError"
        assert json.loads(reply.text).keys() == {"error"}
