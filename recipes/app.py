"""The web app in which people rank clips and judge the filters (`rushes app ACTION`).

    rushes app serve                                   on this machine alone; prints a link by which the first lead joins
    rushes app invite --roles '[labeler]' --project P  a link for one more person
    rushes app verify-log                              whether anybody changed what was written down

Other machines reach it through a proxy that has TLS: `--public_url https://...`, and the environment variable RUSHES_APP_SECRET, of 32 characters or more, signs the log's anchors.
SIGTERM and Ctrl-C stop it: requests that are being answered are answered. Nothing that was acknowledged is lost however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count
from base_model.errors import Interrupted, UserError
from recipes.listening import address, listening, uvicorn, uvicorn_config
from reward.judges.exchange import is_loopback

if TYPE_CHECKING:
    from reward.app.store import Store

Action = Literal["serve", "invite", "verify-log"]
SECRET = "RUSHES_APP_SECRET"
SHORTEST_SECRET = 32
CONNECTIONS = 4096
"""Open at once; a browser holds up to six."""
NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "fuse.sshfs")
"""File systems on which SQLite's locks, and so its files, cannot be relied on."""


class Config(BaseConfig):
    action: Action | None = None
    """What to do."""
    folder: Path | None = None
    """Folder that an action reads or writes."""
    out: Path = Path("runs/app")
    """Folder of the store: database, media, anchors of the log."""
    database: str | None = None
    """Another database than the SQLite file in that folder: postgresql+psycopg://user@host/name."""
    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs --public_url and RUSHES_APP_SECRET."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8012
    """Port to listen on; 0 takes a free one and says which."""
    public_url: str | None = None
    """Address under which a proxy with TLS makes the app known: https://rank.example.org."""
    proxies: tuple[str, ...] = ()
    """Addresses of proxies that are believed when they say for whom they ask; without, all of a proxy's people share its limit of logins a minute."""
    import_roots: tuple[Path, ...] = ()
    """Folders below which leads may name runs to import."""
    stop_seconds: Count = 30
    """Seconds that requests have to be answered in once the server is told to stop."""
    project: str = "*"
    """Name or id of the project that is invited to; "*" is every project."""
    roles: tuple[str, ...] = ("lead",)
    """Roles of who is invited: labeler, reviewer, senior, child_safety, lead, auditor."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Does one action. Raises UserError where it cannot, Interrupted when a signal ended the server."""
    actions: dict[str, Callable[[Config], dict[str, Any]]] = {
        "serve": serve,
        "invite": invite,
        "verify-log": verify_log,
    }
    if cfg.action is None:
        raise UserError(f"which action? Write rushes app ACTION. There are: {', '.join(actions)}")
    check_installed()
    return actions[cfg.action](cfg)


def check_installed() -> None:
    """Raises UserError where a package that the app is made of is not installed."""
    try:
        import reward.app.migrations
        import reward.app.web  # noqa: F401
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("reward", "base_model"):
            raise
        raise UserError(f"the app needs the package {missing!r}, which is not installed. pip install 'rushes[app]'") from error


# The server


def serve(cfg: Config) -> dict[str, Any]:
    """Serves until it is told to stop."""
    server = uvicorn()
    check_reach(cfg)
    with opened(cfg, made=True) as store, alone(cfg), listening(cfg.host, cfg.port) as listener:
        from reward.app.people import first_invitation
        from reward.app.web import make_app

        here = address(cfg.host, listener.getsockname()[1])
        app, token = make_app(store, settings_of(cfg)), first_invitation(store)
        print(f"serving {cfg.out} on {here}{f', as {base_of(cfg, here)}' if cfg.public_url else ''}", file=sys.stderr)
        if token is not None:
            print(f"the first lead joins by this link, once: {base_of(cfg, here)}/join/{token}", file=sys.stderr)
        sys.stderr.flush()
        stopped_by = signal.SIGINT.value
        try:
            with contextlib.suppress(KeyboardInterrupt):
                server.Server(uvicorn_config(app, cfg.stop_seconds, CONNECTIONS, proxies=cfg.proxies)).run(sockets=[listener])
        except Interrupted as error:
            stopped_by = error.exit_status - 128
    raise Interrupted("the app was told to stop; every answer that was acknowledged is kept. Start it again with the same command", stopped_by)


def check_reach(cfg: Config) -> None:
    """Raises UserError where others could reach the app without TLS, or where the secret that signs the log lies beside it."""
    if cfg.public_url is None and not is_loopback(cfg.host):
        raise UserError(f"--host {cfg.host} is open to other machines, and passwords would go over the network as they are. Give --public_url https://... of a proxy with TLS")
    if cfg.public_url is not None:
        public_host(cfg.public_url)
        if secret_of_environment() is None:
            raise UserError(f"an app that others reach signs its log with a secret of your own. Set {SECRET} to at least {SHORTEST_SECRET} characters: openssl rand -hex 32")


