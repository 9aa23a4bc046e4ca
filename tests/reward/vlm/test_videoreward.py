"""VideoReward's published layout, written by hand with random weights: its scores are those of an emulation of the code it was published with."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.prompts.vision import OPENING
from reward.ranking import tie_parameter
from reward.vlm.files import load_vlm_reward, save_vlm_reward
from reward.vlm.videoreward import load_videoreward
from tests.reward.vlm.tiny import clips, save_tiny, tiny_network, tokenizer

TOKENS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
RUBRIC = "\nRate it.\n\n**Look:**\nRating: <|VQ_reward|>\nEND\n\nRating: <|MQ_reward|>\nEND\n\nTextual prompt - {text_prompt}\nRating: <|TA_reward|>\nEND\n"
PROMPTS = ["a bright clip", "a dark clip far away"]
LINEARS = [f"{part}.{name}_proj" for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for name in names]
RANK, ALPHA = 2, 6
CONFIG: dict[str, Any] = {
    "data_config": {"max_frame_pixels": 8192, "num_frames": None, "fps": 2.0, "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "model_config": {"model_name_or_path": "", "output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "use_rslora": False},
    "inference_config": {"VQ_mean": 3.7, "VQ_std": 2.2, "MQ_mean": 1.2, "MQ_std": 1.4, "TA_mean": 2.8, "TA_std": 2.5},
}


class Published:
    """A base, and a fine-tuned copy of it as the published code would hold it: LoRA on the language model, vision tower and rows of the tokens trained."""

    def __init__(self, output_dim: int) -> None:
        self.base = tiny_network("qwen2_vl")
        self.tuned = tiny_network("qwen2_vl")
        g = torch.Generator().manual_seed(7)
        for parameter in self.tuned.model.visual.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=g), alpha=0.05)
        self.ids = [len(tokenizer()) + i for i in range(3)]
        self.tuned.get_input_embeddings().weight.data[self.ids] = torch.randn(3, 32, generator=g)
        self.head = torch.randn(output_dim, 32, generator=g)
        self.lora: dict[str, Tensor] = {}
        for layer in range(2):
            for name in LINEARS:
                weight = self.tuned.model.language_model.layers[layer].get_submodule(name).weight
                self.lora[f"{layer}.{name}.A"] = torch.randn(RANK, weight.shape[1], generator=g) * 0.3
                self.lora[f"{layer}.{name}.B"] = torch.randn(weight.shape[0], RANK, generator=g) * 0.3

    def old_names(self) -> dict[str, Tensor]:
        """{name in transformers 4.45: tensor} of the tuned model before LoRA: the vision tower beside the decoder, not both inside one module."""
        out = {}
        for name, tensor in self.tuned.state_dict().items():
            name = re.sub(r"^model\.visual\.", "visual.", name)
            out[re.sub(r"^model\.language_model\.", "model.", name)] = tensor
        return {**out, "rm_head.weight": self.head}

    def peft_names(self) -> dict[str, Tensor]:
        """The whole state of the peft model, as `model.pth` holds it."""
        out = {}
        for name, tensor in self.old_names().items():
            linear = re.match(r"model\.layers\.\d+\.(.*_proj)\.(weight|bias)$", name)
            out["base_model.model." + (name.replace(f".{linear[2]}", f".base_layer.{linear[2]}") if linear else name)] = tensor
        return {**out, **self.adapter(".default")}

    def adapter(self, infix: str) -> dict[str, Tensor]:
        return {f"base_model.model.model.layers.{key[:-2]}.lora_{key[-1]}{infix}.weight": tensor for key, tensor in self.lora.items()}

    @torch.no_grad()
    def scores(self, video: Tensor, prompt: str) -> list[float]:
        """One clip through an emulation of VideoAlign's forward: embeddings with the clip's features put in, a decoder that numbers its tokens, a head at three tokens."""
        merged = tiny_network("qwen2_vl")
        merged.load_state_dict(self.tuned.state_dict())
        for key, a in self.lora.items():
            if key.endswith(".A"):
                layer, _, name = key[:-2].partition(".")
                merged.model.language_model.layers[int(layer)].get_submodule(name).weight.data += ALPHA / RANK * self.lora[f"{key[:-1]}B"] @ a
        patches, grid = vision_input(video)
        text = OPENING + "<|vision_start|>" + "<|video_pad|>" * (len(patches) // 4) + "<|vision_end|>" + RUBRIC.replace("{text_prompt}", prompt)
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, TOKENS)) + ")", text):
            ids += [self.ids[TOKENS.index(piece)]] if piece in TOKENS else tokenizer()(piece, add_special_tokens=False)["input_ids"]
        embedded = merged.get_input_embeddings()(torch.tensor([ids]))
        features = merged.model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
        embedded = embedded.masked_scatter((torch.tensor([ids]) == tokenizer().convert_tokens_to_ids("<|video_pad|>"))[..., None].expand_as(embedded), features)
        numbers = torch.arange(len(ids)).view(1, 1, -1).expand(3, 1, -1)
        hidden = merged.model.language_model(inputs_embeds=embedded, position_ids=numbers).last_hidden_state[0]
        logits = hidden @ self.head.T  # [L, output_dim]
        return [float(logits[ids.index(token), i if len(self.head) == 3 else 0]) for i, token in enumerate(self.ids)]


def vision_input(video: Tensor) -> tuple[Tensor, list[int]]:
    """VideoAlign's frames of a clip at 8 a second: four of them, resized by the same rule, through transformers' image processor two and two."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    from base_model.prompts.vision import CLIP_MEAN, CLIP_STD

    frames = video[torch.linspace(0, len(video) - 1, 4).round().long()]
    size = smart_resize(*video.shape[-2:], factor=8, min_pixels=8192, max_pixels=8192)
    frames = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    frames = (frames - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    rows = []
    for t in (0, 2):
        for y in range(0, size[0], 8):
            for x in range(0, size[1], 8):
                rows += [frames[t : t + 2, :, y + dy : y + dy + 4, x + dx : x + dx + 4].transpose(0, 1).flatten() for dy in (0, 4) for dx in (0, 4)]
    return torch.stack(rows), [2, size[0] // 4, size[1] // 4]


def written(folder: Path, published: Published, files: Mapping[str, dict[str, Tensor]], config: dict[str, Any] = CONFIG) -> Path:
    """The published layout in `folder`, and its base in `folder/base`."""
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(parents=True)
    (folder / "checkpoint-900").mkdir()
    for name, tensors in files.items():
        safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, checkpoint / name)
    (folder / "model_config.json").write_text(json.dumps(config))
    save_tiny(folder / "base", "qwen2_vl")
    return folder


@pytest.mark.parametrize("output_dim", [1, 3])
def test_the_published_layout_scores_as_the_code_it_was_published_with(output_dim: int, tmp_path: Path) -> None:
    published = Published(output_dim)
    folder = written(tmp_path, published, {"model.safetensors": published.peft_names()})
    model = load_videoreward(folder, rubric=RUBRIC, clip_fps=8.0, base=folder / "base", dtype="float32")
    video = clips(2, 9, 64, 96)
    with torch.no_grad():
        found = model(video, PROMPTS).mean
    expected = torch.tensor([published.scores(clip, prompt) for clip, prompt in zip(video, PROMPTS, strict=True)])
    print("published", expected.tolist(), "loaded", found.tolist())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std(0).min() > 1e-2
    assert model.dims == ("VQ", "MQ", "TA") and [d.sees_prompt for d in model.dimensions] == [False, False, True]
    assert model.center.tolist() == pytest.approx([3.7, 1.2, 2.8]) and model.scale.tolist() == pytest.approx([2.2, 1.4, 2.5])
    assert model.log_tie[0, 0] == pytest.approx(tie_parameter(2 / 3))

    model.positions = "grid"  # what today's module would make of the same tokens
    with torch.no_grad():
        assert (model(video, PROMPTS).mean - expected).abs().max() > 1e-2
    model.positions = "flat"

    save_vlm_reward(tmp_path / "own", model, {"licences": ["Apache-2.0"]})
    own = load_vlm_reward(tmp_path / "own", clip_fps=8.0)
    with torch.no_grad():
        torch.testing.assert_close(own(video, PROMPTS).mean, found, rtol=0, atol=1e-6)


def test_an_adapter_beside_what_else_was_trained_gives_the_same_model(tmp_path: Path) -> None:
    published = Published(1)
    whole = published.peft_names()
    rest = {name: tensor for name, tensor in whole.items() if "visual." in name or "rm_head" in name or "embed_tokens" in name}
    one = written(tmp_path / "one", published, {"model.safetensors": whole})
    two = written(tmp_path / "two", published, {"adapter_model.safetensors": published.adapter(""), "non_lora_state_dict.safetensors": rest})
    first, second = (load_videoreward(folder, rubric=RUBRIC, clip_fps=8.0, base=folder / "base", dtype="float32").learned() for folder in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_pickle_is_refused_by_content_whatever_its_name(tmp_path: Path) -> None:
    published = Published(1)
    folder = written(tmp_path, published, {})
    for name in ("model.pth", "model.safetensors"):
        torch.save(published.peft_names(), folder / "checkpoint-11352" / name)
        with pytest.raises(UserError, match="refused to open a pickled checkpoint") as error:
            load_videoreward(folder, rubric=RUBRIC, clip_fps=8.0, base=folder / "base", dtype="float32")
        assert "\n" not in str(error.value)
        (folder / "checkpoint-11352" / name).unlink()
    with pytest.raises(UserError, match="no weights in"):
        load_videoreward(folder, rubric=RUBRIC, clip_fps=8.0, base=folder / "base", dtype="float32")


def test_another_base_and_what_does_not_fit_are_refused(tmp_path: Path) -> None:
    published = Published(1)
    whole = published.peft_names()

    def load(folder: Path, **more: Any) -> None:
        load_videoreward(folder, **{"rubric": RUBRIC, "clip_fps": 8.0, "base": folder / "base", "dtype": "float32", **more})

    folder = written(tmp_path / "whole", published, {"model.safetensors": whole})
    with pytest.raises(UserError, match=r"is not the one that .* was trained on: its frozen weights differ"):
        load(folder, base=save_tiny(tmp_path / "other", "qwen2_vl", seed=3))
    with pytest.raises(UserError, match=r"holds <\|TA_reward\|> 0 times"):
        load(folder, rubric=RUBRIC.replace("<|TA_reward|>", ""))
    with pytest.raises(UserError, match="frames a second"):
        load_videoreward(folder, rubric=RUBRIC, clip_fps=1.0, base=folder / "base", dtype="float32")(clips(1), ["x"])

    adapter = next(name for name in whole if "lora_A" in name)
    changes = {
        "lacking": ({name: tensor for name, tensor in whole.items() if name != adapter}, "lacks .*lora_A"),
        "more": ({**whole, "base_model.model.extra.weight": torch.zeros(1)}, "VideoReward has not: extra.weight"),
        "headless": ({name: tensor for name, tensor in whole.items() if "rm_head" not in name}, "no head"),
        "narrow": ({**whole, adapter: torch.zeros(1, 32)}, "does not fit the base"),
        "frozen": ({name: tensor + (0.1 if name.endswith("model.norm.weight") else 0) for name, tensor in whole.items()}, "frozen weights differ"),
    }
    for name, (tensors, match) in changes.items():
        with pytest.raises(UserError, match=match) as error:
            load(written(tmp_path / name, published, {"model.safetensors": tensors}))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "match"),
    [
        ("data_config", "sample_type", "multi_pts", "sample_type is 'multi_pts'; only 'uniform'"),
        ("data_config", "num_frames", 8, "num_frames is 8"),
        ("model_config", "reward_token", "last", "reward_token is 'last'"),
        ("peft_lora_config", "use_rslora", True, "use_rslora is True"),
        ("inference_config", "VQ_std", "two", "not the configuration"),
        ("data_config", "fps", None, "not the configuration"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(section: str, key: str, value: object, match: str, tmp_path: Path) -> None:
    config = {**CONFIG, section: {**CONFIG[section], key: value}}
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match) as error:
        load_videoreward(tmp_path, rubric=RUBRIC, clip_fps=8.0)
    assert "\n" not in str(error.value)
    (tmp_path / "model_config.json").unlink()
    with pytest.raises(UserError, match="no VideoReward checkpoint"):
        load_videoreward(tmp_path, rubric=RUBRIC, clip_fps=8.0)
