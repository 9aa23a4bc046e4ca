"""The trained filter: one bad place of one window decides, limits divide allow, review and block, and nothing that is not as its card says ever allows."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from base_model.networks.vae import VAEConfig
from base_model.tiny import LatentCodec, save_codec
from reward.encoders import load_encoder
from reward.safety.contract import SafetyRunner, Verdict, VideoFilter
from reward.safety.head import (
    CARD_FILE,
    WEIGHTS_FILE,
    EncoderLook,
    Head,
    LatentLook,
    Look,
    TrainedFilter,
    clip_tokens,
    load_filter,
    load_look,
    save_filter,
    smooth_max,
    window_starts,
    with_deviation,
)
from reward.safety.policy import Policy, Rule, load_policy
from tests.reward import tiny_encoders as tiny

POLICY = load_policy()


class Blind:
    """A look that sees nothing it could tell."""

    family, identity, source, frames = "blind", "blind@1", "", 4

    def tokens(self, windows: Tensor) -> Tensor:
        return torch.full((len(windows), 4, 1), -math.inf)


class Brightness:
    """A look with a known answer: one token a frame, its mean brightness."""

    family, identity, source = "brightness", "brightness@1", ""

    def __init__(self, frames: int = 4) -> None:
        self.frames = frames

    def tokens(self, windows: Tensor) -> Tensor:
        return windows.mean((2, 3, 4))[..., None]


def bright_head(*policies: str, low: float = 0.3, high: float = 0.7) -> Head:
    """A head whose logit is 20 (brightness - 0.5), so that the probability is 0.5 at a mean of 0.5."""
    head = Head(policies or ("P05",), 1, 2)
    with torch.no_grad():
        for layer in (head.layers[0], head.layers[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        head.layers[0].weight[0, 0], head.layers[0].weight[1, 0] = 1.0, -1.0  # gelu(x) - gelu(-x) = x
        head.layers[2].weight[:, 0], head.layers[2].weight[:, 1] = 20.0, -20.0
        head.mean[0] = 0.5
        head.low.fill_(low)
        head.high.fill_(high)
    return head


def shades(*values: float) -> Tensor:
    """A clip [T,3,8,8] of frames of these grey levels."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def made(head: Head | None = None, policy: Policy = POLICY) -> TrainedFilter:
    return TrainedFilter(head or bright_head(), Brightness(), policy, fps=4.0, version="v")


# Windows and places


@pytest.mark.parametrize("window", [1, 3, 4, 13])
def test_windows_cover_every_frame_and_the_last_one_ends_with_the_clip(window: int) -> None:
    for frames in range(window, 5 * window):
        starts = window_starts(frames, window)
        assert {f for begin in starts for f in range(begin, begin + window)} == set(range(frames))
        assert starts[-1] == frames - window and len(starts) == math.ceil(frames / window)
    assert window_starts(1, window) == [0]


def test_a_clip_shorter_than_a_window_stands_still_at_its_end() -> None:
    assert clip_tokens(Brightness(4), shades(0.1, 0.9)).flatten().tolist() == pytest.approx([0.1, 0.9, 0.9, 0.9])


