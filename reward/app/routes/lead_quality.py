"""The leads' room, second part: whether people and filters can be trusted, thresholds, and signing off runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Query, Response
from markupsafe import Markup
from pydantic import BaseModel, Field

from reward.app import plots, quality, signing_off, thresholds
from reward.app.access import AUDITOR, LEAD, SENIOR, StoreOf, may
from reward.app.quality import Measured
from reward.app.reports import Report, report
from reward.app.routes.lead import Lead, Place, Reader, Standing, place_of, standing
from reward.app.security import Actor, Denied
from reward.app.store import Store
from reward.app.web import Done, Pages

pages = Pages("lead")
Decider = Annotated[Actor, Depends(may(LEAD, SENIOR))]
Watcher = Annotated[Actor, Depends(may(LEAD, SENIOR, AUDITOR))]
COEFFICIENTS = {"alpha": "Krippendorff's alpha", "kappa": "Fleiss' kappa", "ac1": "Gwet's AC1", "raw": "raw agreement"}
PATIENCE = 5.0  # seconds that an action waits for what it needs


def whisker(label: str, measured: Measured, mark: float | None = None) -> plots.Whisker:
    return plots.Whisker(label, measured.value, measured.low, measured.high, measured.note, mark)


# Agreement and people


class Agreement(BaseModel):
    place: Place
    standing: Standing
    told: quality.People | None
    coefficients: dict[str, str]

    def agreement(self, dimension: quality.Dimension) -> Markup:
        rows = [whisker(name, getattr(dimension, key)) for key, name in COEFFICIENTS.items()]
        return plots.intervals(rows, name=f"Agreement: {dimension.dimension}", high=1.0)

    def positions(self) -> Markup:
        assert self.told is not None
        rows = [whisker(person.pseudonym, person.first_place, person.chance) for person in self.told.people]
        return plots.intervals(rows, name="Share of rankings in which the clip shown first was best", percent=True)


@pages.view("/projects/{project_id}/lead/agreement", "lead_agreement.html")
def agreement(project_id: str, me: Reader, store: StoreOf) -> Agreement:
    """How far people agree in each dimension, and each person's habits, under pseudonyms."""
    place = place_of(store, project_id, me)
    found = report(store, ("people", project_id), lambda: quality.people_of(store, project_id))
    return Agreement(place=place, standing=standing(found), told=found.value, coefficients=COEFFICIENTS)


# Filters


class Known(NamedTuple):
    """What is known of a project's filters; the audit and the scores are not shown, previews are made of them."""

    audit: Any
    scores: Mapping[tuple[str, str], quality.Scores]
    filters: quality.Filters
    histograms: list[quality.Histogram]


def known_of(store: Store, project_id: str, **patience: float) -> Report[Known]:
    def make() -> Known:
        audit, scores = quality.audit_of(store, project_id), quality.scores_of(store, project_id)
        return Known(audit, scores, quality.filters_of(audit), quality.histograms(scores))

    return report(store, ("filters", project_id), make, **patience)


def known_now(store: Store, project_id: str) -> Known:
    """Raises Denied, 503, where it takes longer than a request waits."""
    found = known_of(store, project_id, patience=PATIENCE)
    if found.value is None:
        raise Denied(503, found.problem or "this is still being worked out. Try again in a moment")
    return found.value


class FilterQuality(BaseModel):
    place: Place
    standing: Standing
    told: quality.Filters | None
    histograms: list[quality.Histogram]
    coefficients: dict[str, str]

    def rates(self, row: quality.FilterRow) -> Markup:
        return plots.intervals([whisker(name, rate) for name, rate in row.rates.items()], name=f"{row.filter}, {row.policy}: rates", percent=True, high=1.0)

    def by_version(self) -> Markup:
        assert self.told is not None
        rows = [whisker(row.filter, row.rates["recall"]) for row in self.told.rows if row.policy == quality.ANY]
        return plots.intervals(rows, name="Recall by version of the filters", percent=True, high=1.0)

    def scores(self, each: quality.Histogram) -> Markup:
        return plots.histogram(each.counts, each.threshold, name=f"{each.filter}, {each.policy}")


