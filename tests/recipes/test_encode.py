"""From a folder of clips to latents: nothing is lost, nothing is made twice, nothing stale is read, and every clip is accounted for."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from base_model import checkpoint
from base_model.errors import UserError
from base_model.families import cogvideox, hunyuan_video, ltx, mochi, wan
from base_model.tiny import LatentVideoModel
from base_model.types import ClipShape, Conditioning, TrainableModel
from base_model.video.files import mp4_bytes, read_video, write_mp4
from recipes import clip_folder, encode, shards
from recipes.clip_folder import Windows
from recipes.encode import Encoded, encode_folder, read_ahead
from recipes.fit import Fit, pack_loss
from recipes.latents import DTYPES, Cache, CachedClips, Findings, Lineage, caption_cond, encode_caption, lineage_of, load_plan, text_key
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan
from tests.forked import ranks_environment
from tests.recipes.small import small_model

CPU = torch.device("cpu")
LINEAGE = Lineage("codec", "text")
SMALL = Windows(frames=9)
FAMILIES = {
    "wan": (wan, tiny_wan.text_to_video),
    "ltx": (ltx, tiny_ltx.tiny_pipeline),
    "cogvideox": (cogvideox, tiny_cogvideox.tiny_pipeline),
    "hunyuan_video": (hunyuan_video, tiny_hunyuan_video.tiny_pipeline),
    "mochi": (mochi, tiny_mochi.tiny_pipeline),
    "mochi, the empty prompt is no prompt": (mochi, lambda: tiny_mochi.tiny_pipeline(zero_empty=False)),
}


class Counted(LatentVideoModel):
    """Counts clips and captions that are encoded."""

    def __init__(self) -> None:
        model = small_model()
        super().__init__(model.network, model.codec, model.text, model.config)
        self.clips, self.captions = Counter[bytes](), Counter[str]()

    def encode(self, video: Tensor) -> Tensor:
        self.clips[video.numpy().tobytes()] += 1
        return super().encode(video)

    def encode_text(self, prompts: Any) -> Conditioning:
        self.captions.update(prompts)
        return super().encode_text(prompts)


def clip(seed: int, frames: int = 9, height: int = 16, width: int = 24) -> bytes:
    return mp4_bytes(torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed)), 12.0, upscale=False)


def clips_in(folder: Path, contents: Mapping[str, bytes], captions: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    rows = {name: f"clip {name}" for name in contents} | dict(captions or {})
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows.items()))
    return folder


def encoded(folder: Path, out: Path, model: TrainableModel | None = None, *, lineage: Lineage = LINEAGE, windows: Windows = SMALL, **told: Any) -> Encoded:
    return encode_folder(model or Counted(), folder, out, lineage=lineage, windows=windows, quiet=True, workers=2, **told)


def contents_of(examples: CachedClips) -> dict[tuple[str, int, str], Tensor]:
    return {(row.name, row.begin, row.text): examples.latent(k) for k, row in enumerate(examples.rows)}


# Examples


def test_examples_are_what_the_model_makes_of_the_clips(tmp_path: Path) -> None:
    folder, model = clips_in(tmp_path / "clips", {"a.mp4": clip(0, 31), "b.mp4": clip(1, 6, 32, 16)}), Counted()
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(folder / "c.png")
    clips_in(folder, {}, {"a.mp4": "first", "b.mp4": "second", "c.png": "third"})
    examples, report = encoded(folder, tmp_path / "cache", model)
    assert examples.texts == ["first"] * 4 + ["second", "third"] and examples.sources == ["a.mp4"] * 4 + ["b.mp4", "c.png"]
    assert [(row.begin, row.frames) for row in examples.rows] == [(0, 9), (9, 9), (18, 9), (27, 1), (0, 5), (0, 1)] and len(examples) == 6
    frames = torch.from_numpy(read_video(folder / "a.mp4").frames).permute(0, 3, 1, 2)  # [T,3,H,W]
    for row in range(len(examples)):
        video, latents = examples.video(row), examples.latent(row)
        if row < 4:
            assert torch.equal(video, frames[9 * row : 9 * row + len(video)])
        assert video.dtype == torch.uint8 and latents.shape == examples.shapes[row] == model.latents.shape(ClipShape(*video.shape[:1], *video.shape[2:]))
        assert latents.dtype == torch.float32 and torch.equal(latents, model.encode(video[None].float() / 255)[0])
        cond, own = examples.cond(row), model.encode_text([examples.texts[row]])
        assert cond.prompts == own.prompts and torch.equal(cond.text, own.text) and torch.equal(cond.mask, own.mask)
    assert examples.cond(None).prompts == ("",) and torch.equal(examples.cond(None).text, model.encode_text([""]).text)
    assert (report.found, report.used, report.examples, report.frames, report.frames_left_out) == (3, 3, 6, 34, 3 + 1)
    assert report.shapes == {"9x16x24": (3, 54), "5x32x16": (1, 16), "1x16x24": (1, 6), "1x16x16": (1, 4)} and report.tokens == 80
    assert report.seconds == pytest.approx((3 * 9 + 5) / 12)


def test_a_step_of_sft_learns_from_the_captions_that_are_kept_and_encodes_none(tmp_path: Path) -> None:
    """Encoded again beside others they would round otherwise: a resumed run would not make the steps of one that has just encoded them."""

    def nobody(prompts: Any) -> Any:
        raise AssertionError(f"encoded again: {prompts}")

    folder, model = clips_in(tmp_path / "clips", {name: clip(seed) for seed, name in enumerate(("a.mp4", "b.mp4", "c.mp4"))}), small_model()
    examples, _ = encoded(folder, tmp_path / "cache", model)
    model.text = nobody  # type: ignore[assignment]
    (loss,) = pack_loss(Fit(iterations=1, lr=1e-3, text_dropout=0.5), model, examples, 3, (range(3), torch.Generator().manual_seed(3)))
    assert bool(loss.value.isfinite())


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_captions_give_the_velocity_of_fresh_ones_to_the_bit(family: str, tmp_path: Path) -> None:
    """Also through the file, and for the empty prompt; no more is kept than the caption's own states."""
    module, make = FAMILIES[family]
    make().save_pretrained(tmp_path / "model")
    model = module.load(str(tmp_path / "model"), device=CPU, dtype=torch.float32)
    cache = Cache(tmp_path / "cache", LINEAGE, "float32")
    shape = model.latents.shape(ClipShape(1 + model.latents.time_stride, 64, 64))
    x, t = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.6])
    for text in ("a red ball rolls", "a", ""):
        fresh = model.encode_text([text])
        cache.texts.put(text_key(text), encode_caption(model, text))
        cache.close()
        entry = Cache(tmp_path / "cache", LINEAGE, "float32").texts.get(text_key(text))
        kept = caption_cond(text, entry)
        assert kept.prompts == fresh.prompts and torch.equal(kept.mask, fresh.mask) and kept.text.shape == fresh.text.shape and kept.text.dtype == fresh.text.dtype
        assert torch.equal(kept.text[kept.mask], fresh.text[fresh.mask]) and len(entry["text"]) == int(fresh.mask.sum())
        assert (kept.pooled is None and fresh.pooled is None) or torch.equal(kept.pooled, fresh.pooled)
        with torch.no_grad():
            assert torch.equal(model(x, t, kept), model(x, t, fresh))
            other = model(x, t, model.encode_text(["the blue cube stops"]))
        assert not torch.equal(other, model(x, t, fresh).detach()), "the text is heard"


