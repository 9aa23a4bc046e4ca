"""Frozen encoders: they say what the original networks say, of the frames the original processors make, and refuse what they cannot follow."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.errors import UserError
from reward.encoders import Sampler, load_encoder, read_pixels, revision_of
from tests.reward import tiny_encoders as tiny

PROMPTS = ["a red circle moves left", "blue bar grows"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.save(family, tmp_path_factory.mktemp("encoders") / family) for family in tiny.FAMILIES}


def clips(batch: int = 2, frames: int = 5, height: int = tiny.SIDE, width: int = tiny.SIDE) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(3))


def normalised(frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(tiny.PIXELS[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (frames - mean) / std


def words(network: Any, prompts: list[str], *, mask: bool = True) -> dict[str, Tensor]:
    rows = [[1, *(tiny.WORDS.index(word) for word in prompt.split()), tiny.END] for prompt in prompts]
    ids = torch.tensor([row + [0] * (tiny.LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, **({"attention_mask": (torch.arange(tiny.LENGTH) < torch.tensor([[len(row)] for row in rows])).long()} if mask else {})}


# What they say


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_frames_and_texts_are_those_of_the_original_network(folders: dict[str, Path], family: str) -> None:
    encoder, original = load_encoder(folders[family], fps=12.0, frames=3), tiny.build(family)
    seen = clips()[:, [0, 2, 4]]
    with torch.no_grad():
        images = original.get_image_features(pixel_values=normalised(seen.flatten(0, 1))).pooler_output.unflatten(0, (2, 3))
        text = original.get_text_features(**words(original, PROMPTS, mask=family == "clip")).pooler_output
        every = original(pixel_values=normalised(seen.flatten(0, 1)), **words(original, PROMPTS, mask=family == "clip"))
    tokens, told = encoder.clips(clips()), encoder.texts(PROMPTS)
    assert torch.equal(tokens, images) and torch.equal(told, text) and tokens.shape[1:] == encoder.shape and told.shape == (2, encoder.shape[1])
    logits = every.logits_per_image.unflatten(0, (2, 3))  # [B,F,P] scale x cosine + bias
    bias = original.logit_bias if family == "siglip" else 0
    expected = ((logits - bias) / original.logit_scale.exp()).mean(1).diagonal()
    torch.testing.assert_close(encoder.cosines(tokens, told), expected, rtol=0, atol=1e-6)


def test_x_clip_compares_the_video_with_the_text_that_the_video_changed(folders: dict[str, Path]) -> None:
    encoder, original = load_encoder(folders["xclip"], fps=12.0), tiny.build("xclip")
    seen = clips(frames=4)
    with torch.no_grad():
        every = original(pixel_values=normalised(seen), **words(original, PROMPTS))
        video = original.get_video_features(pixel_values=normalised(seen)).pooler_output
    tokens, text = encoder.clips(seen), encoder.texts(PROMPTS)
    assert torch.equal(tokens[:, 0], video) and tokens.shape[1:] == encoder.shape
    torch.testing.assert_close(encoder.cosines(tokens, text), (every.logits_per_video / original.logit_scale.exp()).diagonal(), rtol=0, atol=1e-6)
    plain = F.cosine_similarity(tokens[:, 0], text)
    assert (encoder.cosines(tokens, text) - plain).abs().max() > 1e-3, "the text is changed by the video"


@pytest.mark.parametrize("family", ["videomae", "vjepa2"])
def test_patches_are_those_of_the_original_network_averaged_over_their_place(folders: dict[str, Path], family: str) -> None:
    encoder, original = load_encoder(folders[family], fps=12.0), tiny.build(family)
    frames = encoder.sampler.frames
    seen = clips(frames=frames)
    with torch.no_grad():
        out = original(**{"pixel_values_videos" if family == "vjepa2" else "pixel_values": normalised(resized(family, seen))}).last_hidden_state
    grid = out.unflatten(1, (frames // 2, 2, 2))  # [B,t,h,w,D]
    expected = grid if frames // 2 <= 4 else grid.unflatten(1, (4, -1)).mean(2)
    tokens = encoder.clips(seen)
    torch.testing.assert_close(tokens, expected.flatten(1, 3), rtol=0, atol=1e-6)
    assert tokens.shape[1:] == encoder.shape and encoder.motion and not encoder.reads_text
    with pytest.raises(ValueError, match="reads no text"):
        encoder.texts(PROMPTS)
    with pytest.raises(ValueError, match="reads no text"):
        encoder.cosines(tokens, tokens[:, 0])


def resized(family: str, video: Tensor) -> Tensor:
    """As the tiny V-JEPA 2's processor does it: 36 pixels, then the middle 32."""
    if family == "videomae":
        return video
    return F.interpolate(video.flatten(0, 1), (36, 36), mode="bilinear", antialias=True)[..., 2:34, 2:34].unflatten(0, video.shape[:2])


