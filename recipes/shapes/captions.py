"""Captions in the built-in world: what is said of a clip of one thing, what a caption says, read word by word, and a vision-language model small enough to learn it on a CPU.

The model is transformers' own Qwen3-VL with two layers in either tower (half a million parameters); its tokenizer is a byte-level BPE of the world's captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from base_model.prompts.caption import Sight
from base_model.prompts.vision import PatchFormat, Vlm, constants_of
from base_model.video.files import Frame, to_uint8
from recipes.shapes.prompts import COLOR_WORDS, COMBINATIONS, MOTION_WORDS, SHAPE_WORDS, ShapesPrompt, Thing
from recipes.shapes.render import DEMO_CLIP, FPS, render, sample_scene

NAME = "the built-in captioner"
INSTRUCTION = "What does this clip show?"
SIGHT = Sight(fps=8.0, min_frames=2, max_frames=16, min_pixels=16 * 16, max_pixels=64 * 64)
"""Eight of the 13 frames of a clip of the demo, at their own size."""
LONGEST = 24
"""Tokens of a caption; the longest there is has about ten."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PATCH, FRAMES, MERGE = 8, 2, 2


# What is said


def caption_of(thing: Thing) -> str:
    """Example: "A red circle moves up and right."."""
    color = COLOR_WORDS[thing.color][0]
    return f"{'An' if color[0] in 'aeiou' else 'A'} {color} {SHAPE_WORDS[thing.shape][0]} {MOTION_WORDS[thing.motion][0][0]}."


class Said(NamedTuple):
    """What a caption says of one thing; None where it says nothing, or two things at once."""

    shape: str | None
    color: str | None
    motion: str | None


def read_caption(text: str) -> Said:
    """The words of the world in a text, in all paraphrases; nothing else in it counts."""
    motions = {name: [phrase for row in rows for phrase in row] for name, rows in MOTION_WORDS.items()}
    return Said(_named(text, SHAPE_WORDS), _named(text, COLOR_WORDS), _named(text, motions))


def _named(text: str, words: Mapping[str, Sequence[str]]) -> str | None:
    meant = {phrase: value for value, phrases in words.items() for phrase in phrases}
    longest_first = "|".join(re.escape(phrase) for phrase in sorted(meant, key=len, reverse=True))
    values = {meant[found.lower()] for found in re.findall(rf"\b(?:{longest_first})\b", text, flags=re.IGNORECASE)}
    return values.pop() if len(values) == 1 else None


def right(text: str, thing: Thing) -> dict[str, bool]:
    """Whether a caption names the thing's shape, colour and motion, and all of them."""
    said = read_caption(text)
    each = {"shape": said.shape == thing.shape, "colour": said.color == thing.color, "motion": said.motion == thing.motion}
    return {**each, "all": all(each.values())}


# Clips to say it of


class Drawn:
    """N curated clips of one thing each, drawn when they are asked for, and what they show: the combinations of a split, each as often as any other.

    "eval" are combinations of shape, colour and motion that "train" never shows. Clip i is the same however many there are. The camera pans in one of ten.
    """

    def __init__(self, number: int, *, seed: int, split: str) -> None:
        self.seed, self.split, combinations = seed, split, COMBINATIONS[split]
        turns = [np.random.default_rng([seed, turn, len(combinations)]).permutation(len(combinations)) for turn in range(-(-number // len(combinations)))]
        self.things = [combinations[place] for turn in turns for place in turn.tolist()][:number]

    def __len__(self) -> int:
        return len(self.things)

    @property
    def texts(self) -> list[str]:
        return [caption_of(thing) for thing in self.things]

    def video(self, row: int) -> NDArray[np.uint8]:
        """uint8 [T,H,W,3], of the demo's size."""
        rng = np.random.default_rng([self.seed, row, len(COMBINATIONS[self.split])])
        return to_uint8(render(sample_scene(ShapesPrompt("", "", (self.things[row],), False, self.split), rng, clip=DEMO_CLIP, pan=0.1), DEMO_CLIP))

    def frames(self, row: int) -> Iterator[tuple[Frame, float]]:
        """The frames [H,W,3] of a clip and their rate, as decoding gives them."""
        return ((frame, FPS) for frame in self.video(row))


# Who says it


def tiny_vlm(*, seed: int, width: int = 96, layers: int = 2) -> Vlm:
    """Random weights: Qwen3-VL with patches of 8 pixels and 2 frames, four of which make a token."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    words = _tokenizer()
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
    heads = width // 24
    text: dict[str, Any] = {"vocab_size": len(words), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": heads}
    text |= {"num_key_value_heads": heads, "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]}}
    text |= {"max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.04}
    vision: dict[str, Any] = {"depth": layers, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": width, "num_position_embeddings": 16}
    vision |= {"patch_size": PATCH, "temporal_patch_size": FRAMES, "spatial_merge_size": MERGE, "deepstack_visual_indexes": [0], "initializer_range": 0.04}
    marks = {f"{name}_token_id": ids[key] for name, key in (("image", "image_pad"), ("video", "video_pad"), ("vision_start",) * 2, ("vision_end",) * 2)}
    config = AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision, tie_word_embeddings=True, **marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoModelForImageTextToText.from_config(config)
    return Vlm(network.eval(), words, PatchFormat(PATCH, FRAMES, MERGE, *constants_of(config)), NAME, "", "float32")


def _tokenizer() -> Any:
    """A byte-level BPE that knows every text, and each word of the captions as one token; so is each time that can stand before frames."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    captions = [f"user\n{INSTRUCTION}assistant\n", *(caption_of(thing) for part in COMBINATIONS.values() for thing in part)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(captions, trainer)
    bpe.add_tokens([AddedToken(f"<{tenths / 10:.1f} seconds>", normalized=False) for tenths in range(30)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
