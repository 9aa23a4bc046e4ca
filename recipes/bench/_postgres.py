"""A PostgreSQL server of one's own: in a temporary folder, on a socket alone, gone with the block. For tests and benchmarks."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from base_model.errors import UserError

INSTALLED = Path("/usr/lib/postgresql")


def programs() -> Path:
    """The folder with the newest server's programs. Raises UserError where none is installed."""
    found = [folder for folder in INSTALLED.glob("*/bin") if (folder / "initdb").exists()]
    if not found:
        raise UserError(f"no PostgreSQL server is installed, {INSTALLED}. apt-get install postgresql")
    return max(found, key=lambda folder: int(folder.parent.name))


@contextlib.contextmanager
def postgres(*, sync: bool = True) -> Iterator[str]:
    """A URL with a gap for the database's name: `url.format("postgres")`. sync: commits reach the disk, as they do by default; tests that kill no server do without."""
    bin_, root = programs(), Path(tempfile.mkdtemp(prefix="rushes-pg-", dir="/tmp"))  # a socket's path is at most 107 bytes long
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    root.chmod(0o755)
    if as_user:
        shutil.chown(root, "postgres", "postgres")

    def run(*words: object) -> None:
        subprocess.run([*as_user, *map(str, words)], check=True, capture_output=True, cwd="/")

    run(bin_ / "initdb", "-D", root / "data", "-A", "trust", "-U", "rushes", "--no-sync", "--locale=C.UTF-8")
    options = f"-k {root} -c listen_addresses= -c shared_buffers=64MB -c max_connections=200 -c fsync={'on' if sync else 'off'}"
    run(bin_ / "pg_ctl", "-D", root / "data", "-o", options, "-l", root / "log", "-w", "start")
    try:
        yield f"postgresql+psycopg://rushes@/{{}}?host={root}"
    finally:
        run(bin_ / "pg_ctl", "-D", root / "data", "-m", "immediate", "stop")
        shutil.rmtree(root)
