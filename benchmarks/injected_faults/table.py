"""One row of benchmarks/faults.py, and how it shows what was measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    measure: str
    results: dict[str, str]  # what ours and plain came to
    goal: str
    met: bool
    ratio: str = ""  # ours to plain
    FORM: ClassVar[str] = "{:<36} {:>21} {:>21} {:>7} {:>12}  {}"
    HEAD: ClassVar[str] = FORM.format("", "ours", "plain", "ratio", "goal", "met")

    def __str__(self) -> str:
        ours, plain, met = self.results["ours"], self.results["plain"], "yes" if self.met else "NO"
        return self.FORM.format(self.measure, ours, plain, self.ratio, self.goal, met)


def shown(values: list[float], form: str = ".1f") -> str:
    """Median and range."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def seconds(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s
