"""Typed configuration: field default < YAML < `--key.path value`.

A recipe declares one subclass of `Config`; a string literal under each field is its help. YAML names values, never code. A key nobody knows
stops the run and names the nearest one; a value of the wrong type says what was expected, what came, and from where.

    class Sampler(Config):
        steps: int = 8
        \"\"\"Denoising steps.\"\"\"

    class Example(Config):
        out: Path
        \"\"\"Folder of the run.\"\"\"
        sampler: Sampler = Sampler()

    cfg = load(Example, Path("example.yaml"), ["--out", "runs/a", "--sampler.steps", "20"])
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import subprocess
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from base_model.errors import UserError

PACKAGES = ("rushes", "torch", "numpy", "transformers", "diffusers", "peft", "accelerate", "trl", "bitsandbytes", "datasets", "safetensors", "av", "scipy", "pydantic")

LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes, on the file systems there are

EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a section of keys",
    "none": "null",
}


class Config(BaseModel):
    """Base of every recipe's configuration and of its sections: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False, ser_json_inf_nan="strings")

    may_change: ClassVar[frozenset[str]] = frozenset({"iterations", "save_every"})
    """Names of keys, in any section, that `--resume` accepts with another value; paths may change too."""


Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]

C = TypeVar("C", bound=Config)
COMMAND_LINE = "command line"
Where = dict[str, str]  # dotted key -> "file:line" or "command line"


