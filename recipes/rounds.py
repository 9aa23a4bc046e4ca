"""Rounds of rankings and RL (`rushes rounds --rounds N`): the new policy's clips are ranked, the reward model learns anew from all rankings so far, RL goes on.

    for every round:
        takes      clips of training prompts by the policy as it is
        rankings   a simulated panel ranks them, or people do: the round then stops, says where it waits for their answers, and goes on with --resume
        reward     the reward model, from nothing, on all rankings of this and all earlier rounds
        rl         `rushes nft` (or another recipe) from that policy
        look       held-out prompts, the same and with the same noise in every round, before and after

A reward model is right where its rankings were, and RL moves away from there: Christiano et al. 2017 (arXiv 1706.03741) and Stiennon et al. 2020 (arXiv 2009.01325) rank, learn and
go on, again and again. The reference of a round, to which the recipe's KL and the guards' KL budget refer, is the network that the round starts from, so rounds together may go
further than the budget of one; how far is told as `kl_from_first`. The guard (`--guard`) is the same in all rounds and learns nothing from these rankings.

    out/clips  out/rankings         clip store and store of rankings of all rounds; answers are added, never rewritten
    out/round-1/takes  ...          a folder a stage; a finished one is not done again
"""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Several, Share, dump, leaves, load, path_keys
from align.kernels import Ancestral
from align.processes import is_main, join
from align.run import derived_seed, lock_folder
from align.trajectory import path_kl, rollout
from base_model.checkpoint import disk_errors
from base_model.errors import RushesError, UserError
from base_model.guidance import Guided
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import Conditioning
from base_model.video.store import ClipStore
from recipes import reward_model
from recipes.cli import COMMANDS, shipped_config
from recipes.demo import prompts_to_rank
from recipes.evaluate import clip_seeds, network_file
from recipes.evaluate_reward import look
from recipes.feedback import Assessor, Setting, StoppedByGuard, held_out_texts, standardised
from recipes.generate import Request, Sampler, best_device, fill_store, network_lineage, safety_runner, sample, seeded_noise, times_of
from recipes.rankings import TASKS, Task, answers_to, ask, rank_by_panel, read_tasks, served
from recipes.scorers import card_hash, load_scorer
from recipes.shapes import labelers
from recipes.shapes.eye import Eye
from recipes.shapes.prompts import ShapesPrompt
from recipes.stages import Stages, in_first
from reward.accuracy import scorer_accuracy
from reward.agreement import Interval, pairs_of
from reward.comparisons import Comparisons, Prompt, RankingEvent, load_comparisons

Recipe = Literal["nft", "ddpo", "grpo", "ppo", "dpo", "reward-gradient"]
TOGETHER = 4  # clips of a task
SHARES = (0.6, 0.15, 0.25)
HELD_OUT_SEED = 950_000  # added to the seed: these prompts and this noise are in no round
KL_CLIPS = 8
OWN = ("out", "seed", "model", "reward", "guard", "comparisons", "clips")
"""Keys of the recipe that the rounds decide."""


class Config(BaseConfig):
    out: Path = Path("runs/rounds")
    """Folder of everything; the last network is `round-N/rl/network.safetensors` there."""
    seed: Annotated[int, Field(ge=0, lt=2**40)] = 0
    """Seed of everything."""
    rounds: Count = 2
    """Rounds; more can be asked of a folder that has finished some."""
    labelers: Literal["people", "simulated"] = "people"
    """Who ranks: people, whose answers are waited for, or the simulated panel, which knows the built-in world."""
    model: Path | None = None
    """Network that the first round starts from: a file, or the folder of a run. None means the shipped base."""
    guard: Path | None = None
    """Folder of a reward model of other people's rankings, which watches all rounds and is never optimised."""
    rankings: Path | None = None
    """Folder of earlier rankings; they are copied, and every round learns from them, too."""
    clips: Path | None = None
    """Clip store with the clips of these."""
    prompts: Count = 320
    """Training prompts whose takes are ranked in a round, others in every round."""
    takes: Several = 4
    """Takes of each prompt, ranked four at a time."""
    overlap: Share = 0.0
    """Share of tasks that two or three of the simulated panel rank."""
    answered: Share = 1.0
    """Share of a round's tasks that people have to have answered, or skipped, before the round goes on."""
    recipe: Recipe = "nft"
    """How the policy moves: the name of a recipe of alignment."""
    rl: dict[str, Any] = Field(default={})
    """Keys of that recipe, which begins with its shipped configuration: --rl.policy.iterations 8 --rl.constrained false."""


