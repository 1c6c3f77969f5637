"""Dataclass fields with a description and a range, and the checks of their values.

Imports nothing heavy, so that one dataclass can be a config group and a function's arguments.
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from functools import cache, wraps
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from ddpm_ray.config.reading.former_keys import Former, named_twice, translated
from ddpm_ray.config.reading.nearest import did_you_mean

T = TypeVar("T")
FormerKeys: TypeAlias = str | Former | tuple[str | Former, ...]
P = ParamSpec("P")
Comparison: TypeAlias = Callable[[Any, float], bool]
Limits: TypeAlias = Mapping[str, tuple[float, Comparison]]
"""Rule in words, as "at least" -> (limit, test that a value satisfies it)."""


class Bounds(TypedDict, total=False):
    """The keywords of a range: at most one lower and one upper bound."""

    at_least: float
    above: float
    at_most: float
    below: float


def limits(**bounds: Unpack[Bounds]) -> Limits:
    """Return the range of a number, as metadata of a field or of an `Annotated`."""
    comparisons: dict[str, Comparison] = {
        "at_least": operator.ge,
        "above": operator.gt,
        "at_most": operator.le,
        "below": operator.lt,
    }
    given = cast(Mapping[str, float], bounds)
    return {name.replace("_", " "): (limit, comparisons[name]) for name, limit in given.items()}


def option(
    default: T,
    doc: str,
    *,
    defines_run: bool = False,
    may_change: bool = False,
    formerly: FormerKeys = (),
    loads_group: str = "",
    keys_of: str = "",
    instead_of: str = "",
    **bounds: Unpack[Bounds],
) -> T:
    """Return a dataclass field with help text `doc` and a range, as `at_least=0, below=1`.

    `defines_run`: a continued run must have the same value or, if `may_change`, name the key in
    `change`. `formerly`: keys of this option and names of its choices in earlier versions, accepted
    wherever a config is read (see `former_keys.Former`). `loads_group`: the value is a YAML file
    whose keys set the group of that name; keys set elsewhere override them. `keys_of`: the value is
    a list of mappings whose keys are the options of that group. `instead_of`: the option of this
    group that has the same meaning in another form; a source that sets one of the two resets the
    other to None.
    """
    metadata = {
        "doc": doc,
        "limits": limits(**bounds),
        "defines_run": defines_run,
        "may_change": may_change,
        "formerly": _former(formerly),
        "loads_group": loads_group,
        "keys_of": keys_of,
        "instead_of": instead_of,
    }
    value: T = field(default=default, metadata=metadata)
    return value


def group(default: Callable[[], T], *, formerly: FormerKeys = (), whole_config: bool = False) -> T:
    """Return a dataclass field that holds a group of options; `default` makes its value.

    `formerly`: earlier names of the group, below which all its keys are accepted. `whole_config`:
    the group is the config of another job; former keys inside it are relative to it.
    """
    metadata = {"formerly": _former(formerly), "whole_config": whole_config}
    value: T = field(default_factory=default, metadata=metadata)
    return value


def _former(keys: FormerKeys) -> tuple[Former, ...]:
    several = keys if isinstance(keys, tuple) else (keys,)
    return tuple(one if isinstance(one, Former) else Former(one) for one in several)


def walk(config: object, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield dotted key, value and metadata of each option; groups are flattened in order."""
    for item in fields(cast(Any, config)):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def out_of_range(config: object) -> Iterator[str]:
    """Yield one line, starting with the key, for each value that is not finite or out of range."""
    for key, value, meta in walk(config):
        yield from _broken(key, value, meta["limits"])


def _broken(key: str, value: Any, within: Limits) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} is {value}; it must be finite"
        return
    for rule, (limit, holds) in within.items() if value is not None else ():
        if not holds(value, limit):
            yield f"{key} is {value}; it must be {rule} {limit}"


def arguments(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `values` to the types declared by the dataclass `kind`; None values are dropped.

    Former names are translated. Raises TypeError for an unknown name and ValueError for a value of
    the wrong type.
    """
    types, given = _types(kind), translated(kind, values.items())
    for one in given:
        if one.key not in types:
            hint = did_you_mean(one.key, types) or f"; there are {', '.join(types)}"
            raise TypeError(f"unexpected argument {one.key!r}{hint}")
    given = [one for one in given if one.value is not None]
    if twice := named_twice(given):
        raise TypeError(next(iter(twice.values())))
    return {one.key: _as_type(one.key, types[one.key], one.value) for one in given}


def checks_arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate `function` to convert its arguments to the declared types and check their `limits`.

    Checks parameters of type int, float, bool and Literal; all others, and `**kwargs`, are passed
    unchanged. The wrapper raises ValueError for a value of the wrong type or out of range.
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

    checked.__signature__ = _without_limits(signature)  # type: ignore[attr-defined] # for help()
    return checked


def _without_limits(signature: inspect.Signature) -> inspect.Signature:
    """The signature with types in place of `Annotated`."""
    parameters = [
        one.replace(annotation=get_args(one.annotation)[0])
        if get_origin(one.annotation) is Annotated
        else one
        for one in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters)


@cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _as_type(name: str, kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise ValueError(f"{name} is {shown(value)}; choose from {', '.join(get_args(kind))}")
        return value
    if kind == tuple[str, ...]:
        several = [value] if isinstance(value, str) else value
        if not isinstance(several, Sequence):
            raise ValueError(f"{name} is {shown(value)}; give a list of texts")
        for number, one in enumerate(several, 1):
            if not isinstance(one, str):
                raise ValueError(f"{name} has {shown(one)} as number {number}; give a text")
        return tuple(several)
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
    """Return repr(value) as one line of at most 80 characters, for error messages."""
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


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _plain(value: Any) -> Any:
    """Convert a NumPy or torch scalar to a Python number, without importing either library."""
    return value.item() if hasattr(value, "item") else value


_NUMBERS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    int: (_whole, "a whole number"),
    float: (_number, "a number"),
    bool: (_truth, "True or False"),
    str: (_text, "a text"),
}
_NUMBERS |= {kind | None: found for kind, found in _NUMBERS.items()}  # None has been dropped
