"""trl's DDPOTrainer in a process that makes one epoch whenever it is told to.

It runs in trl's own environment, which knows nothing of this project: only the standard library and `_serve.py` are imported here, inside functions trl and what it needs.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve: Any = importlib.import_module("_serve")


def build(spec: dict[str, Any]) -> dict[str, Callable[..., dict[str, Any]]]:
    import torch

    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(spec["threads"])
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # the pipeline's own warning needs it
    prompts = itertools.cycle(spec["prompts"])
    config = DDPOConfig(
        mixed_precision="no",
        seed=spec["seed"],
        save_freq=10**9,
        sample_num_steps=spec["steps"],
        sample_eta=spec["eta"],
        sample_guidance_scale=spec["guidance"],
        sample_batch_size=spec["rollout_batch"],
        sample_num_batches_per_epoch=spec["clips"] // spec["rollout_batch"],
        train_batch_size=spec["micro_batch"],
        train_gradient_accumulation_steps=spec["clips"] // spec["micro_batch"],
        train_learning_rate=spec["lr"],
        train_max_grad_norm=spec["max_grad_norm"],
        train_clip_range=spec["clip_range"],
        train_cfg=spec["guidance"] > 1,
        train_timestep_fraction=(spec["steps"] - 0.5) / spec["steps"],  # all but one
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(spec["model"], use_lora=spec["train"] == "lora")
    if spec["guidance"] <= 1:  # diffusers' old method puts the empty prompt in front even so, and trl's sampling fails on twice as many texts as images
        pipeline.sd_pipeline._encode_prompt = lambda *given, prompt_embeds, **named: prompt_embeds
    trainer = DDPOTrainer(
        config,
        lambda images, texts, metadata: (images.mean((1, 2, 3)), [{}] * len(images)),
        lambda: (next(prompts), {}),
        pipeline,
    )
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    clock: dict[str, float] = {}
    for phase, method in (("rollout", "_generate_samples"), ("update", "_train_batched_samples")):
        setattr(trainer, method, timed(getattr(trainer, method), clock, phase))
    passes = _serve.Passes(trainer.sd_pipeline.unet)

    def epoch() -> dict[str, Any]:
        clock.clear()
        passes.take()
        started, cpu = time.perf_counter(), time.process_time()
        trainer.step(0, 0)
        return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, **clock, **passes.take(), "peak_bytes": _serve.peak_bytes()}

    return {"epoch": epoch, "capture": lambda file: capture(trainer, file)}


def timed(work: Callable[..., Any], clock: dict[str, float], phase: str) -> Callable[..., Any]:
    def clocked(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments, **named)
        clock[phase] = time.perf_counter() - started
        return result

    return clocked


def capture(trainer: Any, file: str) -> dict[str, Any]:
    """One epoch by a new optimizer, with every tensor that goes into its losses and comes out of them, as safetensors.

    `NNNN.latents` and so on are those of the N-th loss, `NNNN.eps` is the guided noise prediction and `NNNN.now` its log-probability; `before.NAME`, `gradient.NAME` and
    `after.NAME` are the parameters that train.
    """
    from safetensors.torch import save_file

    calls: list[dict[str, Any]] = []
    weights: dict[str, Any] = {}
    unet, step, loss, clip = trainer.sd_pipeline.unet, trainer.sd_pipeline.scheduler_step, trainer.calculate_loss, trainer.accelerator.clip_grad_norm_

    def keep(kind: str, of: Callable[[Any], Any]) -> None:
        weights.update({f"{kind}.{name}": of(p).detach().clone() for name, p in unet.named_parameters() if p.requires_grad})

    def calculate_loss(*given: Any) -> Any:
        names = ("latents", "timesteps", "next_latents", "log_probs", "advantages", "embeds")
        calls.append({name: tensor.detach().clone() for name, tensor in zip(names, given, strict=True)})
        return loss(*given)

    def scheduler_step(eps: Any, *given: Any, **named: Any) -> Any:
        found = step(eps, *given, **named)
        calls[-1] |= {"eps": eps.detach().clone(), "now": found.log_probs.detach().clone()}
        return found

    def clip_grad_norm(*given: Any) -> Any:
        keep("gradient", lambda p: p.grad)
        return clip(*given)

    trainer.calculate_loss, trainer.sd_pipeline.scheduler_step, trainer.accelerator.clip_grad_norm_ = calculate_loss, scheduler_step, clip_grad_norm
    trainer.optimizer.optimizer.state.clear()
    keep("before", lambda p: p)
    trainer.step(0, 0)
    keep("after", lambda p: p)
    tensors = {f"{n:04d}.{name}": tensor for n, call in enumerate(calls) for name, tensor in call.items()} | weights
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return {"losses": len(calls)}


if __name__ == "__main__":
    _serve.serve(build)
