"""The benches of speed together: ratios are the benches' own, turned so that above 1 ours is faster; what fails is a row; what is there is not asked again; costs have names."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from align.config import load
from base_model.errors import UserError
from recipes.bench import _profile, all, app, loader, packing, sampler, score
from recipes.bench._results import RESULTS, Maker
from recipes.charts import Whisker, ratio_chart
from recipes.cli import benchmarks
from tests.recipes.small import save_small_network
from tests.recipes.test_bench import TOY, assert_flat

SAID = [{"name": "ours", "part": "both", "seconds": 2.0}, {"name": "slow", "part": "both", "seconds": 6.0}]
SAID[1] |= {"times_slower_than_ours": 3.0, "times_slower_low": 2.5, "times_slower_high": 3.5}


class Bench:
    """Stands for the processes: what each says, and what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]) -> None:
        self.said, self.asked = said, []
        monkeypatch.setattr(all, "asked", self)
        monkeypatch.setattr(all, "commit", lambda: "c0ffee")

    def __call__(self, words: Sequence[str], log: Path) -> list[dict[str, Any]]:
        self.asked.append(list(words))
        told = self.said[log.stem]
        if isinstance(told, UserError):
            raise told
        return list(told)


def test_every_part_is_a_benchmark_there_is_with_costs_of_its_own() -> None:
    assert set(all.PARTS) == set(get_args(all.Name)) and {part.bench for part in all.PARTS.values()} == set(_profile.PREPARED) <= set(benchmarks())
    for part in all.PARTS.values():
        words = all.words_of(load(all.Config, None, ["--quick", "--trl", "a", "--readers", "b", "--label-studio", "c"]), part)
        cfg = load(__import__(f"recipes.bench.{part.bench.replace('-', '_')}", fromlist=["Config"]).Config, None, words)
        assert cfg.quick and (not part.python or str(cfg.python) in "abc")
    with pytest.raises(UserError, match="only"):
        load(all.Config, None, ["--only", "[nothing]"])


def test_what_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"sampler": SAID, "score": UserError("there is no score"), "sampler-costs": [{"cost": "mm", "share": 0.5}], "score-costs": UserError("nor costs")})
    words = ["--only", "[score, sampler]", "--profile", "--out", str(tmp_path / "out"), "--write", "--results", str(tmp_path / "results"), "--date", "2026-11"]
    rows = all.main(load(all.Config, None, words))["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    told = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert told == [
        {"part": "beside", "bench": "sampler", "what": "both, seconds, beside slow", "ours": 2.0, "peer": 6.0, "ratio": 3.0, "low": 2.5, "high": 3.5},
        {"part": "beside", "bench": "score", "what": "failed", "error": "there is no score"},
        {"part": "costs", "bench": "sampler", "cost": "mm", "share": 0.5},
        {"part": "costs", "bench": "score", "cost": "failed", "error": "nor costs"},
    ]
    written = next((tmp_path / "results").glob("2026-11_*_all.md")).read_text()
    assert "Not measured: score: there is no score." in written and "surely ahead in 1, surely behind in 0" in written and "![Ratios](all.svg)" in written
    assert ET.parse(tmp_path / "results" / "all.svg").getroot().tag.endswith("svg")
    assert len(bench.asked) == 4


