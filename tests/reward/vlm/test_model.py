"""The vision-language reward on tiny random models of all three families: what a score may depend on, what learns, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from base_model.checkpoint import fingerprint
from base_model.errors import UserError
from base_model.prompts.vision import CLIP_MEAN, FAMILIES
from reward.types import Scorer
from reward.vlm.model import VlmReward, load_base
from reward.vlm.prompt import Dimension
from tests.reward.vlm.tiny import FRAMES, LOOK, MATCH, clips, save_tiny, tiny_network, tiny_reward, tokenizer

PROMPTS = ["a bright clip", "dark", "a clip of something far away"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(tmp_path_factory.mktemp("base") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def wide_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wide enough for NF4, whose blocks have 64 weights."""
    return {family: save_tiny(tmp_path_factory.mktemp("wide") / family, family, width=64) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_dimensions_that_may_see_the_prompt_depend_on_it_and_all_depend_on_the_clip(family: str, bases: dict[str, Path]) -> None:
    model = tiny_reward(bases[family])
    with torch.no_grad():
        first = model(clips(), PROMPTS).mean
        other_prompts = model(clips(), ["another one", "x" * 40, ""]).mean
        other_clips = model(clips(seed=2), PROMPTS).mean
    look, match = 0, 1
    assert (first - other_prompts)[:, look].abs().max() < 1e-6
    assert (first - other_prompts)[:, match].abs().min() > 1e-3
    assert (first - other_clips).abs().min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_head_on_hidden_states_of_the_generation_model(family: str, bases: dict[str, Path]) -> None:
    """The whole model for text generation, never wrapped, its tokens counted out by hand."""
    model = VlmReward(load_base(bases[family]), (LOOK, MATCH), sampler=FRAMES, clip_fps=8.0)
    torch.nn.init.normal_(model.head.mean)
    inputs = {name: value.clone() for name, value in model.inputs(clips(2), PROMPTS[:2], [8.0, 8.0]).items()}
    whole = tiny_network(family)
    rows = whole.get_input_embeddings().weight.data
    for dimension, token in zip((LOOK, MATCH), model.token_ids, strict=True):
        rows[token] = rows[tokenizer()(dimension.name, add_special_tokens=False)["input_ids"]].mean(0)
    with torch.no_grad():
        hidden = whole(**inputs, output_hidden_states=True).hidden_states[-1]
        expected = [[(hidden[i, inputs["input_ids"][i].tolist().index(t)] * model.head.mean[r]).sum() for r, t in enumerate(model.token_ids)] for i in range(2)]
        torch.testing.assert_close(model(clips(2), PROMPTS[:2]).mean, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_clips_of_a_ranking_go_through_the_language_model_once(family: str, bases: dict[str, Path]) -> None:
    model, calls = tiny_reward(bases[family]), []
    model.base.network.language_model.register_forward_hook(lambda module, arguments, output: calls.append(output.last_hidden_state.shape[0]))
    model.scores(clips(5), ["x"] * 5, [8.0] * 5)
    assert calls == [5]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_depends_neither_on_the_other_clips_nor_on_padding(family: str, bases: dict[str, Path]) -> None:
    """Clips of three sizes, lengths and rates together."""
    model = tiny_reward(bases[family])
    videos, rates = [clips(1, 9, 16, 24)[0], clips(1, 4, 8, 8)[0], clips(1, 30, 24, 16)[0]], [8.0, 4.0, 16.0]
    with torch.no_grad():
        together = model.scores(videos, PROMPTS, rates).mean
        for i in range(3):
            alone = model.scores(videos[i : i + 1], PROMPTS[i : i + 1], rates[i : i + 1]).mean
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
        many = model(clips(1).expand(20, -1, -1, -1, -1), ["x"] * 20).mean  # more than go at once
    torch.testing.assert_close(many, many[:1].expand(20, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_at_twice_the_rate_scores_the_same_and_at_a_wrong_rate_another(family: str, bases: dict[str, Path]) -> None:
    model, slow = tiny_reward(bases[family]), clips(1, 10)[0]
    fast = slow.repeat_interleave(2, 0)[:-1]  # 19 frames at 16 a second, every second one of them new
    with torch.no_grad():
        first, same, wrong = (model.scores([video], ["x"], [rate]).mean for video, rate in ((slow, 8.0), (fast, 16.0), (slow, 16.0)))
    torch.testing.assert_close(first, same, rtol=0, atol=1e-5)
    assert (first - wrong).abs().max() > 1e-3


def test_a_clip_that_is_not_finite_is_unknown_and_leaves_the_others_alone(bases: dict[str, Path]) -> None:
    model, video = tiny_reward(bases["qwen2_5_vl"], spread=True), clips()
    with torch.no_grad():
        expected = model(video, PROMPTS)
        video[1, 2, 0, 3, 3] = torch.nan
        scores = model(video, PROMPTS)
    assert scores.mean[1].isnan().all() and scores.spread[1].isnan().all() and (scores.spread[[0, 2]] > 0).all()
    torch.testing.assert_close(scores.mean[[0, 2]], expected.mean[[0, 2]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        model(video, ["x"] * 2)


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_tokens_and_head_learn_and_nothing_of_the_base_moves(family: str, nf4: bool, wide_bases: dict[str, Path]) -> None:
    model = tiny_reward(wide_bases[family], spread=True, nf4=nf4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scores = model.scores(clips(), PROMPTS, [8.0] * 3)
    (scores.mean.square().sum() + scores.spread.sum() + model.log_tie.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    learned = {name for name in model.learned() if name.rpartition(".")[2] not in ("temperature", "center", "scale")}
    assert changed == learned
    kinds = {"lora_A", "lora_B", "trainable_tokens_delta", "mean", "log_spread", "log_tie"}
    assert {kind for kind in kinds for name in changed if kind in name} == kinds and not any(".visual." in name for name in changed)
    linears = sum(".lora_A." in name for name in changed)
    assert linears == 2 * 7, "the seven linear layers of both layers of the language model"
    if nf4:
        assert sum(value.dtype == torch.uint8 and name.endswith("base_layer.weight") for name, value in before.items()) == linears


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nf4_the_language_model_computes_with_the_weights_that_four_bits_hold(family: str, wide_bases: dict[str, Path]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    whole, small = (tiny_reward(wide_bases[family], nf4=nf4) for nf4 in (False, True))
    held = {name: module for name, module in small.network.named_modules() if name.endswith(".base_layer") and hasattr(module.weight, "quant_state")}
    assert len(held) == 14
    for name, module in held.items():
        weight = whole.network.get_submodule(name).weight.data
        four = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert 0.01 < (weight - four).norm() / weight.norm() < 0.15
        weight.copy_(four)
    with torch.no_grad():
        torch.testing.assert_close(whole(clips(), PROMPTS).mean, small(clips(), PROMPTS).mean, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_in_the_pixels_is_that_of_finite_differences(family: str, bases: dict[str, Path]) -> None:
    model = tiny_reward(bases[family]).requires_grad_(False)
    video = clips(1, 4).mul(0.6).add(0.2).requires_grad_()
    scorer: Scorer = model
    assert scorer.differentiable and scorer.dims == ("look", "match")

    def total(x: Tensor) -> Tensor:
        return scorer(x, ["a bright clip"]).mean.sum()

    (grad,) = torch.autograd.grad(total(video), video)
    uphill, step = grad / grad.norm(), 0.02
    with torch.no_grad():
        slope = (total(video + step * uphill) - total(video - step * uphill)) / (2 * step)
    assert grad.norm() > 1e-3 and float(grad.norm()) == pytest.approx(float(slope), rel=1e-2)


def test_a_dimensions_row_begins_at_its_name_and_fresh_heads_score_zero(bases: dict[str, Path]) -> None:
    base = load_base(bases["qwen2_vl"])
    rows = base.network.get_input_embeddings().weight.data.clone()
    model = VlmReward(base, (Dimension("visual_quality"),), sampler=FRAMES, clip_fps=8.0)
    expected = rows[tokenizer()("visual quality", add_special_tokens=False)["input_ids"]].mean(0)
    delta = next(value for name, value in model.learned().items() if "trainable_tokens_delta" in name)
    torch.testing.assert_close(delta[0], expected)
    assert model.token_ids == [320] and (model(clips(), PROMPTS).mean == 0).all() and "<|visual_quality_reward|>" not in tokenizer().get_vocab()


def test_more_dimensions_than_the_embedding_has_rows_for_get_rows(bases: dict[str, Path]) -> None:
    dimensions = [Dimension(f"d{i}") for i in range(70)]
    model = VlmReward(load_base(bases["qwen2_vl"]), dimensions, sampler=FRAMES, clip_fps=8.0)
    assert model(clips(1, 4, 8, 8), ["x"]).mean.shape == (1, 70) and max(model.token_ids) == 320 + 69


def test_the_preprocessors_constants_win_over_the_familys(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen2_vl")
    assert load_base(folder).patches.mean == CLIP_MEAN
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    assert load_base(folder).patches.mean == (0.1, 0.2, 0.3)


def test_a_fingerprint_tells_weights_apart_and_not_folders(tmp_path: Path, bases: dict[str, Path]) -> None:
    first = load_base(bases["qwen2_vl"]).fingerprint
    assert load_base(save_tiny(tmp_path / "copy", "qwen2_vl")).fingerprint == first
    assert load_base(save_tiny(tmp_path / "other", "qwen2_vl", seed=1)).fingerprint != first
    network = tiny_network("qwen2_vl").model
    before = fingerprint(network)
    network.language_model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert fingerprint(network) != before


def test_what_is_no_base_is_one_line(tmp_path: Path, bases: dict[str, Path]) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = Qwen2ForCausalLM(Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    words.save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    for name, match in ((tmp_path / "text", "of the family qwen2;"), (tmp_path / "empty", "cannot load the base"), ("nobody/nothing", "HF_HUB_OFFLINE=0")):
        with pytest.raises(UserError, match=match) as error:
            load_base(name)
        assert "\n" not in str(error.value)


def test_a_damaged_base_is_one_line(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen2_vl")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load the base") as cut:
        load_base(folder)
    tensors = safetensors.torch.load(whole)
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack .*norm\.weight") as lacking:
        load_base(folder)
    weights.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the base") as pickled:
        load_base(folder)
    assert all("\n" not in str(error.value) for error in (cut, lacking, pickled))
    (folder / "pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    words = json.loads((folder / "tokenizer.json").read_text())
    words["added_tokens"] = [token for token in words["added_tokens"] if token["content"] != "<|video_pad|>"]
    words["model"]["vocab"].pop("<|video_pad|>")
    (folder / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="does not know the video token"):
        load_base(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients_from_less_that_is_kept(family: str, bases: dict[str, Path]) -> None:
    def learned(recompute: bool) -> tuple[dict[str, Tensor], int]:
        model, kept = tiny_reward(bases[family]), 0
        if recompute:
            model.recompute()

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(clips(), PROMPTS).mean.square().sum()
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}, kept

    (plain, all_kept), (again, less_kept) = learned(False), learned(True)
    assert less_kept < 0.6 * all_kept
    assert plain.keys() == again.keys() and any("lora_" in name for name in plain)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
