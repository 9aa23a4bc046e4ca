"""Scorers with known answers, clips, and a server asked without a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch
from torch import Tensor

from base_model.errors import UserError
from reward.serving.app import RewardServer, Settings
from reward.serving.wire import IDEMPOTENCY, TENSORS, Limits, tensors_body
from reward.types import Scores

FPS = 12.0
LIMITS = Limits(body_bytes=200_000, clips=4, frames=8, pixels=8 * 32 * 32, prompt=100)
CARD = {"card": "c0ffee", "tier": "known", "temperature": {"grey": 2.0, "length": 1.0}, "log_tie": {"grey": [-1.0], "length": [-2.0]}}
CARD |= {"normalisation": {"grey": {"center": 0.5, "scale": 0.25}, "length": {"center": 3.0, "scale": 1.0}}}


class Known:
    """Two dimensions: the mean grey of a clip and the length of its prompt. Notes every batch; waits for `gate` where there is one.

    A prompt "nan" has no score in one dimension, "refuse" is refused in one line, "crash" raises whatever comes.
    """

    dims, differentiable = ("grey", "length"), False

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self._gate = gate

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        if self._gate:
            assert self._gate.wait(10)
        self.batches.append(tuple(video.shape))
        if "refuse" in prompts:
            raise UserError("the clip is too long for this model. Give a shorter one")
        if "crash" in prompts:
            raise ZeroDivisionError("division\nby zero")
        grey = video.flatten(1).double().mean(1).float()
        length = torch.tensor([float("nan") if prompt == "nan" else float(len(prompt)) for prompt in prompts])
        return Scores(torch.stack([grey, length], 1), torch.stack([grey / 10, length * 0], 1))


def levels(*values: int, frames: int = 3, height: int = 8, width: int = 10) -> Tensor:
    """Clips of one grey each, uint8 [B,T,3,H,W]."""
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, frames, 3, height, width).contiguous()


def noise(batch: int, *, frames: int = 3, height: int = 8, width: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, frames, 3, height, width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def server_of(scorer: Any, *, check: Any = lambda: None, **changes: Any) -> RewardServer:
    values = {"fps": FPS, "token": None, "roots": (), "limits": LIMITS, "wait_seconds": 0.02, **changes}
    return RewardServer(scorer, CARD, check, Settings(**values))


class Ask:
    """Requests to one server, in its own event loop: `ask(a, b)` sends a and b at the same time."""

    def __init__(self, server: RewardServer) -> None:
        self.server, self._app, self._runner = server, server.app(), asyncio.Runner()

    def __enter__(self) -> Ask:
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.close()
        self.server.close()

    def __call__(self, *requests: dict[str, Any]) -> list[httpx2.Response]:
        return self._runner.run(self._all(requests))

    async def _all(self, requests: Sequence[dict[str, Any]]) -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8011", timeout=20) as client:
            return await asyncio.gather(*(client.request(**request) for request in requests))


def get(path: str, **headers: str | bytes) -> dict[str, Any]:
    return {"method": "GET", "url": path, "headers": headers}


def clips(video: Tensor, prompts: Sequence[str], *, fps: float = FPS, key: str | None = None, **headers: str) -> dict[str, Any]:
    told = {"Content-Type": TENSORS, **({} if key is None else {IDEMPOTENCY: key}), **headers}
    return {"method": "POST", "url": "/v1/score", "content": tensors_body(video, prompts, fps), "headers": told}


def json_request(rows: Sequence[dict[str, Any]], *, fps: float = FPS, **more: Any) -> dict[str, Any]:
    return {"method": "POST", "url": "/v1/score", "json": {"schema": 1, "fps": fps, "clips": list(rows), **more}}


def named(path: Path | str, prompt: str = "a") -> dict[str, Any]:
    return {"prompt": prompt, "path": str(path)}
