"""The other end of a process that takes turns (`_workers.py`). Peers' environments know nothing of this project, so only the standard library is imported here."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Handlers = Mapping[str, Callable[..., Answer]]


def serve(build: Callable[[dict[str, Any]], Handlers]) -> None:
    """Builds what the first argument describes, then answers each line of standard input, `{"do": NAME, ...}`, by a line of standard output.

    Whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handlers = build(json.loads(sys.argv[1]))
    print(json.dumps({"peak_bytes": peak_bytes()}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(handlers[order.pop("do")](**order)), file=answers, flush=True)


def peak_bytes() -> int | None:
    """The largest resident set this process ever had; None where the system does not say."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class Passes:
    """Images through a UNet since the last `take`, with a gradient and without, and the calls."""

    def __init__(self, unet: Any) -> None:
        self.seen: Counter[str] = Counter()
        unet.register_forward_pre_hook(self.count)

    def count(self, unet: Any, arguments: tuple[Any, ...]) -> None:
        import torch

        kind = "trained" if torch.is_grad_enabled() else "rolled"
        self.seen.update({f"{kind}_rows": len(arguments[0]), f"{kind}_calls": 1})

    def take(self) -> Answer:
        seen, self.seen = dict(self.seen), Counter()
        return seen
