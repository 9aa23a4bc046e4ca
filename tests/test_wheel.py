"""What `pip install` gives: the wheel has everything that the packages read at run time, is marked as typed, and works outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("align", "base_model", "recipes", "reward")
LARGEST = 16 << 20
"""Bytes. What is larger is a file that slipped in."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of what git tracks."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", *PACKAGES, "pyproject.toml", "README.md", "LICENSE"], cwd=ROOT, check=True, capture_output=True).stdout
    files = [name for name in listed.decode().split("\0") if name]
    assert len(files) > 300
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(ROOT / name, copy / name) if os.stat(ROOT).st_dev == os.stat(copy).st_dev else (copy / name).write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(copy)]
    subprocess.run(words, check=True, capture_output=True)
    (found,) = out.glob("rushes-*.whl")
    return found


def test_it_has_every_file_that_the_packages_have_and_is_small(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        here = subprocess.run(["git", "ls-files", "-z", package], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        missing = sorted(name for name in here if name and name not in names and not name.endswith((".png", ".webp")))
        assert not missing, missing[:5]
    assert not [name for name in names if name.startswith("tests/")]
    assert wheel.stat().st_size < LARGEST, f"{wheel.stat().st_size:,} bytes"


def test_it_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(installed)
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONWARNINGS": "ignore"}
    told = subprocess.run([sys.executable, "-P", "-c", "import recipes; print(recipes.__path__[0])"], cwd=elsewhere, env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.strip() == str(installed / "recipes")
    words = [sys.executable, "-P", "-m", "recipes.cli", "generate", "--prompts", '["a red circle moves to the left"]', "--out", "takes", "--sampler.steps", "2"]
    subprocess.run(words, cwd=elsewhere, env=environment, check=True, capture_output=True)
    assert list((elsewhere / "takes").rglob("*.mp4")), "a clip was made with the shipped weights"
