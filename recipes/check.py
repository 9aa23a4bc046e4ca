"""Whether a configuration of RL holds before its first expensive second (`rushes check CONFIG.yaml`): one rollout and its gradients, as the recipe itself makes them, and no step.

The recipe runs in a folder of its own, with two held-out prompts; every self-check it makes before its first update (`align/selfcheck.py`) tells what it found instead of stopping
it. A line a check: pass, FAIL or not asked, and the number. What follows the file is what would follow it after the recipe's own name.

    rushes check recipes/configs/tiny/nft.yaml --model runs/demo/sft/network.safetensors --reward runs/demo/reward/reward
    torchrun --nproc-per-node 2 -m recipes.cli check recipes/configs/tiny/ddpo.yaml          gradients of two processes are compared
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import torch

from align import selfcheck
from align.config import Config as BaseConfig
from align.config import load
from align.selfcheck import Finding
from base_model.errors import RushesError, UserError
from recipes.cli import COMMANDS, shipped_config
from recipes.generate import check_memory, memory_of_token
from recipes.guards import Guards
from recipes.memory import PeakMemory

FITS, WHOLE = "the costliest shape fits", "one iteration comes to its end"
NOT_ASKED = {
    selfcheck.RATIO: "no noisy step is taken by all clips of a micro-batch",
    selfcheck.OTHER_BATCHES: "no step is noisy",
    selfcheck.RANKS: "there is one process (torchrun --nproc-per-node 2 -m recipes.cli check ...)",
}
HELD_OUT = 2  # prompts


class Config(BaseConfig):
    file: Path | None = None
    """YAML of an RL recipe; none means the shipped one of `recipe`."""
    recipe: str = ""
    """Name of the recipe; without one the first line of the file says it: # rushes NAME FILE ..."""
    keys: tuple[str, ...] = ()
    """`--key.path value` words of the recipe's own configuration. On the command line they are written as they are."""


class CheckFailed(RushesError):
    """At least one check failed; `result` holds them all."""

    def __init__(self, message: str, result: dict[str, object]) -> None:
        super().__init__(message)
        self.result = result


def recipe_of(cfg: Config) -> str:
    """The recipe that is checked. Raises UserError where it is none that is known, or nobody says which."""
    known = [name for name in COMMANDS if name not in ("bench", "check") and "guards" in importlib.import_module(COMMANDS[name].module).Config.model_fields]
    name = cfg.recipe or (_first_line(cfg.file) if cfg.file else "")
    if name not in known:
        asked = f"{name!r} is no recipe that can be checked" if name else f"nobody says which recipe to check, {cfg.file or 'on the command line'}"
        raise UserError(f"{asked}. Begin the file with the line `# rushes NAME FILE`, or give --recipe: {', '.join(known)}")
    return name


def _first_line(file: Path) -> str:
    try:
        first = file.read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config {str(file)!r}: {error}. Give a YAML file that you may read") from error
    found = re.match(r"# *rushes ([a-z-]+)", first)
    return found[1] if found else ""


def rehearsed(cfg: Any, out: Path) -> Any:
    """The same configuration in another folder, with few held-out clips and one update a rollout."""
    guards: Guards = cfg.guards
    once = {name: 1 for name in ("updates", "epochs") if name in type(cfg.policy).model_fields}
    fewer = {"held_out_prompts": min(HELD_OUT, cfg.held_out_prompts), "guards": guards.model_copy(update={"pairs": min(HELD_OUT, guards.pairs)})}
    return cfg.model_copy(update={"out": out, "policy": cfg.policy.model_copy(update=once), **fewer})


def dry_run(module: ModuleType, cfg: Any) -> tuple[list[Finding], Exception | None]:
    """What the recipe's checks found in one iteration without a step, and whether it came to its end and memory was enough; and what went wrong.

    Raises UserError for the user's mistakes.
    """
    error: Exception | None = None
    with PeakMemory() as memory, tempfile.TemporaryDirectory(prefix="rushes-check-") as folder, selfcheck.rehearsal() as told:
        try:
            module.main(rehearsed(cfg, Path(folder) / "run"))
        except UserError:
            raise
        except Exception as problem:
            error = problem
    found = [*told]
    short = error is not None and out_of_memory(error)
    if error is not None and not short:
        found.append(Finding(WHOLE, False, f"{type(error).__name__}: {' '.join(str(error).split())}", "see the checks before it, and --debug"))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory.peak_bytes
    most = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else psutil.virtual_memory().total
    clip = cfg.sampler.clip
    said = f"{peak / 2**30:.2f} of {most / 2**30:.1f} GiB for clips of {clip.frames}x{clip.height}x{clip.width}"
    found.append(Finding(FITS, not short and peak <= most, said, "lower policy.micro_batch, sampler.frames, sampler.height or sampler.width"))
    return found, error


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory was not enough, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)


def lines(found: Sequence[Finding]) -> dict[str, str]:
    """Name of a check -> pass, FAIL or not asked, and what was found, on a line without colons; the worst where one was made several times."""
    told = {}
    for name in (*selfcheck.CHECKS, WHOLE, FITS):
        mine = sorted((finding for finding in found if finding.name == name), key=lambda finding: finding.passed)
        if mine:
            told[name] = f"{'pass' if mine[0].passed else 'FAIL'}, {mine[0].said.replace(': ', ', ')}"
        elif name != WHOLE:
            told[name] = f"not asked, {NOT_ASKED.get(name, 'this recipe does not say')}"
    return told


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing. Raises CheckFailed, exit status 1, where a check fails."""
    started = time.monotonic()
    name = recipe_of(cfg)
    module = importlib.import_module(COMMANDS[name].module)
    recipe = load(module.Config, cfg.file or shipped_config(name), cfg.keys)
    check_memory(recipe.sampler, recipe.sampler.batch * torch.get_num_threads(), 0.0, bytes_a_token=memory_of_token(recipe.model))
    found, error = dry_run(module, recipe)
    failed = [finding for finding in found if not finding.passed]
    result: dict[str, object] = {"recipe": name, **lines(found), "seconds": round(time.monotonic() - started, 1)}
    told = result if int(os.environ.get("RANK", "0")) == 0 else {}
    if failed:
        count = len({finding.name for finding in failed})
        raise CheckFailed(f"{count} {'check' if count == 1 else 'checks'} failed. {failed[0].name}: {failed[0].said}: {failed[0].remedy}", told) from error
    return told
