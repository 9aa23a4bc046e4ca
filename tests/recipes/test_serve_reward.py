"""`rushes serve-reward` as a process: who may reach it, how it begins and ends, and what its clients say when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest
import torch

from base_model.errors import GuardStop, UserError
from base_model.prompts.text import TextEncoder
from recipes import cli
from recipes.listening import address, listening
from recipes.serve_reward import Config, check_host, in_thread, main, make_server, read_token
from reward.judges.exchange import Endpoint, Patience
from reward.judges.remote import RemoteReward
from reward.model import load_reward_model
from reward.serving.wire import TENSORS, tensors_body
from tests.recipes.served import served
from tests.recipes.small import save_small_reward_model

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_reward_model(tmp_path_factory.mktemp("served") / "model")


def clips(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 5, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float() / 255


def serving(model: Path, *options: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUSHES_REWARD_TOKEN": TOKEN}
    return served("serve-reward", "--model", str(model), "--port", "0", "--fps", "8", *options, environment=environment)


def test_a_process_serves_the_models_own_scores_until_it_is_killed_and_its_client_says_so_in_one_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a red circle moves left", "a blue bar grows"]
    with serving(model) as (process, url):
        patience = Patience(seconds=20, tries=2, wait=0.01)
        with pytest.raises(UserError, match="HTTP 401"):
            RemoteReward(Endpoint(url, patience=patience), fps=8.0)
        remote = RemoteReward(Endpoint(url, token=TOKEN, patience=patience), fps=8.0)
        direct = load_reward_model(model, TextEncoder())
        torch.testing.assert_close(remote(clips(), prompts), direct(clips(), prompts), rtol=0, atol=1e-5)

        assert cli.main(["serve-reward", "--model", str(model), "--fps", "8", "--port", url.rpartition(":")[2]]) == 2
        assert capsys.readouterr().err == f"rushes: cannot listen on {url}: Address already in use. Choose another --port or --host\n"
        assert remote(clips(), prompts).mean.isfinite().all(), "the first goes on"

        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        with pytest.raises(GuardStop) as caught:
            remote(clips(), prompts)
        assert re.fullmatch(rf"the reward server {url} failed on 2 of 2 \(limit 5\.0%\), most often: no connection: \w+: .*\. Mend it, then go on with --resume", str(caught.value))


@pytest.mark.timed
def test_told_to_stop_it_answers_what_it_has_begun_takes_nothing_new_and_ends_in_one_line(model: Path) -> None:
    body = tensors_body((clips() * 255).round().to(torch.uint8), ["a", "b"], 8.0)
    head = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {TENSORS}\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(model) as (process, url), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head.encode() + body[:1000])
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/health", trust_env=False)
        connection.sendall(body[1000:])
        answer = b""
        while part := connection.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert [score["status"] for score in json.loads(answer.partition(b"\r\n\r\n")[2])["scores"]] == ["ok", "ok"]
        assert process.wait(10) == 128 + signal.SIGTERM and process.stderr is not None
        assert process.stderr.read() == "rushes: the server was told to stop; 1 requests were answered, in 1 batches. Start it again with the same command\n"


def test_health_tells_a_card_that_was_changed_or_is_gone_and_scores_that_differ(model: Path, tmp_path: Path) -> None:
    folder = save_small_reward_model(tmp_path / "model")
    made = make_server(Config(model=folder, fps=8.0), token=None, roots=())
    object.__setattr__(made.settings, "health_seconds", 0.0)
    card = folder / "reward_card.json"
    whole = card.read_text()
    with in_thread(made) as url, httpx2.Client(trust_env=False) as client:

        def health() -> tuple[int, str]:
            reply = client.get(f"{url}/health")
            return reply.status_code, reply.json().get("reason", "")

        assert health() == (200, "")
        wrong = {**json.loads(whole), "golden": {"mean": [[9.0], [9.0]], "spread": [[0.0], [0.0]]}}
        for damaged in (json.dumps(wrong), "{", ""):
            card.write_text(damaged)
            status, reason = health()
            assert status == 503 and "is not the one that is served" in reason and "\n" not in reason
        card.unlink()
        assert health()[0] == 503
        card.write_text(whole)
        assert health() == (200, "")
        assert client.get(f"{url}/metadata").json()["card"]


def test_a_model_that_changed_in_memory_is_not_healthy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load_reward_model(model, TextEncoder())
    monkeypatch.setattr("recipes.serve_reward.load_scorer", lambda *_, **__: scorer)
    with in_thread(make_server(Config(model=model, fps=8.0), token=None, roots=())) as url:
        with torch.no_grad():
            scorer.temperature.mul_(1.5)
        reply = httpx2.get(f"{url}/health", trust_env=False)
    assert reply.status_code == 503 and "golden scores of its card" in reply.json()["reason"]


def test_other_machines_are_let_in_with_a_token_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REWARD_TOKEN", raising=False)
    for host in ("0.0.0.0", "::", "", "10.1.2.3", "example"):
        with pytest.raises(UserError, match="is open to other machines, and there is no token"):
            check_host(host, read_token(Config()))
        check_host(host, TOKEN)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, None)
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 is open"):
        main(Config(host="0.0.0.0", model=tmp_path / "nowhere"))


def test_a_token_comes_from_a_file_or_else_the_environment_and_is_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RUSHES_REWARD_TOKEN", "fedcba9876543210fedc")
    monkeypatch.setenv("ELSEWHERE", TOKEN)
    assert read_token(Config(token_file=file)) == TOKEN and read_token(Config(token_env="ELSEWHERE")) == TOKEN
    assert read_token(Config()) == "fedcba9876543210fedc"
    for content in ("", "short-secret", "two words in a long line", "schlüsselschlüsselschlüssel"):
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            read_token(Config(token_file=file))
        assert not content or content not in str(caught.value)
    file.write_bytes(b"\xff" * 40)
    for wrong in (file, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="cannot read the token"):
            read_token(Config(token_file=wrong))
    monkeypatch.setenv("RUSHES_REWARD_TOKEN", "")
    with pytest.raises(UserError, match="has 0 characters"):
        read_token(Config())


def test_two_servers_on_one_port_and_addresses_that_are_not_there_are_one_line() -> None:
    with listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        taken, there_is_none = "Address already in use", "no address of this machine"
        for host, message in (("127.0.0.1", taken), ("localhost", taken), ("no.such.host.invalid", there_is_none), ("192.0.2.1", "cannot listen")):
            with pytest.raises(UserError, match=message) as caught, listening(host, port):
                pass
            assert "\n" not in str(caught.value)
    with listening("127.0.0.1", port):
        pass
    assert address("::1", 5) == "http://[::1]:5" and address("a", 5) == "http://a:5"


def test_what_cannot_be_served_is_refused_before_anything_listens(model: Path, tmp_path: Path) -> None:
    for changes, message in (({"model": tmp_path / "nowhere"}, "no reward model"), ({"fps": None}, r"one frame rate \(none\).*--fps")):
        with pytest.raises(UserError, match=message):
            make_server(Config(**{"model": model, "fps": 8.0, **changes}), token=None, roots=())
