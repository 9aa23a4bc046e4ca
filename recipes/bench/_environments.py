"""Environments of peers, made once in a benchmark's folder: exact versions, and nothing that these would bring along."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from base_model.errors import UserError


def importable(python: Path, name: str, modules: str) -> Path:
    """The Python, which can import the peer's modules ("cv2, scenedetect"). Raises UserError where it cannot."""
    python = python.absolute()  # a link to the interpreter says by its place what is installed
    try:
        _do(python, "-c", f"import {modules}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{name} cannot be imported: {_last_line(error)}") from error
    return python


def installed(folder: Path, name: str, modules: str, pins: Sequence[str], *, quick: bool, beside: Sequence[str] = ()) -> Path:
    """The Python of the environment in `folder`, made, and the peer installed, where it is missing. Raises UserError where that fails, and where a quick form would have to.

    beside: folders of packages that the environment sees, too, under its own.
    """
    python = (folder / "bin" / "python").absolute()
    try:
        return importable(python, name, modules)
    except UserError:
        if quick:
            raise UserError(f"not measured: {name} is not installed, and quick makes no environment") from None
    try:
        if not python.exists():
            print(f"making an environment for the peers in {folder}", file=sys.stderr)
            _do(sys.executable, "-m", "venv", folder)
            if beside:
                (next(folder.glob("lib/python*/site-packages")) / "beside.pth").write_text("\n".join(beside))
        _do(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--retries", "1", *pins)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{name} cannot be installed: {_last_line(error)}") from error
    return importable(python, name, modules)


def _do(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def _last_line(error: OSError | subprocess.CalledProcessError) -> str:
    """The error that a process ended with."""
    said = (error.stderr or "") if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])[:200]
