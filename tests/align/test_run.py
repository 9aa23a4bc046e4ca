import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import align.config
import align.run
from align.run import WALL_CLOCK_FIELDS, Run, damage, latest_checkpoint, read_metrics
from align.state import flatten, unflatten
from base_model.checkpoint import load_weights, save_weights
from base_model.errors import GuardStop, Interrupted, UserError
from base_model.networks.packing import Segments
from tests.align.loop import METRICS, LoopConfig, network, train

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}


def files(out: Path) -> dict[str, bytes]:
    """Every tensor file of the newest checkpoint."""
    checkpoint = latest_checkpoint(out)
    assert checkpoint is not None
    found = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    assert len(found) == 4
    return found


def fresh(out: Path, **changes: Any) -> Run:
    return Run(out, LoopConfig(out=out, **changes), seed=0, resume=False, metrics=METRICS, quiet=True)


@pytest.fixture
def server() -> Iterator["subprocess.Popen[str]"]:
    """A process that trains in children of its own, one for every line it is sent."""
    command = [sys.executable, "-m", "tests.align.loop"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=ENVIRONMENT) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def begin(server: "subprocess.Popen[str]", out: Path) -> int:
    assert server.stdin is not None and server.stdout is not None
    print("--out", out, file=server.stdin, flush=True)
    return int(server.stdout.readline())


def ended(server: "subprocess.Popen[str]") -> int:
    assert server.stdout is not None
    return int(server.stdout.readline())


def wait_for_growth(file: Path, number: int) -> None:
    """Until `number` lines more than now are in `file`, or nothing comes."""
    lines = file.read_bytes().count(b"\n") if file.exists() else 0
    until = time.monotonic() + 30
    while time.monotonic() < until and not (file.exists() and file.read_bytes().count(b"\n") >= lines + number):
        time.sleep(0.0005)


@pytest.mark.timed
def test_a_run_killed_at_random_points_and_resumed_ends_bit_identical(tmp_path: Path, server: "subprocess.Popen[str]") -> None:
    begin(server, tmp_path / "whole")
    assert ended(server) == 0
    rng = random.Random(7)
    out = tmp_path / "killed"
    killed_at = []
    for _ in range(7):
        pid = begin(server, out)
        wait_for_growth(out / "metrics.jsonl", rng.randrange(1, 5))
        time.sleep(rng.random() * 0.02)
        with suppress(ProcessLookupError):  # on a busy machine it may have ended by itself
            os.kill(pid, signal.SIGKILL)
        if ended(server) == -signal.SIGKILL:
            checkpoint = latest_checkpoint(out)
            killed_at.append(((out / "metrics.jsonl").read_bytes().count(b"\n"), checkpoint and checkpoint.name))
    print("lines and checkpoint at each kill:", killed_at)
    begin(server, out)
    assert ended(server) == 0
    assert len(killed_at) >= 4, "the loop ended before it was killed"
    assert files(out) == files(tmp_path / "whole")
    assert read_metrics(out, wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)
    assert len(read_metrics(out)) == 32


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=100k none {tmp_path} && "
    unshared = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshared, mount + "true"], capture_output=True).returncode:
        pytest.skip("no private mounts here")
    command = f"{mount}{sys.executable} -m tests.align.loop --out {tmp_path}/run; status=$?; ls -A {tmp_path}/run/checkpoints; exit $status"
    done = subprocess.run([*unshared, command], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert "the disk is full" in message and "--resume" in message and str(tmp_path) in message
    assert "Traceback" not in done.stderr
    assert all(name.isdigit() for name in done.stdout.split())


def test_a_disk_that_fills_while_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=6))
    real, written = align.run.write_synced, []

    def full(path: Path, content: bytes) -> None:
        written.append(path)
        if len(written) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, content)

    monkeypatch.setattr(align.run, "write_synced", full)
    with pytest.raises(UserError, match=r"the disk is full, while writing .*checkpoints"):
        train(LoopConfig(out=tmp_path / "full", iterations=6))
    assert [folder.name for folder in (tmp_path / "full" / "checkpoints").iterdir()] == ["00000002"]
    monkeypatch.undo()
    resumed = train(LoopConfig(out=tmp_path / "full", iterations=6), resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_iteration_saves_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=9))
    step = Run.step

    def interrupted_step(self: Run, *arguments: Any) -> float:
        if self.iteration == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Run, "step", interrupted_step)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="--resume") as caught:
        train(LoopConfig(out=tmp_path / "cut", iterations=9))
    assert caught.value.exit_status == status
    assert signal.getsignal(number) is before
    assert latest_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoints" / "00000005"
    monkeypatch.undo()
    resumed = train(LoopConfig(out=tmp_path / "cut", iterations=9), resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert read_metrics(tmp_path / "cut", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_last_save_is_heard_and_the_run_goes_on_behind_its_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int) -> None:
    save = Run.save

    def interrupted_save(self: Run) -> None:
        if self.iteration == 4:
            os.kill(os.getpid(), number)
        save(self)

    monkeypatch.setattr(Run, "save", interrupted_save)
    with pytest.raises(Interrupted, match="after iteration 4 of 4 and is saved") as caught:
        train(LoopConfig(out=tmp_path / "cut", iterations=4))
    assert caught.value.exit_status == status
    monkeypatch.undo()
    resumed, whole = train(LoopConfig(out=tmp_path / "cut", iterations=4), resume=True), train(LoopConfig(out=tmp_path / "whole", iterations=4))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert read_metrics(tmp_path / "cut", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)


@pytest.mark.parametrize(("number", "later", "stops"), [(signal.SIGTERM, 0.0, False), (signal.SIGTERM, 2.0, False), (signal.SIGINT, 0.0, False), (signal.SIGINT, 2.0, True)])
def test_a_signal_that_torchrun_passes_on_again_does_not_keep_a_run_from_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, later: float, stops: bool) -> None:
    step, now = Run.step, time.monotonic

    def interrupted_step(self: Run, *arguments: Any) -> float:
        if self.iteration == 4:
            os.kill(os.getpid(), number)
            monkeypatch.setattr(time, "monotonic", lambda: now() + later)
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Run, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt if stops else Interrupted):
        train(LoopConfig(out=tmp_path, iterations=9))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.name == ("00000004" if stops else "00000005")


