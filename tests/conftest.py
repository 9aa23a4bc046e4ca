"""Every test runs offline, from fixed seeds, on at most two threads, with warnings as errors."""

from __future__ import annotations

import os

os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"})

import random
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from base_model.threads import side_by_side

T = TypeVar("T")
LOCAL = ("127.0.0.1", "::1", "localhost")
THREADS = max(1, min(2, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
LONGEST = ("test_docs.py", "test_ranks.py", "test_sft_families.py")
"""Files that take minutes. They go first: a file stays in one process, and the others would wait for it at the end."""

torch.set_num_threads(THREADS)


def pytest_configure() -> None:
    """Connections that leave this machine fail the test."""
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


def guarded(connect: Callable[[socket.socket, Any], T]) -> Callable[[socket.socket, Any], T]:
    def local(self: socket.socket, address: Any) -> T:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise RuntimeError(f"a test tried to reach {address}: tests are offline")
        return connect(self, address)

    return local


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """The same global state for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def side_by_side_again() -> None:
    """An open family, once loaded, forbids it for good."""
    side_by_side(True)


@pytest.fixture(autouse=True)
def fair() -> Iterator[None]:
    """Fails a test that leaves this process with real-time priority: whatever starts later inherits it, and a machine of such processes stands still.

    SVT-AV1's encoder does so where it runs as root."""
    yield
    if sys.platform == "linux" and (policy := os.sched_getscheduler(0)) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        pytest.fail(f"the test left this process with scheduling policy {policy}, not the usual one")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by RUSHES_REAL_DATA (real clips and prompts); tests that ask for it are skipped where it is not set."""
    folder = os.environ.get("RUSHES_REAL_DATA")
    if not folder:
        pytest.skip("RUSHES_REAL_DATA names no folder of real clips")
    return Path(folder)
