"""Filters in processes of their own: what they are asked and say arrives as it is, limits hold, and nothing outlives the process that asked."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from recipes.generate import safety_runner
from reward.safety.contract import Decision, Reason, Ruling, SafetyRunner, Verdict, to_json
from reward.safety.policy import load_policy
from reward.safety.process import InProcess, LateVideoFilter
from reward.safety.transport import Failure, Limits, Request
from reward.safety.video import DegenerateFilter, FlashFilter

POLICY = load_policy()
CLIPS = torch.rand(3, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ruling(text: str, verdict: Verdict = Verdict.ALLOW) -> Ruling:
    return Ruling(verdict, "P17", 0.1 if verdict == Verdict.ALLOW else 0.9, (Reason(text, 0.25, None, (1, 3)),), "probe", "1", 0.5)


class Probe:
    """Says what it was given and where it is; does what the prompt says."""

    id, version, threshold, policies = "probe", "1", 0.5, ("P17",)

    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        return [[ruling(f"{os.getpid()} {prompt}")] for prompt in prompts]

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        for prompt in prompts:
            if prompt == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt.startswith("sleep"):
                time.sleep(float(prompt.split()[1]))
            if prompt == "keep the interpreter":
                ctypes.PyDLL(None).sleep(60)
            if prompt.startswith("take"):
                torch.ones(int(prompt.split()[1]) << 18)
        told = [[ruling(f"{os.getpid()} {clip.double().sum():.6f} {clip.dtype} {fps} {torch.get_num_threads()}")] for clip in video]
        video.zero_()
        return told


class Chatty(Probe):
    def check_prompts(self, prompts: Sequence[str]) -> list[list[Ruling]]:
        print("a filter that talks")
        return [[ruling("x" * (70 << 20))]]


class Unsendable(Probe):
    def __init__(self) -> None:
        self.function = lambda: None


def words(decision: Decision) -> list[str]:
    return decision.rulings[0].reasons[0].text.split()


@pytest.fixture
def runner() -> Iterator[SafetyRunner]:
    made = SafetyRunner([Probe()], POLICY, limits={"probe": Limits(20.0, memory=256 << 20, restarts=1)}, transport=InProcess)
    yield made
    made.close()


def test_clips_prompts_and_rulings_arrive_as_they_are(runner: SafetyRunner) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        video = CLIPS.to(dtype)
        before = video.clone()
        decisions = runner.check_videos(video, ["a"] * 3, 23.976)
        assert torch.equal(video, before)
        for decision, clip in zip(decisions, video, strict=True):
            process, total, *rest = words(decision)
            assert int(process) != os.getpid() and float(total) == pytest.approx(float(clip.double().sum()), abs=1e-6)
            assert rest == [str(dtype), "23.976", str(torch.get_num_threads())]
            assert decision.rulings[0].reasons[0].span == (1, 3) and decision.rulings[0].reasons[0].start == 0.25
    for prompt in ("", "😀 \ud800 \x00 é", "long " * 200_000):
        assert runner.check_prompts([prompt])[0].rulings[0].reasons[0].text.partition(" ")[2] == prompt
    assert runner.check_prompts([]) == [] and runner.check_videos(CLIPS[:0], [], 12.0) == []


def test_the_filters_that_come_with_the_package_rule_alike_in_threads_and_in_processes() -> None:
    flashing = torch.zeros(2, 13, 3, 32, 32)
    flashing[0, ::2] = 0.9
    here, there = safety_runner(), safety_runner(isolated=True)
    prompts = ["a red circle", "a str0be light"]
    try:
        assert [to_json(each) for each in here.check_videos(flashing, prompts, 12.0)] == [to_json(each) for each in there.check_videos(flashing, prompts, 12.0)]
        assert [to_json(each) for each in here.check_prompts(prompts)] == [to_json(each) for each in there.check_prompts(prompts)]
        assert here.lineage() == there.lineage() and here.counts == there.counts
    finally:
        there.close()


@pytest.mark.timed
def test_a_process_that_died_is_begun_anew_and_not_more_often_than_the_limit_in_a_row(runner: SafetyRunner) -> None:
    def ask(prompt: str) -> Decision:
        return runner.check_videos(CLIPS[:1], [prompt], 12.0)[0]

    first = words(ask("a"))[0]
    assert words(ask("b"))[0] == first
    os.kill(int(first), signal.SIGKILL)  # between two calls: the next one notices before it asks, or as it asks
    time.sleep(0.2)
    again = ask("c")
    assert again.verdict == Verdict.ALLOW and words(again)[0] != first
    assert "killed by SIGKILL" in ask("die").rulings[0].reasons[0].text and ask("d").verdict == Verdict.ALLOW
    assert [("killed by SIGKILL" in ask("die").rulings[0].reasons[0].text) for _ in range(3)] == [True, True, False]
    refused = ask("e")
    assert refused.verdict == Verdict.ERROR and "is not started again" in refused.rulings[0].reasons[0].text
    runner.close()
    assert ask("f").verdict == Verdict.ALLOW


def test_memory_is_limited_beside_what_the_filter_had_when_it_began(runner: SafetyRunner) -> None:
    small, large = (runner.check_videos(CLIPS[:1], [f"take {mebibytes}"], 12.0)[0] for mebibytes in (100, 400))
    assert small.verdict == Verdict.ALLOW and large.verdict == Verdict.ERROR and "memory" in large.rulings[0].reasons[0].text
    assert runner.check_videos(CLIPS[:1], ["a"], 12.0)[0].verdict == Verdict.ALLOW


def test_time_is_limited_for_each_filter_by_itself() -> None:
    slow = SafetyRunner([Probe(), FlashFilter(POLICY)], POLICY, limits={"probe": Limits(0.5)}, transport=InProcess)
    begun = time.monotonic()
    decision = slow.check_videos(CLIPS[:1], ["sleep 20"], 12.0)[0]
    assert time.monotonic() - begun < 15 and [each.verdict for each in decision.rulings] == [Verdict.ERROR, Verdict.ALLOW]
    assert decision.rulings[0].reasons[0].text == "probe: timed out after 0.5 s"
    slow.close()
    with pytest.raises(ValueError, match="limits for prbe"):
        SafetyRunner([Probe()], POLICY, limits={"prbe": Limits()})
    with pytest.raises(ValueError, match="above 0"):
        Limits(seconds=0)


def test_what_cannot_be_sent_or_is_too_much_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    unsendable, chatty = InProcess(Unsendable(), Limits()), InProcess(Chatty(), Limits())
    answer = unsendable.ask(Request(["a"]))
    assert isinstance(answer, Failure) and "cannot be started" in answer.text
    answer = chatty.ask(Request(["a"]))
    assert isinstance(answer, Failure) and "more than" in answer.text
    chatty.close()
    assert "talks" not in capfd.readouterr().out


def test_a_filter_that_is_built_late_is_built_there_and_has_to_be_what_was_declared() -> None:
    make = partial(DegenerateFilter, POLICY)
    right, other = (LateVideoFilter(make, "degenerate", version, 0.5, ("Q01",)) for version in ("1", "2"))
    runner = SafetyRunner([right], POLICY, transport=InProcess)
    assert runner.check_videos(CLIPS[:1] * 0, ["a"], 12.0)[0].verdict == Verdict.REVIEW
    assert right._built is None
    runner.close()
    runner = SafetyRunner([other], POLICY, transport=InProcess)
    decision = runner.check_videos(CLIPS[:1], ["a"], 12.0)[0]
    assert decision.verdict == Verdict.ERROR and "the filter's version is '1', declared was '2'" in decision.rulings[0].reasons[0].text
    runner.close()


def test_threads_that_ask_at_once_get_their_own_answers(runner: SafetyRunner) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(5):
            found[number] = runner.check_prompts([f"prompt {number}"])[0].rulings[0].reasons[0].text
            assert found[number].endswith(f"prompt {number}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 4 and all(text.endswith(f"prompt {number}") for number, text in found.items())


@pytest.mark.timed
def test_an_answer_nobody_waited_for_is_not_taken_for_the_next_one(runner: SafetyRunner) -> None:
    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    first = words(runner.check_videos(CLIPS[:1], ["a"], 12.0)[0])
    before = signal.signal(signal.SIGALRM, interrupted)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            runner.check_videos(CLIPS[1:2], ["sleep 1"], 12.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    then = words(runner.check_videos(CLIPS[:1], ["a"], 12.0)[0])
    assert then[1:] == first[1:] and then[0] != first[0]


PARENT = """
    import sys, torch
    from reward.safety.contract import SafetyRunner
    from reward.safety.policy import load_policy
    from reward.safety.process import InProcess
    from tests.reward.test_safety_process import Probe, words

    if __name__ == "__main__":
        runner = SafetyRunner([Probe()], load_policy(), transport=InProcess)
        print(words(runner.check_videos(torch.rand(1, 2, 3, 4, 4), ["a"], 12.0)[0])[0], flush=True)
        if sys.argv[1] == "busy":
            runner.check_videos(torch.rand(1, 2, 3, 4, 4), ["keep the interpreter"], 12.0)
"""


@pytest.mark.timed
@pytest.mark.parametrize("how", ["busy", "done"])
def test_no_filter_outlives_the_process_that_asked_it(tmp_path: Path, how: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(script), how], stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        if how != "done":
            time.sleep(0.3)
            parent.kill()
        parent.wait(20)
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
