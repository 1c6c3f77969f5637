"""The error of an invalid config, and its lines for wrong keys and values."""

import difflib
from collections.abc import Iterable
from typing import Any

from ddpm_ray.config.option_fields import shown, walk
from ddpm_ray.config.reading.former_keys import former_keys
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
    if key in groups(known):
        return f"{key}={shown(value)}: a group of keys, not a value; set {key}.<key>"
    return f"{key}={shown(value)}: no such key{nearest_key(kind, key)}"


def groups(keys: Iterable[str]) -> list[str]:
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
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    tail = {name.rpartition(".")[2]: name for name in names}
    if not near and (also := difflib.get_close_matches(key.rpartition(".")[2], tail, n=1)):
        near = [tail[also[0]]]
    return f"; did you mean {names[near[0]]}?" if near else "; --help lists the keys"


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the name nearest to `text`; empty if none is near."""
    near = difflib.get_close_matches(text, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
