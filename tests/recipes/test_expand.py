"""`rushes expand`: which pairs are read and held out, what a caption is rewarded for, and what `rushes generate --expand` keeps of both texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.config import load
from base_model.errors import UserError
from base_model.prompts.expand import Expanded, Expander, Style, TinySize, save_expander, tiny_expander
from base_model.prompts.text import TextEncoder, likeness
from base_model.types import Conditioning
from base_model.video.store import ClipRow, ClipStore
from recipes import expand, generate
from recipes.expand import Pair, VideoReward, clusters_of, read_pairs, split_pairs
from recipes.feedback import Assessor
from recipes.generate import Request, expanded_from, fill_store, safety_runner
from reward.mixture import Mixture, Term
from reward.safety.contract import SafetyRunner
from reward.safety.policy import load_policy
from reward.safety.prompt import WordFilter
from reward.safety.video import DegenerateFilter
from reward.types import Scores
from tests.recipes.small import SAMPLER, Brightness, dazzled, save_small_network, small_model

SHORTS = ["red circle", "blue bar grows", "golden disc", "a wedge", "green plank left", "cyan ball up", "still column", "magenta bar", "orbiting pillar", "tiny triangle"]

# Pairs


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_read_from_a_jsonl_and_from_two_files_line_by_line(tmp_path: Path) -> None:
    rows = [{"short": f" {short} ", "long": f"a video of\n {short}"} for short in SHORTS]
    found = read_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert found[0] == ("red circle", "a video of red circle") and len(found) == 10
    (tmp_path / expand.SHORT_FILE).write_text("\n".join(SHORTS))
    (tmp_path / expand.LONG_FILE).write_text("\n".join(f"a video of {short}" for short in SHORTS) + "\n")
    assert read_pairs(tmp_path) == found


def test_what_is_no_pair_is_named_by_its_line(tmp_path: Path) -> None:
    good = [{"short": short, "long": "a"} for short in SHORTS]
    for bad in ({"short": "a"}, {"short": "a", "long": 3}, ["a", "b"], {"short": "\ud83d", "long": "b"}):
        with pytest.raises(UserError, match=r"line 3 of .* is no pair"):
            read_pairs(write_jsonl(tmp_path / "bad.jsonl", [*good[:2], bad, *good[2:]]))
    with pytest.raises(UserError, match="pair 3 has an empty side"):
        read_pairs(write_jsonl(tmp_path / "bad.jsonl", [*good[:2], {"short": " ", "long": "b"}, *good[2:]]))
    with pytest.raises(UserError, match="too few"):
        read_pairs(write_jsonl(tmp_path / "few.jsonl", good[:9]))
    with pytest.raises(UserError, match="no such file"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"short": "caf\xe9", "long": "b"}\n')
    with pytest.raises(UserError, match="Give UTF-8"):
        read_pairs(tmp_path / "latin.jsonl")
    (tmp_path / expand.SHORT_FILE).write_text("a\nb\n")
    (tmp_path / expand.LONG_FILE).write_text("a\n")
    with pytest.raises(UserError, match="2 short prompts and 1 long"):
        read_pairs(tmp_path)


def test_a_sentence_stays_with_its_other_styles_and_not_with_another_sentence() -> None:
    shorts = ["Gwen Stacy reading a book", "Gwen Stacy reading a book, pan left", "a book", "Gwen Stacy reading a book in the style of Ukiyo", "A book", "a red car", "a blue car"]
    assert clusters_of(shorts) == [0, 0, 2, 0, 2, 5, 6]
    assert clusters_of(["a of", "of a", "in a"]) == [0, 0, 2], "of stop words alone all are compared"


def linked(a: str, b: str) -> bool:
    """The rule again, in other words."""
    x, y = (set(text.lower().replace(",", " ").replace(".", " ").split()) for text in (a, b))
    x, y = (words - expand.STOP_WORDS or words for words in (x, y))
    return x == y or (len(x & y) >= 2 and len(x & y) / min(len(x), len(y)) >= expand.NEAR)


def test_of_the_real_prompts_no_two_that_are_linked_are_on_different_sides(real_data: Path) -> None:
    pairs = read_pairs(real_data / "prompts")
    assert len(pairs) == 946
    found = split_pairs(pairs, 0)
    sizes = [len(part) for part in found]
    print("train, val, test:", sizes)
    assert sum(sizes) == 946 and min(sizes) >= 40
    for one, other in ((found.train, found.test), (found.train, found.val), (found.val, found.test)):
        assert not any(linked(a.short, b.short) for a in one for b in other)
    assert split_pairs(pairs, 1).test != found.test


def test_a_cluster_that_is_a_third_of_the_pairs_is_learned_from_whatever_the_seed() -> None:
    cats = [Pair(f"a red cat does{k}", str(k)) for k in range(60)]
    others = [Pair(f"object{k} number{k}", str(k)) for k in range(120)]
    for seed in range(8):
        found = split_pairs([*cats, *others], seed)
        assert set(cats) <= set(found.train)
        assert found.val and found.test


def test_pairs_that_all_hang_together_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="too few to hold any out"):
        split_pairs([Pair("a red cat runs", str(k)) for k in range(12)], 0)


# What is measured


def test_likeness_is_larger_for_the_same_thing_and_one_for_the_same_text() -> None:
    same, near, far = likeness(TextEncoder(), ["a red circle"] * 3, ["a red circle", "a crimson disc of any size", "stock prices fell on Monday"])
    assert same == pytest.approx(1, abs=1e-5) and 1 > near > far + 0.2


# Rewards


def reward_of(limit: float = 2.0, scores: Any = None) -> VideoReward:
    scorer = Mixture({"signal": scores or Brightness()}, (Term("signal", "overall", scale=0.1),))
    return VideoReward(small_model(), Assessor(scorer, dazzled(limit), 12.0, max_error_share=1.0), SAMPLER, seed=0, ends=frozenset({1}))


Answer = tuple[list[float | None], dict[str, float]]


def ask(reward: VideoReward, shorts: Sequence[str], captions: Sequence[str], *, step: int = 0, end: int = 1) -> Answer:
    told: dict[str, float] = {}
    state = SimpleNamespace(global_step=step)
    ids = [[5, end]] * len(captions)
    return reward.video_reward([f"{s} ->" for s in shorts], captions, ids, list(shorts), state, told.__setitem__, None), told


def test_captions_of_a_prompt_are_shown_from_the_same_noise_and_equal_ones_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def noted(model: Any, cond: Conditioning, seeds: Sequence[int], sampler: Any) -> Any:
        made.extend(zip(cond.prompts, seeds, strict=True))
        return generate.sample(model, cond, seeds, sampler)

    monkeypatch.setattr(expand, "sample", noted)
    reward = reward_of()
    shorts, captions = ["red circle"] * 3 + ["blue bar"], ["a red circle grows", "a red ball falls", "a red circle grows", "a blue bar grows"]
    found, _ = ask(reward, shorts, captions)
    assert [text for text, _ in made] == ["a red circle grows", "a red ball falls", "a blue bar grows"]
    assert made[0][1] == made[1][1] != made[2][1] and found[0] == found[2] and None not in found
    ask(reward, shorts, captions, step=1)
    assert made[3][1] != made[0][1]


def test_the_reward_is_of_the_clip_and_about_the_users_own_words() -> None:
    class Asked:
        dims, differentiable = ("overall",), False
        prompts: tuple[str, ...] = ()

        def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
            self.prompts = tuple(prompts)
            mean = video.flatten(1).mean(1)[:, None]  # [B,1]
            return Scores(mean, torch.zeros_like(mean))

    scores = Asked()
    reward = reward_of(scores=scores)
    (found,), _ = ask(reward, ["red circle"], ["a red circle grows"])
    assert scores.prompts == ("red circle",)
    seed = expand.derived_seed(0, "expand red circle", 0) % 2**31
    clip = torch.cat(list(generate.sample(reward.model, expand.encode_prompts(reward.model, ["a red circle grows"]), [seed], SAMPLER)))
    assert found == pytest.approx(float(clip.mean()) / 0.1, abs=1e-4)


def test_an_unsafe_caption_makes_no_clip_and_has_no_reward_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    sample = generate.sample
    monkeypatch.setattr(expand, "sample", lambda model, cond, seeds, sampler: (made.extend(cond.prompts), sample(model, cond, seeds, sampler))[1])
    found, told = ask(reward_of(), ["red circle"] * 4, ["a red circle in strobe light", "a red circle grows", "a red strobe", "a red circle falls"])
    assert made == ["a red circle grows", "a red circle falls"] and [reward is None for reward in found] == [True, False, True, False]
    assert told["unsafe_share"] == 0.5 == told["missing_reward_share"] and told["kept_prompt_share"] == 0
    made.clear()
    found, told = ask(reward_of(), ["a strobe light"], ["a red circle grows"])
    assert found == [None] and not made and told["unsafe_share"] == 1, "what is typed is looked at, too"


def test_a_clip_that_is_withheld_or_has_no_score_has_no_reward() -> None:
    captions = ["a red circle grows", "a blue bar"]
    found, told = ask(reward_of(limit=-1.0), captions, captions)
    assert found == [None, None] and told["missing_reward_share"] == 1 and told["unsafe_share"] == 0

    class Half:
        dims, differentiable = ("overall",), False

        def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
            mean = torch.tensor([[1.0], [torch.nan]])
            return Scores(mean, torch.zeros_like(mean))

    assert ask(reward_of(scores=Half()), captions, captions)[0] == [10.0, None]


def test_a_caption_without_an_end_is_rewarded_as_what_the_user_would_get() -> None:
    reward = reward_of()
    cut, told = ask(reward, ["red circle"], ["a red circle that"], end=6)
    assert cut == ask(reward, ["red circle"], ["red circle"])[0] != [None] and told["kept_prompt_share"] == 1


# rushes generate --expand


class Echo:
    """An expander with known answers."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def __call__(self, prompts: Sequence[str], *, seed: int) -> list[Expanded]:
        return [Expanded(prompt, self.answers.get(prompt, prompt), "" if prompt in self.answers else "kept") for prompt in prompts]


