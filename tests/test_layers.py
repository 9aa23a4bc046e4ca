"""Imports go one way, and the three readers of the built-in world do not know each other. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "base_model": {"base_model"},
    "align": {"align", "base_model"},
    "reward": {"reward", "base_model"},
    "recipes": {"recipes", "align", "reward", "base_model"},
}
HEAVY = {"transformers", "peft", "diffusers", "datasets", "av", "matplotlib", "tensorboard", "trl", "bitsandbytes", "accelerate", "pandas", "sklearn"}
HEAVY_EXCEPTIONS = {("align.run", "accelerate")}
READERS = {
    "eye": ("recipes.shapes.eye", "recipes.shapes.labelers"),
    "judge": ("recipes.shapes.judge",),
    "reward": ("reward",),
}
WORDS = {"recipes.shapes.prompts"}  # the names of colours, shapes and motions: not a way of reading pixels
OPTIMISED = (
    *("sft", "pretrain", "vae", "match", "pairs", "generate", "expand", "feedback", "guards", "check", "reward_model", "vlm_reward", "latent_reward", "ddpo", "grpo", "nft"),
    *("ppo", "dpo", "preferences", "reward_gradient", "safety_train", "caption", "caption_train"),
    *("shapes.eye", "shapes.train_eye", "shapes.labelers", "shapes.dataset"),
)


def modules() -> dict[str, Path]:
    """{"align.run": path} of every module of the four packages."""
    found = {}
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(nodes: list[ast.stmt] | ast.AST) -> set[str]:
    names: set[str] = set()
    for top in nodes if isinstance(nodes, list) else [nodes]:
        for node in ast.walk(top):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, "relative imports hide the layer"
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(MODULES[module].read_text())))


@cache
def inside(module: str) -> frozenset[str]:
    """The project's own modules that `module` imports, anywhere in it. A package's __init__ runs too, but is only followed where it is named."""
    return frozenset(name for name in imports_of(module) if name in MODULES)


def reach(start: tuple[str, ...], without: frozenset[str] = frozenset()) -> set[str]:
    """All modules `start` imports, directly or not, itself included; not through those in `without`."""
    seen: set[str] = set()
    todo = [name for name in MODULES if name in start or any(name.startswith(f"{prefix}.") for prefix in start if prefix in ALLOWED)]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo.extend(inside(module) - without)
    return seen


def test_there_is_something_to_look_at() -> None:
    assert len(MODULES) > 30
    assert "base_model.paths" in reach(("align.kernels",))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    package = module.partition(".")[0]
    foreign = {name for name in imports_of(module) if name.partition(".")[0] in {*ALLOWED, "tests"} - ALLOWED[package]}
    assert not foreign, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_heavy_libraries_are_imported_inside_functions(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    heavy = {name.partition(".")[0] for name in imported(list(at_import))} & HEAVY
    assert {(module, name) for name in heavy} <= HEAVY_EXCEPTIONS


@pytest.mark.parametrize("reader", sorted(READERS))
def test_the_three_readers_of_the_built_in_world_share_no_code(reader: str) -> None:
    mine = reach(READERS[reader])
    for other in READERS.keys() - {reader}:
        shared = {name for name in mine & reach(READERS[other]) if name not in WORDS and not name.startswith("base_model")}
        assert not shared, f"{reader} and {other} share {sorted(shared)}"


def test_readers_share_nothing_of_the_base_that_reads_pixels() -> None:
    closures = [reach(start) for start in READERS.values()]
    shared = set.union(*(a & b for i, a in enumerate(closures) for b in closures[:i])) - WORDS
    assert shared <= {"base_model", "base_model.errors", "base_model.types", "base_model.paths", "base_model.checkpoint"}, sorted(shared)


@pytest.mark.parametrize("recipe", OPTIMISED)
def test_what_is_trained_never_sees_the_judge(recipe: str) -> None:
    """SFT has samples judged on the way, for people to read: what `sample_grid.py` says goes into logs. Losses and steps of it are made without."""
    assert "recipes.shapes.judge" not in reach((f"recipes.{recipe}",), frozenset({"recipes.sample_grid"}))
    assert "recipes.shapes.judge" not in reach(("recipes.fit", "recipes.steps"))


def test_the_command_line_imports_nothing_heavy_before_a_command_is_known() -> None:
    tree = ast.parse(MODULES["recipes.cli"].read_text())
    at_import = imported([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)])
    ours = {name for name in at_import if name.partition(".")[0] in ALLOWED}
    assert all(name.startswith("base_model.errors") for name in ours)
    assert at_import & HEAVY == set() and not {"torch", "numpy", "pydantic", "yaml"} & at_import
