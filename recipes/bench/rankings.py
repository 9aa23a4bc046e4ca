"""Which likelihood learns most from the same rankings: simulated people who tie, prefer a place on the screen, and of whom one hardly looks.

Clips are features, a score is linear in them, and every method fits the same scorer to the same answers by L-BFGS in float64 under the same wide priors. There are two worlds.
In the *model's* people answer by Davidson-Luce with a habit of place and a share of careless answers: the model that the last method fits, so that what it finds can be
compared with what was put in. In the *simulated labelers'* they are those of `recipes/shapes/labelers.py`: Gumbel noise, ties below a threshold, careless orders without ties.
No method knows that world. The people of both are the reward panel's.

Methods are judged on pairs of clips of new prompts, where the answer is no tie: as one who always looks and has no habit answers, which is what a reward should say, and as
the panel answers, where a method may use all it knows of who answers and where the clips stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import Count, Several
from align.progress import Progress
from recipes.bench._people import (
    CLIPS,
    LABELERS,
    LOG_TIE,
    LOG_TIE_CARELESS,
    MODELS,
    PLACE_CARELESS,
    WORLDS,
    Answers,
    Floats,
    World,
    advantage_of,
    held_out_answers,
    training_answers,
    true_weights,
)
from recipes.bench._results import Bench, Row, check_can_end, flat, here, write
from recipes.shapes.labelers import REWARD_PANEL
from recipes.statistics import UNKNOWN, bootstrap_crossed
from reward.labelers import careless, reliability_mixture, with_position
from reward.ranking import all_pairs, davidson_luce, pair_outcomes, rao_kupper

Likelihood = Callable[["Values", "Answers"], Tensor]
Values = dict[str, Tensor]
"""Parameters by name; {"weights": [features], "advantage": [people], ...}."""

Z = 1.96
"""Standard errors on either side of an interval of 95 %."""
NAMED = 0.75
"""Somebody is named careless whose reliability is below this with all of its 95 % interval: surely more than a quarter of the answers are given without looking."""
NOT_WORSE = -0.01
"""Accuracy is not worse where the lower end of the difference's interval is above this."""
PLAIN, FULL = "Bradley-Terry, all pairs", "Davidson-Luce + position + reliability"


class Config(Bench):
    seeds: Count = 5
    """Draws of training prompts and answers, with seeds 0, 1, ... The world and the test are the same for all. `quick` takes 1."""
    prompts: Several = 1_000
    """Training prompts: each has one screen of two, three or four clips, ranked by two people. `quick` takes at most 60."""
    test_prompts: Several = 1_500
    """Held-out prompts of four clips; all six pairs are asked. `quick` takes at most 40."""
    features: Count = 8
    """Features of a clip, as many as a scorer has weights."""


# Methods


class Prior(NamedTuple):
    """Of `size` parameters, each by itself: a normal, wide for what it is."""

    size: int
    mean: float
    std: float = 3.0


class Method(NamedTuple):
    """A likelihood of answers [N], or what stands for one, and its parameters."""

    name: str
    log_likelihood: Likelihood
    priors: dict[str, Prior]

    def unpack(self, vector: Tensor) -> Values:
        return dict(zip(self.priors, vector.split([prior.size for prior in self.priors.values()]), strict=True))


def scores(values: Values, answers: Answers) -> Tensor:
    return answers.features @ values["weights"]  # [N,K]


def as_seen(values: Values, answers: Answers) -> Tensor:
    return with_position(scores(values, answers), answers.shown, values["advantage"][answers.people])  # [N,K]


