"""The README's code blocks run as they stand; its tables and the code name each other, papers included (that what it names exists: `tests/test_docs.py`)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from align import advantage, constraints, critic
from align.objectives import forward_process, policy_gradient, preference, regression, reward_gradient

ALIGN = Path(__file__).parents[2] / "align"
README = ALIGN / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
NAMED = re.findall(r"`([\w/]+\.py):(\w+)", TEXT)
MODULES = [*sorted((ALIGN / "objectives").glob("*.py")), *(ALIGN / f"{stem}.py" for stem in ("advantage", "constraints", "critic", "kernels", "trajectory", "windows"))]


def test_the_readme_has_code_blocks_tables_and_modules_to_look_at() -> None:
    assert len(BLOCKS) >= 4 and len(set(NAMED)) > 70 and len(MODULES) == 12


def test_the_code_blocks_of_the_readme_run_one_after_the_other() -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{README}, block {number}", "exec"), namespace)


def source(name: str) -> Path:
    """`policy_gradient.py`, `base_model/lora.py` -> the file that is meant."""
    places = [place / name for place in (ALIGN, ALIGN / "objectives", ALIGN.parent) if (place / name).is_file()]
    assert len(places) == 1, f"{name} is {len(places)} files"
    return places[0]


def public(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """A module's public functions and classes, read from the source."""
    body = ast.parse(path.read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_function_of_the_maths_is_in_the_readme(path: Path) -> None:
    missing = public(path).keys() - {name for file, name in NAMED if source(file) == path}
    assert not missing and public(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_function_of_the_maths_has_a_docstring(path: Path) -> None:
    assert all(ast.get_docstring(node) for node in public(path).values())


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


PAPERS = [cells(row) for row in TEXT.split("## From a paper")[1].split("\n## ")[0].splitlines() if row.startswith("|")][2:]
CITATION = re.compile(r"\d{4}\.\d{5}|[A-Z]\w+(?: et al\.| & \w+)? \d{4}$")  # of a first cell: an arXiv number, or authors and year


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row[0])
def test_the_code_a_paper_leads_to_leads_back_to_the_paper(row: list[str]) -> None:
    paper, equation, code = row
    (citation,) = CITATION.findall(paper)
    named = re.findall(r"`([\w/]+\.py):(\w+)`", code)
    assert equation and named
    for file, name in named:
        module = ast.parse(source(file).read_text())
        said = f"{ast.get_docstring(module)} {ast.get_docstring(public(source(file))[name])}"
        assert citation in said, f"{file}:{name} does not cite {citation}"


def test_every_paper_that_the_maths_cites_is_in_the_table() -> None:
    listed = {citation for paper, _, _ in PAPERS for citation in CITATION.findall(paper)}
    cited = {identifier for path in MODULES for identifier in re.findall(r"(\d{4}\.\d{5})", path.read_text())}
    assert len(listed) > 35 and cited <= listed, sorted(cited - listed)


ROWS = {name: cells(row) for row in TEXT.splitlines() for file, name in re.findall(r"^\| `([\w/]+\.py):(\w+)", row)}


def returning(*kinds: str) -> list[ast.FunctionDef]:
    """The public functions of the maths that return one of these."""
    nodes = [node for path in MODULES for node in public(path).values() if isinstance(node, ast.FunctionDef)]
    return [node for node in nodes if node.returns is not None and ast.unparse(node.returns) in kinds]


@pytest.mark.parametrize("node", returning("Loss", "Advantage", "Advantages"), ids=lambda node: node.name)
def test_every_objective_and_advantage_has_its_equation_symbols_source_unit_and_known_failure(node: ast.FunctionDef) -> None:
    assert len(ROWS[node.name]) == 6 and all(ROWS[node.name]), ROWS[node.name]


@pytest.mark.parametrize("node", returning("Loss"), ids=lambda node: node.name)
def test_every_objective_says_its_paper_and_its_known_failure_where_it_is_defined(node: ast.FunctionDef) -> None:
    said = ast.get_docstring(node) or ""
    assert "nown failure" in said and re.search(r"arXiv \d{4}\.\d{5}", said)


def test_there_are_objectives_to_look_at() -> None:
    assert len(returning("Loss")) == 8 and len(returning("Loss", "Advantage", "Advantages")) == 12


def test_every_table_has_as_many_cells_in_each_row_as_in_its_head() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table[:80]


DOCUMENTED = {
    **policy_gradient.METRICS,
    **critic.METRICS,
    **forward_process.METRICS,
    **preference.METRICS,
    **reward_gradient.METRICS,
    **regression.METRICS,
    **advantage.METRICS,
    **constraints.metrics(["flash"]),
}


def test_every_metric_of_the_maths_is_documented_with_its_own_sentence() -> None:
    for name, sentence in DOCUMENTED.items():
        assert f"| `{name}` | {sentence} |" in TEXT


def test_every_metric_that_is_logged_has_a_sentence() -> None:
    one, group = torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    price = constraints.Multiplier("flash", limit=0.1)
    logged = {
        **policy_gradient.ppo_clip(one, one, one, 0.1).stats,
        **policy_gradient.score_function(one, one).stats,
        **policy_gradient.kl_mask(one, one, one, one, 0.1).stats,
        **critic.value_loss(one, one, one, 0.1).stats,
        **forward_process.signed_flow_matching(one[:, None], one[:, None], one[:, None], one, 1.0).stats,
        **preference.flow_dpo(one, one, one, one, 1.0).stats,
        **reward_gradient.reward_ascent(one).stats,
        **regression.flow_matching(one).stats,
        **advantage.group_advantage(group, 2).stats,
        **advantage.gdpo_advantage(group[:, None], [1.0], 2).stats,
        **advantage.PromptStatistics().advantage(["a"] * 4, group).stats,
        **constraints.constrained_advantage(one, {"flash": one}, [price], 2).stats,
        **price.stats(),
    }
    assert set(DOCUMENTED) - set(logged) == {"constraint/flash/all_violating"}
    assert set(logged) <= set(DOCUMENTED)