def test_half_precision_halves_the_file_and_rounds_once(tmp_path: Path) -> None:
    folder = clips_in(tmp_path / "clips", {"a.mp4": clip(0)})
    whole, half = (encoded(folder, tmp_path / stored, stored=stored).examples for stored in DTYPES)
    assert torch.equal(half.latent(0), whole.latent(0).bfloat16().float()) and half.latent(0).dtype == torch.float32
    sizes = [sum(path.stat().st_size for path in (tmp_path / stored / "latents").glob("*.safetensors")) for stored in DTYPES]
    assert sizes[1] < 0.7 * sizes[0]


# Keys


def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    folder, out, model = clips_in(tmp_path / "clips", {"a.mp4": clip(0, 31), "b.mp4": clip(1)}), tmp_path / "cache", Counted()

    def news() -> tuple[int, list[str]]:
        before = model.clips.total(), model.captions.copy()
        encoded(folder, out, model)
        return model.clips.total() - before[0], sorted((model.captions - before[1]).elements())

    assert news() == (5, ["", "clip a.mp4", "clip b.mp4"])
    assert news() == (0, [])
    clips_in(folder, {}, {"a.mp4": "another caption", "b.mp4": "clip b.mp4"})
    assert news() == (0, ["another caption"])
    (folder / "b.mp4").write_bytes(clip(2))
    assert news() == (1, [])
    shutil.copy(folder / "b.mp4", folder / "c.mp4")
    clips_in(folder, {}, {"a.mp4": "another caption", "c.mp4": "clip b.mp4"})
    assert news() == (0, []), "a copy has the same bytes"
    (folder / "a.mp4").write_bytes(clip(0, 31) + b"\0\0\0\x0cfree1234")
    assert news() == (4, []), "other bytes are another clip"


