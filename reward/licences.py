"""Which licences allow commercial use. What is not known to allow it counts as not allowing it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from base_model.errors import UserError
from reward.comparisons import RankingEvent

COMMERCIAL = re.compile(
    r"(apache|apache-2\.0|apache-license-2\.0|mit|mit-license|isc|unlicense|wtfpl|zlib|bsd|bsd-[234]-clause|0bsd|cc0|cc0-1\.0|cc-by(-sa)?(-[1-4]\.[05])?|odc-by(-1\.0)?|odbl(-1\.0)?|pddl(-1\.0)?|"
    r"cdla-(permissive|sharing)-[12]\.0|(l|a)?gpl-[23]\.[01](-only|-or-later|\+)?|mpl-2\.0|epl-[12]\.0|public-domain)"
)
NON_COMMERCIAL = re.compile(r"(^|-)(nc|non-?commercial|research|academic)(-|$)")


def standing(licence: str) -> Literal["commercial", "non-commercial", "unknown"]:
    """What a licence's name says about commercial use: SPDX and Hugging Face spellings, case and blanks aside ("CC BY-NC 4.0" is "cc-by-nc-4.0").

    Names joined by "and", "or", "," or "/" stand as the worst of them. An empty name, and one not in the list above, is "unknown".
    """
    names = [re.sub(r"[\s_-]+", "-", name.strip()) for name in re.split(r",|/|\s+(?:and|or)\b", licence.casefold())]
    if any(NON_COMMERCIAL.search(name) for name in names):
        return "non-commercial"
    return "commercial" if all(COMMERCIAL.fullmatch(name) for name in names) else "unknown"


def check_commercial(events: Iterable[RankingEvent], where: object) -> None:
    """Raises UserError, naming each dataset, its licence and how many answers it has, where an answer's licence forbids commercial use or is unknown."""
    refused = Counter((event.source_dataset, event.licence) for event in events if standing(event.licence) != "commercial")
    if refused:
        listed = "; ".join(
            f"{n} answers of {source or 'an unnamed dataset'} under {licence or 'no licence'} ({standing(licence)})" for (source, licence), n in sorted(refused.items())
        )
        raise UserError(f"not for commercial use: {listed}, {where}. Leave them out, or do without --commercial")
