"""Best of n of the clips in a store: what a reward model promises of the clips it picks, and what a second scorer thinks of them. A part of `rushes evaluate-reward`.

The maths is in `reward/overoptimisation.py`. A second scorer is no gold: it is worth as much as its labels and its encoder differ from the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from align.progress import Progress
from base_model.errors import UserError
from base_model.video.store import ClipRow, ClipStore
from recipes.charts import Series, line_chart
from recipes.report import interval_text
from reward.agreement import Interval
from reward.overoptimisation import Curve, Fit, clips_for_kl, curve_of, fit_gao, half_way, mean_gains, second_half
from reward.types import Scorer


def takes_of(store: ClipStore) -> dict[str, list[ClipRow]]:
    """The clips of each prompt, in the order of arrival. Raises UserError where they are not draws of one generator, or no prompt has two."""
    rows = store.rows()
    makers = {(row.generator, row.generator_rev, row.sampler_json, row.num_frames, row.height, row.width) for row in rows}
    if len(makers) > 1:
        raise UserError(f"clips of {len(makers)} generators, samplers or sizes, {store.folder}. Best of n is about one: give --takes a store of its own")
    takes: dict[str, list[ClipRow]] = {}
    for row in rows:
        takes.setdefault(row.prompt, []).append(row)
    if not any(len(clips) > 1 for clips in takes.values()):
        raise UserError(f"no prompt has two clips, {store.folder}. Make more: rushes generate --clips-per-prompt 64")
    return takes


@torch.no_grad()
def scores_of(rows: Sequence[ClipRow], store: ClipStore, scorers: Sequence[Scorer], *, batch: int) -> list[Tensor]:
    """What each scorer says of every clip, [C,R] each; every clip is decoded once."""
    found: list[list[Tensor]] = [[] for _ in scorers]
    with Progress("best of n", total=len(rows)) as progress:
        for begin in range(0, len(rows), batch):
            part = rows[begin : begin + batch]
            video, prompts = torch.stack([store.load(row.clip_id) for row in part]), [row.prompt for row in part]
            for scorer, parts in zip(scorers, found, strict=True):
                parts.append(scorer(video, prompts).mean)
            progress.advance(steps=len(part))
    return [torch.cat(parts) for parts in found]


def best_of_n_of(model: Scorer, guard: Scorer, store: ClipStore, *, batch: int, seed: int) -> dict[str, Any]:
    """What `report.json` holds of it: how many clips of how many prompts, and `told` for each dimension that both scorers have."""
    dims = [dim for dim in model.dims if dim in guard.dims]
    if not dims:
        raise UserError(f"the model scores {', '.join(model.dims)}, the guard {', '.join(guard.dims)}. Give a guard of a dimension of the model")
    takes = takes_of(store)
    proxy, second = scores_of([row for clips in takes.values() for row in clips], store, (model, guard), batch=batch)
    sizes = [len(clips) for clips in takes.values()]

    def column(scores: Tensor, scorer: Scorer, dim: str) -> list[Any]:
        return [part.numpy() for part in scores[:, scorer.dims.index(dim)].double().split(sizes)]

    try:
        curves = {dim: curve_of(column(proxy, model, dim), column(second, guard, dim)) for dim in dims}
    except ValueError as error:
        raise UserError(f"{error}, {store.folder}. Give --takes a store with more clips a prompt") from error
    return {"clips": len(proxy), "prompts": len(takes), "dimensions": {dim: told(curve, curve.gold_std, seed=seed) for dim, curve in curves.items()}}


def told(curve: Curve, gold_unit: float, *, seed: int) -> dict[str, Any]:
    """A curve in words and numbers: the proxy's gains in standard deviations among clips of one prompt, gold's in `gold_unit`; what Gao's form says, where three n allow it."""
    gold = curve.gold / (gold_unit or 1.0)
    fit = fit_gao("best_of_n", curve.d, gold, seed=seed) if len(curve.n) > 2 else None
    later = second_half(curve.d, gold, seed=seed)
    return {
        "n": curve.n.tolist(),
        "sqrt_kl": curve.d.tolist(),
        "proxy": [gain._asdict() for gain in mean_gains(curve.proxy / (curve.proxy_std or 1.0), seed=seed)],
        "gold": [gain._asdict() for gain in mean_gains(gold, seed=seed)],
        "prompts": int(curve.kept.sum()),
        "prompts_left_out": int((~curve.kept).sum()),
        "unscored_clips": curve.unscored,
        "unjudged_clips": curve.unjudged,
        "second_half": later._asdict(),
        "verdict": verdict(later),
        "fit": None if fit is None else fitted(fit),
    }


def verdict(later: Interval) -> str:
    """What gold did over the second half of the way."""
    return "falls" if later.high < 0 else "rises" if later.low > 0 else "neither surely rises nor surely falls"


def fitted(fit: Fit) -> dict[str, Any]:
    """Gao's form of the best of n, and where it says that gold is highest, in sqrt(nats) and in clips: inf, null in `report.json`, where it never falls."""
    peak = fit.peak._asdict()
    clips = {name: clips_for_kl(d * d) for name, d in peak.items()}
    return {"alpha": fit.alpha._asdict(), "beta": fit.beta._asdict(), "peak_sqrt_kl": peak, "peak_n": clips, "gain_at_peak": fit.top._asdict(), "misfit": fit.misfit}


COLUMNS = ("n", "sqrt(KL)", "promised by the model", "gained by the guard's score")


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One dimension as text under `COLUMNS`, a row for every n."""
    return [
        (str(n), f"{d:.2f}", interval_text(proxy, percent=False), interval_text(gold, percent=False))
        for n, d, proxy, gold in zip(found["n"], found["sqrt_kl"], found["proxy"], found["gold"], strict=True)
    ]


def sentence(found: Mapping[str, Any]) -> str:
    """What the curve says of how far the model can be optimised."""
    most, half, fit = found["n"][-1], found["n"][half_way(found["sqrt_kl"])], found["fit"]
    said = f"From n = {half} to n = {most} the guard's score {found['verdict']}: {interval_text(found['second_half'], percent=False)}."
    if fit is None:
        return f"{said} Fewer than three n: no form is fitted."
    mean, low, high = (_clips(value, most) for value in fit["peak_n"].values())
    return f"{said} By Gao's form it is highest at n = {mean} [{low}, {high}]."


def _clips(n: float, most: int) -> str:
    return f"{n:.0f}" if n <= most else f"above {most}"


def chart(found: Mapping[str, Any]) -> str:
    """Both gains against sqrt(KL), as SVG."""
    x = tuple(found["sqrt_kl"])
    promised, gained = (tuple(row["mean"] for row in found[key]) for key in ("proxy", "gold"))
    lines = [Series("promised by the model", "diagonal", x, promised), Series("guard", "favourite", x, gained)]
    return line_chart(lines, name="Gain of the best of n", x_label=f"sqrt(KL), up to n = {found['n'][-1]}")
