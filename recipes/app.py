"""The web app in which people rank clips and judge the filters (`rushes app ACTION`).

    rushes app serve                                   on this machine alone; prints a link by which the first lead joins
    rushes app invite --roles '[labeler]' --project P  a link for one more person
    rushes app import RUN --project P                  clips of a clip store into a project, made where there is none of that name; tasks are made of them
    rushes app prioritise --project P --reward R --clips STORE   the tasks that would tell the reward model most come first
    rushes app export FOLDER --project P               what people said, as `rushes reward-model` and other tools read it
    rushes app audit FOLDER --project P                what reviewers said of the filters, as `rushes safety-report` and `--safety.audit` read it
    rushes app sign CARD --signoff ID                  a sign-off into the card beside an adapter's weights
    rushes app backup FOLDER                           a copy of the store while it is used
    rushes app verify-log                              whether anybody changed what was written down

Other machines reach it through a proxy that has TLS: `--public_url https://...`, and the environment variable RUSHES_APP_SECRET, of 32 characters or more, signs the log's anchors.
SIGTERM and Ctrl-C stop it: requests that are being answered are answered. Nothing that was acknowledged is lost however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, Seed
from base_model.errors import Interrupted, UserError
from recipes.listening import address, listening, uvicorn, uvicorn_config
from reward.judges.exchange import is_loopback

if TYPE_CHECKING:
    from reward.app.store import Store

Action = Literal["serve", "invite", "import", "prioritise", "export", "audit", "sign", "backup", "verify-log"]
SECRET = "RUSHES_APP_SECRET"
SHORTEST_SECRET = 32
CONNECTIONS = 4096
"""Open at once; a browser holds up to six."""
FEW = 20
"""Ranked prompts below which none is held out from learning: accuracy stays unknown."""
LOOK_SECONDS = 1.0
TURN_SECONDS = 0.0005
"""After which a thread of the server gives way. At Python's own 5 ms, whoever holds the one writing transaction waits for its turn after every statement: next tasks took
twice as long."""
NETWORK = ("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "fuse.sshfs")
"""File systems on which SQLite's locks, and so its files, cannot be relied on."""


