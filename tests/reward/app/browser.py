"""Pages of people who have logged in, as the rooms' tests open them."""

from __future__ import annotations

from typing import Any

from tests.reward.app.conftest import PASSWORD

PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


def opened(browser: Any, address: str, login: str, **options: Any) -> Any:
    """A page of somebody who has logged in; what goes wrong in it is in `page.problems`."""
    context = browser.new_context(**{"viewport": DESKTOP, "base_url": address, **options})
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.goto("/login")
    page.fill("[name=login]", login)
    page.fill("[name=password]", PASSWORD)
    page.press("[name=password]", "Enter")
    page.wait_for_url(f"{address}/")
    return page
