"""The mutation runner changes what computes, and nothing else, and puts everything back."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.mutate import MODULES, ROOT, Instead, mutants, related, report

SOURCE = '''"""Text 1 + 1."""
from typing import Literal
import math
Word = Literal["a", "b"]
LIMIT = 3

def f(x: int | None, y: float = 2.0) -> float | None:
    """More 2 * 2."""
    if x is None or not x > 1:
        raise ValueError(f"{x + 1} is -5")
    x += 1
    return (x.abs() if y else math.sqrt(x)) / 4
'''


def test_every_mutant_differs_in_one_place_and_text_and_types_stay(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(SOURCE)
    found = [(mutant.line, mutant.kind) for mutant in mutants(file, "m")]
    want = [(5, "number")]
    want += [(9, "comparison")] * 3 + [(9, "number")] + [(9, "operator")] * 2
    want += [(10, "statement"), (11, "number"), (11, "statement")]
    want += [(12, "condition"), (12, "method call"), (12, "number"), (12, "operator"), (12, "return")]
    assert found == want
    assert all(mutant.before != mutant.after for mutant in mutants(file, "m"))
    assert [mutant[:4] for mutant in mutants(file, "m")] == [mutant[:4] for mutant in mutants(file, "m")], "each change is undone before the next"
    module: dict[str, object] = {}
    exec(next(mutant.code for mutant in mutants(file, "m") if mutant.kind == "number"), module)
    assert module["LIMIT"] == 4 and module["__doc__"] == "Text 1 + 1."


def test_every_module_of_the_maths_is_there_has_mutants_and_tests_and_is_found_under_its_name() -> None:
    for module in MODULES:
        ast.parse((ROOT / module).read_text())
        assert len(list(mutants(ROOT / module, module))) > 8 and related(module)
    code = compile("", "a", "exec")
    assert Instead("a.b", code).find_spec("a.b") is not None and Instead("a.b", code).find_spec("a") is None
    package = Instead("a", code, ROOT).find_spec("a")
    assert package is not None and package.submodule_search_locations == [str(ROOT)], "the modules of a package are still found"


def test_a_report_counts_what_was_noticed(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    line = '{"module": "m", "number": %d, "line": 3, "kind": "number", "before": "x", "after": "y", "outcome": "%s"}\n'
    file.write_text("".join(line % (k, outcome) for k, outcome in enumerate(["killed", "timeout", "killed", "survived"])))
    assert "| m | 4 | 2 | 1 | 1 | 75.0 |" in report(file) and report(file).endswith("m:3: x  ->  y")