class WaitingForPeople(RushesError):
    """People have not answered yet; everything up to here is saved."""

    exit_status = 3


# What a round is made of


def folder(cfg: Config, number: int, stage: str) -> Path:
    return cfg.out / f"round-{number}" / stage


def store_of(cfg: Config) -> ClipStore:
    return ClipStore(cfg.out / "clips")


def rankings_of(cfg: Config) -> Path:
    return cfg.out / "rankings"


def start_of(cfg: Config, number: int) -> Path | None:
    """The network a round starts from, and its reference: that of the round before it. None is the shipped base."""
    if number > 1:
        return folder(cfg, number - 1, "rl") / "network.safetensors"
    return None if cfg.model is None else network_file(cfg.model)


def reward_of(cfg: Config, number: int) -> Path:
    return folder(cfg, number, "reward")


def setting_of(cfg: Config, number: int) -> Setting:
    """The configuration of a round's RL. Raises UserError for a key the recipe does not know, or that is not the user's to set."""
    words = []
    for key, value in leaves(cfg.rl).items() if cfg.rl else ():
        if key.partition(".")[0].replace("-", "_") in OWN:
            raise UserError(f"rl.{key} is decided by the rounds. Leave it out; the rounds have keys of their own for seed, model and guard")
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    module = importlib.import_module(COMMANDS[cfg.recipe].module)
    setting: Setting = load(module.Config, shipped_config(cfg.recipe), words)
    decided = {"out": folder(cfg, number, "rl"), "seed": seed_of(cfg, "rl", number), "model": start_of(cfg, number), "guard": cfg.guard, "reward": reward_of(cfg, number)}
    return setting.model_copy(update=decided)


def seed_of(cfg: Config, stream: str, number: int) -> int:
    return derived_seed(cfg.seed, f"rounds {stream}", number) % 2**31


def prompts_of(cfg: Config, number: int) -> list[ShapesPrompt]:
    """Whose takes are ranked: as RL's own, with half as many that ask for strobing, since takes that flash are shown to nobody."""
    setting = setting_of(cfg, number)
    return prompts_to_rank(setting.captions, cfg.prompts, seed=seed_of(cfg, "prompts", number), two_objects=setting.two_objects, strobe=setting.strobe / 2)


# The stages


def copy_given(cfg: Config, out: Path) -> dict[str, Any]:
    """Earlier rankings and their clips, copied; nothing that is there is overwritten. Clips first: rankings name them."""
    assert cfg.rankings is not None and cfg.clips is not None
    load_comparisons(cfg.rankings)
    ClipStore(cfg.clips)
    for source, target in ((cfg.clips, store_of(cfg).folder), (cfg.rankings, rankings_of(cfg))):
        with disk_errors(target):
            for file in sorted(path for path in source.rglob("*") if path.is_file() and path.suffix != ".mp4"):
                copy = target / file.relative_to(source)
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, partial := copy.with_name(f".{copy.name}.partial"))
                    partial.rename(copy)
    data = load_comparisons(rankings_of(cfg))
    return {"answers": len(data.events), "clips": len(data.clips)}


