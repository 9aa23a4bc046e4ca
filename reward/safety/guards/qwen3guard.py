"""Qwen3Guard-Gen as a prompt filter: three tiers, scored by the probabilities of its three words (Zhao et al. 2025, arXiv 2510.14276; Apache-2.0).

    prompt -> chat template -> "Safety: Safe" | "Safety: Controversial" | "Safety: Unsafe" -> allow | review | the policy's action
    not safe -> "Categories: ..." in its own words -> policies

The chat template ends where the answer begins. The three answers are read beside each other, a word's log-probability summed over its tokens; score = 1 - P(Safe) among them. Where
they hold less than half of the probability the model is no such guard, or the template another one, and that is an error, as is a category that is not in the list. Special tokens
are read in the template alone: a prompt cannot end its own turn and answer for the model. Scores are the model's own probabilities, calibrated on nobody's prompts here.

Checked against the project's README (QwenLM/Qwen3Guard) and transformers 5.23's source: chat template without a generation prompt, the two lines of the answer, spelling of labels
and categories. Nothing ran on real weights. Qwen3Guard-Stream is another thing, and its code is not in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.prompts.vision import PROMPT, encode
from reward.encoders import checkpoint_folder, load_network, revision_of
from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.guards.loading import version_of
from reward.safety.policy import Policy

LABELS = ("Safe", "Controversial", "Unsafe")
CATEGORIES: dict[str, tuple[str, ...]] = {
    "Violent": ("P05",),
    "Non-violent Illegal Acts": ("P11",),
    "Sexual Content or Sexual Acts": ("P01",),
    "PII": ("P13",),
    "Suicide & Self-Harm": ("P07",),
    "Unethical Acts": ("P08", "P09"),
    "Politically Sensitive Topics": ("P12",),
    "Copyright Violation": ("P14",),
    "Jailbreak": (),
    "None": (),
}
"""The policies that a category is a violation of. Jailbreak is none of ours: a prompt that is nothing else is for people, under every policy."""
FILES = ("*.json", "*.txt", "*.jinja", "*.safetensors")
LONGEST = 64
"""Tokens of the line of categories."""
LEAST_MASS = 0.5


class Qwen3Guard:
    """A `PromptFilter`. Raises ValueError, and so becomes an error of the runner, for logits that are not finite and for answers outside its three words. A prompt longer than what
    the model was made to read is an error of that prompt."""

    id, threshold = "qwen3guard", 0.5
    policies = tuple(sorted({code for codes in CATEGORIES.values() for code in codes}))

    def __init__(self, source: str, policy: Policy) -> None:
        """source: a folder or a hub id. Raises UserError where it is no whole Qwen3 checkpoint in safetensors with a chat template."""
        import transformers

        folder, self.source = checkpoint_folder(source, "guard", FILES)
        self.network: Any = load_network(transformers.Qwen3ForCausalLM, folder, "guard").eval().requires_grad_(False)
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            self._chat = str(self.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot load the guard's tokenizer and chat template, {folder}: {str(error).partition(chr(10))[0]}. Download it again") from error
        told = "\n".join(f"Safety: {label}" for label in LABELS)
        if self.tokenizer.decode(self._ids(told)) != told:  # without its files the library makes one that knows no word, and says nothing
            raise UserError(f"the guard's tokenizer does not know the words of its answers, {folder}. Download it again")
        if self._chat.count(PROMPT) != 1:
            raise UserError(f"the guard's chat template shows a prompt {self._chat.count(PROMPT)} times, where once is needed, {folder}. Download it again")
        unknown = [code for code in self.policies if code not in policy]
        if unknown:
            raise UserError(f"the guard rules on {unknown[0]}, which the policy does not have, {folder}. Give the shipped policy or one with its codes")
        self.version = version_of(revision_of(folder, FILES), sorted(CATEGORIES.items()))
        self._hits = {code: VERDICT_OF[policy.action(code)] for code in self.policies}

    @torch.no_grad()
    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        """One ruling a prompt and policy."""
        return [self._check(prompt) for prompt in prompts]

    def _check(self, prompt: str) -> list[Ruling]:
        begin = encode(self.tokenizer, self._chat, prompt)
        most = self.network.config.max_position_embeddings - 2 * LONGEST  # the rest is for its answer
        if len(begin) > most:
            return self._errors(f"a prompt of {len(begin)} tokens is longer than the {most} that it reads")
        _, controversial, unsafe = self.label_probabilities(begin)
        score = controversial + unsafe
        if score < self.threshold:
            return [Ruling(Verdict.ALLOW, code, score, (), self.id, self.version, self.threshold) for code in self.policies]
        tier = "Unsafe" if unsafe >= controversial else "Controversial"
        line = self.categories(begin, tier)
        named = [name.strip() for name in line.split(",")]
        strange = [name for name in named if name not in CATEGORIES]
        if strange:
            return self._errors(f"it named no category of its list but {strange[0][:40]!r}")
        codes = {code for name in named for code in CATEGORIES[name]}
        return [self._rule(code, tier, score, ", ".join(named), codes) for code in self.policies]

    def _errors(self, text: str) -> list[Ruling]:
        return [Ruling(Verdict.ERROR, code, float("nan"), (Reason(f"{self.id}: {text}"),), self.id, self.version, self.threshold) for code in self.policies]

    def _rule(self, code: str, tier: str, score: float, named: str, codes: set[str]) -> Ruling:
        """What was named gets the tier; where nothing of ours was, everything is for people."""
        if codes and code not in codes:
            return Ruling(Verdict.ALLOW, code, 0.0, (), self.id, self.version, self.threshold)
        hit = self._hits[code] if codes else Verdict.REVIEW
        verdict = hit if tier == "Unsafe" else min(hit, Verdict.REVIEW)
        return Ruling(verdict, code, score, (Reason(f"{tier}: {named}, {score:.3f}"),), self.id, self.version, self.threshold)

    def label_probabilities(self, begin: Sequence[int]) -> tuple[float, float, float]:
        """Of Safe, Controversial and Unsafe after the tokens of a prompt, among the three."""
        lead = self._ids("Safety:")
        ends = [self._ids(f"Safety: {label}")[len(lead) :] for label in LABELS]
        if any(self._ids(f"Safety: {label}")[: len(lead)] != lead or not end for label, end in zip(LABELS, ends, strict=True)):
            raise ValueError("the tokenizer joins 'Safety:' with what follows it")
        log_p = torch.stack([self._log_probability([*begin, *lead], end) for end in ends])  # [3]
        if not bool(torch.isfinite(log_p).all()):
            raise ValueError("the guard's logits are not finite")
        mass = float(log_p.exp().sum())
        if mass < LEAST_MASS:
            raise ValueError(f"the guard answers with another word than its three with probability {1 - mass:.2f}")
        safe, controversial, unsafe = log_p.softmax(0).tolist()
        return safe, controversial, unsafe

    def _log_probability(self, begin: Sequence[int], end: Sequence[int]) -> Tensor:
        """ln P(end | begin), []."""
        logits = self.network(torch.tensor([[*begin, *end]])).logits[0, len(begin) - 1 : -1].double()  # [n,V]
        return logits.log_softmax(-1).gather(1, torch.tensor(list(end))[:, None]).sum()

    def categories(self, begin: Sequence[int], label: str) -> str:
        """The rest of the line "Categories:" by greedy decoding, empty where it does not end."""
        ids = torch.tensor([[*begin, *self._ids(f"Safety: {label}\nCategories:")]])
        out = self.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False, pad_token_id=self.tokenizer.pad_token_id)
        new = out[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        ended = "\n" in text or len(new) < LONGEST or new[-1] == self.tokenizer.eos_token_id
        return str(text).partition("\n")[0].strip() if ended else ""

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