def test_copies_of_a_file_are_one_source_and_are_encoded_once(tmp_path: Path) -> None:
    folder, model = clips_in(tmp_path / "clips", {name: clip(0) for name in ("a.mp4", "b.mp4", "c.mp4")}), Counted()
    examples, _ = encoded(folder, tmp_path / "cache", model)
    assert model.clips.total() == 1 and examples.sources == ["a.mp4"] * 3 and len(set(examples.texts)) == 3


def test_entries_of_another_codec_encoder_or_precision_are_never_read(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0)}), tmp_path / "cache"
    first, report = encoded(folder, out)
    assert report.stale == 0
    changed = Counted()
    with torch.no_grad():
        changed.codec.normaliser.mean += 1
    for lineage, new_clips, new_captions in ((Lineage("another", "text"), 1, 0), (Lineage("codec", "another"), 0, 2)):
        model = Counted() if lineage.codec == "codec" else changed
        examples, report = encoded(folder, out, model, lineage=lineage)
        assert (model.clips.total(), model.captions.total()) == (new_clips, new_captions) and report.stale > 0
        assert "entries of the cache are of another codec, encoder or precision and were not read" in report.lines()[-1]
        assert torch.equal(examples.latent(0), first.latent(0)) == (lineage.codec == "codec")
    assert encoded(folder, out, changed, stored="bfloat16").report.stale > 0 and changed.clips.total() == 2


def test_other_windows_are_other_entries_and_what_a_clip_is_is_known(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0, 13, 32, 48)}), tmp_path / "cache"
    encoded(folder, out, model := Counted())
    for windows in (Windows(frames=5), Windows(frames=9, fps=6.0), Windows(frames=9, area=512), Windows(frames=9, size=(16, 32))):
        before = model.clips.total()
        report = encoded(folder, out, model, windows=windows).report
        assert model.clips.total() - before == report.examples
    assert len((out / "clips.jsonl").read_text().splitlines()) == 1


def test_the_lineage_of_a_family_is_that_of_its_codec_and_text_files_alone(tmp_path: Path) -> None:
    tiny_wan.text_to_video().save_pretrained(tmp_path)

    def lineage(precision: torch.dtype = torch.float32) -> Lineage:
        return lineage_of(tmp_path, wan.load(str(tmp_path), device=CPU, dtype=precision))

    def changed(name: str) -> Lineage:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(before.replace(b"\n}", b',\n  "a": 1\n}') if name.endswith("json") else before[:-1] + bytes([before[-1] ^ 1]))
        found = lineage()
        (tmp_path / name).write_bytes(before)
        return found

    first = lineage()
    assert lineage() == first
    vae, text, words, network = map(
        changed, ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer_config.json", "transformer/config.json")
    )
    assert vae.codec != first.codec and vae.text == first.text
    assert text.codec == first.codec and text.text != first.text and words.codec == first.codec and words.text != first.text
    assert network == first
    half = lineage(torch.bfloat16)
    assert half.text != first.text, "a text encoder in another precision says something else"
    own = lineage_of(None, small_model())
    assert own == lineage_of(None, small_model(1)) and own.codec != own.text and len({own.codec, own.text, first.codec, first.text}) == 4


