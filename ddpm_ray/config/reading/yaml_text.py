"""Text values of a config keep the characters that were typed: 2026_11_28, 007, 1e3, on, 1.10.

YAML reads each of these as a number or a truth value, and writes it back as another text. Which
values are text is known from the dataclass alone, so they are taken from YAML's nodes.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ddpm_ray.config.reading.former_keys import current_key

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as OmegaConf has it
DEEPEST = 50
MOST_BYTES = 16 * 2**20  # of a file: the betas of 100,000 steps take 2 MiB
A_CONFIG = "a config is a YAML file of keys and values"
NULLS = ("null", "Null", "NULL", "~")  # no text: quoted, it is one


def read_text(path: Path) -> str:
    """The text of the file of a config; raises ValueError for one that is no text, and OSError."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"is larger than {MOST_BYTES >> 20} MiB; {A_CONFIG}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"is not a text file in UTF-8; {A_CONFIG}") from None
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        raise ValueError(f"is not a text file: it holds the character {found[0]!r}; {A_CONFIG}")
    return text


def read_scalar(kind: type[Any], key: str, typed: str) -> str | None:
    """The text that was typed for `key` of the dataclass `kind` on a command line.

    None where YAML has to read it: the key is no text, or the value is null, a quoted text, a list
    or a mapping.
    """
    if not _is_text(type_at(kind, key)) or typed in NULLS or typed[:1] in tuple("'\"[{&*!|>%@`"):
        return None
    return typed


def require_shallow(text: str) -> None:
    """Raise ValueError where lists or mappings of YAML are nested deeper than any config's.

    Beyond some 10,000 levels libyaml overflows the stack, which ends the process without a word.
    """
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError(f"lists or mappings are nested deeper than {DEEPEST} levels")


def with_texts(kind: Any, value: Any, text: str, key: str = "") -> Any:
    """`value`, which YAML reads from `text`, with each of its texts as it was typed.

    It is of the dataclass `kind`, or of its dotted `key`.
    """
    node = yaml.compose(text, Loader=LOADER)
    return value if node is None else _kept(kind, key, type_at(kind, key), value, node)


def type_at(kind: Any, key: str) -> Any:
    """The type of the dotted `key` of a dataclass; None where there is no such key.

    A former key has the type of the one that it became; an empty one is the dataclass itself.
    """
    if not key:
        return kind
    if is_dataclass(kind):
        key = current_key(kind, key)
    for name in key.split("."):
        kind = _hints(kind).get(name) if isinstance(kind, type) and is_dataclass(kind) else None
    return kind


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _kept(root: Any, key: str, kind: Any, value: Any, node: yaml.Node) -> Any:
    """`value` of the type `kind`, which stands at the dotted `key` of the dataclass `root`."""
    match node:
        case yaml.ScalarNode(style=None | ""):  # plain: without quotes
            return node.value if _was_changed(kind, value, node.value) else value
        case yaml.MappingNode() if isinstance(value, dict):
            nodes = dict(_pairs(node))

            def kept(name: Any, inner: Any) -> Any:
                """`_kept` of the entry `name` of this mapping, whose parsed value is `inner`."""
                below = f"{key}.{name}" if key else str(name)
                groups = kind is None or is_dataclass(kind)  # None: a group that is no more
                there = type_at(root, below) if groups else _type_inside(kind)
                return _kept(root, below, there, inner, nodes[name]) if name in nodes else inner

            return {name: kept(name, inner) for name, inner in value.items()}
        case yaml.SequenceNode() if isinstance(value, list):
            item = next(iter(get_args(kind)), None) if get_origin(kind) in (tuple, list) else None
            pairs = zip(value, node.value, strict=True)
            return [_kept(root, key, item, inner, below) for inner, below in pairs]
    return value


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[Any, yaml.Node]]:
    """Keys and values; what a merge key (<<) brings comes first, so that the mapping's own wins."""
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            several = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in reversed(several):
                yield from _pairs(one)
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield key.value, value


def _type_inside(kind: Any) -> Any:
    arguments = get_args(kind)
    return arguments[1] if get_origin(kind) is dict and len(arguments) == 2 else None


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return kind is str


def _was_changed(kind: Any, value: Any, typed: str) -> bool:
    """Whether YAML made of a text something else; of `int | str`, plain digits are a number."""
    if value is None or isinstance(value, str):
        return False
    if get_origin(kind) in (Union, UnionType) and str in get_args(kind):
        return isinstance(value, bool) or not isinstance(value, int) or str(value) != typed
    return _is_text(kind)
