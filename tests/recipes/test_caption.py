"""`rushes caption`: a line a clip whatever the clip is, going on where it ended, and flags. The model is tiny; what it says is put into its mouth where that matters."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import load
from base_model.errors import UserError
from base_model.prompts.caption import Caption, Captioner
from base_model.prompts.text import TextEncoder, likeness
from base_model.prompts.vision import Patches
from base_model.video.files import write_mp4
from recipes import caption as recipe
from recipes.caption import CARD, UNLIKE_CLIP, UNLIKE_OLD, Config, Flags, Frames, main
from recipes.clip_folder import Dropped, Named, find_clips
from recipes.encode import encode_folder
from recipes.latents import lineage_of
from tests.recipes.killed import busy
from tests.recipes.small import small_model
from tests.reward import tiny_encoders
from tests.reward.vlm.tiny import save_tiny

FRAMES = Frames(fps=4.0, min_frames=2, max_frames=8, min_pixels=64, max_pixels=1024)
LEVELS = {"a": 0.1, "b": 0.3, "c": 0.5, "d": 0.7, "e": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("vlm") / "model", "qwen2_5_vl")


def make_clips(folder: Path, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    """Five clips of even brightness and, if told, a table."""
    folder.mkdir(parents=True)
    for name, level in LEVELS.items():
        write_mp4(folder / f"{name}.mp4", torch.full((9, 3, 16, 24), level), 8.0, upscale=False)
    if rows is not None:
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(clips: Path, model: Path, out: Path, **changes: Any) -> Config:
    return Config(clips=clips, model=str(model), out=out / "metadata.jsonl", **{"frames": FRAMES, "batch": 2, "workers": 2, **changes})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture
def speech(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The model says which clip it sees, by its brightness; the list is of all that was asked about."""
    asked: list[str] = []

    def say(self: Captioner, clips: Sequence[Patches]) -> list[Caption]:
        form, said = self.vlm.patches, []
        for clip in clips:
            level = float(clip.values[:, 0].mean()) * form.std[0] + form.mean[0]
            name = min(LEVELS, key=lambda name: abs(LEVELS[name] - level))
            asked.append(name)
            said.append(Caption(f"A bright clip, the one called {name}.", True))
        return said

    monkeypatch.setattr(Captioner, "__call__", say)
    return asked


def test_every_clip_gets_a_line_whatever_it_is_and_sft_reads_the_folder(model: Path, tmp_path: Path, speech: list[str]) -> None:
    rows = [{"file_name": "a.mp4", "text": "a clip", "licence": "CC0", "flags": ["old"]}, {"file_name": "gone.mp4", "text": "x"}, {"file_name": "c.mp4", "text": ""}]
    clips = make_clips(tmp_path / "clips", rows)
    (clips / "empty.mp4").touch()
    (clips / "torn.mp4").write_bytes((clips / "b.mp4").read_bytes()[:400])
    (clips / "below").mkdir()
    write_mp4(clips / "below" / "f.mp4", torch.full((9, 3, 16, 24), 0.9), 8.0, upscale=False)
    from PIL import Image

    Image.fromarray(np.full((24, 16, 3), 77, np.uint8)).save(clips / "image.png")
    result = main(config(clips, model, tmp_path / "out"))
    found = {row["file_name"]: row for row in lines(tmp_path / "out")}
    assert list(found) == sorted(found) == ["a.mp4", "b.mp4", "below/f.mp4", "c.mp4", "d.mp4", "e.mp4", "empty.mp4", "gone.mp4", "image.png", "torn.mp4"]
    errors = {name: row["error"] for name, row in found.items() if "error" in row}
    assert set(errors) == {"empty.mp4", "gone.mp4", "torn.mp4"} and "empty" in errors["empty.mp4"] and "no such" in errors["gone.mp4"]
    assert all("\n" not in reason and str(tmp_path) not in reason for reason in errors.values())
    expected = {"text": "A bright clip, the one called a.", "old_text": "a clip", "licence": "CC0", "agreement": None, "old_agreement": None, "flags": []}
    expected["file_sha256"] = hashlib.sha256((clips / "a.mp4").read_bytes()).hexdigest()
    assert found["a.mp4"] == {"file_name": "a.mp4", "similarity": found["a.mp4"]["similarity"], **expected} and found["a.mp4"]["similarity"] > 0.3
    assert found["b.mp4"]["old_text"] is None and found["c.mp4"]["old_text"] is None and found["image.png"]["text"] == "A bright clip, the one called b."
    assert result["described"] == 7 and result["errors"] == 3 and result["clips"] == 10

    usable, dropped = find_clips(tmp_path / "out")
    assert Named("below/f.mp4", "A bright clip, the one called e.") in usable and len(usable) == 7
    assert {Dropped(name, "no caption") for name in errors} == set(dropped)
    assert (tmp_path / "out" / "a.mp4").samefile(clips / "a.mp4")
    report = encode_folder(small_model(), tmp_path / "out", tmp_path / "latents", lineage=lineage_of(None, small_model()), quiet=True).report
    assert report.used == 7 and report.found == 10


