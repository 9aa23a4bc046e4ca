"""Media of imported preferences as a clip store: from VideoAlign's CSV and mp4 files to a reward model."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base_model.errors import UserError
from base_model.types import ClipShape
from base_model.video.files import read_video, write_mp4
from base_model.video.store import ClipStore
from recipes import import_rankings, imported_clips, reward_model
from recipes.cli import main
from recipes.import_rankings import Config
from recipes.imported_clips import Form, LeftOut, read_clip
from recipes.rankings import ruling_of
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import render, sample_scene
from reward.comparisons import load_comparisons
from reward.matcher import Matcher, MatcherSize, save_matcher
from tests.reward import tiny_encoders as tiny

GENERATORS = ("kling", "gen2", "luma")
BENCH = ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall", "fps_A", "num_frames_A", "fps_B", "num_frames_B"]
ALIGN = ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B"]
MOST = ClipShape(30, 40, 56)  # files are larger and longer than the clips of the store, at twice their rate


def write_labels(path: Path, header: list[str], rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def pair(prompt: str, first: str, second: str, choice: str = "A", **more: object) -> dict[str, object]:
    return {"path_A": first, "path_B": second, "prompt": prompt, "VQ": choice, "fps_A": 24, "num_frames_A": 30, "fps_B": 24, "num_frames_B": 30, **more}


def noisy(seed: int, frames: int = 30, side: int = 48) -> torch.Tensor:
    """A clip [T,3,H,W] like no other: a coloured square that drifts over a gradient."""
    rng = np.random.default_rng(seed)
    video = torch.linspace(0.2, 0.8, side).expand(frames, 3, side, side).clone()
    color, start = torch.tensor(rng.uniform(size=3), dtype=torch.float32), rng.integers(0, side // 2)
    for t in range(frames):
        video[t, :, start : start + 12, start + t // 4 : start + t // 4 + 12] = color[:, None, None]
    return video


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 prompts of the built-in world, three generators' files each, the first generator's preferred."""
    folder = tmp_path_factory.mktemp("dataset")
    rng, rows = np.random.default_rng(0), []
    for i, prompt in enumerate(make_prompts(16, seed=5, split="train")):
        names = [f"{generator}/{i}.mp4" for generator in GENERATORS]
        for name in names:
            (folder / "media" / name).parent.mkdir(parents=True, exist_ok=True)
            write_mp4(folder / "media" / name, render(sample_scene(prompt, rng, clip=MOST), MOST), 24, upscale=False)
        rows += [pair(prompt.text, names[j], names[k], TA="same", MQ="AB"[i % 2]) for j, k in ((0, 1), (0, 2), (1, 2))]
    write_labels(folder / "labels.csv", ALIGN, rows)
    torch.manual_seed(0)
    save_matcher(folder / "matcher.safetensors", Matcher(MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)))
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that are decoded."""
    seen: list[Path] = []

    def read(path: Path, **given: Any) -> Any:
        seen.append(path)
        return read_video(path, **given)

    monkeypatch.setattr(imported_clips, "read_video", read)
    yield seen


def imported(labels: Path, media: Path, out: Path, *, name: str = "videoalign", **more: object) -> dict[str, Any]:
    return import_rankings.main(Config(format=name, file=labels, media=media, out=out / "rankings", clips=out / "clips", **more))


def test_a_public_dataset_trains_a_reward_model(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reads: list[Path]) -> None:
    words = ["import-rankings", "videoalign", dataset / "labels.csv", "--media", dataset / "media", "--clips", tmp_path / "clips", "--out", tmp_path / "rankings", "--json"]
    assert main([*map(str, words)]) == 0
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert got["form"] == "13 frames of 32x32 at 12 a second" and got["answers"] == 144 and got["clips_left_out"] == got["answers_left_out"] == {}
    assert got["decoded"] == got["clips"] == 48 == len(reads) and got["decoded_before"] == 0 and got["clips_cut_at_the_end"] == 48
    assert "import of clips 48/48" in said.err and " left" in said.err

    store, data = ClipStore(tmp_path / "clips"), load_comparisons(tmp_path / "rankings")
    assert {row.clip_id for row in store.rows()} == set(data.clips)
    assert store.load(store.rows()[0].clip_id).shape == (13, 3, 32, 32)
    before = {path: path.read_bytes() for path in (tmp_path / "rankings").iterdir()}, (tmp_path / "clips" / "clips.jsonl").read_bytes()
    assert main([*map(str, words)]) == 0
    got = json.loads(capsys.readouterr().out)
    assert len(reads) == 48 and got["decoded"] == 0 and got["decoded_before"] == 48 and got["answers_in_folder"] == 144
    assert before == ({path: path.read_bytes() for path in (tmp_path / "rankings").iterdir()}, (tmp_path / "clips" / "clips.jsonl").read_bytes())

    result = reward_model.main(
        reward_model.Config(out=tmp_path / "reward", comparisons=tmp_path / "rankings", clips=tmp_path / "clips", matcher=dataset / "matcher.safetensors", epochs=1, checks=2)
    )
    card = json.loads((tmp_path / "reward" / "reward_card.json").read_text())
    assert card["fps"] == [12.0] and card["sampler"] == ["13 frames of 32x32"] and sum(card["answers"].values()) == 144
    assert set(result["temperature"]) == {"VQ", "MQ", "TA"} and result["pairs"] > 0

    tiny.save("clip", tmp_path / "clip")
    encoders = reward_model.Encoders(checkpoints=(str(tmp_path / "clip"),), cache=tmp_path / "features", width=8, epochs=1, members=2)
    reward_model.main(reward_model.Config(out=tmp_path / "pooled", comparisons=tmp_path / "rankings", clips=tmp_path / "clips", encoders=encoders))
    assert json.loads((tmp_path / "pooled" / "reward_card.json").read_text())["fps"] == [12.0]


def test_the_store_says_where_a_clip_is_from_and_what_the_filters_say(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    prompt = "ein Ölbild: 猫が走る 🐈"
    write_mp4(media / "ä.mp4", noisy(1), 24, upscale=False)
    write_mp4(media / "b.mp4", torch.zeros(30, 3, 48, 48), 24, upscale=False)
    labels = write_labels(tmp_path / "labels.csv", BENCH, [pair(prompt, "ä.mp4", "b.mp4", A_model="kling", B_model="gen2")])
    got = imported(labels, media, tmp_path, name="videogen-rewardbench", frames=9, height=24, width=40, fps=10)
    rows = {json.loads(row.extra_json)["media"]: row for row in ClipStore(tmp_path / "clips").rows()}
    assert {row.prompt for row in rows.values()} == {prompt} and {row.licence for row in rows.values()} == {"Apache-2.0"}
    assert {json.loads(row.extra_json)["source"] for row in rows.values()} == {"KwaiVGI/VideoGen-RewardBench"}
    assert ruling_of(rows["ä.mp4"])["verdict"] == "allow" and ruling_of(rows["b.mp4"])["verdict"] != "allow", "nothing is in a black clip"
    assert got["clips_by_verdict"] == {"allow": 1, ruling_of(rows["b.mp4"])["verdict"]: 1}
    assert any("prompt" in ruling["filter"] or "word" in ruling["filter"] for ruling in ruling_of(rows["ä.mp4"])["rulings"])
    data = load_comparisons(tmp_path / "rankings")
    clips = {clip.generator: clip for clip in data.clips.values()}
    assert set(clips) == {"kling", "gen2"} and clips["kling"].clip_id == rows["ä.mp4"].clip_id and data.prompts[clips["kling"].prompt_id].text == prompt
    assert (clips["kling"].num_frames, clips["kling"].height, clips["kling"].width, clips["kling"].fps, clips["kling"].licence) == (9, 24, 40, 10.0, "Apache-2.0")
    assert clips["gen2"].first_frame_hash == "" != clips["kling"].first_frame_hash, "clips that begin black do not tie their prompts together"


def test_what_cannot_be_decoded_is_left_out_counted_and_named(tmp_path: Path, reads: list[Path]) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for i in range(2):
        write_mp4(media / f"{i}.mp4", noisy(i), 24, upscale=False)
    whole = (media / "0.mp4").read_bytes()
    (media / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (media / "text.mp4").write_text("no video")
    (media / "empty.mp4").write_bytes(b"")
    write_mp4(media / "short.mp4", noisy(2, frames=10), 24, upscale=False)
    bad = ("cut.mp4", "text.mp4", "empty.mp4", "short.mp4", "gone.mp4", "gone2.mp4", "../0.mp4", "gone3.mp4")
    rows = [pair("a cat", "0.mp4", "1.mp4"), *(pair("a cat", "0.mp4", name, MQ="B") for name in bad)]
    got = imported(write_labels(tmp_path / "labels.csv", ALIGN, rows), media, tmp_path)
    assert got["clips_left_out"] == {"cannot be decoded": 3, "too short": 1, "no file in the folder of media": 4}
    assert got["first_left_out"]["no file in the folder of media"] == ["gone.mp4", "gone2.mp4", "../0.mp4"] and got["first_left_out"]["too short"] == ["short.mp4"]
    assert got["answers_left_out"] == {"cannot be decoded": 6, "too short": 2, "no file in the folder of media": 8} and got["answers"] == 1
    assert set(load_comparisons(tmp_path / "rankings").clips) == {row.clip_id for row in ClipStore(tmp_path / "clips").rows()}

    (media / "1.mp4").unlink()
    with pytest.raises(UserError, match=r"no answer is left, .*media: 5 clips: no file in the folder of media, first 1\.mp4; 3 clips: cannot be decoded, first cut\.mp4"):
        imported(tmp_path / "labels.csv", media, tmp_path)
    assert len(load_comparisons(tmp_path / "rankings").events) == 1


def test_files_with_equal_frames_are_one_clip(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    write_mp4(media / "a.mp4", noisy(1), 24, upscale=False)
    write_mp4(media / "b.mp4", noisy(2), 24, upscale=False)
    shutil.copy(media / "a.mp4", media / "same_file.mp4")
    (media / "same_frames.mp4").write_bytes((media / "a.mp4").read_bytes() + b"\0\0\0\x08free")  # an empty box more: another file of the same frames
    rows = [pair("a cat", "a.mp4", "b.mp4"), pair("a cat", "same_frames.mp4", "b.mp4"), pair("a cat", "a.mp4", "same_frames.mp4"), pair("a dog", "same_frames.mp4", "b.mp4")]
    got = imported(write_labels(tmp_path / "labels.csv", ALIGN, rows), media, tmp_path, frames=5, height=16, width=16, fps=6)
    assert got["clips"] == 2 and got["answers"] == 2 and got["answers_left_out"] == {"a clip against itself": 1} and got["skipped"]["contradicts an earlier row about a clip"] == 1


def two_prompts(folder: Path) -> Path:
    """Labels of two prompts with two files each; the first of both begin with the same frames."""
    (folder / "media").mkdir()
    for name, seed in (("a", 1), ("b", 2), ("d", 3)):
        write_mp4(folder / "media" / f"{name}.mp4", noisy(seed), 24, upscale=False)
    (folder / "media" / "c.mp4").write_bytes((folder / "media" / "a.mp4").read_bytes() + b"\0\0\0\x08free")
    return write_labels(folder / "labels.csv", ALIGN, [pair("a cat", "a.mp4", "b.mp4"), pair("a dog", "c.mp4", "d.mp4")])


def test_a_clip_has_one_prompt(tmp_path: Path) -> None:
    labels = two_prompts(tmp_path)
    got = imported(labels, tmp_path / "media", tmp_path)
    assert got["answers"] == 1 and got["clips"] == 2 and got["prompts"] == 1
    assert got["clips_left_out"] == got["answers_left_out"] == {"has the frames of a clip of another prompt": 1}
    again = write_labels(tmp_path / "again.csv", ALIGN, [pair("a dog", "c.mp4", "d.mp4"), pair("a dog", "d.mp4", "c.mp4"), pair("a cat", "b.mp4", "a.mp4", "B")])
    got = imported(again, tmp_path / "media", tmp_path)
    assert got["answers"] == 1 and got["answers_in_folder"] == 2 and got["answers_left_out"] == {"has the frames of a clip of another prompt": 2}
    assert got["decoded"] == 0


@pytest.mark.parametrize("moment", ["decoding", "rankings"])
def test_a_killed_import_goes_on(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]) -> None:
    labels = write_labels(two_prompts(tmp_path), ALIGN, [pair("a cat", "a.mp4", "b.mp4"), pair("a dog", "c.mp4", "d.mp4"), pair("a dog", "d.mp4", "c.mp4")])
    write_mp4(tmp_path / "media" / "c.mp4", noisy(4), 24, upscale=False)
    (tmp_path / "undisturbed").mkdir()
    imported(labels, tmp_path / "media", tmp_path / "undisturbed")
    reads.clear()
    with monkeypatch.context() as patched:
        if moment == "decoding":
            add, added = ClipStore.add, []

            def killed(store: ClipStore, *given: Any, **named: Any) -> Any:
                if len(added) == 2:
                    raise KeyboardInterrupt
                added.append(add(store, *given, **named))
                return added[-1]

            patched.setattr(ClipStore, "add", killed)
        else:
            patched.setattr(import_rankings, "write_comparisons", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            imported(labels, tmp_path / "media", tmp_path)
    kept = 2 if moment == "decoding" else 4
    assert len(ClipStore(tmp_path / "clips")) == kept and not (tmp_path / "rankings").exists()
    reads.clear()
    got = imported(labels, tmp_path / "media", tmp_path)
    assert len(reads) == got["decoded"] == 4 - kept and got["decoded_before"] == kept
    both = [load_comparisons(folder / "rankings") for folder in (tmp_path, tmp_path / "undisturbed")]
    assert both[0].events == both[1].events and both[0].split == both[1].split and set(both[0].clips) == set(both[1].clips)


def test_a_store_and_a_folder_of_rankings_hold_clips_of_one_form(tmp_path: Path, reads: list[Path]) -> None:
    labels = two_prompts(tmp_path)
    imported(labels, tmp_path / "media", tmp_path)
    reads.clear()
    with pytest.raises(UserError, match="holds clips of 13 frames of 32x32 at 12 a second, and clips of 13 frames of 32x32 at 8 a second are asked for"):
        imported(labels, tmp_path / "media", tmp_path, fps=8)
    with pytest.raises(UserError, match=r"already there about clips that are not 13 frames of 32x32 at 8 a second\. Import into another --out"):
        import_rankings.main(Config(format="videoalign", file=labels, media=tmp_path / "media", out=tmp_path / "rankings", clips=tmp_path / "others", fps=8))
    import_rankings.main(Config(format="videoalign", file=labels, media=tmp_path / "media", out=tmp_path / "labels"))
    with pytest.raises(UserError, match="Import into another --out"):
        import_rankings.main(Config(format="videoalign", file=labels, media=tmp_path / "media", out=tmp_path / "labels", clips=tmp_path / "clips"))
    with pytest.raises(UserError, match="Give --media"):
        import_rankings.main(Config(format="videoalign", file=labels, out=tmp_path / "new", clips=tmp_path / "clips"))
    assert not reads and not (tmp_path / "others").exists() and not (tmp_path / "new").exists()


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for i, name in enumerate(("a.jpg", "b.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (6, 9, 3), np.uint8)).resize((90, 60), Image.Resampling.BICUBIC).save(tmp_path / "media" / name)
    labels = tmp_path / "train.json"
    labels.write_text(json.dumps([{"prompt": "a cat", "file_path": ["a.jpg", "b.png"], "human_preference": [0, 1], "user_hash": "x"}]))
    with pytest.raises(UserError, match=r"2 clips: too short, first a\.jpg\. Check --media, or ask for clips of fewer --frames"):
        imported(labels, tmp_path / "media", tmp_path, name="hpdv2-train")
    got = imported(labels, tmp_path / "media", tmp_path, name="hpdv2-train", frames=1)
    assert got["answers"] == 1 and got["clips_by_verdict"] == {"allow": 2} and got["clips_cut_at_the_end"] == 0
    assert ClipStore(tmp_path / "clips").rows()[0].num_frames == 1


def test_a_clip_is_the_beginning_of_its_file_at_its_rate_and_no_more_of_it_is_decoded(tmp_path: Path) -> None:
    ramp = (torch.arange(240) / 240)[:, None, None, None].expand(240, 3, 64, 96)
    write_mp4(tmp_path / "ramp.mp4", ramp, 24, upscale=False)
    video, cut = read_clip(tmp_path / "ramp.mp4", Form(9, 16, 16, 6))
    assert video.shape == (9, 3, 16, 16) and cut
    torch.testing.assert_close(video.mean((1, 2, 3)), torch.arange(9) * 4 / 240, atol=0.01, rtol=0)
    assert len(read_video(tmp_path / "ramp.mp4", seconds=0.5).frames) == 13 and len(read_video(tmp_path / "ramp.mp4", seconds=100).frames) == 240
    assert len(read_video(tmp_path / "ramp.mp4", seconds=0.5, max_frames=4).frames) == 4
    assert read_clip(tmp_path / "ramp.mp4", Form(60, 16, 16, 6))[1] is False, "all of the file"
    with pytest.raises(LeftOut, match="too short"):
        read_clip(tmp_path / "ramp.mp4", Form(61, 16, 16, 6))
