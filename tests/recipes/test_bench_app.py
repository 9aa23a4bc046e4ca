"""`rushes bench app` counts what is lost and what is there twice, and its labelers get and answer tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.config import load
from base_model.errors import UserError
from recipes.bench import _label_studio, app


@pytest.mark.timed
def test_labelers_are_served_and_what_they_were_told_is_kept_is_there_once() -> None:
    row = app.measure_store("sqlite", 4, 0.1, 1.0)
    assert row["acknowledged"] >= 8 and (row["lost"], row["duplicated"], row["errors"]) == (0, 0, 0)
    assert 0 < row["next_task_p50_ms"] <= row["next_task_p95_ms"] <= row["next_task_max_ms"]
    assert row["events"] > 2 * row["acknowledged"] and row["clips_mb_a_second"] > 0
    json.dumps(row, allow_nan=False)


def test_a_ratio_below_one_is_faster_than_the_peer() -> None:
    few = app._ratio("next task", [0.01, 0.02, 0.5], [0.1, 0.2, 0.3])
    assert few == {"what": "next task", "ours": 20.0, "peer": 200.0, "ratio": 0.1, "ratio_low": None, "ratio_high": None, "times": 3}
    many = app._ratio("next task", [0.01] * 18 + [0.03] * 2, [0.1] * 20)
    assert (many["ratio"], many["ratio_low"], many["ratio_high"]) == (0.1, 0.1, 0.3), "of ten parts of the turns"


def test_a_peer_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        _label_studio.environment(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="seconds"):
        load(app.Config, None, ["--seconds", "0"])
