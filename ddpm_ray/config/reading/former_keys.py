"""Former names of options: keys and choices of earlier versions, translated to current names.

An option lists its former keys in its metadata (`option_fields.option(formerly=...)`). Every source
of a config (YAML, command line, search space of a sweep, saved config) passes its dotted keys
through `translated`; all other code sees current names only.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

OTHER_KEY = re.compile(r"(?<!\\)\$\{([\w.]+)\}")  # in a value: the value of another key


@dataclass(frozen=True)
class Former:
    """A former key of an option, and the current names of its choices.

    A key without a dot is in the option's own group. A key with a dot starts at the job's config:
    `model.kind`, or `.film` for a key outside all groups. Several options may have the same former
    key: each translates the value with its own `choices`. Without a key, `choices` applies to the
    current key: Former(choices={"score": "gradient"}) renames a choice alone.
    """

    key: str = ""
    choices: Mapping[Any, Any] = field(default_factory=dict)  # former -> current; others unchanged


@dataclass(frozen=True)
class Given:
    """One option that was set."""

    key: str  # dotted, current name
    value: Any
    name: str  # the key as written by the user
    problem: str = ""  # why it cannot be translated; starts with the key


@dataclass
class _Names:
    """Current and former names of a config's options."""

    keys: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    former: dict[str, list[tuple[str, Mapping[Any, Any]]]] = field(default_factory=dict)
    former_groups: dict[str, str] = field(default_factory=dict)
    former_choices: dict[str, Mapping[Any, Any]] = field(default_factory=dict)  # of current keys
    key_kinds: dict[str, Any] = field(default_factory=dict)  # options whose values contain keys


def current_key(kind: Any, name: str) -> str:
    """Return the current name of the dotted key or group `name` of the config class `kind`."""
    return _targets(kind, name)[0][0]


def former_keys(kind: Any) -> dict[str, str]:
    """Return {former key: current key} of the config class `kind`."""
    return {name: targets[0][0] for name, targets in _names(kind).former.items()}


def translated(kind: Any, given: Iterable[tuple[str, Any]]) -> list[Given]:
    """Translate dotted keys and values `given` to the config class `kind` to current names.

    Unknown keys are returned unchanged.
    """
    return [one for name, value in given for one in _translated(kind, name, value)]


def named_twice(given: Iterable[Given]) -> dict[str, str]:
    """Return {key: error line} for each option that was set under two different names."""
    names: dict[str, list[str]] = {}
    for one in given:
        known = names.setdefault(one.key, [])
        known += [] if one.name in known else [one.name]
    return {
        key: f"{' and '.join(known)} are names of one option; give {key} alone"
        for key, known in names.items()
        if len(known) > 1
    }


def require_new_names(kind: Any) -> None:
    """Raise ValueError if a former key of `kind` is also a current option or group."""
    names = _names(kind)
    reused = {*names.former, *names.former_groups} & (names.keys | names.groups)
    if reused:
        raise ValueError(f"{kind.__name__}: {', '.join(sorted(reused))} cannot be a former key too")


def _translated(kind: Any, name: str, value: Any) -> Iterator[Given]:
    names = _names(kind)
    for key, choices in _targets(kind, name):
        now, problem = _with_current_references(kind, name, value), ""
        for renamed in (choices, names.former_choices.get(key, {})):
            now = _renamed(now, renamed)
        if key in names.key_kinds and isinstance(now, list | tuple):
            now, problem = _with_current_keys(names.key_kinds[key], now)
        yield Given(key, now, name, problem and f"{key}: {problem}")


def _targets(kind: Any, name: str) -> list[tuple[str, Mapping[Any, Any]]]:
    """The options that `name` sets, each with what its choices are called now."""
    names = _names(kind)
    if name in names.keys or name in names.groups:
        return [(name, {})]
    if name in names.former:
        return names.former[name]
    parts = name.split(".")
    for end in range(len(parts), 0, -1):  # the innermost group first
        if group := names.former_groups.get(".".join(parts[:end])):
            found = _targets(kind, ".".join([group, *parts[end:]]))
            if found[0][0] in names.keys | names.groups:
                return found
    return [(name, {})]


def _renamed(value: Any, choices: Mapping[Any, Any]) -> Any:
    """`value`, or each of a list of values, by the names of today."""
    if isinstance(value, list | tuple):
        return type(value)(_renamed(one, choices) for one in value)
    return choices.get(value, value) if choices and not isinstance(value, dict) else value


def _with_current_references(kind: Any, name: str, value: Any) -> Any:
    """`value`, of the option that was given as `name`, with each ${key} by the names of today."""
    moved = current_key(kind, name) != name

    def current(match: re.Match[str], at: list[str]) -> str:
        """The reference `match`, found in the value at the key `at`, with its current key."""
        key = match[1].lstrip(".")
        if dots := len(match[1]) - len(key):  # counts from what holds the value, as it was given
            key = ".".join([*at[:-dots], key])
        now = current_key(kind, key)
        return f"${{{now}}}" if now != key or (dots and moved) else match[0]

    def within(value: Any, at: list[str]) -> Any:
        if isinstance(value, list):
            return [within(one, [*at, str(number)]) for number, one in enumerate(value)]
        return OTHER_KEY.sub(lambda m: current(m, at), value) if isinstance(value, str) else value

    return within(value, name.split("."))


def _with_current_keys(kind: Any, mappings: Iterable[Any]) -> tuple[list[Any], str]:
    """Mappings whose keys are options of the class `kind`, by the names of today; what is wrong."""
    renamed = []
    for mapping in mappings:
        if not isinstance(mapping, Mapping):
            renamed.append(mapping)
            continue
        given = translated(kind, [(str(key), value) for key, value in mapping.items()])
        if twice := named_twice(given):
            return [], next(iter(twice.values()))
        for name in mapping:
            if len(now := [one.key for one in given if one.name == name]) > 1:
                return [], f"{name} is now {' and '.join(now)}; give these instead"
        renamed.append({one.key: one.value for one in given})
    return renamed, ""


@cache
def _names(kind: Any) -> _Names:
    names = _Names()
    _collect(kind, "", "", names)
    return names


def _collect(kind: Any, prefix: str, config: str, names: _Names) -> None:
    """Note the options of the group `kind`, whose keys begin with `prefix`.

    `config`: what the keys of the config begin with that former keys with a dot count from.
    """
    types = get_type_hints(kind)
    for item in fields(kind):
        key, below = f"{prefix}{item.name}", types[item.name]
        formerly = item.metadata.get("formerly", ())
        former = {
            (config if "." in one.key else prefix) + one.key.removeprefix("."): one
            for one in formerly
            if one.key
        }
        if is_dataclass(below):
            names.groups.add(key)
            names.former_groups |= dict.fromkeys(former, key)
            whole = item.metadata.get("whole_config", False)
            _collect(below, f"{key}.", f"{key}." if whole else config, names)
            continue
        names.keys.add(key)
        for name, one in former.items():
            names.former.setdefault(name, []).append((key, one.choices))
        for one in formerly:
            if not one.key:
                names.former_choices[key] = one.choices
        if group := item.metadata.get("keys_of"):
            names.key_kinds[key] = types[group]
