"""Leaderboard of a sweep as an HTML page, for its run in MLflow."""

import math
from collections.abc import Sequence
from html import escape

from ddpm_ray.sweep.leaderboard import ALIKE
from ddpm_ray.sweep.standings import (
    Standing,
    digits,
    direction,
    integer,
    interval,
    overhead,
    summary,
)

STRIP_PIXELS = 150  # width of the drawn interval

COVERS = (
    "The 95 % interval covers the randomness of sampling, not of training: with another training "
    "seed the same trial may score outside it."
)
NO_SCORE = (
    "Trials that were stopped early have no final score; they are ordered by the loss at which "
    "they were stopped."
)
OVERHEAD = (
    "Overhead is the share of worker-seconds not spent on training: starting, saving, waiting."
)

CORES = (
    "Core-seconds are those of training.core_seconds, with those of the autoencoder and the "
    "encoding of a trial's latents, where they are recorded."
)


def as_html(rows: Sequence[Standing], metric: str, title: str) -> str:
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
<p>{summary(rows)} Ordered by {escape(metric)}, {direction(metric)}.</p>
<table><thead><tr><th>place</th><th>trial</th><th class="l">values</th><th class="l">status</th>
<th>{escape(metric)}</th><th class="l" colspan="2">95 % interval</th><th>last loss</th><th>step</th>
<th>worker-s</th><th>overhead</th><th>core-s</th><th class="l">reason</th></tr></thead>
<tbody>
{body}
</tbody>
<tfoot><tr><td colspan="9">all trials</td><td>{spent}</td><td>{overhead(rows)}</td>
<td></td><td></td></tr>
</tfoot></table>
<p>≈ {ALIKE} {COVERS} {NO_SCORE} {OVERHEAD} {CORES}</p>
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


def _html_row(row: Standing, scale: tuple[float, float]) -> str:
    kind = "best" if row.place == 1 else "alike" if row.like_best else row.status
    place = "" if row.place is None else f"{'≈ ' if row.like_best else ''}{row.place}"
    return (
        f'<tr class="{kind}"><td>{place}</td><td class="trial">{row.number}</td>'
        f'<td class="l w">{escape(row.label)}</td><td class="l s">{row.status}</td>'
        f'<td>{digits(row.score)}</td><td class="l">{interval(row)}</td>'
        f"<td>{_strip(row, scale)}</td><td>{digits(row.loss)}</td><td>{integer(row.step)}</td>"
        f"<td>{integer(row.worker_s)}</td><td>{overhead([row])}</td><td>{integer(row.core_s)}</td>"
        f'<td class="l w">{escape(row.reason)}</td></tr>'
    )


def _strip(row: Standing, scale: tuple[float, float]) -> str:
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
