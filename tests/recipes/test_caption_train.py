"""`rushes caption-train`: trl learns the captions' tokens and nothing else, all weights or an adapter; runs go on; and the tiny captioner learns to name what it sees."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import recipes.caption_train as recipe
from base_model.errors import UserError
from base_model.prompts.caption import IGNORED, Captioner, clip_patches, take_frames
from base_model.prompts.vision import load_vlm
from base_model.video.files import write_mp4
from recipes import trl_checkpoints
from recipes.caption import Config as Asked
from recipes.caption import Frames, settings_of
from recipes.caption_train import Config, Pairs, captioner_to_train, fit, main, optimizer_of
from recipes.shapes import captions as shapes
from tests.recipes.killed import busy, killed_behind
from tests.reward.vlm.tiny import save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?`:FutureWarning"),  # trl uses transformers' old names
]
FRAMES = Frames(fps=4.0, min_frames=2, max_frames=4, min_pixels=64, max_pixels=256)
CHANCE = {"shape": 1 / 4, "colour": 1 / 6, "motion": 1 / 11}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight clips, dark and bright ones, with captions; and two models."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "clips").mkdir()
    rows = []
    for k in range(8):
        write_mp4(folder / "clips" / f"{k}.mp4", torch.full((9, 3, 16, 16), 0.1 + 0.8 * (k % 2)), 8.0, upscale=False)
        rows.append({"file_name": f"{k}.mp4", "text": "a bright clip" if k % 2 else "dark"})
    (folder / "clips" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for family in ("qwen2_5_vl", "qwen3_vl"):
        save_tiny(folder / family, family)
    return folder


def config(world: Path, out: Path, family: str = "qwen2_5_vl", **changes: Any) -> Config:
    fast: dict[str, Any] = {"steps": 3, "batch": 4, "together": 4, "lr": 1e-2, "optimizer": "adamw", "held_out": 2, "frames": FRAMES, "instruction": "look"}
    return Config.model_validate({"out": out, "model": str(world / family), "data": world / "clips", **fast, **changes})


def test_trl_takes_the_loss_of_the_captions_tokens_and_their_end_alone(world: Path, tmp_path: Path) -> None:
    """The loss of the first step is our own sum over those tokens; without a step of the optimizer nothing else differs."""
    cfg = config(world, tmp_path, steps=1, batch=7, together=7, held_out=1, lr=1e-12)
    captioner, frames = captioner_to_train(cfg)
    pairs, _ = recipe.pairs_of(cfg, frames, captioner.vlm)
    clips = [clip_patches(pairs.take(row), captioner.vlm.patches) for row in range(7)]
    with torch.no_grad():
        inputs = captioner.learned(clips, pairs.texts)
        labels = inputs.pop("labels")
        log_p = captioner.vlm.network(**inputs, use_cache=False).logits.log_softmax(-1)
    learned = labels != IGNORED
    by_hand = -sum(float(log_p[row, place - 1, labels[row, place]]) for row, place in learned.nonzero().tolist()) / int(learned.sum())
    assert int(learned.sum()) == sum(len(captioner.vlm.tokenizer(text)["input_ids"]) + 1 for text in pairs.texts)
    (found,) = fit(cfg, captioner, pairs)
    print(f"trl {found:.5f}, by hand {by_hand:.5f}")
    assert found == pytest.approx(by_hand, abs=6e-5)  # trl rounds what it logs to 4 digits


def test_a_step_in_parts_has_the_loss_of_the_whole(world: Path, tmp_path: Path) -> None:
    """Captions of equal length: then the mean of the parts' means is the mean."""
    found = []
    for together in (6, 2):
        cfg = config(world, tmp_path / str(together), batch=6, together=together, steps=1)
        captioner, frames = captioner_to_train(cfg)
        pairs, _ = recipe.pairs_of(cfg, frames, captioner.vlm)
        found += fit(cfg, captioner, Pairs(["a bright clip"] * len(pairs), pairs.take))
    print(found)
    assert found[0] == pytest.approx(found[1], abs=2e-4)


