"""Runs in one process and in two, whole and sharded: the same numbers, the same files, and the same end after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from align.run import latest_checkpoint, read_metrics
from base_model.checkpoint import load_weights

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
LORA = ("--lora", "true")


class Ended(NamedTuple):
    statuses: list[int]
    said: str  # by all processes


class Server:
    """Sends runs to tests/align/ranks.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, 0
        command = [sys.executable, "-m", "tests.align.ranks"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def ask(self, out: Path, *words: str, processes: int = 1) -> Ended:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sent += 1
        log = self.folder / f"log-{self.sent}"
        print(json.dumps({"processes": processes, "words": ["--out", str(out), *words], "log": str(log)}), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        return Ended(statuses, "".join(Path(f"{log}-{rank}").read_text() for rank in range(processes)))

    def train(self, out: Path, *words: str, processes: int = 1) -> dict[str, Tensor]:
        """The weights of a run, the same in all its processes."""
        ended = self.ask(out, *words, processes=processes)
        assert ended.statuses == [0] * processes, ended.said
        finals = [load_weights(out / f"final-{rank}.safetensors")[0] for rank in range(processes)]
        assert all(torch.equal(final[name], finals[0][name]) for final in finals for name in finals[0])
        return finals[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    served = Server(tmp_path_factory.mktemp("logs"))
    yield served
    served.process.communicate(timeout=60)


def differ(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest distance of a tensor, over the norm of its own; of one that is zero, the distance."""
    assert found.keys() == wanted.keys() and all(found[name].shape == wanted[name].shape for name in wanted)
    return max(float((found[name].double() - wanted[name].double()).norm() / max(1e-3, float(wanted[name].double().norm()))) for name in wanted)


def lines(out: Path, name: str) -> Tensor:
    return torch.tensor([line[name] for line in read_metrics(out) if name in line], dtype=torch.float64)


def files(out: Path) -> dict[str, bytes]:
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")} | {"final": (out / "final-0.safetensors").read_bytes()}


@pytest.mark.parametrize("way", [(), LORA, pytest.param((*LORA, "--dora", "true"), marks=pytest.mark.slow)], ids=["full", "LoRA", "DoRA"])
def test_two_processes_whole_or_sharded_make_the_steps_of_one(server: Server, way: tuple[str, ...], tmp_path: Path) -> None:
    one = server.train(tmp_path / "one", *way)
    two = server.train(tmp_path / "two", *way, processes=2)
    cut = server.train(tmp_path / "cut", *way, "--sharded", "true", processes=2)
    moved = max(float(tensor.std()) for tensor in lines(tmp_path / "one", "loss")[None])
    assert moved > 1e-2, "nothing was learned"
    for out, weights in (("two", two), ("cut", cut)):
        apart = differ(weights, one)
        losses, norms, held_out = ((lines(tmp_path / out, name) / lines(tmp_path / "one", name) - 1).abs().max() for name in ("loss", "grad_norm", "held_out"))
        print(f"{out}: weights {apart:.1e}, losses {losses:.1e}, norms {norms:.1e}, held out {held_out:.1e}")
        assert apart < 1e-5 and max(losses, norms, held_out) < 1e-5
    assert lines(tmp_path / "cut", "forward_equivalents").tolist() == lines(tmp_path / "two", "forward_equivalents").tolist()
    saved = [latest_checkpoint(tmp_path / out) for out in ("one", "cut")]
    for name in ("network", "optimizer", "average"):
        own, theirs = (load_weights(checkpoint / f"{name}.safetensors")[0] for checkpoint in saved if checkpoint is not None)
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in own.items()} == {key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()}


@pytest.mark.parametrize("words", [(), ("--sharded", "true"), pytest.param(("--sharded", "true", *LORA), marks=pytest.mark.slow)], ids=["whole", "sharded", "LoRA, sharded"])
def test_two_processes_killed_between_gradient_and_step_end_bit_identical(server: Server, words: tuple[str, ...], tmp_path: Path) -> None:
    server.train(tmp_path / "whole", *words, processes=2)
    ended = server.ask(tmp_path / "killed", *words, "--die_at", "3", processes=2)
    assert ended.statuses[-1] == -signal.SIGKILL, ended.said
    server.train(tmp_path / "killed", *words, processes=2)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert read_metrics(tmp_path / "killed", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)


def test_a_run_goes_on_sharded_or_not_and_with_any_number_of_processes(server: Server, tmp_path: Path) -> None:
    wanted = server.train(tmp_path / "one", "--iterations", "8")
    assert server.ask(tmp_path / "turns", "--iterations", "8", "--sharded", "true", "--die_at", "2", processes=2).statuses[-1] == -signal.SIGKILL
    assert server.ask(tmp_path / "turns", "--iterations", "8", "--die_at", "4").statuses == [-signal.SIGKILL]
    found = server.train(tmp_path / "turns", "--iterations", "8", "--sharded", "true", processes=2)
    assert [line["iteration"] for line in read_metrics(tmp_path / "turns")] == [line["iteration"] for line in read_metrics(tmp_path / "one")]
    apart, losses = differ(found, wanted), float((lines(tmp_path / "turns", "loss") / lines(tmp_path / "one", "loss") - 1).abs().max())
    print(f"weights {apart:.1e}, losses {losses:.1e}")
    assert apart < 1e-5 and losses < 1e-5


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--packs", "3"), 2, r"a sharded run makes equally many passes in each of its 2 processes, and 3 parts are no multiple of that[^\n]*"),
        (("--optimizer", "adamw8bit"), 2, r"optimizer adamw8bit keeps its state in blocks that cannot be cut[^\n]*Use adamw[^\n]*"),
        (("--nf4", "true", *LORA), 2, r"weights in four bits cannot be sharded[^\n]*Leave nf4 or sharding off"),
        (("--experts", "true"), 2, r"two experts cannot be sharded[^\n]*"),
        (("--differs", "true"), 3, r"self-check: gradients, weights and draws of 2 ranks are [^\n]* apart[^\n]*"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_one_line(server: Server, words: tuple[str, ...], status: int, said: str, tmp_path: Path) -> None:
    ended = server.ask(tmp_path / "run", "--sharded", "true", *words, processes=2)
    assert ended.statuses == [status] * 2, ended.said
    assert len(re.findall(rf"(?m)^{said}$", ended.said)) == 2 and "Traceback" not in ended.said, ended.said
