"""The app as a whole: pages and their JSON twins, errors, headers, static files.

A *view* is one function that returns a model: `GET /api/PATH` gives it as JSON, `GET /PATH` as a page. An *action* is one function that takes a model as JSON: `POST
/api/PATH`; forms of the pages
send JSON, too (htmx). So the API can do whatever the pages can, and both have one rule.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import jinja2
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel
from sqlalchemy.exc import DataError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from base_model.errors import UserError
from reward.app.access import ANYBODY, PUBLIC, actor_of, may
from reward.app.security import BODY_BYTES, HEADERS, Actor, Denied, RateLimits, check_origin
from reward.app.store import Store, is_alive
from reward.app.texts import check_body
from reward.safety.policy import load_policy

HERE = Path(__file__).parent
STATIC = HERE / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2"}
F = TypeVar("F", bound=Callable[..., Any])


class Done(BaseModel):
    """What an action answers. go: where a page goes next."""

    done: str
    go: str | None = None


class Pages:
    """Routes of one room of the app."""

    def __init__(self, tag: str) -> None:
        self.router = APIRouter()
        self._tag = tag

    def view(self, path: str, template: str) -> Callable[[F], F]:
        """Registers `GET path` as a page and `GET /api{path}` as JSON."""

        def register(function: F) -> F:
            self.router.get(f"/api{path}", tags=[self._tag], name=f"api_{function.__name__}")(function)

            def page(request: Request, told: Any = Depends(function)) -> Response:
                return told if isinstance(told, Response) else render(request, template, told)

            self.router.get(path, response_class=HTMLResponse, include_in_schema=False, name=function.__name__)(page)
            return function

        return register

    def action(self, path: str) -> Callable[[F], F]:
        """Registers `POST /api{path}`. A page that asked through htmx is sent to where the answer's `go` points."""

        def register(function: F) -> F:
            async def answer(request: Request, response: Response, told: Any = Depends(function)) -> Any:
                if isinstance(told, Done) and told.go and request.headers.get("hx-request"):
                    response.headers["HX-Redirect"] = quote(told.go, safe="/*?=&")
                return told

            answer.__doc__ = function.__doc__
            hint = function.__annotations__.get("return")
            self.router.post(f"/api{path}", dependencies=[Depends(check_body)], tags=[self._tag], name=f"do_{function.__name__}", response_model=_model(function, hint))(answer)
            return function

        return register


def _model(function: Callable[..., Any], hint: Any) -> Any:
    """The return type of a function as an object, also where it was written as text."""
    import typing

    found = typing.get_type_hints(function).get("return") if isinstance(hint, str) else hint
    return found if isinstance(found, type) and issubclass(found, BaseModel) else None


# Pages


@cache
def templates() -> jinja2.Environment:
    """Templates in which every text is escaped, and shows what it hides. What a form sends back as it was (values of fields and options) says `| e`, and is escaped only."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    found = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True)
    found.globals.update(static=static_path)
    found.filters.update(visible=visible, when=when, percent=percent)
    return found


def render(request: Request, template: str, told: Any, status: int = 200) -> HTMLResponse:
    """A page of a model: templates see `view` (the model), `me` (the actor or None) and `path`."""
    actor: Actor | None = actor_of(request)
    return HTMLResponse(templates().get_template(template).render(view=told, me=actor, path=request.url.path), status)


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value


def visible(text: str) -> str:
    """Text with what cannot be seen made visible: controls, and marks that turn the direction of writing, take no room or show nothing."""
    return "".join(f"‹U+{ord(c):04X}›" if c in HIDDEN else c for c in text)


def _hidden() -> Iterator[str]:
    """Unicode's Default_Ignorable_Code_Point and categories Cf, Zl, Zp and Cc, without tab and line feed; `static/rank.js` asks the browser for the same."""
    one_by_one = "00AD 034F 061C 06DD 070F 08E2 3164 FEFF FFA0 110BD 110CD"
    ranges = "0000-0008 000B-001F 007F-009F 0600-0605 0890-0891 115F-1160 17B4-17B5 180B-180F 200B-200F 2028-202E 2060-206F FE00-FE0F FFF0-FFFB 13430-1343F 1BCA0-1BCA3 1D173-1D17A"
    for part in f"{one_by_one} {ranges} E0000-E0FFF".split():
        first, _, last = part.partition("-")
        yield from map(chr, range(int(first, 16), int(last or first, 16) + 1))


