"""Text that people send: what no database keeps is refused where it comes in, in every field of every request, so that nothing of it is stored, or answered with a 500."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Request
from pydantic import AfterValidator, Field

from reward.app.security import Denied

REFUSED = "a text holds no NUL and no half characters"


def keepable(text: str) -> bool:
    """Whether a database keeps a text: PostgreSQL has no NUL, and halves of characters are not UTF-8."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _checked(text: str) -> str:
    if not keepable(text):
        raise ValueError(REFUSED)
    return text


Written = Annotated[str, AfterValidator(_checked), Field(max_length=4_000)]
"""What a person wrote."""


async def check_body(request: Request) -> None:
    """Of a JSON body, names of fields included, whatever the route makes of it. Raises Denied, 422. What is no JSON is left to who reads it."""
    try:
        waiting: list[Any] = [await request.json()]
    except (ValueError, RecursionError):
        return
    while waiting:
        each = waiting.pop()
        if isinstance(each, str) and not keepable(each):
            raise Denied(422, REFUSED)
        if isinstance(each, Mapping):
            waiting += each
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
