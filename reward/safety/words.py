"""The word lists of the prompt filter: one file a language in `words/`, its words under the codes of the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).with_name("words")


class WordList(BaseModel):
    """The words of one language."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: str = Field(min_length=1)
    script: str = Field(min_length=1)
    """As Unicode names it."""
    words: dict[str, tuple[str, ...]]
    """Policy code -> words and phrases; `*` at an end of a word stands for any ending."""
    harmless: tuple[str, ...] = ()
    """Phrases that hold a listed word and mean no harm; they are taken out before the words are looked for."""


def languages() -> tuple[str, ...]:
    """Every language with a list."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@cache
def word_list(language: str) -> WordList:
    """Raises ValueError for a language without a list."""
    if language not in languages():
        raise ValueError(f"no word list for language {language!r}; there are {', '.join(languages())}")
    return WordList.model_validate(yaml.safe_load((FOLDER / f"{language}.yaml").read_text(encoding="utf-8")))


def digest(chosen: Sequence[str]) -> str:
    """Eight hexadecimal digits that tell one set of lists from another."""
    return hashlib.sha256("".join(f"{language}{word_list(language).model_dump_json()}" for language in chosen).encode()).hexdigest()[:8]
