"""Launch files for torchrun, Slurm and Kubernetes: shells can read them, what they start is there, and the one for a single machine starts, and goes on with, a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.cli import COMMANDS

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "configs" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
JOBS: list[dict[str, Any]] = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_there_are_two_scripts_and_both_can_be_run() -> None:
    assert [path.name for path in SCRIPTS] == ["slurm.sbatch", "torchrun.sh"] and all(os.access(path, os.X_OK) for path in SCRIPTS)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_shell_can_read_it_and_its_example_names_a_command_and_a_file_that_are_there(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    example = next(line for line in path.read_text().splitlines() if "recipes/configs/launch/" in line)
    words = example.split(f"recipes/configs/launch/{path.name} ")[1].split()
    assert words[0] in COMMANDS and (ROOT / words[1]).exists() and "--out" in words


def test_the_job_names_its_service_mounts_what_it_declares_and_starts_a_command() -> None:
    service, job = JOBS
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    script = container["args"][0]
    subprocess.run(["bash", "-n", "-c", script], check=True)
    words = script.split("-m recipes.cli ")[1].split()
    assert words[0] in COMMANDS and (ROOT / words[1]).exists()
    assert f"--nnodes {job['spec']['completions']}" in script and f"--nproc-per-node {container['resources']['limits']['nvidia.com/gpu']}" in script
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in script, "the first pod is where processes meet"


def test_every_launch_file_keeps_ranks_that_begin_anew_from_the_addresses_of_dead_ones() -> None:
    """torchrun's agent keeps one store over all restarts otherwise; `rushes bench faults` shows what comes of it."""
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in path.read_text() for path in (*SCRIPTS, LAUNCH / "kubernetes.yaml"))


def test_one_machine_starts_a_run_and_whatever_ends_it_the_same_line_goes_on_with_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    (tmp_path / "torchrun").write_text(f'#!/usr/bin/env bash\necho "$@" >> {said}\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    out = tmp_path / "a run"
    line = [str(LAUNCH / "torchrun.sh"), "sft", "some.yaml", "--out", str(out), "--seed", "3"]
    subprocess.run(line, check=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2", "RESTARTS": "4"})
    # torchrun restarts processes with the words that it was begun with: without --resume they would be refused
    assert said.read_text() == f"--standalone --nproc-per-node 2 --max-restarts 4 -m recipes.cli sft some.yaml --out {out} --seed 3 --resume\n"


def job(tmp_path: Path, srun: str) -> subprocess.Popen[bytes]:
    """The batch script, with `srun` in place of Slurm's."""
    (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{srun}\n")
    (tmp_path / "scontrol").write_text(f'#!/usr/bin/env bash\nif [[ "$1" == requeue ]]; then echo "$@" >> {tmp_path}/said; else echo first; fi\n')
    (tmp_path / "scancel").write_text(f'#!/usr/bin/env bash\n[[ "$*" == "--signal TERM 7" ]] && kill -TERM "$(cat {tmp_path}/step)"\n')
    for name in ("srun", "scontrol", "scancel"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / "said").write_text("")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b"}
    return subprocess.Popen([str(LAUNCH / "slurm.sbatch"), "sft", "--out", str(tmp_path)], env=environment)


@pytest.mark.timed
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    script = job(tmp_path, f"trap 'sleep 0.2; touch {tmp_path}/saved; exit 1' TERM; echo $$ > {tmp_path}/step; for k in $(seq 200); do sleep 0.05; done")
    until = time.monotonic() + 10
    while time.monotonic() < until and not (tmp_path / "step").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 1 and (tmp_path / "saved").exists() and (tmp_path / "said").read_text() == "requeue 7\n"


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_a_job_that_ends_by_itself_does_not_go_back_into_the_queue(status: int, tmp_path: Path) -> None:
    assert job(tmp_path, f'echo "$@" > {tmp_path}/words; exit {status}').wait(20) == status
    assert (tmp_path / "said").read_text() == "" and (tmp_path / "words").read_text().endswith(f"-m recipes.cli sft --out {tmp_path} --resume\n")
