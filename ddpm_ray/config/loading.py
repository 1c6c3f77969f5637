"""Documented, checked config fields, and how they are read from YAML and `key=value` arguments.

The only importer of OmegaConf. A knob's metadata carries its meaning and its range, so `--help`,
the checks and the rule that a run keeps its defining values for life all read from one place. Keys
of earlier versions are translated before anything else looks at them: see former_keys.py.
"""

import copy
import difflib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm_ray.config.former_keys import Former as Former
from ddpm_ray.config.former_keys import Given, former_keys, named_twice, translated
from ddpm_ray.config.option_fields import group as group
from ddpm_ray.config.option_fields import knob as knob
from ddpm_ray.config.option_fields import out_of_range, walk
from ddpm_ray.config.yaml_text import read_scalar, read_text, require_shallow, type_at, with_texts
from ddpm_ray.redaction import NO_SECRET, has_secret, redacted, texts
from ddpm_ray.storage.file_formats import not_of_this_version

UNREADABLE = OmegaConfBaseException, TypeError  # the latter for keys below one that is a list
# A config is written into every checkpoint and into MLflow. Of the environment it may hold these,
# none of which is a secret; and a reference to another key, but no other resolver of OmegaConf.
ENVIRONMENT = ("HOME", "USER", "TMPDIR", "DDPM_RAY_HOME", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
REFERENCE = re.compile(
    rf"(?<!\\)\$\{{(?:oc\.env:(?:{'|'.join(ENVIRONMENT)})(?:,[^${{}}]*)?|[\w.]+)\}}"
)


class Checked(Protocol):
    """A dataclass of knobs that also knows what cannot go together: lines that begin with a key."""

    def problems(self) -> Iterator[str]:
        """A line for each; none, and the config can be run."""
        ...


Config = TypeVar("Config", bound=Checked)
COMMAND_LINE = "command line"
Layer = tuple[str, list[Given]]  # where it was given, and what


class ConfigError(ValueError):
    """A config that cannot be run; one line for each bad key."""


def load(kind: type[Config], path: str | None, overrides: list[str]) -> Config:
    """A checked config from a YAML file (or defaults alone) and `key=value` overrides.

    Raises ConfigError with one line for each bad key: its path, its value, the rule, and the
    nearest valid name.
    """
    layers = [_layer(kind, path, _yaml(kind, path))] if path else []
    layers += [_layer(kind, COMMAND_LINE, _override(kind, text)) for text in overrides]
    layers = [*_filling(kind, layers), *layers]
    return _checked(kind, _defaults(kind), layers, path or COMMAND_LINE)


def given_keys(kind: type[Any], overrides: list[str]) -> frozenset[str]:
    """The dotted keys that `key=value` overrides set."""
    given = (_layer(kind, COMMAND_LINE, _override(kind, text))[1] for text in overrides)
    return frozenset(one.key for layer in given for one in layer)


def with_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """`config` with every dotted key of `values` set, checked as a whole.

    Raises ConfigError with one line, which begins with `where`, for each bad key.
    """
    layer = _layer(type(config), where, values)
    return _checked(type(config), OmegaConf.structured(config), [layer], where)


def current_values(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, which an earlier version may have saved by dotted key, by the names of today."""
    return {one.key: one.value for one in translated(kind, values.items())}


def _layer(kind: type[Any], where: str, values: Mapping[str, Any]) -> Layer:
    return where, translated(kind, _leaves(values))


@cache
def _structure(kind: type[Any]) -> Any:
    """What the config `kind` looks like, not to be changed: to read it off takes 0.1 s."""
    return OmegaConf.structured(kind)


def _defaults(kind: type[Any]) -> Any:
    """A structure of one's own."""
    return copy.deepcopy(_structure(kind))  # type: ignore[arg-type]  # a class is hashable


def _checked(kind: type[Config], merged: Any, layers: list[Layer], fallback: str) -> Config:
    """`merged` with the layers laid over it, each key of each told if it is wrong."""
    set_by: dict[str, str] = {}
    wrong = _named_twice(layers)  # one line for each key
    for where, layer in layers:
        seen: set[str] = set()
        for one in layer:
            key, value = one.key, one.value
            set_by[key] = where
            if key in wrong:
                continue
            if key in seen:  # once in its group, once by its dotted name
                wrong[key] = f"{where}: {key} is set twice; leave one of the two out"
                continue
            seen.add(key)
            if one.problem:
                wrong[key] = f"{where}: {one.problem}"
                continue
            if any(number.bit_length() > 64 for number in _integers(value)):
                wrong[key] = f"{where}: {key} holds a whole number that does not fit 64 bits"
                continue
            if reason := _strange_reference(value):
                wrong[key] = f"{where}: {key}={value!r}: {reason}"
                continue
            try:
                merged = OmegaConf.unsafe_merge(merged, _nested(key, value))  # in place
            except UNREADABLE as error:
                wrong[key] = f"{where}: {_complaint(kind, key, value, error)}"
    try:
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # of an interpolation, ${...}
        reason = redacted(str(error).splitlines()[0])
        raise ConfigError(f"{fallback}: {error.full_key}: {reason}") from error
    for key, value, _ in walk(config):
        if has_secret(value):
            wrong[key] = f"{set_by.get(key, fallback)}: {key}={value!r}: {NO_SECRET}"
    # What keys are together is told once each of them could be read.
    for line in [*out_of_range(config), *([] if wrong else config.problems())]:
        key = line.partition(" ")[0]
        wrong.setdefault(key, f"{set_by.get(key, fallback)}: {line}")
    if wrong:
        raise ConfigError("\n".join(map(redacted, wrong.values())))
    return config


def _named_twice(layers: list[Layer]) -> dict[str, str]:
    """A line for each key that one place gives by a former name and by another one."""
    places: dict[str, list[Given]] = {}
    for where, layer in layers:
        places.setdefault(where, []).extend(layer)
    return {
        key: f"{where}: {line}"
        for where, given in places.items()
        for key, line in named_twice(given).items()
    }


def _integers(value: Any) -> Iterator[int]:
    """Those in a value of YAML: one with thousands of digits cannot even be shown."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _integers(one)
    elif isinstance(value, dict):
        yield from _integers([*value.keys(), *value.values()])


def _strange_reference(value: Any) -> str:
    """Why a `${...}` in `value` is not followed, or an empty string."""
    if all(text.count("${") == len(REFERENCE.findall(text)) for text in texts(value)):
        return ""
    return (
        f"a value may refer to another key, as ${{data.url}}, or to ${{oc.env:NAME}} where NAME is "
        f"one of {', '.join(ENVIRONMENT)}; secrets stay in the environment"
    )


def from_dict(
    kind: type[Config], values: Mapping[str, Any], saved_by: str = "", where: str = ""
) -> Config:
    """The config that `to_dict` was given, here or in an earlier version.

    Raises ConfigError for what this version cannot read; `saved_by` is the version of ddpm_ray that
    saved it, and `where` it lies. What was saved has no references left: one in it was put there by
    whoever can write the storage.
    """
    place = f"{where}: " if where else ""
    edited = f"{place}a saved config %s: it was edited; put a whole copy of it back"
    if any("${" in text for text in texts(values)):
        raise ConfigError(edited % "holds ${...}")
    given = translated(kind, _leaves(values))
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
        merged = OmegaConf.unsafe_merge(_defaults(kind), OmegaConf.create(saved))
    except UNREADABLE as error:
        key, reason = getattr(error, "full_key", ""), str(error).splitlines()[0]
        raise ConfigError(f"{place}a saved config: {key}: {reason}; this {unknown}") from error
    return cast(Config, OmegaConf.to_object(merged))


def to_dict(config: object) -> dict[str, Any]:
    """Plain nested values, ready for JSON."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """The whole resolved config as YAML: what `--print-config` shows."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    return text


def flat(config: object) -> dict[str, Any]:
    """Every leaf under its dotted key, as in `{"schedule.num_steps": 1000, ...}`."""
    return {key: value for key, value, _ in walk(config)}


def defining(config: object) -> dict[str, Any]:
    """The leaves that a run keeps for life: a checkpoint continues only under equal ones."""
    return {key: value for key, value, meta in walk(config) if meta["defines_run"]}


def complaint(kind: type[Any], key: str, value: Any) -> str:
    """What is wrong with giving the dotted `key` of `kind` this value, or an empty string.

    Its name and its type alone; ranges and what keys are together is seen by `with_values`.
    """
    try:
        OmegaConf.unsafe_merge(_defaults(kind), _nested(key, value))
    except UNREADABLE as error:
        return _complaint(kind, key, value, error)
    return ""


def help_lines(kind: type[Any]) -> list[str]:
    """One line per knob: dotted key, default, meaning with its unit and range."""
    of_a_trained_run = hasattr(kind, "sampling_problems")
    rows = [
        (
            key,
            "the run's" if of_a_trained_run and key.startswith("sampling.") else _shown(value),
            _meaning(meta),
        )
        for key, value, meta in walk(kind())
    ]
    wide, deep = (max(len(row[i]) for row in rows) for i in (0, 1))
    return [f"  {key:<{wide}}  {default:<{min(deep, 24)}}  {doc}" for key, default, doc in rows]


def _meaning(meta: Mapping[str, Any]) -> str:
    bounds = [f"{rule} {limit}" for rule, (limit, _) in meta["limits"].items() if limit is not None]
    return f"{meta['doc']} ({', '.join(bounds)})" if bounds else str(meta["doc"])


def _shown(value: Any) -> str:
    text = str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _yaml(kind: type[Any], path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        near = ", ".join(sorted(str(p) for p in folder.glob("*.yaml"))) or "no *.yaml"
        if "=" in path:
            raise ConfigError(f"{path}: the config file comes first, then key=value")
        reason = "is a folder, not a file" if folder == Path(path) else "no such file"
        raise ConfigError(f"{path}: {reason}; here are: {near}")
    try:
        text = read_text(path)
        require_shallow(text)
        values = with_texts(kind, OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), text)
    except Exception as error:  # the YAML reader's own errors name line and column
        raise ConfigError(redacted(f"{path}: {' '.join(str(error).split())}")) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; give keys and values")
    return cast(dict[str, Any], values)


def unknown_keys(kind: type[Any], path: str) -> list[str]:
    """The dotted keys in the YAML file `path` that `kind` lacks; raises ConfigError as `load`."""
    known = {name for name, _, _ in walk(kind())}
    groups = {name.rpartition(".")[0] for name in known}
    return [
        one.key
        for one in translated(kind, _leaves(_yaml(kind, path)))
        if one.key not in known | groups
        and not any(one.key.startswith(f"{name}.") for name in known)
    ]


def _filling(kind: type[Any], layers: list[Layer]) -> list[Layer]:
    """What the files hold that `fills` knobs name, each under its group."""
    named = {
        item.metadata["fills"]: one.value
        for item in fields(kind)
        if item.metadata.get("fills")
        for _, layer in layers
        for one in layer
        if one.key == item.name and one.value
    }
    return [
        _layer(kind, str(file), {group: _yaml(type_at(kind, group), str(file))})
        for group, file in named.items()
    ]


def _override(kind: type[Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(redacted(f"{COMMAND_LINE}: {text!r} is not of the form key=value"))
    if (typed := read_scalar(kind, key, value)) is not None:
        return _nested(key, typed)
    try:  # `key=` empties a text; YAML would read null
        require_shallow(value := value or repr(""))
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
        return _nested(key, with_texts(kind, cast(Any, read)["value"], value, key))
    except Exception as error:  # the YAML reader's own errors
        reason = " ".join(str(error).split())
        shown = text if len(text) <= 200 else f"{text[:197]}..."
        raise ConfigError(redacted(f"{COMMAND_LINE}: {shown}: {reason}")) from error


def _leaves(layer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in layer.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return cast(dict[str, Any], value)


def _complaint(kind: type[Any], key: str, value: Any, error: Exception) -> str:
    known = {name: meta for name, _, meta in walk(kind())}
    whole = next((name for name in known if key.startswith(f"{name}.")), "")
    if whole and isinstance(error, TypeError):
        return f"{whole} has no keys of its own, as {key}; it means: {_meaning(known[whole])}"
    if key in known:
        reason = str(error).splitlines()[0].replace("$VALUE_TYPE", "such a type")
        reason = reason.replace("$VALUE", str(value))
        return f"{key}={value!r}: {reason}; it means: {_meaning(known[key])}"
    groups = sorted({name.rpartition(".")[0] for name in known} - {""})
    if key in groups:
        return f"{key}={value!r}: a group of keys, not a value; set {key}.<key>"
    names = {name: name for name in known} | former_keys(kind)  # a former one may be mistyped too
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    tail = {name.rpartition(".")[2]: name for name in names}
    if not near and (also := difflib.get_close_matches(key.rpartition(".")[2], tail, n=1)):
        near = [tail[also[0]]]
    hint = f"; did you mean {names[near[0]]}?" if near else ""
    return f"{key}={value!r}: no such key{hint}"
