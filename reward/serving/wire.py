"""What goes over the wire between `RemoteReward` and `rushes serve-reward`.

    GET  /health     {"status": "ok"} (200), or {"status": "failed"} (503): the golden scores, computed again. Needs no token; with it "reason" says why
    GET  /metadata   what the model is, and the limits of a request
    POST /v1/score   clips -> {"schema": 1, "card": ..., "dims": [R names], "scores": [one a clip]}

A clip's score is {"status": "ok", "mean": [R numbers], "spread": [R numbers]} or {"status": "error", "reason": "one line"}; there is never a number in place
of a score that is missing. Any other status than 200 comes with {"error": "one line"}, or with
one line of plain text where a request was turned down before it was read.

Clips come in one of two bodies:

    application/x-safetensors   one tensor "video", uint8 [B,T,3,H,W]; metadata schema "1", fps, and prompts, a JSON list of B texts
    application/json            {"schema": 1, "fps": 12.0, "clips": [{"prompt": ..., "path": ...}, {"prompt": ..., "mp4": "base64"}, ...]}

`path` is that of a file on the server, mp4 or Matroska, below a folder it was started with; `mp4` may hold either, too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from base_model.checkpoint import weights_bytes

SCHEMA = 1
SCORE, METADATA, HEALTH = "v1/score", "metadata", "health"
TENSORS, JSON = "application/x-safetensors", "application/json"
IDEMPOTENCY = "Idempotency-Key"


class Limits(NamedTuple):
    """The most that one request may bring."""

    body_bytes: int  # also of a file that a path names
    clips: int
    frames: int  # of one clip
    pixels: int  # of all frames of all clips
    prompt: int  # characters of one prompt


def tensors_body(video: Tensor, prompts: Sequence[str], fps: float) -> bytes:
    """uint8 [B,T,3,H,W] at `fps` frames a second, one prompt a clip -> the body of a request."""
    return weights_bytes({"video": video}, {"schema": str(SCHEMA), "fps": repr(float(fps)), "prompts": json.dumps(list(prompts))})