def test_each_ratio_says_whether_it_is_there_in_an_earlier_table_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Bench(monkeypatch, {"sampler": [*SAID, {**SAID[1], "name": "other"}], "score": UserError("there is no score")})
    words = ["--only", "[score, sampler]", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "then"), "--date", "2026-11"]
    all.main(load(all.Config, None, [*words, "--write"]))
    table = next((tmp_path / "then").glob("*_all.md"))
    assert all.ratios_of(table) == {("sampler", f"both, seconds, beside {name}"): (3.0, 2.5, 3.5) for name in ("slow", "other")}

    told = "both, seconds, beside slow ({:.2f}, then 3.00)"
    cases = ((3.9, 3.8, 4.0, True, "ahead"), (3.9, 3.9, 3.9, False, None), (2.0, 1.9, 2.1, False, "ahead"), (2.4, 0.9, 9.0, True, "cannot be told"))
    for ratio, low, high, holds, verdict in cases:
        now = {**SAID[1], "times_slower_than_ours": ratio, "times_slower_low": low, "times_slower_high": high}
        Bench(monkeypatch, {"sampler": [SAID[0], now], "score": UserError("there is no score")})
        rows: Any = all.main(load(all.Config, None, [*words, "--against", str(table), "--write", "--results", str(tmp_path / "now")]))["rows"]
        assert [(row["then"], row["holds"], row["verdict_then"], row["verdict"]) for row in rows] == [(3.0, holds, "ahead", verdict), (None,) * 4]
        written = next((tmp_path / "now").glob("*_all.md")).read_text()
        assert ("Beside an earlier run 1 of 1 ratios hold." in written) == holds and (f"all but sampler: {told.format(ratio)}" in written) != holds
        assert (f"What can be told is another in 1: sampler: {told.format(ratio)}: cannot be told, then ahead." in written) == (verdict == "cannot be told")
        assert all.ratios_of(next((tmp_path / "now").glob("*_all.md")))["sampler", "both, seconds, beside slow"] == (ratio, low, high)

    one_round = "| bench | what | ours | peer | ratio |\n| --- | --- | --- | --- | --- |\n| a | b \\| c | 1 | 2 | 1,002.5 |\n"
    (tmp_path / "other.md").write_text(one_round)
    assert all.ratios_of(tmp_path / "other.md") == {("a", "b | c"): (1002.5, 1002.5, 1002.5)}, "a table without intervals, an escaped bar"
    for content, message in (("", "has no ratios"), ("| a | b |\n| --- | --- |\n| 1 | 2 |\n", "has no ratios"), (one_round.replace("1,002.5", "2.0x"), "'2.0x'")):
        (tmp_path / "other.md").write_text(content)
        with pytest.raises(UserError, match=rf"other.md .*{message}.*Give --against FILE"):
            all.ratios_of(tmp_path / "other.md")
    with pytest.raises(UserError, match=r"cannot read .*missing.md"):
        all.ratios_of(tmp_path / "missing.md")


def test_the_published_table_can_be_measured_against() -> None:
    then = all.ratios_of(RESULTS / "2026-11_2-core-cpu_all.md")
    assert {bench for bench, _ in then} == set(all.PARTS) - {"phases"}
    assert ("sft", "full, mixed sizes: peak memory, MiB, beside padded") in then, "ratios without an interval, too"
    assert {ratio.low <= ratio.median <= ratio.high for ratio in then.values()} == {True}


def test_with_resume_only_what_is_missing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {"sampler": SAID, "score": UserError("there is no score")})
    words = ["--only", "[score, sampler]", "--out", str(tmp_path)]
    first = all.main(load(all.Config, None, words))
    bench.said["score"] = []
    bench.asked.clear()
    again = all.main(load(all.Config, None, words), resume=True)
    assert [asked[3] for asked in bench.asked] == ["score"] and again["rows"] == first["rows"][:1]
    for change in (["--quick"], []):  # other settings; and not resumed
        bench.asked.clear()
        all.main(load(all.Config, None, [*words, *change]), resume=bool(change))
        assert [asked[3] for asked in bench.asked] == ["sampler", "score"]
    bench.asked.clear()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(all, "maker", lambda: Maker("c0ffee", "64"))
        all.main(load(all.Config, None, words), resume=True)
    assert [asked[3] for asked in bench.asked] == ["sampler", "score"], "what other threads measured is not of these"
    monkeypatch.setattr(all, "commit", lambda: "c0ffee+changes")
    all.main(load(all.Config, None, words))
    bench.asked.clear()
    all.main(load(all.Config, None, words), resume=True)
    assert len(bench.asked) == 2, "changes have no name: what was made with some is not known to be of these"


