"""Every code block of every Markdown file is run, in order, in a folder of its own that holds nothing but `recipes/configs`.

Python blocks of one file share one namespace. Bash blocks run line by line (a backslash joins lines) with the commands of this environment first on the path.
Blocks that call `make` are what CI itself runs. A block after `<!-- not run: reason -->` is left out: only for real checkpoints and GPUs.
What a document names must be there: files it links or names in `code`, what it names in them (`file.py:name`), and commands with their options.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from align.config import load
from base_model.errors import UserError
from recipes.cli import COMMANDS, arguments_of, benchmarks

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *(file for folder in ("align", "base_model", "reward", "recipes", ".github") for file in (ROOT / folder).rglob("*.md"))])
RUN, SHOWN = {"python", "bash"}, {"text", "json", "yaml", "mermaid"}
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```\s*$", flags=re.M | re.S)
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)")
CODE = re.compile(r"`([^`\n]+)`")
SOURCES = (".py", ".yaml", ".md", ".toml", ".txt")
OURS = ("align/", "base_model/", "reward/", "recipes/", "tests/", ".github/", ".ci/")
EXCUSE = re.compile(r"<!-- not run: (?P<reason>.+?) -->\s*\Z")


class Block(NamedTuple):
    line: int
    language: str
    code: str
    excuse: str | None


def blocks(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        excuse = EXCUSE.search(text[: match.start()])
        found.append(Block(text[: match.start()].count("\n") + 1, match["language"], match["code"], excuse["reason"] if excuse else None))
    return found


def commands(code: str) -> list[str]:
    """The lines of a bash block, joined at backslashes; comments and blank lines dropped."""
    joined = code.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def is_run(block: Block) -> bool:
    return block.language in RUN and block.excuse is None and not re.search(r"^\s*make \w", block.code, flags=re.M)


def named_files(text: str) -> set[str]:
    """Relative links, and words in `code` that name a source file or a place in this repository; placeholders (`<name>`, `CONFIG.yaml`) are not files."""
    prose = FENCE.sub("", text)
    links = {match["target"] for match in LINK.finditer(prose) if "://" not in match["target"]}
    words = {word for code in CODE.findall(prose) for word in code.split() if re.fullmatch(r"[\w./-]+", word)}
    return links | {word for word in words if word.endswith(SOURCES) or word.startswith(OURS)}


def places(name: str, document: Path) -> list[Path]:
    """What a name may mean: beside the document, from the root, or (a bare name) anywhere in the four packages and the tests."""
    found = [place for place in (document.parent / name, ROOT / name) if place.exists()]
    return found or ([] if "/" in name else [file for folder in OURS for file in (ROOT / folder).rglob(name)])


def named_code(text: str) -> set[tuple[str, str]]:
    """(file, name) of every `file.py:name` and `file.py:Class.name`."""
    return {(match[1], match[2]) for match in re.finditer(r"`([\w./-]+\.py):([A-Za-z_][\w.]*)", FENCE.sub("", text))}


def defined(path: Path) -> set[str]:
    """Functions, classes, `Class.method`, constants and attributes that a source file defines at its top."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found |= _names(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for each in node.body for name in _names(each)}
    return found


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def named_commands(text: str) -> set[str]:
    """What follows `rushes` in `code` and in bash blocks; usage lines with placeholders in brackets are cut before them."""
    lines = [line for block in blocks(text) if block.language == "bash" for line in commands(block.code)]
    found = [re.search(r"(?:^|[\s/])rushes ([a-z].*)", line) for line in [*lines, *CODE.findall(FENCE.sub("", text))]]
    return {match[1].partition("[")[0].strip() if not match[1].count("'") else match[1] for match in found if match}


