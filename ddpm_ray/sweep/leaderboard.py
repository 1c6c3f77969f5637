"""Leaderboard of a sweep's trials with 95 % intervals, as HTML, Markdown or text.

Lower is better throughout. Trials report intervals as `<metric>_low` and `<metric>_high`. Missing
values are None, shown as a dash; a score that is not finite counts as missing.
"""

import math
import re
import textwrap
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, get_args

from ddpm_ray.redaction import counted
from ddpm_ray.sweep.trial_store import Status, Trial

STATUSES: tuple[Status, ...] = (
    "finished",
    "running",
    "stopped",
    "pruned",
    "failed",
)  # in the order of rows
assert set(STATUSES) == set(get_args(Status))
TEXT_COLUMNS = 110
FULL_REASONS = 10  # failed trials whose full reason is printed below the table
LABEL_COLUMNS = 36  # longer labels are cut, so that the score fits
STRIP_PIXELS = 150  # width of the drawn interval
MOST = 1e99  # larger values, of diverged runs, count as missing: sums would overflow
COLOURING = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # terminal colours, as in Ray's errors

COVERS = (
    "The 95 % interval covers the randomness of sampling, not of training: with another training "
    "seed the same trial may score outside it."
)
ALIKE = "not distinguishable from the best: the intervals overlap."
NO_SCORE = (
    "Trials that were stopped early have no final score; they are ordered by the loss at which "
    "they were stopped."
)
OVERHEAD = (
    "Overhead is the share of worker-seconds not spent on training: starting, saving, waiting."
)


@dataclass(frozen=True)
class Row:
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
    run_id: str
    place: int | None = None  # rank among scored trials, from 1; equal scores share one
    like_best: bool = False  # not the best, but its interval overlaps the best one's

    @property
    def overhead_s(self) -> float | None:
        """Worker-seconds not spent on training: starting, saving, waiting."""
        if self.worker_s is None or self.busy_s is None:
            return None
        return max(0.0, self.worker_s - self.busy_s)


def standings(trials: Sequence[Trial], metric: str) -> list[Row]:
    """Return one row per trial, best first: by status, then score, then loss."""
    rows = sorted((_row(trial, metric) for trial in trials), key=_rank)
    scores = [row.score for row in rows if row.score is not None]
    return [
        row
        if row.score is None
        else replace(
            row, place=1 + bisect_left(scores, row.score), like_best=_overlap(row, rows[0])
        )
        for row in rows
    ]


def digits(value: float | None) -> str:
    """Format `value` to four significant digits, trailing zeros kept; a dash for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}".removesuffix(".")


def integer(value: float | None) -> str:
    """Format `value` as 12,345; a dash for None."""
    return "-" if value is None else f"{value:,.0f}"


def interval(row: Row) -> str:
    """Format the interval as `[low, high]`; "" if unknown."""
    known = row.low is not None and row.high is not None
    return f"[{digits(row.low)}, {digits(row.high)}]" if known else ""


def score_text(row: Row, metric: str) -> str:
    """Format the score with its interval, or else the last loss."""
    loss = f"loss {digits(row.loss)}"
    return loss if row.score is None else f"{metric} {digits(row.score)} {interval(row)}"


def cut(text: str, most: int) -> str:
    """Shorten `text` to at most `most` characters, ending with `...`."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def status_counts(rows: Sequence[Row]) -> str:
    """Return the number of trials by status, as `12 finished, 3 failed`."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]:,} {status}" for status in STATUSES if counts[status])


def overhead(rows: Sequence[Row]) -> str:
    """Return the share of worker-seconds not spent on training, over rows that report both."""
    reserved = sum(row.worker_s or 0.0 for row in rows if row.overhead_s is not None)
    return (
        f"{100 * sum(row.overhead_s or 0.0 for row in rows) / reserved:.0f} %" if reserved else "-"
    )


def summary(rows: Sequence[Row]) -> str:
    """Return one sentence: how the trials ended and what they cost."""
    spent = integer(sum(row.worker_s or 0.0 for row in rows))
    return (
        f"{counted(len(rows), 'trial')}: {status_counts(rows) or 'none'}; {spent} worker-seconds, "
        f"overhead {overhead(rows)}."
    )


def as_text(rows: Sequence[Row], metric: str = "score", most: int = 100) -> str:
    """Return a table of the first `most` rows, 110 columns wide, and why trials failed."""
    width = max([min(LABEL_COLUMNS, len(row.label)) for row in rows] + [len("values")])
    head = f"place  trial status   worker-s  {'values':{width}}  "
    lines = [head + f"{metric} [95 % interval], or why none"]
    for row in rows[:most]:
        place = "" if row.place is None else f"{row.place}{'~' if row.like_best else ' '}"
        facts = f"{place:>5} {row.number:>6} {row.status:8}"
        label = cut(row.label, width)
        lines.append(f"{facts} {integer(row.worker_s):>8}  {label:{width}}  {_result(row)}")
    if rest := rows[most:]:
        lines.append(f"... and {len(rest):,} more: {status_counts(rest)}")
    if any(row.like_best for row in rows[:most]):
        lines.append(f"~ {ALIKE}")
    lines = [cut(line, TEXT_COLUMNS) for line in lines]
    failed = [row for row in rows if row.status == "failed"]
    for row in failed[:FULL_REASONS]:  # the table shows only their beginning
        why = f"trial {row.number} failed: {row.reason}"
        lines += textwrap.wrap(why, TEXT_COLUMNS, subsequent_indent="    ")
    return "\n".join([*lines, cut(summary(rows), TEXT_COLUMNS)]) + "\n"


def as_markdown(rows: Sequence[Row], metric: str, top: int = 10) -> str:
    """Return the first `top` rows as a Markdown table, and a summary line."""
    lines = [
        f"| place | trial | values | {_plain(metric)} | 95 % interval | worker-s |",
        "| ---: | ---: | --- | ---: | :---: | ---: |",
    ]
    for row in rows[:top]:
        place = row.status if row.place is None else f"{row.place}{' ≈' if row.like_best else ''}"
        cells = place, f"{row.number}", cut(row.label, 80), digits(row.score), interval(row)
        lines.append(f"| {' | '.join(map(_plain, cells))} | {integer(row.worker_s)} |")
    alike = f" ≈ {ALIKE}" if any(row.like_best for row in rows[:top]) else ""
    return "\n".join([*lines, "", f"{summary(rows)} Lower is better.{alike}"]) + "\n"


def as_html(rows: Sequence[Row], metric: str, title: str) -> str:
    """Return an HTML page with all rows, without scripts and external files."""
    ends = [end for row in rows for end in (row.low, row.score, row.high) if end is not None]
    scale = (min(ends), max(ends)) if ends else (0.0, 1.0)
    spent = integer(sum(row.worker_s or 0.0 for row in rows))
    body = "\n".join(_html_row(row, scale) for row in rows)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{summary(rows)} Ordered by {escape(metric)}, lower is better.</p>
<table><thead><tr><th>place</th><th>trial</th><th class="l">values</th><th class="l">status</th>
<th>{escape(metric)}</th><th class="l" colspan="2">95 % interval</th><th>last loss</th><th>step</th>
<th>worker-s</th><th>overhead</th><th class="l">reason</th></tr></thead>
<tbody>
{body}
</tbody>
<tfoot><tr><td colspan="9">all trials</td><td>{spent}</td><td>{overhead(rows)}</td><td></td></tr>
</tfoot></table>
<p>≈ {ALIKE} {COVERS} {NO_SCORE} {OVERHEAD}</p>
</body></html>
"""


STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 1.5em; }
h1 { font-size: 1.3em; } p { max-width: 62em; } table { border-collapse: collapse; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; }
th { position: sticky; top: 0; background: #f2f2f2; white-space: nowrap; vertical-align: bottom; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.l { text-align: left; } .w { white-space: normal; overflow-wrap: anywhere; min-width: 20em; }
tr.best td { background: #d9ebf7; font-weight: 600; } tr.alike td { background: #eef6fb; }
tr.stopped td, tr.pruned td { color: #595959; } tr.failed .s { color: #b03a00; font-weight: 600; }
tfoot td { font-weight: 600; border-bottom: 0; } svg { display: block; }
"""


def _html_row(row: Row, scale: tuple[float, float]) -> str:
    kind = "best" if row.place == 1 else "alike" if row.like_best else row.status
    place = "" if row.place is None else f"{'≈ ' if row.like_best else ''}{row.place}"
    return (
        f'<tr class="{kind}"><td>{place}</td><td class="trial">{row.number}</td>'
        f'<td class="l w">{escape(row.label)}</td><td class="l s">{row.status}</td>'
        f'<td>{digits(row.score)}</td><td class="l">{interval(row)}</td>'
        f"<td>{_strip(row, scale)}</td><td>{digits(row.loss)}</td><td>{integer(row.step)}</td>"
        f"<td>{integer(row.worker_s)}</td><td>{overhead([row])}</td>"
        f'<td class="l w">{escape(row.reason)}</td></tr>'
    )


def _strip(row: Row, scale: tuple[float, float]) -> str:
    """Draw the interval as a line and the score as a dot, all rows on one scale.

    A range above a factor of 10 is drawn on a log scale: on a linear one a single bad trial would
    hide the differences between all others.
    """
    if row.score is None:
        return ""
    least, most = scale
    bend = math.log if least > 0 and most > 10 * least else float
    span = bend(most) - bend(least) or 1.0
    ends = row.score, row.low, row.high
    x, left, right = (
        f"{4 + (STRIP_PIXELS - 8) * (bend(row.score if e is None else e) - bend(least)) / span:.1f}"
        for e in ends
    )
    return (
        f'<svg width="{STRIP_PIXELS}" height="14" aria-hidden="true"><line x1="{left}" '
        f'x2="{right}" y1="7" y2="7" stroke="#0072B2" stroke-width="3" opacity=".5"/>'
        f'<circle cx="{x}" cy="7" r="2.5" fill="#0072B2"/></svg>'
    )


def _result(row: Row) -> str:
    if row.score is not None:
        return f"{digits(row.score):>7} {interval(row)}".rstrip()
    return row.reason or f"loss {digits(row.loss)}"


def _row(trial: Trial, metric: str) -> Row:
    metrics, outcome = trial.metrics, trial.outcome
    newest = trial.validation_losses[-1] if trial.validation_losses else {}
    step = _number(outcome.get("step", newest.get("step")))
    return Row(
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
        run_id=str(outcome.get("run_id") or ""),
    )


def _rank(row: Row) -> tuple[int, float, float, int]:
    score = math.inf if row.score is None else row.score
    loss = math.inf if row.loss is None else row.loss
    return STATUSES.index(row.status), score, loss, row.number


def _overlap(row: Row, best: Row) -> bool:
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


def _plain(text: str) -> str:
    """Escape `text` for Markdown, also inside a table cell."""
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in escape(text, quote=False))