def test_a_process_says_rows_or_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert all.asked(["-c", "print('noise'); print('{\"rows\": [{\"a\": 1}]}')"], log) == [{"a": 1}]
    with pytest.raises(UserError, match=r"^too\s+small, here \(.*log\)$"):
        all.asked(["-c", 'print(\'{"error": {"kind": "UserError", "message": "too\\\\nsmall, here"}}\')'], log)
    with pytest.raises(UserError, match=r"ended with 3: last words"):
        all.asked(["-c", "import sys; print('first', file=sys.stderr); print('last words', file=sys.stderr); sys.exit(3)"], log)


def test_ratios_are_turned_so_that_above_one_ours_is_faster() -> None:
    sft = {"what": "w", "peer_is": "p", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}
    (row,) = all.sft_rows([sft, {**sft, "ratio": None}])
    assert row == {"what": "w, beside p", "ours": 1.0, "peer": 2.0, "ratio": 2.0, "low": 1.5, "high": 2.5, "error": None}
    labelers, beside = {"part": "labelers", "store": "sqlite", "labelers": 9, "think_s": 0.0, "next_task_p95_ms": 3.0, "submit_p95_ms": 4.0}, {"part": "beside Label Studio"}
    *ours, row = all.app_rows([labelers, {**beside, **app._ratio("submit", [0.01] * 10 + [0.02] * 10, [0.04] * 20)}])
    assert [each["ours"] for each in ours] == [3.0, 4.0] and all_none(ours, "peer", "ratio") and "do not think" in ours[0]["what"]
    assert (row["ratio"], row["low"], row["high"]) == pytest.approx((1 / 0.375, 2, 4))
    trl = {"train": "lora", "guidance": 5.0, "arm": "trl", "seconds": 4.0, "cpu_seconds": 6.0}
    fast = {"times_faster": 2.0, "times_faster_low": 1.9, "times_faster_high": 2.1, "times_less_cpu": 1.5, "times_less_cpu_low": 1.5, "times_less_cpu_high": 1.5}
    epoch, cpu = all.ddpo_rows([trl, {**trl, **fast, "arm": "ours, 3 steps a pass", "seconds": 2.0, "cpu_seconds": 4.0}])
    assert epoch["what"] == "lora, guidance 5, 3 steps a pass: seconds an epoch, beside trl" and (epoch["ours"], epoch["peer"], epoch["ratio"]) == (2.0, 4.0, 2.0)
    assert cpu["ratio"] == 1.5 and cpu["low"] is cpu["high"] is None, "one repeat has no interval"
    read = {"part": "read", "name": "shards", "seconds": 1.0, "times_faster": None}
    rows = list(all.loader_rows([read, {**read, "name": "torch.load", "seconds": None, "note": "not there"}]))
    assert [(row["peer"], row["ratio"], row["error"]) for row in rows] == [(None, None, "not there")]


def all_none(rows: Sequence[dict[str, Any]], *names: str) -> bool:
    return not [row for row in rows for name in names if row[name] is not None]


def test_the_real_benches_say_what_is_read_of_them(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "network.safetensors")
    quick = {
        "sampler": (sampler, ["--model", str(network), "--clips", "1", "--repeats", "1", "--sampler", TOY, "--peers", "['one clip at a time']"]),
        "packing": (packing, ["--clips", "80", "--timed-clips", "2", "--repeats", "1"]),
        "packing-wan": (packing, ["--wan", "--timed-clips", "2", "--repeats", "1"]),
        "score": (score, ["--clips", "1", "--frames", "3", "--repeats", "1"]),
        "loader": (loader, ["--quick", "--entries", "1", "--repeats", "1", "--out", str(tmp_path), "--python", str(tmp_path / "none")]),
    }
    for name, (module, words) in quick.items():
        rows = list(all.PARTS[name].compared(module.main(load(module.Config, None, words))["rows"]))  # type: ignore[index]
        assert rows and {tuple(row) for row in rows} == {all.COLUMNS[1:]}
        for row in rows:
            assert row["ours"] > 0 and ((row["peer"] or 0) > 0) == (row["error"] is None)
            assert row["ratio"] is None or row["ratio"] == pytest.approx(row["peer"] / row["ours"]), "of one repeat"


