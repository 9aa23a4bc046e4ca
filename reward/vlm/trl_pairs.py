"""The same model and the same pairs for `trl.RewardTrainer`: plain Bradley-Terry, one dimension, no ties.

    parts = trl_parts(model, "overall", videos, prompts, pairs, fps)
    RewardTrainer(parts.model, RewardConfig(..., remove_unused_columns=False), train_dataset=parts.dataset, data_collator=parts.collate,
                  processing_class=model.base.tokenizer).train()

trl knows text alone: it wants token columns that are not used here, a model with one label, and a batch with the chosen clips first. Rankings, ties, several
dimensions and held-out choice of the weights are what `rushes vlm-reward` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from reward.vlm.model import VlmReward


class TrlParts(NamedTuple):
    """What trl's RewardTrainer is given."""

    model: Any  # a PreTrainedModel around the reward; what trl trains is the reward itself
    dataset: Any  # datasets.Dataset, a row a pair
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def trl_parts(
    model: VlmReward, dim: str, videos: Sequence[Tensor] | Tensor, prompts: Sequence[str], pairs: Sequence[tuple[int, int]], fps: Sequence[float]
) -> TrlParts:
    """Clips with their prompts and rates, and pairs (better, worse) of their numbers -> what trl's RewardTrainer takes to learn dimension `dim` from them."""
    from datasets import Dataset

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        clips = [row[side] for side in ("better", "worse") for row in rows]
        return model.inputs([videos[c] for c in clips], [prompts[c] for c in clips], [fps[c] for c in clips])

    better, worse = zip(*pairs, strict=True)
    unused = [[0]] * len(pairs)
    dataset = Dataset.from_dict({"better": better, "worse": worse, "chosen_ids": unused, "rejected_ids": unused})
    return TrlParts(_pretrained(model, model.dims.index(dim)), dataset, collate)


def _pretrained(model: VlmReward, dim: int) -> Any:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    class OneScore(PreTrainedModel):
        """One dimension's score as the logit of a model with one label."""

        def __init__(self) -> None:
            super().__init__(PreTrainedConfig(num_labels=1))
            self.reward = model

        def forward(self, use_cache: bool = False, **inputs: Tensor) -> Any:
            return SequenceClassifierOutput(logits=self.reward.read(inputs).mean[:, dim, None])  # [2B,1]

    return OneScore()
