"""Our DDPO beside trl's DDPOTrainer, on one tiny model of Stable Diffusion's classes: log-probabilities, gradients, seconds, memory.

Both make the same epochs: the same fresh weights, prompts, samples, denoising steps, precision, threads, guidance and reward (mean brightness), as many forward and backward
passes (counted by a hook), one optimizer step. trl's trainer runs in an environment of its own, since DDPO left trl with 0.24; ours is the functions of `rushes ddpo`.
Each is a process that works only when it is told to. They take turns, round after round, and nobody is always first; the first epoch of each is not counted.
After the last round both learn from one epoch of trl's own samples, tensor for tensor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from align.config import Count, Positive, Several, Whole
from align.progress import Progress
from base_model.checkpoint import check_can_write
from base_model.errors import UserError
from recipes.bench import _ddpo_worker, _trl_worker
from recipes.bench._ddpo_worker import Spec
from recipes.bench._results import Bench, Row, check_can_end, columns, here, in_brackets, paired_ratio, spread, write
from recipes.bench._stable_diffusion import save_tiny
from recipes.bench._workers import Worker, worker
from recipes.shapes.prompts import make_prompts

TORCH = "torch==2.13.0"  # by itself first, so that no other torch comes with trl
PINS = (
    "trl==0.23.1",
    "transformers==5.23.0",
    "diffusers==0.42.1",
    "accelerate==1.15.0",
    "peft==0.21.2",
    "datasets==5.2.0",
    "huggingface_hub==2.4.0",
    "tokenizers==0.23.3",
    "numpy==2.4.6",
    "pillow<13",
)
TRL = "trl"
TOLERANCE = 1e-5  # of log-probabilities
GOAL = 1.5  # times faster than trl, several steps a pass


class Config(Bench):
    out: Path = Path("runs/bench-ddpo-trl")
    """Folder that keeps trl's environment, 1.5 GB, and what the processes complain of."""
    python: Path | None = None
    """Python of an environment that has trl 0.23 and diffusers; none means one that is made in `out`, once, which needs a package index."""
    train: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """What trains: adapters of rank 4, or the whole UNet. `quick` takes the first."""
    guidance: tuple[float, ...] = (5.0, 1.0)
    """Scales of guidance, in rollout and update; 1 is none. `quick` takes the first."""
    steps_a_pass: tuple[Count, ...] = (1, 3)
    """Denoising steps of a sample in one forward and backward of our update, an arm each. trl takes them one by one."""
    clips: Count = 16
    """Samples an epoch. `quick` takes at most 4."""
    steps: Several = 10
    """Denoising steps of a sample."""
    rollout_batch: Count = 4
    """Samples that are denoised together."""
    micro_batch: Count = 2
    """Samples of one forward and backward of the update, over all threads."""
    width: Count = 32
    """Channels of the UNet's and the VAE's first blocks; a multiple of 32."""
    eta: Positive = 1.0
    """DDIM's share of noise."""
    rounds: Count = 5
    """Measured epochs of each arm. `quick` takes 1."""
    threads: Whole = 0
    """Threads of torch in each process; 0 means as many as cores that this one may use."""


# trl's environment


