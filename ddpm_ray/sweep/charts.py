"""Pictures of a sweep: scores, losses, cost, and samples of its trials side by side.

Each function returns None if there is nothing to draw. Charts stay readable with a thousand trials:
the best few have a colour and a name, the others are grey. They use matplotlib's Figure without
pyplot, so they may be drawn in any thread.
"""

import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont

from ddpm_ray.sampling.image_grid import GUTTER_PIXELS
from ddpm_ray.sweep.leaderboard import cut
from ddpm_ray.sweep.standings import MOST, STATUSES, Row, integer, score_text, standings, summary
from ddpm_ray.sweep.trial_names import T_KEY, short_name
from ddpm_ray.sweep.trial_store import Trial
from ddpm_ray.training.sample_grids import GRID_IMAGES

Style: TypeAlias = dict[str, Any]  # matplotlib's style arguments
Curve: TypeAlias = tuple[Trial, np.ndarray[Any, np.dtype[np.float64]]]  # its points [n, 2]

# Okabe and Ito's colours without yellow, which is invisible on white; markers repeat the code.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7A5C00")
MARKERS = "osD^vPX*"
NAMED = len(COLOURS)  # trials with a colour and a line in the legend
PALE, GREY, DARK = "#8FB8D8", "#BBBBBB", "#595959"
STATUS_COLOURS: dict[str, str] = dict(
    zip(STATUSES, ("#0072B2", "#009E73", "#8C8C8C", "#E69F00", "#8B1A1A"), strict=True)
)
TITLE_POINTS, TEXT_POINTS, SMALL_POINTS = 13, 11, 9.5
WIDE = 12.0  # a range above this factor is drawn on a log axis
CROWD = 100  # from this number of trials on, marks are small and lines thin
NAME_LETTERS = 44
SHEET_ROWS, CELL_PIXELS, CAPTION_PIXELS, LINE_PIXELS = 40, 128, 340, 18


