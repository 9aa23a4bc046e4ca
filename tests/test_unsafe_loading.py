"""Nothing that is loaded can run code: read from the source of all four packages. Only what is written plainly is found; `tests/test_canaries.py` offers crafted files besides."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_layers import MODULES

MODULES_OF_PICKLES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.package", "torch.hub", "torch.serialization", "runpy")
CALLED = {
    *("torch.load", "torch.jit.load", "torch.export.load", "pandas.read_pickle", "numpy.core.multiarray.fromstring", "os.system", "os.popen", "safetensors.torch.load_model"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all", "yaml.full_load_all", "yaml.UnsafeLoader", "yaml.FullLoader", "yaml.Loader"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__"),
}
SAFE_ONLY = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "use_safetensors": True, "shell": False}
WITHOUT_WEIGHTS = ("Config", "Tokenizer", "TokenizerFast", "Scheduler", "Processor", "_without_weights")


def aliases(tree: ast.AST) -> dict[str, str]:
    """What names of the module stand for: {"np": "numpy", "load": "torch.load"}."""
    found = {name: f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, known: dict[str, str]) -> str:
    """The full name of `np.load`, "" for what has none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    inner = dotted(node.value, known) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def offences(source: str) -> list[str]:
    """What in a module could run code out of a file."""
    tree = ast.parse(source)
    known = aliases(tree)
    safe_loaders = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and any(dotted(base, known) == "yaml.SafeLoader" for base in node.bases)}
    return [f"line {line}: {what}" for line, what in _offences(tree, known, {"yaml.SafeLoader", *safe_loaders})]


def _offences(tree: ast.AST, known: dict[str, str], safe_loaders: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from ((node.lineno, name) for name in names if name in CALLED or any(name == bad or name.startswith(f"{bad}.") for bad in MODULES_OF_PICKLES))
        name = dotted(node, known) if isinstance(node, ast.Name | ast.Attribute) else ""
        if name in CALLED or any(name.startswith(f"{bad}.") for bad in MODULES_OF_PICKLES):
            yield node.lineno, name  # type: ignore[attr-defined]
        if isinstance(node, ast.keyword) and node.arg in SAFE_ONLY and not (isinstance(node.value, ast.Constant) and node.value.value is SAFE_ONLY[node.arg]):
            yield node.value.lineno, f"{node.arg} is not {SAFE_ONLY[node.arg]}"
        if isinstance(node, ast.Dict):
            yield from ((node.lineno, f"{key.value} in a mapping") for key in node.keys if isinstance(key, ast.Constant) and key.value in SAFE_ONLY)
        if isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in _calls(node, known, safe_loaders))


def _calls(node: ast.Call, known: dict[str, str], safe_loaders: set[str]) -> Iterator[str]:
    name, told = dotted(node.func, known), {keyword.arg for keyword in node.keywords}
    loaders = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "Loader")]
    if name in ("yaml.load", "yaml.load_all") and not any(dotted(value, known) in safe_loaders for value in loaders):
        yield f"{name} without a safe loader"
    got = node.args[1].value if name == "getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant) else ""
    if got and f"{dotted(node.args[0], known)}.{got}" in CALLED:
        yield f"getattr of {got}"
    if name == "numpy.load" and len(node.args) > 2:
        yield "numpy.load with allow_pickle by its place"
    if not isinstance(node.func, ast.Attribute):
        return
    if node.func.attr == "recv" and not node.args:
        yield "recv of a connection, which unpickles"
    if node.func.attr == "from_pretrained":
        kind = dotted(node.func.value, known).rpartition(".")[2]
        if re.match("Auto[A-Z]", kind) and "trust_remote_code" not in told:
            yield f"{kind} without trust_remote_code=False"
        if not kind.endswith(WITHOUT_WEIGHTS) and "use_safetensors" not in told:
            yield f"{kind}.from_pretrained without use_safetensors=True"


PLANTED = [
    "import pickle",
    "from pickle import loads",
    "import dill as p",
    "import cloudpickle",
    "import joblib\njoblib.load('x')",
    "def f():\n    import _pickle",
    "import torch\ntorch.load('x')",
    "import torch as t\nt.load('x', weights_only=True)",
    "from torch import load",
    "from torch import load as read\nread('x')",
    "import torch\nread = torch.load",
    "import torch\ngetattr(torch, 'load')('x')",
    "import torch\ntorch.jit.load('x')",
    "import torch\ntorch.hub.load('a', 'b')",
    "read(path, weights_only=False)",
    "read(path, weights_only=flag)",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import numpy as np\nnp.load('x', None, True)",
    "import pandas as pd\npd.read_pickle('x')",
    "import yaml\nyaml.load(text)",
    "import yaml\nyaml.load(text, Loader=yaml.Loader)",
    "import yaml\nyaml.load(text, yaml.UnsafeLoader)",
    "import yaml\nclass Own(yaml.Loader): ...\nyaml.load(text, Loader=Own)",
    "from yaml import full_load",
    "eval('1')",
    "exec(text)",
    "__import__(name)",
    "import os\nos.system('x')",
    "import subprocess\nsubprocess.run('x', shell=True)",
    "from transformers import AutoModel\nAutoModel.from_pretrained('x', use_safetensors=True)",
    "from transformers import AutoModel\nAutoModel.from_pretrained('x', use_safetensors=True, trust_remote_code=True)",
    "from transformers import AutoModel\nAutoModel.from_pretrained('x', use_safetensors=True, trust_remote_code=trusted)",
    "from transformers import AutoModel\nAutoModel.from_pretrained('x', trust_remote_code=False)",
    "from diffusers import AutoencoderKL as K\nK.from_pretrained('x', use_safetensors=False)",
    "network_class.from_pretrained('x')",
    "given = {'trust_remote_code': True}",
    "connection.recv()",
    "import marshal",
    "import shelve",
]
PEER = "recipes.bench.loader"
"""Reads files of `torch.load` beside ours, for that is what is measured."""
HARMLESS = [
    "import safetensors.torch\nsafetensors.torch.load(body)",
    "import yaml\nclass Own(yaml.SafeLoader): ...\nyaml.load(text, Loader=Own)\nyaml.safe_load(text)",
    "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
    "model.eval()\nrunner.exec()\nre.compile('x')",
    "from transformers import AutoTokenizer, CLIPTextModel\nAutoTokenizer.from_pretrained('x', trust_remote_code=False)\nCLIPTextModel.from_pretrained('x', use_safetensors=True)",
    "socket.recv(4)\nconnection.recv_bytes()",
    "def load(path): ...\nload('x')",
]


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_offence_is_found(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_harmless_lines_are_let_through(source: str) -> None:
    assert not offences(source)


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {PEER}))
def test_no_module_loads_what_could_run_code(module: str) -> None:
    assert not offences(Path(MODULES[module]).read_text())


def test_the_peer_of_a_benchmark_reads_only_what_it_wrote_itself_and_only_weights() -> None:
    source = Path(MODULES[PEER]).read_text()
    found = offences(source)
    assert len(found) == 2 and all(offence.endswith("torch.load") for offence in found)
    assert source.count("torch.load(folder") == source.count(".pt\", weights_only=True") == 2