class Config(BaseConfig):
    action: Action | None = None
    """What to do."""
    folder: Path | None = None
    """Folder that an action reads or writes: of the run to import, of the export, of the audit, of the backup; or the card to sign, a file."""
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
    """Name or id of the project; "*" invites to every project."""
    roles: tuple[str, ...] = ("lead",)
    """Roles of who is invited: labeler, reviewer, senior, child_safety, lead, auditor."""
    run: str = ""
    """What the imported clips are called together; nothing means the folder's name."""
    format: str = "parquet"
    """What is exported: parquet, jsonl, videoalign, label-studio, trl, demonstrations."""
    dimension: str | None = None
    """Only answers in this dimension are exported, none means all; or the dimension of the reward model by which tasks are put in order."""
    gold: bool = False
    """Whether answers to gold tasks are exported, too. Their planted clips are in no clip store, so nothing can learn from them."""
    clips: Path | None = None
    """Clip store with the records of the clips: tasks are put in order by them; demonstrations are exported as the pairs that `rushes sft` learns from."""
    reward: Path | None = None
    """Folder of a reward model, by which tasks are put in order."""
    seed: Seed = 0
    """Seed of the order of tasks that would tell it equally much."""
    training: bool = False
    """Whether an audit is for `rushes safety-train`: then nothing in it was said of restricted clips."""
    signoff: str = ""
    """Id of the sign-off that is written into a card, as the page of sign-offs shows it."""
    with_secret: bool = False
    """Whether a backup holds the secret that signs the log's anchors. Keep such a backup as you would a key."""


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Does one action. Raises UserError where it cannot, Interrupted when a signal ended the server."""
    actions: dict[str, Callable[[Config], dict[str, Any]]] = {
        "serve": serve,
        "invite": invite,
        "import": import_clips,
        "prioritise": prioritise,
        "export": export,
        "audit": audit,
        "sign": sign,
        "backup": back_up,
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
    with alone(cfg), opened(cfg, made=True) as store, listening(cfg.host, cfg.port) as listener:
        from reward.app.people import first_invitation
        from reward.app.upkeep import upkeep
        from reward.app.web import make_app

        here = address(cfg.host, listener.getsockname()[1])
        app, token = make_app(store, settings_of(cfg)), first_invitation(store)
        sys.setswitchinterval(TURN_SECONDS)
        print(f"serving {cfg.out} on {here}{f', as {base_of(cfg, here)}' if cfg.public_url else ''}", file=sys.stderr)
        if token is not None:
            print(f"the first lead joins by this link, once: {base_of(cfg, here)}/join/{token}", file=sys.stderr)
        sys.stderr.flush()
        stopped_by = signal.SIGINT.value
        try:
            with upkeep(store), contextlib.suppress(KeyboardInterrupt):
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
    """Holds the folder for this server. Raises UserError where another server of this machine has it, or where it cannot be made."""
    try:
        cfg.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(cfg.out / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"cannot open the store in {cfg.out}: {error}. Check the folder, or give another --out") from error
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
    elif not cfg.database.startswith("postgresql"):
        raise UserError("no such database, --database. Give postgresql+psycopg://user@host/name, or nothing for the SQLite file in --out")
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


def import_clips(cfg: Config) -> dict[str, Any]:
    """What was imported, and how many tasks were made of it."""
    source = needed(cfg.folder, "which run? Write rushes app import FOLDER --project NAME")
    if cfg.project == "*":
        raise UserError("which project? Give --project; one that is not there is made")
    with opened(cfg) as store:
        return fill_project(store, cfg.project, source, cfg.run or source.resolve().name)


def prioritise(cfg: Config) -> dict[str, Any]:
    """How many tasks are in order now."""
    reward = needed(cfg.reward, "by which reward model? Write rushes app prioritise --project NAME --reward FOLDER --clips STORE")
    clips = needed(cfg.clips, "where are the clips? Give the clip store that they were imported from, --clips")
    with opened(cfg) as store:
        told: dict[str, Any] = room("prioritising").prioritise(store, project_called(store, cfg.project), reward, clips, system(), dimension=cfg.dimension, seed=cfg.seed)
    return told


def audit(cfg: Config) -> dict[str, Any]:
    """What went into the folder of the audit, and into that of the corrections beside it."""
    from base_model.checkpoint import disk_errors

    target = needed(cfg.folder, "where to? Write rushes app audit FOLDER --project NAME")
    with opened(cfg) as store, disk_errors(target):
        told: dict[str, Any] = room("auditing").audit_folders(store, project_called(store, cfg.project), target, training=cfg.training)
    return {"folder": str(target), **told}


def sign(cfg: Config) -> dict[str, Any]:
    """The sign-off that is in the card now."""
    card = needed(cfg.folder, "which card? Write rushes app sign CARD.json --signoff ID")
    if not cfg.signoff:
        raise UserError("which sign-off? Give the id that the page of sign-offs shows, --signoff")
    with opened(cfg) as store:
        written: dict[str, Any] = room("signing_off").write_card(store, cfg.signoff, card)
    told = next(each for each in written["signoffs"] if each["id"] == cfg.signoff)
    return {"card": str(card), **{name: told[name] for name in ("id", "run", "approved", "by", "at")}}


def export(cfg: Config) -> dict[str, Any]:
    """What went into the folder, and what did not."""
    from base_model.checkpoint import disk_errors
    from reward.app import exporting

    target = needed(cfg.folder, "where to? Write rushes app export FOLDER --project NAME")
    kind = next((kind for kind in exporting.FORMATS if kind == cfg.format), None)
    if kind is None:
        raise UserError(f"unknown format {cfg.format!r}, --format. There are: {', '.join(exporting.FORMATS)}")
    with opened(cfg) as store, disk_errors(target):
        project_id = project_called(store, cfg.project)
        if kind == "demonstrations" and cfg.clips is not None:
            return {"folder": str(target), "pairs": save_demonstrations(exporting.export_pairs(store, project_id, by="system"), cfg.clips, target)}
        if kind == "parquet":
            written = exporting.export_rankings(store, project_id, target, by="system", dimension=cfg.dimension, gold=cfg.gold)
        else:
            written = exporting.export(store, project_id, kind, target, by="system", dimension=cfg.dimension, gold=cfg.gold)
    return {"path": str(written.path), "rows": written.rows, "answers": written.answers, "sha256": written.sha256, "left_out": dict(written.left_out)}


def save_demonstrations(pairs: Sequence[tuple[str, str]], clips: Path, folder: Path) -> int:
    """Writes the pairs that `recipes/sft.py` learns from: captions, and the exact frames out of the clip store. Raises UserError where a record is not there."""
    from base_model.video.files import to_uint8
    from base_model.video.store import ClipStore
    from recipes.pairs import save_pairs
    from recipes.shapes.dataset import ClipSet

    records = ClipStore(clips)
    videos = [torch_frames(to_uint8(records.load(clip_id))) for _, clip_id in pairs]
    save_pairs(folder, ClipSet(tuple(text for text, _ in pairs), tuple(videos)))
    return len(pairs)


def torch_frames(frames: Any) -> Any:
    """uint8 [T,H,W,3] -> [T,3,H,W]."""
    import torch

    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def back_up(cfg: Config) -> dict[str, Any]:
    """The manifest of the backup."""
    from reward.app.backup import backup

    target = needed(cfg.folder, "where to? Write rushes app backup FOLDER")
    with opened(cfg) as store:
        made = backup(store, target, with_secret=cfg.with_secret)
    if not cfg.with_secret:
        where = f"the environment variable {SECRET}" if secret_of_environment() else f"{cfg.out / 'secret'}"
        print(f"the secret that signs the log is not in the backup: keep {where} elsewhere, without it nobody can verify the log", file=sys.stderr, flush=True)
    return {"folder": str(target), **made}


def needed(folder: Path | None, problem: str) -> Path:
    """The folder. Raises UserError with the problem where none was given."""
    if folder is None:
        raise UserError(problem)
    return folder


# People who are waited for


def have_people_rank(folder: Path, clips: Path, target: Path, wanted: int, *, name: str, port: int) -> dict[str, int]:
    """Opens the app on a clip store until `wanted` rankings of its clips are there, and writes them into a folder of rankings, made anew. folder: of the app, which keeps them.

    Returns how many rankings of how many people there are. One person can give them all. Interrupted, it goes on with what was ranked. Raises UserError where there are not as
    many tasks.
    """
    from reward.app.exporting import SHARES, export_rankings
    from reward.app.people import first_invitation
    from reward.app.upkeep import upkeep
    from reward.app.web import make_app

    cfg = Config(out=folder, port=port, stop_seconds=5)
    check_installed()
    with alone(cfg), opened(cfg, made=True) as store, listening(cfg.host, cfg.port) as listener:
        print(f"the clips in {clips} are made ready for the app", file=sys.stderr, flush=True)
        if find_project(store, name) is None:
            make_project_of_one(store, name, clips)
        made = fill_project(store, name, clips, name)
        project_id, most = project_called(store, name), tasks_of(store, project_called(store, name))
        if most < wanted:
            raise UserError(f"{wanted} rankings are more than the {most} tasks that the clips in {clips} give. Ask for fewer, or make more candidates")
        here = address(cfg.host, listener.getsockname()[1])
        token = first_invitation(store, ("lead", "labeler", "reviewer"))
        said = f"{here}/join/{token}" if token else f"{here}, where whoever joined logs in"
        print(f"people rank {made['rows']} clips in the app: {said}", file=sys.stderr, flush=True)
        with in_background(make_app(store), listener, cfg.stop_seconds), upkeep(store):
            wait_for(lambda: len(ranked(store, project_id)), wanted)
        answers = ranked(store, project_id)
        if target.exists():
            shutil.rmtree(target)
        few = len({prompt_id for prompt_id, _ in answers}) < FEW
        export_rankings(store, project_id, target, by="system", shares=(1.0, 0.0, 0.0) if few else SHARES)
    return {"rankings": len(answers), "people": len({who for _, who in answers})}


def ranked(store: Store, project_id: str) -> list[tuple[str, str]]:
    """(prompt, pseudonym) of every ranking that a reward model can learn from."""
    from reward.app.exporting import told_by

    usable = [event for event in told_by(store, project_id) if not event.is_gold and not event.skipped_reason and sum(rank is not None for rank in event.ranks) > 1]
    return list({(event.task_id, event.annotator_id, event.is_repeat): (event.prompt_id, event.annotator_id) for event in usable}.values())


def make_project_of_one(store: Store, name: str, clips: Path) -> None:
    """Makes a project in which one person may rank all there is: every task wants one answer, and nobody is given too few."""
    from base_model.video.store import ClipStore

    leading = room("leading")
    project_id = leading.make_project(store, name, "system")
    settings = {"labeling": {"overlap": 1, "most": max(1, len(ClipStore(clips)))}}  # a task has two clips at least
    leading.change_settings(store, project_id, settings, leading.version_of({}), "system")


def tasks_of(store: Store, project_id: str) -> int:
    """How many ranking tasks a project has; one person answers each once."""
    from sqlalchemy import func, select

    from reward.app.schema import task

    with store.reading() as db:
        return int(db.execute(select(func.count()).where(task.c.project_id == project_id, task.c.kind == "rank", task.c.state != "closed")).scalar_one())


@contextlib.contextmanager
def in_background(app: Any, listener: socket.socket, stop_seconds: int) -> Iterator[None]:
    """Serves in a thread while the block runs."""
    server = uvicorn().Server(uvicorn_config(app, stop_seconds, CONNECTIONS))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def wait_for(count: Callable[[], int], wanted: int) -> None:
    """Returns once there are as many; says so whenever there is one more."""
    before = -1
    while (now := count()) < wanted:
        if now != before:
            print(f"{now} of {wanted} rankings", file=sys.stderr, flush=True)
            before = now
        time.sleep(LOOK_SECONDS)
    print(f"{now} of {wanted} rankings: thank you, it goes on with these", file=sys.stderr, flush=True)


# What the rooms of the app do for recipes: the only place where recipes call them


def room(module: str) -> Any:
    """A module of the app."""
    return importlib.import_module(f"reward.app.{module}")


def fill_project(store: Store, name: str, folder: Path, run: str) -> dict[str, Any]:
    """Imports a clip store into the project of that name, made where there is none, and makes ranking tasks of its clips."""
    importing, labeling, leading = (room(module) for module in ("importing", "labeling", "leading"))
    project_id = find_project(store, name) or leading.make_project(store, name, "system")
    counts: dict[str, Any] = importing.import_run(store, project_id, folder, run, "system")
    with store.writing() as db:
        tasks = labeling.make_tasks(store, db, project_id, system())
    return {"project": name, **counts, "tasks": tasks}


def system() -> Any:
    """Who acts where no person does."""
    from reward.app.security import Actor

    return Actor("", "system", "", {}, {}, "", "")


def find_project(store: Store, name: str) -> str | None:
    """The id of a project by its name or id; None where there is none."""
    from sqlalchemy import or_, select

    from reward.app.schema import project

    with store.reading() as db:
        found = db.execute(select(project.c.id).where(or_(project.c.id == name, project.c.name == name))).scalar()
    return None if found is None else str(found)


def project_called(store: Store, name: str) -> str:
    """The id of a project by its name or id. Raises UserError where there is none."""
    from sqlalchemy import select

    from reward.app.schema import project

    found = find_project(store, name)
    if found is None:
        with store.reading() as db:
            there = list(db.execute(select(project.c.name).order_by(project.c.name)).scalars())
        raise UserError(f"no project {name!r}, --project. There are: {', '.join(there) or 'none yet'}")
    return found
