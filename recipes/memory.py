"""Peak memory of a whole process tree."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """Samples the sum of resident set sizes over this process and all its descendants, and keeps the largest sum.

    Pages that processes share are counted once for each of them, so the number is an upper bound of what was really in use.

    Example: `with PeakMemory() as memory: work()` and then `memory.peak_bytes`.
    """

    def __init__(self, interval: float = 0.5) -> None:
        """`interval`: seconds between two samples; each asks the system for all its processes, 2 ms for a hundred."""
        self.peak_bytes = 0
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self.sample()

    def sample(self) -> int:
        """The sum now, in bytes; `peak_bytes` follows it upwards."""
        now = tree_bytes(psutil.Process())
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self.sample()


def peak_memory(device: torch.device) -> int:
    """Most bytes that torch has held on a GPU, or that this process has been at, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # ru_maxrss of a process that was started by a larger one begins with the peak of that
        return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tree_bytes(root: psutil.Process) -> int:
    """Sum of RSS over `root` and its descendants; a process that ends meanwhile counts as nothing."""
    return sum(_rss(process) for process in [root, *root.children(recursive=True)])


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
