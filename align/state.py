"""Nested state (what `state_dict` returns) <-> JSON and tensors, exactly and without pickle.

    flatten({"step": 3, "m": tensor}) -> ({"dict": [["step", 3], ["m", {"tensor": "0"}]]}, {"0": tensor})

Floats keep every bit, tuples stay tuples, keys keep their type, numpy arrays come back as numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flatten(tree: object, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> tuple[Any, dict[str, Tensor]]:
    """(JSON skeleton, {number: tensor}). gather: what is kept of a tensor. Raises TypeError, naming the place, for anything that is neither data nor a tensor."""
    tensors: dict[str, Tensor] = {}
    return _encode(tree, tensors, "state", gather), tensors


def unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`; every tensor gets memory of its own."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, value),) = skeleton.items()
    if kind == "tensor":
        return tensors[value].clone()
    if kind == "array":
        return tensors[value].numpy().copy()
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value}
    items = [unflatten(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _encode(tree: object, tensors: dict[str, Tensor], place: str, gather: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor | np.ndarray):
        name = str(len(tensors))
        tensors[name] = gather(tree.detach()) if isinstance(tree, Tensor) else torch.from_numpy(tree.copy())
        return {"tensor" if isinstance(tree, Tensor) else "array": name}
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": str(tree)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, Mapping):
        return {"dict": [[_encode(key, tensors, place, gather), _encode(item, tensors, f"{place}[{key!r}]", gather)] for key, item in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"tuple" if isinstance(tree, tuple) else "list": [_encode(item, tensors, f"{place}[{index}]", gather) for index, item in enumerate(tree)]}
    raise TypeError(f"{place} is a {type(tree).__name__}; a checkpoint keeps tensors, arrays, numbers, text, lists, tuples and mappings")
