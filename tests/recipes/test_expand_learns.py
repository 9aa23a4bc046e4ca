"""Each stage of `rushes expand` learns on a small model, is resumed to the bit after a kill, and leaves no pickle behind."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config import load
from base_model.checkpoint import load_weights
from base_model.errors import GuardStop, UserError
from base_model.prompts.expand import Expander, load_expander
from recipes import expand, trl_checkpoints
from recipes.expand import Config, climb, learn_captions, pairs_of
from recipes.memory import PeakMemory
from tests.recipes.killed import busy, killed_behind

WORDS = ["--pool", "300", "--most-tokens", "32", "--tiny", "{width: 48, depth: 2, heads: 2, vocabulary: 420}", "--sft.lr", "4e-3"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def few_captions() -> Iterator[None]:
    """Of what is measured at the end of a stage: they are written one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "MEASURED_PROMPTS", 4)
        yield


def config(out: Path, *more: str) -> Config:
    return load(Config, None, ["--out", str(out), *WORDS, *more])


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("learned")
    return out, expand.main(config(out, "--sft.steps", "60", "--sft.evaluate-every", "30"))


def climbed(cfg: Config, before: Path, out: Path, reward: Callable[..., Any]) -> dict[str, Any]:
    """The stage `grpo` with a reward that is told."""
    out.mkdir(exist_ok=True)
    with PeakMemory() as memory:
        return climb(cfg, pairs_of(cfg), before, lambda expander: reward, out, memory)


