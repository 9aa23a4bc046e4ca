"""Runs of recipes in processes that spare themselves the imports, one or several together, some of which are killed at a chosen moment. test_resume.py sends what to run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.forked import answer, write_to

MOMENTS = ("rollout", "update", "checkpoint")


class Ended(NamedTuple):
    """How a run ended."""

    statuses: list[int]  # of each process; -9 where it was killed
    said: str  # by the first process, on both streams
    moments: dict[str, int]  # how often the first process came to each moment, where it was not killed


class Server:
    """Sends runs to a process that has imported all recipes, and forks for each. Use it as a context."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, 0

    def __enter__(self) -> Server:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-m", "tests.recipes.killed"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=300)

    def run(self, words: Sequence[str], *, processes: int = 1, kill: tuple[str, int] | None = None, victim: int = 0, forbidden: int = 0) -> Ended:
        """`rushes words` in so many processes. kill: SIGKILL for the victim when it comes to a moment for the n-th time, and then for the others. forbidden: of clips that are
        judged together the filters allow all but the first so many."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.sent += 1
        log = self.folder / f"log-{self.sent}"
        asked = {"words": list(words), "processes": processes, "kill": kill, "victim": victim, "forbidden": forbidden, "log": str(log)}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        moments = log.with_suffix(".json")
        return Ended(statuses, log.read_text(), json.loads(moments.read_text()) if moments.exists() else {})


def killed_behind(words: Sequence[str], file: Path, *, seconds: float = 240) -> int:
    """`rushes words` in a process of its own, with as many threads as this one, that is killed (SIGKILL) as soon as `file` is there. Returns how it ended."""
    import torch

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, "-m", "recipes.cli", *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while not file.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    return process.wait()


@contextmanager
def busy(folder: Path) -> Iterator[None]:
    """Another process is at work in the folder, as `align.run.lock_folder` sees it."""
    folder.mkdir(parents=True, exist_ok=True)
    script = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None and process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.stdin.close()


def _serve() -> None:
    """One line of JSON a run in, the exit statuses of its processes out."""
    import peft  # noqa: F401
    import scipy.special  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import WanPipeline, WanTransformer3DModel  # noqa: F401

    from base_model.prompts.text import TextEncoder
    from recipes import ddpo, dpo, grpo, nft, ppo, reward_gradient, sft  # noqa: F401
    from recipes.generate import safety_runner

    TextEncoder()(["what it needs is imported here, once"])
    safety_runner()  # whose patterns are compiled once
    answer(_run)


def _run(asked: dict[str, Any], rank: int) -> int:
    import traceback

    import align.run
    from recipes import feedback
    from recipes.cli import leave_group, main

    write_to(asked["log"] if rank == 0 else os.devnull)
    seen: Counter[str] = Counter()

    def noted(moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            seen[moment] += 1
            if asked["kill"] == [moment, seen[moment]] and rank == asked["victim"]:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return function(*given, **named)

        return call

    def ruled(self: Any, reward: Any, *given: Any, ruled: Callable[..., Any] = feedback.Assessor.ruled, **named: Any) -> Any:
        seen = ruled(self, reward, *given, **named)
        for k in range(len(seen.allowed)) if asked["forbidden"] else ():
            seen.allowed[k] = k >= asked["forbidden"]
        return seen

    feedback.Assessor.ruled = noted("rollout", ruled)  # type: ignore[method-assign]  # clips are made, and not yet judged
    align.run.Run.step = noted("update", align.run.Run.step)  # type: ignore[method-assign]
    keep_pace = align.run.Run.keep_pace
    align.run.Run.keep_pace = lambda self, passes, idle: keep_pace(self, passes, noted("idle", idle))  # type: ignore[method-assign]
    for name in ("write_synced", "fsync_folder"):  # of the files of a checkpoint, and around its move into place
        setattr(align.run, name, noted("checkpoint", getattr(align.run, name)))
    if asked["words"][0] in ("caption-train", "expand"):  # a micro-batch of theirs
        from transformers import Trainer

        Trainer.training_step = noted("trl", Trainer.training_step)  # type: ignore[method-assign]
    try:
        status = main(asked["words"])
    except BaseException:
        traceback.print_exc()
        return 1
    if rank == 0:
        Path(asked["log"]).with_suffix(".json").write_text(json.dumps(seen))
    leave_group()
    return status


if __name__ == "__main__":
    _serve()
