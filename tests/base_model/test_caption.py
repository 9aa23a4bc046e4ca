"""Captions: what the model is given against transformers' own processor, what it says against a plain greedy loop, and what becomes of what it said."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from base_model.errors import UserError
from base_model.prompts.caption import BOILERPLATE, IGNORED, Captioner, Sight, clip_patches, take_frames, whole_sentences, without_boilerplate
from base_model.prompts.vision import CLIP_MEAN, CLIP_STD, FAMILIES, HALF, Patches, PatchFormat, load_vlm, patch_format, spread_frames
from base_model.video.files import Frame
from tests.reward.vlm.test_frames import by_transformers
from tests.reward.vlm.tiny import save_tiny

FORMS = {"qwen2_5": PatchFormat(14, 2, 2, CLIP_MEAN, CLIP_STD), "qwen3": PatchFormat(16, 2, 2, HALF, HALF)}
SIGHT = Sight(fps=4.0, min_frames=2, max_frames=8, min_pixels=64, max_pixels=1024)
TINY = PatchFormat(4, 2, 2, HALF, HALF)


def moving(frames: int, height: int = 16, width: int = 24, fps: float = 8.0, seed: int = 0) -> Iterator[tuple[Frame, float]]:
    rng = np.random.default_rng(seed)
    return ((rng.integers(0, 256, (height, width, 3), dtype=np.uint8), fps) for _ in range(frames))


# What is seen


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [(1, 1), (4, 3)])
def test_pixel_values_and_grid_of_two_equal_frames_are_those_of_transformers_image_processor(name: str, tokens: tuple[int, int]) -> None:
    form = FORMS[name]
    image = np.random.default_rng(0).integers(0, 256, (tokens[0] * form.side, tokens[1] * form.side, 3), dtype=np.uint8)
    expected, grid = by_transformers(image, form, 1, 10**7)
    found = clip_patches(take_frames([(image, 2.0)] * 2, Sight(2.0, 2, 8, 1, 10**7), form), form)
    assert list(found.grid) == grid and found.values.shape == expected.shape
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6)


def test_pixel_values_of_a_moving_clip_are_the_written_out_formula() -> None:
    """Every value by its place: patch (t, y, x) of a token of 2 x 2 patches, then colour, frame, row, column; (level / 255 - mean) / deviation."""
    form = PatchFormat(2, 2, 2, CLIP_MEAN, CLIP_STD)
    frames = [frame for frame, _ in moving(4, 8, 12)]
    found = clip_patches(take_frames([(frame, 4.0) for frame in frames], Sight(4.0, 2, 8, 1, 10**6), form), form)
    assert found.grid == (2, 4, 6)
    expected = []
    for t, token_y, token_x, y, x in product(range(2), range(2), range(3), range(2), range(2)):
        top, left = 2 * (2 * token_y + y), 2 * (2 * token_x + x)
        places = product(range(3), range(2), range(2), range(2))
        expected.append([(frames[2 * t + k][top + i, left + j, c] / 255 - CLIP_MEAN[c]) / CLIP_STD[c] for c, k, i, j in places])
    torch.testing.assert_close(found.values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)


def test_frames_are_spread_over_a_clip_and_times_say_where() -> None:
    taken = take_frames(moving(17), SIGHT, TINY)
    index = spread_frames(17, 17 / 8 * 4, 2, 8, 2)
    assert [time * 8 for time in taken.times] == index == [0, 2, 5, 7, 9, 11, 14, 16] and taken.seconds == pytest.approx(2 * 16 / 7 / 8)
    every = [frame for frame, _ in moving(17)]
    assert all(torch.equal(found, torch.from_numpy(every[i]).permute(2, 0, 1)) for found, i in zip(taken.frames, index, strict=True))
    assert clip_patches(taken, TINY).times == pytest.approx([1 / 8, 6 / 8, 10 / 8, 15 / 8])


def test_a_long_clip_is_seen_whole_at_a_lower_rate_without_being_held() -> None:
    held: list[int] = []

    def long() -> Iterator[tuple[Frame, float]]:
        for k in range(5_000):
            held.append(k)
            yield np.full((16, 16, 3), k // 20, np.uint8), 8.0

    taken = take_frames(long(), SIGHT, TINY)
    places = [round(time * 8) for time in taken.times]
    ideal = np.linspace(0, 4_999, 8)
    print("frames", places, "of", ideal.round().tolist())
    assert len(held) == 5_000 and len(places) == 8 and max(np.abs(np.array(places) - ideal)) <= 5_000 / (4 * 8) + 1
    assert all(int(frame[0, 0, 0]) == place // 20 for frame, place in zip(taken.frames, places, strict=True)), "frames and times belong together"


def test_an_image_and_a_clip_of_one_frame_are_seen_and_nothing_is_no_clip() -> None:
    for fps in (0.0, 8.0):
        taken = take_frames(moving(1, fps=fps), SIGHT, TINY)
        assert len(taken.frames) == 2 and torch.equal(*taken.frames) and taken.times == (0.0, 0.0) and taken.seconds > 0
    with pytest.raises(UserError, match="without a frame"):
        take_frames([], SIGHT, TINY)
    with pytest.raises(UserError, match="frames that cannot be"):
        Sight(fps=0)


# What is said


@pytest.fixture(scope="module")
def captioners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Captioner]:
    """Of random weights. Heads of their own: one that is the embedding would say its last word again and again."""
    folder = tmp_path_factory.mktemp("vlm")
    found = {family: Captioner(load_vlm(save_tiny(folder / family, family)), instruction="a bright clip", max_tokens=12) for family in FAMILIES}
    for captioner in found.values():
        head = captioner.vlm.network.lm_head
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    return found


def three(captioner: Captioner) -> list[Patches]:
    """Clips of other sizes and lengths."""
    sizes = ((5, 16, 24), (17, 24, 16), (9, 8, 8))
    form = captioner.vlm.patches
    return [clip_patches(take_frames(moving(*size, seed=k), SIGHT, form), form) for k, size in enumerate(sizes)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_holds_as_many_video_tokens_as_the_tower_makes(family: str, captioners: dict[str, Captioner]) -> None:
    captioner = captioners[family]
    words, video = captioner.vlm.tokenizer, captioner.vlm.network.config.video_token_id
    for clip in three(captioner):
        ids = captioner.asked(clip)
        features = captioner.vlm.network.get_video_features(clip.values, torch.tensor([clip.grid])).pooler_output
        assert ids.count(video) == sum(len(part) for part in features) == clip.grid[0] * clip.grid[1] * clip.grid[2] // 4
        text = words.decode(ids)
        assert text.endswith("a bright clip<|im_end|>\n<|im_start|>assistant\n") and text.count("<|vision_start|>") == (clip.grid[0] if family == "qwen3_vl" else 1)
        assert text.startswith("<|im_start|>user\n<" if family == "qwen3_vl" else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_a_greedy_loop_without_a_cache_says_of_each_clip_alone(family: str, captioners: dict[str, Captioner], monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = captioners[family]
    clips, said = three(captioner), list[list[int]]()
    monkeypatch.setattr(captioner, "_caption", lambda ids: said.append(list(ids)))
    captioner(clips)
    for clip, found in zip(clips, said, strict=True):
        answer: list[int] = []
        while len(answer) < captioner.max_tokens and not (answer and answer[-1] in captioner.ends):
            inputs = captioner.inputs([clip], [answer], side="right")
            del inputs["labels"]
            with torch.no_grad():
                answer.append(int(captioner.vlm.network(**inputs, use_cache=False).logits[0, -1].argmax()))
        assert found[: len(answer)] == answer and len(set(answer)) > 1
    assert said[0] != said[1], "what is said depends on the clip"


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_captions_tokens_and_their_end_alone(family: str, captioners: dict[str, Captioner]) -> None:
    captioner = captioners[family]
    clips, texts = three(captioner)[:2], ["a bright clip", "dark <|im_end|> seconds look"]
    with torch.no_grad():
        found = captioner.losses(clips, texts)
    for clip, text, loss in zip(clips, texts, found.tolist(), strict=True):
        inputs = captioner.learned([clip], [text])
        ids, labels = inputs["input_ids"][0].tolist(), inputs.pop("labels")[0].tolist()
        begin = len(captioner.asked(clip))
        assert labels[:begin] == [IGNORED] * begin and labels[begin:] == ids[begin:] and ids[-1] == captioner.ends[0]
        assert ids[begin:-1].count(captioner.ends[0]) == 0, "a caption cannot speak in special tokens"
        assert captioner.vlm.tokenizer.decode(ids[begin:-1]) == text
        with torch.no_grad():
            log_p = captioner.vlm.network(**inputs, use_cache=False).logits[0].log_softmax(-1)
        expected = -sum(float(log_p[place - 1, ids[place]]) for place in range(begin, len(ids))) / (len(ids) - begin)
        assert loss == pytest.approx(expected, abs=2e-5)


def test_answers_end_at_their_end_or_with_their_last_whole_sentence(captioners: dict[str, Captioner]) -> None:
    captioner = captioners["qwen2_5_vl"]
    words = captioner.vlm.tokenizer
    plain = words("A dog runs. It is br", add_special_tokens=False)["input_ids"]
    assert captioner._caption([*plain, captioner.ends[0], *plain]) == ("A dog runs. It is br", True)
    assert captioner._caption(plain) == ("A dog runs.", False)
    assert captioner._caption(words("a dog without end", add_special_tokens=False)["input_ids"]) == ("", False)
    assert captioner._caption([captioner.ends[-1]]) == ("", True)


def test_a_tokenizer_without_an_end_of_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(save_tiny(tmp_path / "base", "qwen2_vl"))
    monkeypatch.setattr(vlm.tokenizer, "get_vocab", lambda: {"a": 0})
    with pytest.raises(UserError, match="does not know the end of an answer"):
        Captioner(vlm)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_damaged_settings_of_a_preprocessor_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    vlm = load_vlm(save_tiny(tmp_path / "base", "qwen2_vl"))
    (tmp_path / "base" / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match=r"cannot read the preprocessor's settings, .*preprocessor_config\.json"):
        patch_format(tmp_path / "base", None, vlm.network.config)


# What becomes of it


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The video shows a dog running.", "A dog running."),
        ("This short clip depicts the sea. The video ends.", "The sea. The video ends."),
        ("In this video, we see a dog that runs.", "A dog that runs."),
        ("In the video clip, there is a dog.", "A dog."),
        ("IN THE VIDEO, A DOG RUNS.", "A DOG RUNS."),
        ("Sure! Here is a detailed description of the video: The video features a dog.", "A dog."),
        ("Caption: a dog.", "A dog."),
        ("Here's the caption. 日本 is shown.", "日本 is shown."),
    ],
)
def test_openings_that_say_nothing_are_taken_away(said: str, kept: str) -> None:
    assert without_boilerplate(said) == kept and without_boilerplate(kept) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog runs",
        "The video shows that a dog runs.",
        "The video shows how to cook.",
        "The video shows ",
        "The man shows a dog. The video shows a cat.",
        "In this videotape a dog runs.",
        "In the video game, a dog runs.",
        "Okay",
        "Here is a dog. It runs.",
        "The scene is dark; in this video, a dog runs.",
        "Surely a dog runs.",
        "The animation shop shows a window.",
    ],
)
def test_nothing_else_is_touched(text: str) -> None:
    assert without_boilerplate(text) == text


def test_every_pattern_is_needed_by_one_of_these() -> None:
    """None of the list is there for nothing: each matches one text that no other does."""
    texts = ("Sure! A dog.", "Here is a caption: A dog.", "Caption: A dog.", "The video shows a dog.", "In this video, a dog.")
    matches = [[bool(re.match(pattern, text, re.IGNORECASE)) for text in texts] for pattern in BOILERPLATE]
    assert matches == np.eye(len(texts), dtype=bool).tolist()


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("A dog runs. It is br", "A dog runs."),
        ("A dog runs! It barks? Ye", "A dog runs! It barks?"),
        ('He says "stop." Then he', 'He says "stop."'),
        ("At 3.5 metres it", ""),
        ("no end", ""),
        ("", ""),
        ("犬が走る。猫が", "犬が走る。"),
        ("One. Two.", "One. Two."),
    ],
)
def test_what_is_cut_off_ends_with_its_last_whole_sentence(text: str, whole: str) -> None:
    assert whole_sentences(text) == whole and whole_sentences(whole) == whole
