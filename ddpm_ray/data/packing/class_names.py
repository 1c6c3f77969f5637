"""From the labels that a source holds, numbers or names, to label numbers and class names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

MOST_CLASSES = 2**20  # one stray label of 10^12 would ask for as many names
LONGEST_NAME = 1000

Label = int | str | None  # None: no label


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Class names in the order of their labels: as numbers where all are whole numbers."""
    if all(is_whole_number(name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def is_whole_number(text: str) -> bool:
    """True for plain decimal digits, no more of them than any label has."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def checked(value: object, where: str) -> Label:
    """A label as JSON or a column holds it. Raises ValueError for what is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the label in {where} is {value!r:.60}; it must be a number or a name")
    if isinstance(value, str):
        if not value or len(value) > LONGEST_NAME:
            raise ValueError(f"the label in {where} has {len(value)} characters")
        return value
    if value < 0:
        raise ValueError(f"label {value} is negative")
    if value >= MOST_CLASSES:
        raise ValueError(f"label {value} is not below {MOST_CLASSES}")
    return value


def numbered(labels: Sequence[Label]) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and each label as a number; numbers stay as they are, -1 is none.

    Raises ValueError where some are numbers and others names.
    """
    kinds = {type(label) for label in labels} - {type(None)}
    if kinds == {int, str}:
        number = next(label for label in labels if isinstance(label, int))
        name = next(label for label in labels if isinstance(label, str))
        raise ValueError(f"some labels are numbers ({number}) and some are names ({name!r})")
    if kinds == {str}:
        names = in_order({label for label in labels if isinstance(label, str)})
        number_of = {name: number for number, name in enumerate(names)}
        return names, [number_of[label] if isinstance(label, str) else -1 for label in labels]
    numbers = [label if isinstance(label, int) else -1 for label in labels]
    return tuple(str(n) for n in range(1 + max(numbers, default=-1))), numbers
