"""Prompts made long: what a language model wrote becomes a caption of whole sentences or the prompt itself, the same for the same seed, and nothing pickled is opened."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from base_model.errors import UserError
from base_model.prompts.expand import (
    CARD,
    LONGEST,
    Expanded,
    Expander,
    Style,
    TinySize,
    answered,
    asked,
    bpe_tokenizer,
    ends_of,
    finished,
    load_expander,
    save_expander,
    tiny_expander,
)

TEXTS = ["a red circle ->", " a video of a red circle that grows.", "blue bar ->", " a blue bar moves to the left. The camera rests."]
CHAT = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> Expander:
    return tiny_expander(TEXTS, TinySize(32, 1, 2, 300, 256), Style(most_tokens=12), seed=0)


# What was written becomes a caption


@pytest.mark.parametrize(
    ("written", "whole", "text"),
    [
        (" a red  circle\ngrows ", True, "a red circle grows"),
        ("A cat sleeps. It snores in a", False, "A cat sleeps."),
        ('He says "go!" and then', False, 'He says "go!"'),
        ("At 3.5 metres a kite. The win", False, "At 3.5 metres a kite."),
        ("猫が眠る。そして", False, "猫が眠る。"),
        ("<think>a cat? or a dog.</think> A cat.", True, "A cat."),
        ("A bell\x07 rings\ufffd.", True, "A bell rings."),
    ],
)
def test_a_caption_is_one_line_of_whole_sentences(written: str, whole: bool, text: str) -> None:
    assert finished("cat", written, whole=whole) == ("cat", text, "")


@pytest.mark.parametrize(("written", "whole"), [("", True), (" \n", True), ("...", True), ("<think>a cat", False), ("a cat that", False), ("\ufffd", True)])
def test_where_nothing_whole_was_written_the_prompt_is_kept_and_the_note_says_why(written: str, whole: bool) -> None:
    kept = finished("a cat", written, whole=whole)
    assert kept.text == kept.prompt == "a cat" and kept.note.startswith("the expander ")


def test_a_caption_has_a_hard_cap_and_still_ends_with_a_sentence() -> None:
    long = "A cat sleeps on a mat. " * 200
    text = finished("a cat", long, whole=True).text
    assert LONGEST - 30 < len(text) <= LONGEST and text.endswith("mat.") and long.startswith(text)
    assert finished("a cat", "x" * 3000, whole=True).text == "a cat"


# What is asked


def test_a_model_without_a_chat_template_reads_an_arrow_and_one_with_it_reads_the_instruction(tiny: Expander) -> None:
    plain = asked(tiny.tokenizer, " a red\ncircle ", tiny.style)
    assert plain == "a red circle ->" and answered(tiny.tokenizer, "it  grows") == " it grows"
    chat = bpe_tokenizer(TEXTS, 300)
    chat.chat_template, chat.bos_token = CHAT, "<s>"
    told = asked(chat, "a red circle", Style(instruction="Write more."))
    assert told == "[system] Write more.\n[user] a red circle\n[assistant] ", "the first token is the tokenizer's own"
    assert answered(chat, "it  grows") == "it grows"


def test_the_tokens_of_a_prompt_are_the_first_tokens_of_prompt_and_caption(tiny: Expander) -> None:
    told = asked(tiny.tokenizer, "a red circle", tiny.style)
    given, whole = (tiny.tokenizer(text)["input_ids"] for text in (told, told + answered(tiny.tokenizer, "a red circle grows") + tiny.tokenizer.eos_token))
    assert whole[: len(given)] == given and whole[-1] in ends_of(tiny.network, tiny.tokenizer)


def test_the_tokenizer_reads_every_text_to_the_letter(tiny: Expander) -> None:
    for text in ("a red circle", "مرحبا 猫 🎬 ", "x\ty", "Ünïcode"):
        assert tiny.tokenizer.decode(tiny.tokenizer(text)["input_ids"]) == text
    assert len(tiny.tokenizer) <= 300 and sum(p.numel() for p in tiny.network.parameters()) < 50_000


# What comes out


def test_a_caption_depends_on_prompt_and_seed_and_on_nothing_else(tiny: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("base_model.prompts.expand.finished", lambda prompt, written, whole: Expanded(prompt, written, ""))  # untrained, it never ends
    torch.manual_seed(5)
    before = torch.get_rng_state()
    alone = tiny(["a red circle"], seed=3)
    torch.manual_seed(6)
    together = tiny(["blue bar", "a red circle"], seed=3)
    assert together[1] == alone[0]
    assert len({tiny(["a red circle"], seed=seed)[0].text for seed in range(6)}) > 3
    torch.manual_seed(5)
    tiny(["a red circle"], seed=3)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's numbers are drawn"


def test_no_more_tokens_are_written_than_asked_for_and_greedy_needs_no_seed(tiny: Expander, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    generate = tiny.network.generate

    def noted(**given: object) -> torch.Tensor:
        made: torch.Tensor = generate(**given)
        lengths.append(made.shape[1] - given["input_ids"].shape[1])  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(tiny.network, "generate", noted)
    tiny(["a red circle", "blue bar"], seed=0)
    assert lengths and max(lengths) <= 12
    greedy = Expander(tiny.network, tiny.tokenizer, Style(most_tokens=12, temperature=0.0))
    assert greedy(["blue bar"], seed=0) == greedy(["blue bar"], seed=1)


def test_a_prompt_that_does_not_fit_or_is_empty_is_kept(tiny: Expander) -> None:
    long = "circle " * 300
    assert [each.note for each in tiny([long, " "], seed=0)] == ["the prompt is longer than the expander reads", "the prompt is empty"]
    assert tiny([long], seed=0)[0].text == long


# On disk


def test_an_expander_is_kept_as_safetensors_and_json_and_comes_back_the_same(tiny: Expander, tmp_path: Path) -> None:
    save_expander(tmp_path, tiny, {"about": {"seed": 0}})
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    again = load_expander(tmp_path, device=CPU)
    assert again.style == tiny.style and again(["a red circle", "x"], seed=1) == tiny(["a red circle", "x"], seed=1)
    assert json.loads((tmp_path / CARD).read_text())["about"] == {"seed": 0}


def test_a_folder_that_is_no_expander_is_refused_in_one_line(tiny: Expander, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    save_expander(folder, tiny, {})
    with pytest.raises(UserError, match="no such folder"):
        load_expander(tmp_path / "none", device=CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load the language model"):
        load_expander(tmp_path / "empty", device=CPU)

    def broken(name: str, change: dict[str, object]) -> Path:
        copy = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        (copy / name).write_text(json.dumps({**json.loads((copy / name).read_text()), **change}))
        return copy

    for change in ({"most_tokens": 0}, {"temperature": -1}, {"instruction": 3}, {"most_tokens": "many"}):
        with pytest.raises(UserError, match="the card of the expander says"):
            load_expander(broken(CARD, change), device=CPU)
    with pytest.raises(UserError, match="auto_map"):
        load_expander(broken("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.py"}}), device=CPU)


def test_no_pickle_of_weights_is_opened(tiny: Expander, tmp_path: Path) -> None:
    class Sing:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "canary",)  # type: ignore[return-value]

    for name in ("pytorch_model.bin", "model.safetensors", "model.pth"):
        folder = tmp_path / name
        save_expander(folder, tiny, {})
        (folder / "model.safetensors").unlink()
        torch.save({"weight": Sing()}, folder / name)
        with pytest.raises(UserError, match="cannot load the language model"):
            load_expander(folder, device=CPU)
        assert not (tmp_path / "canary").exists()
