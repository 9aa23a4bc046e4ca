"""VideoReward (Liu et al. 2025, arXiv 2501.13918; Qwen2-VL-2B) from its published layout, on today's transformers.

    folder/model_config.json                        frames, prompt, LoRA, constants of normalisation
    folder/checkpoint-11352/model.safetensors       the whole peft model under the module names of transformers 4.45
                           or adapter_model.safetensors and non_lora_state_dict.safetensors

It is published as a pickle (`model.pth`). Weights are read from safetensors only, here too: a pickle is refused, and converted by hand where its source is trusted
(README.md has the line). Three things differ from a model of our own:

- The names. transformers' own table for old Qwen2-VL checkpoints renames them.
- The positions. VideoAlign copied a forward that gave its language model no positions, and transformers 4.45 then numbered the tokens one after the other, those of
  the clip too. The published weights learned that, so it is kept (`positions="flat"`); the grid that today's module makes from the same tokens gives other scores.
- The head. One row of weights is read at all three tokens (`output_dim` 1), or row i at token i (3).

The rubric is an input of the model and part of VideoAlign's code, not of the checkpoint: pass `prompt_template.DETAILED_PROMPT_WITH_SPECIAL_TOKEN` as it is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base_model.checkpoint import load_weights
from base_model.errors import UserError
from base_model.prompts.vision import PROMPT, Precision
from reward.ranking import tie_parameter
from reward.vlm.frames import FrameSampler
from reward.vlm.model import VlmReward, load_base
from reward.vlm.prompt import Dimension

PEFT = "base_model.model."
EMBEDDING = "language_model.embed_tokens.weight"
MIN_TOKENS, MIN_FRAMES, MAX_FRAMES = 128, 4, 768  # of a frame and of a clip, VideoAlign's vision_process.py
TIES_AT_EQUAL_QUALITY = 2 / 3  # Rao & Kupper's k = 5, fixed in VideoAlign: (k - 1) / (k + 1)
ONLY: dict[str, dict[str, Any]] = {  # what is read here; another value would be another model
    "model_config": {"use_special_tokens": True, "reward_token": "special"},
    "data_config": {"sample_type": "uniform", "prompt_template_type": "detailed_special", "num_frames": None},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "use_rslora": False},
}


def load_videoreward(folder: Path, *, rubric: str, clip_fps: float, base: str | Path | None = None, dtype: Precision = "bfloat16") -> VlmReward:
    """The checkpoint in `folder` as a `VlmReward` that scores clips of `clip_fps`; `save_vlm_reward` writes it as a folder of our own.

    rubric: VideoAlign's, with `{text_prompt}` in it. base: Qwen2-VL-2B-Instruct, if not where the checkpoint's configuration says. Raises UserError for a pickle,
    a configuration that is not VideoReward's, tensors that are missing or left over, and a base whose frozen weights are not the checkpoint's.
    """
    config = _config(folder / "model_config.json")
    data, peft = config["data_config"], config["peft_lora_config"]
    names, rubric = data["eval_dim"], rubric.replace("{text_prompt}", PROMPT)
    seen = rubric.find(PROMPT)
    dimensions = [Dimension(name, sees_prompt=-1 < seen < rubric.find(Dimension(name).token)) for name in names]
    found = load_base(base or config["model_config"]["model_name_or_path"], dtype=dtype)
    least = MIN_TOKENS * (found.patches.patch * found.patches.merge) ** 2
    sampler = FrameSampler(data["fps"], MIN_FRAMES, MAX_FRAMES, least, max(least, data["max_frame_pixels"]))
    options: dict[str, Any] = {"rank": peft["lora_r"], "alpha": peft["lora_alpha"], "keeps_vision": True, "positions": "flat", "most_clips": 2}
    model = VlmReward(found, dimensions, sampler=sampler, clip_fps=clip_fps, rubric=rubric, **options)
    _fill(model, {today(name): tensor for name, tensor in _tensors(folder).items()}, folder)
    constants = config["inference_config"]
    with torch.no_grad():
        model.log_tie.fill_(tie_parameter(TIES_AT_EQUAL_QUALITY))
        for i, name in enumerate(names):
            model.center[i], model.scale[i] = constants[f"{name}_mean"], constants[f"{name}_std"]
    return model.eval().requires_grad_(False)


def today(name: str) -> str:
    """A tensor's name in a peft model of transformers 4.45's Qwen2-VL -> its name in a peft model of today's, without its language head."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    inner = name.removeprefix(PEFT)
    for renaming in get_checkpoint_conversion_mapping("Qwen2VLForConditionalGeneration"):
        inner, _ = renaming.rename_source_key(inner)
    inner = inner.removeprefix("model.")
    for matrix in ("lora_A", "lora_B"):
        inner = inner.replace(f"{matrix}.weight", f"{matrix}.default.weight")  # a file of the adapter alone leaves its name out
    return inner


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        for section, values in ONLY.items():
            for key, value in values.items():
                if config[section].get(key) != value:
                    raise UserError(f"{path}: {section}.{key} is {config[section].get(key)!r}; only {value!r} is read here. Give a checkpoint of VideoReward's kind")
        numbers = [config["peft_lora_config"][key] for key in ("lora_r", "lora_alpha")] + [config["data_config"][key] for key in ("fps", "max_frame_pixels")]
        numbers += [config["inference_config"][f"{name}_{key}"] for name in config["data_config"]["eval_dim"] for key in ("mean", "std")]
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("a value that is no number")
    except FileNotFoundError as error:
        raise UserError(f"no VideoReward checkpoint, {path}. Give the folder that holds model_config.json and checkpoint-*") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"not the configuration of a VideoReward checkpoint, {path}: {error!r}. Download it again") from error
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the latest checkpoint. Raises UserError for a pickle, by content."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    if not checkpoints:
        raise UserError(f"no checkpoint-* in {folder}. Download the whole repository of VideoReward")
    latest = checkpoints[-1]
    for parts in (("model",), ("adapter_model", "non_lora_state_dict")):
        files = [path for part in parts for path in (latest / f"{part}.safetensors", latest / f"{part}.pth") if path.exists()]
        files = [path for path in files if path.suffix != ".pth" or path.with_suffix(".safetensors") not in files]
        if len(files) == len(parts):
            return {name: tensor for path in files for name, tensor in load_weights(path)[0].items()}
    raise UserError(f"no weights in {latest}. Download model.pth and convert it to model.safetensors")


