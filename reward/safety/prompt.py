"""A prompt filter of word lists in many languages, read through the disguises people use.

The prompt is read in several ways (`reading.py`); in each, a letter of a listed word may be a digit or a sign that looks like it (`s7r0b3`), or be masked (`str*be`),
as long as two characters in five are letters. A word found in any reading is a hit, and the ruling shows where in the prompt it stands.
What it cannot do: understand. A softer wording ("lights going on and off") passes; the clip filters have to see what comes of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.policy import Policy
from reward.safety.reading import LEADS, Reading, fold, readings, spelled_out
from reward.safety.words import digest, languages, word_list

LONGEST_PROMPT = 2_000  # characters that are read
LETTERS_AT_LEAST = 0.4  # of the characters of a hit
SIGNS = {"a": "4@^", "b": "86", "c": "(<{¢©", "e": "3€", "g": "69", "h": "#", "i": "1!|l", "l": "1!|i£", "o": "0", "s": "5$§z", "t": "7+", "x": "×", "y": "¥", "z": "2s"}
MASKS = "*#"
VOWEL_MASKS = ".?_~@%-"
SPACELESS = ("Han", "Kana", "Khmer", "Lao", "Myanmar", "Thai")  # scripts in which words do not end at spaces

NEVER = r"(?!)"

Span = tuple[int, int]


class Listed(NamedTuple):
    """Patterns of the words of one policy: those that stand by themselves, and those of scripts without spaces."""

    whole: list[str]
    anywhere: list[str]


class WordFilter:
    """Rules on every policy that has words. The score is 1 for a hit and 0 for none; the verdict of a hit is the policy's action.

    languages: of the lists that come with it, by default all; the policy may add `words` and `allow_phrases` of its own in the same languages. Of a prompt longer
    than `LONGEST_PROMPT` only the beginning is read, and the verdict is at least "review". The version names the lists too.
    """

    id = "prompt-words"
    threshold = 0.5

    def __init__(self, policy: Policy, languages: Sequence[str] = languages()) -> None:
        self._policy = policy
        self.version = f"3+{digest(languages)}"
        self._listed = {rule.code: listed for rule in policy.rules if any(listed := _listed(policy, rule.code, languages))}
        harmless = [phrase for language in languages for phrase in (*word_list(language).harmless, *policy.allow_phrases.get(language, ()))]
        self._harmless = re.compile(_bounded(r"[ \t]+".join(map(re.escape, form.split())) for phrase in harmless for form in _forms(phrase)) or NEVER)
        self._any = re.compile("|".join(map(_in_text, self._listed.values())) or NEVER)
        self._any_spelled = re.compile("|".join(map(_in_run, self._listed.values())) or NEVER)
        self.policies = tuple(self._listed)

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        """One ruling a policy for each prompt; the reasons are the words found and where they stand."""
        return [self._check(prompt) for prompt in prompts]

    def _check(self, prompt: str) -> list[Ruling]:
        read = prompt[:LONGEST_PROMPT]
        found: dict[str, set[Span]] = {code: set() for code in self._listed}
        for reading in readings(read):
            calm = self._harmless.sub(lambda phrase: " " * len(phrase.group()), reading.text)
            self._find(Reading(calm, reading.origin), self._any, _in_text, found)
        for run in spelled_out(read):
            self._find(run, self._any_spelled, _in_run, found)
        return [self._rule(code, prompt, _merged(spans)) for code, spans in found.items()]

    def _find(self, reading: Reading, any_word: re.Pattern[str], pattern: Callable[[Listed], str], found: dict[str, set[Span]]) -> None:
        """Adds the places of the words of each policy. Patterns of single policies are compiled where they are needed first."""
        if not any_word.search(reading.text):
            return
        for code, listed in self._listed.items():
            hits = re.finditer(pattern(listed), reading.text)
            found[code] |= {(reading.origin[hit.start()], reading.origin[hit.end() - 1] + 1) for hit in hits if _mostly_letters(hit.group())}

    def _rule(self, code: str, prompt: str, spans: list[Span]) -> Ruling:
        verdict = VERDICT_OF[self._policy.action(code)] if spans else Verdict.ALLOW
        reasons = [Reason(f"the prompt says {prompt[start:end]!r}", span=(start, end)) for start, end in spans]
        if len(prompt) > LONGEST_PROMPT:
            verdict = max(verdict, Verdict.REVIEW)
            reasons.append(Reason(f"the prompt goes on for {len(prompt) - LONGEST_PROMPT} characters after the {LONGEST_PROMPT} that are read", span=(LONGEST_PROMPT, len(prompt))))
        return Ruling(verdict, code, float(bool(spans)), tuple(reasons), self.id, self.version, self.threshold)


def _listed(policy: Policy, code: str, languages: Sequence[str]) -> Listed:
    """Everything listed for one code."""
    listed = Listed([], [])
    for language in languages:
        words = (*word_list(language).words.get(code, ()), *policy.rule(code).words.get(language, ()))
        choices = listed.anywhere if word_list(language).script in SPACELESS else listed.whole
        choices += [_as_pattern(form) for word in words for form in _forms(word)]
    return Listed(*(list(dict.fromkeys(choices)) for choices in listed))


def _in_text(listed: Listed) -> str:
    return "|".join(filter(None, [_bounded(listed.whole), *listed.anywhere]))


def _in_run(listed: Listed) -> str:
    return "|".join([*listed.whole, *listed.anywhere])


def _forms(word: str) -> list[str]:
    """A word as `readings` shows it: as written, and with its look-alikes as Latin letters, which differ for small letters and capitals."""
    forms = [fold(word), fold(word, look_alikes=True), fold(word.upper(), look_alikes=True)]
    return list(dict.fromkeys(form.text.translate(LEADS) for form in forms))


def _as_pattern(form: str) -> str:
    """`*` at an end of a word stands for any ending, a space for up to four characters that are none of a word."""
    return r"[\W_]{0,4}".join("".join(r"[^\W_]*+" if c == "*" else _one_of(c, first=i == 0) for i, c in enumerate(part)) for part in form.split())


def _one_of(letter: str, *, first: bool) -> str:
    if first or not letter.isalpha():
        return f"[{re.escape(letter + SIGNS.get(letter, ''))}]"
    return f"[{re.escape(letter + SIGNS.get(letter, '') + MASKS + (VOWEL_MASKS if letter in 'aeiou' else ''))}]"


def _bounded(patterns: Iterable[str]) -> str:
    choices = "|".join(dict.fromkeys(patterns))
    return rf"(?<![^\W_])(?:{choices})(?![^\W_])" if choices else ""


def _mostly_letters(hit: str) -> bool:
    return sum(map(str.isalpha, hit)) >= LETTERS_AT_LEAST * len(hit)


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Spans that overlap, the same word in two readings, become one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
