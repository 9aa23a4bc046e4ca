"""The prompt of a mirrored clip."""

from __future__ import annotations

import re

_SIDES = {"left": "right", "leftward": "rightward", "leftwards": "rightwards", "leftmost": "rightmost", "clockwise": "counter-clockwise"}
_SWAPPED = _SIDES | {there: here for here, there in _SIDES.items()} | {"counterclockwise": "clockwise", "anticlockwise": "clockwise", "anti-clockwise": "clockwise"}
_WORDS = re.compile("|".join(rf"\b{word}\b" for word in sorted(_SWAPPED, key=len, reverse=True)), re.IGNORECASE)


def swap_sides(prompt: str) -> str:
    """The prompt of the mirrored clip: left and right, clockwise and counter-clockwise change places, in "top-left" and "left-hand" too; capitals stay."""

    def swapped(match: re.Match[str]) -> str:
        word = _SWAPPED[match[0].lower()]
        return word.upper() if match[0].isupper() else word.capitalize() if match[0][0].isupper() else word

    return _WORDS.sub(swapped, prompt)
