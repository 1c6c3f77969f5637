"""Load configs from files, `key=value` arguments or saved values, and check them.

An option's metadata holds its help text, its range, and whether a continued run must keep its
value (option_fields.py). Keys of earlier versions are translated first (reading/former_keys.py).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import reduce
from typing import Any, Protocol, TypeVar, cast

from ddpm_ray.config.option_fields import out_of_range, walk
from ddpm_ray.config.reading.errors import ConfigError as ConfigError
from ddpm_ray.config.reading.errors import wrong_option
from ddpm_ray.config.reading.former_keys import Given, named_twice, translated
from ddpm_ray.config.reading.sources import COMMAND_LINE, Layer, layer, layers_of, leaves
from ddpm_ray.config.reading.sources import given_keys as given_keys
from ddpm_ray.config.reading.structure import (
    UnreadableError,
    defaults,
    structure,
    to_object,
    with_mapping,
    with_value,
)
from ddpm_ray.config.reading.structure import to_dict as to_dict
from ddpm_ray.config.reading.structure import to_yaml as to_yaml
from ddpm_ray.config.reading.yaml_text import type_at
from ddpm_ray.redaction import NO_SECRET, has_secret, redacted, texts
from ddpm_ray.storage.file_formats import not_of_this_version

# Configs are written to checkpoints and to MLflow, so only these environment variables, none of
# them secret, may be referenced. References to other keys are allowed, other resolvers are not.
ENVIRONMENT = ("HOME", "USER", "TMPDIR", "DDPM_RAY_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
REFERENCE = re.compile(
    rf"(?<!\\)\$\{{(?:oc\.env:(?:{'|'.join(ENVIRONMENT)})(?:,[^${{}}]*)?|[\w.]+)\}}"
)


class Checked(Protocol):
    """A dataclass of options that checks its own values."""

    def problems(self) -> Iterator[str]:
        """Yield one line, starting with a key, for each error; none if the config is valid."""
        ...


Config = TypeVar("Config", bound=Checked)


def load_config(kind: type[Config], path: str | None, overrides: list[str]) -> Config:
    """Load a config from a YAML file (None: defaults) and `key=value` overrides, and check it.

    `path` may be the name of a config that the package ships. Raises ConfigError with one line for
    each bad key: source, key, value, rule, and the nearest valid name.
    """
    layers = layers_of(kind, path, overrides)
    return _checked(kind, defaults(kind), layers, path or COMMAND_LINE)


def with_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Return `config` with the dotted keys of `values` set, and check the result.

    Raises ConfigError with one line, starting with `where`, for each bad key.
    """
    kind = type(config)
    return _checked(kind, structure(config), [layer(kind, where, values)], where)


def from_dict(
    kind: type[Config], values: Mapping[str, Any], saved_by: str = "", where: str = ""
) -> Config:
    """Restore a config from the values that `to_dict` returned in this or an earlier version.

    `saved_by`: version of ddpm_ray that saved it; `where`: its location. Both are used in errors.
    Raises ConfigError if this version cannot read it. `to_dict` resolves all references, so a
    `${...}` in saved values was inserted by somebody with write access to the storage: an error.
    """
    place = f"{where}: " if where else ""
    edited = f"{place}a saved config %s: it was edited; put a whole copy of it back"
    if any("${" in text for text in texts(values)):
        raise ConfigError(edited % "holds ${...}")
    given = translated(kind, leaves(values))
    if wrong := [*named_twice(given).values(), *(one.problem for one in given if one.problem)]:
        raise ConfigError(edited % f"is not understood ({wrong[0]})")
    known, saved = {key for key, _, _ in walk(kind())}, dict[str, Any]()
    unknown = not_of_this_version(saved_by)
    for one in given:
        empty = one.value == {} and is_dataclass(type_at(kind, one.key))
        if one.key not in known and not empty:
            raise ConfigError(f"{place}a saved config has {one.key}, which {unknown}")
        *groups, name = one.key.split(".")
        reduce(lambda held, group: held.setdefault(group, {}), groups, saved)[name] = one.value
    try:
        merged = with_mapping(defaults(kind), saved)
    except UnreadableError as error:
        key, reason = error.args
        raise ConfigError(f"{place}a saved config: {key}: {reason}; this {unknown}") from error
    return cast(Config, to_object(merged))


