"""The printed table: a goal, what was measured in each round, its median, least and greatest."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WIDTHS = 46, 12, 26, 8, 6
HEADS = "ratio or figure", "goal", "median (least-greatest)", "reached", ""


@dataclass(frozen=True)
class Row:
    """A line of the table; `values` has one for each round."""

    title: str
    values: Sequence[float]
    at_most: float | None = None  # the goal
    at_least: float | None = None
    unit: str = ""

    @property
    def middle(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> str:
        """Whether the median reaches the goal; empty without a goal."""
        if self.at_most is None and self.at_least is None:
            return ""
        low = self.at_least is None or self.middle >= self.at_least
        return "yes" if low and (self.at_most is None or self.middle <= self.at_most) else "NO"

    def text(self) -> str:
        limits = ((">=", self.at_least), ("<=", self.at_most))
        goal = " ".join(f"{sign} {limit:g}" for sign, limit in limits if limit is not None)
        spread = f"{self.middle:.3g} ({min(self.values):.3g}-{max(self.values):.3g}) {self.unit}"
        return line(self.title, goal, spread.strip(), self.reached)


def line(*cells: str) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=False)).rstrip()


def heading(title: str) -> str:
    return "\n" + line(title, *HEADS[1:])


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that so many percent of the values do not pass; nan of none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
