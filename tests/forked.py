"""Processes of a group as torchrun starts them: what it sets, and forks of a process that has paid for the imports."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PATIENCE = 5.0
"""Seconds that the others have after one process failed, in which they may say why."""


def ranks_environment(processes: int) -> list[dict[str, str]]:
    """What torchrun sets for each of so many processes, with a port that is free now; nothing for one alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [{**told, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def answer(run: Callable[[dict[str, Any], int], int]) -> None:
    """{"processes": n, ...} a line on standard input; the exit statuses of n forks of this process out, each of which made `run(asked, rank)`; -9 where one was killed.

    Where one is killed the others are, too, and `PATIENCE` after one failed.
    """
    for line in sys.stdin:
        asked = json.loads(line)
        pids = {_forked(run, asked, rank, environment): rank for rank, environment in enumerate(ranks_environment(asked["processes"]))}
        statuses, until = [0] * len(pids), float("inf")
        while pids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                statuses[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + (0 if os.WIFSIGNALED(status) else PATIENCE)) if status else until
            for other in pids if time.monotonic() >= until else ():
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.002)
        print(json.dumps(statuses), flush=True)


def _forked(run: Callable[[dict[str, Any], int], int], asked: dict[str, Any], rank: int, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        status = run(asked, rank)
    finally:
        os._exit(status)


def write_to(log: str) -> None:
    """Both streams of this process go to a file from here on."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
