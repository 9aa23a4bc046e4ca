"""Workers: whatever a request does to its process, the next one is answered."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest

from base_model.errors import UserError
from recipes.clip_workers import Lost, Worker

MEMORY = 256 << 20


def answering(greeting: str) -> Any:
    """The work of these tests."""
    if greeting == "fails":
        raise UserError("no such filter, here. Give another")

    def work(request: Mapping[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "sleep":
                time.sleep(request["seconds"])
            case "exit":
                os._exit(3)
            case "crash":
                os.kill(os.getpid(), 11)
            case "take":
                try:
                    return {"took": int(np.ones(request["bytes"], np.uint8).sum())}
                except MemoryError:
                    return {"took": 0}
            case "connect":
                with socket.socket() as out:
                    out.settimeout(2)
                    return {"error": out.connect_ex((request["host"], request["port"]))}
            case "print":
                print("noise", flush=True)
            case "garbage":
                os.write(request["wire"], b"\x00\x00\x00\x04{no}")
        return {"greeting": greeting, "pid": os.getpid()}

    return work


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(partial(answering, "hello"), seconds=20, memory=MEMORY)
    yield made
    made.close()


def test_requests_are_answered_by_one_process(worker: Worker) -> None:
    one, two = worker.ask({"do": "nothing"}), worker.ask({"do": "print"})
    assert isinstance(one, dict) and one == two and one["greeting"] == "hello" and one["pid"] != os.getpid() and worker.starts == 1


@pytest.mark.parametrize(("what", "reason"), [("exit", "its worker ended with status 3"), ("crash", "its worker was killed by SIGSEGV")])
def test_a_request_that_ends_the_process_costs_its_own_answer_alone(worker: Worker, what: str, reason: str) -> None:
    assert worker.ask({"do": what}) == Lost(reason)
    assert isinstance(worker.ask({"do": "nothing"}), dict) and worker.starts == 2


def test_a_request_that_hangs_is_given_up_in_time(worker: Worker) -> None:
    worker.ask({"do": "nothing"})
    worker._seconds = 0.5
    begun = time.monotonic()
    assert worker.ask({"do": "sleep", "seconds": 600}) == Lost("its worker was killed after 0.5 s")
    assert time.monotonic() - begun < 5
    worker._seconds = 20
    assert isinstance(worker.ask({"do": "nothing"}), dict)


def test_a_request_gets_no_more_memory_than_the_limit(worker: Worker) -> None:
    assert worker.ask({"do": "take", "bytes": MEMORY // 4}) == {"took": MEMORY // 4}
    assert worker.ask({"do": "take", "bytes": 2 * MEMORY}) == {"took": 0} and worker.starts == 1


def test_a_worker_reaches_no_network_where_the_kernel_can_see_to_it(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = worker.ask({"do": "connect", "host": "127.0.0.1", "port": port})
        assert isinstance(answer, dict)
        pid = worker.ask({"do": "nothing"})
        assert isinstance(pid, dict)
        own = os.readlink("/proc/self/ns/net") != os.readlink(f"/proc/{pid['pid']}/ns/net")
        if not own:
            pytest.skip("this kernel gives no process a network of its own")
        assert answer["error"] != 0


def test_work_that_cannot_be_made_is_one_error() -> None:
    worker = Worker(partial(answering, "fails"), seconds=20, memory=MEMORY)
    with pytest.raises(UserError, match=r"a worker cannot be begun: no such filter, here\. Give another"):
        worker.ask({"do": "nothing"})
    assert worker.starts == 1


def test_several_threads_have_a_worker_each() -> None:
    workers = [Worker(partial(answering, str(k)), seconds=20, memory=MEMORY) for k in range(2)]
    answers: dict[int, Any] = {}

    def ask(k: int) -> None:
        answers[k] = workers[k].ask({"do": "sleep", "seconds": 0.1})

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pids = [answers[k]["pid"] for k in range(2)]
    assert [answers[k]["greeting"] for k in range(2)] == ["0", "1"] and len(set(pids)) == 2
    for worker in workers:
        worker.close()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
