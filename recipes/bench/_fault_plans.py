"""Plans of what goes wrong with commands, carried out on real ones at their smallest, and what must hold afterwards. `faults.py` asks for them by seed.

A plan is its seed: which kind, which command, which moment, how. Whatever went wrong, the folder then holds what an undisturbed run leaves behind, to the bit (`result`), answers
that were acknowledged are in the store, and what could not be done was said in one line with its exit status.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from base_model.errors import RushesError
from recipes.bench._fault_processes import Ended, Happens, Order, begin, fork, go_on, import_all, private_disk, reached, run

RL = ("ddpo", "grpo", "ppo", "nft", "dpo", "reward-gradient")
TRAINING = (*RL, "sft", "reward-model")
SHARED = ("grpo", "nft", "sft")
"""Commands that plans with two processes take: an undisturbed run of each is made for comparison."""
WATCHED = {**dict.fromkeys(RL, ("rollout", "update", "checkpoint", "write")), "sft": ("update", "checkpoint", "write", "encode"), "reward-model": ("update", "checkpoint", "write")}
WATCHED["encode"] = ("encode", "write")
"""Moments of each command."""
GRACE_SECONDS = 30.0
"""What schedulers give between SIGTERM and SIGKILL."""
DISK_BYTES = 256 << 20
ANSWERS = 8
SHOWN = 300  # characters of what a command said


class Whole(NamedTuple):
    """What an undisturbed run left behind, and how often it came to each moment."""

    result: dict[str, Any]
    moments: dict[str, int]
    seconds: float


class Broken(Exception):
    """Something that had to hold did not; the plan ends there."""


class Lost(Broken):
    """What was saved or acknowledged is not there any more, or is something else."""


class Stage:
    """Where plans are carried out: small weights and data in `root`, undisturbed runs as they are asked for, and a small disk where there is one."""

    def __init__(self, root: Path, *, disk: Path | None) -> None:
        self.root, self.disk = root, disk
        self._wholes: dict[tuple[str, int], Whole] = {}
        self._orders = 0
        for folder in (root / "logs", root / "whole"):
            folder.mkdir(parents=True, exist_ok=True)
        if not (root / "ready").exists():
            made = fork(partial(make_small, root), root / "logs" / "small").wait()
            if made.status:
                raise RuntimeError(made.said)
            (root / "ready").touch()

    def order(self, command: str, out: Path, *, resume: bool = True, **how: Any) -> Order:
        self._orders += 1
        return Order([*words(command, out, self.root), *(["--resume"] if resume else [])], self.root / "logs" / f"{self._orders:06d}", **how)

    def whole(self, command: str, processes: int = 1) -> Whole:
        if (command, processes) not in self._wholes:
            out = self.root / "whole" / f"{command}-{processes}"
            clear(out)
            ended = finished(run(self.order(command, out, processes=processes)))
            self._wholes[command, processes] = Whole(result(command, out), ended.moments, ended.seconds)
        return self._wholes[command, processes]


def make_small(root: Path) -> None:
    """A network, a reward model and a guard with fresh weights, a folder of clips, and rankings: what the commands need."""
    import torch

    from base_model.networks.dit import DiT, DiTConfig
    from base_model.prompts.text import TextEncoder
    from base_model.tiny import WEIGHTS, LatentVideoModel, load_codec, save_network
    from base_model.video.files import write_mp4
    from base_model.video.store import ClipStore, NewClip
    from recipes.shapes.prompts import make_prompts
    from reward.comparisons import Clip, Prompt, RankingEvent, write_comparisons
    from reward.matcher import Matcher, MatcherSize, save_matcher
    from reward.model import RewardModel, save_reward_model
    from reward.quality import Quality

    torch.manual_seed(0)
    config = DiTConfig(width=48, depth=2, heads=2, rotary_axes=(8, 8, 8))
    network = DiT(config)
    for parameter in network.tokens_out.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    encode = TextEncoder()
    save_network(root / "network.safetensors", LatentVideoModel(network, load_codec(WEIGHTS / "vae.safetensors"), encode, config))
    for name in ("reward", "guard"):
        (root / name).mkdir()
        save_reward_model(root / name, RewardModel(Matcher(), Quality(), ("overall",), encode), {"fps": [12.0]})
    save_matcher(root / "matcher.safetensors", Matcher(MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)))

    clips = root / "clips"
    clips.mkdir()
    rows = []
    for k in range(8):
        write_mp4(clips / f"{k}.mp4", torch.rand(9, 3, 32, 32), 12.0)
        rows.append({"file_name": f"{k}.mp4", "text": f"clip {k}"})
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = make_prompts(20, seed=5, split="train")
    new = [NewClip(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), prompt.text, prompt.prompt_id, j, {"steps": 1}, "small", 12.0) for prompt in asked for j in range(2)]
    stored = ClipStore(root / "candidates").add_many(new, preview=False)
    events = [
        RankingEvent(f"{i}-{person}", f"t{i}", prompt.prompt_id, person, tuple(row.clip_id for row in stored[2 * i : 2 * i + 2]), (1, 2) if (i + k) % 3 else (2, 1))
        for i, prompt in enumerate(asked)
        for k, person in enumerate(("ann", "bob"))
    ]
    write_comparisons(root / "rankings", events, clips=[Clip.of(row) for row in stored], prompts=[Prompt(prompt.prompt_id, prompt.text) for prompt in asked])


def words(command: str, out: Path, root: Path) -> list[str]:
    """The command line of a command at its smallest."""
    common = {"out": out, "seed": 3}
    if command == "encode":
        return line(command, {"out": out, "clips": root / "clips", "model": root / "network.safetensors", "windows.frames": 9, "workers": 1})
    if command == "sft":
        fit = {"iterations": 5, "capacity": 256, "packs": 2, "held_out": 2, "evaluate_every": 2, "save_every": 1, "lr": 0.003}
        data = {"data": root / "clips", "cache": out.with_name(f"{out.name}-latents"), "model": root / "network.safetensors", "windows.frames": 9, "samples.steps": 2}
        return line(command, {**common, **data, **{f"fit.{key}": value for key, value in fit.items()}})
    if command == "reward-model":
        data = {"comparisons": root / "rankings", "clips": root / "candidates", "matcher": root / "matcher.safetensors"}
        return line(command, {**common, **data, "epochs": 1, "batch": 8, "save_every": 1, "checks": 0})
    policy = {"iterations": 4, "prompts": 2, "group_size": 2, "micro_batch": 2, "evaluate_every": 2, "save_every": 1, "lora_rank": 2}
    own: dict[str, dict[str, object]] = {
        "ddpo": {"updates": 2},
        "grpo": {"window": "sliding", "slide_every": 2, "first_steps": 2},
        "ppo": {"epochs": 1, "minibatches": 2},
        "nft": {"updates": 2, "old_rate": 0.1},
        "dpo": {"updates": 2, "which": "all"},
        "reward-gradient": {"method": "alignprop"},
    }
    files = {"model": root / "network.safetensors", "reward": root / "reward", "guard": root / "guard"}
    small = {"prompt_pool": 4, "held_out_prompts": 2, "guard_drop": 1000, "guards.stop": "never"}
    sampler = {"steps": 3, "frames": 5, "height": 16, "width": 16}
    told = {**{f"policy.{key}": value for key, value in {**policy, **own[command]}.items()}, **{f"sampler.{key}": value for key, value in sampler.items()}}
    return line(command, {**common, **files, **small, **told})


def line(command: str, keys: dict[str, Any]) -> list[str]:
    return [command, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


# What must hold


def clear(out: Path) -> None:
    """Nothing of a run is left."""
    for folder in (out, out.with_name(f"{out.name}-latents")):
        shutil.rmtree(folder, ignore_errors=True)


def result(command: str, out: Path) -> dict[str, Any]:
    """All that a command leaves behind, but for the time that it took."""
    from align.run import latest_checkpoint, read_metrics
    from recipes.weights import file_hash

    half = [str(path.relative_to(out)) for path in out.rglob(".*") if path.name != ".lock"]
    if half:
        raise Broken(f"half-written: {', '.join(sorted(half)[:3])}")
    if command == "encode":
        return entries(out)
    checkpoint = latest_checkpoint(out)
    if checkpoint is None:
        raise Broken("no checkpoint")
    state = {key: value for key, value in json.loads((checkpoint / "state.json").read_text()).items() if key not in ("seconds", "metrics_bytes")}
    files = [*checkpoint.glob("*.safetensors"), *out.glob("*.safetensors"), *out.glob("held_out/*"), *out.glob("guards.json")]
    return {"metrics": read_metrics(out, wall_clock=False), "state": state, **{str(file.relative_to(out)): file_hash(file) for file in sorted(files)}}


def entries(cache: Path) -> dict[str, Any]:
    """What a cache of latents holds, however it is cut into files."""
    from base_model.checkpoint import load_weights
    from recipes.latents import load_plan

    found: dict[str, Any] = {}
    for file in sorted(cache.glob("*/*.safetensors")):
        found |= {name: tensor.numpy().tobytes() for name, tensor in load_weights(file)[0].items()}
    plans = sorted(cache.glob("plans/*.parquet"))
    return {"entries": {key: hash(value) for key, value in found.items()}, "plans": [load_plan(plan) for plan in plans]}


def same(stage: Stage, command: str, out: Path, processes: int = 1) -> None:
    """Raises Broken where the folder holds anything else than that of an undisturbed run."""
    found, expected = result(command, out), stage.whole(command, processes).result
    if found != expected:
        differ = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
        raise Lost(f"not what an undisturbed run leaves behind: {', '.join(differ[:4])}")


def finished(ended: Ended) -> Ended:
    if ended.status != 0:
        raise Broken(f"status {ended.status} where it had to end well: {ended.said.strip()[-SHOWN:]!r}")
    return ended


def refused(ended: Ended, status: int, *says: str) -> None:
    """It ended with that status, and one line that says why."""
    told = [text for text in ended.said.splitlines() if text.startswith("rushes: ")]
    if ended.status != status or len(told) != 1 or "Traceback" in ended.said:
        raise Broken(f"status {ended.status} and {len(told)} lines where one and {status} had to come: {ended.said.strip()[-SHOWN:]!r}")
    for part in says:
        if part not in told[0]:
            raise Broken(f"did not say {part!r}: {told[0][:SHOWN]!r}")


def moment_of(dice: random.Random, stage: Stage, command: str, processes: int = 1, among: Sequence[str] = (), share: float = 1.0) -> tuple[str, int]:
    """A moment that an undisturbed run comes to, and for which time, within the first `share` of them."""
    moments = stage.whole(command, processes).moments
    moment = dice.choice([each for each in among or WATCHED[command] if moments.get(each)])
    return moment, dice.randint(1, max(1, round(share * moments[moment])))


# What goes wrong


def killed(stage: Stage, dice: random.Random, out: Path, commands: Sequence[str]) -> str:
    """SIGKILL, up to three times, at a moment or after some time."""
    command, told = dice.choice(commands), []
    times = dice.randint(1, 3)
    for _ in range(times):
        if dice.random() < 0.3:
            after = dice.random() * stage.whole(command).seconds / times
            started = begin(stage.order(command, out))
            time.sleep(after)
            started.kill()
            told.append(f"after {after:.1f} s")
            continue
        moment, number = moment_of(dice, stage, command, share=1 / times)
        ended = run(stage.order(command, out, happens=Happens("kill", moment, number)))
        if ended.status not in (-signal.SIGKILL, 0):
            raise Broken(f"status {ended.status}: {ended.said.strip()[-SHOWN:]!r}")
        told.append(f"at {moment} {number}" if ended.status else f"not at {moment} {number}, which did not come")
    finished(run(stage.order(command, out)))
    same(stage, command, out)
    return f"{command} killed {', '.join(told)}"


def rank_killed(stage: Stage, dice: random.Random, out: Path) -> str:
    """SIGKILL for one of two ranks: torchrun's agent begins both anew, from the last checkpoint; or for all and the agent, and the run is begun anew."""
    command, everybody = dice.choice(SHARED), dice.random() < 0.3
    moment, number = moment_of(dice, stage, command, 2, [each for each in WATCHED[command] if each in ("rollout", "update", "checkpoint")])
    rank = 0 if moment == "checkpoint" else dice.randrange(2)
    ended = run(stage.order(command, out, processes=2, restarts=2, happens=Happens("kill all" if everybody else "kill", moment, number, rank)))
    if everybody:
        if ended.status != -signal.SIGKILL:
            raise Broken(f"was not killed: status {ended.status}")
        ended = run(stage.order(command, out, processes=2))
    finished(ended)
    same(stage, command, out, 2)
    return f"{'all of' if everybody else f'rank {rank} of'} {command} killed at {moment} {number}"


