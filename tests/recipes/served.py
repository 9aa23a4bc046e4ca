"""A server command in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*words: str, environment: Mapping[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`rushes WORDS`, which says on its first line where it listens: the process, and its address."""
    command = [sys.executable, "-m", "recipes.cli", *words]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in a shell's background ignores Ctrl-C, and so would its children
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    signal.signal(signal.SIGINT, heard)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"on (http://127\.0\.0\.1:\d+)", first)
        assert found, first + process.stderr.read()
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()