HIDDEN = frozenset(_hidden())


def when(ms: int | None) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC") if ms is not None else "never"


def percent(share: float | None) -> str:
    return "not measurable yet" if share is None else f"{100 * share:.1f} %"


@cache
def _static_hash(name: str) -> str:
    return hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:16]


def static_path(name: str) -> str:
    """The address of a file of `static/`, with a part of its hash, so that it may be kept for ever."""
    return f"/static/{_static_hash(name)}/{name}"


# The application


@dataclass(frozen=True)
class AppSettings:
    """How the app is reached. hosts: names it is served under. secure: behind TLS. import_roots: folders below which leads may name runs to import."""

    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    secure: bool = False
    import_roots: tuple[Path, ...] = ()


def make_app(store: Store, settings: AppSettings | None = None) -> FastAPI:
    """The ASGI application over an opened store."""
    from reward.app import routes

    settings = settings or AppSettings()
    load_policy()  # it takes half a second, which no request should wait for
    app = FastAPI(title="Rushes", version="1", docs_url=None, redoc_url=None, openapi_url=None, generate_unique_id_function=lambda route: route.name)
    app.state.store, app.state.limits, app.state.settings = store, RateLimits(), settings
    app.state.cookie = "__Host-rushes" if settings.secure else "rushes"
    for room in routes.ROOMS:
        app.router.routes.extend(room.router.routes)
    app.add_api_route("/api/openapi.json", lambda: app.openapi(), include_in_schema=False, dependencies=[Depends(may(*ANYBODY))])
    app.add_api_route("/api/health", health, dependencies=[Depends(PUBLIC)])
    app.add_api_route("/static/{digest}/{name}", static_file, include_in_schema=False, dependencies=[Depends(PUBLIC)])
    for error in (Denied, HTTPException, RequestValidationError, UserError, DataError, OperationalError, TimeoutError):
        app.add_exception_handler(error, _error)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=BODY_BYTES)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts), www_redirect=False)
    app.add_middleware(Guarded)  # around all others, whose answers carry the headers, too
    return app


class Guarded:
    """Puts the headers on every answer, and turns away requests from other sites."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                held = {name for name, _ in message["headers"]}
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items() if name.lower().encode() not in held]
            await send(message)

        if "\0" in scope["path"]:  # PostgreSQL has no text with it: no id is one
            await JSONResponse({"detail": "there is nothing here"}, 404)(scope, receive, with_headers)
            return
        try:
            check_origin(request.method, request.headers, request.headers.get("host", ""))
        except Denied as error:
            await JSONResponse({"detail": str(error)}, error.status)(scope, receive, with_headers)
            return
        await self.app(scope, receive, with_headers)


def health(request: Request) -> Response:
    """Whether the database answers."""
    alive = is_alive(request.app.state.store)
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


def static_file(digest: str, name: str) -> Response:
    """A file of `static/` by its hash; nothing else is there, whatever the name."""
    if name not in {each.name for each in STATIC.iterdir()} or digest != _static_hash(name):
        raise Denied(404, "there is nothing here")
    return Response(
        (STATIC / name).read_bytes(), media_type=TYPES.get(Path(name).suffix, "application/octet-stream"), headers={"Cache-Control": "public, max-age=31536000, immutable"}
    )


def _error(request: Request, error: Exception) -> Response:
    status, reason, headers = _told(error)
    if request.url.path.startswith("/api/") or "text/html" not in request.headers.get("accept", ""):
        return JSONResponse({"detail": reason}, status, headers=headers)
    if status == 401:
        return RedirectResponse("/login", 303)
    return render(request, "error.html", {"status": status, "reason": reason}, status)


def _told(error: Exception) -> tuple[int, str, Mapping[str, str] | None]:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return 422, f"{'.'.join(str(part) for part in first['loc'][1:]) or 'the request'}: {first['msg']}", None
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), error.headers
    if isinstance(error, DataError):
        return 422, "the request holds what cannot be stored: a NUL, or a number that is too large", None
    if isinstance(error, OperationalError | TimeoutError):
        logging.getLogger(__name__).error("the database does not answer", exc_info=error)
        return 503, "the server's database does not answer, or its disk is full. Try again in a moment, and tell whoever runs the server", {"Retry-After": "5"}
    return (error.status if isinstance(error, Denied) else 422), str(error), None


def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": "this is a bug in rushes; the server's log says more"}, 500, headers=HEADERS)  # no middleware sees this answer
