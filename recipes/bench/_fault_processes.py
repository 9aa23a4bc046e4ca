"""Commands in forked processes, which spare themselves the imports, and what happens to them at a chosen moment. Plans and verdicts are in `_fault_plans.py`.

A moment is a call of one of a few functions, counted from 1 in each process. What may happen there: the process kills itself, or all of its group; a signal comes from the
scheduler; the process waits for somebody else; the clock of the wall jumps. One thread only (OMP_NUM_THREADS=1) before the fork: OpenMP's do not survive it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

MOMENTS = {
    "rollout": ("recipes.feedback:Assessor.ruled",),  # clips are made, and not yet judged
    "update": ("align.run:Run.step",),
    "checkpoint": ("align.run:write_synced", "align.run:fsync_folder"),  # of the files of a checkpoint, and around its move into place
    "write": ("base_model.checkpoint:write_synced", "base_model.checkpoint:fsync_folder"),  # of any other file that is written whole or not at all
    "encode": ("recipes.encode:encode_window", "recipes.encode:encode_caption"),
}
Act = Literal["kill", "kill all", "signal", "wait"]
LONGEST_RUN = 120.0
POLL_SECONDS = 0.01


class Happens(NamedTuple):
    """What happens in one process when it comes to a moment for the n-th time; under torchrun before anything was restarted."""

    act: Act
    moment: str
    number: int
    rank: int = 0


class Order(NamedTuple):
    """`rushes words`, in one process, or in several under torchrun's agent, which begins them anew `restarts` times where one dies."""

    words: Sequence[str]
    log: Path  # what it says on both streams; files beside it carry moments and signs
    happens: Happens | None = None
    processes: int = 1
    restarts: int = 0
    jumps: int | None = None  # seed of the clock's jumps, of up to ten hours either way at every moment


class Ended(NamedTuple):
    """How it ended."""

    status: int | None  # below 0 where a signal ended it; None where it did not end by itself in time
    said: str
    moments: dict[str, int]  # how often the first process came to each, where it was not killed
    seconds: float  # from the signal of the scheduler to the end; else from the beginning


class Started:
    """A forked process."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.begun = pid, log, time.monotonic()

    def wait(self, seconds: float = LONGEST_RUN) -> Ended:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return self._ended(os.waitstatus_to_exitcode(status))
            time.sleep(POLL_SECONDS)
        self.kill()
        return self._ended(None)

    def kill(self) -> None:
        """SIGKILL for its group, and its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)

    def _ended(self, status: int | None) -> Ended:
        with contextlib.suppress(ProcessLookupError):  # ranks whose agent died
            os.killpg(self.pid, signal.SIGKILL)
        moments, told = self.log.with_suffix(".moments"), self.log.with_suffix(".signalled")
        seen = json.loads(moments.read_text()) if moments.exists() else {}
        begun = float(told.read_text()) if told.exists() else self.begun
        return Ended(status, self.log.read_text(errors="replace") if self.log.exists() else "", seen, time.monotonic() - begun)


def fork(work: Callable[[], int | None], log: Path) -> Started:
    """`work` in a process and a group of its own, which ends with the status that it returns."""
    for stale in (log, *log.parent.glob(f"{log.stem}.*")):
        stale.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Started(pid, log)

    def logged() -> int | None:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        return work()

    _end_with(logged)


def _end_with(work: Callable[[], int | None]) -> NoReturn:
    """Ends this forked process with the status that `work` returns, 1 where it raises; nothing that its parent registered runs at its end."""
    status = 1
    try:
        status = work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def begin(order: Order) -> Started:
    return fork(lambda: _alone(order) if order.processes == 1 else _under_agent(order), order.log)


def run(order: Order) -> Ended:
    return begin(order).wait()