@pytest.mark.parametrize(("family", "size"), [(f, s) for f in tiny.FAMILIES[:4] for s in ((48, 80), (20, 32), (90, 33))])
def test_frames_are_those_of_the_librarys_own_processor_up_to_its_rounding(folders: dict[str, Path], family: str, size: tuple[int, int]) -> None:
    kind = {"clip": "CLIP", "siglip": "Siglip", "xclip": "VideoMAE", "videomae": "VideoMAE"}[family]
    module = importlib.import_module(f"transformers.models.{kind.lower()}.image_processing_pil_{kind.lower()}")
    processor = getattr(module, f"{kind}ImageProcessorPil").from_pretrained(folders[family])
    smooth = F.interpolate(torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size, mode="bicubic").clamp(0, 1)
    frames = (smooth * 255).round().to(torch.uint8)
    given = [list(frames.numpy())] if kind == "VideoMAE" else list(frames.numpy())
    told = processor(given, return_tensors="pt", input_data_format="channels_first")["pixel_values"].reshape(3, 3, 32, 32)
    found = read_pixels(folders[family], family)(frames.float() / 255)
    assert found.shape == told.shape
    grey = (found - told).abs() * torch.tensor(tiny.PIXELS["image_std"])[:, None, None] * 255
    assert grey.max() < 2.01 and grey.mean() < 0.6, "the processor rounds to whole grey levels, once along each axis"


@pytest.mark.parametrize(("frames", "number", "rows"), [(4, 13, [0, 4, 8, 12]), (1, 5, [2]), (3, 2, [0, 1, 1]), (2, 1, [0, 0]), (5, 5, [0, 1, 2, 3, 4]), (4, 6, [0, 2, 3, 5])])
def test_frames_are_spread_from_the_first_to_the_last(frames: int, number: int, rows: list[int]) -> None:
    assert Sampler(frames, 12.0).rows(number) == rows


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_encoder_is_frozen_and_says_what_it_says_in_its_dtype(folders: dict[str, Path], family: str) -> None:
    full, half = (load_encoder(folders[family], fps=12.0, dtype=dtype) for dtype in ("float32", "float16"))
    assert not full.network.training and not any(parameter.requires_grad for parameter in full.network.parameters())
    video = clips(height=40, width=48).requires_grad_()
    tokens = full.clips(video)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    assert half.clips(video).dtype == torch.float16 and torch.equal(half.clips(video), tokens.half())
    assert full.identity == half.identity == f"{family}@{revision_of(folders[family])}"
    torch.testing.assert_close(full.clips(video[1:]), tokens[1:], rtol=0, atol=1e-5)


def test_texts_longer_than_what_is_read_are_cut_and_unknown_words_are_read(folders: dict[str, Path]) -> None:
    encoder = load_encoder(folders["clip"], fps=12.0)
    long, cut = " ".join(["red"] * 50), " ".join(["red"] * (tiny.LENGTH - 2))
    assert torch.equal(encoder.texts([long]), encoder.texts([cut]))
    assert torch.isfinite(encoder.texts(["", "ein Würfel 🎲"])).all()


# What is refused


def changed(source: Path, folder: Path, name: str, **values: object) -> Path:
    shutil.copytree(source, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))
    return folder


