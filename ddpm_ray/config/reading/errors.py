"""The error of an invalid config, and its lines for wrong keys and values."""

from collections.abc import Iterable
from typing import Any

from ddpm_ray.config.option_fields import shown, walk
from ddpm_ray.config.reading.former_keys import former_keys
from ddpm_ray.config.reading.nearest import did_you_mean, nearest
from ddpm_ray.config.reading.option_text import choices, range_text, type_text
from ddpm_ray.config.reading.yaml_text import type_at


class ConfigError(ValueError):
    """An invalid config; one line for each bad key."""


def wrong_option(kind: Any, key: str, value: Any) -> str:
    """Return the error line of setting the dotted `key` of the config class `kind` to `value`.

    For an unknown key it names the nearest one; else the type or choices and the meaning.
    """
    known = {name: meta for name, _, meta in walk(kind())}
    if key in known:
        type_, meta = type_at(kind, key), known[key]
        if names := choices(type_):
            rule = f"choose from {', '.join(name or repr(name) for name in names)}"
            hint = did_you_mean(str(value), filter(None, names))
        else:
            rule, hint = f"give {type_text(type_)}", ""
        limits = ", ".join(filter(None, [rule, range_text(meta["limits"])]))
        return f"{key}={shown(value)}: {limits}; it means: {meta['doc']}{hint}"
    if key in option_groups(known):
        return f"{key}={shown(value)}: a group of keys, not a value; set {key}.<key>"
    return f"{key}={shown(value)}: no such key{nearest_key(kind, key)}"


def option_groups(keys: Iterable[str]) -> list[str]:
    """Return the groups of dotted `keys`, outer ones too, in their order."""
    found: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts)))
    return list(found)


def nearest_key(kind: Any, key: str, more: Iterable[str] = ()) -> str:
    """Return "; did you mean ...?" with the key nearest to `key`, or a hint at `--help`.

    Searches the options of `kind` and `more` names. A key without its group, and a mistyped former
    key, lead to the current key.
    """
    names = {name: name for name, _, _ in walk(kind())} | former_keys(kind)
    names |= {name: name for name in more}
    without_group = {name.rpartition(".")[2]: name for name in names}
    near = nearest(key, names, cutoff=0.5)
    near = near or without_group.get(nearest(key.rpartition(".")[2], without_group), "")
    return f"; did you mean {names[near]}?" if near else "; --help lists the keys"
