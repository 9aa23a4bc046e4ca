"""The different ways to read a prompt that hides its words, each with the place in the prompt that every character comes from.

    prompt -> fold: as written, and with look-alikes as Latin letters -> stretched, s p a c e d, hy-phen-ed and |_| - built letters put together -> readings

Every step looks at one character, or at a few neighbours, so the time is linear in the length of the prompt whatever is in it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

CONFUSABLES = Path(__file__).with_name("confusables.txt")
BY_SHAPE = {
    "вунмткргзчьъпияшдцжэф": "byhmtkpr34bbnurwauxeo",
    "ВУНМТКРГЗЧЬЪПИЯШДЦЖЭФ": "byhmtkpr34bbnnrwauxeo",
    "βγδεηικνπρστυχωλθξζμ": "bydenikvnpotuxwa0ezu",
    "եցհոսօգզաɛԻ": "eghnuoqqwer",
}  # Cyrillic, Greek and Armenian that Unicode's list has under another sign, or not at all, since it asks for more likeness than a reader does
LATIN_NAME = re.compile(r"(?:LATIN|REGIONAL INDICATOR).* LETTER (?:[A-Z]{2,} )*([A-Z])(?: WITH .+)?")
NO_LETTERS = frozenset("\u115f\u1160\u17b4\u17b5")  # letters without a shape
ABSENT = frozenset("ـ")  # the stroke that lengthens an Arabic word
VARIANTS = str.maketrans("ىیېةکڪگھہۀךםןףץ", "يييهككگههه" + "כמנפצ")  # letters of Arabic and Hebrew that stand for each other
SPELLED = 0x20000  # marks that spell (vowel signs of India, tones of Thai, voiced kana) go to a plane of letters, so that every pattern takes them for such
FINALS = "ᆨᆩᆫᆮᆯᆷᆸᆺᆻᆼᆽᆾᆿᇀᇁᇂ"
LEADS = str.maketrans(FINALS, "ᄀᄁᄂᄃᄅᄆᄇᄉᄊᄋᄌᄎᄏᄐᄑᄒ")
FINAL_PAIRS = str.maketrans(dict(zip("ᆪᆬᆭᆰᆱᆲᆳᆴᆵᆶᆹ", ("ᆨᆺ", "ᆫᆽ", "ᆫᇂ", "ᆯᆨ", "ᆯᆷ", "ᆯᆸ", "ᆯᆺ", "ᆯᇀ", "ᆯᇁ", "ᆯᇂ", "ᆸᆺ"), strict=True)))
TO_HIRAGANA = {code: code - 0x60 for code in range(0x30A1, 0x30F7)}

BUILT = {"\\/\\/": "w", "|\\/|": "m", "|\\|": "n", "|-|": "h", "|_|": "u", "/\\": "a", "\\/": "v", "()": "o", "[]": "o", "|)": "d", "|>": "p", "|<": "k", "|3": "b"}
BUILT |= {"vv": "w", "ph": "f"}
BUILT_SIGN = re.compile("|".join(map(re.escape, BUILT)))
MARKS = r"\u1161-\u11ff\U00020300-\U00024fff"  # what is one letter with the letter before it
UNIT = rf"(?:[^\W_]|[$@€£!|+])[{MARKS}]*"
SPACED = re.compile(rf"(?<![^\W_]){UNIT}(?:[\W_]{{1,3}}{UNIT}(?![^\W_]))+")
SPACES = re.compile(r"[^\w$@€£!|+]+|_+")
INNER_SIGN = re.compile(r"(?<=[^\W_])(?:[^\w\s]|_){1,2}(?=[^\W_])")
STRETCHED = re.compile(rf"([^\W\d_][{MARKS}]*)\1{{2,}}")
REPEATED = re.compile(rf"([^\W\d_][{MARKS}]*)\1+")
DOUBLED = re.compile(rf"(?:([^\W\d_][{MARKS}]*)\1+){{2,}}")
SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020300-\U00024fff"  # Thai, Lao, Burmese, Khmer, kana, Han and their marks
GAP = re.compile(rf"(?<=[{SPACELESS}])[\W_]{{1,3}}(?=[{SPACELESS}])")


class Reading(NamedTuple):
    """text: what is read. origin: where in the prompt each of its characters stands."""

    text: str
    origin: tuple[int, ...]


def fold(text: str, *, look_alikes: bool = False) -> Reading:
    """Text without disguise at the level of characters: compatibility forms, lower case, nothing invisible, no accents; look-alikes as Latin letters if asked."""
    out: list[str] = []
    origin: list[int] = []
    base = 0
    for i, c in enumerate(text):
        for each in _letters(c, look_alikes):
            code = ord(each)
            if _spells(code):
                if code >> 8 != base >> 8:
                    continue
                each = chr(SPELLED + code)
            else:
                base = code
            out.append(each)
            origin.append(i)
    return Reading("".join(out), tuple(origin))


def readings(text: str) -> list[Reading]:
    """The different ways to read a prompt, as it is written first, without repeats."""
    return [Reading(each.text.translate(LEADS), each.origin) for each in _distinct(_with_joined_words(_without_stretching(_folded(text))))]


def spelled_out(text: str) -> list[Reading]:
    """The runs of letters that stand alone, put together. Where in a run a word begins and ends cannot be seen."""
    runs = [(each, run) for each in _distinct(_folded(text)) for run in SPACED.finditer(each.text)]
    joined = [_cut(Reading(run.group(), each.origin[run.start() : run.end()]), (gap.span() for gap in SPACES.finditer(run.group()))) for each, run in runs]
    return [Reading(each.text.translate(LEADS), each.origin) for each in joined]


def _folded(text: str) -> list[Reading]:
    found = [fold(text), fold(text, look_alikes=True)]
    return found + [_built(each) for each in found]


def _without_stretching(found: list[Reading]) -> list[Reading]:
    distinct = _distinct(found)
    return found + [_cut(each, _repeats(each, keep)) for each in distinct for keep in (1, 2)] + [_cut(each, _doubles(each)) for each in distinct]


def _with_joined_words(found: list[Reading]) -> list[Reading]:
    return found + [_cut(each, (match.span() for match in pattern.finditer(each.text))) for each in _distinct(found) for pattern in (INNER_SIGN, GAP)]


@lru_cache(1 << 14)
def _letters(c: str, look_alikes: bool) -> str:
    """One character of a prompt -> the characters it stands for, none if it has no shape of its own."""
    if c.isascii():
        return c.lower() if c.isprintable() or c in "\n\t" else ""
    forms = unicodedata.normalize("NFKC", c)
    if look_alikes:
        forms = _latin(c) or "".join(_confusables().get(each) or _latin(each) or each for each in forms)
    parts = unicodedata.normalize("NFKD", forms.casefold()).translate(TO_HIRAGANA).translate(VARIANTS).translate(FINAL_PAIRS)
    return "".join(_digit(each) for each in parts if _has_shape(each))


def _has_shape(c: str) -> bool:
    category = unicodedata.category(c)
    if c in NO_LETTERS or c in ABSENT or category[0] == "C":
        return c in "\n\t"
    return category[0] != "M" or _spells(ord(c))


@cache
def _spells(code: int) -> bool:
    """Whether a mark makes another word, as vowel signs do, and not only another look."""
    if not (0x900 <= code < 0x10A0 or 0x1780 <= code < 0x1800 or code in (0x3099, 0x309A)):
        return False
    return unicodedata.category(chr(code))[0] == "M" and "NUKTA" not in unicodedata.name(chr(code), "")


def _digit(c: str) -> str:
    return str(unicodedata.decimal(c)) if unicodedata.category(c) == "Nd" else c


@cache
def _confusables() -> dict[str, str]:
    rows = [line.split() for line in CONFUSABLES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    table = {c: letter.lower() for letter, alike in rows for c in alike}
    return table | {c: letter for alike, letters in BY_SHAPE.items() for c, letter in zip(alike, letters, strict=True)}


def _latin(c: str) -> str:
    """The letter that a character is named after (`LATIN SMALL LETTER O WITH STROKE`, `TAG LATIN SMALL LETTER O`), or nothing."""
    named = LATIN_NAME.search(unicodedata.name(c, ""))
    return named[1].lower() if named else ""


def _built(reading: Reading) -> Reading:
    """With letters built of several signs as letters."""
    text: list[str] = []
    origin: list[int] = []
    end = 0
    for match in BUILT_SIGN.finditer(reading.text):
        text += [reading.text[end : match.start()], BUILT[match.group()]]
        origin += [*reading.origin[end : match.start()], reading.origin[match.start()]]
        end = match.end()
    return Reading("".join([*text, reading.text[end:]]), (*origin, *reading.origin[end:]))


def _repeats(reading: Reading, keep: int) -> Iterable[tuple[int, int]]:
    """What of a letter that stands three times or more goes beyond the first `keep`."""
    return ((match.start() + keep * len(match[1]), match.end()) for match in STRETCHED.finditer(reading.text))


def _doubles(reading: Reading) -> Iterable[tuple[int, int]]:
    """Of letters that stand twice or more beside others that do, what goes beyond the first."""
    words = (word.span() for word in DOUBLED.finditer(reading.text))
    return ((match.start() + len(match[1]), match.end()) for word in words for match in REPEATED.finditer(reading.text, *word))


def _cut(reading: Reading, spans: Iterable[tuple[int, int]]) -> Reading:
    text: list[str] = []
    origin: list[int] = []
    end = 0
    for start, stop in spans:
        text.append(reading.text[end:start])
        origin += reading.origin[end:start]
        end = stop
    return Reading("".join([*text, reading.text[end:]]), (*origin, *reading.origin[end:]))


def _distinct(found: Iterable[Reading]) -> list[Reading]:
    return list({each.text: each for each in reversed(list(found))}.values())[::-1]