def unscaled_pairs(values: Values, answers: Answers, tie_model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """All pairs of a ranking as if each had been asked alone."""
    return pair_outcomes(answers.ranks)[1].sum(-1) * all_pairs(scores(values, answers), answers.ranks, tie_model)


def scaled_pairs(values: Values, answers: Answers) -> Tensor:
    return all_pairs(scores(values, answers), answers.ranks)


def five_pairs(values: Values, answers: Answers) -> Tensor:
    return unscaled_pairs(values, answers, partial(rao_kupper, log_k=torch.tensor(math.log(5))))


def threshold_pairs(values: Values, answers: Answers) -> Tensor:
    return unscaled_pairs(values, answers, partial(rao_kupper, log_k=F.softplus(values["threshold"])))


def with_ties(values: Values, answers: Answers) -> Tensor:
    return davidson_luce(scores(values, answers), answers.ranks, values["log_tie"])


def with_habits(values: Values, answers: Answers) -> Tensor:
    return davidson_luce(as_seen(values, answers), answers.ranks, values["log_tie"])


def with_reliability(values: Values, answers: Answers) -> Tensor:
    habit = with_position(torch.zeros_like(answers.features[..., 0]), answers.shown, values["careless_advantage"])  # [N,K]
    blind = careless(answers.ranks, values["careless_log_tie"].expand(CLIPS - 1), habit)
    return reliability_mixture(with_habits(values, answers), blind, values["reliability"][answers.people])


def methods(cfg: Config) -> list[Method]:
    people = len(REWARD_PANEL)
    score = {"weights": Prior(cfg.features, 0)}
    ties = score | {"log_tie": Prior(CLIPS - 1, -1)}
    habits = ties | {"advantage": Prior(people, 0)}
    reliability = {"reliability": Prior(people, 2), "careless_log_tie": Prior(1, -1), "careless_advantage": Prior(1, 0)}
    return [
        Method(PLAIN, unscaled_pairs, score),
        Method("Bradley-Terry, all pairs / C(K,2)", scaled_pairs, score),
        Method("Rao-Kupper, k = 5", five_pairs, score),
        Method("Rao-Kupper, k learned", threshold_pairs, score | {"threshold": Prior(1, 0)}),
        Method("Davidson-Luce", with_ties, ties),
        Method("Davidson-Luce + position", with_habits, habits),
        Method(FULL, with_reliability, habits | reliability),
    ]


# Fitting


class Fit(NamedTuple):
    """The top of the posterior, and 95 % intervals."""

    values: Values
    low: Values
    high: Values


def fit(method: Method, answers: Answers) -> Fit:
    """Intervals are those of the curvature at the top (the observed information), but those of reliabilities, which are close to 1, those of the profile.

    Raises RuntimeError where no top is found.
    """
    sizes = torch.tensor([prior.size for prior in method.priors.values()])
    mean, std = (torch.tensor(column, dtype=torch.float64).repeat_interleave(sizes) for column in zip(*((prior.mean, prior.std) for prior in method.priors.values()), strict=True))

    def loss(vector: Tensor) -> Tensor:
        return ((vector - mean) / std).square().sum() / 2 - method.log_likelihood(method.unpack(vector), answers).sum()

    top = lowest(loss, mean)
    slope, curvature = torch.autograd.functional.jacobian(loss, top), torch.autograd.functional.hessian(loss, top)
    if slope.abs().max() > 1e-3 or torch.linalg.eigvalsh(curvature)[0] <= 0:
        raise RuntimeError(f"{method.name}: no maximum found, the largest slope is {slope.abs().max():.2g}")
    error = Z * torch.linalg.inv(curvature).diagonal().sqrt()
    low, high = top - error, top + error
    if "reliability" in method.priors:
        for k in method.unpack(torch.arange(len(top)))["reliability"].tolist():
            low[k], high[k] = profile_ends(loss, top, curvature, k)
    return Fit(*(method.unpack(vector) for vector in (top, low, high)))


def lowest(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where L-BFGS ends."""
    vector = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([vector], max_iter=1_000, tolerance_grad=1e-7, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(vector)
        value.backward()
        return float(value.detach())

    optimizer.step(closure)
    return vector.detach()


def profile_ends(loss: Callable[[Tensor], Tensor], top: Tensor, curvature: Tensor, k: int) -> tuple[float, float]:
    """Where the loss is 1.96^2 / 2 above its lowest, the other parameters moving along with parameter k: on the line of the curvature, then two of its Newton steps."""
    from scipy.optimize import brentq

    others = torch.arange(len(top)) != k
    inverse = torch.linalg.inv(curvature[others][:, others])
    along = -inverse @ curvature[others, k]
    error, least = float(torch.linalg.inv(curvature)[k, k].sqrt()), float(loss(top))

    def beyond(distance: float) -> float:
        vector = top.clone()
        vector[k] += distance
        vector[others] += along * distance
        for _ in range(2):
            vector[others] -= inverse @ torch.autograd.functional.jacobian(loss, vector)[others]
        return math.sqrt(max(2 * (float(loss(vector)) - least), 0.0)) - Z

    def end(side: int) -> float:
        far = Z * error
        while beyond(side * far) < 0:
            far *= 1.5
        return float(top[k]) + side * float(brentq(lambda distance: beyond(side * distance), 0.0, far, xtol=0.01 * error))

    return end(-1), end(1)


# Judging


def careful(values: Values) -> Values:
    """The same scorer for one who always looks and has no habit."""
    nothing = {"advantage": 0.0, "reliability": math.inf}
    return {name: torch.full_like(value, nothing[name]) if name in nothing else value for name, value in values.items()}


def log_prob_given_no_tie(method: Method, values: Values, answers: Answers) -> Tensor:
    """Of strictly ordered pairs [N], as they were answered."""
    told, other = (method.log_likelihood(values, answers._replace(ranks=ranks)) for ranks in (answers.ranks, 3 - answers.ranks))
    return told - torch.logaddexp(told, other)


def by_prompt(values: Tensor, answers: Answers, number: int) -> Floats:
    """Mean over the pairs of each prompt, [number]; nan where all tie."""
    total = torch.zeros(number, dtype=torch.float64).index_add(0, answers.prompts, values.double())
    count = torch.bincount(answers.prompts, minlength=number)
    return (total / count).numpy()  # 0 / 0 = nan


def at_best_scale(method: Method, values: Values, answers: Answers) -> Values:
    """The scorer times the factor that suits the test answers best: what is left is how well it orders."""
    from scipy.optimize import minimize_scalar

    def scaled(log_factor: float) -> Values:
        return values | {"weights": values["weights"] * math.exp(log_factor)}

    best = minimize_scalar(lambda x: -float(log_prob_given_no_tie(method, scaled(x), answers).mean()), bounds=(-3, 3), method="bounded", options={"xatol": 1e-4})
    return scaled(float(best.x))


class Judged(NamedTuple):
    """One fit on the test, by prompt [P]. All are of strictly ordered pairs, given that they are no ties."""

    nll: Floats
    accuracy: Floats
    scaled_nll: Floats
    panel_nll: Floats


MEASURES = {"nll": "NLL", "accuracy": "accuracy", "scaled_nll": "NLL at the best scale", "panel_nll": "NLL, the panel's answers"}
"""What they are called; the first three are of one who looks."""


@torch.no_grad()
def judged(cfg: Config, method: Method, values: Values, looks: Answers, panel: Answers) -> Judged:
    alone = careful(values)
    log_prob = log_prob_given_no_tie(method, alone, looks)
    right = torch.where((log_prob - math.log(0.5)).abs() < 1e-12, 0.5, (log_prob > math.log(0.5)).double())
    scaled = log_prob_given_no_tie(method, at_best_scale(method, alone, looks), looks)
    by = partial(by_prompt, number=cfg.test_prompts)
    return Judged(by(-log_prob, looks), by(right, looks), by(-scaled, looks), by(-log_prob_given_no_tie(method, values, panel), panel))


def ceiling(cfg: Config, world: World) -> tuple[Method, Values]:
    """The true scores, and how one who looks answers given them: a labeler's threshold is Rao and Kupper's."""
    values = {"weights": torch.from_numpy(true_weights(cfg.features)), "threshold": torch.tensor([math.log(math.e - 1)])}  # softplus of it is 1: a tie is as wide as the noise
    return Method("the true scores", threshold_pairs if world.name == LABELERS else unscaled_pairs, {}), values


# Rows


class Results(NamedTuple):
    """One world: fits and judgements of every method, a seed each."""

    world: World
    fits: dict[str, list[Fit]]
    judged: dict[str, list[Judged]]
    best: Judged


def measured(cfg: Config, world: World, progress: Progress) -> Results:
    looks, panel = (held_out_answers(world, cfg.test_prompts, cfg.features, panel=panel) for panel in (False, True))
    fits: dict[str, list[Fit]] = {method.name: [] for method in methods(cfg)}
    verdicts: dict[str, list[Judged]] = {name: [] for name in fits}
    for seed in range(cfg.seeds):
        answers = training_answers(world, cfg.prompts, cfg.features, seed)
        for method in methods(cfg):
            fits[method.name].append(fit(method, answers))
            verdicts[method.name].append(judged(cfg, method, fits[method.name][-1].values, looks, panel))
            progress.advance(f"{world.name}, seed {seed}")
    return Results(world, fits, verdicts, judged(cfg, *ceiling(cfg, world), looks, panel))


def predictions(found: Results) -> list[Row]:
    """One row a measure and method, and the difference to Bradley-Terry on all pairs, paired by seed and prompt."""
    rows: list[Row] = []
    for measure, name in MEASURES.items():
        tables = {method: np.stack([getattr(one, measure) for one in mine]) for method, mine in found.judged.items()}  # [S,P]
        if measure != "panel_nll":  # who answers, and how, is not in the scores
            tables["the true scores"] = getattr(found.best, measure)[None]  # [1,P]
        for method, table in tables.items():
            difference = UNKNOWN if method == PLAIN else bootstrap_crossed(table - tables[PLAIN], draws=2_000)
            mean, low, high = difference.as_json().values()
            rows.append({"world": found.world.name, "measure": name, "method": method, "value": float(np.nanmean(table)), "minus_plain": mean, "low": low, "high": high})
    return rows


def truth(cfg: Config) -> dict[str, list[float]]:
    """What the model's world was made with, under the names of the parameters."""
    return {
        "log_tie": list(LOG_TIE),
        "advantage": [advantage_of(person) for person in REWARD_PANEL],
        "reliability": [1 - person.careless for person in REWARD_PANEL],
        "careless_log_tie": [LOG_TIE_CARELESS],
        "careless_advantage": [PLACE_CARELESS],
        "weights": true_weights(cfg.features).tolist(),
    }


def recovered(cfg: Config, found: Results) -> list[Row]:
    """One row a parameter of the model's world, of every method with ties: means over seeds, and in how many the interval holds the truth. Reliabilities are probabilities."""
    rows, truths = [], truth(cfg)
    for method in methods(cfg):
        for name, prior in method.priors.items():
            if "log_tie" not in method.priors or (name == "weights" and method.name != FULL):
                continue
            for k in range(prior.size):
                true = truths[name][k]
                ends = np.array([[float(natural(name, part[name])[k]) for part in one] for one in found.fits[method.name]])  # [S,3] value, low, high
                inside = int(((ends[:, 1] <= true) & (true <= ends[:, 2])).sum())
                value, low, high = ends.mean(0).tolist()
                row: Row = {"method": method.name, "parameter": name, "of": of(name, k), "truth": true, "found": value, "low": low, "high": high}
                rows.append(row | {"inside": inside, "runs": len(ends)})
    return rows


def natural(name: str, value: Tensor) -> Tensor:
    """Logits of reliability as probabilities."""
    return value.sigmoid() if name == "reliability" else value


def of(name: str, k: int) -> str:
    """Whose, or which."""
    if name in ("advantage", "reliability"):
        return REWARD_PANEL[k].annotator_id
    return {"log_tie": f"{k + 2} clips", "weights": f"feature {k}"}.get(name, "all")


def named_careless(one: Fit) -> list[int]:
    return [k for k, high in enumerate(natural("reliability", one.high["reliability"]).tolist()) if high < NAMED]


def people(found: Results) -> list[Row]:
    """One row a person: the share of careless answers, set and found, and in how many runs the person is named careless."""
    fits = found.fits[FULL]
    names = [named_careless(one) for one in fits]
    rows: list[Row] = []
    for k, person in enumerate(REWARD_PANEL):
        value, high, low = np.mean([[1 - float(natural("reliability", part["reliability"])[k]) for part in one] for one in fits], axis=0).tolist()
        rows.append({"world": found.world.name, "person": person.annotator_id, "careless": person.careless, "found": value, "low": low, "high": high})
        rows[-1] |= {"named": sum(k in each for each in names), "runs": len(fits)}
    return rows


def claims(found: Mapping[str, Results], parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """What was asked for before anything was measured, and whether it holds."""
    from scipy.stats import binom

    rows: list[Row] = []
    for name in found:
        full = {row["measure"]: row for row in parts["prediction"] if (row["world"], row["method"]) == (name, FULL)}
        for measure in ("nll", "panel_nll"):
            row = full[MEASURES[measure]]
            rows.append(claim(name, f"{MEASURES[measure]}: lower than plain Bradley-Terry's", _difference(row), row["high"] < 0))
        row = full[MEASURES["accuracy"]]
        rows.append(claim(name, f"accuracy: not worse than plain Bradley-Terry's by {-NOT_WORSE:g}", _difference(row), row["low"] > NOT_WORSE))
    for parameter in ("log_tie", "reliability"):
        mine = [row for row in parts["recovery"] if row["method"] == FULL and row["parameter"] == parameter]
        inside, runs = (sum(row[key] for row in mine) for key in ("inside", "runs"))
        rows.append(claim(MODELS, f"{parameter}: in its 95 % interval as often as that", f"{inside} of {runs}", inside >= binom.ppf(0.025, runs, 0.95)))
    for name in found:
        mine = [row for row in parts["people"] if row["world"] == name]
        (careless_one,) = [row for row in mine if row["careless"] > 1 - NAMED]
        wrong = sum(row["named"] for row in mine if row is not careless_one)
        right = careless_one["named"] == careless_one["runs"] and wrong == 0
        rows.append(claim(name, "who is careless: named in every run, and nobody else", f"{careless_one['named']} of {careless_one['runs']}, others {wrong}", right))
    return rows


def _difference(row: Row) -> str:
    return f"{row['minus_plain']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"


def claim(world: str, asked: str, found: str, holds: bool) -> Row:
    return {"world": world, "asked": asked, "found": found, "holds": bool(holds)}


# The command


def measure(cfg: Config) -> dict[str, list[Row]]:
    """The rows of each part."""
    with Progress("rankings", total=len(WORLDS) * cfg.seeds * len(methods(cfg))) as progress:
        found = {world.name: measured(cfg, world, progress) for world in WORLDS}
    parts = {
        "prediction": [row for one in found.values() for row in predictions(one)],
        "recovery": recovered(cfg, found[MODELS]),
        "people": [row for one in found.values() for row in people(one)],
    }
    return {"claims": claims(found, parts), **parts}


def shrunk(cfg: Config) -> Config:
    """The quick form: enough to see that everything runs."""
    return cfg.model_copy(update={"seeds": 1, "prompts": min(60, cfg.prompts), "test_prompts": min(40, cfg.test_prompts)})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    check_can_end(cfg)
    used = shrunk(cfg) if cfg.quick else cfg
    parts = measure(used)
    if cfg.write:
        failed = [f"{row['asked']} ({row['world']} world: {row['found']})" for row in parts["claims"] if not row["holds"]]
        remarks = [
            f"Does not hold: {'; '.join(failed)}." if failed else "All that was asked for holds.",
            f"Means over {used.seeds} draws of training answers; `low` and `high` are 95 % bootstraps over seeds and held-out prompts, both resampled, of the difference to plain "
            "Bradley-Terry on the same answers. People are simulated.",
        ]
        write(cfg, "rankings", here("rankings", cfg), "Likelihoods of rankings", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