def public_host(url: str) -> str:
    """The name in a public address. Raises UserError where it is not the bare address of a host with TLS."""
    advice = "Give the address as people type it: https://rank.example.org"
    try:
        parts = urlsplit(url)
        name, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--public_url {url} is no address: {error}. {advice}") from error
    if parts.scheme != "https" or not name or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise UserError(f"--public_url {url} is not the bare address of a host with TLS. {advice}")
    return name


def settings_of(cfg: Config) -> Any:
    """How the app is reached, as the app takes it."""
    from reward.app.web import AppSettings

    roots = tuple(root.absolute() for root in cfg.import_roots)
    if cfg.public_url is None:
        return AppSettings(import_roots=roots)
    return AppSettings(hosts=(public_host(cfg.public_url),), secure=True, import_roots=roots)


def base_of(cfg: Config, here: str) -> str:
    """Where links begin. here: the address that is listened on."""
    return cfg.public_url.rstrip("/") if cfg.public_url else here


@contextlib.contextmanager
def alone(cfg: Config) -> Iterator[None]:
    """Holds the folder for this server. Raises UserError where another server of this machine has it."""
    descriptor = os.open(cfg.out / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another server uses {cfg.out}. Stop it first, or give another --out") from error
        yield
    finally:
        os.close(descriptor)


# The store


@contextlib.contextmanager
def opened(cfg: Config, *, made: bool = False) -> Iterator[Store]:
    """The store, closed at the end. made: whether it is made where there is none. Raises UserError where it is not there, or cannot be relied on where it lies."""
    from reward.app.store import open_store

    if cfg.database is None:
        check_file_system(cfg.out)
    there = (cfg.out / "app.sqlite3").exists() if cfg.database is None else cfg.out.is_dir()
    if not there and not made:
        raise UserError(f"no store of the app, {cfg.out}. Give its folder with --out, or begin one with `rushes app serve`")
    secret = secret_of_environment()
    if secret is None and (cfg.out / "anchor.jsonl").exists() and not (cfg.out / "secret").exists():
        raise UserError(f"the secret that signed the log's anchors is not in {cfg.out}. Copy the file `secret` from where the store was, or set {SECRET} to it")
    before = os.umask(0o077)  # names and hashes of passwords are nobody else's to read
    try:
        try:
            store = open_store(cfg.out, cfg.database, secret=secret)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot open the store in {cfg.out}: {error}. Check the folder, or give another --out") from error
        try:
            yield store
        finally:
            store.close()
    finally:
        os.umask(before)


def secret_of_environment() -> bytes | None:
    """The secret, None where there is none; 64 hexadecimal digits mean what they mean in the file `secret`. Raises UserError for one that is too short."""
    text = os.environ.get(SECRET)
    if text is None:
        return None
    if len(text) < SHORTEST_SECRET:
        raise UserError(f"{SECRET} has {len(text)} characters. Set it to at least {SHORTEST_SECRET}: openssl rand -hex 32")
    return bytes.fromhex(text) if re.fullmatch("[0-9a-f]{64}", text) else text.encode()


def check_file_system(folder: Path) -> None:
    """Raises UserError where the folder lies on a network file system."""
    kind = file_system_of(folder.resolve())
    if kind in NETWORK:
        raise UserError(f"{folder} lies on a network file system ({kind}), where SQLite may lose what it has written. Give an --out on a local disk, or PostgreSQL: --database")


def file_system_of(folder: Path) -> str:
    """The type of the file system on which a folder lies, or will; "" where the system does not say."""
    import psutil

    kinds = {Path(each.mountpoint): each.fstype.lower() for each in psutil.disk_partitions(all=True)}
    return next((kinds[place] for place in (folder, *folder.parents) if place in kinds), "")


# The other actions


def invite(cfg: Config) -> dict[str, Any]:
    """A link by which one person joins."""
    from reward.app import people

    with opened(cfg) as store:
        project_id = "*" if cfg.project == "*" else project_called(store, cfg.project)
        with store.writing() as db:
            token = people.invite(store, db, project_id=project_id, roles=cfg.roles, by="system")
    return {"link": f"{base_of(cfg, address(cfg.host, cfg.port))}/join/{token}", "roles": list(cfg.roles), "project": cfg.project}


def verify_log(cfg: Config) -> dict[str, Any]:
    """How long the log is and how it ends; raises UserError where it is not as it was written."""
    with opened(cfg) as store:
        return store.verify_log()


def project_called(store: Store, name: str) -> str:
    """The id of a project. name: its name or id. Raises UserError where there is none."""
    from sqlalchemy import or_, select

    from reward.app.schema import project

    with store.reading() as db:
        rows = db.execute(select(project.c.id, project.c.name).order_by(project.c.name)).all()
        found = db.execute(select(project.c.id).where(or_(project.c.id == name, project.c.name == name))).scalar()
    if found is None:
        there = ", ".join(row.name for row in rows) or "none yet"
        raise UserError(f"no project {name!r}, --project. There are: {there}")
    return str(found)
