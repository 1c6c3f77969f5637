"""Convert the labels of a source, numbers or names, to label numbers and class names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MAX_CLASSES = 2**20  # a single wrong label of 10^12 would need as many names
MAX_NAME_LENGTH = 1000

Label = int | str | None  # None: no label


def sort_names(names: Collection[str]) -> tuple[str, ...]:
    """Sort class names: by value if all are whole numbers, else alphabetically."""
    if all(is_whole_number(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_whole_number(text: str) -> bool:
    """Return whether `text` is 1 to 18 ASCII digits."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def check_label(value: object, where: str) -> Label:
    """Check a label from JSON or from a table. Raises ValueError if it is invalid."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the label in {where} is {value!r:.60}; it must be a number or a name")
    if isinstance(value, str):
        if not value or len(value) > MAX_NAME_LENGTH:
            rule = f"it must have 1 to {MAX_NAME_LENGTH}"
            raise ValueError(f"the label in {where} has {len(value)} characters; {rule}")
        return value
    if value < 0:
        raise ValueError(f"label {value} is negative")
    if value >= MAX_CLASSES:
        raise ValueError(f"label {value} is too large; it must be below {MAX_CLASSES}")
    return value


def number_labels(labels: Sequence[Label]) -> tuple[tuple[str, ...], list[int]]:
    """Return the class names and each label as a number; numbers are unchanged, -1 means none.

    Raises ValueError if some labels are numbers and others are names.
    """
    kinds = {type(label) for label in labels} - {type(None)}
    if kinds == {int, str}:
        number = next(label for label in labels if isinstance(label, int))
        name = next(label for label in labels if isinstance(label, str))
        raise ValueError(f"some labels are numbers ({number}) and some are names ({name!r})")
    if kinds == {str}:
        names = sort_names({label for label in labels if isinstance(label, str)})
        number_of = {name: number for number, name in enumerate(names)}
        return names, [number_of[label] if isinstance(label, str) else -1 for label in labels]
    numbers = [label if isinstance(label, int) else -1 for label in labels]
    return tuple(str(n) for n in range(1 + max(numbers, default=-1))), numbers