def told_to_end(stage: Stage, dice: random.Random, out: Path) -> str:
    """SIGTERM from a scheduler, to every process: what is begun is finished and saved in time, and the run goes on where it was."""
    processes = dice.choice((1, 1, 2))
    command = dice.choice(SHARED if processes == 2 else (*TRAINING, "encode"))
    moment, number = moment_of(dice, stage, command, processes, [each for each in WATCHED[command] if processes == 1 or each in ("rollout", "update")])
    ended = run(stage.order(command, out, processes=processes, happens=Happens("signal", moment, number)))
    if ended.seconds > GRACE_SECONDS:
        raise Broken(f"ended {ended.seconds:.0f} seconds after SIGTERM")
    if ended.status == 0:  # it came behind the loop's last look at it
        same(stage, command, out, processes)
    elif processes == 1:
        refused(ended, 128 + signal.SIGTERM, "--resume")
    elif ended.status != 1 or "Traceback" in ended.said or "--resume" not in ended.said:  # torchrun's agent has one status for all ends
        raise Broken(f"status {ended.status} of two ranks: {ended.said.strip()[-SHOWN:]!r}")
    finished(run(stage.order(command, out, processes=processes)))
    same(stage, command, out, processes)
    return f"{command} in {processes} processes, SIGTERM at {moment} {number}, ended {ended.seconds:.1f} s later with status {ended.status}"


