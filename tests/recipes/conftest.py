"""What several files of recipes' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.recipes.killed import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs recipes in processes that spare themselves the imports."""
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server