def make_takes(cfg: Config, number: int, out: Path) -> dict[str, Any]:
    """Clips of the round's prompts by the policy as it is, and the tasks of who ranks them: those the filters allow, four of a prompt at a time."""
    network, asked, store, runner = start_of(cfg, number), prompts_of(cfg, number), store_of(cfg), safety_runner(setting_of(cfg, number).filters)
    places = [(prompt, i * cfg.takes + g) for i, prompt in enumerate(asked) for g in range(cfg.takes)]
    requests = [Request(prompt.text, prompt.prompt_id, derived_seed(cfg.seed, f"rounds takes {number}", k) % 2**31) for prompt, k in places]
    sampler = setting_of(cfg, number).sampler
    model = load_tiny(network).to(best_device())
    rows = fill_store(store, model, requests, lineage=network_lineage(network), sampler=sampler, runner=runner, label=f"round {number}, takes", preview=cfg.labelers == "people")
    made = [row for row in rows if row is not None]
    shown = served(made)
    of: dict[str, list[str]] = {prompt.prompt_id: [] for prompt in asked}
    for row in shown:
        if row.clip_id not in of[row.prompt_id]:
            of[row.prompt_id].append(row.clip_id)
    cut = [(prompt, tuple(of[prompt.prompt_id][k : k + TOGETHER])) for prompt in asked for k in range(0, len(of[prompt.prompt_id]), TOGETHER)]
    tasks = [Task(f"round-{number}-{k:05d}", prompt.prompt_id, prompt.text, clip_ids) for k, (prompt, clip_ids) in enumerate(cut) if len(clip_ids) > 1]
    ask(rankings_of(cfg), out, tasks, shown, [Prompt(prompt.prompt_id, prompt.text) for prompt in asked], shares=SHARES)
    return {"clips": len(made), "withheld": len(made) - len(shown), "tasks": len(tasks), "safety": dict(runner.counts)}


def have_ranked(cfg: Config, number: int, out: Path) -> dict[str, Any]:
    """The panel's answers to the round's tasks, or those of people. Raises WaitingForPeople where too few of these are there."""
    tasks, where = read_tasks(folder(cfg, number, "takes")), rankings_of(cfg)
    if cfg.labelers == "simulated":
        answer_by_panel(cfg, number, tasks)
    found = answers_to(load_comparisons(where), tasks)
    answered = sum(bool(events) for events in found.values())
    if answered < cfg.answered * len(tasks):
        told = f"round {number} waits for people: {answered} of {len(tasks)} tasks are answered in the store of rankings, {where}"
        raise WaitingForPeople(f"{told}. The tasks are in {folder(cfg, number, 'takes') / TASKS}; once their answers are there, go on with --resume")
    return {"answers": sum(map(len, found.values())), "tasks": len(tasks), "labelers": cfg.labelers}


def answer_by_panel(cfg: Config, number: int, tasks: Sequence[Task]) -> None:
    """The simulated panel ranks the tasks. Captions of real clips say nothing that it knows: it then goes by sharpness, movement and brightness."""
    store, asked = store_of(cfg), prompts_of(cfg, number)
    clips: dict[str, list[tuple[str, Tensor]]] = {}
    for task in tasks:
        clips.setdefault(task.prompt_id, []).extend((clip_id, store.load(clip_id)) for clip_id in task.clip_ids)
    seen = labelers.tasks_from_signals(clips) if setting_of(cfg, number).captions else labelers.tasks_from_eye(Eye.load(), asked, clips)
    rank_by_panel(rankings_of(cfg), labelers.REWARD_PANEL, seen, (), (), seed=seed_of(cfg, "panel", number), overlap=cfg.overlap, shares=SHARES)


def learn_reward(cfg: Config, number: int, out: Path) -> dict[str, Any]:
    """The reward model, anew, from all rankings so far; and how often it, and the one before it, order the newest clips as people did, on prompts that it did not learn from."""
    learning = reward_model.Config(out=out, comparisons=rankings_of(cfg), clips=store_of(cfg).folder, seed=cfg.seed)
    empty(out)
    result = reward_model.main(learning)
    data = load_comparisons(rankings_of(cfg))
    newest = answers_to(data, read_tasks(folder(cfg, number, "takes"))).values()
    events = [event for events in newest for event in events if data.split[event.prompt_id] == "test" and not event.skipped_reason]
    accuracy = accuracy_of(out, data, events, store_of(cfg))
    before = accuracy_of(reward_of(cfg, number - 1), data, events, store_of(cfg)) if number > 1 else None
    return {
        "answers": len(data.events),
        "accuracy": _plain(result["accuracy"]),
        "accuracy_newest": _plain(accuracy._asdict()),
        "accuracy_newest_before": None if before is None else _plain(before._asdict()),
    }