def pickled(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock" and path.suffix not in (".json", ".safetensors", ".jsonl", ".jinja")]


# SFT


def test_sft_foretells_held_out_captions_better_than_single_tokens_do(learned: tuple[Path, dict[str, Any]]) -> None:
    out, result = learned
    told = result["sft"]
    print({name: told[name] for name in ("bits", "ngram_bits", "unigram_bits")})
    assert told["bits"] < told["unigram_bits"] - 1 and 1 <= told["ngram_order"] <= 5 and told["ngram_bits"] < told["unigram_bits"]
    rows = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 60 and sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert told["pairs"] == {"train": 300, "val": 200, "test": 80} and told["most_words"] <= 32 and 0 <= told["unsafe"] <= 1


def test_a_finished_run_is_a_folder_of_safetensors_and_is_not_done_again(learned: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    out, result = learned
    assert not pickled(out) and not (out / "sft" / "checkpoints").exists()
    monkeypatch.setattr(expand, "learn_captions", lambda *_: pytest.fail("it was done again"))
    assert expand.main(config(out, "--sft.steps", "60", "--sft.evaluate-every", "30")) == result
    with pytest.raises(UserError, match=r"begun with other settings: sft.lr"):
        expand.main(config(out, "--sft.steps", "60", "--sft.evaluate-every", "30", "--sft.lr", "1e-3"))


def test_only_the_captions_tokens_are_learned(learned: tuple[Path, dict[str, Any]]) -> None:
    """The loss that trl tells of val is the mean over the captions' tokens that we compute ourselves."""
    out, _ = learned
    rows = [json.loads(line) for line in (out / "sft" / "metrics.jsonl").read_text().splitlines()]
    best = min(row["eval_loss"] for row in rows if "eval_loss" in row)
    expander = load_expander(out / "sft", device=CPU)
    bits = expand.language_bits(expander.network, expand.examples_of(expander, pairs_of(config(out)).val))
    assert bits * float(torch.tensor(2.0).log()) == pytest.approx(best, rel=0.02)


def killed_and_resumed(cfg: Config, pairs: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stage `sft` that is killed while its second checkpoint is written, and gone on with by the same call."""
    write = trl_checkpoints._write
    seen: list[Path] = []

    def dying(folder: Path, state: dict[str, Any]) -> None:
        seen.append(folder)
        if len(seen) == 2:
            raise KeyboardInterrupt
        write(folder, state)

    out.mkdir()
    with monkeypatch.context() as patch, PeakMemory() as memory:
        patch.setattr(trl_checkpoints, "_write", dying)
        with pytest.raises(KeyboardInterrupt):
            learn_captions(cfg, pairs, out, memory)
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 2 and trl_checkpoints.whole_checkpoint(out / "checkpoints") == seen[0]
    assert list((out / "checkpoints").glob("checkpoint-*")) == [seen[0]], "the one that was killed is dropped"
    assert set(pickled(out)) <= {"README.md"}
    with PeakMemory() as memory:
        return learn_captions(cfg, pairs, out, memory)


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with busy(tmp_path), pytest.raises(UserError, match="another process is at work in"):
        expand.main(config(tmp_path))


def test_after_kill_9_the_same_command_ends_with_the_weights_of_one_that_was_not_killed(tmp_path: Path) -> None:
    words = ["--sft.steps", "12", "--sft.evaluate-every", "4", "--sft.batch", "8", "--pool", "40"]
    killed = config(tmp_path / "killed", *words)
    behind = killed.out / "sft" / "checkpoints" / "checkpoint-4" / trl_checkpoints.LAST_WRITTEN
    assert killed_behind(["expand", "--out", str(killed.out), *WORDS, *words], behind) == -signal.SIGKILL
    assert not (killed.out / "sft" / "model.safetensors").exists() and set(pickled(killed.out)) <= {"README.md"}
    expand.main(killed)
    (tmp_path / "whole").mkdir()
    with PeakMemory() as memory:
        learn_captions(killed, pairs_of(killed), tmp_path / "whole", memory)
    one, other = (load_weights(folder / "model.safetensors")[0] for folder in (killed.out / "sft", tmp_path / "whole"))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rank", ["0", pytest.param("4", marks=pytest.mark.slow)])
def test_a_killed_sft_ends_with_the_weights_of_one_that_was_not(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path, "--sft.steps", "12", "--sft.evaluate-every", "4", "--sft.batch", "8", "--pool", "40", "--lora-rank", rank)
    pairs = pairs_of(cfg)
    (tmp_path / "whole").mkdir()
    with PeakMemory() as memory:
        learn_captions(cfg, pairs, tmp_path / "whole", memory)
    killed_and_resumed(cfg, pairs, tmp_path / "killed", monkeypatch)
    whole, killed = (load_weights(tmp_path / name / "model.safetensors")[0] for name in ("whole", "killed"))
    assert set(whole) == set(killed) and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_gradient_that_is_not_finite_stops_the_run_before_a_step(learned: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = expand.start

    def broken(cfg: Config, train: Any) -> Expander:
        made = start(cfg, train)
        with torch.no_grad():
            made.network.model.norm.weight.fill_(torch.inf)
        return made

    monkeypatch.setattr(expand, "start", broken)
    cfg = config(tmp_path, "--sft.steps", "4", "--pool", "40", "--sft.batch", "8")
    with PeakMemory() as memory, pytest.raises(GuardStop, match="step 0 is not finite"):
        learn_captions(cfg, pairs_of(cfg), tmp_path, memory)


# GRPO


def has_word(word: str, end: int) -> Callable[..., list[float | None]]:
    """1 for a caption that came to its end and has the word in it."""

    def reward(completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: object) -> list[float | None]:
        return [float(word in text.split() and ids[-1] == end) for text, ids in zip(completions, completion_ids, strict=True)]

    return reward


def share_with(expander: Expander, cfg: Config, word: str) -> float:
    texts = [each.text for each in expander([pair.short for pair in pairs_of(cfg).test[:20]], seed=3)]
    return sum(word in text.split() for text in texts) / len(texts)


def test_grpo_writes_more_of_what_is_rewarded(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = learned
    cfg = config(out, "--grpo.steps", "20", "--grpo.prompts", "4", "--grpo.lr", "2e-3", "--grpo.kl-coef", "0.01", "--grpo.save-every", "50")
    start = load_expander(out / "sft", device=CPU)
    result = climbed(cfg, out / "sft", tmp_path / "grpo", has_word("video", start.tokenizer.eos_token_id))
    before, after = (share_with(expander, cfg, "video") for expander in (start, load_expander(tmp_path / "grpo", device=CPU)))
    print(f"captions with the word: {before:.2f} before, {after:.2f} after; reward {result['reward_first']:.2f} -> {result['reward_last']:.2f}, KL {result['kl_last']:.3f}")
    assert after > before + 0.25 and result["reward_last"] > result["reward_first"] and result["kl_last"] > 0
    assert not pickled(tmp_path)


def test_without_any_reward_nothing_but_the_kl_moves_the_model(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = learned
    cfg = config(out, "--grpo.steps", "2", "--grpo.prompts", "2", "--grpo.group-size", "2", "--grpo.kl-coef", "0")
    climbed(cfg, out / "sft", tmp_path / "none", lambda completions, **_: [None] * len(completions))
    before, after = (load_weights(folder / "model.safetensors")[0] for folder in (out / "sft", tmp_path / "none"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_caption_without_a_reward_is_in_no_groups_mean(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Advantages of rewards [1, 3, none, none]: -1 and 1 in deviations of the two that are known, and 0."""
    from trl import GRPOTrainer

    out, _ = learned
    seen: list[list[float]] = []
    build = GRPOTrainer._generate_and_score_completions
    cfg = config(out, "--grpo.steps", "1", "--grpo.prompts", "1", "--grpo.group-size", "4", "--grpo.kl-coef", "0")

    def noted(self: Any, inputs: Any) -> Any:
        found = build(self, inputs)
        seen.append(found["advantages"].tolist())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", noted)
        climbed(cfg, out / "sft", tmp_path / "some", lambda completions, **_: [1.0, 3.0, None, None])
    assert seen[0] == pytest.approx([-(0.5**0.5), 0.5**0.5, 0, 0], abs=1e-3)


def test_a_killed_grpo_ends_with_the_weights_of_one_that_was_not(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = learned
    cfg = config(out, "--grpo.steps", "4", "--grpo.prompts", "2", "--grpo.group-size", "4", "--grpo.save-every", "2", "--grpo.lr", "1e-3")
    asked: list[int] = []

    def dying(completions: Sequence[str], trainer_state: Any, die_at: int, **_: object) -> list[float | None]:
        asked.append(trainer_state.global_step)
        if len(asked) == die_at:
            raise KeyboardInterrupt
        return [float(len(text)) for text in completions]

    def reward(die_at: int) -> Callable[..., Any]:
        made = partial(dying, die_at=die_at)
        made.__name__ = "length"  # type: ignore[attr-defined]
        return made

    climbed(cfg, out / "sft", tmp_path / "whole", reward(-1))
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        climbed(cfg, out / "sft", tmp_path / "killed", reward(4))
    asked.clear()
    climbed(cfg, out / "sft", tmp_path / "killed", reward(-1))
    assert asked == [2, 3]
    whole, killed = (load_weights(tmp_path / name / "model.safetensors")[0] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_batches_that_passes_do_not_divide_and_heads_that_do_not_divide_the_width_are_refused(tmp_path: Path) -> None:
    assert expand.in_passes(32, 8, "x") == {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    with pytest.raises(UserError, match="no multiple of micro_batch"):
        expand.in_passes(32, 5, "x")
    with pytest.raises(UserError, match="heads do not divide"):
        expand.start(config(tmp_path, "--tiny.heads", "5"), [])