def fid_against_T(trials: Sequence[Trial], metric: str) -> Image.Image | None:  # noqa: N802
    """Plot final score with interval against T, one line for each schedule."""
    steps = {t.number: int(t.values.get(T_KEY, t.outcome.get("num_steps")) or 0) for t in trials}
    schedules = {
        trial.number: short_name(trial.values, without=T_KEY) or "all trials" for trial in trials
    }
    rows = [row for row in standings(trials, metric) if steps[row.number] > 0]
    unscored = [row for row in rows if row.score is None]
    if len(unscored) == len(rows):
        return None
    lines: dict[str, list[Row]] = defaultdict(list)  # the best schedule first, as in `rows`
    for row in rows[: len(rows) - len(unscored)]:
        lines[schedules[row.number]].append(row)
    note = f"best: trial {rows[0].number}, T={steps[rows[0].number]}, {score_text(rows[0], metric)}"
    figure, axes = _canvas(f"{metric} against T, lower is better", note)
    handles: list[Artist] = []
    for i, (name, members) in enumerate(lines.items()):
        members.sort(key=lambda row: steps[row.number])
        shift = 1 + 0.012 * (i - min(len(lines), NAMED) // 2) * (i < NAMED)  # no overlapping bars
        x = np.array([steps[row.number] for row in members]) * shift
        y, low, high = np.array([(r.score, r.low, r.high) for r in members], float).T
        style = _style(i) if i < NAMED else {"color": GREY, "marker": ".", "lw": 0.6, "zorder": 1.5}
        _, lowest = np.unique(x, return_index=True)  # the line joins the best score at each T
        handles += axes.plot(x[lowest], y[lowest], ms=5, label=name, **style)[: i < NAMED]
        axes.plot(x, y, ms=5, **style | {"ls": ""})
        axes.vlines(x, low, high, color=style["color"], zorder=style["zorder"])
    if others := len(lines) - len(handles):
        handles.append(Line2D([], [], color=GREY, marker=".", label=f"others ({others:,})"))
    if unscored:
        x, bottom = np.array([steps[row.number] for row in unscored]), axes.get_xaxis_transform()
        marks: Style = {"color": STATUS_COLOURS["stopped"], "ms": 5, "transform": bottom}
        handles += axes.plot(x, 0 * x + 0.015, "x", label=f"without score ({len(x):,})", **marks)
    ends = [end for row in rows for end in (row.score, row.low, row.high)]
    _scale(axes, "y", ends, f"{metric}, bars: 95 % interval")
    _scale(axes, "x", [steps[row.number] for row in rows], "T, diffusion steps", wide=3)
    if len(distinct := sorted({steps[row.number] for row in rows})) <= NAMED:
        axes.xaxis.set_major_locator(FixedLocator(distinct))
    return _picture(figure, handles, "schedules, best first")


def score_curves(trials: Sequence[Trial]) -> Image.Image | None:
    """Plot the common loss against steps, and mark where trials were stopped or failed."""
    points = [
        (trial, [(one["step"], one.get("loss")) for one in trial.validation_losses])
        for trial in _ranked(trials)
    ]
    curves = _finite((trial, np.array(pairs, float)) for trial, pairs in points)
    if not curves:
        return None
    figure, axes = _canvas("Common loss, lower is better", "at noise levels that all trials share")
    handles = _draw(axes, curves)
    for status, marker in (("stopped", "x"), ("failed", "v")):
        ends = np.array([curve[-1] for trial, curve in curves if trial.status == status])
        if len(ends):
            style: Style = {
                "ls": "",
                "marker": marker,
                "color": STATUS_COLOURS[status],
                "zorder": 3,
            }
            handles += axes.plot(*ends.T, ms=5, label=f"{status} here ({len(ends):,})", **style)
    steps, losses = np.concatenate([curve for _, curve in curves]).T
    _scale(axes, "y", losses, "common loss")
    _scale(axes, "x", steps, "optimiser steps")
    return _picture(figure, handles, "trials, lowest last loss first")


def loss_by_log_snr(
    trials: Sequence[Trial], levels: Sequence[float], guess: Sequence[float] | None = None
) -> Image.Image | None:
    """Plot each trial's newest validation loss against log-SNR, divided by `guess` if given.

    `guess` is the loss of the best linear predictor. Losses span decades along log-SNR while trials
    differ by percents at each level; the ratio shows both.
    """
    x, unit = np.array(levels, float), np.array(1.0 if guess is None else guess, float)
    newest = [
        (trial, trial.validation_losses[-1].get("spectrum") or ()) for trial in _ranked(trials)
    ]
    known = [(trial, np.array(loss, float)) for trial, loss in newest if len(loss) == len(x)]
    with np.errstate(all="ignore"):  # infinite values are dropped
        curves = _finite([(trial, np.c_[x, loss / unit]) for trial, loss in known])
    if not curves:
        return None
    note = "left: almost pure noise; right: almost clean images"
    figure, axes = _canvas("Validation loss by noise level, last measured, lower is better", note)
    handles = _draw(axes, curves)
    losses = np.concatenate([curve[:, 1] for _, curve in curves])
    if guess is not None:
        losses = np.append(losses, 1.0)
        handles.append(axes.axhline(1, color="black", ls="--", zorder=4, label="linear guess"))
    title = "loss" if guess is None else "loss / loss of the linear guess"
    _scale(axes, "y", losses, title)
    _scale(axes, "x", levels, "log-SNR")
    return _picture(figure, handles, "trials, lowest last loss first")


def cost_bars(trials: Sequence[Trial]) -> Image.Image | None:
    """Plot worker-seconds by trial, most expensive first; the pale end is overhead."""
    rows = [row for row in standings(trials, "") if row.worker_s]
    if not rows:
        return None
    rows.sort(key=lambda row: (STATUSES.index(row.status), -(row.worker_s or 0)))
    note = f"{summary(rows)} Left out, cost unknown: {len(trials) - len(rows):,}."
    height = min(9.0, max(3.0, 1.6 + 0.2 * len(rows)))
    figure, axes = _canvas("Cost of each trial, shorter is cheaper", note, height)
    heights, thick = np.arange(len(rows)), 0.8 if len(rows) < CROWD else 1.0
    reserved, idle = np.array([(row.worker_s, row.overhead_s or 0) for row in rows], float).T
    busy = reserved - idle
    colours = [STATUS_COLOURS[row.status] for row in rows]
    axes.barh(heights, busy, thick, color=colours, lw=0)
    axes.barh(heights, idle, thick, left=busy, color=colours, lw=0, alpha=0.4)
    names = {t.number: _shown(cut(f"{t.number}: {t.label}", NAME_LETTERS)) for t in trials}
    labels = [names[row.number] for row in rows] if len(rows) <= SHEET_ROWS else []
    axes.set_yticks(heights[: len(labels)], labels)
    axes.set(ylim=(len(rows) - 0.5, -0.5), ylabel="trials")
    axes.yaxis.grid(False)
    _scale(axes, "x", [0, *reserved], "worker-seconds")
    axes.set_xlim(left=0)
    handles: list[Artist] = []
    for status, colour in STATUS_COLOURS.items():
        if members := [row for row in rows if row.status == status]:
            spent = integer(sum(row.worker_s or 0 for row in members))
            handles.append(Patch(color=colour, label=f"{status} ({len(members):,}): {spent} s"))
    handles.append(Patch(color=DARK, alpha=0.4, lw=0, label="overhead: starting, saving, waiting"))
    return _picture(figure, handles, "how trials ended")


def contact_sheet(
    trials: Sequence[Trial], grids: Mapping[int, Image.Image], metric: str, columns: int = 8
) -> Image.Image | None:
    """Draw a row of samples for each trial, all from the same noise, the best trial first.

    `grids` are the trials' square grids of 64 samples, by trial number; a row shows the first
    `columns` samples, reduced if wider than 128 pixels.
    """
    rows = [row for row in standings(trials, metric) if row.number in grids]
    if not rows:
        return None
    names = {trial.number: trial.label for trial in trials}
    strips = [_first_images(grids[row.number], columns) for row in rows[:SHEET_ROWS]]
    heights = [max(strip.height, 3 * LINE_PIXELS + 4) for strip in strips]
    width, top = CAPTION_PIXELS + max(strip.width for strip in strips), 3 * LINE_PIXELS
    sheet = Image.new("RGB", (max(width, 640), top + sum(heights)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    note = f"{len(strips)} of {len(trials):,} trials; left out: "
    note += f"{len(trials) - len(rows):,} without samples, {len(rows) - len(strips):,} for space"
    pen.text((8, 4), f"Samples from the same noise, best {metric} first", fill="black", font=font)
    pen.text((8, 8 + LINE_PIXELS), note, fill=DARK, font=font)
    for row, strip, height in zip(rows, strips, heights, strict=False):
        place = row.status if row.place is None else f"place {row.place}"
        place += " (like the best)" if row.like_best else ""
        lines = f"{place}, trial {row.number}", names[row.number], score_text(row, metric)
        for i, line in enumerate(lines):
            ink, y = DARK if i else "black", top + i * LINE_PIXELS + 4
            pen.text((8, y), cut(line, NAME_LETTERS), fill=ink, font=font)
        sheet.paste(strip, (CAPTION_PIXELS, top))
        top += height
    return sheet


def _first_images(grid: Image.Image, count: int) -> Image.Image:
    """Return the first `count` images of a square grid of 64 (image_grid.py), side by side."""
    across = round(GRID_IMAGES**0.5)
    width, height = ((side - GUTTER_PIXELS) // across for side in grid.size)
    strip = Image.new("RGB", (count * width + GUTTER_PIXELS, height + GUTTER_PIXELS), "white")
    for i in range(count):
        x, y = i % across * width, i // across * height
        box = x, y, x + width + GUTTER_PIXELS, y + height + GUTTER_PIXELS
        strip.paste(grid.crop(box), (i * width, 0))
    return strip.reduce(max(1, -(-width // (CELL_PIXELS + GUTTER_PIXELS))))


def _finite(curves: Iterable[Curve]) -> list[Curve]:
    """Drop points that are not finite or too large, and curves without points."""
    known = [(trial, points[(np.abs(points) < MOST).all(axis=1)]) for trial, points in curves]
    return [(trial, points) for trial, points in known if len(points)]


def _draw(axes: Axes, curves: Sequence[Curve]) -> list[Artist]:
    """Draw all curves, the first in colour and on top; returns the legend's handles."""
    active = [curve for curve in curves if curve[0].status in ("finished", "running")]
    ended = [points for trial, points in curves if trial.status not in ("finished", "running")]
    handles: list[Artist] = []
    for i, (trial, points) in enumerate(active[:NAMED]):
        handles += axes.plot(*points.T, ms=4, label=f"{trial.number}: {trial.label}", **_style(i))
    others = [points for _, points in active[NAMED:]]
    for crowd, colour, word in ((others, PALE, "others"), (ended, GREY, "stopped or failed")):
        if crowd:
            style: Style = {"colors": colour, "linewidths": 0.9 if len(curves) < CROWD else 0.4}
            axes.add_collection(LineCollection(crowd, zorder=1.8 - len(handles) / 100, **style))
            handles.append(Line2D([], [], color=colour, label=f"{word} ({len(crowd):,})"))
    return handles


def _style(i: int) -> Style:
    return {"color": COLOURS[i], "marker": MARKERS[i], "lw": 1.7, "zorder": 3 - i / NAMED}


def _canvas(title: str, note: str, height: float = 5.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(12, height), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(_shown(title), x=0.01, ha="left", fontsize=TITLE_POINTS, fontweight="bold")
    axes.set_title(_shown(note), loc="left", fontsize=SMALL_POINTS, color=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E6E6E6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL_POINTS)
    return figure, axes


def _scale(
    axes: Axes, side: str, values: Iterable[float | None], title: str, wide: float = WIDE
) -> None:
    """Fit an axis to `values`; a log axis if their range exceeds the factor `wide`."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    axis = axes.xaxis if side == "x" else axes.yaxis
    level = high - low <= 1e-6 * abs(high) + 1e-12
    margin = 0.1 * abs(high) + 1e-9 if level else 0.04 * (high - low)
    ends = low - margin, high + margin
    if high >= wide * low > 1e-12:
        title += " (log axis)"
        margin = max(1.1, (high / low) ** 0.04)
        ends = low / margin, high * margin
        axes.set(**{f"{side}scale": "log"})
        decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        ticks = (
            decades[:: 1 + len(decades) // 9]
            if len(decades) > 4
            else np.outer(decades, [1, 2, 5]).ravel()
        )
        axis.set_major_locator(FixedLocator(ticks.tolist()))
        axis.set_minor_locator(NullLocator())
    axes.set(**{f"{side}lim": ends})
    axis.set_major_formatter("{x:,.10g}")
    axis.set_label_text(_shown(title), fontsize=TEXT_POINTS)


def _picture(figure: Figure, handles: Sequence[Artist], title: str) -> Image.Image:
    """Render `figure`, with its legend, as an image."""
    labels = [_shown(cut(str(handle.get_label()), NAME_LETTERS)) for handle in handles]
    style: Style = {"alignment": "left", "frameon": False, "fontsize": SMALL_POINTS}
    figure.legend(handles, labels, loc="outside right upper", title=title, **style)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image.open(png).convert("RGB")


def _shown(text: str) -> str:
    """Escape `text` for matplotlib: no formula, only letters of its font."""
    return "".join(c if c < "\u0530" and c.isprintable() else "?" for c in text).replace("$", r"\$")


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with a validation loss: finished first, then by last common loss."""
    compared = {trial.number: trial for trial in trials if trial.validation_losses}
    return [compared[row.number] for row in standings([*compared.values()], "")]
