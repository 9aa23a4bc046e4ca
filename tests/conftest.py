"""Every test runs offline, from fixed seeds, on at most two threads, with warnings as errors."""

from __future__ import annotations

import os

os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})

import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

LOCAL = ("127.0.0.1", "::1", "localhost")

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same global random state for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fair() -> Iterator[None]:
    """Fails a test that leaves this process with real-time priority: whatever starts later inherits it, and a machine of such processes stands still.

    SVT-AV1's encoder does so where it runs as root."""
    yield
    if sys.platform == "linux" and (policy := os.sched_getscheduler(0)) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail(f"the test left this process with scheduling policy {policy}, not the usual one")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that leave this machine fail the test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise RuntimeError(f"a test tried to reach {address}: tests are offline")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by RUSHES_REAL_DATA (real clips and prompts); tests that ask for it are skipped where it is not set."""
    folder = os.environ.get("RUSHES_REAL_DATA")
    if not folder:
        pytest.skip("RUSHES_REAL_DATA names no folder of real clips")
    return Path(folder)
