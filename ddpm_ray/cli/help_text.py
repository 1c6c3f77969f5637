"""The options of a job for `--help`, and one option or group of them for `--help KEY`."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from ddpm_ray.config.option_fields import walk
from ddpm_ray.config.reading.errors import ConfigError, nearest_key, option_groups
from ddpm_ray.config.reading.former_keys import current_key
from ddpm_ray.config.reading.option_text import choices, range_text, type_text, value_text
from ddpm_ray.config.reading.shipped import folder_of, shipped_names
from ddpm_ray.config.reading.yaml_text import type_at

OF_THE_MODEL = "sampling."  # jobs on a trained model take these options from it
KEY_COLUMNS = 38  # of the overview; longer keys have a line of their own


@dataclass(frozen=True)
class Option:
    """One option of a job."""

    key: str
    value: Any  # the default
    meta: Mapping[str, Any]
    type: Any
    required: bool
    of_the_model: bool

    @property
    def setting(self) -> str:
        """`key=default`, as it is typed; the key alone where the default is not its own."""
        if self.required or self.of_the_model:
            return self.key
        text = value_text(self.value)
        return f"{self.key}={text if len(text) <= 24 else text[:21] + '...'}"

    @property
    def meaning(self) -> str:
        """Its help text, with its choices or range."""
        names = [name or "empty" for name in choices(self.type)]
        rule = f"one of {', '.join(names)}" if names else range_text(self.meta["limits"])
        start = "required: " if self.required else ""
        return f"{start}{self.meta['doc']}{f' ({rule})' if rule else ''}"


def option_overview(kind: Any) -> str:
    """Return all options of the config class `kind` in titled groups."""
    return "\n\n".join(_sections(kind, ""))


def explained(kind: Any, key: str) -> str:
    """Return all about the option `key`, or the options of the group `key`.

    A former name means the current one. Raises ConfigError for an unknown key.
    """
    key = current_key(kind, key.partition("=")[0])
    known = {one.key: one for one in _options(kind)}
    if key in known:
        return _explained(known[key])
    if key not in (names := option_groups(known)):
        hint = nearest_key(kind, key, names)
        if key in shipped_names(kind):
            hint = f"; {key} is a config; --help lists the keys"
        raise ConfigError(f"command line: --help {key}: no such key{hint}")
    return "\n\n".join(_sections(kind, key))


@cache
def _options(kind: Any) -> list[Option]:
    required = set(required_keys(kind))
    trained = hasattr(kind, "sampling_problems")
    return [
        Option(
            key,
            value,
            meta,
            type_at(kind, key),
            key in required,
            trained and key.startswith(OF_THE_MODEL),
        )
        for key, value, meta in walk(kind())
    ]


def required_keys(kind: Any) -> Iterator[str]:
    """Yield the options of `kind` whose defaults, which are empty, are refused."""
    for line in kind().problems():
        key, mark, _ = line.partition(" is empty;")
        if mark:
            yield key


def _sections(kind: Any, group: str) -> Iterator[str]:
    """Yield the options of `group`, then those of each group in it, under a title."""
    inside = type_at(kind, group)
    own = [one for one in _options(kind) if one.key.rpartition(".")[0] == group]
    if own:
        model = " Default: as the model was trained." if own[0].of_the_model else ""
        title = _wrapped(_title(group or "general", inside) + model, "")
        yield "\n".join([*title, *(_entry(one.setting, one.meaning) for one in own)])
    for item in fields(inside):
        name = f"{group}.{item.name}" if group else item.name
        below = type_at(kind, name)
        if not is_dataclass(below):
            continue
        if item.metadata.get("whole_config") and not group:
            needed = [key for key in required_keys(kind) if key.startswith(f"{name}.")]
            text = f"the options of the job {folder_of(below)}; --help {name} lists them"
            more = f"; required: {', '.join(needed)}" if needed else ""
            yield "\n".join([*_wrapped(_title(name, below), ""), _entry(f"{name}.*", text + more)])
        else:
            yield from _sections(kind, name)


def _title(name: str, kind: Any) -> str:
    """The name of a group and the first sentence of the docstring of its class."""
    sentence, *_ = (kind.__doc__ or "").splitlines() or [""]
    return f"{name}: {sentence}"


def _entry(setting: str, meaning: str) -> str:
    start = f"  {setting}"
    lines = _wrapped(meaning, " " * KEY_COLUMNS)
    if len(start) + 2 > KEY_COLUMNS:
        return "\n".join([start, *lines])
    return "\n".join([start.ljust(KEY_COLUMNS) + lines[0].lstrip(), *lines[1:]])


def _explained(one: Option) -> str:
    if one.required:
        default = "none; the option is required"
    elif one.of_the_model:
        default = "as the model was trained"
    else:
        default = value_text(one.value) or "empty"
    names = [name or "empty" for name in choices(one.type)]
    rows = {
        "meaning": one.meta["doc"],
        "type": "" if names else type_text(one.type),
        "choices": ", ".join(names),
        "range": range_text(one.meta["limits"]),
        "default": default,
        "fixed": _fixed_text(one.meta),
    }
    lines = [one.key]
    for title, text in rows.items():
        if text:
            first, *rest = _wrapped(text, " " * 11)
            lines += [f"  {title:<9}{first.lstrip()}", *rest]
    return "\n".join(lines)


def _fixed_text(meta: Mapping[str, Any]) -> str:
    if not meta["defines_run"]:
        return ""
    named = ", unless change= names it" if meta["may_change"] else ""
    return f"a continued run must keep the value{named}"


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines of the terminal's width, at least 80 and at most 120; 100 where there is none."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    width = min(max(columns, 80), 120)
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
