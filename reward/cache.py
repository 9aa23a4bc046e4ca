"""Features of clips and prompts, kept by what they are features of: encoded once, read ever after.

    folder/<sha256 of the file>.safetensors    {key: tensor} of a few clips or prompts; never rewritten

A key says the content (a clip's hash or a prompt), the encoder and its revision, the sampler and the dtype: what differs in any of these is encoded anew. A file's name is the
hash of its bytes, so several processes write into one folder without asking each other, and a damaged file is known when it is first read: it is deleted, and what it held is
encoded again. Files appear whole or not at all; a process that is killed loses the batch it was at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from base_model.checkpoint import atomic_write, check_can_write, check_is_safetensors, weights_bytes
from base_model.errors import UserError
from reward.encoders import Encoder, Sampler

NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


def feature_key(kind: str, content: str, encoder: str, sampler: Sampler | None, dtype: str) -> str:
    """sha256 of what decides a feature. kind: "clip" (content is its hash) or "text" (content is the prompt; no sampler)."""
    told = {"kind": kind, "content": content, "encoder": encoder, "sampler": None if sampler is None else [sampler.frames, sampler.fps], "dtype": dtype}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """The features in `folder`, made when the first ones arrive. `hits` and `misses` count the keys asked for, `damaged` the files deleted.

    Raises UserError where the folder cannot be written. Files of other names in it are left alone.
    """

    def __init__(self, folder: Path) -> None:
        check_can_write(folder, "folder of features")
        self.folder = folder
        self.hits = self.misses = self.damaged = 0
        self._held: dict[str, set[Path]] = {}  # key -> the files that say they hold it
        self._known: set[Path] = set()  # files whose keys are in `_held`
        self._whole: set[Path] = set()  # files whose bytes are those of their name

    def fetch(self, keys: Sequence[str], make: Callable[[int], Tensor], *, together: int = 16) -> Tensor:
        """The features of the keys, [len(keys),...], at least one. `make(row)` gives those not kept; as many as `together` are written down at once, before the next are made.

        Raises UserError (full disk, no permission): what was kept before stays.
        """
        self._look()
        rows = {key: row for row, key in reversed(list(enumerate(keys)))}  # key -> its first row
        found = self._kept(list(rows))
        missing = sorted(row for key, row in rows.items() if key not in found)
        self.hits, self.misses = self.hits + len(found), self.misses + len(missing)
        for some in (missing[begin : begin + together] for begin in range(0, len(missing), together)):
            made = {keys[row]: make(row).cpu() for row in some}
            self._write(made)
            found.update(made)
        return torch.stack([found[key] for key in keys])

    def _kept(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """What whole files hold of the keys."""
        wanted: dict[Path, list[str]] = {}
        for key in keys:
            path = next((path for path in sorted(self._held.get(key, ())) if self._is_whole(path)), None)
            if path is not None:
                wanted.setdefault(path, []).append(key)
        found: dict[str, Tensor] = {}
        for path, some in wanted.items():
            found.update(self._read(path, some))
        return found

    def _look(self) -> None:
        """Notes the keys of files that are new in the folder."""
        for path in sorted(path for path in self.folder.glob("*.safetensors") if NAME.fullmatch(path.name) and path not in self._known):
            self._known.add(path)
            try:
                check_is_safetensors(path)
                with open(path, "rb") as file:
                    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            except (UserError, OSError):
                self._drop(path)
                continue
            for key in header:
                self._held.setdefault(key, set()).add(path)

    def _is_whole(self, path: Path) -> bool:
        """Whether the file's bytes are those of its name, asked once; it is deleted if they are not."""
        if path not in self._known:
            return False
        if path not in self._whole:
            try:
                with open(path, "rb") as file:
                    whole = hashlib.file_digest(file, "sha256").hexdigest() == path.stem
            except OSError:
                whole = False
            if not whole:
                self._drop(path)
                return False
            self._whole.add(path)
        return True

    def _read(self, path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
        """Nothing where the file has gone since."""
        import safetensors

        try:
            with safetensors.safe_open(path, framework="pt", device="cpu") as file:  # mapped into memory: only what is asked for is read
                return {key: file.get_tensor(key) for key in keys}
        except (OSError, safetensors.SafetensorError):
            self._drop(path)
            return {}

    def _write(self, features: dict[str, Tensor]) -> None:
        content = weights_bytes(features, {})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        atomic_write(path, content)
        self._known.add(path)
        self._whole.add(path)
        for key in features:
            self._held.setdefault(key, set()).add(path)

    def _drop(self, path: Path) -> None:
        self.damaged += 1
        self._known.discard(path)
        for paths in self._held.values():
            paths.discard(path)
        with contextlib.suppress(OSError):
            path.unlink()


# Encoders through it. One clip or prompt at a time, so that a feature has the same bits whatever it is asked for with, and whether it is kept or not.


def clip_tokens(encoder: Encoder, clip_ids: Sequence[str], load: Callable[[str], Tensor], cache: FeatureCache | None) -> Tensor:
    """Tokens of clips [B,N,D] on the CPU. load: the frames [T,3,H,W] of a clip, asked only for those that are not kept."""

    def make(row: int) -> Tensor:
        return encoder.clips(load(clip_ids[row])[None])[0]

    if cache is None:
        return torch.stack([make(row).cpu() for row in range(len(clip_ids))])
    return cache.fetch([feature_key("clip", clip_id, encoder.identity, encoder.sampler, encoder.dtype) for clip_id in clip_ids], make)


def text_features(encoder: Encoder, prompts: Sequence[str], cache: FeatureCache | None) -> Tensor:
    """What an encoder says of prompts, [P,D] on the CPU."""

    def make(row: int) -> Tensor:
        return encoder.texts([prompts[row]])[0]

    if cache is None:
        return torch.stack([make(row).cpu() for row in range(len(prompts))])
    return cache.fetch([feature_key("text", prompt, encoder.identity, None, encoder.dtype) for prompt in prompts], make)
