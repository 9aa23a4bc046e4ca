"""Label Studio as users install it, in an environment of its own, and its HTTP API: what `rushes bench app` is compared with."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from base_model.errors import UserError

PIN = "label-studio==1.23.2"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
QUIET = {
    "COLLECT_ANALYTICS": "false",
    "SENTRY_DSN": "",
    "FRONTEND_SENTRY_DSN": "",
    "LATEST_VERSION_CHECK": "false",
    "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
}
CONFIG = """<View><Header value="$prompt"/><Video name="a" value="$a"/><Video name="b" value="$b"/>
<Choices name="choice" toName="a" choice="single"><Choice value="A"/><Choice value="B"/><Choice value="tie"/></Choices></View>"""
START_SECONDS = 180.0


def environment(folder: Path, python: Path | None) -> Path:
    """The Python that has Label Studio, made if need be: a minute and a half, 1 GB. Raises UserError where it cannot be."""
    if python is not None:
        if not python.exists():
            raise UserError(f"there is no {python}. Give --python FILE of an environment with {PIN}, or leave it out")
        return python.absolute()
    made, ready = folder / "bin" / "python", folder / "ready"
    if not (ready.exists() and ready.read_text() == PIN):
        print(f"making an environment for Label Studio in {folder}: two minutes, 1 GB", file=sys.stderr)
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, capture_output=True)
            subprocess.run([made, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIN], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot make an environment for Label Studio in {folder}: {error}. It needs a package index; or give --python FILE of one that is there") from error
        ready.write_text(PIN)
    return made.absolute()


@contextlib.contextmanager
def served(python: Path, folder: Path, port: int) -> Iterator[httpx2.Client]:
    """A server of its own with an empty SQLite store in `folder`, and a client with its first user's token. Raises UserError where it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(python.parent / "label-studio"), "start", "--no-browser", "--port", str(port), "--data-dir", str(folder.absolute())]
    user = ["--username", "bench@example.org", "--password", "a long password", "--user-token", TOKEN]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen([*words, *user], stdout=log, stderr=log, env={**os.environ, **QUIET, "PYTHONPATH": "", "BASE_DATA_DIR": str(folder.absolute())})
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Token {TOKEN}"}, timeout=120)
    try:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if client.get("/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise UserError(f"Label Studio did not start, {folder / 'log.txt'}. The end of that file says why")
            time.sleep(0.5)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(30)


def make_project(client: httpx2.Client) -> int:
    answer = client.post("/api/projects", json={"title": "bench", "label_config": CONFIG})
    answer.raise_for_status()
    return int(answer.json()["id"])


def import_tasks(client: httpx2.Client, project: int, number: int) -> None:
    """Imports pairs of clips by their addresses, which nobody fetches."""
    tasks = [{"data": {"prompt": f"prompt {i}", "a": f"https://example.org/{i}a.mp4", "b": f"https://example.org/{i}b.mp4"}} for i in range(number)]
    content = json.dumps(tasks).encode()
    client.post(f"/api/projects/{project}/import", content=content, headers={"Content-Type": "application/json"}).raise_for_status()


def answer_tasks(client: httpx2.Client, project: int, number: int) -> Iterator[tuple[float, float]]:
    """(seconds of the next task, seconds of its answer), one after the other."""
    result: list[dict[str, Any]] = [{"from_name": "choice", "to_name": "a", "type": "choices", "value": {"choices": ["A"]}}]
    for _ in range(number):
        began = time.perf_counter()
        task = client.get(f"/api/projects/{project}/next")
        got = time.perf_counter()
        task.raise_for_status()
        client.post(f"/api/tasks/{task.json()['id']}/annotations/", json={"result": result, "lead_time": 1.0}).raise_for_status()
        yield got - began, time.perf_counter() - got
