"""One exchange over HTTP: every way it can fail is one line, and only what may pass by itself is tried again."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time

import pytest

from base_model.errors import GuardStop, UserError
from reward.judges.exchange import Endpoint, Failed, Failures, Patience, check_url, is_loopback, one_line
from tests.reward.judges.fake import QUICK, Talk, says, socket_server

GOOD = json.dumps({"answer": 1}).encode()


def ask(url: str, patience: Patience = QUICK) -> dict[str, object]:
    return Endpoint(url, patience=patience, token="a-secret-token").post("v1/ask", b"question", {"Content-Type": "text/plain"})


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    with contextlib.suppress(OSError):  # who asked has left
        for _ in range(100):
            time.sleep(0.02)
            connection.sendall(b"x")


@pytest.mark.parametrize(
    ("talk", "reason", "tries"),
    [
        (says(b'{"error": {"message": "out of\\nmemory"}}', "500 Oops"), "HTTP 500: out of memory", 3),
        (says(b"<html>\n<body>502</body></html>", "502 Bad Gateway"), "HTTP 502: <html> <body>502</body></html>", 3),
        (says(b'{"error": "busy"}', "503 Busy"), "HTTP 503: busy", 3),
        (says(b'{"error": "no such model"}', "404 Not Found"), "HTTP 404: no such model", 1),
        (says(b"", "401 Unauthorized"), "HTTP 401", 1),
        (says(b"", "302 Found", headers="Location: http://127.0.0.1:1/\r\n"), "HTTP 302", 1),
        (says(b"<html><body>welcome</body></html>"), "not JSON", 1),
        (says(GOOD[:-4]), "not JSON", 1),
        (says(GOOD[:-4], length=len(GOOD)), "no connection: RemoteProtocolError", 3),
        (says(b""), "not JSON", 1),
        (says(b'{"answer": NaN}'), "NaN is no JSON", 1),
        (says(b"[1]"), "a JSON list, not an object", 1),
        (says(b"[" * 3900), "not JSON", 1),
        (says(b'{"answer": "' + b"x" * 5000 + b'"}'), "larger than 4000 bytes", 1),
        (says(gzip.compress(GOOD), headers="Content-Encoding: gzip\r\n"), "compressed", 1),
        (says(b"not http at all", "what"), "no connection: RemoteProtocolError", 3),
        (lambda connection: None, "no connection: RemoteProtocolError", 3),
    ],
)
def test_every_failure_is_one_line_and_only_what_may_pass_is_tried_again(talk: Talk, reason: str, tries: int) -> None:
    with socket_server(talk) as (url, requests), pytest.raises(Failed) as caught:
        ask(url, Patience(seconds=5, tries=3, wait=0.0, reply_bytes=4000))
    message = str(caught.value)
    assert reason in message and "\n" not in message and len(message) < 250 and "a-secret-token" not in message
    assert len(requests) == tries and all(b"authorization: bearer a-secret-token" in request.lower() for request in requests)


def test_silence_and_a_drip_end_when_the_time_is_up() -> None:
    for talk in (lambda connection: time.sleep(0.4), drip):
        with socket_server(talk) as (url, requests), pytest.raises(Failed, match=r"no answer within 0\.2 s"):
            begun = time.monotonic()
            ask(url, Patience(seconds=0.2, tries=1))
        assert time.monotonic() - begun < 10 and len(requests) == 1


def test_a_server_that_comes_back_answers_and_says_how_long_it_wants_to_be_left_alone() -> None:
    busy = says(b"", "503 Busy", headers="Retry-After: 0.3\r\n")
    with socket_server(busy, lambda connection: None, says(GOOD)) as (url, requests):
        begun = time.monotonic()
        assert ask(url) == {"answer": 1} and len(requests) == 3
        assert 0.3 <= time.monotonic() - begun < 10
    with socket_server(says(b"", "503 Busy", headers="Retry-After: 99999\r\n"), says(GOOD)) as (url, _):
        assert ask(url, Patience(seconds=5, tries=2, wait=0, longest_wait=0.05)) == {"answer": 1}


def test_waits_double_and_are_at_most_halved() -> None:
    with socket_server(says(b"", "500 Oops")) as (url, requests), pytest.raises(Failed):
        begun = time.monotonic()
        ask(url, Patience(tries=4, wait=0.04))
    assert len(requests) == 4 and 0.5 * 0.28 <= time.monotonic() - begun < 10  # 0.04 + 0.08 + 0.16 seconds


def test_nobody_listening_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Failed, match=r"^no connection: ConnectError: .*refused$"):
        ask(f"http://127.0.0.1:{port}")


@pytest.mark.timed
def test_at_most_so_many_are_asked_at_once_and_answers_keep_their_order() -> None:
    endpoint = Endpoint("http://127.0.0.1:1", at_once=3)
    lock, now, most = threading.Lock(), 0, 0

    def work(item: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01 * (3 - item % 3))
        with lock:
            now -= 1
        if item == 4:
            raise Failed("four")
        return 10 * item

    answers = endpoint.each(work, list(range(10)))
    assert most == 3 and str(answers.pop(4)) == "four" and answers == [0, 10, 20, 30, 50, 60, 70, 80, 90]


@pytest.mark.timed
def test_what_is_no_failed_is_raised_and_what_has_not_begun_is_left() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(0.02)
        if item == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Endpoint("http://127.0.0.1:1", at_once=2).each(work, list(range(50)))
    assert len(begun) < 10


def test_failures_are_counted_by_reason_and_too_many_stop_the_run() -> None:
    failures = Failures("the judge", max_error_share=0.25)
    failures.count([1.0, 2.0, 3.0, Failed("late")])
    assert failures.asked == 4 and failures.failed == 1
    with pytest.raises(GuardStop, match=r"^the judge failed on 2 of 4 \(limit 25\.0%\), most often: late\. Mend it"):
        failures.count([1.0, Failed("late"), Failed("late"), 2.0])
    assert failures.reasons == {"late": 3}
    Failures("the judge", max_error_share=1.0).count([Failed("x")])


@pytest.mark.parametrize("url", ["", "judge", "ftp://judge", "http://", "file:///etc/passwd", "http://a/b?c=d", "http://a/#b", "http://[::1", "http://u:secret@judge"])
def test_an_address_is_http_without_a_password(url: str) -> None:
    with pytest.raises(UserError) as caught:
        check_url(url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "schlüssel"])
def test_a_token_that_cannot_stand_in_a_header_is_refused_without_being_told(token: str) -> None:
    with pytest.raises(UserError) as caught:
        Endpoint("http://127.0.0.1:1", token=token)
    assert not token or token not in str(caught.value)


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "", "::", "10.0.0.1", "localhost.evil.test", "127.0.0.1.evil.test", "example")))


def test_a_line_has_no_control_characters_and_an_end() -> None:
    assert one_line("a\x1b[31m\r\nb\u202ec") == "a [31m b c" and len(one_line("x" * 10**6)) == 160
    with pytest.raises(UserError, match="not a patience"):
        Patience(tries=0)
