"""Which family reads a checkpoint: the folder says so."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from base_model.errors import UserError
from base_model.families.cogvideox import CogVideoXVideoModel
from base_model.families.hunyuan_video import HunyuanVideoModel
from base_model.families.loading import MODULES, NAMES, load_family
from base_model.families.ltx import LTXVideoModel
from base_model.families.mochi import MochiVideoModel
from base_model.families.wan import WanVideoModel
from base_model.families.wan_image import WanImageVideoModel
from tests.base_model.families import tiny_cogvideox, tiny_hunyuan_video, tiny_ltx, tiny_mochi, tiny_wan

CPU = torch.device("cpu")


def index(folder: Path, named: str) -> str:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": named}))
    return str(folder)


class Saved(NamedTuple):
    make: Callable[[], Any]
    kind: type
    text: tuple[int, ...]  # shape of one prompt's states


SAVED = {
    "WanPipeline": Saved(tiny_wan.text_to_video, WanVideoModel, (1, 512, 16)),
    "WanImageToVideoPipeline": Saved(tiny_wan.image_to_video, WanImageVideoModel, (1, 512, 16)),
    "LTXPipeline": Saved(tiny_ltx.tiny_pipeline, LTXVideoModel, (1, 128, 32)),
    "MochiPipeline": Saved(tiny_mochi.tiny_pipeline, MochiVideoModel, (1, 256, 32)),
    "CogVideoXPipeline": Saved(tiny_cogvideox.tiny_pipeline, CogVideoXVideoModel, (1, 12, 16)),
    "HunyuanVideoPipeline": Saved(tiny_hunyuan_video.tiny_pipeline, HunyuanVideoModel, (1, 256, 16)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {named: tmp_path_factory.mktemp(named) for named in SAVED}
    for named, folder in made.items():
        SAVED[named].make().save_pretrained(folder)
    return made


def refused(source: str, match: str) -> None:
    """In one line."""
    with pytest.raises(UserError, match=match) as raised:
        load_family(source, device=CPU, dtype=torch.float32)
    assert "\n" not in str(raised.value)


def test_every_saved_pipeline_is_read_by_its_own_family(folders: dict[str, Path]) -> None:
    assert SAVED.keys() == MODULES.keys()
    for named, folder in folders.items():
        model = load_family(str(folder), device=CPU, dtype=torch.float32)
        assert type(model) is SAVED[named].kind and model.encode_text(["a red ball"]).text.shape == SAVED[named].text


@pytest.mark.parametrize("other", SAVED)
def test_a_folder_under_the_class_of_another_family_is_refused(folders: dict[str, Path], other: str, tmp_path: Path) -> None:
    for named, folder in folders.items():
        if MODULES[named] == MODULES[other]:
            continue
        copy = Path(shutil.copytree(folder, tmp_path / named))
        file = copy / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": other}))
        network = json.loads((copy / "transformer" / "config.json").read_text())["_class_name"]
        refused(str(copy), rf"holds a {network}, no \w+Transformer3DModel|is sampled with \w+, whose grid is not known")


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
    refused("wan2.1-13b", r"no folder wan2.1-13b.* Did you mean wan2.1-1.3b\? There are: wan2.1-1.3b, .*hunyuan-video")
    refused(index(tmp_path, "LTXPipelines"), r"holds a LTXPipelines, .*Did you mean LTXPipeline\? There are: WanPipeline, ")


def test_an_index_that_is_missing_damaged_or_silent_is_said(tmp_path: Path) -> None:
    refused(str(tmp_path), "cannot read the index of a diffusers checkpoint")
    for content, match in (("{", "cannot read the index"), ("[]", "index of a diffusers checkpoint"), ("{}", "holds a None, which no family reads")):
        (tmp_path / "model_index.json").write_text(content)
        refused(str(tmp_path), match)


def test_a_name_on_the_hub_that_is_not_at_hand_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    refused("nobody/has-this", r"^no checkpoint nobody/has-this \(.*\)\. Give a folder")  # offline, as all tests are
    response = SimpleNamespace(headers={}, request=None)
    for error in (GatedRepoError, RepositoryNotFoundError):

        def stopped(source: str, name: str, kind: Any = error) -> str:
            raise kind("Cannot access it.\nAccess is restricted.\nPlease log in.", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", stopped)
        refused("owner/gated", r"^no checkpoint owner/gated \(Cannot access it\.\)\. .*for a gated model, log in and agree to its terms")


def test_a_tokenizer_that_is_a_sentencepiece_file_alone_is_read_as_sentencepiece_reads_it(tmp_path: Path) -> None:
    import sentencepiece

    lines = ["a red ball rolls to the left", "a blue cube stops", "two red circles move slowly and then stop", "the rain falls on the cat"] * 5
    told = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # T5's
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=told, vocab_size=50, hard_vocab_limit=False, minloglevel=2, **ids)
    pipeline = tiny_ltx.tiny_pipeline()
    pipeline.text_encoder.resize_token_embeddings(64)
    pipeline.save_pretrained(tmp_path)
    for file in (tmp_path / "tokenizer").iterdir():
        file.unlink()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(told.getvalue())

    model, pieces = load_family(str(tmp_path), device=CPU, dtype=torch.float32), sentencepiece.SentencePieceProcessor(model_proto=told.getvalue())
    prompts = ["a red cat", "the ball stops slowly"]
    found = model.tokenizer(prompts).input_ids
    assert found == [[*pieces.encode(prompt), pieces.eos_id()] for prompt in prompts] and len({*found[0], *found[1]}) > 6
    assert model.encode_text(prompts).mask.sum(1).tolist() == [len(tokens) for tokens in found]
