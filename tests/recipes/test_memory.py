import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from recipes.memory import PeakMemory, peak_memory, tree_bytes

MIB = 2**20


@pytest.mark.timed
def test_the_peak_follows_an_allocation_and_stays_after_it_is_gone() -> None:
    with PeakMemory(interval=0.01) as memory:
        before = memory.peak_bytes
        block = np.ones(100 * MIB // 8)
        time.sleep(0.2)
        del block
    assert 90 * MIB < memory.peak_bytes - before < 150 * MIB


CHILD = "import sys; block = bytearray(b'x') * (60 * 2**20); print('ready', flush=True); sys.stdin.read()"


def test_the_peak_counts_children() -> None:
    with PeakMemory(interval=0.01) as memory:
        before = memory.sample()
        with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            together = memory.sample()
            process.communicate()
    assert together - before > 55 * MIB
    assert memory.peak_bytes >= together


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_the_sum_for_one_process_is_what_the_kernel_says() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # this one may have children of its own
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        found = tree_bytes(psutil.Process(process.pid))
        process.communicate()
    assert found > 60 * MIB and abs(found - pages * resource.getpagesize()) < 5 * MIB


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
def test_a_process_does_not_begin_with_the_peak_of_the_one_that_started_it() -> None:
    block = np.ones(300 * MIB // 8)
    del block
    code = "import torch; from recipes.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    small = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    code = f"block = bytearray(b'x') * (400 * 2**20); del block; {code}"
    large = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert large >= 400 * MIB and large - small > 90 * MIB
    assert peak_memory(torch.device("cpu")) >= 300 * MIB
