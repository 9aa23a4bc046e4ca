"""A short prompt -> a long caption, by a causal language model of transformers: people type a few words, video models were trained on dense captions.

A model with a chat template is told what to do in a system turn; one without reads `a red circle ->` and goes on. The same words go before the caption in training
(`recipes/expand.py`) and here, so both are this file's. A caption that was cut off at its length ends with its last whole sentence. Where nothing whole is left the prompt
is kept, and `Expanded.note` says why. What the caption means is not looked at here, nor whether it is safe.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from base_model.checkpoint import atomic_write, check_runs_no_code, read_json
from base_model.errors import UserError
from base_model.prompts.caption import whole_sentences

CARD = "expander.json"
LONGEST = 2_000
"""Characters of a caption; what is behind them no word filter reads."""
INSTRUCTION = (
    "Rewrite the user's prompt for a video generator as one dense caption in plain English: what is seen, how it looks, what it does, the place, the light and the camera. "
    "Keep everything the prompt says and contradict none of it. Answer with the caption alone."
)
PAD, END = "<|pad|>", "<|end|>"
_THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", flags=re.S)


@dataclass(frozen=True)
class Style:
    """What an expander is asked for; kept beside its weights."""

    instruction: str = INSTRUCTION  # read by models with a chat template
    most_tokens: int = 200  # of a caption, the model's own
    temperature: float = 1.0  # of sampling; 0 takes the likeliest token


class Expanded(NamedTuple):
    """What became of a prompt."""

    prompt: str
    text: str  # never empty where the prompt is not
    note: str  # why the prompt was kept as it is; empty where it was expanded


class TinySize(NamedTuple):
    """A language model that learns on a CPU: with these about a million parameters."""

    width: int = 128
    depth: int = 4
    heads: int = 4
    vocabulary: int = 1024
    context: int = 512  # tokens of prompt and caption together


@dataclass
class Expander:
    """A language model and its tokenizer. What it writes depends on the prompt and the seed, never on the other prompts: they are expanded one by one."""

    network: Any  # a causal LM of transformers
    tokenizer: Any
    style: Style

    def __call__(self, prompts: Sequence[str], *, seed: int) -> list[Expanded]:
        """One caption a prompt, in order."""
        return [self._expand(prompt, seed) for prompt in prompts]

    @torch.no_grad()
    def _expand(self, prompt: str, seed: int) -> Expanded:
        told = self.tokenizer(asked(self.tokenizer, prompt, self.style), return_tensors="pt").to(self.network.device)
        length, room = told["input_ids"].shape[1], getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if not prompt.strip() or (room is not None and length + self.style.most_tokens > room):
            return Expanded(prompt, prompt, "the prompt is longer than the expander reads" if prompt.strip() else "the prompt is empty")
        device = self.network.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_seed_of(seed, prompt))
            made = self.network.generate(**told, **self._sampling())[0, length:]
        return finished(prompt, self.tokenizer.decode(made, skip_special_tokens=True), whole=bool(len(made)) and int(made[-1]) in ends_of(self.network, self.tokenizer))

    def _sampling(self) -> dict[str, Any]:
        how: dict[str, Any] = {"do_sample": True, "temperature": self.style.temperature, "top_k": 0, "top_p": 1.0} if self.style.temperature else {"do_sample": False}
        return {**how, "max_new_tokens": self.style.most_tokens, "pad_token_id": self.tokenizer.pad_token_id}


def _seed_of(seed: int, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt}".encode(errors="surrogatepass")).digest()[:8], "big") >> 1


def asked(tokenizer: Any, prompt: str, style: Style) -> str:
    """The text that the caption follows, whose tokens are `tokenizer(text)`: a chat's system and user turns, or `prompt ->` for a tokenizer without a chat template."""
    short = " ".join(prompt.split())
    if not tokenizer.chat_template:
        return f"{short} ->"
    turns = [{"role": "system", "content": style.instruction}, {"role": "user", "content": short}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False))
    return text.removeprefix(tokenizer.bos_token or "")  # the tokenizer puts it there itself