def disk_full(stage: Stage, dice: random.Random, out: Path) -> str:
    """The disk has less room than the run needs; then it has it."""
    if stage.disk is None:
        raise Broken("no private mounts here")
    command = dice.choice((*TRAINING, "encode"))
    stage.whole(command)
    whole, there = stage.root / "whole" / f"{command}-1", stage.disk / "run"
    needed = sum(file.stat().st_size for folder in (whole, whole.with_name(f"{whole.name}-latents")) for file in folder.rglob("*") if file.is_file())
    room = dice.randrange(max(1, int(0.9 * needed)))
    clear(there)
    ballast = stage.disk / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(stage.disk).free - room))
    try:
        ended = run(stage.order(command, there))
    finally:
        ballast.unlink()
    if ended.status != 0:
        refused(ended, 2, "the disk is full")
    finished(run(stage.order(command, there)))
    same(stage, command, there)
    clear(there)
    return f"{command} with {room:,} bytes of about {needed:,}, status {ended.status}"


def spoil(dice: random.Random, file: Path) -> str:
    """Damages a file; says how."""
    content = bytearray(file.read_bytes())
    how = dice.choice(("a bit flipped", "cut off", "emptied", "zeroed", "deleted"))
    if how == "deleted":
        file.unlink()
        return how
    if how == "a bit flipped" and content:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif how == "cut off":
        content = content[: dice.randrange(max(1, len(content)))]
    elif how == "emptied":
        content = bytearray()
    else:
        content = bytearray(len(content))
    file.write_bytes(content)
    return how


