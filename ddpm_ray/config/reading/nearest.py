"""The nearest valid name, for the error of a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest(text: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the name most similar to `text`; empty if none reaches `cutoff`, 0 to 1 in difflib."""
    return next(iter(difflib.get_close_matches(text, list(names), n=1, cutoff=cutoff)), "")


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the name nearest to `text`; empty if none is near."""
    near = nearest(text, names)
    return f"; did you mean {near}?" if near else ""
