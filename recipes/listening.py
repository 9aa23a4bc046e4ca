"""A server of this process: a socket, an address, and how uvicorn is set. Shared by recipes, no command; it imports nothing heavy."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from base_model.errors import UserError


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises UserError where the address is taken or not of this machine."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sends at once what it knows to be TCP; else each answer waits 40 ms for an acknowledgement
    except OSError as error:
        raise UserError(f"no address of this machine, --host {host}: {error.strerror or error}. Give one") from error
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(256)
        except OSError as error:
            raise UserError(f"cannot listen on {address(host, port)}: {error.strerror or error}. Choose another --port or --host") from error
        yield listener


def address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def uvicorn_config(app: Any, stop_seconds: int, connections: int, *, proxies: Sequence[str] = ()) -> Any:
    """Quiet, without websockets. connections: open at once; more are told to come back. proxies: whose word on who asks, and how, is believed; nobody's by default."""
    return uvicorn().Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        server_header=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=stop_seconds,
    )


def uvicorn() -> Any:
    """The package. Raises UserError where it, or what the servers are made of, is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name!r}, which is not installed. pip install 'rushes[judges]'") from error
    return uvicorn
