"""What the language model reads: the clip, a rubric for each reward dimension, the prompt, and one token a dimension at which its score is read.

Under causal attention a token knows only what stands before it. So a dimension that must not depend on the prompt (`sees_prompt=False`) has its token before
the prompt, the others after it (VideoReward, arXiv 2501.13918, "separate tokens"). What stands after the last token changes nothing and is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from base_model.errors import UserError
from base_model.prompts.vision import OPENING, PROMPT, SPECIAL, Patches, video_text


@dataclass(frozen=True)
class Dimension:
    """One reward dimension: what it is called, what the model is told about it, and whether its score may depend on the prompt."""

    name: str
    rubric: str = ""
    sees_prompt: bool = True

    def __post_init__(self) -> None:
        if not re.search(r"\w", self.name):
            raise UserError(f"a reward dimension cannot be called {self.name!r}. Give it a name with a letter or a digit")

    @property
    def token(self) -> str:
        """<|visual_quality_reward|> for "visual quality"."""
        word = re.sub(r"\W+", "_", self.name)
        return f"<|{word}_reward|>"


def rubric_of(dimensions: Sequence[Dimension]) -> str:
    """The text after the clip, with `{prompt}` where the prompt goes: first the dimensions that must not see it."""
    blind, seeing = ([d for d in dimensions if d.sees_prompt is sees] for sees in (False, True))
    asked = [f"The prompt it was made for: {PROMPT}\n"] if seeing else []
    return "\n".join(["Judge this generated video.\n", *map(_section, blind), *asked, *map(_section, seeing)])


def _section(dimension: Dimension) -> str:
    label = dimension.name.replace("_", " ")
    return f"{label}: {dimension.rubric}\nRating of {label}: {dimension.token}\n" if dimension.rubric else f"Rating of {label}: {dimension.token}\n"


def check_rubric(rubric: str, tokens: Sequence[str]) -> None:
    """Raises UserError unless each token stands in the rubric once, no other special token does, and the prompt at most once."""
    foreign = sorted(set(SPECIAL.findall(rubric)) - set(tokens))
    if foreign:
        raise UserError(f"the rubric holds {foreign[0]}, which means something else to the model. Take it out of the rubric")
    for mark, least in ((PROMPT, 0), *((token, 1) for token in tokens)):
        if not least <= rubric.count(mark) <= 1:
            raise UserError(f"the rubric holds {mark} {rubric.count(mark)} times, where it belongs once. Mend the rubric")


def chat_text(rubric: str, tokens: Sequence[str], clip: Patches, merge: int, *, timestamps: bool) -> str:
    """The whole text of one clip, up to the last dimension's token, `{prompt}` still in it.

    timestamps: every temporal patch stands alone behind its time, as Qwen3-VL was trained, instead of all in one block.
    """
    end = max(rubric.index(token) + len(token) for token in tokens)
    return OPENING + video_text(clip, merge, timestamps=timestamps) + rubric[:end]
