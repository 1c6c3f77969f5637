"""Style of the charts of a sweep: a square canvas, its fonts, axes, colours and legend.

MLflow shows a logged picture 250 pixels wide and enlarges it when it is clicked. So a chart is laid
out for 250 pixels, with text of 9 pixels or more, and rendered four times as large. Only this file
and charts.py import matplotlib, and they do without pyplot: charts may be drawn in any thread.
"""

import io
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from PIL import Image

from ddpm_ray.sweep.leaderboard import cut
from ddpm_ray.sweep.standings import STATUSES

Style: TypeAlias = dict[str, Any]  # matplotlib's style arguments

# Okabe and Ito's colours, the most distinct first; markers repeat the code.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
MARKERS = "osD^X"
NAMED = len(COLOURS)  # curves with a colour and a line in the legend
PALE, GREY, DARK = "#8FB8D8", "#BBBBBB", "#595959"
STATUS_COLOURS: dict[str, str] = dict(
    zip(STATUSES, ("#0072B2", "#009E73", "#8C8C8C", "#E69F00", "#8B1A1A"), strict=True)
)
PIXELS, DPI = 1000, 400
TITLE_POINTS, TEXT_POINTS = 8, 7  # 7 points are 39 of 1000 pixels, so 10 of 250
NAME_LETTERS = 38  # of a legend with one column
WIDE = 12.0  # a range above this factor is drawn on a log axis
TICKS = 5  # at most, so that their labels do not touch


def canvas(title: str) -> tuple[Figure, Axes]:
    """Return an empty square figure and its axes."""
    figure = Figure(figsize=(PIXELS / DPI, PIXELS / DPI), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(escaped(title), x=0.01, ha="left", fontsize=TITLE_POINTS, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", lw=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT_POINTS, length=2, pad=2)
    return figure, axes


def curve_style(i: int) -> Style:
    """Return colour and marker of curve `i`; grey from NAMED on."""
    if i >= NAMED:
        return {"color": GREY, "marker": ".", "lw": 0.4, "ms": 2, "zorder": 1.5}
    return {
        "color": COLOURS[i],
        "marker": MARKERS[i],
        "lw": 1.0,
        "ms": 3,
        "zorder": 3 - i / NAMED,
    }


def scale_axis(
    axes: Axes, side: str, values: Iterable[float | None], title: str = "", wide: float = WIDE
) -> None:
    """Fit axis `side`, "x" or "y", to `values`; a log axis if their range exceeds `wide`."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    axis = axes.xaxis if side == "x" else axes.yaxis
    level = high - low <= 1e-6 * abs(high) + 1e-12
    margin = 0.1 * abs(high) + 1e-9 if level else 0.05 * (high - low)
    ends = low - margin, high + margin
    if high >= wide * low > 1e-12:
        margin = max(1.1, (high / low) ** 0.05)
        ends = low / margin, high * margin
        axes.set(**{f"{side}scale": "log"})
        axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(TICKS - 1))
    axes.set(**{f"{side}lim": ends})
    axis.set_major_formatter("{x:.10g}")
    if title:
        axis.set_label_text(escaped(title), fontsize=TEXT_POINTS)
        axis.labelpad = 1


def _log_ticks(low: float, high: float) -> list[float]:
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    if len(decades) > 3:
        return list(decades[:: 1 + len(decades) // TICKS])
    return list(np.outer(decades, [1, 2, 5]).ravel())


def render(figure: Figure, handles: Sequence[Artist]) -> Image.Image:
    """Render `figure`, with a legend below it, as an RGB image."""
    names = [escaped(cut(str(handle.get_label()), NAME_LETTERS)) for handle in handles]
    columns = 2 if max(map(len, names), default=0) <= NAME_LETTERS // 2 - 4 else 1
    figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=TEXT_POINTS,
        borderpad=0,
        borderaxespad=0.1,
        handlelength=1.2,
        handletextpad=0.5,
        labelspacing=0.25,
        columnspacing=1.0,
    )
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def escaped(text: str) -> str:
    """Escape `text` for matplotlib: no formula, only letters of its font."""
    return "".join(c if c < "\u0530" and c.isprintable() else "?" for c in text).replace("$", r"\$")