def empty(out: Path) -> None:
    """Removes what a killed try left of a stage that saves nothing on the way: by now people may have answered more. Raises UserError where another process is at work there."""
    lock_folder(out)
    with disk_errors(out):
        for path in out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()


def accuracy_of(reward: Path, data: Comparisons, events: Sequence[RankingEvent], store: ClipStore) -> Interval:
    """Of a reward model, on the decided pairs of these answers; nan where there is none."""
    scorer = load_scorer(reward)
    pairs = [pair for pair in pairs_of(events) if pair.dimension in scorer.dims]
    ids = sorted({clip_id for pair in pairs for clip_id in (pair.first, pair.second)})
    if not ids:
        return Interval(*[math.nan] * 3)
    seen = look(ids, data, store, lambda clips, prompts: scorer(clips, prompts).mean, batch=64, label="newest clips")
    scores = {(dim, clip_id): float(seen.values[row, k]) for clip_id, row in seen.row.items() for k, dim in enumerate(scorer.dims)}
    return scorer_accuracy(pairs, scores, data.component)


def go_on(cfg: Config, number: int, out: Path) -> dict[str, Any]:
    """RL from the last policy. A run that its guards ended goes on, in the next round, with what it saved."""
    setting = setting_of(cfg, number)
    module = importlib.import_module(COMMANDS[cfg.recipe].module)
    try:
        result = module.main(setting, resume=(out / "run.json").exists())
    except StoppedByGuard as stop:
        result = stop.result
    return {"reference": name_of(cfg, number), **{key: result[key] for key in ("weights", "stopped_by_guard", "forward_passes")}, "guards": result.get("guards", "")}


def name_of(cfg: Config, number: int) -> str:
    """The reference of a round, in words."""
    return str(start_of(cfg, number) or "the shipped base")


@torch.no_grad()
def look_around(cfg: Config, number: int) -> dict[str, Any]:
    """Held-out prompts before and after the round: its reward, the guard, what the filters block; and how far the policy is from the first one."""
    setting = setting_of(cfg, number)
    texts = held_out_texts(setting.model_copy(update={"seed": cfg.seed + HELD_OUT_SEED}))
    first = load_tiny(start_of(cfg, 1)).to(best_device())
    fps = setting.sampler.fps
    rewards = {"reward": standardised(load_scorer(reward_of(cfg, number), fps=fps, encode=first.text), setting.pessimism, setting.dimensions)}
    if cfg.guard:
        rewards["guard"] = standardised(load_scorer(cfg.guard, fps=fps, encode=first.text))
    found: dict[str, Any] = {}
    for when, network in (("before", start_of(cfg, number)), ("after", folder(cfg, number, "rl") / "network.safetensors")):
        model = load_tiny(network).to(best_device())
        cond = model.encode_text(texts)
        video = torch.cat(list(sample(model, cond, clip_seeds(cfg.seed + HELD_OUT_SEED, len(texts)), setting.sampler)))  # [P,T,3,H,W]
        found |= {f"{name}_{when}": float(reward(video, texts).reward.nanmean()) for name, reward in rewards.items()}
        found[f"blocked_{when}"] = Assessor(None, safety_runner(setting.filters), setting.sampler.fps)(video, texts).violation_rate
    found["kl_from_first"] = kl_between(model, first, cond[:KL_CLIPS], setting.sampler, cfg.seed + HELD_OUT_SEED)
    return _plain(found)


def kl_between(policy: LatentVideoModel, first: LatentVideoModel, cond: Conditioning, sampler: Sampler, seed: int) -> float:
    """KL of the policy's sampling path from the first one's, mean over the prompts, nats per latent element; nan where no step could take noise."""
    if sampler.steps < 2:
        return math.nan
    now, before = Guided(policy, sampler.guidance), Guided(first, sampler.guidance)
    noise = seeded_noise(policy, sampler.clip, clip_seeds(seed, len(cond)))  # [P,C,F,H,W]
    times = times_of(policy, sampler)  # [K+1]
    taken = rollout(now, Ancestral(), noise, times, cond, noise=torch.Generator().manual_seed(seed))
    return float(path_kl(now, before, Ancestral(), taken).mean()) / noise[0].numel()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not finite is null: JSON knows no nan."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