def test_the_state_of_an_8_bit_optimizer_survives_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=8), eight_bit=True)
    state = load_weights(tmp_path / "whole" / "checkpoints" / "00000008" / "optimizer.safetensors")[0]
    assert any(tensor.dtype == torch.uint8 for tensor in state.values())
    train(LoopConfig(out=tmp_path / "parts", iterations=5), eight_bit=True)
    resumed = train(LoopConfig(out=tmp_path / "parts", iterations=8), resume=True, eight_bit=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_finished_run_resumes_to_the_same_end(tmp_path: Path) -> None:
    cfg = LoopConfig(out=tmp_path, iterations=4)
    first, lines = train(cfg), read_metrics(tmp_path, wall_clock=False)
    again = train(cfg, resume=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert read_metrics(tmp_path, wall_clock=False) == lines


def test_a_folder_that_holds_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    next(fresh(tmp_path).iterations(1, save_every=1, label="toy"))
    with pytest.raises(UserError, match=r"already holds a run\. Use --resume to go on with it, or another --out"):
        fresh(tmp_path)


def test_a_run_that_never_began_leaves_nothing_behind(tmp_path: Path) -> None:
    fresh(tmp_path / "run", lr=0.5)
    assert not (tmp_path / "run").exists()
    next(fresh(tmp_path / "run").iterations(1, save_every=1, label="toy"))


def test_two_runs_that_looked_at_one_empty_folder_do_not_share_it(tmp_path: Path) -> None:
    first, second = fresh(tmp_path), fresh(tmp_path)
    first.log(loss=1.0)
    with pytest.raises(UserError, match="already holds a run"):
        second.log(loss=2.0)
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_cannot_work_in_one_folder(resume: bool, tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=2))
    if not resume:
        (tmp_path / "run.json").unlink()
    code = f"""if True:
        import sys
        from pathlib import Path
        from tests.align.loop import LoopConfig, train
        from base_model.errors import UserError
        try:
            train(LoopConfig(out=Path({str(tmp_path)!r}), iterations=4), resume={resume})
        except UserError as error:
            sys.exit(str(error))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "another process is at work in" in done.stderr, done.stderr
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "00000002"


def test_a_checkpoint_moved_aside_by_a_killed_process_is_found_again(tmp_path: Path) -> None:
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=6))
    train(LoopConfig(out=tmp_path / "cut", iterations=4))
    folder = tmp_path / "cut" / "checkpoints"
    (folder / "00000004").rename(folder / ".old-00000004")
    shutil.rmtree(folder / "00000002")
    (folder / ".partial-00000004").mkdir()
    (folder / ".DS_Store").write_text("somebody looked at it")
    resumed = train(LoopConfig(out=tmp_path / "cut", iterations=6), resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert sorted(each.name for each in folder.iterdir()) == [".DS_Store", "00000004", "00000006"]


def test_a_checkpoint_survives_a_replacement_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fresh(tmp_path)
    run.save()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial-"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(UserError, match="Input/output error"):
        run.save()
    assert [each.name for each in (tmp_path / "checkpoints").iterdir()] == ["00000000"]


@pytest.mark.parametrize("name", ["run.json", "checkpoints/00000002/state.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "[" * 100_000])
def test_a_damaged_record_is_a_user_error(name: str, content: str, tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=2))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError):
        train(LoopConfig(out=tmp_path, iterations=4), resume=True)
    (tmp_path / "metrics.jsonl").write_text(content)
    if content not in ("", "{}"):
        with pytest.raises(UserError):
            read_metrics(tmp_path)


def test_resuming_with_another_config_names_the_changed_keys(tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=2))
    with pytest.raises(UserError, match=r"lr \(0.01 -> 0.5\), seed \(0 -> 3\)\."):
        train(LoopConfig(out=tmp_path, iterations=4, lr=0.5, seed=3), resume=True)
    moved = tmp_path.parent / "moved"
    shutil.move(tmp_path, moved)
    train(LoopConfig(out=moved, iterations=3), resume=True)


def test_a_run_of_before_a_key_was_there_went_by_its_default(tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=2))
    description = tmp_path / "run.json"
    told = json.loads(description.read_text())
    del told["config"]["lr"]
    description.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"lr \(0.01 -> 0.5\)\."):
        train(LoopConfig(out=tmp_path, iterations=3, lr=0.5), resume=True)
    train(LoopConfig(out=tmp_path, iterations=3), resume=True)


def test_a_run_that_goes_on_with_other_code_says_so_and_keeps_what_made_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    versions = {"python": "3.12.1", "torch": "2.9.0"}

    def sessions(iterations: int, commit: str, **changes: str) -> list[tuple[int, str, dict[str, str]]]:
        monkeypatch.setattr(align.config, "commit", lambda: commit)
        monkeypatch.setattr(align.config, "versions", lambda: versions | changes)
        train(LoopConfig(out=tmp_path, iterations=iterations), resume=True)
        found = json.loads((tmp_path / "run.json").read_text())
        assert (found["commit"], found["versions"]) == (commit, versions | changes)
        assert (tmp_path / "checkpoints" / f"{iterations:08d}" / "run.json").read_text() == (tmp_path / "run.json").read_text()
        return [(one["iteration"], one["commit"], one["versions"]) for one in found["sessions"]]

    begun = (0, "one", versions)
    assert sessions(2, "one") == [begun] == sessions(4, "one")
    assert "other code" not in capfd.readouterr().err
    assert sessions(6, "two", torch="2.10.0") == [begun, (4, "two", versions | {"torch": "2.10.0"})]
    (said,) = [line for line in capfd.readouterr().err.splitlines() if "other code" in line]
    assert said == "loop: goes on from iteration 4 with other code than before, commit (one -> two), torch (2.9.0 -> 2.10.0)"
    shutil.rmtree(tmp_path / "checkpoints" / "00000006")  # what the second made is lost
    assert sessions(8, "one") == [begun] and "other code" not in capfd.readouterr().err
    described = json.loads((tmp_path / "run.json").read_text())
    del described["sessions"]
    (tmp_path / "run.json").write_text(json.dumps(described))  # as earlier versions wrote it
    assert sessions(10, "three") == [begun, (8, "three", versions)]


def test_a_cut_metrics_file_or_checkpoint_is_reported(tmp_path: Path) -> None:
    cfg = LoopConfig(out=tmp_path, iterations=2)
    train(cfg)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="shorter than its checkpoint"):
        train(cfg, resume=True)
    (tmp_path / "metrics.jsonl").write_bytes(metrics)
    (tmp_path / "checkpoints" / "00000002" / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged checkpoint"):
        train(cfg, resume=True)


def spoilt(file: Path, how: str) -> None:
    """One byte changed in the middle, the second half cut off, nothing left, or no file."""
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


DAMAGES = [*itertools.product(["network.safetensors", "state.json", "run.json"], ["flipped", "cut", "empty", "gone"]), ("SHA256SUMS", "cut"), ("SHA256SUMS", "empty")]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_goes_on_from_the_one_before_it(name: str, how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=8))
    train(LoopConfig(out=tmp_path / "cut", iterations=6))
    folder = tmp_path / "cut" / "checkpoints"
    spoilt(folder / "00000006" / name, how)
    capfd.readouterr()
    resumed = train(LoopConfig(out=tmp_path / "cut", iterations=8), resume=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and f"damaged checkpoint, {folder / '00000006'}: " in said[0] and said[0].endswith("goes on from the checkpoint before it")
    assert all(torch.equal(resumed[each], whole[each]) for each in whole)
    assert read_metrics(tmp_path / "cut", wall_clock=False) == read_metrics(tmp_path / "whole", wall_clock=False)
    assert sorted(each.name for each in folder.iterdir()) == ["00000006", "00000008", "damaged-00000006"]


def test_where_every_checkpoint_is_damaged_the_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=4))
    for number in ("00000002", "00000004"):
        spoilt(tmp_path / "checkpoints" / number / "network.safetensors", "flipped")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"damaged checkpoint, .*00000002: network.safetensors is not what was written, and there is none before it"):
        train(LoopConfig(out=tmp_path, iterations=6), resume=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_checkpoint_without_sums_is_read_and_its_cut_files_are_found(tmp_path: Path) -> None:
    whole = train(LoopConfig(out=tmp_path / "whole", iterations=6))
    train(LoopConfig(out=tmp_path / "cut", iterations=4))
    for file in (tmp_path / "cut" / "checkpoints").glob("*/SHA256SUMS"):
        file.unlink()
        assert not damage(file.parent)
    spoilt(tmp_path / "cut" / "checkpoints" / "00000004" / "optimizer.safetensors", "cut")
    resumed = train(LoopConfig(out=tmp_path / "cut", iterations=6), resume=True)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_sums_are_those_that_sha256sum_checks(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    train(LoopConfig(out=tmp_path, iterations=2))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=checkpoint, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(list(checkpoint.iterdir())) - 1


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run.register("network", model)
    with pytest.raises(GuardStop, match=r"the loss is nan in iteration 1 of toy.*checkpoints/00000001") as caught:
        for i in run.iterations(3, save_every=1, label="toy"):
            if i == 0:
                continue
            run.backward(torch.log(torch.tensor(-1.0)) * model[0].weight.sum())
            run.step(optimizer, 1.0)
    assert caught.value.exit_status == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    run.backward(weight.abs().sqrt().sum())
    with pytest.raises(GuardStop, match="the gradient norm is nan"):
        run.step(optimizer, 1.0)
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_step_clips_like_torch_and_returns_the_norm_before(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    ours, theirs = network(), network()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(16, 8)
    norms = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        loss = 100 * (model(x) - x).square().mean()
        if model is ours:
            for _ in range(4):
                run.backward(loss if _ == 3 else 0 * model[0].weight.sum(), divide_by=2)
            norms.append(run.step(optimizer, 0.5))
        else:
            (loss / 2).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 0.5
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_noise_does_not_depend_on_the_split_into_batches(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    whole = run.noise((2, 3), 6, "sampling", 10)
    parts = torch.cat([run.noise((2, 3), 4, "sampling", 10), run.noise((2, 3), 2, "sampling", 14)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, run.noise((2, 3), 6, "training", 10))


def test_noise_is_standard_normal_across_clips(tmp_path: Path) -> None:
    noise = fresh(tmp_path).noise((16,), 2000, "sampling", 0)  # [2000,16]
    print("mean", float(noise.mean()), "std", float(noise.std()))
    assert abs(float(noise.mean())) < 4 / 32000**0.5
    assert abs(float(noise.std()) - 1) < 4 / 64000**0.5
    correlation = torch.corrcoef(noise.T) - torch.eye(16)
    assert float(correlation.abs().max()) < 5 / 2000**0.5


def test_streams_depend_on_seed_stream_and_index_only(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first = run.rng("labelers", 3).random()
    torch.manual_seed(5)
    run.rng("labelers", 4).random()
    assert run.rng("labelers", 3).random() == first
    other = Run(tmp_path / "b", LoopConfig(out=tmp_path / "b"), seed=1, resume=False, metrics={}, quiet=True)
    draws = {float(torch.rand((), generator=r.generator(s, i))) for r in (run, other) for s in ("a", "b") for i in (0, 1)}
    assert len(draws) == 8


def test_forward_passes_count_clips_dense_and_packed(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def forward(self, tokens: torch.Tensor, segments: Segments) -> torch.Tensor:
            return tokens

    run, dense, packed = fresh(tmp_path), network(), Packed()
    run.count_forwards(dense)
    run.count_forwards(packed)
    dense(torch.zeros(5, 8))
    assert run.forward_passes == 5
    packed(torch.zeros(12, 4), Segments((3, 4, 5)))
    assert run.forward_passes == 8
    packed(tokens=torch.zeros(12, 4), segments=Segments((6, 6)))
    assert run.forward_passes == run.forward_equivalents == 10


def test_a_backward_pass_counts_two_and_a_look_nothing(tmp_path: Path) -> None:
    run, net = fresh(tmp_path), network()
    run.count_forwards(net)
    clips = torch.ones(5, 8)
    loss = net(clips).sum()
    assert run.forward_equivalents == 5, "a graph alone costs nothing more"
    loss.backward()
    torch.autograd.grad(net(clips).sum(), list(net.parameters()))
    assert run.forward_passes == 10 and run.forward_equivalents == 2 * (5 + 2 * 5)
    with run.looking():
        net(clips).sum().backward()
    assert run.forward_passes == 15 and run.forward_equivalents == 30
    run.log(loss=0.0)
    assert read_metrics(tmp_path)[-1]["forward_equivalents"] == 30
    checkpoint(lambda x: net(x), clips, use_reentrant=False).sum().backward()
    assert run.forward_equivalents == 30 + 4 * 5, "what is computed again is paid for again"


def test_metrics_are_one_sorted_line_each_and_undocumented_names_are_refused(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    run.log(loss=torch.tensor(0.5), drift=float("nan"))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == ["drift", "forward_equivalents", "forward_passes", "iteration", "loss", "seconds"]
    assert json.loads(line)["loss"] == 0.5 and json.loads(line)["drift"] is None
    with pytest.raises(ValueError, match="undocumented metrics \\['los'\\]"):
        run.log(los=1.0)
    with pytest.raises(ValueError, match="scalars"):
        run.log(loss=torch.zeros(3))
    sentences = json.loads((tmp_path / "metrics.json").read_text())
    assert set(sentences) == {*METRICS, "iteration", "seconds", "forward_passes", "forward_equivalents"} and all(text.endswith(".") for text in sentences.values())
    assert {"seconds"} <= WALL_CLOCK_FIELDS
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_what_a_run_that_was_killed_before_its_first_checkpoint_drew_is_drawn_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume in (False, True):
        run = Run(tmp_path, LoopConfig(out=tmp_path), seed=0, resume=resume, metrics=METRICS, quiet=True)
        for i in run.iterations(5, save_every=10, label="toy"):
            run.log(loss=float(i + 10 * resume))
            if i == 2 and not resume:
                break
        run._flush_tensorboard()
        second = int(time.time())
        while int(time.time()) == second:  # files of events are named by it, and read in the order of their names
            time.sleep(0.01)
    drawn = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in drawn] == [(i, 10.0 + i) for i in range(5)]


def test_only_the_trainable_part_of_a_network_is_kept_when_asked(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = network()
        for layer in (0, 1):
            model[layer].requires_grad_(False)
        return model

    def run_of(model: nn.Module, *, resume: bool, n: int) -> None:
        run = Run(tmp_path, LoopConfig(out=tmp_path), seed=0, resume=resume, metrics={}, quiet=True)
        run.register("adapter", model, trainable_only=True)
        for _ in run.iterations(n, save_every=1, label="toy"):
            with torch.no_grad():
                model[3].weight.add_(1.0)

    first, second = build(), build()
    run_of(first, resume=False, n=2)
    saved, _ = load_weights(tmp_path / "checkpoints" / "00000002" / "adapter.safetensors")
    assert len(saved) == 2
    run_of(second, resume=True, n=2)
    assert torch.equal(first[3].weight, second[3].weight) and not torch.equal(first[0].weight, second[0].weight)


def test_stop_makes_the_iteration_the_last_one_also_after_a_resume(tmp_path: Path) -> None:
    cfg = LoopConfig(out=tmp_path)
    run = fresh(tmp_path)
    seen = []
    for i in run.iterations(10, save_every=4, label="toy"):
        seen.append(i)
        if i == 2:
            run.stop()
    again = Run(tmp_path, cfg, seed=0, resume=True, metrics=METRICS, quiet=True)
    assert seen == [0, 1, 2]
    assert list(again.iterations(10, save_every=4, label="toy")) == [] and again.iteration == 3


def test_only_the_last_two_checkpoints_are_kept_each_with_the_resolved_config(tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=7))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["00000006", "00000007"]
    for folder in folders:
        description = json.loads((folder / "run.json").read_text())
        assert description["config"]["iterations"] == 7 and {"commit", "versions", "seed"} <= set(description)


def test_registering_something_else_than_the_checkpoint_keeps_is_refused(tmp_path: Path) -> None:
    train(LoopConfig(out=tmp_path, iterations=2))
    run = Run(tmp_path, LoopConfig(out=tmp_path), seed=0, resume=True, metrics=METRICS, quiet=True)
    run.register("network", network())
    with pytest.raises(ValueError, match="this run registered \\['network'\\]"):
        next(run.iterations(4, save_every=1, label="toy"))


def test_progress_shows_the_time_left_on_standard_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(LoopConfig(out=tmp_path, iterations=3))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "loop 3/3" in captured.err and "0:00 left" in captured.err and "loss" in captured.err


def test_nested_state_survives_flattening_exactly(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree: dict[str, Any] = {
        "state": {0: {"step": torch.tensor(3.0), "half": torch.ones(2, dtype=torch.bfloat16)}, 1: {}},
        "groups": [{"betas": (0.9, 0.1 + 0.2), "foreach": None, "name": "a", "flag": True}],
        "odd": (float("inf"), -0.0, 10**20, []),
        "view": shared[::2],
        "tied": [shared, shared],
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }
    skeleton, tensors = flatten(tree)
    save_weights(tmp_path / "state.safetensors", tensors, {})
    back = unflatten(json.loads(json.dumps(skeleton)), load_weights(tmp_path / "state.safetensors")[0])
    assert back["groups"] == tree["groups"] and isinstance(back["groups"][0]["betas"], tuple)
    assert back["odd"] == tree["odd"] and str(back["odd"][1]) == "-0.0"
    assert list(back["state"]) == [0, 1] and back["state"][1] == {}
    before = (tree["state"][0]["half"], shared[::2], shared, shared, tree["bytes"], tree["empty"])
    after = (back["state"][0]["half"], back["view"], *back["tied"], back["bytes"], back["empty"])
    for mine, theirs in zip(after, before, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    with pytest.raises(TypeError, match=r"state\['a'\]\[0\] is a set"):
        flatten({"a": [set()]})


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_items_in_order_almost_evenly_and_none_goes_without(tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fresh(tmp_path)
    run.processes = processes
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(run, "rank", rank)
        shares.append(run.share(range(8), "policy.micro_batch"))
        assert len(run.share([1, 2])) <= max(1, 2 // processes)
        if processes > 2:
            with pytest.raises(UserError, match=r"processes cannot share 2 micro-batches, policy\.micro_batch"):
                run.share([1, 2], "policy.micro_batch")
    assert [item for share in shares for item in share] == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_run_that_is_not_sharded_keeps_no_pace(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    run.keep_pace(0, lambda: pytest.fail("a pass for nothing"))


def test_a_process_that_lags_makes_passes_that_are_not_counted_and_one_that_leads_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, network, made = fresh(tmp_path), nn.Linear(2, 2), []
    run.count_forwards(network)
    monkeypatch.setattr(run, "_sharded", network)
    monkeypatch.setattr(run, "gather", lambda own: [*own, 5])
    network(torch.zeros(3, 2)).sum().backward()
    for passes in (2, 5, 7):
        run.keep_pace(passes, lambda passes=passes: made.append(passes) or network(torch.zeros(4, 2)).sum().backward())  # type: ignore[misc,func-returns-value]
    assert made == [2, 2, 2] and (run.forward_passes, run.forward_equivalents) == (3, 9)


def test_gradients_without_any_loss_stay_as_they_were_and_none_is_invented(tmp_path: Path) -> None:
    run, weight = fresh(tmp_path), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    assert run.backward_each(optimizer, lambda part: iter(()), [0, 1]) == [] and weight.grad is None


@pytest.mark.slow
def test_two_processes_give_the_same_weights_on_every_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.align.loop", "--out", str(tmp_path), "--iterations", "4"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path)) == 6 and latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "00000004"
    assert read_metrics(tmp_path)[-1]["forward_passes"] == 2 * 4 + 4 * 4, "all rows in both before the loop, then each has half of them"