def test_another_file_is_another_revision(folders: dict[str, Path], tmp_path: Path) -> None:
    same = Path(shutil.copytree(folders["clip"], tmp_path / "same"))
    other = changed(folders["clip"], tmp_path / "other", "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    assert revision_of(same) == revision_of(folders["clip"]) != revision_of(other)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("clip", {"image_mean": None}, "cannot follow"),
        ("clip", {"resample": 1}, "resample is 1"),
        ("clip", {"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ("clip", {"crop_size": 40}, r"a crop of \(40, 40\) from 32"),
        ("siglip", {"size": {"height": 16, "width": 16}}, r"takes frames of \(32, 32\), its preprocessor makes \(16, 16\)"),
        ("clip", {"size": {"longest_edge": 3}}, "'height' is missing"),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_refused(folders: dict[str, Path], tmp_path: Path, family: str, values: dict[str, object], message: str) -> None:
    folder = changed(folders[family], tmp_path / "x", "preprocessor_config.json", **values)
    with pytest.raises(UserError, match=message):
        load_encoder(folder, fps=12.0)


def test_old_spellings_of_sizes_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["clip"], tmp_path / "x", "preprocessor_config.json", size=32, crop_size=32)
    assert read_pixels(folder, "clip") == read_pixels(folders["clip"], "clip")


def test_without_a_crop_a_clip_of_another_aspect_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = load_encoder(changed(folders["videomae"], tmp_path / "x", "preprocessor_config.json", do_center_crop=False), fps=12.0)
    assert encoder.clips(clips(height=64, width=64)).shape == (2, *encoder.shape)
    with pytest.raises(UserError, match=r"takes frames of \(32, 32\), and its preprocessor makes \(32, 64\)"):
        encoder.clips(clips(height=32, width=64))


def test_what_is_no_encoder_is_refused_in_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    bert = changed(folders["clip"], tmp_path / "bert", "config.json", model_type="bert")
    pickled = Path(shutil.copytree(folders["clip"], tmp_path / "pickled"))
    torch.save({}, pickled / "model.safetensors")
    bare = Path(shutil.copytree(folders["clip"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    torch.save({}, bare / "pytorch_model.bin")
    short = Path(shutil.copytree(folders["clip"], tmp_path / "short"))
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-8])
    lacking = Path(shutil.copytree(folders["clip"], tmp_path / "lacking"))
    shutil.copy(folders["videomae"] / "model.safetensors", lacking / "model.safetensors")
    mute = Path(shutil.copytree(folders["siglip"], tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*")))
    coded = changed(folders["clip"], tmp_path / "coded", "config.json", vision_config={"auto_map": {"AutoModel": "x.Y"}})
    cases = [
        (coded, "code of its own"),
        (tmp_path / "none", "no encoder .*HF_HUB_OFFLINE"),
        (bert, f"family 'bert' is not known.* Give one of {', '.join(tiny.FAMILIES)}"),
        (pickled, "refused to open a pickled checkpoint"),
        (bare, "no weights as safetensors"),
        (short, "truncated weights"),
        (lacking, "weights are not whole"),
        (mute, "tokenizer"),
    ]
    for folder, message in cases:
        with pytest.raises(UserError, match=message) as error:
            load_encoder(folder, fps=12.0)
        assert "\n" not in str(error.value)
    for family, frames in (("xclip", 8), ("videomae", 5), ("vjepa2", 5), ("clip", 0)):
        with pytest.raises(UserError, match="frames"):
            load_encoder(folders[family], fps=12.0, frames=frames)
    with pytest.raises(UserError, match="frame rate of the clips is not known"):
        load_encoder(folders["clip"], fps=0.0)


def test_a_hub_id_is_found_again_by_its_commit(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Path(shutil.copytree(folders["videomae"], tmp_path / "snapshots" / ("a" * 40)))
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.bin" not in allow_patterns
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    encoder = load_encoder("someone/videomae", fps=12.0)
    assert encoder.source == "someone/videomae@" + "a" * 40 and load_encoder(encoder.source, fps=12.0).revision == encoder.revision
    assert asked == [("someone/videomae", None), ("someone/videomae", "a" * 40)]