# Going through them


def stages_of(cfg: Config) -> Stages:
    """What all rounds depend on: networks and reward models by what is in them, wherever they lie."""
    setting = setting_of(cfg, 1)
    free = {"out", "rounds", "answered", *path_keys(Config)}
    own = {key: value for key, value in leaves(dump(cfg)).items() if key not in free and key.partition(".")[0] != "rl"}
    rl = {f"{cfg.recipe}.{key}": value for key, value in leaves(dump(setting)).items() if key not in {*OWN, *path_keys(type(setting))}}
    given = {"network": network_lineage(start_of(cfg, 1)), "guard_card": card_hash(cfg.guard)}
    defaults = leaves(dump(Config())) | {f"{cfg.recipe}.{key}": value for key, value in leaves(dump(type(setting).model_construct())).items()}
    return Stages(cfg.out, "rounds", own | rl | given, defaults)


def check(cfg: Config) -> None:
    """Raises UserError, before any work, where something that is needed later is not there."""
    if (cfg.rankings is None) != (cfg.clips is None):
        raise UserError("rankings and clips: a reward model needs the ranked clips. Give both, or none")
    if cfg.guard is not None:
        load_scorer(cfg.guard)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: rounds always go on with what their folder holds. Under torchrun processes share the RL; the first one does all else."""
    join()
    check(cfg)
    started, stages = time.monotonic(), stages_of(cfg)
    stages.check_same()
    if cfg.rankings is not None:
        stages.do("given", in_first(lambda out, _: copy_given(cfg, out)))
    rows = []
    for number in range(1, cfg.rounds + 1):
        if is_main():
            print(f"round {number} of {cfg.rounds}: from {name_of(cfg, number)}, which is its reference", file=sys.stderr, flush=True)
        rows.append(one_round(cfg, number, stages))
    if is_main():
        print(table(rows), file=sys.stderr, flush=True)
    return {"weights": str(folder(cfg, cfg.rounds, "rl") / "network.safetensors"), "rounds": rows, "seconds_of_this_call": round(time.monotonic() - started, 1)}


def one_round(cfg: Config, number: int, stages: Stages) -> dict[str, Any]:
    """Its row of the table."""
    done = {
        "takes": stages.do(f"round-{number}/takes", in_first(lambda out, _: make_takes(cfg, number, out))),
        "rankings": stages.do(f"round-{number}/rankings", in_first(lambda out, _: have_ranked(cfg, number, out))),
        "reward": stages.do(f"round-{number}/reward", in_first(lambda out, _: learn_reward(cfg, number, out))),
        "rl": stages.do(f"round-{number}/rl", lambda out, _: go_on(cfg, number, out)),
        "look": stages.do(f"round-{number}/look", in_first(lambda out, _: look_around(cfg, number))),
    }
    result = {name: each["result"] for name, each in done.items()}
    accuracy, before = result["reward"]["accuracy_newest"], result["reward"]["accuracy_newest_before"]
    return {
        "round": number,
        "answers": result["reward"]["answers"],
        "new_answers": result["rankings"]["answers"],
        "takes": result["takes"]["clips"],
        "withheld": result["takes"]["withheld"],
        "accuracy_newest_before": None if before is None else before["mean"],
        "accuracy_newest": accuracy["mean"],
        "accuracy_newest_low": accuracy["low"],
        "accuracy_newest_high": accuracy["high"],
        **{name: result["look"].get(name) for name in LOOKED},
        **{name: result["rl"][name] for name in ("reference", "stopped_by_guard", "forward_passes")},
        "seconds": round(sum(each["seconds"] for each in done.values()), 1),
    }


LOOKED = ("reward_before", "reward_after", "guard_before", "guard_after", "blocked_before", "blocked_after", "kl_from_first")
COLUMNS = ("round", "answers", "accuracy_newest_before", "accuracy_newest", *LOOKED, "forward_passes")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in columns, for reading; what is not known is a dash."""
    cells = [[name.replace("_", " ") for name in COLUMNS], *([_cell(row[name]) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
