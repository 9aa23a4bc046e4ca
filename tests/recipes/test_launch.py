"""Launch files for torchrun, Slurm and Kubernetes: shells can read them, what they start is there, and the one for a single machine starts, and goes on with, a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


def test_one_machine_starts_a_run_and_the_same_line_goes_on_with_it(tmp_path: Path) -> None:
    said = tmp_path / "said"
    (tmp_path / "torchrun").write_text(f'#!/usr/bin/env bash\necho "$@" >> {said}\n')
    (tmp_path / "torchrun").chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    out = tmp_path / "a run"
    line = [str(LAUNCH / "torchrun.sh"), "sft", "some.yaml", "--out", str(out), "--seed", "3"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2"}
    subprocess.run(line, check=True, env=environment)
    out.mkdir()
    (out / "run.json").write_text("{}")
    subprocess.run(line, check=True, env=environment)
    first, second = said.read_text().splitlines()
    assert first == f"--standalone --nproc-per-node 2 --max-restarts 0 -m recipes.cli sft some.yaml --out {out} --seed 3" and second == f"{first} --resume"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_job_that_is_told_to_end_goes_back_into_the_queue_and_one_that_fails_does_not(tmp_path: Path) -> None:
    said = tmp_path / "said"
    (tmp_path / "srun").write_text('#!/usr/bin/env bash\nexit "$ENDS"\n')
    (tmp_path / "scontrol").write_text(f'#!/usr/bin/env bash\nif [[ "$1" == requeue ]]; then echo "$@" >> {said}; else echo first; fi\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b"}
    for ends, queued in ((0, False), (2, False), (143, True)):
        said.unlink(missing_ok=True)
        done = subprocess.run([str(LAUNCH / "slurm.sbatch"), "sft", "--out", str(tmp_path)], env={**environment, "ENDS": str(ends)}, check=False)
        assert done.returncode == ends and said.exists() == queued
