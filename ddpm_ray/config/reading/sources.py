"""Options as the user sets them, in YAML files and `key=value` arguments."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeAlias, cast

from ddpm_ray.config.option_fields import walk
from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.config.reading.former_keys import Given, translated
from ddpm_ray.config.reading.shipped import config_file
from ddpm_ray.config.reading.structure import nested, parse, parse_value
from ddpm_ray.config.reading.yaml_text import (
    read_scalar,
    read_text,
    require_shallow,
    type_at,
    with_texts,
)
from ddpm_ray.redaction import redacted

COMMAND_LINE = "command line"
Layer: TypeAlias = tuple[str, list[Given]]
"""A source (file name or command line), and the options set there."""


def layers_of(kind: type[Any], path: str | None, overrides: list[str]) -> list[Layer]:
    """Read a YAML file and `key=value` overrides; later layers override earlier ones.

    Raises ConfigError for what cannot be read; keys and values are not checked yet.
    """
    layers = [layer(kind, path, _yaml(kind, path))] if path else []
    layers += [layer(kind, COMMAND_LINE, _override(kind, text)) for text in overrides]
    return [*_loaded_groups(kind, layers), *layers]


def layer(kind: type[Any], where: str, values: Mapping[str, Any]) -> Layer:
    """Return nested `values`, set at `where`, by current dotted key.

    Of two options with one meaning (`option(instead_of=...)`), the one that is not set is emptied.
    """
    given = translated(kind, leaves(values))
    others = _other_forms(kind)  # type: ignore[arg-type]  # a class is hashable
    empty = {one.key for one in given if one.value is None}
    given += [
        Given(other, None, one.name)
        for one in given
        if (other := others.get(one.key)) and other not in empty and one.value is not None
    ]
    return where, given


@cache
def _other_forms(kind: type[Any]) -> dict[str, str]:
    """The other one of two options with one meaning (`option(instead_of=...)`), for each."""
    pairs = {
        key: f"{key.rpartition('.')[0]}.{other}"
        for key, _, meta in walk(kind())
        if (other := meta["instead_of"])
    }
    return pairs | {other: key for key, other in pairs.items()}


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of each leaf of nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def given_keys(kind: type[Any], overrides: list[str]) -> frozenset[str]:
    """Return the dotted keys that `key=value` overrides set."""
    given = (layer(kind, COMMAND_LINE, _override(kind, text))[1] for text in overrides)
    return frozenset(one.key for several in given for one in several)


def unknown_keys(kind: type[Any], path: str) -> list[str]:
    """Return the dotted keys in the YAML file `path` that `kind` lacks. Raises ConfigError."""
    known = {name for name, _, _ in walk(kind())}
    groups = {name.rpartition(".")[0] for name in known}
    return [
        one.key
        for one in translated(kind, leaves(_yaml(kind, path)))
        if one.key not in known | groups
        and not any(one.key.startswith(f"{name}.") for name in known)
    ]


def _yaml(kind: type[Any], path: str) -> dict[str, Any]:
    file = config_file(kind, path)
    try:
        text = read_text(file)
        require_shallow(text)
        values = with_texts(kind, parse(text), text)
    except Exception as error:  # the YAML reader's own errors name line and column
        raise ConfigError(redacted(f"{path}: {' '.join(str(error).split())}")) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; give keys and values")
    return cast(dict[str, Any], values)


def _override(kind: type[Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(redacted(f"{COMMAND_LINE}: {text!r} is not of the form key=value"))
    if (typed := read_scalar(kind, key, value)) is not None:
        return nested(key, typed)
    try:  # `key=` empties a text; YAML would read null
        require_shallow(value := value or repr(""))
        return nested(key, with_texts(kind, parse_value(value), value, key))
    except Exception as error:  # the YAML reader's own errors
        reason = " ".join(str(error).split())
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        raise ConfigError(redacted(f"{COMMAND_LINE}: {shown}: {reason}")) from error


def _loaded_groups(kind: type[Any], layers: list[Layer]) -> list[Layer]:
    """Read the files named by `loads_group` options, each as a layer below its group."""
    named = {
        item.metadata["loads_group"]: one.value
        for item in fields(kind)
        if item.metadata.get("loads_group")
        for _, given in layers
        for one in given
        if one.key == item.name and one.value
    }
    return [
        layer(kind, str(file), {group: _yaml(type_at(kind, group), str(file))})
        for group, file in named.items()
    ]
