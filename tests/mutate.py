"""Are the tests of the maths able to fail? Every small change of a module, one at a time, and whether its tests notice (`make mutate`; not part of CI).

    python -m tests.mutate align/kernels.py --shard 1/4 --out mutants.jsonl
    python -m tests.mutate --report mutants.jsonl

A change is of an operator, a comparison, a condition, a number, a truth value, a method call (left out), a return value (None) or a whole statement (left out); text, types,
decorators and the defaults of arguments and fields stay as they are. Each mutant lives in memory, in a forked process that runs only the module's tests: no file is touched, so
runs may go side by side. Killed is what fails a test, cannot be imported or takes too long. A second run with the same --out goes on where the first ended.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.abc
import importlib.machinery
import json
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OBJECTIVES = sorted(f"align/objectives/{path.name}" for path in (ROOT / "align" / "objectives").glob("*.py"))
MODULES = [*(f"align/{name}.py" for name in ("kernels", "trajectory", "windows", "advantage", "constraints", "critic")), *OBJECTIVES, "base_model/lora.py"]
MORE_TESTS = {
    "align/kernels.py": ["test_trajectory"],
    "align/trajectory.py": ["test_policy_gradient"],
    "align/objectives/__init__.py": ["test_regression", "test_policy_gradient"],
}

PYTEST = ["-x", "--assert=plain", "--tb=no", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-m", "not slow"]  # nobody reads what they say: quick
SWAPPED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}


class Mutant(NamedTuple):
    """One change."""

    line: int
    kind: str
    before: str
    after: str
    code: CodeType


# Making mutants


def mutants(path: Path, name: str) -> Iterator[Mutant]:
    """Every mutant of the module, in the order of its lines."""
    tree = ast.parse(path.read_text())
    found = []
    for change in _changes(tree, frozenset(_imported(tree))):
        kind, statement, apply, undo = change
        before = ast.unparse(statement)
        apply()
        after = ast.unparse(statement)
        code = compile(ast.fix_missing_locations(ast.parse(ast.unparse(tree))), name, "exec")
        undo()
        found.append(Mutant(statement.lineno, kind, *_difference(before, after), code))
    yield from sorted(found, key=lambda mutant: (mutant.line, mutant.kind, mutant.before, mutant.after))


Change = tuple[str, ast.stmt, Callable[[], object], Callable[[], object]]


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)


def _changes(tree: ast.Module, imported: frozenset[str]) -> Iterator[Change]:
    for body in _bodies(tree):
        for statement in list(body):
            yield from _of_statement(body, statement)
            for parent, field, index, node in _expressions(statement):
                for kind, new in _of_expression(node, imported):
                    yield kind, statement, _setter(parent, field, index, new), _setter(parent, field, index, node)


def _bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    """The statements of all functions, methods and branches; of the module and of classes only what computes."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list) and not isinstance(node, ast.Module | ast.ClassDef):
                yield body
        if isinstance(node, ast.Module):
            yield [each for each in node.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)]


def _of_statement(body: list[ast.stmt], statement: ast.stmt) -> Iterator[Change]:
    docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    where = body.index(statement)
    if isinstance(statement, ast.Raise | ast.AugAssign | ast.Expr) and not docstring:
        yield "statement", statement, lambda: body.__setitem__(where, ast.Pass()), lambda: body.__setitem__(where, statement)
    if isinstance(statement, ast.Return) and statement.value is not None and not isinstance(statement.value, ast.Constant):
        value = statement.value
        yield "return", statement, lambda: setattr(statement, "value", ast.Constant(None)), lambda: setattr(statement, "value", value)


def _expressions(statement: ast.stmt) -> Iterator[tuple[ast.AST, str, int | None, ast.expr]]:
    """(parent, field, index, node) of the expressions of one statement; not of statements inside it, of types, of text or of what an error says."""
    if isinstance(statement, ast.Raise | ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
        return
    todo: list[ast.AST] = [statement]
    while todo:
        parent = todo.pop()
        for field, value in ast.iter_fields(parent):
            if field == "annotation" or isinstance(parent, ast.JoinedStr | ast.Assert):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.expr):
                    yield parent, field, index, node
                if isinstance(node, ast.expr | ast.keyword | ast.comprehension):
                    todo.append(node)


def _of_expression(node: ast.expr, imported: frozenset[str]) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for other in SWAPPED.get(type(node.op), ()):
            new = ast.BinOp(node.left, other(), node.right) if isinstance(node, ast.BinOp) else ast.BoolOp(other(), node.values)  # type: ignore[arg-type]
            yield "operator", new
    elif isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            for other in SWAPPED.get(type(op), ()):
                yield "comparison", ast.Compare(node.left, [*node.ops[:k], other(), *node.ops[k + 1 :]], node.comparators)  # type: ignore[list-item]
    elif isinstance(node, ast.UnaryOp):
        yield "operator", node.operand
    elif isinstance(node, ast.IfExp):
        yield "condition", ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth value", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "number", ast.Constant(node.value + 1 if isinstance(node.value, int) else 1.5 * node.value or 1.0)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if not (isinstance(owner, ast.Name) and owner.id in {*imported, "self"}):
            yield "method call", owner


