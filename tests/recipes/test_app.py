"""`rushes app` as a process: how it begins on an empty folder, who may reach it, how it ends, and what its actions say."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest

from base_model.errors import UserError
from recipes import app, cli
from recipes.app import Config, check_reach, file_system_of, main, public_host, secret_of_environment
from reward.app.store import open_store
from tests.recipes.served import served

ROOT = Path(__file__).parents[2]
JOINING = {"login": "ada", "name": "Ada L.", "password": "correct horse battery"}
SECRET = "s" * 32


@pytest.fixture(autouse=True)
def no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(app.SECRET, raising=False)


def serving(folder: Path, *options: str) -> AbstractContextManager[tuple[subprocess.Popen[str], str]]:
    return served("app", "serve", "--out", str(folder), "--port", "0", *options)


def link_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    found = re.fullmatch(r"the first lead joins by this link, once: (\S+)\n", process.stderr.readline())
    assert found
    return found[1]


def said(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and the one line of a command that failed."""
    status = cli.main(["app", *arguments])
    return status, capsys.readouterr().err


def test_on_an_empty_folder_it_prints_a_link_by_which_one_person_becomes_the_lead_and_it_keeps_who_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / "app"
    with serving(folder) as (process, url), httpx2.Client(trust_env=False, base_url=url, timeout=60) as client:
        link = link_of(process)
        assert link.startswith(f"{url}/join/")
        path = "/api" + link.removeprefix(url)
        assert client.get(path).json()["roles"] == ["lead"]
        assert client.post(path, json=JOINING).status_code == 200
        assert client.post(path, json=JOINING).status_code == 404
        assert client.get("/api/").json()["name"] == "Ada L."
        assert said(["serve", "--out", str(folder), "--port", "0"], capsys) == (2, f"rushes: another server uses {folder}. Stop it first, or give another --out\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert process.communicate()[1] == "rushes: the app was told to stop; every answer that was acknowledged is kept. Start it again with the same command\n"
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir()), "nobody else reads names and hashes of passwords"
    with serving(folder) as (process, url):
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert "link" not in process.communicate()[1]
    assert main(Config(action="verify-log", out=folder))["events"] > 0