def answered(tokenizer: Any, caption: str) -> str:
    """What is to follow `asked`, without the token that ends it: behind an arrow there is a space."""
    text = " ".join(caption.split())
    return text if tokenizer.chat_template else f" {text}"


def ends_of(network: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a caption."""
    known = network.generation_config.eos_token_id
    return frozenset([*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]) - {None}


def finished(prompt: str, written: str, *, whole: bool) -> Expanded:
    """What a language model wrote as a caption: one line of at most `LONGEST` characters in whole sentences, or else the prompt. whole: whether it came to an end by itself.

    Example: `finished("a cat", "A cat sleeps. It snores in a", whole=False).text` is "A cat sleeps.".
    """
    kept = "".join(c for c in _THOUGHTS.sub("", written) if (c.isprintable() or c.isspace()) and c != "\ufffd")
    text = " ".join(kept.split()).removeprefix("-> ")
    if not any(c.isalnum() for c in text):
        return Expanded(prompt, prompt, "the expander wrote nothing")
    if not whole or len(text) > LONGEST:
        text = whole_sentences(text[:LONGEST])
    return Expanded(prompt, text, "") if text else Expanded(prompt, prompt, "the expander came to no end of a sentence")


# On disk


def load_expander(folder: Path, *, device: torch.device) -> Expander:
    """The expander in a folder: of `rushes expand`, or any causal language model of transformers with its tokenizer. Weights are read from safetensors only.

    Raises UserError where there is none, or where the folder asks for code of its own to be run.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"no such folder of a language model, {folder}. Give one that `rushes expand` or transformers saved")
    check_runs_no_code(folder)
    style = _style_of(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network, found = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"cannot load the language model, {folder}: {reason}. Give a folder with a causal language model of transformers and its tokenizer") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"the weights of the language model lack {missing[0]}, {folder}. Download or make it again")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer has no token that ends a text, {folder}. Give the model's own tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Expander(network.to(device).eval(), tokenizer, style)


def _style_of(folder: Path) -> Style:
    if not (folder / CARD).exists():
        return Style()
    card = read_json(folder / CARD, "the card of the expander")
    told = {name: card[name] for name in (field.name for field in fields(Style)) if name in card}
    try:
        style = Style(**told)
        valid = isinstance(style.instruction, str) and isinstance(style.most_tokens, int) and style.most_tokens >= 1 and 0 <= style.temperature <= 100
    except TypeError:
        valid = False
    if not valid:
        raise UserError(f"the card of the expander says {told}, {folder / CARD}. Make it again with `rushes expand`")
    return style


def save_expander(folder: Path, expander: Expander, about: dict[str, Any]) -> None:
    """Network (safetensors), tokenizer and card, in a folder that `load_expander` and transformers read. about: what else the card says."""
    expander.network.save_pretrained(folder)
    expander.tokenizer.save_pretrained(folder)
    atomic_write(folder / CARD, (json.dumps({**asdict(expander.style), **about}, indent=2, sort_keys=True) + "\n").encode())


# A small one


def tiny_expander(texts: Sequence[str], size: TinySize, style: Style, *, seed: int) -> Expander:
    """A network of Qwen3's class with fresh weights, and a byte-level BPE tokenizer made of `texts`: nothing is downloaded, and every prompt can be read."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = bpe_tokenizer(texts, size.vocabulary)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.width // size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Qwen3ForCausalLM(config)
    return Expander(network.eval(), tokenizer, style)


def bpe_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A tokenizer of transformers with byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) learned from `texts`, of at most `vocabulary` tokens."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    inner: Any = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=max(vocabulary, 258), special_tokens=[PAD, END], initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=PAD, eos_token=END, padding_side="left", clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"]
    )
