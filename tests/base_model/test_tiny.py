"""The built-in model: text, conditions, files, and LoRA that starts as nothing and comes off without a trace."""

from pathlib import Path

import pytest
import torch

from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.lora import adapter_state, add_lora, load_adapter_state, merge, reference
from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.uvit import UViT, UViTConfig
from base_model.prompts.text import TextEncoder
from base_model.tiny import build_tiny, load_codec, load_tiny, save_network
from base_model.types import ClipShape
from tests.recipes.small import save_small_network, small_model

PROMPTS = ["a red circle moves left", "two words", "a blue bar and a green triangle that grow"]


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 8, 2, 4, 4, generator=generator), torch.rand(batch, generator=generator)


def test_text_states_do_not_depend_on_the_company_a_prompt_keeps() -> None:
    together, alone = TextEncoder()(PROMPTS), TextEncoder()(PROMPTS[1:2])
    length = int(alone.mask.sum())
    assert together.text.shape[-1] == TextEncoder.width
    assert int(together.mask[1].sum()) == length
    assert (together.text[1, :length] - alone.text[0]).abs().max() < 1e-5
    with pytest.raises(UserError, match="empty"):
        TextEncoder()([])


def test_conditions_repeat_each_prompt_in_a_row_and_select_rows() -> None:
    cond = TextEncoder()(PROMPTS)
    assert cond.repeat(2).prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1], PROMPTS[2], PROMPTS[2])
    assert torch.equal(cond.repeat(2).text[3], cond.text[1])
    assert cond[1:].prompts == tuple(PROMPTS[1:]) and len(cond[[2, 0]]) == 2
    assert torch.equal(cond[torch.tensor([2])].mask[0], cond.mask[2])


def test_a_batch_gives_what_each_clip_gives_alone() -> None:
    model, cond = small_model(), TextEncoder()(PROMPTS)
    x, t = inputs()
    together = model(x, t, cond)
    for i in range(3):
        assert (model(x[i : i + 1], t[i : i + 1], cond[[i]]) - together[i]).abs().max() < 1e-5


def test_a_saved_network_comes_back_with_its_architecture(tmp_path: Path) -> None:
    path = save_small_network(tmp_path / "network.safetensors")
    model, again, cond = small_model(), load_tiny(path), TextEncoder()(PROMPTS)
    x, t = inputs()
    assert again.config == model.config
    assert torch.equal(again(x, t, cond), model(x, t, cond))
    assert again.latents.shape(ClipShape(13, 32, 48)) == (8, 4, 8, 12)


def test_weights_of_another_architecture_are_refused_in_one_line(tmp_path: Path) -> None:
    model = build_tiny(DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)))
    model.config = DiTConfig(width=48, depth=2, heads=2, rotary_axes=(8, 8, 8))
    save_network(tmp_path / "wrong.safetensors", model)
    with pytest.raises(UserError, match=r"wrong\.safetensors"):
        load_tiny(tmp_path / "wrong.safetensors")


def test_the_word_in_a_file_says_which_network_it_holds_and_none_means_dit(tmp_path: Path) -> None:
    x, t = inputs()
    cond = TextEncoder()(PROMPTS)
    for config, kind, word in ((UViTConfig(width=48, heads=2, rotary_axes=(8, 8, 8)), UViT, "uvit"), (DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)), DiT, "dit")):
        model, path = build_tiny(config), tmp_path / f"{word}.safetensors"
        torch.nn.init.normal_(model.network.tokens_out.weight)
        save_network(path, model)
        again = load_tiny(path)
        assert load_weights(path)[1]["network"] == word and type(again.network) is kind and again.config == config
        assert torch.equal(again(x, t, cond), model(x, t, cond))
    tensors, metadata = load_weights(tmp_path / "dit.safetensors")
    save_weights(tmp_path / "old.safetensors", tensors, {"config": metadata["config"]})
    assert type(load_tiny(tmp_path / "old.safetensors").network) is DiT
    save_weights(tmp_path / "new.safetensors", tensors, {**metadata, "network": "unet"})
    with pytest.raises(UserError, match="holds the network 'unet', which is not known here: there are dit, uvit") as caught:
        load_tiny(tmp_path / "new.safetensors")
    assert "\n" not in str(caught.value)
    save_weights(tmp_path / "odd.safetensors", tensors, {**metadata, "network": "uvit"})
    with pytest.raises(UserError, match="does not hold the weights of this architecture"):
        load_tiny(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("config", [UViTConfig(), DiTConfig()], ids=["uvit", "dit"])
def test_an_adapter_wraps_every_linear_of_the_blocks_but_the_modulation(config: UViTConfig | DiTConfig) -> None:
    network = build_tiny(config).network
    inside = {name for name, module in network.blocks.named_modules() if isinstance(module, torch.nn.Linear) and "modulation" not in name}
    wrapped = {name.split(".lora_A")[0].split("blocks.")[1] for name, _ in add_lora(network, rank=2, alpha=2).named_parameters() if "lora_A" in name}
    assert wrapped == inside and len(inside) == (4 * 4 + 1 if isinstance(config, UViTConfig) else 4 * 7)


@pytest.mark.parametrize(
    "config",
    [
        *("", "{", "[]", "5", "[" * 100_000, '{"width": "128"}', '{"width": -1}', '{"heads": 0}', '{"heads": 3}'),
        *('{"depth": 1e9}', '{"depth": 10000000000}', '{"patch": [1, 2]}', '{"x": 1}'),
    ],
)
def test_an_architecture_that_makes_no_sense_is_refused_in_one_line(tmp_path: Path, config: str) -> None:
    save_weights(tmp_path / "odd.safetensors", {"a": torch.zeros(1)}, {"config": config})
    for load in (load_tiny, load_codec):
        with pytest.raises(UserError) as caught:
            load(tmp_path / "odd.safetensors")
        assert "\n" not in str(caught.value)


def test_a_fresh_adapter_changes_nothing_and_only_it_trains() -> None:
    model, cond = small_model(), TextEncoder()(PROMPTS)
    x, t = inputs()
    before = model(x, t, cond)
    model.network = add_lora(model.network, rank=4, alpha=4)
    assert torch.equal(model(x, t, cond), before)
    trained = [name for name, p in model.network.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_reference_is_the_network_without_its_adapter_to_the_bit_and_merging_equals_applying(tmp_path: Path) -> None:
    model, cond = small_model(), TextEncoder()(PROMPTS)
    x, t = inputs()
    before = model(x, t, cond)
    model.network = add_lora(model.network, rank=4, alpha=8)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = model(x, t, cond)
    assert (adapted - before).abs().max() > 1e-2
    with reference(model.network):
        assert torch.equal(model(x, t, cond), before)
    assert torch.equal(model(x, t, cond), adapted)
    state = {name: tensor.clone() for name, tensor in adapter_state(model.network).items()}
    model.network = merge(model.network)
    assert (model(x, t, cond) - adapted).abs().max() < 1e-5

    other = small_model()
    other.network = add_lora(other.network, rank=4, alpha=8, seed=1)
    load_adapter_state(other.network, state)
    assert torch.equal(other(x, t, cond), adapted)
