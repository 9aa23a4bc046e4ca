"""A limit on memory for code that reads what came from outside."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


def held() -> int:
    """Bytes of data that this process holds, as the kernel counts them for RLIMIT_DATA; 0 where it does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


@contextmanager
def memory_at_most(more: int) -> Iterator[None]:
    """This process may take `more` bytes beyond what it holds; a library that asks for more is told that there is none, and says so in its own way. It holds for the whole
    process: use it where nothing else is at work. A limit that was there and is lower stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if held():
        resource.setrlimit(resource.RLIMIT_DATA, (min(held() + more, *limits) if limits else held() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