def test_each_token_is_told_with_the_deviation_of_its_window() -> None:
    seen = with_deviation(torch.tensor([[[0.0], [2.0]], [[1.0], [1.0]]]))
    assert seen.tolist() == [[[0.0, 1.0], [2.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]


def test_the_smooth_maximum_is_the_log_of_a_mean_and_lies_between_the_mean_and_the_largest() -> None:
    logits = torch.randn(5, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    found = smooth_max(logits, there, 4.0)
    for b in range(5):
        kept = logits[b, there[b]]
        torch.testing.assert_close(found[b], (4 * kept).exp().mean(0).log() / 4, rtol=0, atol=1e-12)
        assert bool((found[b] <= kept.amax(0) + 1e-12).all() and (found[b] >= kept.mean(0) - 1e-12).all())
        assert bool((found[b] >= kept.amax(0) - math.log(len(kept)) / 4 - 1e-12).all())
    logits.requires_grad_()
    smooth_max(logits, there).sum().backward()
    assert logits.grad is not None and bool((logits.grad[~there] == 0).all() and (logits.grad[there] > 0).all())


# Ruling


def test_one_bright_frame_of_one_window_makes_the_clip_unsafe_and_the_reason_says_when() -> None:
    clip = shades(*[0.2] * 9, 0.9, *[0.2] * 3)  # 13 frames at 4 a second, windows of 4 from 0, 4, 8 and 9
    (ruling,) = made().check_videos(clip[None], ["x"], 4.0)[0]
    assert ruling.verdict == Verdict.BLOCK and ruling.score == pytest.approx(torch.sigmoid(torch.tensor(8.0)).item(), abs=1e-6)
    assert (ruling.reasons[0].start, ruling.reasons[0].end) == (2.0, 3.0) and ruling.policy == "P05"
    calm = made().check_videos(shades(*[0.2] * 13)[None], ["x"], 4.0)[0][0]
    assert calm.verdict == Verdict.ALLOW and calm.reasons == ()


def test_two_limits_divide_allow_review_and_block() -> None:
    cases = {0.29: Verdict.ALLOW, 0.31: Verdict.REVIEW, 0.69: Verdict.REVIEW, 0.71: Verdict.BLOCK}
    for probability, verdict in cases.items():
        shade = 0.5 + math.log(probability / (1 - probability)) / 20
        (ruling,) = made().check_videos(shades(shade)[None], ["x"], 4.0)[0]
        assert (ruling.verdict, ruling.threshold) == (verdict, pytest.approx(0.3)) and ruling.score == pytest.approx(probability, abs=1e-4)


def test_what_the_policy_only_reviews_or_allows_is_never_blocked() -> None:
    head = bright_head("P05", "P02", "P16")
    rulings = made(head).check_videos(shades(0.9)[None], ["x"], 4.0)[0]
    assert [r.verdict for r in rulings] == [Verdict.BLOCK, Verdict.REVIEW, Verdict.ALLOW]
    decision = SafetyRunner([made(head)], POLICY).check_videos(shades(0.9)[None], ["x"], 4.0)[0]
    assert decision.verdict == Verdict.BLOCK and not any(r.verdict == Verdict.ERROR for r in decision.rulings)


def test_it_is_a_video_filter_whose_lineage_names_version_limit_and_policy() -> None:
    assert isinstance(made(), VideoFilter)
    runner = SafetyRunner([made()], POLICY)
    assert runner.lineage() == [{"filter": "head-brightness", "version": "v", "threshold": pytest.approx(0.3), "policies": ["P05"], "policy_version": POLICY.version}]


def test_a_policy_file_without_the_filters_code_is_refused() -> None:
    other = Policy(version="x", rules=(Rule(code="P01", name="other", severity=1, action="block"),))
    with pytest.raises(UserError, match="rules on P05, which the policy does not have"):
        made(policy=other)


def spoiled(head: Head) -> None:
    with torch.no_grad():
        head.layers[2].bias.fill_(math.nan)


def endless(head: Head) -> None:
    with torch.no_grad():
        head.slope.fill_(math.inf)
        head.offset.fill_(-math.inf)


@pytest.mark.parametrize("spoil", [spoiled, endless])
def test_logits_that_are_no_numbers_are_an_error_and_never_an_allow(spoil: Callable[[Head], None]) -> None:
    head = bright_head()
    spoil(head)
    with pytest.raises(ValueError, match="not finite"):
        made(head).check_videos(shades(0.1)[None], ["x"], 4.0)
    decision = SafetyRunner([made(head)], POLICY).check_videos(shades(0.1)[None], ["x"], 4.0)[0]
    assert decision.verdict == Verdict.ERROR


def test_tokens_that_are_no_numbers_are_an_error_and_never_an_allow() -> None:
    blind = TrainedFilter(bright_head(), Blind(), POLICY, fps=4.0, version="v")
    with pytest.raises(ValueError, match="not finite"):
        blind.check_videos(shades(0.1)[None], ["x"], 4.0)
    assert SafetyRunner([blind], POLICY).check_videos(shades(0.1)[None], ["x"], 4.0)[0].verdict == Verdict.ERROR


def test_clips_of_another_rate_are_an_error_and_never_an_allow() -> None:
    with pytest.raises(ValueError, match="trained on clips of 4 frames a second, and these have 8"):
        made().check_videos(shades(0.1)[None], ["x"], 8.0)
    assert SafetyRunner([made()], POLICY).check_videos(shades(0.1)[None], ["x"], 8.0)[0].verdict == Verdict.ERROR
    assert SafetyRunner([made()], POLICY).check_videos(shades(0.1)[None], ["x"], 3.999)[0].verdict == Verdict.ALLOW


# What it looks through


@pytest.mark.parametrize("family", ["siglip", "siglip_vision_model"])
def test_frames_are_seen_as_the_encoder_sees_them(family: str, tmp_path: Path) -> None:
    tiny.save(family, tmp_path / "e")
    look = load_look(str(tmp_path / "e"), fps=6.0, seconds=1.0)
    clip = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert isinstance(look, EncoderLook) and look.frames == 6
    torch.testing.assert_close(clip_tokens(look, clip)[0], load_encoder(tmp_path / "e", fps=6.0, frames=6).clips(clip[None])[0], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip_vision_model"])
def test_each_frame_of_a_window_is_seen_by_an_encoder_of_frames(family: str, tmp_path: Path) -> None:
    tiny.save(family, tmp_path / "e")
    look = load_look(str(tmp_path / "e"), fps=24.0, seconds=0.5)
    clip = torch.full((12, 3, 32, 32), 0.4)
    calm = clip_tokens(look, clip)
    assert calm.shape[:2] == (1, 12)
    for flash in range(12):
        changed = clip.clone()
        changed[flash] = 0.9
        differs = (clip_tokens(look, changed) - calm).abs().amax((0, 2)) > 1e-4
        assert differs.nonzero().flatten().tolist() == [flash]


def test_the_vision_tower_of_siglip_alone_says_what_the_whole_says(tmp_path: Path) -> None:
    whole = tiny.build("siglip")
    tower = tiny.build("siglip_vision_model")
    tower.load_state_dict(whole.vision_model.state_dict())
    pixels = torch.rand(2, 3, tiny.SIDE, tiny.SIDE)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixel_values=pixels).pooler_output, whole.get_image_features(pixel_values=pixels).pooler_output)


def test_latents_are_averaged_down_and_windows_fit_the_latent_grid() -> None:
    look = load_look("", fps=12.0, seconds=1.0)
    assert isinstance(look, LatentLook) and look.frames == 13
    clip = torch.rand(20, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    tokens = clip_tokens(look, clip)
    assert tokens.shape == (2, 4 * 4 * 4, 8)
    whole = look.codec.encode(clip[None, :13])[0]  # [8,4,8,16]
    expected = torch.stack([whole[:, f, 2 * y : 2 * y + 2, 4 * x : 4 * x + 4].mean((1, 2)) for f in range(4) for y in range(4) for x in range(4)])
    torch.testing.assert_close(tokens[0], expected, rtol=0, atol=1e-5)
    assert [load_look("", fps=fps, seconds=1.0).frames for fps in (1, 4, 24)] == [5, 5, 25]


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head on a tiny SigLIP tower and one on the shipped VAE, saved."""
    out = tmp_path_factory.mktemp("saved")
    tiny.save("siglip_vision_model", out / "encoder")
    for name, source in (("siglip", str(out / "encoder")), ("latent", "")):
        save_small(out / name, load_look(source, fps=4.0, seconds=1.0))
    return out


def save_small(out: Path, look: Look, seed: int = 0, **limits: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    head = Head(("P05", "P17"), clip_tokens(look, torch.rand(4, 3, 32, 32)).shape[-1], 8)
    for name, value in {"low": 0.2, "high": 0.8, **limits}.items():
        getattr(head, name).fill_(value)
    return save_filter(out, head, look, fps=4.0, seconds=1.0, facts={"policy_version": POLICY.version, "licences": ["CC0"]})


@pytest.mark.parametrize("name", ["siglip", "latent"])
def test_a_saved_filter_rules_the_same_again(folder: Path, name: str) -> None:
    found = load_filter(folder / name, POLICY)
    card = json.loads((folder / name / CARD_FILE).read_text())
    assert found.version == card["version"][:16] and found.policies == ("P05", "P17") and found.threshold == pytest.approx(0.2)
    assert card["limits"]["P05"] == {"review_from": pytest.approx(0.2), "block_from": pytest.approx(0.8)} and card["licences"] == ["CC0"]
    again = load_filter(folder / name, POLICY)
    clip = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert found.check_videos(clip, ["x"], 4.0) == again.check_videos(clip, ["x"], 4.0)


@pytest.mark.parametrize("name", ["siglip", "latent"])
def test_a_filter_can_be_carried_into_another_process(folder: Path, name: str) -> None:
    found = load_filter(folder / name, POLICY)
    clip = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert pickle.loads(pickle.dumps(found)).check_videos(clip, ["x"], 4.0) == found.check_videos(clip, ["x"], 4.0)


def test_a_clip_of_a_size_the_vae_does_not_take_is_an_error_and_never_an_allow(folder: Path) -> None:
    runner = SafetyRunner([load_filter(folder / "latent", POLICY)], POLICY)
    assert runner.check_videos(torch.rand(1, 9, 3, 30, 33), ["x"], 4.0)[0].verdict == Verdict.ERROR


def test_the_version_is_the_hash_of_what_decides_a_ruling(folder: Path, tmp_path: Path) -> None:
    look = load_look(str(folder / "encoder"), fps=4.0, seconds=1.0)
    first = save_small(tmp_path / "a", look)["version"]
    assert save_small(tmp_path / "b", look)["version"] == first
    shutil.copytree(folder / "encoder", tmp_path / "moved")
    assert save_small(tmp_path / "c", load_look(str(tmp_path / "moved"), fps=4.0, seconds=1.0))["version"] == first, "where the encoder lies decides nothing"
    assert load_filter(tmp_path / "c", POLICY, moved=str(folder / "encoder")).version == first[:16]
    others = {save_small(tmp_path / "d", look, seed=1)["version"], save_small(tmp_path / "e", look, low=0.25)["version"]}
    assert len(others | {first}) == 3


def broken_copy(folder: Path, out: Path) -> Path:
    shutil.copytree(folder / "siglip", out)
    return out


def change_card(out: Path, **values: Any) -> None:
    card = json.loads((out / CARD_FILE).read_text())
    (out / CARD_FILE).write_text(json.dumps({**card, **values}))


def truncate(out: Path) -> None:
    (out / WEIGHTS_FILE).write_bytes((out / WEIGHTS_FILE).read_bytes()[:-7])


def swap_weights(out: Path) -> None:
    save_weights(out / WEIGHTS_FILE, bright_head().state_dict(), {})


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda out: (out / WEIGHTS_FILE).unlink(), "no such weights file"),
    "no card": (lambda out: (out / CARD_FILE).unlink(), "cannot read the card"),
    "truncated": (truncate, "truncated weights"),
    "pickled": (lambda out: torch.save({"a": torch.zeros(1)}, out / WEIGHTS_FILE), "pickled"),
    "other weights": (swap_weights, "not those of their card"),
    "half a card": (lambda out: (out / CARD_FILE).write_text("{"), "cannot read the card"),
    "an empty card": (lambda out: (out / CARD_FILE).write_text("{}"), "not a trained filter's card"),
    "other policies": (lambda out: change_card(out, policies=["P01"]), "not those of their card"),
    "another rate": (lambda out: change_card(out, fps=8.0), "not those of their card"),
    "other golden clips": (lambda out: change_card(out, golden=[[0.0, 1.0], [1.0, 0.0]]), "golden probabilities"),
    "golden clips of another shape": (lambda out: change_card(out, golden=[[0.5]]), "golden probabilities"),
    "no golden clips": (lambda out: change_card(out, golden=[]), "golden probabilities"),
    "golden nan": (lambda out: change_card(out, golden=[[math.nan] * 2] * 2), "golden probabilities"),
    "another format": (lambda out: change_card(out, format=99), "another format"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    spoil, message = BREAKS[name]
    spoil(broken_copy(folder, tmp_path / "x"))
    with pytest.raises(UserError, match=message) as error:
        load_filter(tmp_path / "x", POLICY)
    assert "\n" not in str(error.value)


def test_another_encoder_or_vae_than_the_cards_is_refused(folder: Path, tmp_path: Path) -> None:
    network = tiny.build("siglip_vision_model")
    with torch.no_grad():
        next(network.parameters()).add_(1e-3)
    shutil.copytree(folder / "encoder", tmp_path / "other")
    network.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="not what its card names"):
        load_filter(folder / "siglip", POLICY, moved=str(tmp_path / "other"))
    save_codec(tmp_path / "vae.safetensors", LatentCodec(VAEConfig(width=16)))
    with pytest.raises(UserError, match="not what its card names"):
        load_filter(folder / "latent", POLICY, moved=str(tmp_path / "vae.safetensors"))
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(UserError, match="no encoder"):
        load_filter(folder / "siglip", POLICY, moved=str(tmp_path / "other"))
