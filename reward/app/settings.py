"""What a lead decides about a project."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import Connection, bindparam, select

from reward.app.schema import project
from reward.app.security import Denied

Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=20_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Dimension(_Strict):
    """Something that is asked of every task."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
    """As it stands in the exported rankings: "overall"."""
    question: Annotated[str, Field(min_length=1, max_length=400)]
    sees_prompt: bool = True
    """Whether the prompt is shown while it is asked. Those that do not see it come first."""


class Mixture(_Strict):
    """What the tasks of a person are made of, as shares that add up to 1 (`reward/selection.py`, Mix)."""

    active: Share = 0.6
    random: Share = 0.25
    gold: Share = 0.05
    repeat: Share = 0.05
    mirrored: Share = 0.05

    @model_validator(mode="after")
    def _adds_up(self) -> Mixture:
        if abs(sum(self.model_dump().values()) - 1) > 1e-6:
            raise ValueError("the shares of a mixture add up to 1")
        return self


class Labeling(_Strict):
    """How clips are ranked."""

    takes: Annotated[int, Field(ge=2, le=6)] = 4
    """Clips of a task."""
    overlap: Annotated[int, Field(ge=1, le=50)] = 2
    """People who answer a task."""
    dimensions: tuple[Dimension, ...] = (Dimension(name="overall", question="Which clip is best?"),)
    likert: bool = False
    """Whether every clip is also rated, 1 to 5."""
    confidence: bool = False
    """Whether people say how sure they are."""
    least_watched: Share = 0.8
    """Share of every clip that has to be watched before an answer is taken."""
    lease_minutes: Annotated[int, Field(ge=1, le=24 * 60)] = 20
    most: Annotated[int, Field(ge=1)] = 200
    """Tasks a person is given in all."""
    mixture: Mixture = Mixture()
    practice: Annotated[int, Field(ge=0, le=50)] = 3
    """Practice tasks, with feedback, before the first real one, as far as there are any."""
    careless_warning: Share = 0.3
    """Share of failed checks (gold, repeats) at which a person is warned."""
    careless_pause: Share = 0.5
    """And paused; of at least six checks."""


class Reviewing(_Strict):
    """How safety is judged."""

    lease_minutes: Annotated[int, Field(ge=1, le=24 * 60)] = 20
    second_share: Share = 0.15
    """Share of the reviewed items that a second person is asked about, without being told."""
    undo_seconds: Annotated[int, Field(ge=0, le=600)] = 15
    hide_filter: bool = True
    """Whether what the filter said is shown only after the decision, in the queues of audits."""
    exposure_minutes: Annotated[int, Field(ge=1)] = 60
    """Minutes a day that a person looks at clips of severity 3 or 4; then a break until tomorrow."""
    break_after_minutes: Annotated[int, Field(ge=1)] = 20
    """Minutes of such clips after which a break of ten minutes is due."""
    most_severe_in_a_row: Annotated[int, Field(ge=1)] = 3
    blocked_audit: Annotated[int, Field(ge=0)] = 100
    """Blocked clips drawn at a time for the audit."""
    passed_audit: Annotated[int, Field(ge=0)] = 300
    """Passed clips drawn at a time for the audit."""


class ProjectSettings(_Strict):
    instructions: Text = "Watch every clip. Rank them, best first; equal ones may share a place."
    guideline_version: Annotated[str, Field(max_length=40)] = "1"
    consent: Text = (
        "You see clips that a program made. What you answer is kept under a pseudonym and used to train and to judge such programs. "
        "You may stop at any time, and ask that your name be deleted."
    )
    labeling: Labeling = Labeling()
    reviewing: Reviewing = Reviewing()
    retention_days: Annotated[int, Field(ge=1, le=36_500)] | None = None
    """Days after which media of withdrawn clips are deleted; none means never."""


SETTINGS = select(project.c.settings).where(project.c.id == bindparam("id"))


def settings_of(db: Connection, project_id: str) -> ProjectSettings:
    """The settings of a project; what was not set has its default. Raises Denied, 404, where there is no such project."""
    held: dict[str, Any] | None = db.execute(SETTINGS, {"id": project_id}).scalar()
    if held is None:
        raise Denied(404, "there is nothing here")
    return ProjectSettings.model_validate(held)