def checkpoint_damaged(stage: Stage, dice: random.Random, out: Path) -> str:
    """A file of the newest checkpoint of a killed run is not what was written: the one before it is used, which is told."""
    from align.run import SUMS, latest_checkpoint

    command = dice.choice(TRAINING)
    moments = stage.whole(command).moments
    number = dice.randint(moments["update"] * 3 // 4 + 1, moments["update"])
    run(stage.order(command, out, happens=Happens("kill", "update", number)))
    newest = latest_checkpoint(out)
    assert newest is not None and len([each for each in newest.parent.iterdir() if each.name.isdigit()]) == 2, "saved twice before three quarters of the updates"
    file = dice.choice(sorted(each for each in newest.iterdir() if each.name != SUMS))
    how = spoil(dice, file)
    ended = finished(run(stage.order(command, out)))
    if f"damaged checkpoint, {newest}: " not in ended.said:
        raise Broken(f"did not say that {newest.name} is damaged: {file.name} {how}")
    same(stage, command, out)
    return f"{command}, {file.name} of checkpoint {newest.name} {how}"


def cache_damaged(stage: Stage, dice: random.Random, out: Path) -> str:
    """A file of the cache of latents is not what was written: what it held is made anew, and who trains on it learns the same."""
    command = dice.choice(("encode", "sft"))
    cache = out.with_name(f"{out.name}-latents") if command == "sft" else out
    stage.whole(command)
    whole = stage.root / "whole" / f"{command}-1"
    shutil.copytree(whole.with_name(f"{whole.name}-latents") if command == "sft" else whole, cache)
    file = dice.choice(sorted(file for file in cache.rglob("*") if file.is_file()))
    how = spoil(dice, file)
    finished(run(stage.order(command, out)))
    same(stage, command, out)
    if entries(cache)["entries"] != entries(whole if command == "encode" else whole.with_name(f"{whole.name}-latents"))["entries"]:
        raise Broken(f"the cache holds other entries, {file.name} {how}")
    return f"{command}, {file.relative_to(cache).parts[0]}/{file.suffix[1:]} {how}"


def clock_jumps(stage: Stage, dice: random.Random, out: Path) -> str:
    """The wall's clock jumps by hours at every moment; half of the runs are killed, too."""
    command, told = dice.choice((*TRAINING, "encode")), ""
    if dice.random() < 0.5:
        moment, number = moment_of(dice, stage, command)
        run(stage.order(command, out, happens=Happens("kill", moment, number), jumps=dice.randrange(1 << 30)))
        told = f", killed at {moment} {number}"
    ended = finished(run(stage.order(command, out, jumps=dice.randrange(1 << 30))))
    same(stage, command, out)
    if "Traceback" in ended.said or re.search(r"-\d+:\d\d (gone|left)|\d{3}:\d\d:\d\d", ended.said):
        raise Broken(f"said: {ended.said.strip()[-SHOWN:]!r}")
    return f"{command}{told}, the clock jumps"


def two_runs(stage: Stage, dice: random.Random, out: Path) -> str:
    """A second run is begun in the folder of one that is at work: it is refused in one line and changes nothing."""
    command, resume = dice.choice(TRAINING), dice.random() < 0.5
    moment, number = moment_of(dice, stage, command, among=("update", "checkpoint"))
    order = stage.order(command, out, happens=Happens("wait", moment, number))
    first = begin(order)
    try:
        if not reached(order):
            raise Broken(f"never came to {moment} {number}")
        before = contents(out)
        second = run(stage.order(command, out, resume=resume))
        refused(second, 2, "another process is at work in" if resume else "already holds a run")
        if contents(out) != before:
            raise Broken("the second run changed the first one's files")
        go_on(order)
        finished(first.wait())
    finally:
        first.kill()
    same(stage, command, out)
    return f"{command}, a second one {'with' if resume else 'without'} --resume at {moment} {number}"


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run; TensorBoard's are written by a thread, when it likes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file() and "tensorboard" not in file.parts}


# Servers


def served(stage: Stage, words: Sequence[str], port: int, *, jumps: int | None = None) -> Any:
    """A server command that answers on its port."""
    import http.client

    stage._orders += 1
    started = begin(Order([*words, "--port", str(port)], stage.root / "logs" / f"{stage._orders:06d}", jumps=jumps))
    until = time.monotonic() + 60
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/api/health" if words[0] == "app" else "/health")
            if connection.getresponse().status == 200:
                return started
        except OSError:
            pass
        finally:
            connection.close()
        if os.waitpid(started.pid, os.WNOHANG)[0]:
            break
        time.sleep(0.05)
    started.kill()
    raise Broken(f"did not serve: {started.log.read_text()[-SHOWN:]!r}")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def reward_server_killed(stage: Stage, dice: random.Random, out: Path) -> str:
    """Of two servers of one reward model, first one is killed: every score is the model's own; then the other: the run is stopped in one line, and no score is made up."""
    out.mkdir(parents=True)
    ports, at = [free_port(), free_port()], dice.randrange(1, 5)
    servers = [served(stage, ["serve-reward", "--model", str(stage.root / "reward"), "--fps", "12"], port) for port in ports]
    try:
        order = stage.root / "logs" / f"client-{dice.randrange(1 << 30)}"
        client = fork(partial(ask_servers, stage.root, ports, at, out / "asked", [each.pid for each in servers], dice.random() < 0.5), order).wait()
    finally:
        for each in servers:
            each.kill()
    finished(client)
    return f"the first of two reward servers killed at request {at}, then the second"


def ask_servers(root: Path, ports: Sequence[int], at: int, sign: Path, pids: Sequence[int], while_asking: bool) -> None:
    """The client's side of that plan, in a process of its own."""
    import threading

    import torch

    from base_model.errors import GuardStop
    from base_model.prompts.text import TextEncoder
    from reward.judges.exchange import Endpoint, Patience
    from reward.judges.remote import RemoteReward
    from reward.model import load_reward_model

    model = load_reward_model(root / "reward", TextEncoder())
    patience = Patience(seconds=20, tries=2, wait=0.01)
    remote = RemoteReward(*(Endpoint(f"http://127.0.0.1:{port}", patience=patience) for port in ports), fps=12.0)
    for k in range(6):
        video = torch.randint(0, 256, (2, 5, 3, 16, 16), generator=torch.Generator().manual_seed(k)).float() / 255
        prompts = [f"a red circle moves {k}", "a blue bar grows"]
        if k == at and while_asking:
            threading.Timer(0.005, os.kill, (pids[0], signal.SIGKILL)).start()
        elif k == at:
            os.kill(pids[0], signal.SIGKILL)
        torch.testing.assert_close(remote(video, prompts).mean, model(video, prompts).mean, rtol=0, atol=1e-5)
    os.kill(pids[1], signal.SIGKILL)
    time.sleep(0.1)
    try:
        remote(video, ["another", "prompt"])
    except GuardStop as error:
        assert "\n" not in str(error) and "failed on 2 of 2" in str(error) and "--resume" in str(error), error
        return
    raise AssertionError("scores came from nobody")


# The store of answers


def database(stage: Stage, dice: random.Random, out: Path) -> str:
    """The app's server is killed, its database is locked, moved, deleted or has no room, while a labeler answers: what was acknowledged is there."""
    what = dice.choice(("killed", "killed while it answers", "locked", "moved", "deleted", *(["full"] if stage.disk else [])))
    folder, file, port = (stage.disk / "app" if what == "full" and stage.disk else out), stage.root / "logs" / "store.json", free_port()
    shutil.rmtree(folder, ignore_errors=True)
    finished(fork(partial(make_store, folder, file), stage.root / "logs" / "store").wait())
    project, cookie, csrf = json.loads(file.read_text())
    labeler = Labeler(port, project, cookie, csrf, dice)
    serve = partial(served, stage, ["app", "serve", "--out", str(folder)], port, jumps=dice.choice((None, dice.randrange(1 << 30))))
    at = dice.randrange(1, ANSWERS - 1)
    server = serve()
    try:
        for k in range(ANSWERS):
            if k == at:
                server = trouble(what, stage, dice, folder, labeler, server, serve)
            labeler.answer()
        os.kill(server.pid, signal.SIGTERM)
        ended = server.wait(60)
        if ended.status != 128 + signal.SIGTERM:
            raise Broken(f"the app ended with {ended.status}: {ended.said.strip()[-SHOWN:]!r}")
    finally:
        server.kill()
    checked = fork(partial(check_store, folder, labeler.acknowledged), stage.root / "logs" / "store").wait()
    if checked.status:
        raise Lost(checked.said.strip()[-SHOWN:])
    shutil.rmtree(folder, ignore_errors=True)
    return f"the app's database {what} at answer {at}" if "killed" not in what else f"the app {what}, at answer {at}"


def trouble(what: str, stage: Stage, dice: random.Random, folder: Path, labeler: Labeler, server: Any, serve: Callable[[], Any]) -> Any:
    """The trouble of a `database` plan; returns the server that is there afterwards."""
    if what == "killed":
        server.kill()
    elif what == "killed while it answers":
        labeler.answer(interrupt=partial(kill_after, dice.random() * 0.02, server.pid))
        server.kill()
    elif what == "locked":
        lock = fork(partial(lock_store, folder / "app.sqlite3", dice.uniform(0.5, 2.0)), stage.root / "logs" / "lock")
        time.sleep(0.3)
        labeler.answer()
        finished(lock.wait())
        return server
    elif what == "full":
        ballast = folder.parent / "ballast"
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - dice.randrange(8192)))
        labeler.answer(may_fail=True)
        ballast.unlink()
        return server
    else:
        aside = folder.with_name(f"{folder.name}-aside")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        if what == "deleted":
            finished(fork(partial(back_up, folder / "app.sqlite3", aside / "app.sqlite3"), stage.root / "logs" / "lock").wait())
        for part in folder.glob("app.sqlite3*"):
            part.unlink() if what == "deleted" else part.rename(aside / part.name)
        labeler.answer(may_fail=True)
        server.kill()
        for part in folder.glob("app.sqlite3*"):
            part.unlink()
        for part in aside.iterdir():
            part.rename(folder / part.name)
        aside.rmdir()
    server = serve()
    labeler.answer_again()
    return server


