"""Dataclass fields that carry a meaning and a range, and the values that do not fit them.

On the lowest floor, so that a class may be a group of a config and the arguments of a function.
"""

import difflib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


def knob(
    default: T,
    doc: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    defines_run: bool = False,
    fills: str = "",
) -> T:
    """A documented field with its range; `defines_run`: a run keeps the value for life.

    `fills`: the value names a YAML file whose keys go into the group of that name, below all that
    is set for it elsewhere.
    """
    limits = {
        "at least": (at_least, lambda x, y: x >= y),
        "above": (above, lambda x, y: x > y),
        "at most": (at_most, lambda x, y: x <= y),
        "below": (below, lambda x, y: x < y),
    }
    metadata = {"doc": doc, "limits": limits, "defines_run": defines_run, "fills": fills}
    value: T = field(default=default, metadata=metadata)
    return value


def walk(config: object, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Dotted key, value and metadata of each field, those of groups in their place."""
    for item in fields(cast(Any, config)):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def out_of_range(config: object) -> Iterator[str]:
    """One line, which begins with its key, for each value that is not finite or breaks a limit."""
    for key, value, meta in walk(config):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}; it must be finite"
        for rule, (limit, holds) in meta["limits"].items():
            if limit is not None and not holds(value, limit):
                yield f"{key} is {value}; it must be {rule} {limit}"


def arguments(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the types that the dataclass `kind` declares, without those that are None.

    Raises TypeError for a name that it lacks, as any function does, and ValueError for a value of
    another type.
    """
    types = _types(kind)
    for name in values:
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(types)}"
            raise TypeError(f"unexpected argument {name!r}{hint}")
    return {
        name: _as_type(name, types[name], value)
        for name, value in values.items()
        if value is not None
    }


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _as_type(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}; choose from {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        try:
            several = [value] if isinstance(value, str) or not hasattr(value, "__len__") else value
            return tuple(one if isinstance(one, str) else operator.index(one) for one in several)
        except TypeError:
            raise ValueError(f"{name} is {value!r}; give whole numbers, or names") from None
    try:
        return operator.index(value) if kind is int and value is not True else kind(value)
    except (TypeError, ValueError):
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise ValueError(f"{name} is {value!r}; give {wanted}") from None