# What goes wrong


def test_bad_clips_are_dropped_with_a_reason_and_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clip(0)
    contents = {"good.mp4": whole, "cut.mp4": whole[:-300], "empty.mp4": b"", "text.mp4": b"not a video" * 40, "small.mp4": clip(3, 5, 16, 6), "empty.png": b""}
    folder, out = clips_in(tmp_path / "clips", contents, {"gone.mp4": "gone", "enormous.gif": "enormous"}), tmp_path / "cache"
    (folder / "enormous.gif").write_bytes(enormous())
    (folder / "stranger.mp4").write_bytes(whole)
    report = encoded(folder, out).report
    assert (report.found, report.used, report.examples) == (9, 1, 1)
    reasons = dict(report.dropped)
    assert reasons.keys() == {"cut.mp4", "empty.mp4", "text.mp4", "small.mp4", "empty.png", "gone.mp4", "enormous.gif", "stranger.mp4"}
    assert reasons["empty.mp4"] == "the video file is empty" and reasons["gone.mp4"] == "no such file" and reasons["stranger.mp4"] == "not in metadata.jsonl"
    assert "truncated or damaged" in reasons["cut.mp4"] and reasons["small.mp4"] == "16x6 is smaller than 8x8, the least this model takes"
    assert reasons["text.mp4"].startswith("cannot read the video") and "empty.png" in reasons["empty.png"] and reasons["enormous.gif"].startswith("cannot read the video")
    assert not any(str(tmp_path) in line for line in (*reasons.values(), *report.lines()))
    lines = report.lines()
    assert lines[0] == "9 clips found, 1 used in 1 examples, 8 dropped" and "  dropped 1: no such file (gone.mp4)" in lines
    told = json.loads((out / "report.json").read_text())
    assert told["found"] == 9 and {drop["name"]: drop["reason"] for drop in told["dropped"]} == reasons
    asked: list[str] = []
    monkeypatch.setattr(encode, "read_frames", lambda path: asked.append(path.name) or iter(()))
    assert encoded(folder, out).report.dropped == report.dropped and not asked


def enormous() -> bytes:
    """A few hundred bytes that say of themselves that their frames are 65535 pixels wide and high."""
    buffer = io.BytesIO()
    Image.new("P", (16, 16)).save(buffer, "GIF", save_all=True, append_images=[Image.new("P", (16, 16), k) for k in range(1, 4)])
    return buffer.getvalue()[:6] + b"\xff" * 4 + buffer.getvalue()[10:]


def test_a_clip_that_turns_out_damaged_behind_good_examples_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = clips_in(tmp_path / "clips", {"a.mp4": clip(0, 31), "b.mp4": clip(1)}), clip_folder.each_frame

    def broken(path: Path) -> Iterator[Any]:
        for number, pair in enumerate(real(path)):
            if number == 25 and path.name == "a.mp4":
                raise UserError(f"the video file is truncated or damaged after {number} frames, {path}. Copy or make it again")
            yield pair

    monkeypatch.setattr(clip_folder, "each_frame", broken)
    examples, report = encoded(folder, tmp_path / "cache")
    assert examples.sources == ["b.mp4"] and report.dropped[0] == ("a.mp4", "the video file is truncated or damaged after 25 frames")


def test_nothing_left_to_train_on_is_an_error_that_says_why(tmp_path: Path) -> None:
    folder = clips_in(tmp_path / "clips", {"a.mp4": b"", "b.mp4": b"x"})
    with pytest.raises(UserError, match=r"none of 2 clips can be used.*the video file is empty"):
        encoded(folder, tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "report.json").read_text())["used"] == 0