def load(cls: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    """The configuration out of the defaults of `cls`, the YAML file at `path` and `overrides` ("--key.path", "value", ...).

    Keys may be written with `_` or `-`. Raises UserError for a missing or broken file, an unknown or repeated key, a value of the wrong type.
    """
    data, where = _read_file(cls, path) if path is not None else ({}, {})
    for key, value in _pairs(cls, overrides):
        _override(cls, data, where, key, value)
    data = _possible(cls, cls, data, [], where)
    try:
        return cls.model_validate(_with_section_defaults(cls, data))
    except ValidationError as error:
        raise UserError(_explain(cls, error, data, where)) from error


def dump(cfg: Config) -> dict[str, Any]:
    """`cfg` as plain YAML or JSON values; `load` of it gives `cfg` back."""
    return cfg.model_dump(mode="json")


def resolved(cfg: Config) -> dict[str, Any]:
    """What makes a run repeatable: the whole configuration, the commit of the code, the versions of the packages."""
    return {"config": dump(cfg), "commit": commit(), "versions": versions()}


def commit() -> str:
    """The git commit of this code, with "+changes" where files differ from it; "unknown" outside a repository."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Python's and the packages' versions; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def help_text(cls: type[Config]) -> str:
    """One paragraph a key: `--key.path  type  (default)` and its sentence."""
    lines: list[str] = []
    grouped: dict[str, list[FieldInfo]] = {}
    for key, field in _fields(cls):
        grouped.setdefault(key, []).append(field)
    for key, fields in grouped.items():
        default = "required" if fields[0].is_required() else f"default {_plain(fields[0].get_default(call_default_factory=True))}"
        lines.append(f"  --{key}  {'|'.join(dict.fromkeys(_type_name(field.annotation) for field in fields))}  ({default})")
        lines.extend(f"      {line.strip()}" for line in (fields[0].description or "").splitlines() if line.strip())
    return "\n".join(lines)


# Reading


class _Loader(yaml.SafeLoader):
    """YAML without dates: 2020-01-01 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"] for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str, place: str, remedy: str) -> tuple[Any, yaml.Node | None]:
    """The value and the nodes of a YAML text. Raises UserError, naming the place and the line, for what is no YAML or names an impossible value."""
    try:
        root = yaml.compose(text, Loader=_Loader)
        _check_no_loop(root, ())
        return yaml.load(text, Loader=_Loader), root
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and place != COMMAND_LINE else ""
        raise UserError(f"not YAML, {place}{line}: {getattr(error, 'problem', None) or 'cannot be parsed'}. {remedy}") from error
    except RecursionError as error:
        raise UserError(f"not YAML, {place}: nested too deeply. {remedy}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"not YAML, {place}: {str(error).partition(';')[0] or type(error).__name__}. {remedy}") from error


def _check_no_loop(node: yaml.Node | None, above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise ValueError("an alias stands inside what it names")
    if isinstance(node, yaml.CollectionNode):
        for inner in node.value:
            for each in inner if isinstance(inner, tuple) else (inner,):
                _check_no_loop(each, (*above, id(node)))


def _read_file(cls: type[Config], path: Path) -> tuple[dict[str, Any], Where]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no such config, {path}. Give the path of a YAML file, or none for the shipped one") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config {str(path)!r}: {error}. Give a YAML file that you may read") from error
    data, root = _read_yaml(text, str(path), "Mend that line")
    if data is None or root is None:
        return {}, {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {_shown(data)}. Write `key: value` lines")
    where: Where = {}
    return _normalised(cls, cls, data, root, "", lambda node: f"{path}:{node.start_mark.line + 1}", where), where


def _normalised(root: type[Config], annotation: Any, data: Any, node: yaml.Node, prefix: str, place: Callable[[yaml.Node], str], where: Where) -> Any:
    """`data` with `-` in keys turned to `_`; fills `where`; raises UserError for keys that are unknown or repeated."""
    if isinstance(node, yaml.SequenceNode) and isinstance(data, list):
        return [_normalised(root, _item(annotation), value, each, f"{prefix}{i}.", place, where) for i, (value, each) in enumerate(zip(data, node.value, strict=True))]
    if not isinstance(node, yaml.MappingNode) or not isinstance(data, dict):
        return data
    sections = _sections(annotation)
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        at = place(key_node)
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise UserError(f"{at}: merge keys (<<) are not supported. Write the keys out")
        written = yaml.load(yaml.serialize(key_node), Loader=_Loader)
        key = str(written).replace("-", "_") if sections else str(written)
        dotted = f"{prefix}{key}"
        if key in out:
            places = " and ".join(dict.fromkeys((where[dotted], at)))
            raise UserError(f"{dotted}: given twice ({places}). Keep one")
        where[dotted] = at
        child = _child(root, annotation, key, dotted, at)
        value = data.get(written)
        members = set(_members(child))
        if isinstance(value, bool) and members & {int, float} and not members & {bool, Any}:
            raise UserError(f"{dotted}: expected {EXPECTED['int' if int in members else 'float']}, got {_plain(value)} ({at})")
        out[key] = _normalised(root, child, value, value_node, f"{dotted}.", place, where)
    return out


def _pairs(cls: type[Config], overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """("key.path", "text") for every `--key.path value`, `--key.path=value` and lone `--flag`."""
    position = 0
    while position < len(overrides):
        word = overrides[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r} on the command line. Options are written --key.path value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if position < len(overrides) and not overrides[position].startswith("--"):
                value = overrides[position]
                position += 1
            elif _leaf(cls, key) is bool:
                value = "true"
            else:
                raise UserError(f"--{key}: expected a value after it on the command line. Write --{key} VALUE")
        yield key, value


def _leaf(cls: type[Config], dotted: str) -> Any:
    annotation: Any = cls
    for part in dotted.split("."):
        part = part.replace("-", "_") if _sections(annotation) else part
        annotation = _child(cls, annotation, part, dotted, COMMAND_LINE)
    return annotation


def _override(cls: type[Config], data: dict[str, Any], where: Where, dotted: str, text: str) -> None:
    annotation = _leaf(cls, dotted)
    target, level, taken = data, cls, []
    *sections, last = dotted.split(".")
    for part in sections:
        key = part.replace("-", "_") if _sections(level) else part
        taken.append(key)
        level = _child(cls, level, key, dotted, COMMAND_LINE)
        inner = target.get(key)
        if not isinstance(inner, dict):
            inner = target[key] = {}
        target = inner
    key = last.replace("-", "_") if _sections(level) else last
    full = ".".join([*taken, key])
    for known in [known for known in where if known.startswith(f"{full}.")]:
        del where[known]
    where[full] = COMMAND_LINE
    target[key] = _value(cls, annotation, text, full, where)


def _value(root: type[Config], annotation: Any, text: str, dotted: str, where: Where) -> Any:
    """Text from the command line: lists, mappings and null are read as YAML, all else stays text and is converted by the field's type.

    One text for a list of texts is a list of one, commas and all; a list of texts is written '[a, b]'.
    """
    members = _members(annotation)
    if text in ("null", "none", "None") and type(None) in members:
        return None
    lists = [member for member in members if typing.get_origin(member) in (list, tuple, set, frozenset)]
    if not lists and not any(typing.get_origin(member) is dict or _sections(member) for member in members):
        return text
    if any(_item(member) is str for member in lists) and not text.lstrip().startswith("["):
        return [text]
    value, node = _read_yaml(text, COMMAND_LINE, f"Write --{dotted} with a list as '[1, 2]' and a mapping as '{{a: 1}}'")
    if lists and isinstance(value, str | int | float):
        return [part.strip() for part in text.split(",")]
    return value if node is None else _normalised(root, annotation, value, node, f"{dotted}.", lambda _: COMMAND_LINE, where)


def _with_section_defaults(cls: type[Config], data: dict[str, Any]) -> dict[str, Any]:
    """Sections given in part keep the rest of the default section that the field declares."""
    out = dict(data)
    for key, given in data.items():
        default = cls.model_fields[key].get_default(call_default_factory=True)
        if isinstance(given, dict) and isinstance(default, BaseModel):
            out[key] = _filled(default, given)
    return out


def _filled(default: BaseModel, given: dict[str, Any]) -> dict[str, Any]:
    fields = type(default).model_fields
    another_kind = any(key in fields and typing.get_origin(fields[key].annotation) is typing.Literal and len(typing.get_args(fields[key].annotation)) == 1
                       and value != getattr(default, key) for key, value in given.items())
    if another_kind:
        return given
    out = {key: getattr(default, key) for key in fields} | given
    for key in given:
        if isinstance(given[key], dict) and isinstance(getattr(default, key, None), BaseModel):
            out[key] = _filled(getattr(default, key), given[key])
    return out


# Types


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone; `Annotated` is unwrapped."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(member for part in typing.get_args(annotation) for member in _members(part))
    return (annotation,)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def _item(annotation: Any) -> Any:
    """The type of what a list holds; Any where it is no list."""
    return next((typing.get_args(member)[0] for member in _members(annotation) if typing.get_origin(member) in (list, tuple, set, frozenset)), Any)


def _child(root: type[Config], annotation: Any, key: str, dotted: str, place: str) -> Any:
    """The type of `key` inside a section (or a mapping). Raises UserError, naming the nearest key, where there is none."""
    sections = _sections(annotation)
    found: list[Any] = [section.model_fields[key].annotation for section in sections if key in section.model_fields]
    if found:
        return found[0] if len(found) == 1 else typing.Union[tuple(found)]  # noqa: UP007
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
    if Any in _members(annotation):
        return Any
    raise UserError(f"{dotted}: unknown key ({place}). Did you mean {_nearest_key(root, dotted)}?")


def _nearest_key(root: type[Config], dotted: str) -> str:
    """The key of `root`, sections included, most like `dotted`: by the whole name or, almost as good, by its last part."""

    def likeness(known: str) -> float:
        whole = difflib.SequenceMatcher(None, dotted, known).ratio()
        return max(whole, difflib.SequenceMatcher(None, dotted.rpartition(".")[2], known.rpartition(".")[2]).ratio() - 0.01)

    leaves = [key for key, _ in _fields(root)]
    return max([*leaves, *(key.rpartition(".")[0] for key in leaves if "." in key)], key=likeness)


def _fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in cls.model_fields.items():
        sections = _sections(field.annotation)
        if not sections:
            yield f"{prefix}{name}", field
        for section in sections:
            yield from _fields(section, f"{prefix}{name}.")


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(str(choice) for choice in typing.get_args(annotation))
    members = _members(annotation)
    if len(members) > 1:
        return "|".join("null" if member is type(None) else _type_name(member) for member in members)
    origin = typing.get_origin(annotation)
    if origin is not None:
        inside = ", ".join("..." if part is Ellipsis else _type_name(part) for part in typing.get_args(annotation))
        return f"{origin.__name__}[{inside}]"
    return str(getattr(annotation, "__name__", annotation))


def _plain(value: object) -> str:
    """A value as one would write it in YAML or on the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _shown(value: object, most: int = 200) -> str:
    text = repr(value) if isinstance(value, str | dict | list) else _plain(value)
    return text if len(text) <= most else f"{text[:most]}..."


def path_keys(cls: type[BaseModel]) -> frozenset[str]:
    """Dotted keys whose type is a path (or a path or null)."""
    return frozenset(key for key, field in _fields(cls) if Path in _members(field.annotation))


def leaves(config: object, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: value}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, inner in config.items() for key, value in leaves(inner, f"{prefix}.{name}" if prefix else name).items()} or {prefix: {}}


def _possible(root: type[Config], annotation: Any, value: Any, parts: list[str], where: Where) -> Any:
    """`value` with the halves of a character (JSON's \\ud83d\\ude00) joined in every text. Raises UserError for a half alone and for a path that cannot be."""
    if isinstance(value, dict):
        return {key: _possible(root, _child(root, annotation, key, ".".join([*parts, key]), ""), inner, [*parts, key], where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_possible(root, _item(annotation), inner, [*parts, str(i)], where) for i, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    try:
        text = value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError(f"{'.'.join(parts)}: holds half a character, {value!a} ({_place(parts, where)}). Write it as UTF-8") from error
    if Path in _members(annotation) and (fault := _fault_of_path(text)):
        raise UserError(f"{'.'.join(parts)}: {fault} ({_place(parts, where)}). Give the name of a file or folder")
    return text


def _fault_of_path(text: str) -> str:
    """Why no file can have this name, or an empty string."""
    if not text or "\0" in text:
        return f"is no path, {text!r}"
    longest = max((len(os.fsencode(part)) for part in Path(text).parts), default=0)
    return f"is too long for a path, {_shown(text, 40)}" if longest > LONGEST_NAME or len(os.fsencode(text)) >= LONGEST_PATH else ""


# Errors


def _explain(cls: type[Config], error: ValidationError, data: dict[str, Any], where: Where) -> str:
    first = error.errors(include_url=False)[0]
    parts, value = _location(first, data)
    dotted = ".".join(parts) or cls.__name__
    place = _place(parts, where)
    if first["type"] == "missing":
        return f"{dotted}: is required and was given nowhere. Add it to the config or write --{dotted} VALUE"
    if first["type"].startswith("union_tag"):
        tag = str(first["ctx"]["discriminator"]).strip("'")
        choices = str(first["ctx"].get("expected_tags", "")).replace("'", "")
        return f"{dotted}.{tag}: expected one of {choices}, got {_shown(first['ctx'].get('tag', value))} ({_place([*parts, tag], where)})"
    if first["type"] == "extra_forbidden":
        return f"{dotted}: not a key of the kind of section chosen here ({place}). Choose the kind that has it, or leave it out"
    if first["type"] in ("value_error", "assertion_error"):
        return f"{dotted}: {first['msg'].partition(', ')[2] or first['msg']} ({place})"
    return f"{dotted}: expected {_expected(first)}, got {_shown(value)} ({place}){_nearest_choice(first, value)}"


def _nearest_choice(error: ErrorDetails, value: object) -> str:
    """A question after a word that is no choice but much like one, else an empty string."""
    choices = _expected(error).removeprefix("one of ").split(", ") if error["type"] == "literal_error" else []
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f". Did you mean {near[0]}?" if near else ""


def _location(error: ErrorDetails, data: dict[str, Any]) -> tuple[list[str], object]:
    """The keys of a pydantic location that exist in `data` (it also names union members), and the value found there."""
    parts: list[str] = []
    value: Any = data
    for part in error["loc"]:
        inside = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(inside, dict) and part in inside:
            value = inside[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        parts.append(str(part))
    return parts, error["input"] if value is data else value


def _place(parts: list[str], where: Where) -> str:
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in where:
            return where[".".join(parts[:length])]
    return next(iter(where.values())).partition(":")[0] if where else "default"


def _expected(error: ErrorDetails) -> str:
    kind, message = error["type"], error["msg"]
    if kind == "int_from_float":
        return "an integer"
    if "expected" in error.get("ctx", {}):
        return "one of " + str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
    for name in (kind.removesuffix("_parsing").removesuffix("_type"), kind.partition("_")[0]):
        if name in EXPECTED and ("_parsing" in kind or "_type" in kind or kind == name):
            return EXPECTED[name]
    return message.removeprefix("Input should be ").removeprefix("Input should have ").removeprefix("Value should have ")