def environment(cfg: Config) -> Path:
    """The Python that has trl, made if need be. Raises UserError where it cannot be."""
    if cfg.python is not None:
        if not cfg.python.exists():
            raise UserError(f"there is no {cfg.python}. Give --python FILE of an environment with trl 0.23 and diffusers, or leave it out")
        return cfg.python.absolute()  # a link to the interpreter says by its place what is installed
    folder = cfg.out / "environment"
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join([TORCH, *PINS])
    if not (ready.exists() and ready.read_text() == wanted):
        check_can_write(cfg.out)
        print(f"making an environment for trl in {folder}: a minute, 1.5 GB", file=sys.stderr)
        try:
            _do(sys.executable, "-m", "venv", "--clear", str(folder))
            for packages in ([TORCH], [TORCH, *PINS]):
                _do(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", *packages)
        except (OSError, subprocess.CalledProcessError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"cannot make an environment for trl in {folder}: {_last_line(error)}. It needs a package index; or give --python FILE of one that is there") from error
        ready.write_text(wanted)
    return python.absolute()


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


def _last_line(error: OSError | subprocess.CalledProcessError) -> str:
    said = (error.stderr or "") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return ([line.strip() for line in said.splitlines() if line.strip()] or [str(error)])[-1].removeprefix("ERROR: ").rstrip(".")


# Processes that take turns


@dataclass(frozen=True)
class Arm:
    name: str
    steps_a_pass: int


def arms(cfg: Config) -> list[Arm]:
    return [Arm(TRL, 1), *(Arm("ours" if n == 1 else f"ours, {n} steps a pass", n) for n in cfg.steps_a_pass)]


@dataclass
class Told:
    """What one arm said."""

    before: dict[str, Any]
    epochs: list[dict[str, Any]]
    compared: dict[str, Any]


def measure(cfg: Config, python: Path, model: Path, spec: Spec, progress: Progress) -> dict[Arm, Told]:
    """All rounds of all arms at one setting."""
    entrants = arms(cfg)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rushes-bench-")))
        workers: dict[Arm, Worker] = {}
        for n, arm in enumerate(entrants):
            words = [str(python), "-I", _trl_worker.__file__] if arm.name == TRL else [sys.executable, "-m", _ddpo_worker.__name__]
            own = spec.model_copy(update={"steps_a_pass": arm.steps_a_pass, "out": folder / str(n), "model": model})
            workers[arm] = stack.enter_context(worker(arm.name, words, own, cfg.out / f"{arm.name.replace(',', '').replace(' ', '-')}.log"))
        told = {arm: Told(workers[arm].answer(), [], {}) for arm in entrants}
        for turn in range(1 + cfg.rounds):
            for k in range(len(entrants)):
                arm = entrants[(k + turn) % len(entrants)]  # nobody is always first
                said = workers[arm].ask("epoch")
                progress.advance(f"{spec.train}, guidance {spec.guidance:g}, {arm.name}")
                if turn > 0:
                    told[arm].epochs.append(said)
        captured = str(folder / "captured.safetensors")
        workers[entrants[0]].ask("capture", file=captured)
        for arm in entrants[1:]:
            told[arm].compared = workers[arm].ask("compare", file=captured)
    return told


# Rows


def rows_of(spec: Spec, told: Mapping[Arm, Told]) -> list[Row]:
    """One row an arm. Ratios are of trl over ours, round by round: above 1, ours is faster or needs less."""
    theirs = next(said for arm, said in told.items() if arm.name == TRL)
    return [_row(spec, arm, said, theirs) for arm, said in told.items()]


def _row(spec: Spec, arm: Arm, said: Told, theirs: Told) -> Row:
    first = said.epochs[0]
    seconds = spread([epoch["seconds"] for epoch in said.epochs])
    row: Row = {
        "train": spec.train,
        "guidance": spec.guidance,
        "arm": arm.name,
        "threads": spec.threads,
        "rolled_rows": first["rolled_rows"],
        "trained_rows": first["trained_rows"],
        "trained_calls": first["trained_calls"],
        **columns("seconds", seconds),
        **{f"{part}_seconds": spread([epoch[part] for epoch in said.epochs]).median for part in ("rollout", "update", "cpu")},
    }
    for part, name in (("seconds", "times_faster"), ("rollout", "rollout_times_faster"), ("update", "update_times_faster"), ("cpu", "times_less_cpu")):
        ratio = None if said is theirs else paired_ratio([epoch[part] for epoch in theirs.epochs], [epoch[part] for epoch in said.epochs])
        row |= columns(name, ratio)
    peak, known = said.epochs[-1]["peak_bytes"], theirs.epochs[-1]["peak_bytes"]
    row |= {
        "memory_before_bytes": said.before["peak_bytes"],
        "peak_memory_bytes": peak,
        "times_less_memory": None if said is theirs or not peak or not known else known / peak,
    }
    return {**row, **{name: said.compared.get(name) for name in DIFFERENCES}}


DIFFERENCES = ("log_prob_difference", "kernel_difference", "gradient_difference", "update_difference", "parameter_difference")


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What was asked, and whether it holds: of the worst of our rows."""
    ours = [row for row in rows if row["arm"] != TRL]
    single, batched = [row for row in ours if row["arm"] == "ours"], [row for row in ours if row["arm"] != "ours"]
    apart = max(row["log_prob_difference"] for row in ours)
    found = [f"Log-probabilities equal to {TOLERANCE:g}: {'holds' if apart <= TOLERANCE else 'does not hold'}, {apart:.1e} apart at most."]
    for name, some, goal in (("One step a pass, not slower", single, 1.0), ("Several steps a pass, 1.5 times as fast", batched, GOAL)):
        found += [f"{name}: {_holds([(row['times_faster_low'], row['times_faster_high']) for row in some], goal)} ({_range(some, 'times_faster')})."] if some else []
    for name, some in (("One step a pass", single), ("Several steps a pass", batched)):
        known = [row["times_less_memory"] for row in some if row["times_less_memory"]]
        found += [f"{name}, memory not higher: {'holds' if min(known) >= 1 else 'does not hold'} (trl's peak over ours: {min(known):.2f} to {max(known):.2f})."] if known else []
    return found


def _holds(intervals: Sequence[tuple[float, float]], goal: float) -> str:
    if all(low >= goal for low, _ in intervals):
        return "holds"
    return "does not hold" if any(high < goal for _, high in intervals) else "cannot be told"


def _range(rows: Sequence[Row], name: str) -> str:
    return ", ".join(f"{row['train']} with guidance {row['guidance']:g}: {row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]" for row in rows)


def in_file(rows: Sequence[Row]) -> list[Row]:
    """For the file: a value and its interval in one cell, bytes in MiB."""
    return in_brackets([{name.replace("_bytes", "_MiB"): value and round(value / 2**20) if name.endswith("_bytes") else value for name, value in row.items()} for row in rows])


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: one setting, one short epoch of batches of full size."""
    clips = min(cfg.clips, 4)
    less = {"train": cfg.train[:1], "guidance": cfg.guidance[:1], "rounds": 1, "clips": clips}
    return cfg.model_copy(update={**less, "rollout_batch": min(cfg.rollout_batch, clips), "micro_batch": min(cfg.micro_batch, clips)})


def check(cfg: Config) -> None:
    """Raises UserError for sizes that trl refuses, too."""
    if cfg.clips % cfg.rollout_batch or cfg.rollout_batch % cfg.micro_batch:
        raise UserError(f"clips {cfg.clips}, rollout_batch {cfg.rollout_batch} and micro_batch {cfg.micro_batch}: each must be a multiple of the next. Change --clips")
    if min(len(cfg.train), len(cfg.guidance), len(cfg.steps_a_pass)) < 1 or min(cfg.guidance) < 1:
        raise UserError("nothing to measure, or guidance below 1, which trl takes for none. Give --train '[lora]' --guidance '[5]' --steps-a-pass '[1, 3]'")
    if cfg.width % 32:
        raise UserError(f"width is {cfg.width}, but groups of channels are 32. Give --width 32")


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew; trl's environment is kept."""
    check_can_end(cfg, out=cfg.out)
    check(cfg)
    small = shrunk(cfg) if cfg.quick else cfg
    python = environment(cfg)
    cfg.out.mkdir(parents=True, exist_ok=True)
    prompts = tuple(prompt.text for prompt in make_prompts(8, seed=0, split="eval"))
    same = {name: getattr(small, name) for name in ("clips", "rollout_batch", "micro_batch", "steps", "eta")}
    spec = Spec(model=Path(), out=Path(), prompts=prompts, threads=small.threads or len(os.sched_getaffinity(0)), **same)
    settings = [(train, guidance) for train in small.train for guidance in small.guidance]
    rows: list[Row] = []
    with Progress("ddpo-trl", total=len(settings) * len(arms(small)) * (1 + small.rounds)) as progress, tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        save_tiny(Path(folder), prompts, width=small.width)
        for train, guidance in settings:
            own = spec.model_copy(update={"train": train, "guidance": guidance})
            rows += rows_of(own, measure(small, python, Path(folder), own, progress))
    if cfg.write:
        write(cfg, "ddpo-trl", here("ddpo-trl", cfg), "DDPO beside trl", {"An epoch": in_file(rows)}, remarks=verdicts(rows))
    return {"rows": rows}