def check_command(line: str) -> None:
    """Raises where the command, its configuration or one of its options is not known."""
    name, *rest = [word for word in shlex.split(line, comments=True) if word not in ("--resume", "--json", "--debug", "--help")]
    if name == "bench":
        assert not rest or rest[0].isupper() or rest[0] in benchmarks(), line
        module, rest = f"recipes.bench.{rest[0].replace('-', '_')}" if rest and not rest[0].isupper() else "", rest[1:]
    else:
        assert name in COMMANDS, line
        module = COMMANDS[name].module
    config, options = arguments_of(name, rest) if name in COMMANDS and name != "bench" and rest else (None, rest)
    if rest:
        load(importlib.import_module(module).Config, config and ROOT / config, options)


def test_blocks_commands_and_excuses_are_read_from_markdown() -> None:
    text = "a\n\n```python\nx = 1\n```\n\n<!-- not run: needs a GPU -->\n```bash\nrushes a \\\n  --b c\n# no\n\nrushes d\n```\n```text\nout\n```\n```bash\nmake demo\n```\n"
    first, second, third, fourth = blocks(text)
    assert first == Block(3, "python", "x = 1\n", None) and second.excuse == "needs a GPU" and third.excuse is None
    assert commands(second.code) == ["rushes a    --b c", "rushes d"]
    assert [is_run(block) for block in (first, second, third, fourth)] == [True, False, False, False]


def test_files_and_commands_are_read_from_markdown() -> None:
    text = "[a](b.md) ![c](d/e.png) [f](https://g.h/i.md) `j.py` and `python -m k/l.py <m>`, `align/n`, `o.json`, `[P.yaml]`\n```text\n`q.py`\n```\n"
    assert named_files(text) == {"b.md", "d/e.png", "j.py", "k/l.py", "align/n"}
    document = ROOT / "align" / "README.md"
    assert places("kernels.py", document) == [ROOT / "align" / "kernels.py"] and places("recipes/cli.py", document) == [ROOT / "recipes" / "cli.py"]
    assert places("nft.py", document) == [ROOT / "recipes" / "nft.py"] and not places("no_such.py", document) and not places("no/kernels.py", document)
    assert named_code("`a.py:f` and `b/c.py:D.g(x)`, `d.py`, `e.py:3`\n```text\n`h.py:i`\n```\n") == {("a.py", "f"), ("b/c.py", "D.g")}
    assert {"Gaussian", "Gaussian.kl", "Gaussian.mean", "kappa", "SINGULAR", "KL_UNITS"} < defined(ROOT / "align" / "kernels.py")
    text = "`rushes sft --seed 1`, `rushes bench NAME [--quick]`, `.venv/bin/rushes demo`, `rushes`\n```bash\nrushes generate --prompts '[\"a\"]'\n```\n"
    assert named_commands(text) == {"sft --seed 1", "bench NAME", "demo", "generate --prompts '[\"a\"]'"}
    check_command("sft --seed 1")
    for wrong in ("sfd", "bench nothing", "sft --sed 1", "sft no_such.yaml"):
        with pytest.raises((AssertionError, UserError)):
            check_command(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_function_and_command_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    missing = sorted(name for name in named_files(text) if not places(name, path))
    missing += [f"{file}:{name}" for file, name in sorted(named_code(text)) if not any(name in defined(place) for place in places(file, path))]
    assert not missing, f"{path.relative_to(ROOT)} names {missing}"
    for line in sorted(named_commands(text)):
        check_command(line)


def test_there_are_documents_with_blocks_to_run() -> None:
    assert any(is_run(block) for path in DOCUMENTS for block in blocks(path.read_text()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_code_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "configs").symlink_to(ROOT / "recipes" / "configs")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks(path.read_text()):
        place = f"{path.relative_to(ROOT)}:{block.line}"
        assert block.language in RUN | SHOWN, f"{place}: a block is one of {sorted(RUN | SHOWN)}, not {block.language!r}"
        assert block.excuse is None or re.search("GPU|checkpoint", block.excuse), f"{place}: only real checkpoints and GPUs excuse a block"
        if not is_run(block):
            continue
        if block.language == "python":
            exec(compile(block.code, place, "exec"), namespace)
            continue
        for command in commands(block.code):
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{place}: {command}\n{done.stderr}"