def test_the_chart_has_a_logarithmic_axis_around_one() -> None:
    drawn = ratio_chart([("a", [Whisker("fast", "faster", 4.0, 2.0, 8.0), Whisker("slow", "slower", 0.25, 0.125, 0.5)])], name="Ratios")
    root = ET.fromstring(drawn)
    places = [float(dot.attrib["cx"]) for dot in root.iter("circle")]
    (one,) = [float(line.attrib["x1"]) for line in root.iter("line") if line.attrib["class"] == "limit"]
    assert places[0] - one == pytest.approx(one - places[1], abs=0.2) and places[0] > one, "four times faster is as far to the right as four times slower to the left"
    assert "a, fast: 4.00" in root.attrib["aria-label"]
    with pytest.raises(ValueError, match="nothing to draw"):
        ratio_chart([], name="Ratios")


# Costs


def test_the_largest_costs_come_first_with_their_shares() -> None:
    assert _profile.largest({"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0, "e": 0.0}) == [{"cost": "b", "share": 0.4}, {"cost": "d", "share": 0.3}, {"cost": "c", "share": 0.2}]
    assert _profile.largest({"a": 1.0, "b": 0.0}) == [{"cost": "a", "share": 1.0}]


def test_operations_are_those_that_were_done() -> None:
    torch.set_num_threads(1)
    a = torch.randn(300, 300)
    found = _profile.operations(lambda: [a @ a for _ in range(20)])
    assert max(found, key=found.__getitem__) == "aten::mm" and found["aten::mm"] > 0.5 * sum(found.values())


def test_functions_are_told_without_what_they_call() -> None:
    def outer() -> None:
        for _ in range(3):
            sorted(range(300_000), key=lambda x: -x)

    found = _profile.functions(outer)
    assert {"built-in method builtins.sorted", "tests/recipes/test_bench_all.py:outer"} <= set(found)
    assert found["built-in method builtins.sorted"] > found["tests/recipes/test_bench_all.py:outer"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sampler", ["--clips", "1", "--sampler", TOY, "--model", "NETWORK"]),
        ("sft", ["--train", "[lora]", "--batch", "2", "--steps", "1"]),
        ("ddpo-trl", ["--quick", "--clips", "2", "--steps", "2"]),
        ("packing", ["--timed-clips", "2"]),
        ("packing", ["--wan", "--timed-clips", "2"]),
        ("score", ["--clips", "2", "--frames", "3"]),
        ("loader", ["--quick"]),
        ("app", ["--quick"]),
        ("phases", ["--quick", "--recipes", "[grpo]", "--model", "NETWORK", "--grpo_sampler", TOY, "--grpo.prompts", "2", "--grpo.group_size", "2"]),
    ],
)
def test_every_bench_names_its_three_largest_costs(name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUSHES_REAL_DATA", raising=False)
    network = save_small_network(tmp_path / "network.safetensors") if "NETWORK" in words else None
    before = torch.get_num_threads()
    rows = _profile.profiled(name, [str(network) if word == "NETWORK" else word for word in words])
    assert len(rows) == 3 and all_between(rows) and len({row["cost"] for row in rows}) == 3 and torch.get_num_threads() == before
    json.dumps(rows)
    if _profile.PREPARED[name][1] is _profile.operations:
        assert any(row["cost"].startswith("aten::") for row in rows)


def all_between(rows: Sequence[dict[str, Any]]) -> bool:
    shares = [row["share"] for row in rows]
    return shares == sorted(shares, reverse=True) and sum(shares) <= 1 and shares[-1] > 0
