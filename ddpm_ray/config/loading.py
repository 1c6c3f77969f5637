"""Read configs from YAML files and `key=value` arguments, and check them.

The only importer of OmegaConf. An option's metadata holds its help text, its range, and whether a
continued run must keep its value. Keys of earlier versions are translated first; see
former_keys.py.
"""

import copy
import difflib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from typing import Any, Protocol, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddpm_ray.config.errors import ConfigError as ConfigError
from ddpm_ray.config.former_keys import Former as Former
from ddpm_ray.config.former_keys import Given, former_keys, named_twice, translated
from ddpm_ray.config.option_fields import group as group
from ddpm_ray.config.option_fields import option as option
from ddpm_ray.config.option_fields import out_of_range, walk
from ddpm_ray.config.shipped import config_file
from ddpm_ray.config.yaml_text import read_scalar, read_text, require_shallow, type_at, with_texts
from ddpm_ray.redaction import NO_SECRET, has_secret, redacted, texts
from ddpm_ray.storage.file_formats import not_of_this_version

UNREADABLE = OmegaConfBaseException, TypeError  # TypeError: a key below an option that is a list
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
COMMAND_LINE = "command line"
Layer = tuple[str, list[Given]]  # source (file name or command line), and the options set there


def load(kind: type[Config], path: str | None, overrides: list[str]) -> Config:
    """Load a config from a YAML file (None: defaults) and `key=value` overrides, and check it.

    `path` may be the name of a config that the package ships.

    Raises ConfigError with one line for each bad key: source, key, value, rule, and the nearest
    valid name.
    """
    layers = [_layer(kind, path, _yaml(kind, path))] if path else []
    layers += [_layer(kind, COMMAND_LINE, _override(kind, text)) for text in overrides]
    layers = [*_loaded_groups(kind, layers), *layers]
    return _checked(kind, _defaults(kind), layers, path or COMMAND_LINE)


def given_keys(kind: type[Any], overrides: list[str]) -> frozenset[str]:
    """Return the dotted keys that `key=value` overrides set."""
    given = (_layer(kind, COMMAND_LINE, _override(kind, text))[1] for text in overrides)
    return frozenset(one.key for layer in given for one in layer)


def with_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Return `config` with the dotted keys of `values` set, and check the result.

    Raises ConfigError with one line, starting with `where`, for each bad key.
    """
    layer = _layer(type(config), where, values)
    return _checked(type(config), OmegaConf.structured(config), [layer], where)


def current_values(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, saved by this or an earlier version, under the current dotted keys."""
    return {one.key: one.value for one in translated(kind, values.items())}


def _layer(kind: type[Any], where: str, values: Mapping[str, Any]) -> Layer:
    given = translated(kind, _leaves(values))
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
    """For each of two options with one meaning (`option(instead_of=...)`), the other one."""
    pairs = {
        key: f"{key.rpartition('.')[0]}.{other}"
        for key, _, meta in walk(kind())
        if (other := meta["instead_of"])
    }
    return pairs | {other: key for key, other in pairs.items()}


@cache
def _structure(kind: type[Any]) -> Any:
    """The OmegaConf structure of the config `kind`, cached (0.1 s); do not modify it."""
    return OmegaConf.structured(kind)


def _defaults(kind: type[Any]) -> Any:
    """A copy of the structure of `kind` that may be modified."""
    return copy.deepcopy(_structure(kind))  # type: ignore[arg-type]  # a class is hashable


def _checked(kind: type[Config], merged: Any, layers: list[Layer], fallback: str) -> Config:
    """Merge the layers into `merged`, later ones over earlier ones, and check the result."""
    set_by: dict[str, str] = {}
    wrong = _named_twice(layers)  # one line for each key
    for where, layer in layers:
        seen: set[str] = set()
        for one in layer:
            key, value = one.key, one.value
            set_by[key] = where
            if key in wrong:
                continue
            if key in seen:  # set in its group and by its dotted name
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
    # Rules about several keys are checked only if each key could be read.
    for line in [*out_of_range(config), *([] if wrong else config.problems())]:
        key = line.partition(" ")[0]
        wrong.setdefault(key, f"{set_by.get(key, fallback)}: {line}")
    if wrong:
        raise ConfigError("\n".join(map(redacted, wrong.values())))
    return config


def _named_twice(layers: list[Layer]) -> dict[str, str]:
    """Return {key: error line} for each key that one source sets under two names."""
    places: dict[str, list[Given]] = {}
    for where, layer in layers:
        places.setdefault(where, []).extend(layer)
    lines = {
        f"{where}: {line.partition(';')[0]}": (key, f"{where}: {line}")  # one of each two options
        for where, given in places.items()
        for key, line in reversed(named_twice(given).items())
    }
    return dict(lines.values())


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in a YAML value: one with thousands of digits cannot be printed."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _integers(one)
    elif isinstance(value, dict):
        yield from _integers([*value.keys(), *value.values()])


def _strange_reference(value: Any) -> str:
    """Return why a `${...}` in `value` is not allowed, or an empty string."""
    if all(text.count("${") == len(REFERENCE.findall(text)) for text in texts(value)):
        return ""
    return (
        f"a value may refer to another key, as ${{data.url}}, or to ${{oc.env:NAME}} where NAME is "
        f"one of {', '.join(ENVIRONMENT)}; secrets stay in the environment"
    )


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
    """Return the config as nested plain values for JSON."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """Return the resolved config as YAML, for `--print-config`."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(config))
    return text


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
        OmegaConf.unsafe_merge(_defaults(kind), _nested(key, value))
    except UNREADABLE as error:
        return _complaint(kind, key, value, error)
    return ""


def help_lines(kind: type[Any]) -> list[str]:
    """Return one line per option for `--help`: dotted key, default, description with range."""
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
    file = config_file(kind, path)
    try:
        text = read_text(file)
        require_shallow(text)
        values = with_texts(kind, OmegaConf.to_container(OmegaConf.load(io.StringIO(text))), text)
    except Exception as error:  # the YAML reader's own errors name line and column
        raise ConfigError(redacted(f"{path}: {' '.join(str(error).split())}")) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}; give keys and values")
    return cast(dict[str, Any], values)


def unknown_keys(kind: type[Any], path: str) -> list[str]:
    """Return the dotted keys in the YAML file `path` that `kind` lacks. Raises ConfigError."""
    known = {name for name, _, _ in walk(kind())}
    groups = {name.rpartition(".")[0] for name in known}
    return [
        one.key
        for one in translated(kind, _leaves(_yaml(kind, path)))
        if one.key not in known | groups
        and not any(one.key.startswith(f"{name}.") for name in known)
    ]


def _loaded_groups(kind: type[Any], layers: list[Layer]) -> list[Layer]:
    """Read the files named by `loads_group` options, each as a layer below its group."""
    named = {
        item.metadata["loads_group"]: one.value
        for item in fields(kind)
        if item.metadata.get("loads_group")
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