@pages.view("/projects/{project_id}/lead/filters", "lead_filters.html")
def filters(project_id: str, me: Reader, store: StoreOf) -> FilterQuality:
    """Precision, recall, leak rate and over-blocking by version of the filters and by policy, with intervals."""
    place = place_of(store, project_id, me)
    found = known_of(store, project_id)
    told, drawn = (found.value.filters, found.value.histograms) if found.value else (None, [])
    return FilterQuality(place=place, standing=standing(found), told=told, histograms=drawn, coefficients=COEFFICIENTS)


# Thresholds


class Choice(BaseModel):
    filter: str
    policy: str
    threshold: float
    clips: int


class Thresholds(BaseModel):
    place: Place
    standing: Standing
    me: str
    decides: bool
    choices: list[Choice]
    preview: thresholds.Preview | None
    histogram: quality.Histogram | None
    problem: str
    proposals: list[thresholds.Proposal]
    listed: list[dict[str, Any]]

    def scores(self) -> Markup:
        assert self.histogram is not None and self.preview is not None
        return plots.histogram(self.histogram.counts, self.preview.old, other=self.preview.new, name=f"{self.preview.filter}, {self.preview.policy}")

    def moved(self, preview: thresholds.Preview) -> Markup:
        rows = [whisker(f"{name} {when}", getattr(rates, name)) for name in ("precision", "recall") for when, rates in (("now", preview.before), ("then", preview.after))]
        return plots.intervals(rows, name="Precision and recall, now and with the new threshold", percent=True, high=1.0)


class NewThreshold(BaseModel):
    filter: Annotated[str, Field(min_length=1, max_length=200)]
    policy: Annotated[str, Field(min_length=1, max_length=8)]
    new: Annotated[float, Field(gt=0, le=1)]


class Decision(BaseModel):
    approve: bool


@pages.view("/projects/{project_id}/lead/thresholds", "lead_thresholds.html")
def thresholds_page(
    project_id: str,
    me: Watcher,
    store: StoreOf,
    choice: Annotated[str, Query(max_length=210)] = "",
    new: Annotated[float | None, Query(gt=0, le=1)] = None,
) -> Thresholds:
    """Proposals, the approved thresholds, and what another threshold would have changed. choice: policy and filter, with a space between: "P17 flash 3"."""
    from base_model.errors import UserError

    place, found = place_of(store, project_id, me), known_of(store, project_id)
    policy, _, name = choice.partition(" ")
    preview, problem = None, ""
    if found.value is not None and choice and new is not None:
        try:
            preview = thresholds.preview_of(found.value.audit, found.value.scores, name, policy, new)
        except UserError as error:
            problem = str(error)
    with store.reading() as db:
        proposed = thresholds.proposals(db, project_id)
    drawn = found.value.histograms if found.value else []
    return Thresholds(
        place=place,
        standing=standing(found),
        me=me.pseudonym,
        decides=bool(me.roles_in(project_id) & {LEAD, SENIOR}),
        choices=[Choice(filter=each.filter, policy=each.policy, threshold=each.threshold, clips=each.clips) for each in drawn],
        preview=preview,
        histogram=next((each for each in drawn if preview and (each.filter, each.policy) == (preview.filter, preview.policy)), None),
        problem=problem,
        proposals=proposed,
        listed=thresholds.listed(proposed),
    )


@pages.view("/projects/{project_id}/lead/thresholds.yaml", "error.html")
def thresholds_yaml(project_id: str, me: Watcher, store: StoreOf) -> Response:
    """The approved thresholds, for whoever runs the filters."""
    with store.reading() as db:
        told = thresholds.as_yaml(thresholds.listed(thresholds.proposals(db, project_id)))
    return Response(told, media_type="application/yaml", headers={"Content-Disposition": 'attachment; filename="thresholds.yaml"'})


