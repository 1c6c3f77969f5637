"""An option in words: its type, choices, range and value, for errors and `--help`."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ddpm_ray.config.option_fields import Limits

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "value"}


def choices(type_: Any) -> list[str]:
    """Return the texts that a Literal type allows; empty for other types."""
    return list(map(str, get_args(type_))) if get_origin(type_) is Literal else []


def type_text(type_: Any) -> str:
    """Return a type as a person would say it: a whole number, a list of numbers, ..."""
    if get_origin(type_) in (Union, UnionType) and NoneType in get_args(type_):
        (type_,) = (one for one in get_args(type_) if one is not NoneType)
    if choices(type_) or type_ is str:
        return "a text"
    if type_ is bool:
        return "true or false"
    if get_origin(type_) in (tuple, list):
        item, *_ = get_args(type_)
        return f"a list of {_plural(item)}, as [a,b]"
    return f"a {_NAMES.get(type_, 'value')}"


def _plural(type_: Any) -> str:
    if get_origin(type_) in (Union, UnionType):
        return " or ".join(map(_plural, get_args(type_)))
    if get_origin(type_) in (dict, Mapping):
        return "mappings"
    return f"{_NAMES.get(type_, 'value')}s"


def range_text(limits: Limits) -> str:
    """Return a range as "at least 0, below 1"; empty if there is none."""
    return ", ".join(f"{rule} {limit}" for rule, (limit, _) in limits.items())


def value_text(value: Any) -> str:
    """Return a value as it is typed in `key=value`, without spaces."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(map(value_text, value))}]"
    return str(value)
