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
from base_model.errors import UserError
from recipes import demo
from recipes.cli import main
from recipes.feedback import SafetyLimit
from recipes.pairs import read_clip_folder, save_pairs
from recipes.shapes.dataset import ClipSet
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
        assert set(results[key]) == {"base", "sft", "rl", "rl_ddpo"}
        assert all(set(part) >= INTERVAL for part in results[key].values())
    assert set(results["judge_gain"]) >= INTERVAL and set(results["judge_gain_ddpo"]) >= INTERVAL
    assert all(set(results["reward_model"][key]) >= INTERVAL for key in ("accuracy", "floor", "ceiling"))
    assert results["wall_seconds"] > 0 and results["peak_memory_bytes"] > 100_000_000
    assert set(results["lineage"]) == {"base", "sft", "rl", "rl_ddpo"}
    for model, run, made_by in (("rl", "constrained", "rushes nft"), ("rl_ddpo", "ddpo", "rushes ddpo")):
        assert results["lineage"][model]["network_sha256"] == file_hash(finished / "rl" / run / "network.safetensors")
        assert results["lineage"][model]["card"]["command"].startswith(made_by)
    page = (finished / "report" / "index.html").read_text()
    assert "RL (NFT)" in page and "RL (DDPO)" in page
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
    assert process.wait(timeout=60) == -signal.SIGKILL and not (out / "rankings" / "stage.json").exists()
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


def test_a_few_real_captions_are_all_learned_from_and_more_are_split(real_data: Path, tmp_path: Path) -> None:
    clips = read_clip_folder(real_data / "clips", frames=13, fps=12)
    captions = list(dict.fromkeys(clips.texts))
    for number, expected in ((2, (1.0, 0.0, 0.0)), (5, (0.6, 0.15, 0.25))):
        cfg = load(demo.Config, TOY, ["--out", str(tmp_path / str(number)), "--clips", str(real_data / "clips")])
        first = {text: video for text, video in zip(clips.texts, clips.videos, strict=True) if text in captions[:number]}
        save_pairs(demo.folder(cfg, "data"), ClipSet(tuple(first), tuple(first.values())))
        assert demo.split_shares(cfg) == expected
    assert demo.split_shares(load(demo.Config, TOY, [])) == (0.4, 0.1, 0.5)


def test_the_stages_of_the_configuration_are_those_of_the_contract() -> None:
    assert demo.STAGES == ("data", "sft", "candidates", "rankings", "reward", "rl", "report")
    assert load(demo.Config, TOY, ["--stage", "rl"]).stage == "rl"


def test_stages_from_before_a_key_was_there_go_on_at_its_default(tmp_path: Path) -> None:
    stages = demo.stages_of(demo.Config(out=tmp_path))
    stages.do("data", lambda out, memory: {})
    before = {key: value for key, value in json.loads(stages.file.read_text()).items() if key != "safety.decay"}
    stages.file.write_text(json.dumps(before))
    stages.check_same()
    with pytest.raises(UserError, match=r"begun with other settings: safety\.decay \(0\.8 -> 0\.5\)"):
        demo.stages_of(demo.Config(out=tmp_path, safety=SafetyLimit(decay=0.5))).check_same()
