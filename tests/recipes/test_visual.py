"""Visual prompts from files: what is given stays, joints fall where they should, long clips need no more memory, and what does not fit is refused in one line."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from base_model.errors import UserError
from base_model.tiny import LatentVideoModel
from base_model.types import LatentSpec
from base_model.video.files import from_uint8, read_lossless, to_uint8, write_lossless
from base_model.video.store import ClipStore
from recipes import generate
from recipes.generate import Config, Sampler, check_memory, make_clips, sample
from recipes.memory import PeakMemory
from recipes.models import with_canvases
from recipes.visual import Visual, head_frames, prepare, tail_frames
from tests.recipes.small import save_small_network, small_model

SAMPLER = Sampler(steps=2, frames=13, height=16, width=24)
SPEC, PATCH = LatentSpec(8, 4, 4), (1, 2, 2)


@pytest.fixture(scope="module")
def model() -> LatentVideoModel:
    model = small_model()
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def clip_file(path: Path, frames: int, seed: int = 0, height: int = 16, width: int = 24) -> Tensor:
    """A lossless clip on disk and its exact frames [T,3,H,W]."""
    video = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))
    write_lossless(path, video, fps=12)
    return from_uint8(read_lossless(path).frames)


def image_file(path: Path, pixels: Tensor) -> Tensor:
    frames = to_uint8(pixels[None])
    Image.fromarray(frames[0]).save(path)
    return from_uint8(frames)[0]


def made_by(model: LatentVideoModel, visual: Visual, sampler: Sampler = SAMPLER, clips: int = 2) -> list[Tensor]:
    return list(make_clips(model, model.encode_text(["a red circle grows"] * clips), list(range(clips)), sampler, visual, prepare(visual, sampler.clip, sampler.fps, SPEC, PATCH)))


def test_extending_forwards_and_backwards_keeps_every_given_frame_and_adds_new_ones(model: LatentVideoModel, tmp_path: Path) -> None:
    source = clip_file(tmp_path / "a.mkv", 7)
    for clip in made_by(model, Visual(kind="extend", file=tmp_path / "a.mkv")):
        assert torch.equal(clip[:7], source) and len(clip) == 7 + 13 - 5
    for clip in made_by(model, Visual(kind="extend_back", file=tmp_path / "a.mkv")):
        assert torch.equal(clip[-7:], source) and len(clip) == 7 + 13 - 4
    one, other = made_by(model, Visual(kind="extend", file=tmp_path / "a.mkv"))
    assert not torch.equal(one[7:], other[7:]), "each seed goes on in its own way"


def test_connecting_and_looping_make_what_lies_between(model: LatentVideoModel, tmp_path: Path) -> None:
    a, b = clip_file(tmp_path / "a.mkv", 7), clip_file(tmp_path / "b.mkv", 6, seed=1)
    (joined, _) = made_by(model, Visual(kind="connect", file=tmp_path / "a.mkv", second=tmp_path / "b.mkv"))
    assert torch.equal(joined[:7], a) and torch.equal(joined[-6:], b) and len(joined) == 7 + 4 + 6
    longer = SAMPLER.model_copy(update={"frames": 21})
    (looped, _) = made_by(model, Visual(kind="loop", file=tmp_path / "a.mkv"), longer)
    assert torch.equal(looped[:7], a) and len(looped) == 7 + 21 - 5 - 4


def test_both_ends_of_a_joint_are_heard(model: LatentVideoModel, tmp_path: Path) -> None:
    clip_file(tmp_path / "a.mkv", 7)
    between = []
    for seed in (1, 2):
        clip_file(tmp_path / f"b{seed}.mkv", 6, seed=seed)
        between.append(made_by(model, Visual(kind="connect", file=tmp_path / "a.mkv", second=tmp_path / f"b{seed}.mkv"))[0][7:11])
    assert (between[0] - between[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["image", "inpaint", "outpaint"])
def test_given_pixels_come_out_as_the_autoencoder_gives_them_back(model: LatentVideoModel, tmp_path: Path, kind: str) -> None:
    if kind == "image":
        image_file(tmp_path / "a.png", torch.rand(3, 16, 24))
        visual = Visual(kind="image", file=tmp_path / "a.png")
    elif kind == "inpaint":
        clip_file(tmp_path / "a.mkv", 13)
        hole = torch.zeros(3, 16, 24)
        hole[:, 3:9, 10:14] = 1
        image_file(tmp_path / "mask.png", hole)
        visual = Visual(kind="inpaint", file=tmp_path / "a.mkv", mask=tmp_path / "mask.png")
    else:
        clip_file(tmp_path / "a.mkv", 13, height=16, width=8)
        visual = Visual(kind="outpaint", file=tmp_path / "a.mkv")
    told = with_canvases(model, model.encode_text(["a red circle grows"]), [prepare(visual, SAMPLER.clip, 12, SPEC, PATCH).canvas]).known
    assert told is not None and {"image": 6, "inpaint": 24 - 4 * 2, "outpaint": 8}[kind] == int(told.mask.sum()) // 4
    seen: list[Tensor] = []
    decode = model.decode
    try:
        model.decode = lambda x0: seen.append(x0) or decode(x0)  # type: ignore[method-assign]
        made_by(model, visual, clips=1)
    finally:
        del model.decode  # type: ignore[method-assign]
    mask = told.mask[:, None].expand_as(seen[0])
    assert torch.allclose(seen[0][mask], told.values[mask], atol=1e-5)


def test_an_edit_of_strength_one_forgets_the_clip_and_a_weak_one_keeps_it(model: LatentVideoModel, tmp_path: Path) -> None:
    source = clip_file(tmp_path / "a.mkv", 13)
    cond = model.encode_text(["a red circle grows"] * 2)
    (free, _) = torch.cat(list(sample(model, cond, [0, 1], SAMPLER)))
    (strong, _) = made_by(model, Visual(kind="edit", file=tmp_path / "a.mkv", strength=1.0))
    assert torch.allclose(strong, free, atol=1e-5)
    kept = model.decode(model.encode(source[None]))[0]
    (weak, _) = made_by(model, Visual(kind="edit", file=tmp_path / "a.mkv", strength=0.01))
    assert (weak - kept).abs().mean() < 0.05 * (free - kept).abs().mean()


def test_a_long_clip_goes_on_from_its_own_last_frames_in_bounded_steps(model: LatentVideoModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = []
    forward = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x, *rest: tokens.append(len(x)) or forward(x, *rest))
    (long, _) = made_by(model, Visual(seconds=60))
    assert len(long) == 720 and set(tokens) == {2 * 4 * 2 * 3}, "no step sees more than the clips of one window"
    (short, _) = made_by(model, Visual(seconds=2))
    assert torch.equal(long[:24], short)
    parts = long[13:].split(8)[:-1]
    assert all(not torch.equal(a, b) for a, b in pairwise(parts)), "each window has noise of its own"


def test_sixty_seconds_need_the_memory_of_their_pixels_and_little_more(tmp_path: Path) -> None:
    """From prompt to files. What grows with the length are finished pixels and the copies that filters and writers make of them."""
    network = save_small_network(tmp_path / "network.safetensors")
    sampler = Sampler(steps=1, frames=25, height=32, width=48)
    peaks = []
    for seconds in (3, 60):
        cfg = Config(out=tmp_path / "clips", model=network, prompts=("a red circle grows",), clips_per_prompt=1, sampler=sampler, visual=Visual(seconds=seconds))
        with PeakMemory(interval=0.01) as memory:
            generate.main(cfg)
        peaks.append(memory.peak_bytes)
    assert [row.num_frames for row in ClipStore(tmp_path / "clips").rows()] == [36, 720]
    pixels = 720 * 3 * 32 * 48 * 4
    assert peaks[1] - peaks[0] < 6 * pixels + 64 * 2**20, f"{(peaks[1] - peaks[0]) / 2**20:.0f} MiB more for {pixels / 2**20:.0f} MiB of pixels"


def test_an_image_and_a_clip_can_be_made_long(model: LatentVideoModel, tmp_path: Path) -> None:
    source = clip_file(tmp_path / "a.mkv", 7)
    image_file(tmp_path / "a.png", source[0])
    (clip, _) = made_by(model, Visual(kind="extend", file=tmp_path / "a.mkv", seconds=3))
    assert len(clip) == 36 and torch.equal(clip[:7], source)
    assert len(made_by(model, Visual(kind="image", file=tmp_path / "a.png", seconds=2.5))[0]) == 30


def test_how_many_frames_a_joint_takes() -> None:
    assert [head_frames(wanted, there, 9, 4) for wanted, there in ((5, 7), (1, 7), (4, 9), (99, 99), (9, 3), (9, 9))] == [5, 1, 1, 9, 1, 9]
    assert head_frames(5, 7, -3, 4) == 1
    assert [tail_frames(wanted, there, 12, 4) for wanted, there in ((5, 7), (8, 9), (99, 99))] == [4, 8, 12]
    for wanted, there, room, message in ((5, 3, 12, "3 frames are given"), (3, 9, 12, "visual.frames is 3"), (5, 9, 3, "the clip is too short")):
        with pytest.raises(ValueError, match=message):
            tail_frames(wanted, there, room, 4)


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
@pytest.mark.parametrize("wanted", [1, 4, 5, 13])
@pytest.mark.parametrize("kind", ["image", "edit", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint"])
def test_every_kind_works_at_every_length_or_says_in_one_line_why_not(model: LatentVideoModel, tmp_path: Path, kind: str, wanted: int, frames: int) -> None:
    sampler = SAMPLER.model_copy(update={"frames": frames, "steps": 1})
    clip_file(tmp_path / "a.mkv", 13, width=8 if kind == "outpaint" else 24)
    image_file(tmp_path / "mask.png", (torch.arange(24) < 8).float().expand(3, 16, -1))
    visual = Visual.model_validate({"kind": kind, "file": tmp_path / "a.mkv", "frames": wanted})
    visual = visual.model_copy(update={"second": tmp_path / "a.mkv"} if kind == "connect" else {"mask": tmp_path / "mask.png"} if kind == "inpaint" else {})
    least = {"image": 5, "extend": 5, "extend_back": 5, "connect": 9, "loop": 9}.get(kind, 1)
    if frames < least or (wanted < 4 and kind in ("extend_back", "connect", "loop")):
        with pytest.raises(UserError):
            made_by(model, visual, sampler, clips=1)
    else:
        (clip,) = made_by(model, visual, sampler, clips=1)
        assert len(clip) >= frames and bool(torch.isfinite(clip).all())


def test_files_are_read_upright_in_the_size_and_at_the_rate_of_the_clip(tmp_path: Path) -> None:
    write_lossless(tmp_path / "fast.mkv", torch.rand(26, 3, 16, 24), fps=24)
    prepared = prepare(Visual(kind="edit", file=tmp_path / "fast.mkv"), SAMPLER.clip, 12, SPEC, PATCH)
    assert prepared.start is not None and torch.equal(prepared.start, from_uint8(read_lossless(tmp_path / "fast.mkv").frames)[::2])
    image_file(tmp_path / "big.png", torch.rand(3, 64, 64))
    canvas = prepare(Visual(kind="image", file=tmp_path / "big.png", cover=True), SAMPLER.clip, 12, SPEC, PATCH).canvas
    assert canvas.video.shape == (13, 3, 16, 24) and canvas.given[0].all() and not canvas.given[1:].any()
    Image.fromarray(np.full((16, 24), 32768, np.uint16)).save(tmp_path / "deep.png")
    deep = prepare(Visual(kind="image", file=tmp_path / "deep.png"), SAMPLER.clip, 12, SPEC, PATCH).canvas
    assert deep.given[0].all() and (deep.video[0] - 0.5).abs().max() < 1 / 255
    photo = Image.fromarray(np.zeros((24, 16, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert prepare(Visual(kind="image", file=tmp_path / "photo.jpg"), SAMPLER.clip, 12, SPEC, PATCH).canvas.given[0].all()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    clip_file(tmp_path / "a.mkv", 7)
    clip_file(tmp_path / "tiny.mkv", 2)
    clip_file(tmp_path / "other.mkv", 13, height=24, width=24)
    image_file(tmp_path / "a.png", torch.rand(3, 16, 24))
    image_file(tmp_path / "mask.png", torch.ones(3, 16, 24))
    image_file(tmp_path / "small.png", torch.ones(3, 8, 8))
    clip_file(tmp_path / "thin.mkv", 13, height=16, width=4)
    dot = torch.ones(3, 16, 24)
    dot[:, :3, :3] = 0
    image_file(tmp_path / "dot.png", dot)
    Image.new("RGB", (24, 16)).save(tmp_path / "moving.png", save_all=True, append_images=[Image.new("RGB", (24, 16), "red")])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    a, png = tmp_path / "a.mkv", tmp_path / "a.png"
    cases: list[tuple[Visual, str]] = [
        (Visual(kind="image"), "visual.file is missing"),
        (Visual(file=a), "visual.file is given, visual.kind text: it takes no file"),
        (Visual(kind="connect", file=a), "visual.second is missing"),
        (Visual(kind="extend", file=a, mask=png), "visual.mask is given"),
        (Visual(kind="inpaint", file=a), "visual.mask is missing"),
        (Visual(kind="image", file=tmp_path / "none.png"), "no such image"),
        (Visual(kind="image", file=tmp_path / "broken.png"), "cannot read the image"),
        (Visual(kind="extend", file=tmp_path / "none.mp4"), "no such video file"),
        (Visual(kind="extend", file=tmp_path / "other.mkv"), "is 24x24, the clip 16x24"),
        (Visual(kind="edit", file=a), "7 frames are given, the clip has 13"),
        (Visual(kind="extend_back", file=tmp_path / "tiny.mkv"), "2 frames are given"),
        (Visual(kind="connect", file=tmp_path / "long.mkv", second=tmp_path / "tiny.mkv"), r"2 frames are given.*tiny\.mkv"),
        (Visual(kind="extend", file=tmp_path / "long.mkv", seconds=0.5), "lasts 1.08333 s"),
        (Visual(seconds=0.01), "Give at least one frame"),
        (Visual(kind="outpaint", file=tmp_path / "thin.mkv"), "none of the tokens"),
        (Visual(kind="inpaint", file=tmp_path / "long.mkv", mask=tmp_path / "dot.png"), "none of the tokens"),
        (Visual(kind="image", file=tmp_path / "moving.png"), "the image moves"),
        (Visual(kind="inpaint", file=tmp_path / "long.mkv", mask=tmp_path / "small.png"), "small.png is 8x8"),
        (Visual(kind="inpaint", file=tmp_path / "long.mkv", mask=tmp_path / "mask.png"), "white all over"),
        (Visual(kind="outpaint", file=tmp_path / "long.mkv"), "there is nothing to add around it"),
        (Visual(kind="edit", file=tmp_path / "long.mkv", seconds=5), "visual.seconds is given"),
    ]
    clip_file(tmp_path / "long.mkv", 13)
    for visual, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            prepare(visual, SAMPLER.clip, 12, SPEC, PATCH)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"need about .* GiB"):
        check_memory(Sampler(frames=1025, height=4096, width=4096), 1, 0)
    with pytest.raises(UserError, match=r"visual\.seconds"):
        check_memory(Sampler(height=512, width=512), 64, 3600)
    check_memory(Sampler(), 4, 60)


def test_a_visual_prompt_is_part_of_a_clip_s_identity(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "network.safetensors")
    clip_file(tmp_path / "a.mkv", 7)
    clip_file(tmp_path / "b.mkv", 7, seed=1)
    plain = Config(out=tmp_path / "clips", model=network, prompts=("a red circle grows",), clips_per_prompt=1, sampler=SAMPLER)
    for name in ("a.mkv", "b.mkv", "a.mkv"):
        generate.main(plain.model_copy(update={"visual": Visual(kind="extend", file=tmp_path / name)}))
    generate.main(plain)
    rows = ClipStore(plain.out).rows()
    assert [row.num_frames for row in rows] == [15, 15, 13] and len({row.clip_id for row in rows}) == 3


def test_what_is_given_in_another_order_is_another_prompt(tmp_path: Path) -> None:
    for name, frames in (("short.mkv", 8), ("long.mkv", 12)):
        write_lossless(tmp_path / name, torch.zeros(frames, 3, 16, 24), fps=12)
    one, other = ((tmp_path / a, tmp_path / b) for a, b in (("short.mkv", "long.mkv"), ("long.mkv", "short.mkv")))
    keys = {prepare(Visual(kind="connect", file=a, second=b), SAMPLER.clip, 12, SPEC, PATCH).key for a, b in (one, other)}
    assert len(keys) == 2


def test_a_small_clip_lies_where_tokens_begin(tmp_path: Path) -> None:
    clip_file(tmp_path / "a.mkv", 13, height=16, width=24)
    wide = Sampler(frames=13, height=32, width=32)
    given = prepare(Visual(kind="outpaint", file=tmp_path / "a.mkv"), wide.clip, 12, SPEC, PATCH).canvas.given[0]
    assert given[8:24, :24].all() and int(given.sum()) == 16 * 24