def test_a_codec_that_makes_nan_is_an_error_and_nothing_of_it_is_kept(tmp_path: Path) -> None:
    model = Counted()
    with torch.no_grad():
        model.codec.normaliser.mean.fill_(float("nan"))
    with pytest.raises(UserError, match="nan or infinite latents"):
        encoded(clips_in(tmp_path / "clips", {"a.mp4": clip(0)}), tmp_path / "cache", model)
    assert not list((tmp_path / "cache" / "latents").glob("*.safetensors"))


def test_a_damaged_shard_is_named_and_encoded_anew(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0), "b.mp4": clip(1)}), tmp_path / "cache"
    first = contents_of(encoded(folder, out).examples)
    (hurt,) = (out / "latents").glob("*.safetensors")
    hurt.write_bytes(hurt.read_bytes()[:-5])
    examples, report = encoded(folder, out, model := Counted())
    assert model.clips.total() == 2 and report.damaged == [hurt.name] and any(hurt.name in line for line in report.lines())
    assert all(torch.equal(value, first[name]) for name, value in contents_of(examples).items())


def test_pixels_of_a_clip_that_is_no_longer_the_same_are_refused(tmp_path: Path) -> None:
    folder = clips_in(tmp_path / "clips", {"a.mp4": clip(0)})
    examples, _ = encoded(folder, tmp_path / "cache")
    assert len(examples.video(0)) == 9
    (folder / "a.mp4").write_bytes(clip(1))
    with pytest.raises(UserError, match="not the clip that was encoded"):
        examples.video(0)
    (folder / "a.mp4").unlink()
    with pytest.raises(UserError, match="cannot read"):
        examples.video(0)
    assert examples.latent(0).isfinite().all()


def test_a_torn_line_of_what_is_known_of_clips_is_passed_over(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0), "b.mp4": clip(1)}), tmp_path / "cache"
    encoded(folder, out)
    log = out / "clips.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    encoded(folder, out, model := Counted())
    assert model.clips.total() == 0 and len(Findings(out).facts) == 2


def test_a_picture_that_is_called_a_clip_says_nothing_of_one_that_is_called_a_picture(tmp_path: Path) -> None:
    folder = clips_in(tmp_path / "clips", {"a.mp4": b"", "b.png": b""})
    Image.new("RGB", (16, 16)).save(folder / "b.png")
    shutil.copy(folder / "b.png", folder / "a.mp4")
    for _ in range(2):
        examples, report = encoded(folder, tmp_path / "cache")
        assert examples.sources == ["b.png"] and [name for name, _ in report.dropped] == ["a.mp4"]


def test_a_reason_is_asked_for_again_where_the_decoder_is_another(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0), "b.mp4": clip(1)}), tmp_path / "cache"
    encoded(folder, out)
    log = out / "clips.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for reader, used in ((rows[0]["reader"], 1), ("0.1", 2)):
        log.write_text("".join(json.dumps({**rows[0], "reason": "is odd", "reader": reader} if row is rows[0] else row) + "\n" for row in rows))
        assert encoded(folder, out).report.used == used


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder, out = clips_in(tmp_path / "clips", {"a.mp4": clip(0, 31), "b.mp4": clip(1)}), tmp_path / "cache"
    examples, _ = encoded(folder, out)
    (plan,) = (out / "plans").glob("*.parquet")
    assert load_plan(plan) == list(examples.rows)
    again = CachedClips(load_plan(plan), Cache(out, LINEAGE, "float32"), folder, examples.cut)
    assert again.shapes == examples.shapes and torch.equal(again.latent(2), examples.latent(2)) and torch.equal(again.video(2), examples.video(2))
    plan.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="no plan of examples"):
        load_plan(plan)


