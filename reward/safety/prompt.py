"""A prompt filter of word lists, read through the disguises people use.

The text is folded (compatibility forms, case, invisible and combining characters, look-alike letters of other scripts) and then read in several ways: as it
stands, with digits and signs as letters, with stretched letters pulled together, with s p a c e d and hy-phen-ed letters joined. A word found in any reading is a hit.
What it cannot do: understand. A softer wording ("lights going on and off") passes; the clip filters have to see what comes of it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.policy import Policy

CAPITALS = str.maketrans("АВЕЅІЈКМНОРСТУХЗԌԚԜ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹͿ", "ABESIJKMHOPCTYX3GQW" + "ABEZHIKMNOPTYXCJ")  # Cyrillic, Greek
LOOK_ALIKES = {
    "авеԁһіјкӏмнорсԛѕтухѵԝгзъьԍ": "abedhijklmhopcqstyxvwr3bbg",  # Cyrillic
    "αβγδεηικνοπρστυχωϲϳ": "abydenikvonpotuxwcj",  # Greek
    "աեցհոսօգզ": "uegsnuoqq",  # Armenian
    "ıȷɑɡɩɪʀʏꜱᴀᴄᴅᴇᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢɛɔøłđħŧ": "ijagiirysacdejkmoptuvwzeooldht",  # Latin
}
CONFUSABLES = str.maketrans("".join(LOOK_ALIKES), "".join(LOOK_ALIKES.values()))
LEET = str.maketrans({"0": "o", "3": "e", "4": "a", "5": "s", "6": "g", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "+": "t", "€": "e", "£": "l", "(": "c", "¢": "c"})
LEET_ONES = (str.maketrans("1!|", "iii"), str.maketrans("1!|", "lll"))
LEET_TOKEN = re.compile(r"(?<!\S)[^\sa-z]*+[a-z]\S*")
LONGEST_PROMPT = 2_000  # characters; the time to read a run of combining signs grows with its square
INNER_SIGN = re.compile(r"(?<=[^\W_])[-_.*·~'](?=[^\W_])")
SPACED = re.compile(r"(?<![^\W_])[^\W_](?:[\W_]{1,3}[^\W_](?![^\W_])){2,}")
STRETCHED = re.compile(r"([^\W\d_])\1{2,}")


def fold(text: str) -> str:
    """Text without disguise at the level of characters: compatibility forms, lower case, nothing invisible, no accents, look-alikes as Latin letters."""
    text = unicodedata.normalize("NFKC", text).translate(CAPITALS).casefold()
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in ("Cf", "Mn", "Me", "Cc") or c in "\n\t")
    return text.translate(CONFUSABLES)


def readings(text: str) -> list[str]:
    """The different ways to read a prompt, the plain one first, without repeats."""
    plain = fold(text)
    found = [plain]
    for ones in LEET_ONES:
        found.append(LEET_TOKEN.sub(lambda token, ones=ones: token.group().translate(LEET).translate(ones), plain))  # type: ignore[misc]
    for each in list(found):
        found += [STRETCHED.sub(r"\1", each), STRETCHED.sub(r"\1\1", each)]
    for each in list(found):
        found += [SPACED.sub(_join, each), SPACED.sub(_join, re.sub(r"\b[ai] ", " - ", each)), INNER_SIGN.sub("", each)]
    return list(dict.fromkeys(found))


def _join(run: re.Match[str]) -> str:
    return re.sub(r"[\W_]", "", run.group())


class WordFilter:
    """Rules on every policy that has words. The score is 1 for a hit and 0 for none; the verdict of a hit is the policy's action.

    Of a prompt longer than `LONGEST_PROMPT` only the beginning is read, and the verdict is at least "review".
    """

    id = "prompt-words"
    version = "2"
    threshold = 0.5

    def __init__(self, policy: Policy, languages: Sequence[str] = ("en",)) -> None:
        self._policy = policy
        self._words = {rule.code: _pattern(word for language in languages for word in rule.words.get(language, ())) for rule in policy.rules if rule.words}
        self._harmless = _pattern((phrase for language in languages for phrase in policy.allow_phrases.get(language, ())), gap=r"[ \t]+")
        self._any = re.compile("|".join(pattern.pattern for pattern in self._words.values()) or r"(?!)")
        self.policies = tuple(self._words)

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        """One ruling a policy for each prompt; the reasons are the words found."""
        return [self._check(prompt) for prompt in prompts]

    def _check(self, prompt: str) -> list[Ruling]:
        texts = [text for reading in readings(prompt[:LONGEST_PROMPT]) if self._any.search(text := self._harmless.sub(" ", reading))]
        unread = len(prompt) - LONGEST_PROMPT
        return [self._rule(code, sorted({hit.group() for text in texts for hit in pattern.finditer(text)}), unread) for code, pattern in self._words.items()]

    def _rule(self, code: str, hits: list[str], unread: int) -> Ruling:
        verdict = VERDICT_OF[self._policy.action(code)] if hits else Verdict.ALLOW
        reasons = [Reason(f"the prompt says {hit!r}") for hit in hits]
        if unread > 0:
            verdict = max(verdict, Verdict.REVIEW)
            reasons.append(Reason(f"the prompt goes on for {unread} characters after the {LONGEST_PROMPT} that are read"))
        return Ruling(verdict, code, float(bool(reasons)), tuple(reasons), self.id, self.version, self.threshold)


def _pattern(words: Iterable[str], gap: str = r"[\W_]+") -> re.Pattern[str]:
    """Matches any of the words and phrases as whole words; `*` at an end of a word stands for any ending, a space in a phrase for `gap`."""
    choices = [gap.join(re.escape(part).replace(r"\*", r"[^\W_]*") for part in fold(word).split()) for word in words]
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(choices)})(?![^\W_])" if choices else r"(?!)")
