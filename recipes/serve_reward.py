"""Serve a reward model over HTTP (`rushes serve-reward --model FOLDER`).

Any tier, one process, one thread with the model; concurrent requests are scored together. What goes over the wire is written down in `reward/serving/wire.py`;
`reward/judges/remote.py` is the scorer on the other side. Without a token the server listens on this machine alone and answers to its names only; with one it
may listen elsewhere. It has no TLS: put it behind a proxy that has where the network is not yours. Clips are decoded in this process.

SIGTERM and Ctrl-C stop it: requests that are being answered are answered, new ones are not taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive
from base_model.errors import Interrupted, UserError
from base_model.prompts.text import TextEncoder
from recipes.listening import address, listening, uvicorn, uvicorn_config
from recipes.scorers import card_of, card_rate, check_scorer, load_scorer, tier_of
from reward.judges.exchange import check_token, is_loopback
from reward.serving.clips import allowed_roots
from reward.serving.wire import Limits

if TYPE_CHECKING:
    from reward.serving.app import RewardServer

TOLD = ("tier", "normalisation", "temperature", "log_tie", "most_clips")
PROMPTS_KEPT = 4096
SHORTEST_TOKEN = 16
CONNECTIONS = 512
"""Open at once; more are told to come back."""


class RequestLimits(BaseConfig):
    """The most that one request may bring, and how many are answered at once: what they need together must fit into memory."""

    body_bytes: Count = 2**26
    """Bytes of a body, or of a file that a path names."""
    clips: Count = 64
    """Clips."""
    frames: Count = 512
    """Frames of one clip."""
    pixels: Count = 2**25
    """Pixels of all frames of all clips; also of a batch."""
    prompt: Count = 4096
    """Characters of one prompt."""
    requests: Count = 16
    """Requests read and answered at once; others wait for their turn."""


class Config(BaseConfig):
    model: Path = Path("runs/reward-model")
    """Folder of the reward model, of any tier."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8011
    """Port to listen on; 0 takes a free one and says which."""
    token_file: Path | None = None
    """File with the token that requests must carry."""
    token_env: str = "RUSHES_REWARD_TOKEN"
    """Environment variable with the token, where there is no file. No token where neither is there."""
    allow: tuple[Path, ...] = ()
    """Folders below which clips may be named by path, with links followed; none means that clips are sent."""
    fps: Positive | None = None
    """True frame rate of the clips; none means the one of the model's card. Clips of another rate are refused."""
    device: str = "cpu"
    """Where a vision-language model runs; the smaller tiers run on the CPU."""
    batch: Count = 16
    """Clips of one size scored at once."""
    wait_seconds: NonNegative = 0.005
    """Seconds that a clip waits for others, where some are on their way."""
    limits: RequestLimits = RequestLimits()
    """What a request may bring."""
    answers: Count = 1024
    """Answers kept by idempotency key."""
    score_seconds: Positive = 300.0
    """Seconds that a request's clips may take, after which it fails."""
    stop_seconds: Count = 30
    """Seconds that requests have to be answered in once the server is told to stop."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Serves until it is told to stop. Raises UserError where it cannot begin, Interrupted when a signal ended it."""
    server = uvicorn()
    token = read_token(cfg)
    check_host(cfg.host, token)
    roots = allowed_roots(cfg.allow)
    with listening(cfg.host, cfg.port) as listener:
        made = make_server(cfg, token=token, roots=roots)
        url = address(cfg.host, listener.getsockname()[1])
        print(f"serving {cfg.model} ({', '.join(made.dims)}) on {url}{'' if token else ', without a token'}", file=sys.stderr, flush=True)
        stopped_by = signal.SIGINT.value
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.Server(uvicorn_config(made.app(), cfg.stop_seconds, CONNECTIONS)).run(sockets=[listener])
        except Interrupted as error:
            stopped_by = error.exit_status - 128
        finally:
            made.close(cfg.stop_seconds)
    answered = f"{made.answered} requests were answered, in {made.batcher.batches} batches"
    raise Interrupted(f"the server was told to stop; {answered}. Start it again with the same command", stopped_by)


def make_server(cfg: Config, *, token: str | None, roots: tuple[Path, ...]) -> RewardServer:
    """The model of `cfg` behind what answers requests; nothing listens yet."""
    from reward.serving.app import RewardServer, Settings

    card = card_of(cfg.model)
    digest = card_digest(cfg.model)
    fps = cfg.fps if cfg.fps is not None else card_rate(cfg.model, card)
    scorer = load_scorer(cfg.model, fps=fps, encode=TextEncoder(keep=PROMPTS_KEPT), device=cfg.device)
    limits = Limits(**{name: getattr(cfg.limits, name) for name in Limits._fields})
    settings = Settings(
        fps=fps,
        token=token,
        roots=roots,
        limits=limits,
        batch=cfg.batch,
        wait_seconds=cfg.wait_seconds,
        requests=cfg.limits.requests,
        answers=cfg.answers,
        score_seconds=cfg.score_seconds,
    )

    def check() -> None:
        if card_digest(cfg.model) != digest:
            raise UserError(f"the card in {cfg.model} is not the one that is served. Start the server again")
        check_scorer(cfg.model, card, scorer)

    told = {"card": digest, "weights": card["sha256"], "tier": tier_of(card), **{name: card[name] for name in TOLD if name in card}}
    return RewardServer(scorer, told, check, settings)


def card_digest(folder: Path) -> str:
    """sha256 of the card's file; "" where it is gone."""
    path = folder / "reward_card.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read_token(cfg: Config) -> str | None:
    """The token out of the file, or the environment, or None. Raises UserError where it is named and not there, or easy to guess."""
    if cfg.token_file is None:
        token = os.environ.get(cfg.token_env)
        where = f"the environment variable {cfg.token_env}"
    else:
        where = str(cfg.token_file)
        try:
            token = cfg.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the token, {where}: {getattr(error, 'strerror', None) or 'not text'}. Give a file with a token in it") from error
    if token is None:
        return None
    if len(token) < SHORTEST_TOKEN:
        raise UserError(f"the token in {where} has {len(token)} characters. Give one of at least {SHORTEST_TOKEN}: openssl rand -hex 32")
    return check_token(token)


def check_host(host: str, token: str | None) -> None:
    """Raises UserError where other machines could ask without a token."""
    if token is None and not is_loopback(host):
        raise UserError(f"--host {host} is open to other machines, and there is no token. Give --token-file, or listen on 127.0.0.1")


@contextlib.contextmanager
def in_thread(made: RewardServer) -> Iterator[str]:
    """Serves on a free port of this machine while the block runs, and gives the address: for trying things out."""
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn().Server(uvicorn_config(made.app(), 5, CONNECTIONS))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield address("127.0.0.1", listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            made.close()
