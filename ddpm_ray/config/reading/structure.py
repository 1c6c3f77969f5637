"""Dataclasses of options as OmegaConf structures: the only importer of OmegaConf."""

import copy
import io
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_UNREADABLE = OmegaConfBaseException, TypeError  # TypeError: a key below an option that is a list


class UnreadableError(Exception):
    """A value that an option cannot hold; args are (dotted key, reason)."""


def defaults(kind: type[Any]) -> Any:
    """Return the structure of the config class `kind` with its defaults; it may be modified."""
    return copy.deepcopy(_defaults(kind))  # type: ignore[arg-type]  # a class is hashable


@cache
def _defaults(kind: type[Any]) -> Any:
    """The structure of `kind`, cached because making one takes 0.1 s; do not modify it."""
    return OmegaConf.structured(kind)


def structure(config: object) -> Any:
    """Return the structure of a config."""
    return OmegaConf.structured(config)


def with_value(merged: Any, key: str, value: Any) -> Any:
    """Return the structure `merged`, modified in place, with its dotted `key` set to `value`.

    Raises UnreadableError where there is no such key, or it cannot hold such a value.
    """
    return with_mapping(merged, nested(key, value))


def with_mapping(merged: Any, values: Mapping[str, Any]) -> Any:
    """Return the structure `merged`, modified in place, with nested `values`, as `with_value`."""
    try:
        return OmegaConf.unsafe_merge(merged, dict(values))
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0]
        raise UnreadableError(getattr(error, "full_key", "") or "", reason) from error


def to_object(merged: Any) -> Any:
    """Return the config that a structure holds, with references resolved.

    Raises UnreadableError for a reference, ${...}, to nothing or to a value of another type.
    """
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UnreadableError(error.full_key, str(error).splitlines()[0]) from error


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return the nested mapping that sets the dotted `key` to `value`."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast(dict[str, Any], value)


def parse(text: str) -> Any:
    """Return what a YAML document holds. Raises the errors of PyYAML and OmegaConf."""
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def parse_value(text: str) -> Any:
    """Return what one YAML value holds, as `parse`."""
    read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    return read["value"]


def to_dict(config: object) -> dict[str, Any]:
    """Return the config as nested plain values for JSON."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """Return the resolved config as YAML, for `--print-config`."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    return text
