"""Leaderboard of a sweep as text for the terminal and as Markdown for its run in MLflow."""

import textwrap
from collections.abc import Sequence
from html import escape

from ddpm_ray.sweep.standings import (
    Standing,
    digits,
    direction,
    integer,
    interval,
    status_counts,
    summary,
)

TEXT_COLUMNS = 110
FULL_REASONS = 10  # failed trials whose full reason is printed below the table
LABEL_COLUMNS = 36  # longer values are wrapped, so that the score fits
ALIKE = "not distinguishable from the best: the intervals overlap."


def as_text(rows: Sequence[Standing], metric: str = "score", most: int = 100) -> str:
    """Return a table of the first `most` rows, 110 columns wide, and why trials failed.

    Values too long for their column go on in the next line; reasons are cut.
    """
    width = max([len("values"), *(min(LABEL_COLUMNS, len(row.label)) for row in rows)])
    head = f"place  trial status   worker-s   core-s  {'values':{width}}  "
    lines = [head + f"{metric} [95 % interval], or why none"]
    for row in rows[:most]:
        place = "" if row.place is None else f"{row.place}{'~' if row.like_best else ' '}"
        facts = f"{place:>5} {row.number:>6} {row.status:8} {integer(row.worker_s):>8}"
        facts += f" {integer(row.core_s):>8}"
        label, *more = textwrap.wrap(row.label, width) or [""]
        lines.append(f"{facts}  {label:{width}}  {_result(row)}")
        lines += [" " * (len(facts) + 2) + part for part in more]
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


def as_markdown(rows: Sequence[Standing], metric: str, top: int = 10) -> str:
    """Return the first `top` rows as a Markdown table, and a summary line."""
    lines = [
        f"| place | trial | values | {_plain(metric)} | 95 % interval | worker-s | core-s |",
        "| ---: | ---: | --- | ---: | :---: | ---: | ---: |",
    ]
    for row in rows[:top]:
        place = row.status if row.place is None else f"{row.place}{' ≈' if row.like_best else ''}"
        cells = place, f"{row.number}", row.label, digits(row.score), interval(row)
        costs = f"{integer(row.worker_s)} | {integer(row.core_s)}"
        lines.append(f"| {' | '.join(map(_plain, cells))} | {costs} |")
    alike = f" ≈ {ALIKE}" if any(row.like_best for row in rows[:top]) else ""
    better = direction(metric).capitalize()
    return "\n".join([*lines, "", f"{summary(rows)} {better}.{alike}"]) + "\n"


def cut(text: str, most: int) -> str:
    """Shorten `text` to at most `most` characters, ending with `...`."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def _result(row: Standing) -> str:
    if row.score is not None:
        return f"{digits(row.score):>7} {interval(row)}".rstrip()
    return row.reason or f"loss {digits(row.loss)}"


def _plain(text: str) -> str:
    """Escape `text` for Markdown, also inside a table cell."""
    return "".join(f"\\{c}" if c in "\\`*_[]|~" else c for c in escape(text, quote=False))
