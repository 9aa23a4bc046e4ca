"""Which licences allow commercial use, and that what does not stops a run that asks for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from base_model.errors import UserError
from reward.comparisons import RankingEvent
from reward.importers.formats import FORMATS
from reward.licences import check_commercial, standing


@pytest.mark.parametrize("licence", ["Apache-2.0", "apache 2.0", "MIT", "CC-BY-4.0", "cc-by-sa-4.0", "CC0-1.0", "BSD-3-Clause", "ODC-BY", "Apache-2.0 and CC BY 4.0", "CC_BY_4.0"])
def test_licences_that_allow_commercial_use(licence: str) -> None:
    assert standing(licence) == "commercial"


@pytest.mark.parametrize(
    ("licence", "what"),
    [("GPL-3.0-or-later", "commercial"), ("MIT or LGPL-2.1-or-later", "commercial"), ("GPL-9.0-or-later", "unknown"), ("MIT or something", "unknown"), ("MIT or", "unknown")],
)
def test_an_or_within_a_name_divides_nothing(licence: str, what: str) -> None:
    assert standing(licence) == what


@pytest.mark.parametrize("licence", ["CC-BY-NC-4.0", "cc by-nc 4.0", "CC BY-NC-SA 4.0", "Apache-2.0, CC-BY-NC-4.0", "research only", "non-commercial", "Noncommercial use"])
def test_licences_that_forbid_it(licence: str) -> None:
    assert standing(licence) == "non-commercial"


@pytest.mark.parametrize("licence", ["", " ", "openrail", "other", "my own", "MIT-ish", "CC-BY-ND-4.0x", "apache-2.0 and", "Apache-2.0 and something"])
def test_licences_of_which_it_is_not_known(licence: str) -> None:
    assert standing(licence) == "unknown"


def test_only_safesora_is_known_to_forbid_it_and_what_is_the_users_own_is_unknown() -> None:
    found = {name: standing(format.origin.licence) for name, format in FORMATS.items()}
    assert {name for name, what in found.items() if what == "non-commercial"} == {"safesora", "safesora-label"}
    assert {name for name, what in found.items() if what == "unknown"} == {"videoalign", "pickapic", "pickapic-rankings", "label-studio", "trl"}


def test_refused_answers_are_counted_by_dataset_in_one_line() -> None:
    event = RankingEvent("e", "t", "p", "a", ("x", "y"), (1, 2), source_dataset="SafeSora", licence="CC-BY-NC-4.0")
    fine = replace(event, source_dataset="mine", licence="MIT")
    check_commercial([fine], "runs/rankings")
    check_commercial([], "runs/rankings")
    with pytest.raises(UserError) as caught:
        check_commercial([event, fine, event, replace(event, source_dataset="", licence="")], "runs/rankings")
    assert str(caught.value) == (
        "not for commercial use: 1 answers of an unnamed dataset under no licence (unknown); 2 answers of SafeSora under CC-BY-NC-4.0 (non-commercial), "
        "runs/rankings. Leave them out, or do without --commercial"
    )
