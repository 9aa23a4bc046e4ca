"""The formats by name: who reads them, who writes them, where they come from and under which licence."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from base_model.errors import UserError
from reward.comparisons import Comparisons
from reward.importers import datapoint, images, kling, label_studio, safesora, tiger, trl, visionreward
from reward.importers.reading import Imported, Origin
from reward.importers.writing import Exported


class Reader(Protocol):
    """Reads a file; `media` is the folder its paths begin in, `source` and `licence` are what the answers say of themselves."""

    def __call__(self, path: Path, *, media: Path | None = None, source: str = ..., licence: str = ...) -> Imported: ...


class Format(NamedTuple):
    """How a format is read, and written where it is."""

    origin: Origin
    read: Reader
    write: Callable[[Comparisons, Path], Exported] | None = None
    benchmark: bool = False
    """Whether the data were made to test on."""


FORMATS = {
    format.origin.name: format
    for format in (
        Format(kling.VIDEOGEN, kling.read_videogen, benchmark=True),
        Format(kling.VIDEOALIGN, kling.read_videoalign, kling.write_videoalign),
        Format(safesora.SAFESORA, safesora.read_safesora),
        Format(safesora.LABEL, safesora.read_safesora_label),
        Format(tiger.VIDEOFEEDBACK, tiger.read_videofeedback),
        Format(tiger.GENAI, tiger.read_genai_bench, benchmark=True),
        Format(visionreward.TRAIN, visionreward.read_visionreward_train),
        Format(visionreward.PAIRS, visionreward.read_visionreward_pairs),
        Format(images.PICKAPIC, images.read_pickapic),
        Format(images.RANKINGS, images.read_pickapic_rankings),
        Format(images.HPD_TRAIN, images.read_hpdv2_train),
        Format(images.HPD_TEST, images.read_hpdv2_test, benchmark=True),
        Format(datapoint.MOTION, datapoint.read_datapoint_motion),
        Format(label_studio.LABEL_STUDIO, label_studio.read_label_studio, label_studio.write_label_studio),
        Format(trl.TRL, trl.read_trl, trl.write_trl),
    )
}


def format_called(name: str, known: Iterable[str]) -> str:
    """The name, where it is known. Raises UserError that names the nearest."""
    names = list(known)
    if name not in names:
        raise UserError(f"unknown format {name!r}. Did you mean {difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]}? There are: {', '.join(names)}")
    return name