def _fill(model: VlmReward, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Puts what was trained into the model, and compares what was frozen with the base. tensors by today's names."""
    left = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    head, embedding = (left.pop(name, None) for name in ("rm_head.weight", EMBEDDING))
    if head is None or embedding is None or len(head) not in (1, len(model.dims)) or len(embedding) <= max(model.token_ids):
        raise UserError(f"no head or no rows of the reward tokens in {folder}: rm_head.weight and embed_tokens.weight belong there. Download it again")
    own = model.learned() | {"head.mean": head.expand(len(model.dims), -1)}
    for name in own:
        inner = name.removeprefix(f"network.{PEFT}")
        if "trainable_tokens_delta" in name:
            own[name] = embedding[model.token_ids]
        elif inner in left:
            own[name] = left.pop(inner)
        elif name.startswith("network."):
            raise UserError(f"the checkpoint in {folder} lacks {inner}. Download it again, or give the base it was made from")
    _check_frozen(model, left, embedding, folder)
    try:
        model.load_learned(own)
    except ValueError as error:
        raise UserError(f"{folder} does not fit the base {model.base.name}: {error}. Give the base it was made from") from error


def _check_frozen(model: VlmReward, tensors: Mapping[str, Tensor], embedding: Tensor, folder: Path) -> None:
    """Raises UserError unless the tensors, and the rows of the embedding but those of the reward tokens, are the base's in bfloat16."""
    frozen = {name.removeprefix(PEFT): value for name, value in model.network.state_dict().items()}
    rows = frozen[EMBEDDING.replace(".weight", ".token_adapter.base_layer.weight")]
    shared = torch.arange(min(len(rows), len(embedding)))
    shared = shared[~torch.isin(shared, torch.tensor(model.token_ids))]
    foreign = sorted(set(tensors) - set(frozen))
    if foreign:
        raise UserError(f"{folder} holds a tensor that VideoReward has not: {foreign[0]}. Give a checkpoint of VideoReward's kind")
    pairs = [(embedding[shared], rows[shared]), *((tensor, frozen[name]) for name, tensor in tensors.items())]
    if not all(torch.equal(ours.bfloat16(), theirs.bfloat16()) for ours, theirs in pairs):
        raise UserError(f"the base {model.base.name} is not the one that {folder} was trained on: its frozen weights differ. Give Qwen2-VL-2B-Instruct")