def current_values(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, saved by this or an earlier version, under the current dotted keys."""
    return {one.key: one.value for one in translated(kind, values.items())}


def flat(config: object) -> dict[str, Any]:
    """Return all options by dotted key, as in `{"schedule.num_steps": 1000, ...}`."""
    return {key: value for key, value, _ in walk(config)}


def defining(config: object) -> dict[str, Any]:
    """Return the options whose values a continued run must keep, by dotted key."""
    return {key: value for key, value, meta in walk(config) if meta["defines_run"]}


def complaint(kind: type[Any], key: str, value: Any) -> str:
    """Return the error of setting the dotted `key` of `kind` to `value`, or an empty string.

    Checks name and type only; `with_values` checks ranges and rules about several keys.
    """
    try:
        with_value(defaults(kind), key, value)
    except UnreadableError:
        return wrong_option(kind, key, value)
    return ""


def _checked(kind: type[Config], merged: Any, layers: list[Layer], fallback: str) -> Config:
    """Merge the layers into `merged`, later ones over earlier ones, and check the result."""
    set_by = {one.key: where for where, given in layers for one in given}
    wrong = _named_twice(layers)  # one line for each key
    for where, given in layers:
        merged = _merged(kind, merged, where, given, wrong)
    try:
        config = cast(Config, to_object(merged))
    except UnreadableError as error:  # of a reference, ${...}
        key, reason = error.args
        raise ConfigError(f"{fallback}: {key}: {redacted(reason)}") from error
    for key, value, _ in walk(config):
        if has_secret(value):
            wrong[key] = f"{set_by.get(key, fallback)}: {key}={value!r}: {NO_SECRET}"
    # Rules about several keys are checked only if each key could be read.
    for line in [*out_of_range(config), *([] if wrong else config.problems())]:
        key = line.partition(" ")[0]
        wrong.setdefault(key, f"{set_by.get(key, fallback)}: {line}")
    if wrong:
        raise ConfigError("\n".join(map(redacted, wrong.values())))
    return config


def _merged(
    kind: type[Any], merged: Any, where: str, given: list[Given], wrong: dict[str, str]
) -> Any:
    """Merge one source into `merged`, and add to `wrong` a line for each key that cannot be set."""
    seen: set[str] = set()
    for one in given:
        key, value = one.key, one.value
        if key in wrong:
            continue
        if key in seen:  # set in its group and by its dotted name
            wrong[key] = f"{where}: {key} is set twice; leave one of the two out"
        elif one.problem:
            wrong[key] = f"{where}: {one.problem}"
        elif any(number.bit_length() > 64 for number in _integers(value)):
            wrong[key] = f"{where}: {key} holds a whole number that does not fit 64 bits"
        elif reason := _forbidden_reference(value):
            wrong[key] = f"{where}: {key}={value!r}: {reason}"
        else:
            try:
                merged = with_value(merged, key, value)
            except UnreadableError:
                wrong[key] = f"{where}: {wrong_option(kind, key, value)}"
        seen.add(key)
    return merged


def _named_twice(layers: list[Layer]) -> dict[str, str]:
    """Return {key: error line} for each key that one source sets under two names."""
    places: dict[str, list[Given]] = {}
    for where, given in layers:
        places.setdefault(where, []).extend(given)
    lines = {
        f"{where}: {line.partition(';')[0]}": (key, f"{where}: {line}")  # one of each two options
        for where, given in places.items()
        for key, line in reversed(named_twice(_without_repeated_nulls(given)).items())
    }
    return dict(lines.values())


def _without_repeated_nulls(given: list[Given]) -> list[Given]:
    """Leave out each option that its other form empties (instead_of) and that is null itself."""
    nulls = {one.key for one in given if one.value is None and one.name == one.key}
    return [
        one for one in given if not (one.value is None and one.name != one.key and one.key in nulls)
    ]


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in a YAML value: one with thousands of digits cannot be printed."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _integers(one)
    elif isinstance(value, dict):
        yield from _integers([*value.keys(), *value.values()])


def _forbidden_reference(value: Any) -> str:
    """Return why a `${...}` in `value` is not allowed, or an empty string."""
    if all(text.count("${") == len(REFERENCE.findall(text)) for text in texts(value)):
        return ""
    return (
        f"a value may refer to another key, as ${{data.url}}, or to ${{oc.env:NAME}} where NAME is "
        f"one of {', '.join(ENVIRONMENT)}; secrets stay in the environment"
    )