def small_words(tmp_path: Path, *more: str) -> generate.Config:
    network = save_small_network(tmp_path / "network.safetensors")
    words = ["--out", str(tmp_path / "clips"), "--model", str(network), "--clips-per-prompt", "1", "--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", *more]
    return load(generate.Config, None, words)


def test_generate_makes_clips_of_the_long_text_and_keeps_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"red circle": "a video of a red circle that grows", "circle, red": "a video of a red circle that grows", "bar": "a bar in strobe light"}
    monkeypatch.setattr(generate, "load_expander", lambda folder, device: Echo(answers))
    cfg = small_words(tmp_path, "--expand", str(tmp_path), "--prompts", '["red circle", "circle, red", "bar", "cyan ball", "a strobe light"]')
    result = generate.main(cfg)
    rows = {row.prompt: row for row in ClipStore(cfg.out).rows()}
    assert set(rows) == {"a video of a red circle that grows", "bar", "cyan ball"}
    assert expanded_from(rows["a video of a red circle that grows"]) == ("circle, red", "red circle")
    assert expanded_from(rows["bar"]) == expanded_from(rows["cyan ball"]) == ()
    told = {each["prompt"]: (each["text"], each["note"]) for each in result["expanded"]}  # type: ignore[attr-defined]
    assert told["bar"] == ("bar", generate.UNSAFE) and told["cyan ball"] == ("cyan ball", "kept") and told["red circle"][1] == ""
    assert result["blocked_prompts"] == 1
    before = (cfg.out / "clips.jsonl").read_bytes()
    assert generate.main(cfg)["clips"] == result["clips"] and (cfg.out / "clips.jsonl").read_bytes() == before, "nothing is made or written again"


