"""A blocked clip is known again when it comes back changed; other clips are not taken for it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.errors import UserError
from base_model.video.files import from_uint8, read_video, write_mp4
from base_model.video.hashes import clip_hashes
from reward.safety.contract import SafetyRunner, Verdict
from reward.safety.duplicate import BlockedClip, DuplicateFilter, block, load_blocked, save_blocked
from reward.safety.policy import load_policy
from tests.blobs import scene

POLICY = load_policy()
Made = tuple[Tensor, float]


def cropped(video: Tensor, left: float, right: float, top: float, bottom: float) -> Tensor:
    height, width = video.shape[-2:]
    return video[..., round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)]


def resized(video: Tensor, down: float, across: float) -> Tensor:
    return F.interpolate(video, size=(round(video.shape[-2] * down), round(video.shape[-1] * across)), mode="bilinear", antialias=True)


CHANGES: dict[str, Callable[[Tensor, float], Made]] = {
    "nothing": lambda video, fps: (video, fps),
    "noise": lambda video, fps: ((video + 0.03 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1), fps),
    "half the size": lambda video, fps: (resized(video, 0.5, 0.5), fps),
    "another shape": lambda video, fps: (resized(video, 1, 1.2), fps),
    "brighter": lambda video, fps: ((1.2 * video).clamp(0, 1), fps),
    "5 % cropped": lambda video, fps: (cropped(video, 0.03, 0.02, 0.02, 0.03), fps),
    "8 % cropped": lambda video, fps: (cropped(video, 0.04, 0.04, 0.04, 0.04), fps),
    "faster": lambda video, fps: (video, 1.25 * fps),
    "slower": lambda video, fps: (video, 0.8 * fps),
    "much faster": lambda video, fps: (video, 1.4 * fps),
    "mirrored": lambda video, fps: (video.flip(-1), fps),
    "second half": lambda video, fps: (video[len(video) // 2 :], fps),
    "within another": lambda video, fps: (torch.cat([scene(999, 12, *video.shape[-2:]), video]), fps),
    "mirrored, cropped and faster": lambda video, fps: (cropped(video.flip(-1), 0.03, 0.02, 0.02, 0.03), 1.1 * fps),
}


def scores(blocked: list[BlockedClip], video: Tensor, fps: float) -> float:
    return max(ruling.score for ruling in DuplicateFilter(POLICY, blocked).check_videos(video[None], [""], fps)[0])


@pytest.mark.parametrize("name", CHANGES)
def test_a_blocked_clip_is_known_again(name: str) -> None:
    found = [scores([block("x", "P05", scene(seed), 12.0)], *CHANGES[name](scene(seed), 12.0)) for seed in range(8)]
    print(name, np.round(found, 2))
    assert min(found) >= 0.5 and (name != "nothing" or min(found) == 1)


def test_other_clips_are_let_through() -> None:
    clips = [scene(seed) for seed in range(24)]
    blocked = [block(str(i), "P05", clip, 12.0) for i, clip in enumerate(clips)]
    found = [scores([blocked[i]], clips[j], 12.0) for i, j in itertools.combinations(range(24), 2)]
    print(f"{len(found)} pairs, largest score {max(found):.2f}")
    assert max(found) < 0.5


def real_clips(folder: Path) -> dict[str, Made]:
    videos = {path.stem: read_video(path, max_frames=33) for path in sorted((folder / "clips").glob("*.mp4"))}
    assert len(videos) >= 5
    return {name: (resized(from_uint8(video.frames), 0.2, 0.2), video.fps) for name, video in videos.items()}


def test_real_clips_are_known_again_and_told_apart(real_data: Path, tmp_path: Path) -> None:
    clips = real_clips(real_data)
    blocked = {name: block(name, "P05", *clip) for name, clip in clips.items()}
    for change, make in CHANGES.items():
        found = [scores([blocked[name]], *make(*clip)) for name, clip in clips.items()]
        print(change, np.round(found, 2))
        assert min(found) >= 0.5, change
    for name, (video, fps) in clips.items():
        write_mp4(tmp_path / "again.mp4", video[..., : video.shape[-2] // 2 * 2, : video.shape[-1] // 2 * 2], fps, upscale=False)
        again = read_video(tmp_path / "again.mp4")
        assert scores([blocked[name]], from_uint8(again.frames), again.fps) >= 0.9
    apart = [scores([blocked[one]], *clips[other]) for one, other in itertools.permutations(clips, 2)]
    print(f"{len(apart)} pairs, largest score {max(apart):.2f}")
    assert len(clips) >= 5 and max(apart) < 0.25


def test_rulings_name_the_blocked_clip_and_its_policy_and_pass_the_runner() -> None:
    blocked = [block("gore-1", "P05", scene(0), 12.0), block("flash-7", "P17", scene(1), 12.0)]
    decision, other = SafetyRunner([DuplicateFilter(POLICY, blocked)], POLICY).check_videos(torch.stack([scene(1), scene(2)]), ["", ""], 12.0)
    assert decision.verdict == Verdict.BLOCK and other.verdict == Verdict.ALLOW
    assert {ruling.policy: ruling.verdict for ruling in decision.rulings} == {"P05": Verdict.ALLOW, "P17": Verdict.BLOCK}
    assert "flash-7, 0.0 of 64 bits" in decision.rulings[1].reasons[0].text


def test_a_longer_list_of_blocked_clips_is_another_version_and_a_reordered_one_is_not() -> None:
    one, two = block("a", "P05", scene(0), 12.0), block("b", "P05", scene(1), 12.0)
    before, after, again = (SafetyRunner([DuplicateFilter(POLICY, blocked)], POLICY) for blocked in ([one], [one, two], [two, one, two]))
    verdicts = [runner.check_videos(scene(1)[None], [""], 12.0)[0].verdict for runner in (before, after)]
    assert verdicts == [Verdict.ALLOW, Verdict.BLOCK], "the same policies and threshold, another answer"
    assert before.lineage() != after.lineage() and before.clip_rulers.isdisjoint(after.clip_rulers)
    assert after.lineage() == again.lineage()
    assert DuplicateFilter(POLICY, [one]).version != DuplicateFilter(POLICY, [block("a", "P17", scene(0), 12.0)]).version


def test_frames_without_structure_match_nothing() -> None:
    black = torch.zeros(13, 3, 32, 32)
    assert set(clip_hashes(black, 12.0)) == {""}
    assert scores([block("x", "P05", black, 12.0)], black, 12.0) == 0 and scores([block("x", "P05", black, 12.0)], scene(0), 12.0) == 0


def test_the_score_falls_as_the_clip_fades_into_another() -> None:
    blocked = [block("x", "P05", scene(0), 12.0)]
    found = [scores(blocked, (1 - share) * scene(0) + share * scene(1), 12.0) for share in np.linspace(0, 1, 6)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and len(set(found)) >= 4


def test_the_store_is_read_as_it_was_written_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    blocked = [block("a", "P05", torch.cat([torch.zeros(6, 3, 48, 64), scene(0)]), 12.0), block("b", "P17", scene(1, 1), 12.0)]
    save_blocked(tmp_path / "blocked.json", blocked)
    assert load_blocked(tmp_path / "blocked.json") == blocked and (tmp_path / "blocked.json").stat().st_size < 4000
    for text in ("", "[]", '{"format": 9}', '{"format": 1, "samples_a_second": 12, "clips": [{"clip_id": "a", "policy": "P05", "looks": ["zz"]}]}'):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(UserError):
            load_blocked(tmp_path / "wrong.json")
    with pytest.raises(UserError, match="cannot read"):
        load_blocked(tmp_path / "none.json")


def test_a_filter_needs_a_blocked_clip_under_a_known_policy_and_finite_pixels() -> None:
    with pytest.raises(ValueError, match="no clip is blocked"):
        DuplicateFilter(POLICY, [])
    with pytest.raises(ValueError, match="P99"):
        DuplicateFilter(POLICY, [block("x", "P99", scene(0), 12.0)])
    with pytest.raises(ValueError, match="nan"):
        scores([block("x", "P05", scene(0), 12.0)], scene(0) * math.nan, 12.0)


def test_a_thousand_blocked_clips_are_searched_in_no_time() -> None:
    rng = np.random.default_rng(0)
    blocked = [BlockedClip(str(i), "P05", tuple(tuple(rng.bytes(8).hex() for _ in range(24)) for _ in range(3))) for i in range(1000)]
    each = DuplicateFilter(POLICY, blocked)
    begun = time.perf_counter()
    each.check_videos(scene(0)[None], [""], 12.0)
    assert time.perf_counter() - begun < 10
