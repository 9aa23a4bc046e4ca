"""Weights on disk: safetensors and nothing else, written whole or not at all.

A pickle can run code when it is opened, so it is refused by what the file contains, whatever its name says.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from base_model.errors import UserError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
ZIP, TAR_AT_257, HEADER_LIMIT = b"PK\x03\x04", b"ustar", 100_000_000


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """An OSError while writing `path` becomes a UserError of one line; a full disk says so."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(f"the disk is full, while writing {path}. Free some space or choose another --out, then go on with --resume") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose a place you may write to") from error


def check_can_write(folder: Path, option: str = "--out") -> None:
    """Raises UserError where nothing can be written into `folder`, made if need be: before the work, not after it. option: what the user says to choose another."""
    with disk_errors(folder):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"cannot write {folder}: {there} is a file, not a folder. Choose another {option}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"cannot write {folder}: no permission to write into {there}. Choose a place you may write to")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError, calling the file `what` ("the card of the network"), where it is missing, damaged or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"
        raise UserError(f"cannot read {what}, {path}: {reason}. Restore the file or make it again") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {what}, {path}: a {type(value).__name__} where an object belongs. Restore the file or make it again")
    return value


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Writes and fsyncs `path` in place: for files inside a folder that is itself renamed into place."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def atomic_write(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Replaces `path` by `content`: a reader sees the old file or the new one, never half of it. Raises UserError (full disk, no permission).

    sync: waits until the disk has it, so that a power cut takes neither; a kill never does.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            if sync:
                write_synced(partial, content)
            else:
                partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if sync:
            fsync_folder(path.parent)


def weights_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of `tensors`; views and tied tensors are written out in full, each under its own name."""
    import safetensors.torch

    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        storage = flat.untyped_storage().data_ptr()
        own[name] = flat.clone() if storage in seen else flat
        seen.add(storage)
    content = bytes(safetensors.torch.save(own, metadata=dict(metadata) or None))
    return _with_sorted_metadata(content) if len(metadata) > 1 else content


def _with_sorted_metadata(content: bytes) -> bytes:
    """The same file, its metadata in order: the library's order changes from process to process, and equal weights are to be equal files."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes {name: tensor} and string metadata as one safetensors file, atomically. Raises UserError (full disk, no permission)."""
    atomic_write(path, weights_bytes(tensors, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, metadata) of a safetensors file.

    Raises UserError for a missing, truncated or damaged file and for anything pickled (torch.save, zip, pickle), judged by content.
    """
    import safetensors

    check_is_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"damaged weights, {path}: {error}. Make or download the file again") from error


def check_is_safetensors(path: Path) -> None:
    """Raises UserError, saying what the file is instead, unless `path` is a whole safetensors file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(512)
            header = _header(file, start, size)
    except FileNotFoundError as error:
        raise UserError(f"no such weights file, {path}. Check the path, or make the file with the recipe that writes it") from error
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror}. Give a safetensors file that you may read") from error
    if header is None:
        raise UserError(_what_it_is(start, path))
    needed = 8 + struct.unpack("<Q", start[:8])[0] + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size != needed:
        problem = "truncated" if size < needed else "damaged"
        raise UserError(f"{problem} weights, {path}: {size} bytes where its header promises {needed}. Make or download the file again")


def _header(file: BinaryIO, start: bytes, size: int) -> dict[str, dict[str, list[int]]] | None:
    if len(start) < 9 or start[8:9] != b"{":
        return None
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(size - 8, HEADER_LIMIT):
        return None
    file.seek(8)
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError):
        return None
    whole = all(_is_entry(entry) for name, entry in header.items() if name != "__metadata__")
    return header if whole else None


def _is_entry(entry: object) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(offset, int) and offset >= 0 for offset in offsets)


def _what_it_is(start: bytes, path: Path) -> str:
    pickled = start[:4] == ZIP or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or start[257:262] == TAR_AT_257
    if pickled:
        return f"refused to open a pickled checkpoint, {path}: a pickle can run code. Convert it to safetensors where you trust its source (safetensors.torch.save_file)"
    if not start:
        return f"empty weights file, {path}. Make or download the file again"
    if start[8:9] == b"{":
        return f"truncated or damaged weights, {path}: its header is cut short or makes no sense. Make or download the file again"
    return f"not a safetensors file, {path}. Weights are read from safetensors only"


def check_runs_no_code(folder: Path) -> None:
    """Raises UserError where a published model in `folder` asks for code of its own to be run (`auto_map` of any configuration), or is an adapter, which leads elsewhere.

    Loaders are told not to run such code anyway; a folder that asks for it is not what it says it is.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name == "adapter_config.json":
            raise UserError(f"the folder holds an adapter and not a whole model, {path}. Give the model itself, or merge the adapter into it")
        if path.name.endswith("config.json") and _names_code(read_json(path, "the model's configuration")):
            raise UserError(f"the model asks for code of its own to be run (auto_map), {path}. Only classes of transformers are loaded: give a checkpoint of one of them")


def _names_code(value: Any) -> bool:
    """Whether `auto_map` stands anywhere in it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, dict) and "auto_map" in value) or any(_names_code(part) for part in parts)


def fingerprint(network: nn.Module) -> str:
    """sha256 of the names, shapes and 64 values of every parameter: tells two revisions of a model apart in a moment, whatever folder they are in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(network.named_parameters()):
        values = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[:: max(1, len(values) // 64)][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()
