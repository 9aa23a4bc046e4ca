"""Clips are made once, ruled on, and depend on their seed alone."""

import json
from pathlib import Path

import pytest
import torch

from base_model.errors import UserError
from base_model.tiny import save_network
from base_model.types import ClipShape
from base_model.video.store import ClipStore
from recipes import generate
from recipes.filters import Filters
from recipes.generate import Config, Request, Sampler, fill_store, safety_runner, sample, seeded_noise
from recipes.provenance import Export
from tests.recipes.small import save_small_network, small_model
from tests.recipes.test_filters import save_head

SAMPLER = Sampler(steps=2, frames=5, height=16, width=16, batch=3)


def test_a_clip_depends_on_its_seed_and_prompt_not_on_its_batch() -> None:
    model = small_model()
    cond = model.encode_text(["a red circle grows"] * 5)
    in_threes = torch.cat(list(sample(model, cond, [5, 6, 7, 8, 9], SAMPLER)))
    at_once = torch.cat(list(sample(model, cond, [5, 6, 7, 8, 9], SAMPLER.model_copy(update={"batch": 5}))))
    assert in_threes.shape == (5, 5, 3, 16, 16)
    assert (in_threes - at_once).abs().max() < 1e-5
    assert torch.equal(seeded_noise(model, ClipShape(5, 16, 16), [7])[0], seeded_noise(model, ClipShape(5, 16, 16), [6, 7])[1])


def test_what_the_store_holds_is_not_made_again_and_blocked_prompts_are_not_made_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = save_small_network(tmp_path / "network.safetensors")
    cfg = Config(out=tmp_path / "clips", model=network, prompts=("a red circle grows", "a strobe light"), clips_per_prompt=2, sampler=SAMPLER)
    first = generate.main(cfg)
    assert first["blocked_prompts"] == 1
    rows = ClipStore(cfg.out).rows()
    assert len(rows) == 2 and all(row.prompt == "a red circle grows" for row in rows)
    assert all(json.loads(row.safety_json)["verdict"] in ("allow", "review", "block") for row in rows)
    assert all(Path(str(path)).exists() for path in first["clips"])  # type: ignore[attr-defined]

    def never(*_: object) -> None:
        raise AssertionError("a clip was made again")

    monkeypatch.setattr(generate, "sample", never)
    assert generate.main(cfg)["clips"] == first["clips"]


def test_a_killed_run_goes_on_with_the_clips_it_has(tmp_path: Path) -> None:
    model, store = small_model(), ClipStore(tmp_path)
    requests = [Request("a red circle grows", "p", seed) for seed in range(4)]
    fill_store(store, model, requests[:2], lineage="x", sampler=SAMPLER, runner=safety_runner(), preview=False)
    runner = safety_runner()
    rows = fill_store(ClipStore(tmp_path), model, requests, lineage="x", sampler=SAMPLER, runner=runner, preview=False)
    assert [row.seed for row in rows if row] == [0, 1, 2, 3]
    assert runner.counts["clip.checked"] == 2


def test_clips_that_were_there_are_shown_to_filters_that_did_not_rule_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter that blocks everything comes later: what was allowed before is not allowed without its ruling, in the store neither."""
    save_head(tmp_path / "head", limit=0.0001)
    cfg = Config(out=tmp_path / "clips", model=save_small_network(tmp_path / "network.safetensors"), prompts=("a red circle grows",), clips_per_prompt=2, sampler=SAMPLER)
    generate.main(cfg)
    before = ClipStore(cfg.out).rows()
    assert not any("head-latent" in row.safety_json for row in before)
    more = cfg.model_copy(update={"filters": Filters(trained=(tmp_path / "head",))})
    signed: list[str] = []
    monkeypatch.setattr(generate, "credentials_of", lambda export, store: "signer")
    monkeypatch.setattr(generate, "export", lambda export, store, rows, origin, signer: signed.extend(json.loads(row.safety_json)["verdict"] for row in rows) or [])
    asked = [generate.main(each)["safety"] for each in (more.model_copy(update={"export": Export(folder=tmp_path / "x")}), more, cfg)]
    assert signed == ["block"] * 2 and asked[0]["clip.block"] == 2  # type: ignore[index]
    assert "clip.checked" not in asked[1] and "clip.checked" not in asked[2], "once; a filter that is left out takes nothing back"  # type: ignore[operator]
    after = ClipStore(cfg.out).rows()
    assert [row.clip_id for row in after] == [row.clip_id for row in before] and all(json.loads(row.safety_json)["verdict"] == "block" for row in after)


def test_clips_made_after_a_kill_are_to_the_bit_those_of_a_run_that_was_not_killed(tmp_path: Path) -> None:
    model = small_model()
    requests = [Request(f"a red circle {'grows' if seed % 2 else 'moves to the left'}", "p", seed) for seed in range(7)]
    whole = fill_store(ClipStore(tmp_path / "whole"), model, requests, lineage="x", sampler=SAMPLER, runner=safety_runner(), preview=False)
    fill_store(ClipStore(tmp_path / "killed"), model, requests, lineage="x", sampler=SAMPLER, runner=safety_runner(), preview=False)
    rows = tmp_path / "killed" / "clips.jsonl"
    kept = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(kept[:2] + kept[4:5]))
    again = fill_store(ClipStore(tmp_path / "killed"), model, requests, lineage="x", sampler=SAMPLER, runner=safety_runner(), preview=False)
    assert [row and row.clip_id for row in again] == [row and row.clip_id for row in whole] and None not in again


@pytest.mark.parametrize("clip", [ClipShape(13, 36, 32), ClipShape(13, 0, 32), ClipShape(-3, 32, 32)], ids=str)
def test_a_clip_that_cannot_be_cut_into_patches_or_has_no_pixel_is_refused(clip: ClipShape) -> None:
    with pytest.raises(UserError, match=str(clip.height)):
        seeded_noise(small_model(), clip, [0])


def test_a_clip_off_the_latent_grid_is_refused_before_any_computing() -> None:
    with pytest.raises(UserError, match="12x32x32"):
        seeded_noise(small_model(), ClipShape(12, 32, 32), [0])


def test_guidance_changes_what_is_made_and_is_part_of_a_clip_s_identity(tmp_path: Path) -> None:
    model, network = small_model(), tmp_path / "network.safetensors"
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a fresh network does not hear its prompt
    save_network(network, model)
    plain = Config(out=tmp_path / "clips", model=network, prompts=("a red circle grows",), clips_per_prompt=1, sampler=SAMPLER)
    guided = plain.model_copy(update={"sampler": SAMPLER.model_copy(update={"guidance": 4.0})})
    paths = [path for cfg in (plain, guided, plain) for path in generate.main(cfg)["clips"]]  # type: ignore[attr-defined]
    assert paths[0] == paths[2] != paths[1]
    assert len(ClipStore(tmp_path / "clips").rows()) == 2
