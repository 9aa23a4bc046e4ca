"""What others may build on does not change by accident: every name that a README names or imports from `align`, `base_model` and `reward` stands in `public_api.txt` with its
parameters. `python -m tests.test_public_api` writes the list anew; a change of it belongs into the changelog.

Also: each has a docstring, the four packages import in a moment, and nothing heavy comes with them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_docs import DOCUMENTS, ROOT, blocks, named_code, places

LIST = Path(__file__).with_name("public_api.txt")
PACKAGES = ("align", "base_model", "reward")
MOMENT = 0.15
"""Seconds of CPU time to import a package."""


def named_in_blocks(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) that Python blocks import from the three packages."""
    for block in blocks(text):
        if block.language == "python":
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
                    yield from ((node.module, alias.name) for alias in node.names)


def named_in_text(text: str, document: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of every `file.py:name` that lies in the three packages; of `Class.method` the class."""
    for file, name in named_code(text):
        for place in places(file, document):
            parts = place.resolve().relative_to(ROOT).with_suffix("").parts
            if parts[0] in PACKAGES:
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), name.partition(".")[0]


def public() -> list[tuple[str, str]]:
    """Every public (module, name), where it is defined; the app is a program and no library, and what begins with an underscore is nobody's."""
    found = {each for path in DOCUMENTS for text in [path.read_text()] for each in (*named_in_blocks(text), *named_in_text(text, path))}
    kept = set()
    for module, name in found:
        thing = getattr(importlib.import_module(module), name, None)
        home = getattr(thing, "__module__", module) if inspect.isclass(thing) or inspect.isfunction(thing) else module
        if thing is not None and not module.startswith("reward.app") and not any(part.startswith("_") for part in (*module.split("."), name)):
            kept.add((home, name))
    return sorted(kept)


def lines_of(module: str, name: str) -> Iterator[str]:
    """A function with its parameters; a class with those of its `__init__`, a protocol without, and its own public methods; anything else by name."""
    thing = getattr(importlib.import_module(module), name)
    if not callable(thing) or not hasattr(thing, "__module__") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
        yield f"{module}.{name}"
        return
    yield f"{module}.{name}{'' if getattr(thing, '_is_protocol', False) else parameters(thing)}"
    if inspect.isclass(thing):
        for method, function in sorted(vars(thing).items()):
            if not method.startswith("_") and isinstance(function, staticmethod | classmethod):
                yield f"{module}.{name}.{method}{parameters(function.__func__)}"
            elif not method.startswith("_") and inspect.isfunction(function):
                yield f"{module}.{name}.{method}{parameters(function)}"
            elif not method.startswith("_") and isinstance(function, property):
                yield f"{module}.{name}.{method}"


def parameters(thing: object) -> str:
    """Names, kinds, and which have a default; no annotations, no values."""
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "(...)"
    told, star = [], False
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not star:
            told.append("*")
        star = star or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        mark = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        told.append(f"{mark}{each.name}{'' if each.default is each.empty else '=...'}")
    return f"({', '.join(told)})"


def listing() -> str:
    return "\n".join(line for module, name in public() for line in lines_of(module, name)) + "\n"


def test_names_are_read_from_documents_with_their_parameters() -> None:
    text = "```python\nfrom align.kernels import ODE, kappa\nimport torch\n```\n`kernels.py:Gaussian.log_prob` and `recipes/cli.py:main`\n"
    assert set(named_in_blocks(text)) == {("align.kernels", "ODE"), ("align.kernels", "kappa")}
    assert set(named_in_text(text, ROOT / "align" / "README.md")) == {("align.kernels", "Gaussian")}

    def function(a: int, b: int = 1, *, c: int, d: int = 2) -> None: ...

    assert parameters(function) == "(a, b=..., *, c, d=...)"
    gaussian = list(lines_of("align.kernels", "Gaussian"))
    assert gaussian[0].startswith("align.kernels.Gaussian(mean, std") and "align.kernels.Gaussian.log_prob(self, x)" in gaussian


def test_what_is_public_is_what_the_list_says() -> None:
    told, found = LIST.read_text().splitlines(), listing().splitlines()
    assert len(found) > 300
    gone, new = sorted(set(told) - set(found)), sorted(set(found) - set(told))
    assert told == found, f"gone: {gone}; new: {new}. If that is meant: python -m tests.test_public_api, and say so in .github/CHANGELOG.md"


def test_everything_public_has_a_docstring() -> None:
    bare = []
    for module, name in public():
        thing = getattr(importlib.import_module(module), name)
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and not (thing.__doc__ or "").strip():
            bare.append(f"{module}.{name}")
    assert not bare


@pytest.mark.timed
@pytest.mark.parametrize("package", [*PACKAGES, "recipes"])
def test_a_package_is_imported_in_a_moment_and_brings_nothing_heavy(package: str) -> None:
    heavy = "sorted({'torch', 'numpy', 'transformers', 'av'} & set(sys.modules))"
    code = f"import sys, time; begun = time.process_time(); import {package}; print(time.process_time() - begun, {heavy})"
    told = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(maxsplit=1) for _ in range(3)]
    assert {brought.strip() for _, brought in told} == {"[]"} and min(float(seconds) for seconds, _ in told) < MOMENT


def test_the_extras_are_those_that_documents_name() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    assert {"app", "judges", "gpu", "provenance", "dev"} <= set(extras)
    named = [each for extra in extras.values() for each in extra if each.startswith("rushes[")]
    assert named and all(set(each[len("rushes[") : -1].split(",")) <= set(extras) for each in named)


if __name__ == "__main__":
    LIST.write_text(listing())
