"""What goes wrong for a user ends with status 2 and one line that says what, where and what to do: no traceback, nothing half-written."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from base_model.checkpoint import write_synced
from base_model.errors import UserError
from base_model.tiny import save_network
from base_model.video.files import read_lossless, write_mp4
from recipes import sft
from recipes.cli import main
from recipes.weights import read_card, write_card
from tests.recipes.small import save_small_network, save_small_reward_model, small_model

TINY_SFT = ["--clips", "8", "--fit.iterations", "2", "--fit.held-out", "2", "--fit.capacity", "256"]
TINY_CLIPS = ["--sampler.frames", "5", "--sampler.height", "16", "--sampler.width", "16", "--sampler.steps", "2", "--clips-per-prompt", "2"]


def fails(capfd: pytest.CaptureFixture[str], words: list[str], *says: str) -> None:
    status = main(words)
    out, err = capfd.readouterr()
    line = [text for text in err.splitlines() if text.startswith("rushes: ")]
    assert status == 2, err
    assert len(line) == 1 and "Traceback" not in err and out == "", err
    for part in says:
        assert part in line[0], line[0]
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capfd.readouterr().err


def left_over(folder: Path) -> list[str]:
    """Files that are neither whole results nor the records a run keeps."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock" and (p.suffix in (".tmp", ".partial") or p.name.startswith(".")))


def clip_folder(folder: Path, text: str = "a horse runs") -> Path:
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": text}) + "\n")
    return folder


def test_a_corrupt_clip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = clip_folder(tmp_path / "clips")
    (clips / "a.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42" + bytes(range(256)) * 4)
    fails(capfd, ["demo", "--out", str(tmp_path / "out"), "--stage", "data", "--clips", str(clips)], "a.mp4")
    assert not (tmp_path / "out" / "data" / "stage.json").exists()


