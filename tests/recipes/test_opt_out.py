"""Clips that must not be used: told by their files and by what they show, copies too, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from base_model.errors import UserError
from base_model.video.curate import measure
from base_model.video.files import Frame
from recipes.opt_out import NOBODY, OptOut, load_opt_out
from tests.recipes.curated import Shown, frames_of


def hashes(seed: int, side: int = 64, crop: int = 0) -> tuple[str, ...]:
    frames: list[tuple[Frame, float]] = [(np.ascontiguousarray(frame[crop : side - crop, crop : side - crop]), time) for frame, time in frames_of(Shown(seed, 12, side, ""))]
    return measure(frames).hashes


def test_files_and_copies_of_clips_are_meant_and_others_are_not(tmp_path: Path) -> None:
    mine, other = hashes(1), hashes(2)
    (tmp_path / "list").write_text(f"# asked for by their maker\n\n{'AB' * 32}\n{' '.join(mine)}\n")
    listed = load_opt_out(tmp_path / "list")
    assert listed == OptOut(frozenset(["ab" * 32]), (mine,))
    rows = [hashes(1), hashes(1, crop=3), hashes(1, side=96), other, (), ("", ""), other]
    assert listed.rows(["cd" * 32] * 6 + ["ab" * 32], rows) == [True, True, True, False, False, False, True]


def test_one_frame_that_must_not_be_shown_is_found_wherever_it_comes() -> None:
    mine = hashes(1)
    for words in ((mine[5],), (mine[5][:64], mine[5][:64]), (mine[5][:16],)):
        assert OptOut(clips=(words,)).rows([None, None], [mine, hashes(2)]) == [True, False]


def test_a_clip_that_repeats_another_closely_is_still_found_by_the_list() -> None:
    """The nearest earlier clip of a row is not what is on the list: it is compared with the list all the same."""
    mine = hashes(1)
    assert OptOut(clips=(hashes(3), mine)).rows([None] * 4, [mine, mine, hashes(2), mine]) == [True, True, False, True]


def test_nobody_is_on_an_empty_list() -> None:
    assert NOBODY.rows(["ab" * 32, None], [hashes(1), ()]) == [False, False]


@pytest.mark.parametrize("line", ["abc", "ab" * 31, f"{'ab' * 8} {'ab' * 32}", "ab" * 16, "zz" * 32])
def test_a_line_that_is_neither_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{'ab' * 32}\n{line}\n")
    with pytest.raises(UserError, match=r"line 2 is neither a sha256 nor perceptual hashes, .*list\. Write 64"):
        load_opt_out(tmp_path / "list")
    with pytest.raises(UserError, match="cannot read the list of clips that must not be used"):
        load_opt_out(tmp_path / "none")
