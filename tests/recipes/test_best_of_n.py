"""Best of n from a clip store: what the model promises, what the guard finds, and what is no such thing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import cli
from recipes.best_of_n import COLUMNS, best_of_n_of, chart, sentence, table_rows, takes_of
from reward.types import Scores
from tests.recipes.small import save_small_reward_model

PROMPTS, CLIPS = 12, 16


class Channel:
    """The mean of one colour channel; nothing is said of clips brighter in it than `unknown`."""

    differentiable = False

    def __init__(self, channel: int, dims: tuple[str, ...] = ("overall",), unknown: float = math.inf) -> None:
        self.channel, self.dims, self.unknown = channel, dims, unknown
        self.seen = 0

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        self.seen += len(video)
        mean = video[:, :, self.channel].flatten(1).mean(1)  # [B]
        scores = torch.where(mean > self.unknown, torch.nan, mean)[:, None].expand(-1, len(self.dims))
        return Scores(scores, torch.zeros_like(scores))


def clip(levels: Sequence[float], seed: int) -> Tensor:
    """Frames [3,3,16,16] of these levels of red, green and blue; the noise makes each another clip."""
    noise = 0.02 * torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(levels)[None, :, None, None] + noise).clamp(0, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    """Green agrees with red up to a point and falls where red is highest; blue has nothing to do with it. The last prompt has few clips."""
    found, rng = ClipStore(tmp_path_factory.mktemp("takes")), np.random.default_rng(0)
    new = []
    for i in range(PROMPTS):
        for k in range(CLIPS if i else 3):
            red = float(rng.uniform())
            green = 0.2 + red if red < 0.8 else 1 - 4 * (red - 0.8)
            new.append(NewClip(clip((0.9 * red, 0.7 * green, 0.9 * float(rng.uniform())), 100 * i + k), f"scene {i}", f"p{i}", k, {"steps": 6}, "rev", 8.0))
    found.add_many(new, preview=False)
    return found


def test_the_best_by_red_is_greenest_half_way_and_no_bluer(store: ClipStore) -> None:
    model, guard = Channel(0), Channel(1)
    found = best_of_n_of(model, guard, store, batch=7, seed=0)
    assert (found["clips"], found["prompts"]) == ((PROMPTS - 1) * CLIPS + 3, PROMPTS) and model.seen == guard.seen == found["clips"]
    row = found["dimensions"]["overall"]
    assert row["n"] == [1, 2, 3, 4, 6, 8, 12, 16] and (row["prompts"], row["prompts_left_out"]) == (PROMPTS - 1, 1)
    proxy, gold = ([each["mean"] for each in row[name]] for name in ("proxy", "gold"))
    assert proxy == sorted(proxy) and proxy[0] == 0 and 0 < np.argmax(gold) < 6 and row["verdict"] == "falls" and row["second_half"]["high"] < 0
    assert row["fit"]["peak_n"]["high"] < 16 and f"falls: {row['second_half']['mean']:.3f}" in sentence(row) and "highest at n = " in sentence(row)
    blue = best_of_n_of(Channel(0), Channel(2), store, batch=64, seed=0)["dimensions"]["overall"]
    assert max(abs(each["mean"]) for each in blue["gold"]) < 0.3 * proxy[-1]


def test_what_has_no_score_is_counted_and_never_taken(store: ClipStore) -> None:
    dark = best_of_n_of(Channel(0, unknown=0.6), Channel(1, unknown=0.4), store, batch=64, seed=0)["dimensions"]["overall"]
    assert dark["unscored_clips"] > 30 and dark["unjudged_clips"] > 5 and max(dark["n"]) < CLIPS
    with pytest.raises(UserError, match=r"two clips with proxy and gold, .*Give --takes"):
        best_of_n_of(Channel(0, unknown=-1.0), Channel(1), store, batch=64, seed=0)


def test_tables_and_charts_tell_every_n(store: ClipStore) -> None:
    row = best_of_n_of(Channel(0), Channel(1), store, batch=64, seed=0)["dimensions"]["overall"]
    rows = table_rows(row)
    assert len(rows) == 8 and all(len(each) == len(COLUMNS) for each in rows) and rows[0][:3] == ("1", "0.00", "0.000 [0.000, 0.000]")
    svg = chart(row)
    assert svg.count("<circle") == 16 and "up to n = 16" in svg
    rising = row | {"fit": None, "verdict": "rises"}
    assert sentence(rising).endswith("Fewer than three n: no form is fitted.")
    endless = row | {"fit": row["fit"] | {"peak_n": {"mean": 20.0, "low": 9.6, "high": math.inf}}}
    assert "highest at n = above 16 [10, above 16]" in sentence(endless)


def test_clips_that_are_no_draws_of_one_generator_are_refused(store: ClipStore, tmp_path: Path) -> None:
    mixed = ClipStore(tmp_path / "mixed")
    mixed.add_many([NewClip(clip((0.1 * k, 0.5, 0.5), k), "a", "a", k, {"steps": 6}, f"rev {k}", 8.0) for k in range(2)], preview=False)
    with pytest.raises(UserError, match="clips of 2 generators, samplers or sizes"):
        takes_of(mixed)
    with pytest.raises(UserError, match="no prompt has two clips"):
        takes_of(ClipStore(tmp_path / "empty"))
    with pytest.raises(UserError, match="the model scores beauty, the guard overall"):
        best_of_n_of(Channel(0, ("beauty",)), Channel(1), store, batch=64, seed=0)


def test_the_command_needs_no_rankings_and_a_guard_of_its_own(store: ClipStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, guard = save_small_reward_model(tmp_path / "model"), save_small_reward_model(tmp_path / "guard", seed=1)
    words = ["evaluate-reward", "--comparisons", "null", "--model", str(model), "--takes", str(store.folder), "--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*words, "--guard", str(guard)]) == 0
    said = capsys.readouterr()
    assert "From n = 3 to n = 16" in json.loads(said.out)["best_of_n"]["overall"] and "promised by the model" in said.err
    report, page = (tmp_path / "out" / "report.json").read_text(), (tmp_path / "out" / "report.html").read_text()
    assert json.loads(report)["best_of_n"]["dimensions"]["overall"]["n"][-1] == CLIPS and json.loads(report)["dimensions"] == {}
    assert "How far can it be optimised?" in page and "No rankings were given" in page and page.count("<svg") == 1 and "nan" not in page and ">None<" not in page
    for more, message in (([], "best of n needs both"), (["--guard", str(model)], "the guard has the weights of the reward"), (["--guard", str(tmp_path)], "no reward model")):
        assert cli.main([*words, *more]) == 2
        assert message in json.loads(capsys.readouterr().out)["error"]["message"]
    assert cli.main(["evaluate-reward", "--comparisons", "null", "--model", str(model), "--json"]) == 2
    assert "nothing to judge by" in capsys.readouterr().out
