"""Plans of what goes wrong: every kind takes its turn, the verdicts see what is lost and what is said, and a plan carried out on a real command holds."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from recipes.bench import faults
from recipes.bench._fault_plans import KINDS, WATCHED, Broken, Lost, Whole, kind_of, moment_of, refused, result, same, spoil, words
from recipes.bench._fault_processes import MOMENTS, Ended
from recipes.cli import COMMANDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and signals of Linux")


def run_folder(out: Path) -> Path:
    """What a run leaves behind, in small."""
    checkpoint = out / "checkpoints" / "00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"iteration": 2, "seconds": 1.0, "metrics_bytes": 10}))
    (out / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, "loss": 1.0, "seconds": i}) + "\n" for i in range(2)))
    for file in (checkpoint / "network.safetensors", out / "network.safetensors"):
        save_weights(file, {"w": torch.ones(4)}, {})
    return out


def stage_of(whole: Path) -> Any:
    return SimpleNamespace(whole=lambda command, processes=1: Whole(result(command, whole), {"update": 8, "checkpoint": 0}, 1.0))


def test_kinds_take_turns_and_their_commands_and_moments_are_there(tmp_path: Path) -> None:
    assert [kind_of(seed) for seed in range(len(KINDS))] == list(KINDS) and kind_of(len(KINDS)) == kind_of(0)
    for command, moments in WATCHED.items():
        assert words(command, tmp_path / "out", tmp_path)[0] == command and command in COMMANDS and set(moments) <= set(MOMENTS)


def test_a_moment_is_one_that_came_and_within_its_share(tmp_path: Path) -> None:
    stage = stage_of(run_folder(tmp_path / "whole"))
    drawn = {moment_of(random.Random(seed), stage, "sft", share=0.5) for seed in range(50)}
    assert drawn == {("update", number) for number in range(1, 5)}


def test_what_is_another_bit_a_line_less_or_half_written_is_seen_and_what_took_longer_is_not(tmp_path: Path) -> None:
    stage = stage_of(run_folder(tmp_path / "whole"))
    state = tmp_path / "run" / "checkpoints" / "00000002" / "state.json"
    run_folder(tmp_path / "run")
    state.write_text(json.dumps({"iteration": 2, "seconds": 9.0, "metrics_bytes": 12}))
    same(stage, "nft", tmp_path / "run")

    def changed(name: str, content: bytes) -> Path:
        shutil.rmtree(tmp_path / "run")
        run_folder(tmp_path / "run")
        (tmp_path / "run" / name).write_bytes(content)
        return tmp_path / "run"

    weights = bytearray((tmp_path / "run" / "network.safetensors").read_bytes())
    weights[-1] ^= 1
    for name, content in (("network.safetensors", bytes(weights)), ("metrics.jsonl", b'{"iteration": 0, "loss": 1.0}\n'), ("checkpoints/00000002/state.json", b'{"iteration": 3}')):
        with pytest.raises(Lost, match="not what an undisturbed run leaves behind"):
            same(stage, "nft", changed(name, content))
    with pytest.raises(Broken, match=r"half-written: \.network"):
        same(stage, "nft", changed(".network.safetensors.7.partial", b""))


def test_a_refusal_is_its_status_and_one_line_without_a_traceback() -> None:
    def ended(status: int | None, said: str) -> Ended:
        return Ended(status, said, {}, 1.0)

    refused(ended(2, "sft 1/5\nrushes: the disk is full, here\n"), 2, "the disk is full")
    for one in (
        ended(1, "rushes: the disk is full\n"),
        ended(None, ""),
        ended(2, "the disk is full\n"),
        ended(2, "rushes: the disk is full\nrushes: again\n"),
        ended(2, "Traceback\nrushes: the disk is full\n"),
        ended(2, "rushes: something else\n"),
    ):
        with pytest.raises(Broken):
            refused(one, 2, "the disk is full")


def test_what_is_spoilt_is_never_what_it_was(tmp_path: Path) -> None:
    hows = set()
    for seed in range(40):
        (tmp_path / "file").write_bytes(b"some content")
        hows.add(spoil(random.Random(seed), tmp_path / "file"))
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() != b"some content"
    assert hows == {"a bit flipped", "cut off", "emptied", "zeroed", "deleted"}


def test_a_plan_that_did_not_hold_is_told_with_its_seed() -> None:
    one = {"seed": 4, "kind": "kill a rank", "what": "w", "held": True, "broken": "", "lost": False, "seconds": 2.0}
    found = [one, {**one, "seed": 17, "held": False, "lost": True, "broken": "b", "seconds": 4.0}]
    assert faults.kind_rows(found) == [{"kind": "kill a rank", "plans": 2, "held": 1, "lost": 1, "seconds": 3.0, "longest": 4.0, "for_example": "w"}]
    assert faults.failed_rows(found) == [{"seed": 17, "kind": "kill a rank", "broken": "b"}]
    assert faults.verdict(found) == "1 of 2 plans did not hold." and faults.verdict([one]) == "All of 1 plans held; nothing was lost."


def test_a_plan_on_a_real_command_holds(tmp_path: Path) -> None:
    rows = faults.main(faults.Config(out=tmp_path, only=2))["rows"]
    assert isinstance(rows, list)
    print(rows)
    assert len(rows) == 1 and rows[0]["kind"] == "kill encode" and rows[0]["held"] == 1 and rows[0]["lost"] == 0
    assert (tmp_path / "stage" / "worker.log").exists() and not (tmp_path / "plans").exists()


@pytest.mark.slow
def test_the_first_plan_of_every_kind_holds(tmp_path: Path) -> None:
    rows = faults.main(faults.Config(out=tmp_path, plans=len(KINDS)))["rows"]
    assert isinstance(rows, list)
    assert [(row["kind"], row["held"]) for row in rows if row["part"] == "kinds"] == [(kind, 1) for kind in KINDS]
    assert len(list((tmp_path / "plans").glob("*.json"))) == len(KINDS)


def test_a_plan_alone_does_not_work_where_all_of_them_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "carry_out", lambda *_: pytest.fail("two in one stage"))
    with open(tmp_path / ".lock", "w") as held:  # as another process holds it
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work in"):
            faults.main(faults.Config(only=3, out=tmp_path))
