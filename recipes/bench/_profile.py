"""The largest costs of one repeat of ours, for each benchmark of `rushes bench all`, on one thread: `python -m recipes.bench._profile NAME [--key value ...]`.

Networks are looked at by torch's profiler: what is not in any of its operations is `between operations`, Python and the profiler itself. The app and the loader are looked at by
cProfile, function by function, each without what it calls. A profiler slows small operations down: shares say what is large, not how long it takes.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import pstats
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

from recipes.bench._results import Row, timed

MOST = 3
BETWEEN = "between operations"
Work = Callable[[], object]
Prepare = Callable[[Any, Path], Work]
Costs = Callable[[Work], dict[str, float]]
"""Seconds of one repeat, by what they were spent on."""


def largest(seconds: Mapping[str, float], *, most: int = MOST) -> list[Row]:
    """The `most` largest costs with their share of all."""
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [{"cost": name, "share": spent / total} for name, spent in ordered[:most] if spent > 0]


def operations(work: Work) -> dict[str, float]:
    """Seconds of each of torch's operations in `work`, without those that it calls, and of what lies between them. `work` is done once before, unmeasured."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        _, seconds = timed(work)
    found = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    assert torch.get_num_threads() == 1, "operations of several threads would add up to more than the time"
    return {**found, BETWEEN: max(0.0, seconds - sum(found.values()))}


def functions(work: Work) -> dict[str, float]:
    """Seconds of each function in `work`, without what it calls. `work` is done once before, unmeasured."""
    work()
    seen = cProfile.Profile()
    seen.runcall(work)
    stats: Any = pstats.Stats(seen)
    return {_name(*place): own for place, (_, _, own, _, _) in stats.stats.items()}


def _name(file: str, line: int, function: str) -> str:
    """`sqlalchemy/engine/default.py:do_execute`; built-in ones have no file."""
    return function.strip("<>") if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{function}"


# What a repeat of ours is


def sampler_work(cfg: Any, folder: Path) -> Work:
    import torch

    from base_model.tiny import load_tiny
    from recipes.bench.sampler import contestants
    from recipes.generate import seeded_noise
    from recipes.shapes.prompts import make_prompts

    model, clips = load_tiny(cfg.model), min(cfg.clips, 16) if cfg.quick else cfg.clips
    cond = model.encode_text([prompt.text for prompt in make_prompts(clips, seed=0, split="eval")])
    ours = contestants(model, cfg.sampler, [])["ours"]
    return torch.no_grad()(partial(ours.repeat, seeded_noise(model, cfg.sampler.clip, range(clips)), cond, measured=False))


def sft_work(cfg: Any, folder: Path) -> Work:
    """A step on clips of many sizes."""
    from recipes.bench._sft_worker import Ours, Spec
    from recipes.bench.sft import cases, shrunk_form

    cfg = shrunk_form(cfg) if cfg.quick else cfg
    (mixed,) = [case for case in cases(cfg) if case.name == "mixed sizes"]
    return Ours(Spec(train=cfg.train[-1], grids=mixed.grids, batch=cfg.batch, out=folder / "run", seed=cfg.seed)).step


def ddpo_work(cfg: Any, folder: Path) -> Work:
    """An epoch, one step a pass."""
    from recipes.bench._ddpo_worker import Arm, Spec
    from recipes.bench._stable_diffusion import save_tiny
    from recipes.bench.ddpo_trl import shrunk

    cfg = shrunk(cfg) if cfg.quick else cfg
    prompts = ("a red circle", "a blue bar")
    save_tiny(folder / "model", prompts, width=cfg.width)
    same = {name: getattr(cfg, name) for name in ("clips", "rollout_batch", "micro_batch", "steps", "eta")}
    return Arm(Spec(model=folder / "model", out=folder / "run", prompts=prompts, train=cfg.train[0], guidance=cfg.guidance[0], **same)).epoch


def phases_work(cfg: Any, folder: Path) -> Work:
    """A run of two updates, self-check and optimizer state included."""
    from recipes.bench import phases

    cfg = (phases.shrunk(cfg) if cfg.quick else cfg).model_copy(update={"updates": 1})
    reward = phases.reward_of(cfg)

    def run() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            phases.run_updates(cfg, cfg.recipes[-1], reward, Path(place) / "run")

    return run


