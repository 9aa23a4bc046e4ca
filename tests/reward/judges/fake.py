"""Servers whose answers are scripted: over a real socket, byte by byte, or in place of the network."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reward.judges.exchange import Endpoint, Patience

QUICK = Patience(seconds=5, tries=3, wait=0.0)
Talk = Callable[[socket.socket], None]


@contextmanager
def socket_server(*talks: Talk) -> Iterator[tuple[str, list[bytes]]]:
    """(its address, the requests as they came): the n-th connection is answered by the n-th of `talks`, later ones by the last."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.settimeout(5)
                    requests.append(read_request(connection))
                    talks[min(len(requests), len(talks)) - 1](connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        finally:
            stop.set()
            thread.join()


def read_request(connection: socket.socket) -> bytes:
    """Head and body."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(65536)
    head, _, body = found.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def says(body: bytes, status: str = "200 OK", *, length: int | None = None, headers: str = "") -> Talk:
    """Sends one answer, whose Content-Length may lie, and hangs up."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\nConnection: close\r\n{headers}\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def endpoint_of(answer: Callable[[dict[str, Any]], Any], *, at_once: int = 4, patience: Patience = QUICK) -> Endpoint:
    """An endpoint whose chat requests, as dictionaries, are answered by `answer`: a response, or what a completion's `choices[0].logprobs` holds."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        assert request.method == "POST" and request.url == "http://judge.test/v1/chat/completions" and request.headers["content-type"] == "application/json"
        told = answer(json.loads(request.content))
        return told if isinstance(told, httpx2.Response) else httpx2.Response(200, json=completion(told))

    return Endpoint("http://judge.test/v1", transport=httpx2.MockTransport(handle), at_once=at_once, patience=patience)


def completion(logprobs: Any) -> dict[str, Any]:
    """A chat completion as vLLM writes it."""
    message = {"role": "assistant", "content": "x", "tool_calls": []}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length"}]}


def first(probabilities: Mapping[str, float]) -> dict[str, Any]:
    """`logprobs` of a first token with these probabilities; the likeliest is the one that was said."""
    return first_logprobs({token: math.log(p) for token, p in probabilities.items()})


def first_logprobs(logprobs: Mapping[str, float]) -> dict[str, Any]:
    listed = [{"token": token, "logprob": value, "bytes": list(token.encode())} for token, value in sorted(logprobs.items(), key=lambda item: -item[1])]
    return {"content": [{**listed[0], "top_logprobs": listed}]}


def parts(request: Mapping[str, Any], kind: str) -> list[bytes]:
    """The media of one kind in the user's message, decoded from their data URIs."""
    content: Sequence[Mapping[str, Any]] = request["messages"][1]["content"]
    return [base64.b64decode(part[kind]["url"].partition(";base64,")[2], validate=True) for part in content if part["type"] == kind]


def images(request: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    return [np.asarray(Image.open(io.BytesIO(content))) for content in parts(request, "image_url")]


def texts(request: Mapping[str, Any]) -> list[str]:
    return [part["text"] for part in request["messages"][1]["content"] if part["type"] == "text"]
