"""SFT of a family, killed with SIGKILL and resumed: to the bit in one process and in two, with weights whole or sharded; and the same numbers whatever the number of processes."""

from __future__ import annotations

import json
import math
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from align.run import latest_checkpoint, read_metrics
from base_model.checkpoint import load_weights
from recipes.weights import file_hash
from tests.base_model.families import tiny_ltx, tiny_wan
from tests.recipes.killed import Ended, Server
from tests.recipes.test_resume import finished, killed_and_resumed
from tests.recipes.test_sft_families import rows_of, write_clips

WAYS = {
    "lora": ["--lora-rank", "2"],
    "qlora": ["--lora-rank", "2", "--nf4", "true"],
    "full": [],
    "sharded": ["--shard", "true"],
    "stream": ["--lora-rank", "2"],
    "split": ["--context-parallel", "true"],
    "split lora": ["--context-parallel", "true", "--lora-rank", "2", "--recompute", "0.5"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny_wan.text_to_video().save_pretrained(folder / "wan")
    tiny_ltx.tiny_pipeline().save_pretrained(folder / "ltx")
    write_clips(folder / "clips")
    write_clips(folder / "before", sides=2)
    rows_of(folder / "clips", folder / "rows.parquet")
    return folder


def command(out: Path, folder: Path, way: str, family: str = "wan") -> list[str]:
    """Four steps of two packs, with LoRA of one more of what is remembered."""
    fit = {"iterations": 4, "capacity": 48, "packs": 2, "held_out": 2, "evaluate_every": 2, "save_every": 1, "lr": 1e-4, "ema_decay": 0.5}
    words = ["sft", "--out", str(out), "--seed", "3", "--model", str(folder / family), *WAYS[way]]
    words += ["--data", str(folder / "clips"), "--cache", str(folder / f"{family}-latents")] if way != "stream" else []
    words += ["--stream", json.dumps({"path": "parquet", "files": str(folder / "rows.parquet"), "buffer": 4, "step": 3})] if way == "stream" else []
    words += ["--remember.data", str(folder / "before")] if way == "lora" else []
    words += ["--windows.frames", "9", "--windows.fps", "12", "--windows.area", "1024", "--samples.steps", "1", "--samples.guidance", "1"]
    return words + [x for key, value in fit.items() for x in (f"--fit.{key}", str(value))]


def result(out: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for the time it took."""
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    files = [*checkpoint.glob("*.safetensors"), *out.glob("*.safetensors"), *out.glob("checkpoint/transformer/*.safetensors"), out / "validation.jsonl", *out.glob("samples/*.png")]
    assert len(files) >= 7
    return {"metrics": read_metrics(out, wall_clock=False), **{str(file.relative_to(out)): file_hash(file) for file in files}}


@pytest.fixture(scope="module")
def whole(folder: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[Path, Ended]]:
    """Undisturbed runs by way and number of processes, made when first asked for."""
    out = tmp_path_factory.mktemp("whole")

    class Runs(dict[tuple[str, int], tuple[Path, Ended]]):
        def __missing__(self, key: tuple[str, int]) -> tuple[Path, Ended]:
            way, processes = key
            place = out / f"{way}-{processes}"
            self[key] = place, finished(server.run(command(place, folder, way), processes=processes))
            return self[key]

    return Runs()


KILLED = [
    ("lora", 1, ["update", "checkpoint"]),
    ("full", 1, ["update"]),
    ("stream", 1, ["update", "update"]),
    ("lora", 2, ["update"]),
    ("sharded", 2, ["update", "checkpoint"]),
    ("split", 2, ["update"]),
    ("stream", 2, ["update"]),
]


@pytest.mark.parametrize(("way", "processes", "moments"), KILLED)
def test_killed_again_and_again_it_ends_with_the_same_bits(way: str, processes: int, moments: list[str], whole: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    undisturbed, ended = whole[way, processes]
    print(killed_and_resumed(server, command(tmp_path, folder, way), ended, moments, random.Random(way), processes))
    assert result(tmp_path) == result(undisturbed)


def trained(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    return {name: tensor for part in ("network", "average") for name, tensor in load_weights(checkpoint / f"{part}.safetensors")[0].items() if tensor.is_floating_point()}


def alike(one: Path, other: Path, *, split: bool = False) -> None:
    """Losses of every step and look, and all weights, to 1e-5; a step moves them by 1e-4, also where a gradient is hardly more than rounding.

    Where clips are split, which rounds all sums over tokens otherwise, the norm of all weights' difference, in norms of the weights, is 1e-5.
    """
    names = ("loss", "remembered_loss", "held_out_loss", "held_out_loss_raw", "grad_norm")
    for row, same in zip(read_metrics(one), read_metrics(other), strict=True):
        assert {name: row[name] for name in names if name in row} == pytest.approx({name: same[name] for name in names if name in same}, rel=1e-5)
    mine, theirs = trained(one), trained(other)
    assert mine.keys() == theirs.keys()
    if split:
        apart, size = (math.hypot(*(float(tensor.norm()) for tensor in some)) for some in ([mine[name] - theirs[name] for name in mine], theirs.values()))
        assert apart < 1e-5 * size
    else:
        assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5


SAME = [
    (("lora", 1), ("lora", 2)),
    (("qlora", 1), ("qlora", 2)),
    (("full", 1), ("full", 2)),
    (("full", 2), ("sharded", 2)),
    (("split", 1), ("split", 2)),
    (("split lora", 1), ("split lora", 2)),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_number_of_processes_and_sharding_change_no_number(one: tuple[str, int], other: tuple[str, int], whole: Any) -> None:
    alike(whole[one][0], whole[other][0], split=one[0].startswith("split"))


def test_a_sharded_run_goes_on_in_one_process(whole: Any, folder: Path, server: Server, tmp_path: Path) -> None:
    ended = server.run(command(tmp_path, folder, "sharded"), processes=2, kill=("update", 3))
    assert -signal.SIGKILL in ended.statuses
    finished(server.run([*command(tmp_path, folder, "full"), "--resume"]))
    alike(tmp_path, whole["full", 1][0])