def packing_work(cfg: Any, folder: Path) -> Work:
    import torch

    from recipes.bench import _packing_wan, packing

    clips = packing.mixed_clips(min(cfg.timed_clips, 24) if cfg.quick else cfg.timed_clips, cfg.seed + 1)
    generator = torch.Generator().manual_seed(0)
    if cfg.wan:
        grids, model = [packing.shrunk(packing.grid_of(clip)) for clip in clips], _packing_wan.wan_model()
        steps = [_packing_wan.draw_clips(grids[k : k + _packing_wan.STEP], generator) for k in range(0, len(grids), _packing_wan.STEP)]
        (packed,) = [arm.passes for arm in _packing_wan.arms(model) if arm.name == _packing_wan.REFERENCE]
        return partial(_packing_wan.train, packed, steps)
    (scheme,) = [scheme for scheme in packing.schemes(cfg.ranks) if scheme.name == packing.REFERENCE]
    return partial(packing.Networks(packing.NETWORK).train_on, [packing.draw_inputs(work, packing.NETWORK, generator) for work in scheme.work(clips)])


def score_work(cfg: Any, folder: Path) -> Work:
    import torch

    from recipes.bench import score

    task = score.draw_task(cfg.model_copy(update={"clips": min(cfg.clips, 16)}) if cfg.quick else cfg)
    ways = [*score.encoder_ways(cfg.encoder or score.save_small_clip(folder / "clip", task.prompts)), *score.reward_ways()]
    ours = [way for way in ways if way.name == "ours"]
    return torch.no_grad()(lambda: [way.score(task) for way in ours])


def loader_work(cfg: Any, folder: Path) -> Work:
    """Decoding the clips into small frames."""
    from recipes.bench.loader import clips_of, small

    clips = clips_of(cfg, folder)
    return lambda: [small(clip) for clip in clips]


def app_work(cfg: Any, folder: Path) -> Work:
    """A labeler's next task and answer, many times, by the app's own ASGI application: without uvicorn and the network, and with threads' work in this thread."""
    from recipes.bench import app
    from reward.app.store import open_store
    from reward.app.web import make_app

    times = 5 if cfg.quick else cfg.peer_tasks
    store = open_store(folder)
    project_id, (cookie,) = app.seed_store(store, 1, 2 * times + 4)
    asgi, headers = make_app(store), {"host": "localhost", "cookie": f"rushes={cookie}", "x-csrf": app.csrf_of(store, cookie), "content-type": "application/json"}

    async def turn() -> None:
        task_id = (await ask(asgi, headers, f"/api/projects/{project_id}/label/next", {}))["assignment_id"]
        await ask(asgi, headers, f"/api/assignments/{task_id}", None)
        await ask(asgi, headers, f"/api/assignments/{task_id}/answer", app.answer_body())

    async def turns() -> None:
        for _ in range(times):
            await turn()

    def work() -> None:
        with patch("anyio.to_thread.run_sync", _here):
            asyncio.run(turns())

    return work


async def _here(work: Callable[..., Any], *given: Any, **_: object) -> Any:
    """In place of a thread, which cProfile would not see."""
    return work(*given)


async def ask(asgi: Any, headers: Mapping[str, str], path: str, body: object | None) -> Any:
    """A request as a server hands it to an application: a POST where there is a body, else a GET."""
    sent, told = b"" if body is None else json.dumps(body).encode(), [b""]
    named = [(name.encode(), value.encode()) for name, value in {**headers, "content-length": str(len(sent))}.items()]
    about = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET" if body is None else "POST", "scheme": "http"}
    scope = {**about, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": named, "client": ("127.0.0.1", 1), "server": ("localhost", 80)}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200, message
        told.append(message.get("body", b""))

    await asgi(scope, receive, send)
    return json.loads(b"".join(told))


PREPARED: dict[str, tuple[Prepare, Costs]] = {
    "sampler": (sampler_work, operations),
    "sft": (sft_work, operations),
    "ddpo-trl": (ddpo_work, operations),
    "phases": (phases_work, operations),
    "packing": (packing_work, operations),
    "score": (score_work, operations),
    "loader": (loader_work, functions),
    "app": (app_work, functions),
}


def profiled(name: str, words: Sequence[str]) -> list[Row]:
    """The largest costs of the benchmark `name`, told as much as the benchmark itself."""
    import torch

    from align.config import load

    prepare, costs = PREPARED[name]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
            work = prepare(load(import_module(f"recipes.bench.{name.replace('-', '_')}").Config, None, list(words)), Path(folder))
            return largest(costs(work))
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    print(json.dumps({"rows": profiled(sys.argv[1], sys.argv[2:])}))