def kill_after(seconds: float, pid: int) -> None:
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)


class Labeler:
    """Answers one task after another, as a browser does: what was not acknowledged is sent again, with its id."""

    def __init__(self, port: int, project: str, cookie: str, csrf: str, dice: random.Random) -> None:
        self.port, self.project, self.session, self.dice = port, project, (cookie, csrf), dice
        self.acknowledged: list[str] = []
        self._open: tuple[str, dict[str, Any]] | None = None

    def _ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        from recipes.bench.app import Browser

        browser = Browser(f"127.0.0.1:{self.port}", *self.session)
        try:
            status, content = browser.ask(path, body)
            return status, json.loads(content) if content[:1] in (b"{", b"[") else content
        finally:
            browser.close()

    def answer(self, *, may_fail: bool = False, interrupt: Callable[[], None] | None = None) -> None:
        import http.client
        import threading

        try:
            status, told = self._ask(f"/api/projects/{self.project}/label/next", {})
            if status != 200 or "assignment_id" not in told:
                raise Broken(f"no task: {status} {str(told)[:SHOWN]}")
            self._ask(f"/api/assignments/{told['assignment_id']}")
            ranks = self.dice.sample(range(1, 5), 4)
            body = {"id": f"faults-{self.dice.getrandbits(64):016x}", "ranks": {"overall": ranks}, "watched": [1.0] * 4, "watch_ms": [2_000] * 4, "lead_time_ms": 3_000}
            self._open = (told["assignment_id"], body)
            if interrupt is not None:
                threading.Thread(target=interrupt).start()
            self.answer_again()
        except (OSError, http.client.HTTPException, Broken):
            if interrupt is None and not may_fail:
                raise

    def answer_again(self) -> None:
        """What is not acknowledged yet."""
        if self._open is None:
            return
        assignment, body = self._open
        status, told = self._ask(f"/api/assignments/{assignment}/answer", body)
        if status != 200:
            raise Broken(f"not acknowledged: {status} {str(told)[:SHOWN]}")
        self.acknowledged.append(body["id"])
        self._open = None


