"""The pages of an account in a real browser: what people can do there, and what other pages cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from axe_playwright_python.sync_playwright import Axe
from sqlalchemy import select

from reward.app import people
from reward.app.schema import session
from reward.app.store import Store
from tests.reward.app.conftest import PASSWORD, add_member, add_project, log_in, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = """<!doctype html><body><form id=f method=post enctype=text/plain action="{address}/api/account/sessions/end"><input name='{{"a":"' value='"}}'></form>
<script>
const told = [];
(async () => {{
  for (const mode of ["no-cors", "cors"]) {{
    const asked = {{method: "POST", mode, credentials: "include", headers: {{"content-type": "text/plain"}}, body: "{{}}"}};
    await fetch("{address}/api/account/sessions/end", asked).catch((error) => told.push(String(error)));
  }}
  document.title = "tried";
}})();
</script>"""


def test_somebody_joins_by_an_invitation_logs_out_and_in_again(store: Store, browser: Browser) -> None:
    token = people.first_invitation(store)
    with serving(store) as address:
        page = browser.new_page(base_url=address)
        page.goto(f"/join/{token}")
        page.get_by_label("Login").fill("Ada")
        page.get_by_label("Your name").fill("Ada <b>L.</b>")
        page.get_by_label("Password").fill("short")
        page.get_by_role("button", name="Join").click()
        assert page.url.endswith(f"/join/{token}")  # the browser itself asks for ten characters
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Join").click()
        page.wait_for_url(f"{address}/")
        assert page.get_by_role("link", name="Ada <b>L.</b>").is_visible()
        page.get_by_role("button", name="Log out").click()
        page.wait_for_url(f"{address}/login")
        page.get_by_label("Login").fill("ada")
        page.get_by_label("Password").fill("wrong password")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").get_by_text("login or password are wrong").wait_for()
        page.close()


def test_a_page_of_another_origin_cannot_act_for_who_is_logged_in(store: Store, browser: Browser) -> None:
    add_member(store, "ada", "lead")
    with serving(store) as address:
        log_in(other := browser.new_page(), address, "ada")
        log_in(page := browser.new_page(), address, "ada")
        for origin in ("http://evil.example/", "http://localhost:9/"):
            page.route(f"{origin}**", lambda route: route.fulfill(body=HOSTILE.format(address=address), content_type="text/html"))
            page.goto(origin)
            page.wait_for_function("document.title === 'tried'")
            with page.expect_navigation():
                page.evaluate("document.getElementById('f').submit()")
        page.goto(f"{address}/account")
        assert page.locator("tbody tr").count() == 2
        page.close(), other.close()
    with store.reading() as db:
        assert db.execute(select(session.c.ended_at)).scalars().all() == [None, None]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_pages_of_an_account_have_no_barrier(store: Store, page_of: Callable[..., Page], scheme: str, width: int) -> None:
    add_member(store, "ada", "lead")
    add_project(store, "horses \u202egnp.exe")
    with serving(store) as address:
        page = page_of(address, "ada", color_scheme=scheme, viewport={"width": width, "height": 740})
        for path in ("/", "/account"):
            page.goto(path)
            found = [each for each in Axe().run(page).response["violations"] if each["impact"] in ("serious", "critical")]
            assert not found, found
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"{path} is wider than {width}"
