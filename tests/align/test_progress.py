"""Progress in plain lines: how far, how long it took, and how long it will take where that can be told."""

from __future__ import annotations

import pytest

from align import progress
from align.progress import Progress, duration


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_durations_are_read_as_clocks_are() -> None:
    assert [duration(seconds) for seconds in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_the_time_left_comes_from_the_work_of_this_session(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("clips", total=100, done=10) as told:
        told.skip(30)
        clock[0] += 20
        told.advance("10 clips", steps=10)
        told.skip()
        clock[0] += 20
        told.advance(steps=9)
    assert lines(capsys) == ["clips 50/100  0:20 gone, 1:40 left  10 clips", "clips 60/100  0:40 gone, 1:24 left"]


def test_no_time_left_is_told_where_nobody_knows_how_much_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress("clips", total=None) as told:
        for _ in range(3):
            clock[0] += 6
            told.advance("note")
    assert lines(capsys) == ["clips 1  0:06 gone  note", "clips 3  0:18 gone  note"]
