"""What supervised training reads: captioned clips as latents and states of captions; and the one way to ask a model about clips of any size. Shared by recipes, no command."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from base_model.families.wan import WanVideoModel
from base_model.families.wan_experts import Experts
from base_model.families.wan_image import WanImageVideoModel
from base_model.families.wan_packed import PackedWan, packed_velocity
from base_model.networks.packing import pack, unpack
from base_model.prompts.conditions import Canvas, give_frames
from base_model.tiny import LatentVideoModel, packed_text
from base_model.types import ClipShape, Conditioning, TrainableModel
from recipes.models import with_canvases

Shape = tuple[int, int, int, int]
"""[C,F,H,W] of a clip's latents."""


class Examples(Protocol):
    """N captioned clips. Sizes and captions are known without reading any; everything else is read when it is asked for, and is on the CPU."""

    @property
    def texts(self) -> Sequence[str]: ...
    @property
    def shapes(self) -> Sequence[Shape]: ...
    @property
    def sources(self) -> Sequence[str]:
        """Which file each is from: examples of one file are never on both sides of a split."""
        ...

    def __len__(self) -> int: ...
    def latent(self, row: int) -> Tensor:
        """[C,F,H,W], float32."""
        ...

    def cond(self, row: int | None) -> Conditioning:
        """Its caption, 1; of None, the empty prompt."""
        ...

    def video(self, row: int) -> Tensor:
        """Its pixels, uint8 [T,3,H,W]: what visual prompts are cut from."""
        ...


def num_tokens(shape: Shape, patch: tuple[int, int, int]) -> int:
    """Tokens of latents of that shape."""
    return math.prod(side // by for side, by in zip(shape[1:], patch, strict=True))


class Velocities:
    """Asks a model about clips of any sizes, each with its own time and condition: in one sequence where its network packs (the built-in one, Wan), else one pass a shape.

    network: what is called, and what forward passes are counted at. Texts must be of one length where clips of a shape are asked about together.
    packs: whether Wan's does; one pass a shape is what diffusers can spread over processes.
    """

    def __init__(self, model: TrainableModel, *, packs: bool = True) -> None:
        self.model = model
        self.wan = PackedWan(model.network) if packs and isinstance(model, WanVideoModel) and not _two_experts(model.network) else None
        self.network: nn.Module = self.wan or model.network

    @property
    def packs(self) -> bool:
        """Whether clips of different shapes share a pass."""
        return self.wan is not None or isinstance(self.model, LatentVideoModel)

    @property
    def from_image(self) -> bool:
        """Whether the model makes no clip without an image."""
        return isinstance(self.model, WanImageVideoModel)

    def learned(self, cond: Conditioning) -> Tensor | None:
        """Which latents of a clip its error is a mean over, bool [1,1,F,H,W]; None for all. What a visual prompt gives is not made; Wan from an image makes it again."""
        return None if cond.known is None or self.from_image else ~cond.known.mask[:, None]

    def __call__(self, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
        """x_t: S clips [C,F,H,W]; t [S]; conds: one clip each -> u [C,F,H,W] of each, float32."""
        if self.wan is not None and isinstance(self.model, WanVideoModel):
            return packed_velocity(self.wan, self.model, x_t, t, conds)
        if isinstance(self.model, LatentVideoModel) and all(cond.known is None for cond in conds):
            return _packed_tiny(self.model, x_t, t, conds)
        return _by_shape(self.model, x_t, t, conds)


def _two_experts(network: Any) -> bool:
    return isinstance(network.get_base_model() if hasattr(network, "get_base_model") else network, Experts)


def _packed_tiny(model: LatentVideoModel, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
    packed = pack(x_t, model.patch)  # tokens [N,c]
    u = model.network(packed.tokens, packed.positions.to(t.device), packed.segments, t, *packed_text(together(conds)))  # [N,c]
    return unpack(u, x_t, model.patch)


def _by_shape(model: TrainableModel, x_t: Sequence[Tensor], t: Tensor, conds: Sequence[Conditioning]) -> list[Tensor]:
    rows: dict[torch.Size, list[int]] = {}
    for k, x in enumerate(x_t):
        rows.setdefault(x.shape, []).append(k)
    found: dict[int, Tensor] = {}
    for some in rows.values():
        found.update(zip(some, model(torch.stack([x_t[k] for k in some]), t[some], together([conds[k] for k in some])), strict=True))
    return [found[k] for k in range(len(x_t))]


def together(conds: Sequence[Conditioning]) -> Conditioning:
    """Conditions of one clip each as one of S."""
    first, *others = conds
    for other in others:
        first = first.followed_by(other)
    return first


class Through:
    """Other examples as they are: what shows them in another way says only that way."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    @property
    def texts(self) -> Sequence[str]:
        return self.examples.texts

    @property
    def shapes(self) -> Sequence[Shape]:
        return self.examples.shapes

    @property
    def sources(self) -> Sequence[str]:
        return self.examples.sources

    def __len__(self) -> int:
        return len(self.examples)

    def latent(self, row: int) -> Tensor:
        return self.examples.latent(row)

    def cond(self, row: int | None) -> Conditioning:
        return self.examples.cond(row)

    def video(self, row: int) -> Tensor:
        return self.examples.video(row)


class Ahead(Through):
    """The same examples, read by a thread of its own before they are asked for. `waited`: seconds that somebody had to wait for one all the same."""

    def __init__(self, examples: Examples) -> None:
        super().__init__(examples)
        self.waited = 0.0
        self._reader = ThreadPoolExecutor(1, "reader")
        self._begun: dict[int, Future[tuple[Tensor, Conditioning]]] = {}

    def begin(self, rows: Iterable[int]) -> None:
        """Reads these, and keeps no others."""
        wanted = dict.fromkeys(rows)
        self._begun = {row: self._begun.get(row) or self._reader.submit(self._read, row) for row in wanted}

    def _read(self, row: int) -> tuple[Tensor, Conditioning]:
        return self.examples.latent(row), self.examples.cond(row)

    def _fetch(self, row: int) -> tuple[Tensor, Conditioning]:
        begun = time.monotonic()
        future = self._begun.get(row)
        found = self._read(row) if future is None else future.result()
        self.waited += time.monotonic() - begun
        return found

    def latent(self, row: int) -> Tensor:
        return self._fetch(row)[0]

    def cond(self, row: int | None) -> Conditioning:
        return self.examples.cond(None) if row is None else self._fetch(row)[1]


class FromImages(Through):
    """The same examples, each told its own first frame: what a model asks that makes clips from an image."""

    def __init__(self, examples: Examples, model: TrainableModel) -> None:
        super().__init__(examples)
        self.model = model

    def cond(self, row: int | None) -> Conditioning:
        """Raises ValueError for the empty prompt, which is of no clip."""
        if row is None:
            raise ValueError("an image is of a clip, and the empty prompt of none")
        video = self.video(row).float() / 255  # [T,3,H,W]
        canvas = give_frames(ClipShape(len(video), *video.shape[-2:]), {0: video[:1]})
        return with_canvases(self.model, self.examples.cond(row).to(self.model.device), [Canvas(*(part.to(self.model.device) for part in canvas))])