def _setter(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> Callable[[], object]:
    if index is None:
        return lambda: setattr(parent, field, node)
    return lambda: getattr(parent, field).__setitem__(index, node)


def _difference(before: str, after: str) -> tuple[str, str]:
    """The first line that differs, before and after."""
    for a, b in zip(before.splitlines(), after.splitlines(), strict=False):
        if a != b:
            return a.strip(), b.strip()
    return before.splitlines()[0], "pass" if after == before else after.splitlines()[0]


# Running them


class Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module other code. `folder` is where a package has its modules."""

    def __init__(self, name: str, code: CodeType, folder: Path | None = None) -> None:
        self.name, self.code, self.folder = name, code, folder

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, origin=name, is_package=self.folder is not None)
        if self.folder is not None:
            spec.submodule_search_locations = [str(self.folder)]
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


def related(module: str) -> list[str]:
    """The test files of a module, its own first."""
    names = [f"test_{Path(module).stem}", *MORE_TESTS.get(module, [])]
    files = [ROOT / "tests" / Path(module).parts[0] / f"{name}.py" for name in names]
    return [str(file.relative_to(ROOT)) for file in files if file.exists()]


def outcome(module: str, code: CodeType | None, seconds: int) -> str:
    """killed, survived or timeout, of the module's tests in a process of their own, which ends itself after so many seconds of work (ten times as many on the clock).

    `code` None is the module as it is.
    """
    package = module.endswith("/__init__.py")
    name = module.removesuffix("/__init__.py" if package else ".py").replace("/", ".")
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(10 * seconds)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        if code is not None:
            sys.meta_path.insert(0, Instead(name, code, (ROOT / module).parent if package else None))
        import pytest

        os._exit(int(pytest.main([*PYTEST, *related(module)])))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if -status in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM):
        return "timeout"
    return "killed" if status else "survived"


def run(module: str, shard: tuple[int, int], out: Path) -> None:
    """Appends one line a mutant of this shard to `out`, leaving out those that are there. Raises SystemExit where the tests fail without any change."""
    _warm_up(module)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if outcome(module, None, 600) != "survived":
        raise SystemExit(f"the tests of {module} fail as it is: {', '.join(related(module)) or 'it has none'}. Mend them first")
    seconds = 5 + round(3 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before))
    known = {(line["module"], line["number"]) for line in read(out)}
    all_of_them = list(enumerate(mutants(ROOT / module, module)))
    mine = [(number, mutant) for number, mutant in all_of_them if number % shard[1] == shard[0] - 1 and (module, number) not in known]
    for number, mutant in mine:
        found = outcome(module, mutant.code, seconds)
        line = {"module": module, "number": number, "of": len(all_of_them), **mutant._replace(code=None)._asdict(), "outcome": found}  # type: ignore[arg-type]
        with out.open("a") as file:
            file.write(json.dumps({key: value for key, value in line.items() if key != "code"}) + "\n")


def _warm_up(module: str) -> None:
    """What every test process would import and set up for itself."""
    import pytest  # noqa: F401
    import torch
    import torch.distributions
    import torch.testing

    if module == "base_model/lora.py":
        import peft  # noqa: F401
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.distributions.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    gc.freeze()


def read(out: Path) -> list[dict[str, object]]:
    """What is known of each mutant, once."""
    lines = [dict(json.loads(line)) for line in out.read_text().splitlines()] if out.exists() else []
    return list({(line["module"], line["number"]): line for line in lines}.values())


def report(out: Path) -> str:
    """A table of modules, one of kinds, and the survivors."""
    lines = read(out)
    text = []
    for title, key in (("module", "module"), ("change", "kind")):
        counts = {group: Counter(line["outcome"] for line in lines if line[key] == group) for group in dict.fromkeys(line[key] for line in lines)}
        text += [f"| {title} | mutants | killed | timeout | survived | killed % |", "| --- | --- | --- | --- | --- | --- |"]
        for group, count in counts.items():
            noticed = count["killed"] + count["timeout"]
            text.append(f"| {group} | {count.total()} | {count['killed']} | {count['timeout']} | {count['survived']} | {100 * noticed / count.total():.1f} |")
        text.append("")
    text += [f"{line['module']}:{line['line']}: {line['before']}  ->  {line['after']}" for line in lines if line["outcome"] == "survived"]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("modules", nargs="*", help=f"default: {' '.join(MODULES)}")
    parser.add_argument("--shard", default="1/1", help="which part of the mutants, as 2/4")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--report", type=Path, help="print the report of a file instead of running")
    asked = parser.parse_args()
    if asked.report is not None:
        print(report(asked.report))
        return
    part, _, parts = asked.shard.partition("/")
    for module in asked.modules or MODULES:
        run(module, (int(part), int(parts)), asked.out)
    print(report(asked.out))


if __name__ == "__main__":
    main()
