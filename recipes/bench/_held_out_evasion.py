"""Other ways to hide a word: written when the filter was finished, run once, and never used to change it. Do not mend the filter by this file: new ways go into `_evasion.py`."""

from __future__ import annotations

import random
import unicodedata

from recipes.bench._evasion import Transformation, clusters


def _bidi(word: str, rng: random.Random) -> str:
    return "\u202d" + "".join(c + rng.choice(("\u00ad", "\u2066\u2069", "\u200e", "")) for c in word) + "\u202c"


def _joiners_and_selectors(word: str, rng: random.Random) -> str:
    return "".join(c + rng.choice(("\ufe0e", "\U000e0101", "\u034f", "\u180b")) for c in clusters(word))


def _tags(word: str, rng: random.Random) -> str:
    """Invisible tag letters strewn in."""
    return "".join(c + chr(0xE0061 + rng.randrange(26)) for c in clusters(word))


def _foreign_marks(word: str, rng: random.Random) -> str:
    return "".join(c + rng.choice("\u20d7\u0337\u1dc4\u0e4d\u0ec8\u0a51\u20dd") if unicodedata.category(c) in ("Lu", "Ll") else c + "\u20dd" for c in word)


def _brackets(word: str, rng: random.Random) -> str:
    left, right = rng.choice(("[]", "()", "{}", "⟨⟩"))
    return "".join(f"{left}{c}{right}" for c in clusters(word.replace(" ", "")))


def _slashes(word: str, rng: random.Random) -> str:
    return rng.choice((" / ", "/", " | ", "\\")).join(clusters(word.replace(" ", "")))


def _emoji_between(word: str, rng: random.Random) -> str:
    return rng.choice("🔥✨❤🎬").join(clusters(word.replace(" ", "")))


def _emoji_inside(word: str, rng: random.Random) -> str:
    parts = clusters(word)
    inside = [i for i in range(1, len(parts)) if " " not in parts[i - 1 : i + 1]]
    cut = rng.choice(inside) if inside else len(parts)
    return "".join(parts[:cut]) + "🎥" + "".join(parts[cut:])


def _lines(word: str, rng: random.Random) -> str:
    return rng.choice(("\n", "\t", "  ", "\u2003")).join(clusters(word.replace(" ", "")))


def _syllables(word: str, rng: random.Random) -> str:
    parts = clusters(word)
    if " " in parts or len(parts) < 4:
        return word
    return rng.choice("_'~+,").join("".join(parts[i : i + 2]) for i in range(0, len(parts), 2))


def _masked(word: str, rng: random.Random) -> str:
    parts = clusters(word)
    if len(parts) < 4:
        return word
    at = rng.choice([i for i in range(1, len(parts)) if parts[i] != " "])
    return "".join([*parts[:at], rng.choice("*#"), *parts[at + 1 :]])


def _sung(word: str, rng: random.Random) -> str:
    """The last letter held, and the first."""
    parts = clusters(word)
    return parts[0] * 3 + "".join(parts[1:]) + parts[-1] * 6


CHEROKEE_AND_OTHERS = dict(zip("abcdeghiklmnoprstuvwz", "ᎪᏴᏟᎠᎬᏀᎻᎥᏦᏞᎷոଠᏢᖇᏚᎢ𑣘ᏙᏔᏃ", strict=True))
SQUARED = {chr(ord("a") + i): chr(0x1F170 + i) for i in range(26)}
FLAGS = {chr(ord("a") + i): chr(0x1F1E6 + i) for i in range(26)}
SUPERSCRIPT = dict(zip("abcdefghijklmnoprstuvwxyz", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", strict=True))
CROSSED = {"a": "ⱥ", "b": "ƀ", "c": "ȼ", "d": "đ", "e": "ɇ", "i": "ɨ", "l": "ł", "o": "ø", "r": "ɍ", "t": "ŧ", "u": "ʉ", "s": "ş", "n": "ƞ"}
FAUX_CYRILLIC = {"a": "д", "b": "ь", "e": "э", "n": "и", "r": "я", "o": "ф", "w": "ш", "u": "ц", "x": "ж"}
ROUGH_SIGNS = {"o": "()", "u": "|_|", "n": "|\\|", "d": "|)", "a": "/\\", "h": "|-|", "e": "€", "s": "$", "i": "!", "l": "|", "t": "+"}


def _letters(table: dict[str, str]) -> Transformation:
    return lambda word, rng: "".join(table.get(c, c) for c in word)


def _some_rough_signs(word: str, rng: random.Random) -> str:
    return "".join(ROUGH_SIGNS[c] if c in ROUGH_SIGNS and rng.random() < 0.4 else c for c in word)


def _jamo(word: str, rng: random.Random) -> str:
    """Hangul syllables as the letters they are written with, as typed one by one."""
    compatible = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0x3131, 0x3164)}
    finals = dict(zip("ᆨᆫᆮᆯᆷᆸᆺᆼᆽᆾᆿᇀᇁᇂ", "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊㅋㅌㅍㅎ", strict=True))
    return "".join(compatible.get(c, finals.get(c, c)) for c in unicodedata.normalize("NFD", word)) if any("가" <= c <= "힣" for c in word) else word


def _other_kana(word: str, rng: random.Random) -> str:
    return "".join(chr(ord(c) - 0x60) if "ァ" <= c <= "ヶ" else c for c in word)


def _vocalised(word: str, rng: random.Random) -> str:
    """Arabic with tatweel and vowel signs, Hebrew with points."""
    arabic = "".join(c + rng.choice(("\u064e", "\u0650", "ـ")) if "\u0620" <= c <= "\u06d3" else c for c in word)
    return "".join(c + rng.choice("\u05b7\u05b4\u05bc") if "א" <= c <= "ת" else c for c in arabic)


HELD_OUT: dict[str, Transformation] = {
    "bidi": _bidi, "joiners and selectors": _joiners_and_selectors, "tags": _tags, "foreign marks": _foreign_marks, "brackets": _brackets, "slashes": _slashes,
    "emoji between": _emoji_between, "emoji inside": _emoji_inside, "lines": _lines, "syllables": _syllables, "masked": _masked, "sung": _sung,
    "Cherokee and others": _letters(CHEROKEE_AND_OTHERS), "squared": _letters(SQUARED), "flags": _letters(FLAGS), "superscript": _letters(SUPERSCRIPT),
    "crossed": _letters(CROSSED), "faux Cyrillic": _letters(FAUX_CYRILLIC), "rough signs": _some_rough_signs, "jamo": _jamo, "other kana": _other_kana, "vocalised": _vocalised,
}  # fmt: skip
