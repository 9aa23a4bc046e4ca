"""Ways to the bytes of clips: a file of this machine, an address, a part of a tar file, bytes that a row holds. Nothing is read before it is asked for.

http and https are read by httpx (fsspec would need a package more), every other address by fsspec.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol, cast

from base_model.errors import UserError

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Opener(Protocol):
    """A way to a clip's bytes, which costs nothing until it is taken."""

    @property
    def path(self) -> Path | None:
        """The file on this machine that is the clip and nothing else, if there is one."""
        ...

    def open(self) -> BufferedReader:
        """Raises UserError or OSError."""
        ...


@dataclass(frozen=True)
class OnDisk:
    """A file of this machine."""

    path: Path

    def open(self) -> BufferedReader:
        return open(self.path, "rb")


@dataclass(frozen=True)
class AtAddress:
    """What lies at an address."""

    url: str
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        return open_address(self.url)


@dataclass(frozen=True)
class Within:
    """A part of a tar file that is not packed."""

    tar: str
    offset: int
    size: int
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        whole = open_place(self.tar)
        whole.seek(self.offset)
        return io.BufferedReader(_Part(whole, self.size))


@dataclass(frozen=True)
class Held:
    """Bytes that a row holds."""

    content: bytes = field(repr=False)
    path: None = field(default=None, init=False)

    def open(self) -> BufferedReader:
        return io.BufferedReader(cast(io.RawIOBase, io.BytesIO(self.content)))


class _Part(io.RawIOBase):
    """So many of a file's next bytes."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        read = self._file.read(min(len(buffer), self._left))
        buffer[: len(read)] = read
        self._left -= len(read)
        return len(read)

    def close(self) -> None:
        self._file.close()
        super().close()


class _Body(io.RawIOBase):
    """An answer's body as it comes."""

    def __init__(self, url: str) -> None:
        self._open = contextlib.ExitStack()
        import httpx2

        from reward.judges.exchange import is_loopback

        client = httpx2.Client(follow_redirects=True, timeout=60, trust_env=not is_loopback(httpx2.URL(url).host))  # a proxy is no way to this machine
        with contextlib.ExitStack() as stack:
            stack.enter_context(client)
            self._parts = stack.enter_context(client.stream("GET", url)).raise_for_status().iter_bytes(1 << 20)
            self._open = stack.pop_all()
        self._held = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._held:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._held = part
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._open.close()
        super().close()


def is_address(place: str) -> bool:
    """Whether it is no path of this machine but an address, as fsspec writes them."""
    return ADDRESS.match(place) is not None


def open_address(url: str) -> BufferedReader:
    """Its bytes, one after another. Raises UserError."""
    try:
        if url.lower().startswith(("http://", "https://")):
            return io.BufferedReader(_Body(url))
        import fsspec  # type: ignore[import-untyped]

        return io.BufferedReader(fsspec.open(url, "rb").open())
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be fetched: {one_line(error)}, {url}. Check the address and the connection") from error


def open_place(place: str) -> BufferedReader:
    """A file of this machine, or what lies at an address. Raises UserError."""
    if is_address(place):
        return open_address(place)
    try:
        return open(place, "rb")
    except OSError as error:
        raise UserError(f"cannot read {place}: {error.strerror}. Check the path") from error


@contextlib.contextmanager
def on_disk(opener: Opener, folder: Path) -> Iterator[Path]:
    """The clip as a file of this machine, fetched into `folder` as long as it is needed. Raises UserError where it cannot be had."""
    if opener.path is not None:
        yield opener.path
        return
    with tempfile.NamedTemporaryFile(dir=folder, prefix="fetched-") as file:
        fetch(opener, file)
        file.flush()
        yield Path(file.name)


def fetch(opener: Opener, to: Any) -> None:
    """Writes a clip's bytes to an open file. Raises UserError where they cannot be had."""
    try:
        with opener.open() as file:
            while part := file.read(1 << 20):
                to.write(part)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot be fetched: {error.strerror or one_line(error)}, {opener}. Check the place, and the room on the disk") from error
    except Exception as error:  # every file system raises its own
        raise UserError(f"cannot be fetched: {one_line(error)}, {opener}. Check the connection") from error


def one_line(error: BaseException) -> str:
    """What an error says, in short."""
    told = str(error).strip().splitlines()
    return told[0][:200] if told else type(error).__name__
