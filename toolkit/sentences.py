"""One sentence for a pydantic error: dotted path, given value, what is allowed, nearest key."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

from toolkit.errors import but, nearest
from toolkit.masking import MASK, is_secret, masked

_LIST_AT_MOST = 12


def explain(error: ValidationError, schema: Any, path: tuple[str, ...] = ()) -> str:
    """The first problem in `error`, which `schema` (a pydantic model or TypedDict) found at `path`."""
    first = error.errors(include_url=False)[0]
    unknown = first["type"] == "extra_forbidden"
    place = list(path)
    level: Any = schema
    for part in first["loc"]:
        known = _keys(level)
        # What is no key here and no list index is pydantic's name for a branch of a union.
        mapping = get_origin(level) is dict
        if part in known or mapping or isinstance(part, int) or (unknown and part == first["loc"][-1]):
            place.append(str(part))
        if part in known or mapping:
            level = _schema_in(known[part] if part in known else get_args(level)[1])
    if unknown:
        return unknown_key(place, _keys(level))
    given = MASK if any(map(is_secret, place)) else masked(first["input"])
    if first["type"] == "missing":
        inside = isinstance(first["loc"][-1], int)  # of a list that is too short
        return (
            f"{dotted(place[:-1])} is {shown(given)}, which lacks a value" if inside else f"{dotted(place)} is missing"
        )
    message = re.sub(r"^(Value error|Assertion failed), ", "", first["msg"])
    if len(place) == len(path):
        return f"{dotted(place)}: {message}"
    message = message.replace("Input should be", "must be").replace("a valid dictionary", "an object")
    # An enum lists an alias of its last value as one more value.
    message = re.sub(r", (\S+) or \1$", r" or \1", message)
    hint = nearest(given, re.findall(r"'([^']*)'", message)) if isinstance(given, str) else ""
    return f"{dotted(place)} is {shown(given)}, but {message}.{hint}"


_RANGES = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}
"""What pydantic says in longer words, by the type of its error."""


def refused(option: str, error: ValidationError) -> str:
    """The first problem in `error`, which is of the value of a command's `option`."""
    first = error.errors(include_url=False)[0]
    given = MASK if is_secret(option.lstrip("-")) else repr(first["input"])
    if (words := _RANGES.get(first["type"])) is not None:
        if "parsing" not in first["type"]:
            given = given.strip("'")  # a number as it was typed
        return f"{option} is {given}, but must be {words.format(**first.get('ctx', {}))}."
    problem = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if (allowed := problem.partition(" is not one of ")[2]) and isinstance(first["input"], str):
        names = re.findall(r"'([^']*)'", allowed)
        return f"{option} is {given}, but must be one of {', '.join(map(repr, names))}.{nearest(first['input'], names)}"
    return f"{option} is {given}, {but(problem)}"


def unknown_key(place: list[str], known: Iterable[str], kind: str = "key") -> str:
    """The sentence for the key at `place` that is none of `known`."""
    known = sorted(known)
    hint = nearest(place[-1], known)
    allowed = f"; known here are {', '.join(known)}" if not hint or len(known) <= _LIST_AT_MOST else ""
    return f"unknown {kind} {dotted(place)!r}{allowed}.{hint}"


def one_line(error: BaseException) -> str:
    """What an exception says, or, where it says nothing, its class; of the file system the file and why."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def json_kind(value: Any) -> str:
    """What JSON calls `value`."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def dotted(place: Iterable[str]) -> str:
    return ".".join(place)


def value_at(document: Any, path: str) -> Any:
    """What a JSON document has at a dotted path; None where it has nothing."""
    for key in path.split("."):
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def shown(value: Any) -> str:
    """`value` as the file would write it, cut short where it is long."""
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(schema: Any) -> dict[str, Any]:
    if is_typeddict(schema):
        return get_type_hints(schema, include_extras=True)
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        return {}
    return {
        key: field.annotation
        for name, field in schema.model_fields.items()
        for key in (name, field.alias)
        if key is not None
    }


def _schema_in(annotation: Any) -> Any:
    if is_typeddict(annotation) or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return annotation
    if get_origin(annotation) is dict:
        return annotation
    return next((found for part in get_args(annotation) if (found := _schema_in(part)) is not None), None)