def test_the_server_starts_without_what_only_training_needs(tmp_path: Path) -> None:
    words = ["app", "serve", "--out", str(tmp_path / "app"), "--port", "0"]
    code = f"import sys\nfrom recipes import cli\nprint(cli.main({words!r}), sorted({{'torch', 'pyarrow', 'av', 'scipy', 'transformers'}} & set(sys.modules)))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        told, rest = process.communicate(timeout=60)
    assert "on http://127.0.0.1:" in first and told == "143 []\n", first + rest


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "sqlalchemy", "pwdlib"])
def test_a_package_that_is_not_installed_is_named_in_one_line(missing: str, tmp_path: Path) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom recipes import cli\nsys.exit(cli.main(['app', 'serve', '--out', {str(tmp_path / 'app')!r}, '--port', '0']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert told.returncode == 2 and re.fullmatch(rf"rushes: .*{missing}.* is not installed\. .*\n", told.stderr), told.stderr


@pytest.mark.parametrize(
    ("options", "secret", "message"),
    [
        (["--host", "0.0.0.0"], SECRET, "is open to other machines"),
        (["--host", "::"], None, "is open to other machines"),
        (["--public_url", "http://rank.example.org"], SECRET, "not the bare address of a host with TLS"),
        (["--public_url", "https://rank.example.org"], None, "signs its log with a secret of your own"),
        (["--public_url", "https://rank.example.org"], SECRET[:-1], "has 31 characters"),
    ],
)
def test_others_reach_it_with_tls_and_a_secret_or_not_at_all(
    options: list[str], secret: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if secret is not None:
        monkeypatch.setenv(app.SECRET, secret)
    status, line = said(["serve", "--out", str(tmp_path / "app"), *options], capsys)
    assert status == 2 and message in line and line.count("\n") == 1
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize("url", ["https://", "rank.example.org", "https://a.org/app", "https://me@a.org", "https://a.org?x", "https://a.org:port", "https://[::1", "ftp://a.org"])
def test_a_public_address_is_a_host_with_tls(url: str) -> None:
    with pytest.raises(UserError, match=r"https://rank\.example\.org"):
        public_host(url)


def test_behind_a_proxy_it_answers_to_its_public_name_alone_and_its_cookie_is_bound_to_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(app.SECRET, SECRET)
    with serving(tmp_path / "app", "--public_url", "https://rank.example.org/") as (process, url):
        link = link_of(process)
        assert link.startswith("https://rank.example.org/join/")
        path = "/api" + link.removeprefix("https://rank.example.org")
        assert httpx2.get(f"{url}{path}", trust_env=False).status_code == 400
        answer = httpx2.post(f"{url}{path}", json=JOINING, headers={"host": "rank.example.org"}, trust_env=False)
        assert answer.status_code == 200
        assert re.match(r"__Host-rushes=.*Secure", answer.headers["set-cookie"])
    assert not (tmp_path / "app" / "secret").exists(), "what signs the log does not lie beside it"


def test_a_secret_in_the_environment_means_what_it_means_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.close()
    assert secret_of_environment() is None
    monkeypatch.setenv(app.SECRET, (tmp_path / "secret").read_text())
    assert secret_of_environment() == store.secret
    (tmp_path / "secret").unlink()
    assert main(Config(action="verify-log", out=tmp_path))["events"] == 0


def test_a_network_file_system_is_refused_for_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file_system_of(Path("/proc/self")) == "proc"
    monkeypatch.setattr(app, "file_system_of", lambda folder: "nfs4")
    with pytest.raises(UserError, match=r"lies on a network file system \(nfs4\)"):
        main(Config(action="serve", out=tmp_path / "app"))


def test_people_are_invited_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(tmp_path).close()
    link = main(Config(action="invite", out=tmp_path, roles=("auditor", "lead")))["link"]
    assert re.fullmatch(r"http://127\.0\.0\.1:8012/join/[\w-]{32}", link)
    assert said(["invite", "--out", str(tmp_path), "--project", "horses"], capsys) == (2, "rushes: no project 'horses', --project. There are: none yet\n")
    assert said(["invite", "--out", str(tmp_path), "--roles", "[boss]"], capsys)[1].startswith("rushes: no role boss, roles. There are labeler")


@pytest.mark.parametrize("action", ["verify-log", "invite"])
def test_an_action_makes_no_store_where_there_is_none(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = said([action, "--out", str(tmp_path / "app")], capsys)
    assert status == 2 and line.startswith(f"rushes: no store of the app, {tmp_path / 'app'}.")
    assert not (tmp_path / "app").exists()


def test_a_store_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app.sqlite3").write_bytes(b"no database" * 500)
    status, line = said(["verify-log", "--out", str(tmp_path)], capsys)
    assert status == 2 and "file is not a database" in line and line.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert said(["serve", "--out", str(tmp_path / "file" / "app")], capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "where to? Write rushes app export FOLDER --project NAME"),
        (["export", "x", "--format", "pickle"], "unknown format 'pickle', --format. There are: parquet,"),
        (["export", "x", "--project", "horses"], "no project 'horses', --project. There are: none yet"),
        (["import"], "which run? Write rushes app import FOLDER --project NAME"),
        (["import", "x"], "which project? Give --project"),
        (["backup"], "where to? Write rushes app backup FOLDER"),
        (["verify-log", "--database", "sqlite:///elsewhere.sqlite3"], "no such database, --database. Give postgresql+psycopg://"),
        (["export", "a", "b"], "3 words after app, on the command line. Write rushes app ACTION [FOLDER]"),
    ],
)
def test_what_an_action_lacks_is_said_in_one_line(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_store(tmp_path).close()
    status, line = said([*words, "--out", str(tmp_path)], capsys)
    assert status == 2 and line.startswith(f"rushes: {message}") and line.count("\n") == 1


def test_the_actions_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, line = said([], capsys)
    assert status == 2 and all(action in line for action in ("serve", "invite", "import", "export", "backup", "verify-log"))
    check_reach(Config())
    assert json.loads(json.dumps(cli.plain(Config().model_dump())))["port"] == 8012