@pytest.mark.parametrize(("family", "lora_rank"), [("qwen2_5_vl", 0), ("qwen3_vl", 4)])
def test_a_captioner_learns_from_a_folder_and_transformers_reads_what_it_leaves(family: str, lora_rank: int, world: Path, tmp_path: Path) -> None:
    cfg = config(world, tmp_path / "out", family, lora_rank=lora_rank, steps=60, lr=1e-2 if not lora_rank else 3e-2)
    result = main(cfg)
    print(f"{family}: held-out loss {result['held_out_loss_before']:.2f} -> {result['held_out_loss']:.2f}")
    assert result["held_out_loss"] < 0.5 * result["held_out_loss_before"] and result["clips"] == 6
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = Path(result["model"])
    before = AutoModelForImageTextToText.from_pretrained(world / family).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    assert set(before) == set(after) and AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(world / family).get_vocab()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in moved) and any("visual" in name for name in moved) == (lora_rank == 0)
    assert settings_of(Asked(model=str(folder))) == ("look", FRAMES)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}, "weights are safetensors only"
    vlm = load_vlm(folder)
    clip = take_frames(((torch.full((16, 16, 3), 230, dtype=torch.uint8).numpy(), 8.0) for _ in range(9)), FRAMES.sight, vlm.patches)
    assert Captioner(vlm, instruction="look", max_tokens=24)([clip_patches(clip, vlm.patches)])[0].text == "a bright clip"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_that_died_goes_on_to_the_same_weights(lora_rank: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"steps": 6, "save_every": 2, "optimizer": "adamw" if lora_rank else "muon", "lr": 1e-2, "lora_rank": lora_rank}
    main(config(world, tmp_path / "whole", **steps))
    counted, real = [], Captioner.learned

    def dies(self: Captioner, *given: Any) -> Any:
        counted.append(1)
        if len(counted) == 6:  # the first is of held-out clips
            raise RuntimeError("power cut")
        return real(self, *given)

    monkeypatch.setattr(Captioner, "learned", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        main(config(world, tmp_path / "broken", **steps))
    assert not (tmp_path / "broken" / "model").exists()
    (tmp_path / "broken" / "checkpoints" / "checkpoint-6").mkdir()  # one that was not saved whole
    counted.clear()
    monkeypatch.setattr(Captioner, "learned", real)
    main(config(world, tmp_path / "broken", **steps), resume=True)
    name = "model/model.safetensors"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_after_kill_9_the_same_command_ends_with_the_same_bits_and_nothing_is_pickled(world: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"steps": 12, "save_every": 3, "optimizer": "muon", "lr": 1e-2}
    main(config(world, tmp_path / "whole", **told))
    cfg = config(world, tmp_path / "killed", **told)
    frames = json.dumps(FRAMES.model_dump())
    words = ["caption-train", "--out", str(cfg.out), "--model", str(cfg.model), "--data", str(cfg.data), "--batch", "4", "--together", "4", "--held-out", "2"]
    words += ["--frames", frames, "--instruction", "look", *(word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", str(value)))]
    assert killed_behind(words, cfg.out / "checkpoints" / "checkpoint-3" / trl_checkpoints.LAST_WRITTEN) == -signal.SIGKILL
    assert not (cfg.out / "model").exists() and not [path for path in cfg.out.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    main(cfg, resume=True)
    model = "model/model.safetensors"
    assert (cfg.out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    assert {path.suffix for path in cfg.out.rglob("*") if path.is_file() and path.name != ".lock"} <= {".json", ".safetensors", ".jinja", ".md"}


def test_a_clip_with_several_captions_is_learned_from_or_held_out_and_stays_there(tmp_path: Path) -> None:
    def sides(number: int, seed: int) -> list[set[str]]:
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{k}.mp4", "text": f"{k} {way}"}) + "\n" for way in ("one", "two") for k in range(number)))
        both = recipe.pairs_of(Config(data=tmp_path, held_out=4, seed=seed), FRAMES, cast(Any, None))
        assert sum(map(len, both)) == 2 * number and all(len({text.split()[0] for text in side.texts}) * 2 == len(side) for side in both), "with both captions on one side"
        return [{text.split()[0] for text in side.texts} for side in both]

    for seed in range(5):
        learned, held_out = sides(12, seed)
        assert len(held_out) == 4 and len(learned) == 8
        later = sides(30, seed)
        assert learned <= later[0], "what was learned from is not held out when clips come"
    assert sides(12, 0) != sides(12, 1), "and another seed holds out others"


def test_what_cannot_be_learned_is_one_line(world: Path, tmp_path: Path) -> None:
    main(config(world, tmp_path / "done", steps=1))
    cases: list[tuple[dict[str, Any], bool, str]] = [
        ({"out": tmp_path / "done"}, False, "already holds a run. Go on with --resume"),
        ({"out": tmp_path / "done", "lr": 0.5}, True, "was begun with another lr"),
        ({"held_out": 8}, False, "8 captioned clips, of which 8 are to be held out"),
        ({"model": str(tmp_path / "nowhere")}, False, "cannot load the captioner"),
        ({"data": tmp_path / "nowhere"}, False, "no folder of clips"),
        ({"lora_rank": 2, "optimizer": "muon"}, False, "muon is for all weights"),
    ]
    with busy(tmp_path / "busy"), pytest.raises(UserError, match="another process is at work in"):
        main(config(world, tmp_path / "busy"))
    for number, (changes, resume, match) in enumerate(cases):
        with pytest.raises(UserError, match=match) as error:
            main(config(world, changes.pop("out", tmp_path / str(number)), **changes), resume=resume)
        assert "\n" not in str(error.value)


def test_muon_takes_the_matrices_of_both_towers_blocks() -> None:
    network = shapes.tiny_vlm(seed=0).network
    optimizer = optimizer_of(Config(), network)
    muon, other = ({id(p) for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    names = {id(p): name for name, p in network.named_parameters()}
    assert all(".blocks." in names[i] or ".layers." in names[i] for i in muon) and len(muon) == 2 * 4 + 2 * 7
    assert muon | other == set(names) and not muon & other


def named_right(folder: str, number: int) -> dict[str, float]:
    """Share of new clips of which a captioner names each attribute, by words alone."""
    vlm = load_vlm(folder)
    captioner, drawn = Captioner(vlm, instruction=shapes.INSTRUCTION, max_tokens=shapes.LONGEST), shapes.Drawn(number, seed=9, split="train")
    said = captioner([clip_patches(take_frames(drawn.frames(row), shapes.SIGHT, vlm.patches), vlm.patches) for row in range(number)])
    assert all(caption.whole for caption in said)
    right = [shapes.right(caption.text, thing) for caption, thing in zip(said, drawn.things, strict=True)]
    share = {name: sum(each[name] for each in right) / number for name in CHANCE}
    print(f"{share}, chance {CHANCE}")
    return share


def test_a_captioner_learns_to_say_whole_sentences_with_the_right_colour(tmp_path: Path) -> None:
    """The beginning of the training that `rushes bench caption` measures: colours come first."""
    result = main(Config(out=tmp_path / "out", clips=4_000, held_out=40, steps=100, batch=24, lr=6e-3))
    assert result["held_out_loss"] < 0.15 * result["held_out_loss_before"] and named_right(result["model"], 80)["colour"] > 0.7


@pytest.mark.slow
def test_a_captioner_learns_shape_and_motion_too(tmp_path: Path) -> None:
    result = main(Config(out=tmp_path / "out", clips=16_000, held_out=40, steps=500))
    share = named_right(result["model"], 200)
    assert share["colour"] > 0.95 and share["shape"] > 0.6 and share["motion"] > 0.5