# Several at once


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_share_the_clips_and_all_see_the_same_examples(ranks: int, tmp_path: Path) -> None:
    """One after another up to where they wait for each other, as processes would be."""
    folder = clips_in(tmp_path / "clips", {f"{k}.mp4": clip(k) for k in range(7)} | {"bad.mp4": b"x"})
    alone, report = encoded(folder, tmp_path / "alone")
    models, found = [Counted() for _ in range(ranks)], list[Encoded]()
    last = encoded_by_rank(folder, tmp_path / "shared", models, found)
    assert sum(model.clips.total() for model in models) == 7 and sum(model.captions.total() for model in models) == 9
    assert max(model.clips.total() for model in models) <= 7 // ranks + 1
    for each in [*found, last]:
        assert each.report == report and each.examples.rows == alone.rows
        assert all(torch.equal(each.examples.latent(row), alone.latent(row)) for row in range(7))
    assert len(list((tmp_path / "shared" / "plans").glob("*.parquet"))) == 1


def encoded_by_rank(folder: Path, out: Path, models: list[Counted], found: list[Encoded], rank: int = 0) -> Encoded:
    """Each rank waits until the next one has come to where it waits: the last one goes on first."""

    def wait() -> None:
        if rank + 1 < len(models):
            found.append(encoded_by_rank(folder, out, models, found, rank + 1))

    return encoded(folder, out, models[rank], rank=rank, ranks=len(models), wait=wait)


def test_work_in_threads_comes_back_whole_and_its_error_is_raised() -> None:
    def work(item: int) -> Iterator[tuple[int, int]]:
        for k in range(item):
            yield item, k
        if item == 13:
            raise UserError("thirteen")

    assert sorted(read_ahead(work, range(12), workers=3)) == [(item, k) for item in range(12) for k in range(item)]
    assert not list(read_ahead(work, (), workers=2))
    with pytest.raises(UserError, match="thirteen"):
        list(read_ahead(work, range(20), workers=3))


# A day in the life