def reached(order: Order, seconds: float = 120.0) -> bool:
    """Whether a process that waits ("wait") came to its moment in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not order.log.with_suffix(".waits").exists():
        time.sleep(POLL_SECONDS)
    return order.log.with_suffix(".waits").exists()


def go_on(order: Order) -> None:
    """Ends its waiting."""
    order.log.with_suffix(".goes").touch()


# Inside


def _alone(order: Order) -> int:
    from recipes.cli import main

    with _moments(order, rank=0, first=True):
        return main(list(order.words))


STAND_IN = """
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    lines = server.makefile("rw")
    print(json.dumps(dict(os.environ)), file=lines, flush=True)
    pid = int(lines.readline())
    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(pid, number))
    status = int(lines.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
"""What torchrun's agent starts for a rank: it has the rank forked by `_serve_ranks`, hands on signals and its end, and takes no time to begin."""


def _under_agent(order: Order) -> int:
    """What torchrun does: the agent starts the ranks, watches them, and begins all anew where one dies. Exit status 1 where it gives up or is signalled."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as launch files do: in a store that outlives a restart new ranks find the addresses of dead ones
    with tempfile.TemporaryDirectory(prefix="rushes-") as folder:  # a socket's path is at most 107 bytes long
        place = f"{folder}/ranks"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(place)
            listener.listen()
            server = os.fork()  # before the agent has threads
            if not server:
                _serve_ranks(order, listener)
        config = LaunchConfig(1, 1, order.processes, run_id="faults", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=order.restarts)
        try:
            elastic_launch(config, sys.executable)("-S", "-E", "-c", STAND_IN, place)
        except (ChildFailedError, SignalException) as error:
            print(f"torchrun: {type(error).__name__}", file=sys.stderr, flush=True)
            return 1
        finally:
            os.kill(server, signal.SIGKILL)
    return 0


def _serve_ranks(order: Order, listener: socket.socket) -> NoReturn:
    """Forks a rank for every stand-in that asks, tells it of its end, and kills a rank whose stand-in was killed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    listener.setblocking(False)
    stand_ins: dict[int, socket.socket] = {}
    while True:
        with contextlib.suppress(BlockingIOError):
            stand_in, _ = listener.accept()
            stand_in.setblocking(True)
            environment = json.loads(stand_in.makefile().readline())
            pid = os.fork()
            if not pid:
                _end_with(partial(_rank, order, environment))
            stand_ins[pid] = stand_in
            stand_in.sendall(f"{pid}\n".encode())
            stand_in.setblocking(False)
        for pid, stand_in in [*stand_ins.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            with contextlib.suppress(OSError):
                if ended:
                    del stand_ins[pid]
                    stand_in.setblocking(True)
                    stand_in.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                    stand_in.close()
                elif stand_in.recv(1) == b"":
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _rank(order: Order, environment: dict[str, str]) -> int:
    """One process of torchrun's; its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    from recipes.cli import leave_group, main

    with _moments(order, rank=int(os.environ["RANK"]), first=os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"):
        status = main(list(order.words))
    leave_group()
    return status


@contextlib.contextmanager
def _moments(order: Order, *, rank: int, first: bool) -> Iterator[None]:
    """Counts moments and makes happen what is to happen. first: nothing was restarted yet."""
    seen: Counter[str] = Counter()
    jump = _clock(order.jumps) if order.jumps is not None else lambda: None

    def noted(moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            seen[moment] += 1
            jump()
            happens = order.happens
            if happens is not None and first and (moment, seen[moment], rank) == (happens.moment, happens.number, happens.rank):
                _make_happen(happens.act, order)
            return function(*given, **named)

        return call

    for moment, names in MOMENTS.items():
        for name in names:
            module, _, attribute = name.partition(":")
            owner: Any = importlib.import_module(module)
            for part in attribute.split(".")[:-1]:
                owner = getattr(owner, part)
            last = attribute.split(".")[-1]
            setattr(owner, last, noted(moment, getattr(owner, last)))
    yield
    if rank == 0:
        order.log.with_suffix(".moments").write_text(json.dumps(seen))


def _make_happen(act: Act, order: Order) -> None:
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "kill all":
        os.killpg(0, signal.SIGKILL)
    elif act == "signal":  # as a scheduler does, to every process; torchrun's agent passes it on, so that ranks hear it twice
        order.log.with_suffix(".signalled").write_text(str(time.monotonic()))
        os.killpg(0, signal.SIGTERM)
    else:
        order.log.with_suffix(".waits").touch()
        while not order.log.with_suffix(".goes").exists():
            time.sleep(POLL_SECONDS)


def _clock(seed: int) -> Callable[[], None]:
    """Puts a clock that can be moved in place of the wall's; returns what moves it at random."""
    dice, real, offset = random.Random(seed), time.time, [0.0]
    time.time = lambda: real() + offset[0]
    time.time_ns = lambda: int((real() + offset[0]) * 1e9)

    def jump() -> None:
        offset[0] = dice.choice((0.0, dice.uniform(-36_000, 36_000)))

    return jump


# The worker


def import_all() -> None:
    """What commands import when they are first used."""
    import peft  # noqa: F401
    import scipy.special  # noqa: F401
    import torch._dynamo
    import torch.distributed.elastic.rendezvous.registry
    import torch.distributed.launcher.api
    import torch.utils.tensorboard  # noqa: F401

    from base_model.prompts.text import TextEncoder
    from recipes import ddpo, dpo, encode, grpo, nft, ppo, reward_gradient, reward_model, serve_reward, sft  # noqa: F401
    from recipes.bench import app  # noqa: F401
    from reward.app import web  # noqa: F401
    from reward.serving import app as serving  # noqa: F401

    TextEncoder()(["what it needs is imported here, once"])


def private_disk(folder: Path, size: int) -> bool:
    """A file system of `size` bytes in `folder`, which this process and its children alone see; False where the system gives none. Call it before there are threads."""
    import ctypes

    new_namespaces, uid, gid = 0x10000000 | 0x00020000, os.getuid(), os.getgid()  # CLONE_NEWUSER, CLONE_NEWNS
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_namespaces):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    folder.mkdir(parents=True, exist_ok=True)
    return bool(libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()) == 0)