def test_old_captions_in_text_files_and_a_folder_without_any_are_described_too(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips = make_clips(tmp_path / "clips")
    (clips / "a.txt").write_text("the old text\n")
    main(config(clips, model, tmp_path / "out"))
    assert [row["old_text"] for row in lines(tmp_path / "out")] == ["the old text", None, None, None, None]
    (clips / "a.txt").unlink()
    assert main(config(clips, model, tmp_path / "other"))["described"] == 5


def test_the_same_command_goes_on_where_it_was_killed_and_ends_with_the_same_lines(model: Path, tmp_path: Path, speech: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clips = make_clips(tmp_path / "clips")
    main(config(clips, model, tmp_path / "whole"))
    assert sorted(speech) == list("abcde")
    speech.clear()
    real = Captioner.__call__

    def dies(self: Captioner, seen: Sequence[Patches]) -> list[Caption]:
        if len(speech) == 2:
            raise RuntimeError("power cut")
        return real(self, seen)

    monkeypatch.setattr(Captioner, "__call__", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        main(config(clips, model, tmp_path / "out"))
    assert [row["file_name"] for row in lines(tmp_path / "out")] == ["a.mp4", "b.mp4"]
    with open(tmp_path / "out" / "metadata.jsonl", "ab") as file:
        file.write(b'{"file_name": "c.mp4", "te')  # half a line
    monkeypatch.setattr(Captioner, "__call__", real)
    main(config(clips, model, tmp_path / "out"))
    assert speech == list("abcde"), "no clip twice"
    assert (tmp_path / "out" / "metadata.jsonl").read_bytes() == (tmp_path / "whole" / "metadata.jsonl").read_bytes()
    main(config(clips, model, tmp_path / "out"))
    assert len(speech) == 5, "what is done is not asked again"


def test_clips_that_failed_are_tried_again_and_only_they(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips = make_clips(tmp_path / "clips")
    good = (clips / "c.mp4").read_bytes()
    (clips / "c.mp4").write_bytes(b"")
    assert main(config(clips, model, tmp_path / "out"))["errors"] == 1
    (clips / "c.mp4").write_bytes(good)
    assert main(config(clips, model, tmp_path / "out"))["errors"] == 0
    assert speech == ["a", "b", "d", "e", "c"] and sorted(row["file_name"] for row in lines(tmp_path / "out")) == [f"{name}.mp4" for name in "abcde"]


def test_a_clip_that_is_gone_or_another_leaves_no_line_and_no_clip_behind(model: Path, tmp_path: Path, speech: list[str]) -> None:
    """`a` is taken out (as `rushes curate --opt-out` does), `b` written over in its place, `c` replaced by another file; `d` and `e` stay."""
    clips, out = make_clips(tmp_path / "clips"), tmp_path / "out"
    main(config(clips, model, out))
    speech.clear()
    (clips / "a.mp4").unlink()
    (clips / "b.mp4").write_bytes((clips / "e.mp4").read_bytes())
    (tmp_path / "new").write_bytes((clips / "d.mp4").read_bytes())
    os.replace(tmp_path / "new", clips / "c.mp4")
    result = main(config(clips, model, out))
    assert sorted(speech) == ["d", "e"], "what is new is described, what stayed is not"
    found = {row["file_name"]: row["text"][-2] for row in lines(out)}
    assert found == {"b.mp4": "e", "c.mp4": "d", "d.mp4": "d", "e.mp4": "e"} and result["described"] == result["clips"] == 4
    assert sorted(file.name for file in out.glob("*.mp4")) == sorted(found) and all((out / name).read_bytes() == (clips / name).read_bytes() for name in found)
    before, other = (out / "metadata.jsonl").read_bytes(), tmp_path / "other"
    other.mkdir()
    write_mp4(other / "b.mp4", torch.rand(9, 3, 16, 24), 8.0, upscale=False)
    with pytest.raises(UserError, match="none of the 4 captions there is of a clip"):
        main(config(other, model, out))
    assert (out / "metadata.jsonl").read_bytes() == before and len(list(out.glob("*.mp4"))) == 4, "another folder by mistake costs nothing"


def test_lines_that_do_not_say_of_which_bytes_they_are_are_held_against_the_clip_beside_them(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips, out = make_clips(tmp_path / "clips"), tmp_path / "out"
    main(config(clips, model, out))
    speech.clear()
    rows = [{key: value for key, value in row.items() if key != "file_sha256"} for row in lines(out)]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new").write_bytes((clips / "e.mp4").read_bytes())
    os.replace(tmp_path / "new", clips / "a.mp4")
    main(config(clips, model, out))
    assert speech == ["e"] and {row["file_name"]: row["text"][-2] for row in lines(out)} == {"a.mp4": "e", **{f"{name}.mp4": name for name in "bcde"}}


def test_captions_in_the_folder_of_the_clips_never_cost_a_clip(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips = make_clips(tmp_path / "clips")
    cfg = config(clips, model, clips).model_copy(update={"out": clips / "captions.jsonl"})
    main(cfg)
    (clips / "a.mp4").write_bytes((clips / "e.mp4").read_bytes())
    main(cfg)
    assert (clips / "a.mp4").read_bytes() == (clips / "e.mp4").read_bytes() and speech == [*"abcde", "e"]


def test_a_clip_that_cannot_be_read_just_now_keeps_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"one")
    row = {"file_sha256": hashlib.sha256(b"one").hexdigest()}
    assert recipe.is_of(row, tmp_path / "a", tmp_path / "b") and not recipe.is_of({"file_sha256": "other"}, tmp_path / "a", tmp_path / "b")
    assert not recipe.is_of(row, tmp_path / "gone", tmp_path / "b")

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(recipe, "file_hash", fails)
    assert recipe.is_of(row, tmp_path / "a", tmp_path / "b") and not recipe.is_of(row, tmp_path / "gone", tmp_path / "b")


def test_a_clip_is_never_put_over_another_of_its_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    with pytest.raises(UserError, match="another clip has that name"):
        recipe.put_beside(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").write_bytes(b"one")
    recipe.put_beside(tmp_path / "a", tmp_path / "b")
    recipe.put_beside(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").samefile(tmp_path / "a") and not (tmp_path / "b").samefile(tmp_path / "a")


def test_captions_of_another_model_or_question_are_refused_and_other_limits_flag_anew(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips = make_clips(tmp_path / "clips", [{"file_name": "a.mp4", "text": "a bright clip"}, {"file_name": "b.mp4", "text": "Quarterly tax returns for small companies."}])
    first = main(config(clips, model, tmp_path / "out"))
    assert first["flagged"] == {UNLIKE_OLD: 1, UNLIKE_CLIP: 0}
    by_name = {row["file_name"]: row for row in lines(tmp_path / "out")}
    assert by_name["b.mp4"]["flags"] == [UNLIKE_OLD] and by_name["a.mp4"]["flags"] == [] and by_name["a.mp4"]["similarity"] > 0.5 > by_name["b.mp4"]["similarity"]
    other = save_tiny(tmp_path / "other", "qwen2_5_vl", seed=1)
    for changes, word in (({"instruction": "Say one word."}, "instruction"), ({"model": str(other)}, "model, weights"), ({"max_tokens": 9}, "max_tokens")):
        with pytest.raises(UserError, match=f"made with another {word}") as error:
            main(config(clips, model, tmp_path / "out").model_copy(update=changes))
        assert "\n" not in str(error.value)
    asked = len(speech)
    assert main(config(clips, model, tmp_path / "out", flags=Flags(similarity=0.999)))["flagged"][UNLIKE_OLD] == 2 and len(speech) == asked
    assert [row["flags"] for row in lines(tmp_path / "out")][:2] == [[UNLIKE_OLD], [UNLIKE_OLD]]


def test_an_encoder_says_how_well_clip_and_caption_agree(model: Path, tmp_path: Path, speech: list[str]) -> None:
    encoder = tiny_encoders.save("clip", tmp_path / "clip")
    clips = make_clips(tmp_path / "clips", [{"file_name": "a.mp4", "text": "a bright clip"}])
    main(config(clips, model, tmp_path / "out", flags=Flags(encoder=str(encoder))))
    rows = lines(tmp_path / "out")
    loaded = recipe.load_encoder(str(encoder), fps=1.0)
    for row in rows:
        level = round(LEVELS[row["file_name"][0]] * 255) / 255
        clip = torch.full((1, 4, 3, 16, 24), level)
        expected = float(loaded.cosines(loaded.clips(clip), loaded.texts([row["text"]]))[0])
        assert row["agreement"] == pytest.approx(expected, abs=0.02), "up to the codec's rounding"
        assert (UNLIKE_CLIP in row["flags"]) == (row["agreement"] < 0.2)
    assert rows[0]["old_agreement"] == pytest.approx(float(loaded.cosines(loaded.clips(torch.full((1, 4, 3, 16, 24), 26 / 255)), loaded.texts(["a bright clip"]))[0]), abs=0.02)
    assert rows[1]["old_agreement"] is None
    blind = tiny_encoders.save("videomae", tmp_path / "videomae")
    with pytest.raises(UserError, match="reads no text"):
        main(config(clips, model, tmp_path / "blind", flags=Flags(encoder=str(blind))))


def test_likeness_is_the_cosine_of_mean_token_states_and_tells_other_subjects() -> None:
    encoder = TextEncoder()
    pairs = [("a black-and-white cat walks across a lawn", "A cat strolls over green grass."), ("an underground train at a platform", "Two people eat breakfast in a kitchen.")]
    alike, unlike = likeness(encoder, *zip(*pairs, strict=True))
    print(f"the same {alike:.2f}, something else {unlike:.2f}")
    assert alike > 0.5 > 0.3 > unlike
    states = [encoder([text]).text[0] for text in pairs[0]]
    means = [state.mean(0) / state.mean(0).norm() for state in states]
    assert alike == pytest.approx(float(means[0] @ means[1]), abs=1e-5) and likeness(encoder, [], []) == []


def test_a_model_that_says_no_whole_sentence_is_an_error_of_the_clip(model: Path, tmp_path: Path) -> None:
    """Random weights never come to an end by themselves."""
    clips = make_clips(tmp_path / "clips")
    result = main(config(clips, model, tmp_path / "out", max_tokens=3))
    assert result["errors"] == 5 and all(row["error"] == "no whole sentence in 3 tokens: raise max_tokens" for row in lines(tmp_path / "out"))


def test_what_a_trained_captioner_was_asked_is_asked_again_unless_something_else_is_given(model: Path, tmp_path: Path) -> None:
    copy = save_tiny(tmp_path / "copy", "qwen2_5_vl")
    (copy / CARD).write_text(json.dumps({"instruction": "What is it?", "frames": {"fps": 5.0}}))
    assert recipe.settings_of(Config(model=str(copy))) == ("What is it?", Frames(fps=5.0))
    assert recipe.settings_of(Config(model=str(copy), instruction="And now?", frames=FRAMES)) == ("And now?", FRAMES)
    assert recipe.settings_of(Config(model=str(model)))[1] == Frames()
    (copy / CARD).write_text('{"frames": {}}')
    with pytest.raises(UserError, match="cannot read what the captioner was asked"):
        recipe.settings_of(Config(model=str(copy)))


def test_what_cannot_be_done_is_one_line_before_a_clip_is_looked_at(model: Path, tmp_path: Path, speech: list[str]) -> None:
    clips = make_clips(tmp_path / "clips", [{"file_name": "a.mp4", "text": "a clip"}])
    (tmp_path / "nothing").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "somebody else\'s"}\n')
    make_clips(tmp_path / "taken")
    write_mp4(tmp_path / "taken" / "a.mp4", torch.rand(9, 3, 32, 32), 8.0)
    cases: list[tuple[Config, str]] = [
        (Config(), "no clips to describe"),
        (config(tmp_path / "nowhere", model, tmp_path / "out"), "no folder of clips"),
        (config(tmp_path / "nothing", model, tmp_path / "out"), "no clips, "),
        (config(clips, model, clips), "the old captions are there"),
        (config(clips, tmp_path / "nowhere", tmp_path / "out"), "cannot load the captioner"),
        (config(clips, model, tmp_path / "foreign"), "not a file of captions"),
        (config(clips, model, tmp_path / "taken"), "another clip has that name"),
        (config(clips, model, tmp_path / "out", frames=FRAMES.model_copy(update={"min_frames": 99})), "frames that cannot be"),
    ]
    for cfg, match in cases:
        with pytest.raises(UserError, match=match) as error:
            main(cfg)
        assert "\n" not in str(error.value)
    with busy(tmp_path / "busy"), pytest.raises(UserError, match="another process is at work in"):
        main(config(clips, model, tmp_path / "busy"))
    assert load(Config, None, ["--flags.similarity", "0.5"]).flags.similarity == 0.5
