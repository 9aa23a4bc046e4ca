"""The whole evening at toy size: every stage runs, is not done twice, and the report holds what it promises."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.config import load
from recipes import demo
from recipes.cli import main
from recipes.weights import file_hash

TOY = Path(demo.__file__).parent / "configs" / "tiny" / "toy.yaml"
INTERVAL = {"mean", "low", "high"}


def run(*words: str) -> int:
    return main(["demo", str(TOY), *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert run("--out", str(out), "--seed", "1") == 0
    return out


def test_the_report_holds_every_promised_key(finished: Path) -> None:
    results = json.loads((finished / "report" / "report.json").read_text())
    for key in ("judge", "flash_rate", "diversity"):
        assert set(results[key]) >= {"base", "sft", "rl"}
        assert all(set(results[key][model]) >= INTERVAL for model in ("base", "sft", "rl"))
    assert set(results["judge_gain"]) >= INTERVAL
    assert all(set(results["reward_model"][key]) >= INTERVAL for key in ("accuracy", "floor", "ceiling"))
    assert results["wall_seconds"] > 0 and results["peak_memory_bytes"] > 100_000_000
    assert {"base", "sft", "rl"} <= set(results["lineage"])
    assert results["lineage"]["rl"]["network_sha256"] == file_hash(finished / "rl" / "constrained" / "network.safetensors")
    page = (finished / "report" / "index.html").read_text()
    assert "simulated labelers" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_finished_stage_is_not_done_again_and_other_settings_are_refused(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("stage.json")}
    assert len(before) == len(demo.STAGES)
    assert run("--out", str(finished), "--seed", "1") == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("stage.json")} == before
    capfd.readouterr()
    assert run("--out", str(finished), "--seed", "2") == 2
    assert "seed (1 -> 2)" in capfd.readouterr().err


def test_a_demo_killed_among_its_labels_ends_with_the_same_label_files(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for stage in ("rankings", "reward", "rl", "report"):
        shutil.rmtree(out / stage)
    words = [sys.executable, "-m", "recipes.cli", "demo", str(TOY), "--out", str(out), "--seed", "1", "--stage", "rankings"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list((out / "rankings").rglob("*.parquet")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ, check=False).returncode == 0
    labels = sorted(path.relative_to(finished) for path in (finished / "rankings").rglob("*.parquet"))
    assert labels
    for path in labels:
        assert file_hash(out / path) == file_hash(finished / path), path


def test_real_clips_go_through_every_stage_and_the_judge_does_not_apply(real_data: Path, tmp_path: Path) -> None:
    assert run("--out", str(tmp_path / "out"), "--clips", str(real_data / "clips"), "--candidate-prompts", "10", "--takes", "4") == 0
    results = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert results["judge"] == "not applicable" or set(results["judge"].values()) == {"not applicable"}
    assert all(set(results["flash_rate"][model]) >= INTERVAL for model in ("base", "sft", "rl"))
    assert "not applicable" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_the_stages_of_the_configuration_are_those_of_the_contract() -> None:
    assert demo.STAGES == ("data", "sft", "candidates", "rankings", "reward", "rl", "report")
    assert load(demo.Config, TOY, ["--stage", "rl"]).stage == "rl"
