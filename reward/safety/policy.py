"""The policy: what is not wanted, how severe it is, what is done about it, and how other taxonomies name it. Read from `policy.yaml`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from base_model.errors import UserError

Action = Literal["allow", "review", "block"]
SHIPPED = Path(__file__).with_name("policy.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Mappings(_Strict):
    """The codes other taxonomies use for the same thing; empty where they have none."""

    ailuminate: tuple[str, ...] = ()
    safesora: tuple[str, ...] = ()
    t2vsafetybench: tuple[str, ...] = ()
    safewatch: tuple[str, ...] = ()
    llama_guard: tuple[str, ...] = ()
    cosmos: tuple[str, ...] = ()


class Rule(_Strict):
    """One policy code."""

    code: str = Field(pattern=r"^[PQ]\d\d$")
    """P: safety, Q: a broken clip. Codes are never reused."""
    name: str = Field(min_length=1)
    severity: int = Field(ge=0, le=4)
    """0 nothing, 1 minor, 2 serious, 3 severe, 4 worst."""
    action: Action
    """What a filter's hit means by default."""
    tag: bool = False
    """Allowed clips keep the hit as a tag."""
    escalate: bool = False
    """Goes to a restricted role at once; nobody else sees it again."""
    mappings: Mappings = Mappings()
    words: dict[str, tuple[str, ...]] = {}
    """Language -> words and phrases of the prompt filter; `*` at the end stands for any ending."""


class Flag(_Strict):
    """A modifier that can stand beside any code."""

    code: str = Field(pattern=r"^[A-Z]$")
    name: str = Field(min_length=1)
    mappings: Mappings = Mappings()


class Policy(_Strict):
    """All rules of one version."""

    version: str = Field(min_length=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    flags: tuple[Flag, ...] = ()
    allow_phrases: dict[str, tuple[str, ...]] = {}
    """Language -> harmless phrases that hold a listed word; they are taken out before the prompt filter looks."""

    @model_validator(mode="after")
    def _codes_are_unique(self) -> Policy:
        codes = [rule.code for rule in self.rules] + [flag.code for flag in self.flags]
        twice = sorted({code for code in codes if codes.count(code) > 1})
        if twice:
            raise ValueError(f"code {twice[0]} is defined twice")
        return self

    def __contains__(self, code: str) -> bool:
        return any(rule.code == code for rule in self.rules)

    def rule(self, code: str) -> Rule:
        """Raises ValueError for an unknown code."""
        for each in self.rules:
            if each.code == code:
                return each
        raise ValueError(f"unknown policy code {code}")

    def action(self, code: str) -> Action:
        return self.rule(code).action


def load_policy(path: str | Path | None = None) -> Policy:
    """Reads and checks a policy file, the shipped one by default. Raises UserError naming the key that is wrong."""
    return _shipped() if path is None else _read(Path(path))


@cache
def _shipped() -> Policy:
    return _read(SHIPPED)


def _read(path: Path) -> Policy:
    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the policy: {error.strerror}, {path}. Check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the policy is not YAML: {' '.join(str(error).split())}, {path}. Mend the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"the policy is wrong at {where}: {first['msg']}, {path}. Mend the file") from error
