"""Recipes rhyme but do not copy each other, and every configuration that is shipped loads."""

from __future__ import annotations

import importlib
import re
from itertools import combinations
from pathlib import Path

import pytest

from align.config import load
from recipes.cli import COMMANDS

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
CONFIGS = sorted(path for path in (ROOT / "recipes" / "configs").rglob("*.y*ml") if path.parent.name != "launch")
LONGEST_SHARED = 25


def stripped(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def longest_shared(a: list[str], b: list[str]) -> list[str]:
    """The longest run of lines that both hold."""
    best: list[str] = []
    lengths: dict[int, int] = {}
    for i, line in enumerate(a):
        lengths = {j: lengths.get(j - 1, 0) + 1 for j, other in enumerate(b) if other == line}
        for length in lengths.values():
            if length > len(best):
                best = a[i + 1 - length : i + 1]
    return best


def test_the_longest_shared_run_is_found() -> None:
    assert longest_shared(list("abcdefg"), list("xxcdefyy")) == list("cdef")
    assert longest_shared(list("aab"), list("ab")) == list("ab")
    assert longest_shared(list("abc"), list("xyz")) == []


def test_no_two_recipes_share_more_than_25_consecutive_lines() -> None:
    texts = {path: stripped(path) for path in RECIPES}
    assert len(texts) > 10
    shared = {(a.name, b.name): longest_shared(texts[a], texts[b]) for a, b in combinations(texts, 2)}
    names = max(shared, key=lambda pair: len(shared[pair]))
    print("most alike:", names, len(shared[names]), "lines")
    assert len(shared[names]) <= LONGEST_SHARED, f"{names} share {len(shared[names])} lines: move them into align/\n" + "\n".join(shared[names])


def test_there_are_shipped_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_config_begins_with_its_command_and_loads(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    found = re.match(r"# rushes ([a-z-]+) (\S+)", first)
    assert found, "the first line is the command: # rushes COMMAND " + str(path.relative_to(ROOT))
    assert found[1] in COMMANDS and found[2] == str(path.relative_to(ROOT))
    load(importlib.import_module(COMMANDS[found[1]].module).Config, path, [])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_every_command_has_a_configuration_without_any_file(command: str) -> None:
    """No CONFIG means the tiny one: a shipped file, or else the defaults."""
    load(importlib.import_module(COMMANDS[command].module).Config, None, [])
