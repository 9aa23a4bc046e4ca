"""Checkpoints of trl's trainers without a pickle, and their progress. Shared by recipes, no command.

transformers' Trainer keeps weights as safetensors, but optimizer, schedule and random states in files of `torch.save`, and reads them with `torch.load(weights_only=True)`, an
unpickler that makes tensors and little else. Here nothing is pickled at all: the trainers are told to save the model only (`save_only_model`), and a callback writes the rest.

    checkpoint-<step>/model.safetensors, trainer_state.json, ...    by the trainer
    checkpoint-<step>/state.safetensors, rushes_state.json          by us, the last file being the last that is written: a checkpoint without it was killed, and is dropped

The trainer's `training_args.bin`, which nobody reads, is removed. Of several processes the first one writes, and each one's random states are kept; where there are others than
there were, they draw from new ones.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from align.processes import is_main, on_main
from align.progress import Progress
from align.run import derived_seed
from align.state import flatten, unflatten
from base_model.checkpoint import atomic_write, load_weights, read_json, save_weights
from base_model.errors import GuardStop

STATE, LAST_WRITTEN = "state.safetensors", "rushes_state.json"
CHECKPOINTS_KEPT = 2  # the one before must be there until the new one is whole


def whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; those that were not are removed."""
    found = sorted((path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)), key=step_of)
    for path in found:
        if not (path / LAST_WRITTEN).exists():
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return whole[-1] if whole else None


def train(trainer: Any, folder: Path, *, label: str, note: str = "loss") -> list[dict[str, Any]]:
    """Trains in `folder`, from its newest whole checkpoint where there is one, and tells how far it is. note: the metric that the progress line shows.

    Returns the lines that were logged. Raises GuardStop, before the optimizer sees it, where a gradient is not finite.
    """
    from transformers import PrinterCallback

    begun = on_main(lambda: whole_checkpoint(folder))
    trainer.remove_callback(PrinterCallback)
    with Progress(label, total=trainer.args.max_steps, done=0 if begun is None else step_of(begun), quiet=not is_main()) as progress:
        trainer.add_callback(_callback(begun, label, note, progress))
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    return list(trainer.state.log_history)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, libraries draw no bars beside ours, and say neither which completions have no reward (they are counted) nor that trl 1.16 asks transformers 5.23 by old names."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)  # of weights that are tied, and saved once, it says that they are missing
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*is deprecated", category=FutureWarning)
        yield


def step_of(checkpoint: Path) -> int:
    """Steps that were made before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def common_arguments(folder: Path, *, seed: int, steps: int, save_every: int) -> dict[str, Any]:
    """What the configurations of all trl trainers say here: precision of the device, no reports to elsewhere, no pickles."""
    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder),
        "seed": seed,
        "use_cpu": not gpu,
        "bf16": gpu,
        "activation_checkpointing": gpu,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_only_model": True,
        "save_total_limit": CHECKPOINTS_KEPT,
    }


def _callback(begun: Path | None, label: str, note: str, progress: Progress) -> Any:
    from accelerate.utils import gather_object
    from transformers import TrainerCallback, set_seed

    class Checkpoints(TrainerCallback):
        told = ""
        random_states: dict[str, Any] | None = None
        fresh: int | None = None  # seed of other ones

        def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
            if begun is not None:
                kept = _read(begun)
                optimizer.load_state_dict(kept["optimizer"])
                lr_scheduler.load_state_dict(kept["schedule"])
                own, same = args.process_index, len(kept["random"]) == args.world_size
                self.random_states = kept["random"][own] if same else None
                self.fresh = None if same else derived_seed(args.seed, f"process {own} of {args.world_size}", state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.random_states is not None:  # not earlier: what a trainer prepares draws numbers, too
                _set_random_states(self.random_states)
                self.random_states = None
            if self.fresh is not None:
                set_seed(self.fresh % 2**32)
                self.fresh = None

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
            if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
                raise GuardStop(f"{label}: the gradient of step {state.global_step} is not finite. Lower its learning rate, then begin again in another --out")

        def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **_: Any) -> None:
            value = logs.get(note)
            self.told = f"{note} {value:.4g}" if isinstance(value, int | float) and math.isfinite(value) else self.told

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(self.told)

        def on_save(self, args: Any, state: Any, control: Any, *, optimizer: Any, lr_scheduler: Any, **_: Any) -> None:
            states = gather_object([_random_states()]) if args.world_size > 1 else [_random_states()]
            if not is_main():
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)
            _write(folder, {"optimizer": optimizer.state_dict(), "schedule": lr_scheduler.state_dict(), "random": states})

    return Checkpoints()


def _write(folder: Path, state: dict[str, Any]) -> None:
    skeleton, tensors = flatten(state)
    save_weights(folder / STATE, tensors, {})
    atomic_write(folder / LAST_WRITTEN, json.dumps(skeleton).encode())


def _read(folder: Path) -> dict[str, Any]:
    skeleton = read_json(folder / LAST_WRITTEN, "the state of a training")
    found: dict[str, Any] = unflatten(skeleton, load_weights(folder / STATE)[0])
    return found


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state(), "gpus": gpus}


def _set_random_states(states: dict[str, Any]) -> None:
    kind, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["gpus"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["gpus"])