def write_many(folder: Path, count: int) -> None:
    """So many distinct clips of mixed sizes and lengths, one of them truncated, one empty, one whose header says that it is enormous."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for k in range(count):
        frames, height, width = int(rng.integers(1, 22)), int(rng.choice([16, 24, 32])), int(rng.choice([16, 24, 40]))
        content = clip(k, frames, height, width)
        name = f"{k:04d}.mp4"
        if k == count // 3:
            content = content[:-200]
        if k == count // 2:
            content = b""
        if k == 2 * count // 3:
            name, content = f"{k:04d}.gif", enormous()
        (folder / name).write_bytes(content)
        lines.append(json.dumps({"file_name": name, "text": f"a clip of {frames} frames, take {k % 40}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("count", [150, pytest.param(2_000, marks=pytest.mark.slow)])
def test_a_day_in_the_life(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle of the clips; then, elsewhere, in the middle of a write; then there is room. Nothing is lost, nothing is encoded twice."""
    folder, out, model = tmp_path / "clips", tmp_path / "cache", Counted()
    write_many(folder, count)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1 << 16)
    seen = 0

    def usage(_: Path) -> SimpleNamespace:
        nonlocal seen
        seen += 1
        return SimpleNamespace(free=1 << 40 if seen < count // 2 else 0)

    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", usage)
        with pytest.raises(UserError, match="the disk is full") as error:
            encoded(folder, out, model)
    assert "\n" not in str(error.value) and model.clips.total() == count // 2 - 1
    kept = len(Cache(out, LINEAGE, "float32").latents._held)
    assert kept == count // 2 - 1, "what was made is kept"

    writes, write = 0, checkpoint.write_synced

    def torn(path: Path, content: bytes) -> None:
        nonlocal writes
        writes += path.suffix == ".partial" and "safetensors" in path.name
        if writes >= 2:
            path.write_bytes(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as full:
        full.setattr(checkpoint, "write_synced", torn)
        with pytest.raises(UserError, match="the disk is full"):
            encoded(folder, out, model)
    lost = model.clips.total() - len(Cache(out, LINEAGE, "float32").latents._held)
    assert 0 < lost <= (1 << 16) / (4 * 16 * 4 * 4), "at most the shard that was being written: entries are 16 channels of 4x4 and more"

    examples, report = encoded(folder, out, model)
    assert (report.found, report.used, len(report.dropped)) == (count, count - 3, 3) and report.examples == len(examples)
    assert [reason.partition(" at byte")[0].partition(":")[0] for _, reason in report.dropped] == [
        "the video file is truncated or damaged",
        "the video file is empty",
        "cannot read the video",
    ]
    assert len(model.clips) == len({row.key for row in examples.rows}), "every window was encoded"
    assert model.clips.total() == len(model.clips) + lost, "and none of those that were kept again"
    assert set(model.captions) == {"", *examples.texts} | {json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()}
    frames = sum(len(read_video(folder / name).frames) for name in {row.name for row in examples.rows})
    assert report.frames + report.frames_left_out == frames and report.frames_left_out < 4 * count
    again = encoded(folder, out, model)
    assert model.clips.total() == len(model.clips) + lost and again.report == report and again.examples.rows == examples.rows
    sample = range(0, len(examples), max(1, len(examples) // 20))
    assert all(torch.equal(examples.latent(row), small_model().encode(examples.video(row)[None].float() / 255)[0]) for row in sample)


# The command


def test_a_killed_command_goes_on_with_two_processes(tmp_path: Path) -> None:
    """SIGKILL after the first shards; the same command in two processes encodes the rest, and comes to what an undisturbed one comes to."""
    folder, out = clips_in(tmp_path / "clips", {f"{k}.mp4": clip(k, 21) for k in range(12)}), tmp_path / "out"
    words = ["encode", "--clips", str(folder), "--out", str(out), "--windows.frames", "9"]
    code = f"""
import os, signal
from recipes import shards
from recipes.cli import main
shards.SHARD_BYTES = 20_000
write, written = shards.atomic_write, []
def killed(path, content):
    write(path, content)
    written.append(path)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
shards.atomic_write = killed
main({words!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    lineage = lineage_of(None, small_model())
    kept = set(Cache(out, lineage, "float32").latents._held)
    assert 0 < len(kept) < 24
    command = [sys.executable, "-m", "recipes.cli", *words, "--json"]
    running = [subprocess.Popen(command, env={**environment, **told}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for told in ranks_environment(2)]
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert json.loads(said[0][0])["examples"] == 24 and said[1][0] == ""
    both = Cache(out, lineage, "float32").latents
    assert sum(len(shard.keys) for shard in both._known.values()) == len(both._held) == 24 and kept < set(both._held), "nothing was encoded twice"
    examples, _ = encoded(folder, out, model := Counted(), lineage=lineage)
    whole = contents_of(encoded(folder, tmp_path / "whole").examples)
    assert model.clips.total() == 0 and all(torch.equal(value, whole[name]) for name, value in contents_of(examples).items())


def test_the_command_says_what_became_of_the_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from recipes.cli import main

    folder = clips_in(tmp_path / "clips", {"a.mp4": clip(0), "b.mp4": b""})
    words = ["encode", "--clips", str(folder), "--out", str(tmp_path / "out"), "--windows.frames", "5", "--windows.size", "[16, 16]"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clips"] == 2 and found["used"] == 1 and found["examples"] == 2 and found["dropped"] == {"b.mp4": "the video file is empty"}
    assert found["report"][0] == "2 clips found, 1 used in 2 examples, 1 dropped"
    assert main(["encode", "--out", str(tmp_path / "out")]) == 2
    assert "rushes: no folder of clips, clips. Give one: --clips FOLDER" in capsys.readouterr().err


def test_a_real_clip_of_any_size_becomes_examples_within_the_area(tmp_path: Path) -> None:
    write_mp4(tmp_path / "wide.mp4", torch.rand(14, 3, 90, 320), 30.0, upscale=False)
    folder = clips_in(tmp_path, {}, {"wide.mp4": "a wide clip"})
    examples, _ = encoded(folder, tmp_path / "cache", windows=Windows(area=1200))
    (row,) = examples.rows
    assert (row.frames, row.height, row.width) == (5, 16, 64)