def test_a_truncated_clip(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = clip_folder(tmp_path / "clips")
    write_mp4(clips / "a.mp4", torch.rand(20, 3, 32, 32), 12.0)
    (clips / "a.mp4").write_bytes((clips / "a.mp4").read_bytes()[:-400])
    fails(capfd, ["demo", "--out", str(tmp_path / "out"), "--stage", "data", "--clips", str(clips)], "a.mp4")


def test_a_missing_clip_and_a_folder_without_captions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = clip_folder(tmp_path / "clips")
    fails(capfd, ["demo", "--out", str(tmp_path / "a"), "--stage", "data", "--clips", str(clips)], "a.mp4")
    (clips / "metadata.jsonl").unlink()
    fails(capfd, ["demo", "--out", str(tmp_path / "b"), "--stage", "data", "--clips", str(clips)], "metadata.jsonl")


def test_a_missing_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails(capfd, ["generate", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "none.safetensors")], "none.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_pickled_checkpoint_whatever_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    fails(capfd, ["generate", "--out", str(tmp_path / "out"), "--model", str(path)], "network.safetensors", "pickle")


def test_an_empty_prompt_list(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails(capfd, ["generate", "--out", str(tmp_path / "out"), "--prompts", "[]"], "prompts")


def test_a_model_that_makes_nan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = small_model()
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    save_network(tmp_path / "nan.safetensors", model)
    fails(capfd, ["generate", "--out", str(tmp_path / "out"), "--model", str(tmp_path / "nan.safetensors"), *TINY_CLIPS], "finite")
    assert not list((tmp_path / "out").rglob("*.mkv")), "a clip of nan was kept"


def test_an_unknown_key_names_the_nearest_and_a_wrong_type_says_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("fit: {iterations: 4, lr: 1e-3}\nclipz: 3\n")
    fails(capfd, ["sft", str(config)], "clipz", "a.yaml:2", "clips")
    fails(capfd, ["sft", "--fit.iterations", "ten"], "fit.iterations", "integer", "ten")


@pytest.mark.parametrize(
    ("command", "key", "value"),
    [
        ("generate", "sampler.steps", "0"),
        ("generate", "sampler.steps", "1001"),
        ("generate", "sampler.shift", "0"),
        ("generate", "sampler.frames", "-3"),
        ("generate", "sampler.frames", "1026"),
        ("generate", "sampler.height", "36"),
        ("generate", "sampler.width", "0"),
        ("generate", "sampler.width", "8192"),
        ("generate", "sampler.fps", "0"),
        ("generate", "sampler.batch", "0"),
        ("generate", "clips-per-prompt", "0"),
        ("generate", "seed", "-1"),
        ("generate", "seed", str(2**63)),
        ("sft", "fit.iterations", "0"),
        ("sft", "fit.lr", "-1"),
        ("sft", "fit.ema-decay", "1"),
        ("sft", "fit.save-every", "0"),
        ("sft", "lora-rank", "-1"),
        ("ddpo", "policy.micro-batch", "0"),
        ("ddpo", "policy.group-size", "1"),
        ("ddpo", "policy.eta", "0"),
        ("ddpo", "safety.limit", "0"),
        ("ddpo", "safety.gate", "1"),
        ("grpo", "policy.evaluate-every", "0"),
        ("nft", "policy.lr", "0"),
        ("nft", "strobe", "1.5"),
        ("nft", "policy.old-largest", "1"),
        ("ppo", "policy.epochs", "0"),
        ("ppo", "policy.gae-lambda", "1.1"),
        ("dpo", "policy.beta", "0"),
        ("dpo", "policy.beta", "-5"),
        ("reward-gradient", "policy.last-steps", "0"),
        ("reward-gradient", "policy.late-share", "2"),
        ("match", "batch", "0"),
        ("reward-model", "epochs", "-1"),
        ("evaluate", "prompts", "0"),
        ("demo", "takes", "1"),
        ("demo", "overlap", "2"),
        ("demo", "seed", "-1"),
        ("pretrain", "depth", "0"),
        ("vae", "iterations", "0"),
    ],
)
def test_a_number_out_of_its_bounds(command: str, key: str, value: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails(capfd, [command, "--out", str(tmp_path / "out"), f"--{key}", value], key.replace("-", "_").rpartition(".")[0], "command line")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "key", "value", "nearest"),
    [
        ("reward-gradient", "policy.method", "drafft", "draft"),
        ("dpo", "policy.method", "flow-dpo", "flow_dpo"),
        ("nft", "policy.method", "adaptiv", "adaptive"),
        ("ppo", "policy.kl-in", "rewards", "reward"),
    ],
)
def test_a_word_that_is_no_choice_names_the_nearest(command: str, key: str, value: str, nearest: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fails(capfd, [command, "--out", str(tmp_path / "out"), f"--{key}", value], key.replace("-", "_"), f"Did you mean {nearest}?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "ddpo", "grpo", "nft", "ppo", "dpo", "reward-gradient"])
def test_a_start_that_failed_leaves_no_run_in_the_way_of_the_corrected_command(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network, missing = save_small_network(tmp_path / "network.safetensors"), str(tmp_path / "none.safetensors")
    if command == "sft":
        fails(capfd, ["sft", "--out", str(tmp_path / "out"), "--model", missing, *TINY_SFT], "none.safetensors")
        fails(capfd, ["sft", "--out", str(tmp_path / "out"), "--model", str(network), "--data", missing, *TINY_SFT], "none.safetensors")
        fails(capfd, ["sft", "--out", str(tmp_path / "out"), "--model", str(network), "--lora-rank", "2", "--fit.optimizer", "muon", *TINY_SFT], "muon", "adamw")
        assert main(["sft", "--out", str(tmp_path / "out"), "--model", str(network), *TINY_SFT]) == 0
        return
    words = [command, "--out", str(tmp_path / "out"), "--model", str(network), "--held-out-prompts", "2", "--prompt-pool", "2"]
    fails(capfd, [*words, "--reward", missing], "none.safetensors")
    reward = ["--reward", str(save_small_reward_model(tmp_path / "reward"))]
    if command in ("nft", "reward-gradient"):
        fails(capfd, [*words, *reward, "--sampler.guidance", "3"], "sampler.guidance")
    elif command == "dpo":
        fails(capfd, words, "--comparisons FOLDER --clips STORE, or --reward FOLDER")
        fails(capfd, [*words, "--comparisons", missing], "none.safetensors")
    else:
        fails(capfd, [*words, *reward, "--sampler.steps", "1"], "steps")
    if command == "ppo":
        fails(capfd, [*words, *reward, "--policy.minibatches", "9"], "policy.minibatches is 9", "4 micro-batches of 24 clips")
        fails(capfd, [*words, *reward, "--policy.noise-level", "2"], "policy.kernel", "eta must be in [0, 1]")
    if command == "reward-gradient":
        fails(capfd, [*words, *reward, "--policy.last-steps", "7"], "policy.last_steps is 7", "6 steps")
        fails(capfd, [*words, *reward, "--policy.method", "vader", "--policy.frames", "5"], "policy.frames is 5", "4 latent frames")
    if command == "grpo":
        fails(capfd, [*words, *reward, "--policy.window", "random", "--policy.width", "9"], "policy.window", "policy.width")
        fails(capfd, [*words, *reward, "--policy.kernel", "ancestral", "--policy.noise-level", "2"], "policy.kernel", "eta must be in [0, 1]")
        fails(capfd, [*words, *reward, "--policy.keep", "1"], "policy.keep")
        fails(capfd, [*words, *reward, "--policy.window", "sliding", "--policy.width", "4", "--policy.first-steps", "3"], "does not fit the first 3 of 4 steps")
    assert not (tmp_path / "out").exists()


def test_a_demo_that_failed_to_start_can_be_begun_with_other_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--out", str(tmp_path / "out"), "--stage", "data", "--pairs", "8"]
    fails(capfd, [*words, "--clips", str(tmp_path / "none")], "metadata.jsonl")
    assert main(words) == 0
    capfd.readouterr()
    fails(capfd, [*words, "--pairs", "9"], "begun with other settings: pairs (8 -> 9)")


@pytest.mark.parametrize("command", ["demo", "evaluate", "generate", "sft"])
def test_an_out_that_is_a_file_is_refused_before_the_work(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for loads in ("generate.load_model", "evaluate.load_tiny"):
        monkeypatch.setattr(f"recipes.{loads}", None)
    for out in ("file", "file/below"):
        fails(capfd, [command, "--out", str(tmp_path / out)], "is a file, not a folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("name", ["demo.json", "data/stage.json"])
def test_a_damaged_note_of_the_demo(name: str, damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--out", str(tmp_path / "out"), "--stage", "data", "--pairs", "4"]
    assert main(words) == 0
    capfd.readouterr()
    (tmp_path / "out" / name).write_text(damage)
    fails(capfd, words)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"measured": {}, "wall_seconds": "x"}'])
def test_a_card_that_says_nothing_is_a_user_error(damage: str, tmp_path: Path) -> None:
    (tmp_path / "dit.json").write_text(damage)
    with pytest.raises(UserError):
        read_card(tmp_path / "dit.safetensors")


def test_a_card_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "network.safetensors"

    def write() -> None:
        write_card(weights, lambda path: write_synced(path, b"x"), recipe="sft", cfg=sft.Config(), data="", seconds=1.0, measured={})

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    write()
    before = weights.with_suffix(".json").read_bytes()
    monkeypatch.setattr("base_model.checkpoint.write_synced", full)
    with pytest.raises(UserError, match="disk is full"):
        write()
    assert weights.with_suffix(".json").read_bytes() == before and left_over(tmp_path) == []


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_a_full_disk(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk runs full at the first byte that has to reach it."""
    network = save_small_network(tmp_path / "network.safetensors")
    sync: Callable[[int], None] = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["sft", "--model", str(network), *TINY_SFT] if command == "sft" else ["generate", "--model", str(network), *TINY_CLIPS]
    monkeypatch.setattr(os, "fsync", full)
    fails(capfd, [*words, "--out", str(tmp_path / "out")], "out", "disk")
    monkeypatch.setattr(os, "fsync", sync)
    assert left_over(tmp_path / "out") == []
    assert not (tmp_path / "out" / "network.safetensors").exists()
    for record in (tmp_path / "out").rglob("*.mkv"):
        assert len(read_lossless(record).frames) == 5, "a record is whole or not there"
    table = tmp_path / "out" / "clips.jsonl"
    assert not table.exists() or table.read_bytes() == b""