@pages.action("/projects/{project_id}/lead/thresholds")
def propose(project_id: str, body: NewThreshold, me: Decider, store: StoreOf) -> Done:
    """Proposes another threshold, with what it would have changed."""
    place_of(store, project_id, me)
    known = known_now(store, project_id)
    made = thresholds.propose(store, project_id, thresholds.preview_of(known.audit, known.scores, body.filter, body.policy, body.new), me)
    return Done(done=made, go=f"/projects/{project_id}/lead/thresholds")


@pages.action("/projects/{project_id}/lead/thresholds/{proposal_id}")
def decide(project_id: str, proposal_id: str, body: Decision, me: Decider, store: StoreOf) -> Done:
    """Approves a proposal of somebody else, or refuses one."""
    thresholds.decide(store, project_id, proposal_id, body.approve, me)
    return Done(done="approved" if body.approve else "refused", go=f"/projects/{project_id}/lead/thresholds")


# Signing off


class Signoffs(BaseModel):
    place: Place
    standing: Standing
    runs: list[tuple[str, int]]
    run: str
    evidence: dict[str, Any] | None
    seen: str
    signoffs: list[signing_off.Signoff]

    def rates(self, evidence: Mapping[str, Any]) -> Markup:
        told = [row for row in evidence["rates"] if row["policy"] == quality.ANY]
        named = [(name if len(told) == 1 else f"{name}, {row['filter']}", rate) for row in told for name, rate in row["rates"].items()]
        rows = [whisker(name, Measured.model_validate(rate)) for name, rate in named]
        return plots.intervals(rows, name="Rates of the filters", percent=True, high=1.0)


class NewSignoff(BaseModel):
    run: Annotated[str, Field(min_length=1, max_length=200)]
    approved: bool
    statement: Annotated[str, Field(min_length=1, max_length=signing_off.LONGEST)]
    seen: Annotated[str, Field(max_length=64)]


@pages.view("/projects/{project_id}/lead/signoffs", "lead_signoffs.html")
def signoffs(project_id: str, me: Reader, store: StoreOf, run: Annotated[str, Query(max_length=200)] = "") -> Signoffs:
    """Sign-offs of runs, and what is known of one now."""
    place = place_of(store, project_id, me)

    def runs() -> list[tuple[str, int]]:
        with store.reading() as db:
            return signing_off.runs_of(db, project_id)

    def counts() -> signing_off.Counted:
        with store.reading() as db:
            return signing_off.counts_of(db, project_id, run)

    found, told = report(store, ("runs", project_id), runs), None
    about: Report[Any] = found
    if run and any(run == name for name, _ in found.value or []):
        known, counted = known_of(store, project_id), report(store, ("run", project_id, run), counts)
        about = known if known.value is None or known.state == "failed" else counted
        told = signing_off.evidence_of(run, counted.value, known.value.filters) if counted.value and known.value else None
    with store.reading() as db:
        signed = signing_off.signoffs(db, project_id)
    return Signoffs(
        place=place,
        standing=standing(about),
        runs=found.value or [],
        run=run,
        evidence=told,
        seen=signing_off.hash_of(told) if told else "",
        signoffs=signed,
    )


@pages.action("/projects/{project_id}/lead/signoffs")
def sign(project_id: str, body: NewSignoff, me: Lead, store: StoreOf) -> Done:
    """Approves or refuses a run, with a statement, on the evidence that was shown: `seen` is its hash."""
    place_of(store, project_id, me)
    filters = quality.filters_of(quality.audit_of(store, project_id))  # what holds now, and not the newest report
    made = signing_off.sign(store, project_id, body.run, body.approved, body.statement, body.seen, filters, me)
    return Done(done=made, go=f"/projects/{project_id}/lead/signoffs")
