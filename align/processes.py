"""The processes that torchrun started together, for what is no training run (`run.py`); and the time in which one of them works by itself.

    join()                                        # all of them, once; alone without torchrun
    found = on_main(lambda: look())               # what the first one finds, in all
    told = broadcast(asked if is_main() else None)
    with alone():                                 # in the first one only: a `Run` in here neither waits for the others nor speaks to them
        ...
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch

from base_model.errors import Interrupted, RushesError

R = TypeVar("R")

LONGEST_WAIT = timedelta(hours=12)  # of processes for one another: the first one alone looks at held-out clips
_ALONE = ContextVar("alone", default=False)


def started() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> Any:
    """Meets the others, where torchrun started any; all call it, before anything else that is said here. Again it does nothing. Returns accelerate's Accelerator."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    if accelerator.num_processes > 1:
        atexit.register(accelerator.end_training)  # torch aborts where its process group is still open at the end
    return accelerator


def is_alone() -> bool:
    """Whether this process speaks to no other: the only one, or inside `alone`."""
    return started() == 1 or _ALONE.get()


def is_main() -> bool:
    """Whether it is the first of them, or alone."""
    return is_alone() or int(os.environ.get("RANK", "0")) == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works by itself, whatever the others do meanwhile."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def broadcast(value: Any) -> Any:
    """The value of the first process, in all of them: numbers, text, tensors, and what holds them."""
    if is_alone():
        return value
    from accelerate.utils import broadcast_object_list

    told = [value]
    broadcast_object_list(told)
    return told[0]


def on_main(work: Callable[[], R]) -> R:
    """What the first process finds, in all of them; the others wait. Its errors that are reported in one line are raised in all of them, too."""
    if is_alone():
        return work()
    from accelerate.utils import broadcast_object_list

    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = work()
        except Interrupted:
            raise
        except RushesError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    found: R = told[0]
    return found