def test_a_blocked_prompt_makes_no_clip_however_harmless_its_expansion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "load_expander", lambda folder, device: Echo({"a strobe light": "a red circle grows"}))
    result = generate.main(small_words(tmp_path, "--expand", str(tmp_path), "--prompts", '["a strobe light"]'))
    assert result["clips"] == [] and result["blocked_prompts"] == 1


def test_a_blocked_prompt_gets_no_clip_that_the_store_holds_either(tmp_path: Path) -> None:
    """What was let through by a filter of fewer words, and a blocked prompt whose expansion somebody else typed."""
    model, store, policy = small_model(), ClipStore(tmp_path), load_policy()

    def ask(request: Request, runner: SafetyRunner) -> ClipRow | None:
        return fill_store(store, model, [request], lineage="x", sampler=SAMPLER, runner=runner, preview=False)[0]

    only_german = SafetyRunner([WordFilter(policy, ["de"]), DegenerateFilter(policy)], policy)
    assert ask(Request("a strobe light", "p", 0), only_german) is not None and ask(Request("a strobe light", "p", 0), safety_runner()) is None
    assert ask(Request("a red circle grows", "p", 0), safety_runner()) is not None and ask(Request("a red circle grows", "p", 0, "a strobe light"), safety_runner()) is None
    assert [expanded_from(row) for row in ClipStore(tmp_path).rows()] == [(), ()], "nor does it learn the blocked one"


def test_a_clip_that_was_made_of_the_long_text_before_is_not_made_again_and_learns_the_short_one(tmp_path: Path) -> None:
    model, store = small_model(), ClipStore(tmp_path)
    runner = safety_runner()
    (first,) = fill_store(store, model, [Request("a red circle grows", "p", 0)], lineage="x", sampler=SAMPLER, runner=runner, preview=False)
    (again,) = fill_store(store, model, [Request("a red circle grows", "p", 0, "red circle")], lineage="x", sampler=SAMPLER, runner=runner, preview=False)
    assert first is not None and again is not None and expanded_from(first) == () and expanded_from(again) == ("red circle",)
    assert runner.counts["clip.checked"] == 1 and [expanded_from(row) for row in ClipStore(tmp_path).rows()] == [("red circle",)]


def test_generate_reads_a_saved_expander_and_without_one_takes_prompts_as_they_are(tmp_path: Path) -> None:
    tiny: Expander = tiny_expander(["a red circle -> a red circle grows"], TinySize(16, 1, 2, 300, 64), Style(most_tokens=6), seed=0)
    save_expander(tmp_path / "expander", tiny, {})
    cfg = small_words(tmp_path, "--expand", str(tmp_path / "expander"), "--prompts", '["a red circle"]')
    told = generate.main(cfg)["expanded"]
    assert told == [each._asdict() for each in tiny(["a red circle"], seed=0)]
    plain = generate.main(cfg.model_copy(update={"expand": None, "out": tmp_path / "plain"}))
    assert "expanded" not in plain and [row.prompt for row in ClipStore(tmp_path / "plain").rows()] == ["a red circle"]
