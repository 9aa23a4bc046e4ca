"""Which family reads a checkpoint: the folder says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from base_model.errors import UserError
from base_model.families.loading import MODULES, NAMES, load_family
from base_model.families.wan import WanVideoModel
from tests.base_model.families import tiny_wan

CPU = torch.device("cpu")


def index(folder: Path, named: str) -> str:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": named}))
    return str(folder)


def test_a_saved_pipeline_is_read_by_its_own_family(tmp_path: Path) -> None:
    tiny_wan.text_to_video().save_pretrained(tmp_path)
    model = load_family(str(tmp_path), device=CPU, dtype=torch.float32)
    assert isinstance(model, WanVideoModel) and model.encode_text(["a red ball"]).text.shape == (1, 512, 16)


@pytest.mark.parametrize(("named", "module"), MODULES.items())
def test_every_class_of_pipeline_leads_to_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str, module: str) -> None:
    asked: list[tuple[str, Any]] = []
    stand_in: Any = ModuleType(module)
    stand_in.load = lambda source, *, device, dtype: asked.append((source, dtype))
    monkeypatch.setitem(sys.modules, f"base_model.families.{module}", stand_in)
    load_family(index(tmp_path, named), device=CPU, dtype=torch.bfloat16)
    assert asked == [(str(tmp_path), torch.bfloat16)]


def test_short_names_are_names_on_the_hub_of_families_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    assert all(name == name.lower() and hub.count("/") == 1 for name, hub in NAMES.items()) and len(set(NAMES.values())) == len(NAMES)
    assert all(hasattr(diffusers, named) for named in MODULES)
    asked: list[str] = []
    monkeypatch.setattr("base_model.families.loading.read_index", lambda source: asked.append(source) or {"_class_name": "none"})
    with pytest.raises(UserError, match=r"wan2\.1-14b holds a none"):
        load_family("wan2.1-14b", device=CPU, dtype=torch.float32)
    assert asked == ["Wan-AI/Wan2.1-T2V-14B-Diffusers"]


def test_what_is_none_of_them_is_said_with_the_nearest_name(tmp_path: Path) -> None:
    def refused(source: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as raised:
            load_family(source, device=CPU, dtype=torch.float32)
        assert "\n" not in str(raised.value)

    refused("wan2.1-13b", r"no folder wan2.1-13b.* Did you mean wan2.1-1.3b\? There are: wan2.1-1.3b, .*hunyuan-video")
    refused(index(tmp_path, "LTXPipelines"), r"holds a LTXPipelines, .*Did you mean LTXPipeline\? There are: WanPipeline, ")
    (tmp_path / "model_index.json").unlink()
    refused(str(tmp_path), "cannot read the index of a diffusers checkpoint")
    refused("nobody/has-this", "no checkpoint nobody/has-this")
