"""The README's code blocks run as they stand; its tables and the code name each other."""

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
NAMED = re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)
MODULES = [*sorted(path for path in (ALIGN / "objectives").glob("*.py") if path.stem != "__init__"), *(ALIGN / f"{stem}.py" for stem in ("advantage", "critic", "constraints"))]


def test_the_readme_has_code_blocks_tables_and_modules_to_look_at() -> None:
    assert len(BLOCKS) >= 4 and len(set(NAMED)) > 45 and len(MODULES) == 8


def test_the_code_blocks_of_the_readme_run_one_after_the_other() -> None:
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"{README}, block {number}", "exec"), namespace)


def source(name: str) -> Path:
    """`policy_gradient.py`, `base_model/lora.py` -> the file that is meant."""
    places = [place / name for place in (ALIGN, ALIGN / "objectives", ALIGN.parent) if (place / name).is_file()]
    assert len(places) == 1, f"{name} is {len(places)} files"
    return places[0]


def public(path: Path) -> dict[str, str]:
    """{name: docstring with those of its public methods} of a module's public functions and classes, read from the source."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found[node.name] = ast.get_docstring(node) or ""
    return found


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_what_the_readme_names_is_there(file: str, name: str) -> None:
    assert name in public(source(file))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_function_of_the_maths_is_in_a_table_of_the_readme(path: Path) -> None:
    missing = {name for name in public(path) if (path.name, name) not in NAMED}
    assert not missing and public(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_every_public_function_of_the_maths_has_a_docstring(path: Path) -> None:
    assert all(public(path).values())


PAPERS = [line for line in TEXT.split("## From a paper")[1].split("\n## ")[0].splitlines() if "arXiv" in line]


@pytest.mark.parametrize("row", PAPERS, ids=lambda row: row.split("arXiv ")[1][:10])
def test_the_code_a_paper_leads_to_leads_back_to_the_paper(row: str) -> None:
    (identifier,) = re.findall(r"arXiv (\d{4}\.\d{5})", row)
    code = re.findall(r"`([\w/]+\.py):(\w+)`", row)
    assert code
    for file, name in code:
        module = ast.get_docstring(ast.parse(source(file).read_text())) or ""
        assert identifier in public(source(file))[name] + module, f"{file}:{name} does not cite arXiv {identifier}"


def test_every_paper_that_the_maths_cites_is_in_the_table() -> None:
    listed = {identifier for row in PAPERS for identifier in re.findall(r"arXiv (\d{4}\.\d{5})", row)}
    cited = {identifier for path in MODULES for identifier in re.findall(r"(\d{4}\.\d{5})", path.read_text())}
    assert len(listed) > 25 and cited <= listed, sorted(cited - listed)


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
