"""Everything, in order (`rushes demo`): curated data, SFT, takes, rankings by simulated labelers, a reward model and its guard, RL under a safety limit, the report.

Each stage is one recipe with its own folder. A finished stage is not done again, a killed one goes on where it was: run the same command again. With `--human N` the web app
opens on the takes, and the reward model learns from the first N rankings that people make there. With `--clips DIR` the
data are real clips with captions; people are then simulated from weight-free signals, and nobody knows what is on screen, so the judge does not apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, Several, Share, Whole, dump, leaves, path_keys
from align.processes import join
from base_model.errors import UserError
from base_model.threads import in_threads
from base_model.tiny import load_tiny
from base_model.video.store import ClipStore
from recipes import app, ddpo, evaluate, nft, report, reward_model, sft
from recipes.feedback import Feedback, SafetyLimit, StoppedByGuard, check_steps, check_unguided
from recipes.filters import write_lineage
from recipes.generate import Request, Sampler, fill_store, network_lineage, safety_runner
from recipes.memory import PeakMemory
from recipes.pairs import load_pairs, read_clip_folder, save_pairs
from recipes.rankings import rank_by_panel, ruling_of, served
from recipes.shapes import labelers
from recipes.shapes.dataset import ClipSet, draw_clips
from recipes.shapes.eye import Eye
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.stages import Stages, in_first
from reward.comparisons import Prompt
from reward.safety.contract import SafetyRunner, allowed

Stage = Literal["data", "sft", "candidates", "rankings", "reward", "rl", "report"]
STAGES: tuple[Stage, ...] = ("data", "sft", "candidates", "rankings", "reward", "rl", "report")
NAMES = {**report.NAMES, "rl": "RL (NFT)", "rl_unconstrained": "RL (NFT), no limit"}
PEOPLE: dict[Literal["reward", "guard"], tuple[labelers.Labeler, ...]] = {"reward": labelers.REWARD_PANEL, "guard": labelers.GUARD_PANEL}


class Config(BaseConfig):
    out: Path = Path("runs/demo")
    """Folder with one folder a stage; `report/index.html` is the end."""
    seed: Annotated[int, Field(ge=0, lt=2**40)] = 0
    """Seed of everything."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8012
    """Port of the web app where people rank (`--human`); 0 takes a free one and says which."""
    stage: Stage = "report"
    """Last stage to do."""
    clips: Path | None = None
    """Folder of real clips with a metadata.jsonl, in place of the built-in world. They are resampled to `sampler.fps`."""
    pairs: Count = 2_500
    """Curated pairs for SFT."""
    fit: sft.Fit = sft.Fit(iterations=170, lr=5e-4)
    """How SFT fits."""
    candidate_prompts: Count = 640
    """Prompts whose takes are ranked."""
    takes: Several = 4
    """Takes of each prompt; ranked four at a time."""
    two_objects: Share = 0.2
    """Share of training prompts with two objects."""
    strobe: Share = 0.2
    """Share of prompts that ask for strobing in words the prompt filter lets pass."""
    overlap: Share = 0.4
    """Share of tasks ranked by two or three people."""
    human: Whole = 0
    """Rankings by people, in the web app, that are waited for in place of the simulated panel's; the reward model learns from these alone, the guard from simulated labelers."""
    reward_epochs: Whole = 0
    """Passes over the rankings with everything in the reward model learning; a few hundred rankings are too few for any."""
    policy: nft.Policy = nft.Policy(iterations=20)
    """How forward-process reinforcement (NFT) moves the policy."""
    ddpo_policy: ddpo.Policy = ddpo.Policy(iterations=32)
    """How DDPO moves another policy beside it: same start, reward, prompts and limit."""
    safety: SafetyLimit = SafetyLimit()
    """The limit on flashing."""
    unconstrained: bool = False
    """Also runs NFT without the limit, for comparison."""
    evaluation_prompts: Count = 60
    """Held-out prompts of the report."""
    evaluation_clips: Count = 4
    """Clips of each, for every model."""
    evaluation_two_objects: Share = 0.2
    """Share of them with two objects."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""


def folder(cfg: Config, stage: str) -> Path:
    return cfg.out / stage


# The stages


def make_data(cfg: Config, out: Path) -> dict[str, Any]:
    """Curated pairs, what the filters do not allow left out."""
    clips = read_clip_folder(cfg.clips, frames=cfg.sampler.frames, fps=cfg.sampler.fps) if cfg.clips else draw_clips("curated", cfg.pairs, seed=cfg.seed)
    runner = safety_runner()
    kept = curate(clips, runner, cfg.sampler.fps)
    if not len(kept):
        raise UserError(f"none of the {len(clips)} clips passed the safety filters, {cfg.clips or 'the built-in world'}. Look at the filters' counts: {dict(runner.counts)}")
    save_pairs(out, kept)
    write_lineage(out, runner.lineage())
    return {"clips": len(clips), "kept": len(kept), "sha256": kept.fingerprint(), "safety": dict(runner.counts)}


def curate(clips: ClipSet, runner: SafetyRunner, fps: float) -> ClipSet:
    """The clips whose prompt and pixels are allowed."""
    prompts = runner.check_prompts(clips.texts)
    good = []
    for i, (text, video) in enumerate(zip(clips.texts, clips.videos, strict=True)):
        if allowed(prompts[i]) and allowed(runner.check_videos(video[None].float() / 255, [text], fps)[0]):
            good.append(i)
    return ClipSet(tuple(clips.texts[i] for i in good), tuple(clips.videos[i] for i in good))


def fine_tune(cfg: Config, out: Path) -> dict[str, Any]:
    return sft.main(sft.Config(out=out, seed=cfg.seed, data=folder(cfg, "data"), fit=cfg.fit), resume=(out / "run.json").exists())


def make_candidates(cfg: Config, out: Path) -> dict[str, Any]:
    """`takes` clips of every prompt with the SFT model."""
    network = folder(cfg, "sft") / "network.safetensors"
    runner, store = safety_runner(), ClipStore(out)
    asked = candidate_prompts(cfg)
    requests = [Request(p.text, p.prompt_id, cfg.seed * 1_000_000 + i * 100 + g) for i, p in enumerate(asked) for g in range(cfg.takes)]
    sampler = world_sampler(cfg)
    rows = fill_store(store, load_tiny(network), requests, lineage=network_lineage(network), sampler=sampler, runner=runner, label="candidates", preview=False)
    return {"clips": sum(row is not None for row in rows), "prompts": len(asked), "safety": dict(runner.counts)}


def rank_candidates(cfg: Config, out: Path) -> dict[str, Any]:
    """Two panels of simulated labelers rank what the filters allow; one teaches the reward model, the other the guard. With `human` people take the place of the first."""
    store = ClipStore(folder(cfg, "candidates"))
    asked = candidate_prompts(cfg)
    shown = served(store.rows())
    clips: dict[str, list[tuple[str, Any]]] = {}
    for row, clip in zip(shown, in_threads(lambda row: store.load(row.clip_id), shown, torch.device("cpu")), strict=True):
        clips.setdefault(row.prompt_id, []).append((row.clip_id, clip))
    tasks = labelers.tasks_from_signals(clips) if cfg.clips else labelers.tasks_from_eye(Eye.load(), asked, clips)
    prompts = [Prompt(p.prompt_id, p.text, source="built-in world" if not cfg.clips else "captions") for p in asked if p.prompt_id in clips]
    counts = {
        f"{name}_events": rank_by_panel(out / name, panel, tasks, shown, prompts, seed=2 * cfg.seed + k, overlap=cfg.overlap, shares=split_shares(cfg))
        for k, (name, panel) in enumerate(PEOPLE.items())
        if not (cfg.human and name == "reward")
    }
    told = {**counts, "tasks": len(tasks), "served": len(shown), "withheld": len(store.rows()) - len(shown), "labelers": "people" if cfg.human else "simulated"}
    return {**told, "ranked_by": app.have_people_rank(cfg.out / "app", store.folder, out / "reward", cfg.human, name="demo", port=cfg.port)} if cfg.human else told


def split_shares(cfg: Config) -> tuple[float, float, float]:
    """Of the ranked prompts: to learn from, to calibrate on, to test on. A reward model fits a few dozen numbers, but its accuracy is told with an interval.

    A few captions of real clips are all learned from: there are too few to hold any out, and accuracy stays unknown.
    """
    if not cfg.clips:
        return 0.4, 0.1, 0.5
    return (0.6, 0.15, 0.25) if len(captions(cfg)) >= 5 else (1.0, 0.0, 0.0)


def learn_rewards(cfg: Config, out: Path) -> dict[str, Any]:
    """The reward model, and the guard from other people, another start and another seed."""
    results: dict[str, Any] = {}
    for k, name in enumerate(PEOPLE):
        where = out / name
        learning = reward_model.Config(
            out=where,
            comparisons=folder(cfg, "rankings") / name,
            clips=folder(cfg, "candidates"),
            start=name,
            seed=2 * cfg.seed + k,
            epochs=cfg.reward_epochs,
        )
        results[name] = reward_model.main(learning, resume=(where / "run.json").exists())
    return results


def align_policy(cfg: Config, out: Path) -> dict[str, Any]:
    """NFT and DDPO under the limit, and NFT without it where that is asked for. A run that the guard ended is reported with what it saved."""
    shared = Feedback(
        seed=cfg.seed,
        model=folder(cfg, "sft") / "network.safetensors",
        reward=folder(cfg, "reward") / "reward",
        guard=folder(cfg, "reward") / "guard",
        captions=captions(cfg),
        two_objects=cfg.two_objects,
        strobe=cfg.strobe,
        safety=cfg.safety,
        sampler=world_sampler(cfg),
    )
    common = dump(shared)
    results = {}
    for name in policies(cfg).values():
        where = out / name
        resume = (where / "run.json").exists()
        try:
            if name == "ddpo":
                results[name] = ddpo.main(ddpo.Config.model_validate({**common, "out": where, "policy": cfg.ddpo_policy}), resume=resume)
            else:
                constrained = name != "unconstrained"
                results[name] = nft.main(nft.Config.model_validate({**common, "out": where, "policy": cfg.policy, "constrained": constrained}), resume=resume)
        except StoppedByGuard as stop:
            results[name] = stop.result
    return results


def policies(cfg: Config) -> dict[str, str]:
    """Name of a policy in the report -> folder of its run."""
    return {"rl": "constrained", "rl_ddpo": "ddpo"} | ({"rl_unconstrained": "unconstrained"} if cfg.unconstrained else {})


def write_the_report(cfg: Config, out: Path, memory: PeakMemory, started: float) -> dict[str, Any]:
    runs = {name: folder(cfg, "rl") / run for name, run in policies(cfg).items()}
    evaluation = evaluate.Config(
        out=out,
        seed=cfg.seed,
        models={"base": Path("base"), "sft": folder(cfg, "sft"), **runs},
        names=NAMES,
        runs=runs,
        prompts=cfg.evaluation_prompts,
        clips_per_prompt=cfg.evaluation_clips,
        two_objects=cfg.evaluation_two_objects,
        strobe=cfg.strobe,
        captions=captions(cfg),
        sampler=world_sampler(cfg),
        guard=folder(cfg, "reward") / "guard",
        flash_limit=cfg.safety.limit,
    )

    def told() -> dict[str, Any]:
        finished = {stage: stages_of(cfg).done(stage) for stage in STAGES[:-1]}
        seconds = {stage: done["seconds"] for stage, done in finished.items()} | {"report": round(time.monotonic() - started, 1)}
        learnt = finished["reward"]["result"]["reward"]
        return {
            "stage_seconds": seconds,
            "wall_seconds": round(sum(seconds.values()), 1),
            "peak_memory_bytes": max(memory.peak_bytes, *(done["peak_memory_bytes"] for done in finished.values())),
            "reward_model": {name: learnt[name] for name in ("accuracy", "floor", "ceiling")},
            "stages": {stage: done["result"] for stage, done in finished.items()},
            "filtered": withheld_candidates(cfg),
            "commands": [f"rushes demo{command_line(cfg)}"],
            **({"ranked_by": finished["rankings"]["result"]["ranked_by"]} if cfg.human else {}),
            "notes": [whose_rankings(finished["rankings"]["result"])],
        }

    results = evaluate.report(evaluation, told)
    return {key: results[key] for key in ("judge", "judge_gain", "judge_gain_ddpo", "flash_rate", "diversity", "wall_seconds", "peak_memory_bytes")}


def whose_rankings(result: Mapping[str, Any]) -> str:
    """One sentence for the report. result: of the stage `rankings`."""
    if result["labelers"] == "simulated":
        return "All rankings come from simulated labelers."
    said = result["ranked_by"]
    return f"The reward model learnt from {said['rankings']} rankings by {said['people']} people; the guard learnt from simulated labelers."


def withheld_candidates(cfg: Config) -> list[dict[str, Any]]:
    """Rows of the report's table for the takes that no labeler was shown: policy, verdict, how many, and a few with the filter's reason."""
    rows = ClipStore(folder(cfg, "candidates")).rows()
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for ruling in ruling_of(row)["rulings"]:
            if ruling["verdict"] != "allow":
                reasons = "; ".join(reason["text"] for reason in ruling["reasons"])
                found.setdefault((ruling["verdict"], ruling["policy"]), []).append(f"“{row.prompt}”: {reasons}")
    return [
        {"where": "takes (withheld from labelers)", "policy": policy, "verdict": verdict, "count": len(examples), "of": len(rows), "examples": examples[:3]}
        for (verdict, policy), examples in sorted(found.items())
    ]


def candidate_prompts(cfg: Config) -> list[ShapesPrompt]:
    """What the takes show. A real caption is a prompt about nothing the built-in world knows."""
    return prompts_to_rank(captions(cfg), cfg.candidate_prompts, seed=cfg.seed + 10, two_objects=cfg.two_objects, strobe=cfg.strobe / 2)


def prompts_to_rank(texts: Sequence[str], number: int, *, seed: int, two_objects: float, strobe: float) -> list[ShapesPrompt]:
    """`number` training prompts of the built-in world; where there are captions, about as many of these, each several times."""
    if texts:
        return [ShapesPrompt(f"{text} [{k}]", text, (), False, "train") for text in texts for k in range(max(1, number // len(texts)))]
    return make_prompts(number, seed=seed, split="train", two_objects=two_objects, strobe=strobe)


def captions(cfg: Config) -> tuple[str, ...]:
    """The captions of the real clips that were kept; none in the built-in world."""
    return tuple(dict.fromkeys(load_pairs(folder(cfg, "data")).texts)) if cfg.clips else ()


def world_sampler(cfg: Config) -> Sampler:
    """The sampler; real clips are sampled in the size of the first one."""
    if not cfg.clips:
        return cfg.sampler
    _, _, height, width = load_pairs(folder(cfg, "data")).videos[0].shape
    return cfg.sampler.model_copy(update={"height": height, "width": width})


# Going through the stages


def stages_of(cfg: Config) -> Stages:
    settings = {key: value for key, value in leaves(dump(cfg)).items() if key not in ("out", "stage", "port")}
    return Stages(cfg.out, "demo", settings if cfg.human else {key: value for key, value in settings.items() if key != "human"}, leaves(dump(Config())))


def command_line(cfg: Config) -> str:
    """The overrides that make this configuration out of the defaults, paths left out."""
    defaults, paths = leaves(dump(Config())), path_keys(Config)
    return "".join(f" --{key} {value}" for key, value in leaves(dump(cfg)).items() if value != defaults.get(key) and key not in paths)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: the demo always goes on with what its folder holds. Under torchrun processes share SFT and RL; the first one does all else."""
    join()
    check_steps(cfg.sampler)
    if STAGES.index(cfg.stage) >= STAGES.index("rl"):
        check_unguided(cfg.sampler)
    stages = stages_of(cfg)
    stages.check_same()
    started = time.monotonic()
    works: dict[Stage, Callable[[Path, PeakMemory], dict[str, Any]]] = {
        "data": in_first(lambda out, _: make_data(cfg, out)),
        "sft": lambda out, _: fine_tune(cfg, out),
        "candidates": in_first(lambda out, _: make_candidates(cfg, out)),
        "rankings": in_first(lambda out, _: rank_candidates(cfg, out)),
        "reward": in_first(lambda out, _: learn_rewards(cfg, out)),
        "rl": lambda out, _: align_policy(cfg, out),
        "report": in_first(lambda out, memory: write_the_report(cfg, out, memory, time.monotonic())),
    }
    done = {stage: stages.do(stage, works[stage]) for stage in STAGES[: STAGES.index(cfg.stage) + 1]}
    result: dict[str, object] = {stage: each["result"] for stage, each in done.items() if stage == cfg.stage}
    if cfg.stage == "report":
        result["report"] = str(folder(cfg, "report") / "index.html")
        result |= done["report"]["result"]
    return {**result, "seconds_of_this_call": round(time.monotonic() - started, 1)}
