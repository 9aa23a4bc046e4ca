"""Requests made from our own OpenAPI document, good ones and bad ones, by somebody with every role: none is answered with a 500."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, strategies
from schemathesis.core import NotSet

from reward.app.access import ROLES
from reward.app.store import Store
from tests.reward.app.conftest import Client, add_clips, add_member, add_project

IN_ALL, LONG = 600, 10_000


def fuzz(store: Store, requests: int) -> int:
    project_id = add_project(store)
    add_clips(store, project_id, takes=2, files=False)
    add_member(store, "ada", *ROLES)
    client = unlimited(store)
    schema = schemathesis.openapi.from_dict(client.app.openapi())  # type: ignore[attr-defined]
    operations = [each.ok() for each in schema.get_all_operations()]
    asked = 0

    for operation in operations:
        if operation.path.endswith("/logout"):
            continue

        @hypothesis.given(case=operation.as_strategy(), real=strategies.booleans(), template=strategies.just(operation.path))
        @hypothesis.settings(
            max_examples=max(1, requests // len(operations)), deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
        )
        def ask(case: schemathesis.Case, real: bool, template: str) -> None:
            nonlocal asked, client
            path = case.formatted_path if not real else template.replace("{project_id}", project_id).format_map(_Kept(case.path_parameters))
            body = {} if isinstance(case.body, NotSet) else {"json": case.body}
            try:
                answer = client.request(case.method, path, params=case.query or None, **body)
            except ValueError:  # what no URL or no JSON can hold
                return
            asked += 1
            assert answer.status_code < 500, (case.method, path, body, answer.text)
            if answer.status_code == 401 and not path.startswith("/api/login"):
                client = unlimited(store)

        ask()
    return asked


def unlimited(store: Store) -> Client:
    """Somebody with every role, who may ask as often as they like."""
    client = Client(store, "ada")
    client.app.state.limits = SimpleNamespace(request=lambda key: None, login=lambda name, address: None)  # type: ignore[attr-defined]
    return client


class _Kept(dict[str, object]):
    def __missing__(self, key: str) -> str:
        return "none"


def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(store: Store) -> None:
    assert fuzz(store, IN_ALL) > IN_ALL // 2


@pytest.mark.slow
def test_ten_thousand_requests_break_nothing(store: Store) -> None:
    assert fuzz(store, 2 * LONG) > LONG
