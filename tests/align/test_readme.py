"""The README's code blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from align import advantage, constraints
from align.objectives import policy_gradient, regression

README = Path(__file__).parents[2] / "align" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_the_readme_has_code_blocks() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_block_of_the_readme_runs(block: str) -> None:
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})


DOCUMENTED = {**policy_gradient.METRICS, **regression.METRICS, **advantage.METRICS, **constraints.metrics(["flash"])}


def test_every_metric_of_the_maths_is_documented_with_its_own_sentence() -> None:
    readme = README.read_text()
    for name, sentence in DOCUMENTED.items():
        assert f"| `{name}` | {sentence} |" in readme


def test_every_metric_that_is_logged_has_a_sentence() -> None:
    one, group = torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    price = constraints.Multiplier("flash", limit=0.1)
    logged = {
        **policy_gradient.ppo_clip(one, one, one, 0.1).stats,
        **regression.flow_matching(one).stats,
        **advantage.group_advantage(group, 2).stats,
        **advantage.PromptStatistics().advantage(["a"] * 4, group).stats,
        **constraints.constrained_advantage(one, {"flash": one}, [price], 2).stats,
        **price.stats(),
    }
    assert set(DOCUMENTED) - set(logged) == {"constraint/flash/all_violating"}
    assert set(logged) <= set(DOCUMENTED)
