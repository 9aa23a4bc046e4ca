"""Triggers that hold what is never changed, in the database itself: for steps of the schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def guards(dialect: str, unchanging: Sequence[str], fixed: Mapping[str, Sequence[str]]) -> list[str]:
    """SQL for "sqlite" or "postgresql". unchanging: tables whose rows are neither changed nor deleted. fixed: columns of a table that keep what they were inserted with."""
    said = {f"{name}_{verb.lower()}": (name, verb, "", f"{name} is only added to") for name in unchanging for verb in ("UPDATE", "DELETE")}
    said |= {f"{name}_fixed": (name, "UPDATE", " OR ".join(_differs(each, dialect) for each in columns), f"{name} keeps what it was made with") for name, columns in fixed.items()}
    found: list[str] = []
    for key, (name, verb, condition, reason) in said.items():
        when = f"WHEN ({condition}) " if condition else ""
        if dialect == "sqlite":
            found.append(f"CREATE TRIGGER {key} BEFORE {verb} ON {name} {when}BEGIN SELECT RAISE(ABORT, '{reason}'); END")
        else:
            found.append(f"CREATE FUNCTION {key}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{reason}'; END $$")
            found.append(f"CREATE TRIGGER {key} BEFORE {verb} ON {name} FOR EACH ROW {when}EXECUTE FUNCTION {key}()")
    return found


def _differs(column: str, dialect: str) -> str:
    return f"OLD.{column} IS NOT NEW.{column}" if dialect == "sqlite" else f"OLD.{column}::text IS DISTINCT FROM NEW.{column}::text"
