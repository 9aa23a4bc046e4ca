"""Files of clips over HTTP: what ranges give, and what leads nowhere."""

from __future__ import annotations

import time

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from reward.app.media import path_of, send
from reward.app.security import Denied
from reward.app.store import Store

CLIP = "ab" * 32
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def client(store: Store) -> TestClient:
    """A route that sends whatever it is asked for."""
    path = path_of(store, CLIP)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    app = FastAPI()
    app.add_exception_handler(Denied, lambda request, error: JSONResponse({"detail": str(error)}, error.status))  # type: ignore[attr-defined]

    @app.get("/{clip}")
    def media(request: Request, clip: str) -> Response:
        return send(request, store, clip)

    return TestClient(app)


@pytest.mark.timed
@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, CONTENT),
        ("bytes=0-9", 206, CONTENT[:10]),
        ("bytes=10000-", 206, CONTENT[10_000:]),
        ("bytes=-7", 206, CONTENT[-7:]),
        ("bytes=5-5", 206, CONTENT[5:6]),
        ("bytes=0-99999999", 206, CONTENT),
        ("bytes=0-1,4-5", 200, CONTENT),
        ("bytes=0-," * 20_000, 200, CONTENT),
        ("bytes=99999999-", 416, None),
    ],
)
def test_one_range_is_served_and_several_are_the_whole_file(client: TestClient, asked: str | None, status: int, content: bytes | None) -> None:
    began = time.perf_counter()
    answer = client.get(f"/{CLIP}", headers={"range": asked} if asked else {})
    assert time.perf_counter() - began < 1
    assert answer.status_code == status
    assert content is None or answer.content == content
    assert answer.headers.get("accept-ranges") == "bytes" or status == 416


@pytest.mark.parametrize("asked", ["bytes=x-y", "pages=1-2", "bytes", "bytes=--1", "bytes=\x80-", "bytes=-", "bytes=" + "1" * 30 + "-"])
def test_a_range_that_is_none_gives_the_whole_file(client: TestClient, asked: str) -> None:
    answer = client.get(f"/{CLIP}", headers={"range": asked.encode("latin-1")})
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize("asked", ["bytes=9-3", "bytes=-0", f"bytes={len(CONTENT)}-"])
def test_a_range_that_holds_nothing_cannot_be_satisfied(client: TestClient, asked: str) -> None:
    answer = client.get(f"/{CLIP}", headers={"range": asked})
    assert (answer.status_code, answer.content, answer.headers["content-range"]) == (416, b"", f"bytes */{len(CONTENT)}")


def test_a_long_file_comes_in_parts_that_add_up_to_it(store: Store, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.app.media.MOST_BYTES", 3_000)
    got = b""
    while len(got) < len(CONTENT):
        answer = client.get(f"/{CLIP}", headers={"range": f"bytes={len(got)}-"})
        assert answer.status_code == 206 and answer.headers["content-range"] == f"bytes {len(got)}-{min(len(CONTENT), len(got) + 3_000) - 1}/{len(CONTENT)}"
        got += answer.content
    assert got == CONTENT
    assert client.get(f"/{CLIP}").status_code == 206  # the first part, and it says so


@pytest.mark.parametrize("name", ["../secret", "..%2fsecret", "%2e%2e%2fsecret", "AB" * 32, "ab" * 31, "ab" * 33, f"{CLIP}%00", f"{CLIP}\n", "ａｂ" * 32, "/etc/passwd"])
def test_a_name_that_is_no_digest_leads_nowhere(store: Store, client: TestClient, name: str) -> None:
    with pytest.raises(ValueError, match="is no digest"):
        path_of(store, name)


def test_links_and_missing_files_are_not_followed(store: Store, client: TestClient) -> None:
    other = "cd" * 32
    path = path_of(store, other)
    path.parent.mkdir(parents=True)
    path.symlink_to(store.folder / "secret")
    assert client.get(f"/{other}").status_code == 404
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(store.folder)
    (store.folder / path.name).write_bytes(b"outside")
    assert client.get(f"/{other}").status_code == 404
    assert client.get(f"/{'ef' * 32}").json() == {"detail": "this clip cannot be shown: its file is not there"}
