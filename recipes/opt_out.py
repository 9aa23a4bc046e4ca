"""Clips that must not be used, by hash: what people asked to be left out, or must be.

A file of lines, each the sha256 of a file (one word of 64 hexadecimal digits) or perceptual hashes over time (`base_model/video/hashes.py`: the words of the column `hashes` of the
table, or their first 16 digits). Lists of before hold words of 64 digits; one that stands alone is a sha256, so that of a single picture stands twice. Empty lines and those that
begin with # say nothing. Copies that were encoded again, cropped or cut are found by the second kind only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from base_model.errors import UserError
from base_model.video.hashes import NEAR_BITS, clips_apart, moments, near_duplicates

SHA256, HASH = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}([0-9a-f]{48}|[0-9a-f]{176})?")


class OptOut(NamedTuple):
    """What a file of them says."""

    files: frozenset[str] = frozenset()  # sha256
    clips: tuple[tuple[str, ...], ...] = ()  # perceptual hashes

    def rows(self, files: Sequence[str | None], hashes: Sequence[Sequence[str]]) -> list[bool]:
        """Which of N clips are meant, by the sha256 of their files or their perceptual hashes."""
        found = [file in self.files for file in files]
        if self.clips:
            looks, first = [moments(each) for each in self.clips], len(self.clips)
            for row, _, _ in near_duplicates([*self.clips, *(tuple(each) for each in hashes)]):  # whatever is near one of these is near something earlier
                if row >= first and not found[row - first]:
                    clip = moments(hashes[row - first])
                    found[row - first] = any(clips_apart(look, clip, 2 * NEAR_BITS) <= NEAR_BITS for look in looks)
        return found


NOBODY = OptOut()


def load_opt_out(path: Path) -> OptOut:
    """Raises UserError, naming the line, where one is neither."""
    files, clips = set[str](), list[tuple[str, ...]]()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list of clips that must not be used, {path}: {getattr(error, 'strerror', None) or 'not UTF-8'}. Check the path") from error
    for number, line in enumerate(lines, 1):
        words = tuple(line.strip().lower().split())
        if not words or words[0].startswith("#"):
            continue
        if len(words) == 1 and SHA256.fullmatch(words[0]):
            files.add(words[0])
        elif all(HASH.fullmatch(word) for word in words) and len({len(word) for word in words}) == 1:
            clips.append(words)
        else:
            raise UserError(f"line {number} is neither a sha256 nor perceptual hashes, {path}. Write 64 hexadecimal digits, or several words of 16, 64 or 192")
    return OptOut(frozenset(files), tuple(clips))
