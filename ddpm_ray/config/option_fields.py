"""Dataclass fields that carry a meaning and a range, and the values that do not fit them.

On the lowest floor, so that a class may be a group of a config and the arguments of a function.
"""

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache, wraps
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypeVar,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ddpm_ray.config.former_keys import Former, named_twice, translated

T = TypeVar("T")
FormerKeys: TypeAlias = str | Former | tuple[str | Former, ...]
P = ParamSpec("P")
Limits: TypeAlias = Mapping[str, tuple[float | None, Callable[[Any, float], bool]]]
"""By the words of the rule: the limit, None for no limit, and whether a value keeps to it."""


def limits(
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Limits:
    """The range of a number: metadata of a field, or of a parameter, `Annotated[int, limits()]`."""
    return {
        "at least": (at_least, operator.ge),
        "above": (above, operator.gt),
        "at most": (at_most, operator.le),
        "below": (below, operator.lt),
    }


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
    keys_of: str = "",
    formerly: FormerKeys = (),
    former_choices: Mapping[str, str] | None = None,
) -> T:
    """A documented field with its range; `defines_run`: a run keeps the value for life.

    `fills`: the value names a YAML file whose keys go into the group of that name, below all that
    is set for it elsewhere. `keys_of`: the value is a list of mappings, whose keys are those of the
    group of that name. `formerly`: keys that the field had in earlier versions (see
    `former_keys.Former`), and `former_choices` what its choices were called: {former: now}. They
    stay valid wherever a config is read.
    """
    within = limits(at_least=at_least, above=above, at_most=at_most, below=below)
    metadata = {
        "doc": doc, "limits": within, "defines_run": defines_run, "fills": fills,
        "keys_of": keys_of, "formerly": _former(formerly), "former_choices": former_choices or {},
    }  # fmt: skip
    value: T = field(default=default, metadata=metadata)
    return value


def group(default: Callable[[], T], *, formerly: FormerKeys = (), whole_config: bool = False) -> T:
    """A field that is a group of fields, with what `default` returns.

    `formerly`: names that the group had; all its keys stay valid below them. `whole_config`: it is
    the config of another job, from which its own former keys count.
    """
    metadata = {"formerly": _former(formerly), "whole_config": whole_config}
    value: T = field(default_factory=default, metadata=metadata)
    return value


def _former(keys: FormerKeys) -> tuple[Former, ...]:
    several = keys if isinstance(keys, tuple) else (keys,)
    return tuple(one if isinstance(one, Former) else Former(one) for one in several)


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
        yield from _broken(key, value, meta["limits"])


def _broken(key: str, value: Any, within: Limits) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} is {value}; it must be finite"
        return
    for rule, (limit, holds) in within.items():
        if limit is not None and not holds(value, limit):
            yield f"{key} is {value}; it must be {rule} {limit}"


def arguments(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as the types that the dataclass `kind` declares, without those that are None.

    Raises TypeError for a name that it lacks, as any function does, and ValueError for a value of
    another type. Former names are taken for those of today.
    """
    types, given = _types(kind), translated(kind, values.items())
    for one in given:
        if one.key not in types:
            near = difflib.get_close_matches(one.key, types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(types)}"
            raise TypeError(f"unexpected argument {one.key!r}{hint}")
    given = [one for one in given if one.value is not None]
    if twice := named_twice(given):
        raise TypeError(next(iter(twice.values())))
    return {one.key: _as_type(one.key, types[one.key], one.value) for one in given}


def checks_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, with its arguments as the types that it declares, within their `limits`.

    Parameters of other types than int, float, bool and Literal pass as they are, and so do keywords
    without a name in the signature. Raises ValueError for a value of another type or out of range.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        """Check and convert the arguments, then call `function`."""
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        kinds = _types(function)
        for name, value in bound.arguments.items():
            kind, within = kinds.get(name), limits()
            if get_origin(kind) is Annotated:
                kind, within = get_args(kind)
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD and (
                kind in _NUMBERS or get_origin(kind) is Literal
            ):
                bound.arguments[name] = value = _as_type(name, kind, value)
                if wrong := [*_broken(name, value, within)]:
                    raise ValueError("; ".join(wrong))
        return function(*bound.args, **bound.kwargs)

    return checked


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _as_type(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise ValueError(f"{name} is {shown(value)}; choose from {', '.join(get_args(kind))}")
        return value
    if get_origin(kind) is tuple:
        try:
            several = [value] if isinstance(value, str) or not hasattr(value, "__len__") else value
            return tuple(one if isinstance(one, str) else _whole(one) for one in several)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} is {shown(value)}; give whole numbers, or names") from None
    convert, wanted = _NUMBERS[kind]
    try:
        return convert(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{name} is {shown(value)}; give {wanted}") from None


def shown(value: object) -> str:
    """The value as it may stand in a message: one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(plain := _plain(value), bool) or not isinstance(plain, int | float):
        raise TypeError
    return float(plain)


def _truth(value: Any) -> bool:
    if not isinstance(plain := _plain(value), bool):
        raise TypeError
    return plain


def _plain(value: Any) -> Any:
    """Python's number of one of numpy or torch, which this module does not load."""
    return value.item() if hasattr(value, "item") else value


_NUMBERS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_truth, "True or False"),
}
