"""Text that no database keeps, in every field of every action: refused in words, and nothing of it is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel, ValidationError
from sqlalchemy import func, insert, select
from sqlalchemy.exc import DataError

from reward.app.access import ROLES
from reward.app.schema import event, private_text
from reward.app.store import Store, new_id
from reward.app.texts import Written, keepable
from tests.reward.app.conftest import Client, add_clips, add_member, add_project
from tests.reward.app.test_fuzz import unlimited

BAD = ("\0", "good until here \0", "\ud800", "half \udc00 of a character", "\udfff\ud800")
GOOD = ("", "plain", "‮ turned", "🧵 達", "\x01\x7f\ufffe", "e\u0301" * 50)


def test_what_is_refused_is_what_one_of_the_databases_does_not_keep(each_store: Store) -> None:
    person_id = add_member(each_store, "ada", *ROLES)
    for text in (*BAD, *GOOD):
        text_id = new_id("x")
        try:
            with each_store.writing() as db:
                db.execute(insert(private_text), {"id": text_id, "person_id": person_id, "text": text, "created_at": 0})
            with each_store.reading() as db:
                kept = db.execute(select(private_text.c.text).where(private_text.c.id == text_id)).scalar_one() == text
        except (DataError, UnicodeEncodeError):
            kept = False
        assert kept == (keepable(text) or (each_store.is_sqlite and "\0" in text)), repr(text)


class Said(BaseModel):
    text: Written


@pytest.mark.parametrize("text", BAD)
def test_a_model_takes_no_such_text(text: str) -> None:
    with pytest.raises(ValidationError):
        Said(text=text)
    assert [Said(text=each).text for each in GOOD] == list(GOOD)


def bodies_of(client: Client) -> dict[str, dict[str, Any]]:
    """Every action -> a body in which each field it knows is the text `?`."""
    told = client.app.openapi()  # type: ignore[attr-defined]
    found = {}
    for path, methods in told["paths"].items():
        if "post" in methods:
            content = methods["post"].get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            found[path] = _filled(content, told["components"]["schemas"])
    return found


def _filled(schema: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    named = known[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return dict.fromkeys(named.get("properties", {}), "?") or {"any": "?"}


def test_every_action_refuses_such_text_in_any_field_and_keeps_nothing_of_it(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_clips(each_store, project_id, takes=2, files=False)
    add_member(each_store, "ada", *ROLES)
    client = unlimited(each_store)
    asked = 0
    with each_store.reading() as db:
        before = db.execute(select(func.count()).select_from(event)).scalar_one()
    for path, body in bodies_of(client).items():
        at = path.replace("{project_id}", project_id).replace("{", "").replace("}", "")
        for text in BAD:
            for sent in ({name: text for name in body}, {**body, text: "x"}, [[{"deep": [{"er": text}]}]], *({name: {"in": [text]}} for name in body)):
                answer = client.post(at, content=json.dumps(sent), headers={"content-type": "application/json"})
                assert answer.status_code == 422 and "half characters" in answer.json()["detail"], (path, sent, answer.text)
                asked += 1
    with each_store.reading() as db:
        assert db.execute(select(func.count()).select_from(event)).scalar_one() == before
    assert asked > 500 and len(bodies_of(client)) > 40


def test_every_page_takes_such_text_in_a_path_or_a_question_without_a_500(each_store: Store) -> None:
    project_id = add_project(each_store)
    add_member(each_store, "ada", *ROLES)
    client = unlimited(each_store)
    told = client.app.openapi()  # type: ignore[attr-defined]
    asked = 0
    for path, methods in told["paths"].items():
        if "get" not in methods:
            continue
        asks = [each["name"] for each in methods["get"].get("parameters", []) if each["in"] == "query"]
        for raw in ("%00", "a%00b", "%ED%A0%80", "%ff", quote("‮")):
            at = path.replace("{project_id}", project_id)
            for name in [each["name"] for each in methods["get"].get("parameters", []) if each["in"] == "path"]:
                at = at.replace("{" + name + "}", raw)
            answer = client.get(f"{at}?{'&'.join(f'{name}={raw}' for name in asks)}")
            assert answer.status_code < 500, (at, answer.text)
            asked += 1
    assert asked > 100


def test_a_body_that_is_no_json_is_still_refused_by_who_reads_it(store: Store) -> None:
    add_member(store, "ada", *ROLES)
    client = Client(store, "ada")
    for body in (b"\xff\xfe", b"{", b"[" * 100_000, b"", b'{"name": NaN}'):
        assert client.post("/api/account/tokens", content=body, headers={"content-type": "application/json"}).status_code in (400, 422), body[:20]
