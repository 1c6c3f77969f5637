"""Standings of a sweep's trials: one row per trial, best first, and how its values are written.

Lower is better, but for the scores in HIGHER_IS_BETTER. Trials report 95 % intervals as
`<metric>_low` and `<metric>_high`. Missing values are None, shown as a dash; a score that is not
finite counts as missing.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from ddpm_ray.config.jobs.sweep import HIGHER_IS_BETTER
from ddpm_ray.redaction import counted
from ddpm_ray.sweep.trial_store import Status, Trial

# In the order of rows.
STATUSES: tuple[Status, ...] = ("finished", "running", "stopped", "pruned", "failed")
assert set(STATUSES) == set(get_args(Status))
MOST = 1e99  # larger values, of diverged runs, count as missing: sums would overflow
COLOURING = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # terminal colours, as in Ray's errors


@dataclass(frozen=True)
class Standing:
    """One trial of the leaderboard; None: not reported."""

    number: int
    label: str
    status: Status
    reason: str
    score: float | None
    low: float | None
    high: float | None
    loss: float | None  # its last common loss (early_stopping.py)
    step: int | None
    worker_s: float | None  # worker-seconds reserved
    busy_s: float | None  # worker-seconds spent on training
    core_s: float | None  # core-seconds of its training, and before it those of its latents
    run_id: str
    place: int | None = None  # rank among scored trials, from 1; equal scores share one
    like_best: bool = False  # not the best, but its interval overlaps the best one's

    @property
    def overhead_s(self) -> float | None:
        """Worker-seconds not spent on training: starting, saving, waiting."""
        if self.worker_s is None or self.busy_s is None:
            return None
        return max(0.0, self.worker_s - self.busy_s)


def standings(trials: Sequence[Trial], metric: str) -> list[Standing]:
    """Return one row per trial, best first: by status, then score, then loss."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    rows = sorted((_row(trial, metric) for trial in trials), key=lambda row: _rank(row, sign))
    scores = [sign * row.score for row in rows if row.score is not None]
    return [
        row
        if row.score is None
        else replace(
            row, place=1 + bisect_left(scores, sign * row.score), like_best=_overlap(row, rows[0])
        )
        for row in rows
    ]


def direction(metric: str) -> str:
    """Return which values of `metric` are better, in words."""
    return f"{'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better"


def digits(value: float | None) -> str:
    """Format `value` to four significant digits, trailing zeros kept; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}".removesuffix(".")


def integer(value: float | None) -> str:
    """Format `value` as 12,345; a dash for None."""
    return "-" if value is None else f"{value:,.0f}"


def interval(row: Standing) -> str:
    """Format the interval as `[low, high]`; "" if unknown."""
    known = row.low is not None and row.high is not None
    return f"[{digits(row.low)}, {digits(row.high)}]" if known else ""


def status_counts(rows: Sequence[Standing]) -> str:
    """Return the number of trials by status, as `12 finished, 3 failed`."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts[status])


def overhead(rows: Sequence[Standing]) -> str:
    """Return the share of worker-seconds not spent on training, over rows that report both."""
    reserved = sum(row.worker_s or 0.0 for row in rows if row.overhead_s is not None)
    return (
        f"{100 * sum(row.overhead_s or 0.0 for row in rows) / reserved:.0f} %" if reserved else "-"
    )


def summary(rows: Sequence[Standing]) -> str:
    """Return one sentence: how the trials ended and what they cost."""
    spent = integer(sum(row.worker_s or 0.0 for row in rows))
    return (
        f"{counted(len(rows), 'trial')}: {status_counts(rows) or 'none'}; {spent} worker-seconds, "
        f"overhead {overhead(rows)}."
    )


def _row(trial: Trial, metric: str) -> Standing:
    metrics, outcome = trial.metrics, trial.outcome
    newest = trial.validation_losses[-1] if trial.validation_losses else {}
    step = _number(outcome.get("step", newest.get("step")))
    return Standing(
        number=trial.number,
        label=_line(trial.label),
        status=trial.status,
        reason=_line(trial.reason),
        score=_number(metrics.get(metric)),
        low=_number(metrics.get(f"{metric}_low")),
        high=_number(metrics.get(f"{metric}_high")),
        loss=_number(newest.get("loss")),
        step=None if step is None else int(step),
        worker_s=_number(outcome.get("worker_s")),
        busy_s=_number(outcome.get("busy_s")),
        core_s=_number(outcome.get("core_s")),
        run_id=str(outcome.get("run_id") or ""),
    )


def _rank(row: Standing, sign: int) -> tuple[int, float, float, int]:
    score = math.inf if row.score is None else sign * row.score
    loss = math.inf if row.loss is None else row.loss
    return STATUSES.index(row.status), score, loss, row.number


def _overlap(row: Standing, best: Standing) -> bool:
    """Return whether the intervals of both overlap; False for the best row itself."""
    if row is best or row.low is None or row.high is None or best.low is None or best.high is None:
        return False
    return row.low <= best.high and best.low <= row.high


def _number(value: Any) -> float | None:
    """Return `value` if it is a number of usable size, else None."""
    usable = isinstance(value, int | float) and abs(value) < MOST
    return float(value) if usable else None


def _line(text: str) -> str:
    """Return `text` as one line without control characters."""
    return "".join(c for c in " ".join(COLOURING.sub("", text).split()) if c.isprintable())
