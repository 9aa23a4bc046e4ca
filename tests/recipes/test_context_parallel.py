"""Clips whose tokens are spread over two processes: `rushes generate` makes those of one process; what cannot be spread is said. SFT's are in test_sft_resume.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from align.context_parallel import check_can_split
from base_model.errors import UserError
from base_model.video.store import ClipStore
from tests.base_model.families import tiny_cogvideox, tiny_ltx, tiny_wan
from tests.recipes.killed import Server
from tests.recipes.test_resume import finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    tiny_wan.text_to_video().save_pretrained(folder / "wan")
    return folder


def command(out: Path, model: Path, side: int = 32) -> list[str]:
    sampler = {"steps": 2, "guidance": 3, "frames": 9, "height": side, "width": side, "batch": 2}
    words = ["generate", "--out", str(out), "--model", str(model), "--clips-per-prompt", "2", "--context-parallel", "true", "--prompts", '["a red ball rolls", "a blue cube"]']
    return words + [word for key, value in sampler.items() for word in (f"--sampler.{key}", str(value))]


def test_two_processes_make_the_clips_of_one(folder: Path, server: Server, tmp_path: Path) -> None:
    clips = {}
    for processes in (1, 2):
        finished(server.run(command(tmp_path / str(processes), folder / "wan"), processes=processes))
        store = ClipStore(tmp_path / str(processes))
        clips[processes] = {(row.prompt, row.seed): store.load(row.clip_id) for row in store.rows()}
    assert len(clips[1]) == 4 and clips[1].keys() == clips[2].keys()
    apart = max(float((clips[1][key] - clips[2][key]).abs().max()) for key in clips[1])
    assert float(torch.stack(list(clips[1].values())).std()) > 0.05 and apart <= 1 / 255 + 1e-6, "a level of 255, where a value lies between two"


def test_what_cannot_be_spread_is_one_line_before_a_clip_is_made(folder: Path, server: Server, tmp_path: Path) -> None:
    for words, said in (
        (command(tmp_path / "odd", folder / "wan", side=48), r"has 27 tokens, no multiple of 2 processes, context_parallel"),
        (["generate", "--out", str(tmp_path / "both")], "rushes generate works in one process, and torchrun started 2"),
        (["generate", "--out", str(tmp_path / "own"), "--context-parallel", "true"], "context_parallel is for open families"),
    ):
        ended = server.run(words, processes=2)
        assert ended.statuses == [2, 2] and said in ended.said and "Traceback" not in ended.said, ended.said
    assert not any(tmp_path.glob("*/clips.jsonl"))


def test_a_network_without_a_plan_or_with_too_few_heads_is_named() -> None:
    for network in (tiny_cogvideox.tiny_pipeline().transformer, tiny_ltx.tiny_pipeline().transformer, nn.Linear(1, 1)):
        with pytest.raises(UserError, match=rf"the tokens of {type(network).__name__} cannot be spread over processes, context_parallel[^\n]*"):
            check_can_split(network, 2)
    with pytest.raises(UserError, match=r"2 attention heads are no multiple of 3 processes, context_parallel"):
        check_can_split(tiny_wan.transformer(), 3)
