"""A training loop on `Run` over packed clips of a tiny Wan, in one process or several, whole or sharded: test_sharding.py starts it, kills it and compares what it leaves.

As a module it forks for every line of JSON it is sent, so that the imports are paid for once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config, load
from align.ema import EMA
from align.objectives import Loss
from align.optimizers import OptimizerName, build_optimizer, warmup_cosine
from align.run import Run
from base_model.checkpoint import save_weights
from base_model.errors import RushesError
from base_model.families.wan import LORA_TARGETS, MLP_TARGETS, WanVideoModel
from base_model.families.wan_packed import PackedWan, packed_velocity
from base_model.lora import add_lora
from base_model.quantize import to_nf4
from base_model.recompute import recompute_blocks
from base_model.types import Conditioning
from tests.base_model.families import tiny_wan
from tests.forked import answer, write_to

METRICS = {"loss": "Mean squared error.", "grad_norm": "Norm of the gradient.", "held_out": "The same of clips that are not trained on, on the averaged weights."}
SIZES = [(3, 4, 6), (1, 6, 4), (2, 6, 6), (2, 8, 2), (1, 4, 4), (3, 2, 4), (2, 4, 4), (1, 8, 8)]
Pack = list[int]


class RanksConfig(Config):
    may_change = Config.may_change | {"sharded", "die_at"}

    out: Path = Path("out")
    """Folder of the run."""
    iterations: int = 5
    """Iterations."""
    save_every: int = 2
    """Iterations between checkpoints."""
    packs: int = 4
    """Packs of a step."""
    lora: bool = False
    """An adapter instead of every weight."""
    dora: bool = False
    """The adapter is a DoRA."""
    nf4: bool = False
    """In four bits."""
    experts: bool = False
    """Two of them."""
    sharded: bool = False
    """Whether weights are spread over the processes."""
    optimizer: OptimizerName = "adamw"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Learning rate."""
    differs: bool = False
    """Whether processes begin with other weights."""
    die_at: int = -1
    """Iteration in which the last process ends itself by SIGKILL, its gradient made and its step not."""


def build(cfg: RanksConfig, rank: int) -> WanVideoModel:
    torch.manual_seed(rank if cfg.differs else 0)
    network: Any = tiny_wan.transformer()
    recompute_blocks(network, 0.5)
    if cfg.experts:
        from base_model.families.wan_experts import Experts

        network = Experts(network, tiny_wan.transformer(), 0.875)
    if cfg.nf4:
        to_nf4(network, r"blocks\..*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)")
    if cfg.lora:
        network = add_lora(network, rank=2, alpha=4, targets=(*LORA_TARGETS, *MLP_TARGETS), dora=cfg.dora)
    return WanVideoModel(network)


def clip(run: Run, k: int) -> tuple[Tensor, Conditioning]:
    """The k-th clip there is: latents [16,F,H,W] and a text of its own length."""
    generator = run.generator("clip", k)
    words = 3 + k % 4
    return torch.randn(16, *SIZES[k % len(SIZES)], generator=generator), Conditioning(("",), torch.randn(1, words, 16, generator=generator), torch.ones(1, words, dtype=torch.bool))


def train(cfg: RanksConfig) -> dict[str, Tensor]:
    run = Run(cfg.out, cfg, seed=0, resume=(cfg.out / "run.json").exists(), metrics=METRICS, quiet=True)
    model = build(cfg, run.accelerator.process_index)
    root = model.network if cfg.experts else PackedWan(model.network)
    if cfg.sharded:
        run.shard(root)
    run.count_forwards(root)
    optimizer = build_optimizer(model.network, cfg.optimizer, lr=cfg.lr)
    schedule, average = warmup_cosine(optimizer, cfg.iterations), EMA(model.network, 0.9)
    run.register("network", model.network, trainable_only=cfg.lora)
    for name, thing in (("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)

    def error(pack: Pack) -> Tensor:
        """Mean over the clips of a pack of their mean squared distance from a velocity, []."""
        clips, conds = zip(*(clip(run, k) for k in pack), strict=True)
        t = torch.tensor([0.1 + 0.8 * ((7 * k) % 11) / 11 for k in pack])  # [S]
        found = packed_velocity(root, model, [(1 - s) * x + s * x.flip(0) for x, s in zip(clips, t, strict=True)], t, conds)
        return torch.stack([(u - x.flip(0) + x).square().mean() for u, x in zip(found, clips, strict=True)]).mean()

    def losses(pack: Pack) -> Iterator[Loss]:
        yield Loss(error(pack) / cfg.packs, {})

    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="ranks"):
        packs = [[10 * i + k, 10 * i + k + 4] for k in range(cfg.packs)]
        told = run.backward_each(optimizer, losses, run.share(packs))
        if i == cfg.die_at and run.accelerator.process_index == run.processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        norm = run.step(optimizer, 1.0, schedule)
        average.update()
        run.log(loss=torch.stack([loss.value for loss in told]).sum(), grad_norm=norm)
        if i == 2:
            with average.swap(), run.looking(), run.whole():
                held_out = run.on_main(lambda: look(model, run, error))
            run.log(held_out=held_out)
    average.apply()
    run.unshard()
    return {name: tensor for name, tensor in model.network.state_dict().items()}


@torch.no_grad()
def look(model: WanVideoModel, run: Run, error: Any) -> float:
    """Packed, and as a sampler asks."""
    x, cond = clip(run, 1002)
    return float(error([1000, 1001])) + float(model(x[None], torch.tensor([0.5]), cond).square().mean())


def main(arguments: list[str]) -> int:
    import torch.distributed

    cfg = load(RanksConfig, None, arguments)
    try:
        found = train(cfg)
    except RushesError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    rank = int(os.environ.get("RANK", "0"))
    save_weights(cfg.out / f"final-{rank}.safetensors", found, {})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def serve() -> None:
    """{"processes": n, "words": [...], "log": file} a line in; the exit statuses of its processes out."""
    import peft  # noqa: F401
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import WanTransformer3DModel  # noqa: F401

    answer(_run)


def _run(asked: dict[str, Any], rank: int) -> int:
    write_to(f"{asked['log']}-{rank}")
    try:
        return main(asked["words"])
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else serve())
