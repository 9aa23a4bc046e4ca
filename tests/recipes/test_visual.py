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
from base_model.types import ClipShape
from base_model.video.files import from_uint8, read_lossless, to_uint8, write_lossless
from base_model.video.store import ClipStore
from recipes import generate
from recipes.generate import Config, Sampler, check_memory, make_clips, sample
from recipes.visual import Visual, head_frames, prepare, tail_frames
from tests.recipes.small import save_small_network, small_model

SAMPLER = Sampler(steps=2, frames=13, height=16, width=24)


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
    return make_clips(model, model.encode_text(["a red circle grows"] * clips), list(range(clips)), sampler, visual, prepare(visual, sampler.clip, sampler.fps))


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
    told = generate.with_canvases(model, model.encode_text(["a red circle grows"]), [prepare(visual, SAMPLER.clip, 12).canvas]).known
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


def test_an_image_and_a_clip_can_be_made_long(model: LatentVideoModel, tmp_path: Path) -> None:
    source = clip_file(tmp_path / "a.mkv", 7)
    image_file(tmp_path / "a.png", source[0])
    (clip, _) = made_by(model, Visual(kind="extend", file=tmp_path / "a.mkv", seconds=3))
    assert len(clip) == 36 and torch.equal(clip[:7], source)
    assert len(made_by(model, Visual(kind="image", file=tmp_path / "a.png", seconds=2.5))[0]) == 30


def test_how_many_frames_a_joint_takes() -> None:
    clip = ClipShape(13, 16, 16)
    assert [head_frames(wanted, there, clip) for wanted, there in ((5, 7), (1, 7), (4, 9), (99, 99), (9, 3), (9, 9))] == [5, 1, 1, 9, 1, 9]
    assert [tail_frames(wanted, there, clip) for wanted, there in ((5, 7), (8, 9), (99, 99))] == [4, 8, 12]
    for wanted, there, message in ((5, 3, "3 frames are too few"), (3, 9, "visual.frames 3")):
        with pytest.raises(ValueError, match=message):
            tail_frames(wanted, there, clip)


def test_files_are_read_upright_in_the_size_and_at_the_rate_of_the_clip(tmp_path: Path) -> None:
    write_lossless(tmp_path / "fast.mkv", torch.rand(26, 3, 16, 24), fps=24)
    prepared = prepare(Visual(kind="edit", file=tmp_path / "fast.mkv"), SAMPLER.clip, 12)
    assert prepared.start is not None and torch.equal(prepared.start, from_uint8(read_lossless(tmp_path / "fast.mkv").frames)[::2])
    image_file(tmp_path / "big.png", torch.rand(3, 64, 64))
    canvas = prepare(Visual(kind="image", file=tmp_path / "big.png", cover=True), SAMPLER.clip, 12).canvas
    assert canvas.video.shape == (13, 3, 16, 24) and canvas.given[0].all() and not canvas.given[1:].any()
    photo = Image.fromarray(np.zeros((24, 16, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6  # turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert prepare(Visual(kind="image", file=tmp_path / "photo.jpg"), SAMPLER.clip, 12).canvas.given[0].all()


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    clip_file(tmp_path / "a.mkv", 7)
    clip_file(tmp_path / "tiny.mkv", 2)
    clip_file(tmp_path / "other.mkv", 13, height=24, width=24)
    image_file(tmp_path / "a.png", torch.rand(3, 16, 24))
    image_file(tmp_path / "mask.png", torch.ones(3, 16, 24))
    image_file(tmp_path / "small.png", torch.ones(3, 8, 8))
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
        (Visual(kind="extend_back", file=tmp_path / "tiny.mkv"), "2 frames are too few to arrive at"),
        (Visual(kind="inpaint", file=tmp_path / "long.mkv", mask=tmp_path / "small.png"), "small.png is 8x8"),
        (Visual(kind="inpaint", file=tmp_path / "long.mkv", mask=tmp_path / "mask.png"), "white all over"),
        (Visual(kind="outpaint", file=tmp_path / "long.mkv"), "nothing to add around it"),
        (Visual(kind="edit", file=tmp_path / "long.mkv", seconds=5), "visual.seconds is given"),
    ]
    clip_file(tmp_path / "long.mkv", 13)
    for visual, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            prepare(visual, SAMPLER.clip, 12)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"need about .* GiB"):
        check_memory(Sampler(frames=1025, height=4096, width=4096))
    check_memory(Sampler())


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