def make_store(folder: Path, told: Path) -> None:
    from recipes.bench.app import csrf_of, seed_store
    from reward.app.store import open_store

    store = open_store(folder)
    project, (cookie,) = seed_store(store, 1, 2 * ANSWERS + 8)
    told.write_text(json.dumps([project, cookie, csrf_of(store, cookie)]))
    store.close()


def lock_store(file: Path, seconds: float) -> None:
    """Another process that writes, and takes its time."""
    import sqlite3

    db = sqlite3.connect(file, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    time.sleep(seconds)
    db.execute("ROLLBACK")
    db.close()


def back_up(file: Path, copy: Path) -> None:
    import sqlite3

    with sqlite3.connect(file) as db, sqlite3.connect(copy) as other:
        db.backup(other)


def check_store(folder: Path, acknowledged: Sequence[str]) -> int:
    """Status 0 where every acknowledged answer is there once, and the log is whole."""
    from collections import Counter

    from reward.app import schema
    from reward.app.store import open_store

    store = open_store(folder)
    with store.reading() as db:
        rows = db.execute(schema.answer.select().with_only_columns(schema.answer.c.id, schema.answer.c.assignment_id)).all()
    store.verify_log()
    store.close()
    kept = Counter(row.id for row in rows)
    lost = [each for each in acknowledged if kept[each] != 1]
    twice = [each for each, number in Counter(row.assignment_id for row in rows).items() if number > 1]
    if lost or twice or len(acknowledged) < ANSWERS - 1:
        print(f"{len(lost)} of {len(acknowledged)} acknowledged answers are not there, {len(twice)} are there twice")
        return 1
    return 0


# Plans

KINDS: dict[str, Callable[[Stage, random.Random, Path], str]] = {
    "kill RL": partial(killed, commands=RL),
    "kill sft": partial(killed, commands=("sft",)),
    "kill encode": partial(killed, commands=("encode",)),
    "kill reward-model": partial(killed, commands=("reward-model",)),
    "kill a rank": rank_killed,
    "SIGTERM": told_to_end,
    "full disk": disk_full,
    "damaged checkpoint": checkpoint_damaged,
    "damaged cache": cache_damaged,
    "clock jumps": clock_jumps,
    "two runs": two_runs,
    "reward server": reward_server_killed,
    "database": database,
}


def kind_of(seed: int) -> str:
    return [*KINDS][seed % len(KINDS)]


def carry_out(stage: Stage, seed: int) -> dict[str, Any]:
    """One plan: what went wrong, whether everything held, and if not, what did not. Its folder is kept where something did not."""
    begun, out = time.monotonic(), stage.root / "runs" / str(seed)
    clear(out)
    out.parent.mkdir(exist_ok=True)
    what, broken, lost = "", "", False
    try:
        what = KINDS[kind_of(seed)](stage, random.Random(seed), out)
        clear(out)
    except Broken as error:
        broken, lost = str(error), isinstance(error, Lost)
    except (AssertionError, OSError, ValueError, RushesError) as error:
        broken = f"{type(error).__name__}: {error}"
    return {"seed": seed, "kind": kind_of(seed), "what": what, "held": not broken, "broken": broken, "lost": lost, "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    """The worker: a seed a line comes in, what came of its plan goes out, one JSON a line. Its folder is the first word."""
    root = Path(sys.argv[1])
    disk = root / "disk" if private_disk(root / "disk", DISK_BYTES) else None
    answers = os.dup(1)
    os.dup2(2, 1)  # commands print
    import_all()
    stage = Stage(root, disk=disk)
    for asked in sys.stdin:
        os.write(answers, (json.dumps(carry_out(stage, int(asked))) + "\n").encode())


if __name__ == "__main__":
    main()
