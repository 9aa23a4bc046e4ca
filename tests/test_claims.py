"""What documents claim to have measured: every file of results is linked and says a command that works today, and figures beside a link to a table stand in that table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_docs import DOCUMENTS, ROOT, check_command

RESULTS = ROOT / "recipes" / "bench" / "results"
TABLES = sorted(RESULTS.glob("*.md"))
READMES = [path for path in DOCUMENTS if path.parent != RESULTS]
LINK = re.compile(r"\]\((?P<target>[^)#\s]*results/[^)#\s]+\.md)\)")
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER})(?: %| points)? \[({NUMBER}), ({NUMBER})\]")
SCALES = (1.0, 100.0)
"""Of a number in a table: itself, or in percent."""


class Claim(NamedTuple):
    """A figure with its interval, and the tables that its paragraph or row links."""

    text: str
    figures: tuple[str, ...]
    tables: tuple[Path, ...]


def command_lines(table: str) -> list[str]:
    """The commands that a file of results says it was made by."""
    found = re.search(r"## Where the numbers come from\n\n```text\n(.*?)\n```", table, flags=re.S)
    return found[1].splitlines() if found else []


def claims(text: str, folder: Path) -> list[Claim]:
    """Figures with intervals in paragraphs, rows of tables and items of lists that link tables of results; what stands below is not theirs."""
    found = []
    for part in re.split(r"\n\n|\n(?=[*|] )", text):
        tables = tuple((folder / match["target"]).resolve() for match in LINK.finditer(part))
        found += [Claim(match[0], match.groups(), tables) for match in INTERVAL.finditer(part)] if tables else []
    return found


def stands_in(claim: Claim, table: str) -> bool:
    """Whether one line of the table has all figures of the claim, as they would be rounded; a difference may be told the other way round."""
    lines = [[float(number.replace(",", "")) for number in re.findall(rf"(?<![\w.]){NUMBER}(?![\w.])", line)] for line in table.splitlines()]
    return any(all(_has(line, figure, scale) for figure in claim.figures) for line in lines for scale in SCALES)


def _has(line: list[float], figure: str, scale: float) -> bool:
    digits = len(figure.partition(".")[2])
    return any(abs(abs(value) * scale - abs(float(figure.replace(",", "")))) <= 0.501 * 10**-digits for value in line)


def test_figures_are_found_where_they_stand_and_nowhere_else(tmp_path: Path) -> None:
    text = "Captions win by 25.8 points [19.5, 32.5] ([table](results/a.md)).\n\nElsewhere 1 [0, 2].\n\n| [b](results/b.md) | 97 %: +0.2 [-1, 3] |\n| c | 5 [4, 6] |\n"
    first, second = claims(text, tmp_path)
    assert first == Claim("25.8 points [19.5, 32.5]", ("25.8", "19.5", "32.5"), (tmp_path / "results" / "a.md",)) and second.figures == ("+0.2", "-1", "3")
    assert stands_in(first, "| x | 0.2581 [0.195, 0.3246] |") and stands_in(first, "| -25.75 | -32.5 | -19.51 |")
    assert not stands_in(first, "| 25.8 | 19.5 |\n| 32.5 |") and not stands_in(first, "| 25.7 | 19.5 | 32.5 |") and not stands_in(first, "v25.8 19.5 32.5")
    assert command_lines("# T\n\n## Where the numbers come from\n\n```text\nrushes bench a\nmake b\n```\n") == ["rushes bench a", "make b"] and not command_lines("# T\n")


def test_every_file_of_results_is_linked_from_a_readme() -> None:
    assert len(TABLES) > 30 and len(READMES) > 8
    told = "\n".join(path.read_text() for path in READMES)
    unlinked = [path.name for path in TABLES if f"results/{path.name})" not in told]
    told += "\n".join(path.read_text() for path in TABLES)
    unlinked += [path.name for path in RESULTS.iterdir() if path.suffix in (".svg", ".png") and f"{path.name})" not in told]
    assert not unlinked


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_commands_that_results_were_made_by_work_today(path: Path) -> None:
    lines = command_lines(path.read_text())
    assert lines, "a file of results says how it was made"
    for line in lines:
        program, _, words = line.partition(" ")
        if program == "make":
            assert re.search(rf"^{re.escape(words)}:", (ROOT / "Makefile").read_text(), flags=re.M), line
        else:
            assert program == "rushes", line
            check_command(words)


def test_figures_with_intervals_beside_a_link_stand_in_that_table() -> None:
    found = [(path, claim) for path in READMES for claim in claims(path.read_text(), path.parent)]
    assert len(found) >= 25
    wrong = [f"{path.relative_to(ROOT)}: {claim.text}" for path, claim in found if not any(stands_in(claim, table.read_text()) for table in claim.tables)]
    assert not wrong


def test_a_benchmark_that_is_named_for_a_claim_has_a_question_and_a_reader() -> None:
    """Every benchmark that there is stands in the table of `recipes/bench/README.md`."""
    from recipes.cli import benchmarks

    text = (ROOT / "recipes" / "bench" / "README.md").read_text()
    assert benchmarks() and not [name for name in benchmarks() if f"| `rushes bench {name}` |" not in text]
