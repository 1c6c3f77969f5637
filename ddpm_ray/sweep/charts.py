"""Charts of a sweep: scores, losses and cost of its trials.

Each function returns None if there is nothing to draw. Charts stay readable with a thousand trials:
the best few have a colour and a name, the others are grey.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator
from PIL import Image

from ddpm_ray.redaction import counted
from ddpm_ray.sweep.chart_style import (
    DARK,
    GREY,
    NAMED,
    PALE,
    STATUS_COLOURS,
    TEXT_POINTS,
    TICKS,
    Style,
    canvas,
    curve_style,
    render,
    scale_axis,
)
from ddpm_ray.sweep.standings import MOST, STATUSES, integer, standings
from ddpm_ray.sweep.trial_names import T_KEY, short_name
from ddpm_ray.sweep.trial_store import Trial

Curve: TypeAlias = tuple[Trial, np.ndarray[tuple[int, int], np.dtype[np.float64]]]  # points [n, 2]

CROWD = 100  # from this number of trials on, lines are thin
LABELLED_BARS = 20  # with more trials their numbers would not be readable


class _Point(NamedTuple):
    """A trial in a chart against T."""

    schedule: int  # index of its schedule, the best first
    T: int
    value: float | None
    low: float | None = None  # 95 % interval
    high: float | None = None


def score_against_T(trials: Sequence[Trial], metric: str) -> Image.Image | None:  # noqa: N802
    """Plot final score with its 95 % interval against T, one line for each schedule."""
    names, places = _schedules(trials, metric)
    points = [
        _Point(*places[row.number], row.score, row.low, row.high)
        for row in standings(trials, metric)
        if row.number in places
    ]
    return _against_T(f"{metric} against T", names, points, "no score, stopped early or failed")


def loss_against_T(trials: Sequence[Trial], metric: str) -> Image.Image | None:  # noqa: N802
    """Plot the common loss at the last step that all compared trials reached, against T.

    Early stopping leaves few final scores; at this step trials that were stopped are compared too.
    Schedules have the colours that they have in `score_against_T`.
    """
    step = shared_step(trials)
    if step is None:
        return None
    names, places = _schedules(trials, metric)
    losses = {t.number: _losses(t).get(step) for t in trials}
    points = [_Point(*place, losses[number]) for number, place in places.items()]
    return _against_T(f"Common loss at step {step} against T", names, points, "")


def shared_step(trials: Sequence[Trial]) -> int | None:
    """Return the last step at which all trials with a common loss have one; None if none."""
    steps = [set(_losses(trial)) for trial in trials if _losses(trial)]
    return max(set.intersection(*steps), default=None) if steps else None


def common_loss(trials: Sequence[Trial]) -> Image.Image | None:
    """Plot the common loss against steps, and mark where trials were stopped or failed."""
    points = [(trial, np.array([*_losses(trial).items()], float)) for trial in _ranked(trials)]
    curves = [(trial, curve) for trial, curve in points if len(curve)]
    if not curves:
        return None
    figure, axes = canvas("Common loss against optimiser step")
    handles = _draw(axes, curves)
    for status, marker in (("stopped", "x"), ("failed", "v")):
        ends = np.array([curve[-1] for trial, curve in curves if trial.status == status])
        if len(ends):
            style: Style = {"ls": "", "marker": marker, "color": STATUS_COLOURS[status], "ms": 3}
            label = f"{status} here ({len(ends):,})"
            handles += axes.plot(*ends.T, label=label, zorder=3, **style)
    steps, losses = np.concatenate([curve for _, curve in curves]).T
    scale_axis(axes, "y", losses)
    scale_axis(axes, "x", steps)
    return render(figure, handles)


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
    figure, axes = canvas("Validation loss by log-SNR")
    handles = _draw(axes, curves)
    losses = np.concatenate([curve[:, 1] for _, curve in curves])
    if guess is not None:
        losses = np.append(losses, 1.0)
        label = "1: loss of the best linear predictor"
        handles.append(axes.axhline(1, color="black", ls="--", lw=0.8, zorder=4, label=label))
    scale_axis(axes, "y", losses)
    scale_axis(axes, "x", levels, "noise  <  log-SNR  <  image")
    return render(figure, handles)


def cost_bars(trials: Sequence[Trial]) -> Image.Image | None:
    """Plot worker-seconds by trial, most expensive first; the pale end is overhead."""
    rows = [row for row in standings(trials, "") if row.worker_s]
    if not rows:
        return None
    rows.sort(key=lambda row: (STATUSES.index(row.status), -(row.worker_s or 0)))
    figure, axes = canvas("Worker-seconds of each trial")
    heights, thick = np.arange(len(rows)), 0.8 if len(rows) < CROWD else 1.0
    reserved, idle = np.array([(row.worker_s, row.overhead_s or 0) for row in rows], float).T
    busy = reserved - idle
    colours = [STATUS_COLOURS[row.status] for row in rows]
    axes.barh(heights, busy, thick, color=colours, lw=0)
    axes.barh(heights, idle, thick, left=busy, color=colours, lw=0, alpha=0.4)
    labels = [f"{row.number}" for row in rows] if len(rows) <= LABELLED_BARS else []
    axes.set_yticks(heights[: len(labels)], labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_ylabel("trial" if labels else counted(len(rows), "trial"), fontsize=TEXT_POINTS)
    axes.yaxis.grid(False)
    scale_axis(axes, "x", [0, *reserved])
    axes.set_xlim(left=0)
    handles: list[Artist] = []
    for status, colour in STATUS_COLOURS.items():
        if members := [row for row in rows if row.status == status]:
            spent = integer(sum(row.worker_s or 0 for row in members))
            handles.append(Patch(color=colour, label=f"{status} ({len(members):,}): {spent} s"))
    handles.append(Patch(color=DARK, alpha=0.4, lw=0, label="pale: starting, saving, waiting"))
    return render(figure, handles)


def _schedules(
    trials: Sequence[Trial], metric: str
) -> tuple[list[str], dict[int, tuple[int, int]]]:
    """Return the names of the schedules, the best first, and (schedule, T) of each trial with a T.

    A schedule is the trial's values without T.
    """
    by_number = {trial.number: trial for trial in trials}
    names: dict[str, int] = {}
    places = {}
    for row in standings(trials, metric):
        trial = by_number[row.number]
        if T := int(trial.values.get(T_KEY, trial.outcome.get("num_steps")) or 0):
            name = short_name(trial.values, without=T_KEY) or "all trials"
            places[row.number] = names.setdefault(name, len(names)), T
    return [*names], places


def _against_T(  # noqa: N802
    title: str, names: Sequence[str], points: Sequence[_Point], without: str
) -> Image.Image | None:
    """Plot `points` with their intervals; `without` names those without value, "" hides them."""
    known = [point for point in points if point.value is not None]
    if not known:
        return None
    figure, axes = canvas(title)
    handles: list[Artist] = []
    for i in sorted({point.schedule for point in known}):
        members = sorted((p for p in known if p.schedule == i), key=lambda p: (p.T, p.value))
        shift = 1 + 0.02 * (i - min(len(names), NAMED) // 2) * (i < NAMED)  # no overlapping bars
        x = np.array([point.T for point in members]) * shift
        y, low, high = np.array([(p.value, p.low, p.high) for p in members], float).T
        style = curve_style(i)
        _, best = np.unique(x, return_index=True)  # the line joins the lowest value at each T
        handles += axes.plot(x[best], y[best], label=names[i], **style)[: i < NAMED]
        axes.plot(x, y, **style | {"ls": ""})
        axes.vlines(x, low, high, color=style["color"], lw=style["lw"], zorder=style["zorder"])
    if others := len({point.schedule for point in known} - set(range(NAMED))):
        handles.append(Line2D([], [], color=GREY, marker=".", label=f"others ({others:,})"))
    if without and (missing := [point.T for point in points if point.value is None]):
        x, bottom = np.array(missing), axes.get_xaxis_transform()
        marks: Style = {"color": STATUS_COLOURS["stopped"], "ms": 3, "transform": bottom}
        handles += axes.plot(x, 0 * x + 0.03, "x", label=f"{without} ({len(x):,})", **marks)
    scale_axis(axes, "y", [end for p in known for end in (p.value, p.low, p.high)])
    scale_axis(axes, "x", [point.T for point in points], "T", wide=3)
    if len(distinct := sorted({point.T for point in points})) <= TICKS:
        axes.xaxis.set_major_locator(FixedLocator(distinct))
    return render(figure, handles)


def _draw(axes: Axes, curves: Sequence[Curve]) -> list[Artist]:
    """Draw all curves, the first in colour and on top; returns the legend's handles."""
    active = [curve for curve in curves if curve[0].status in ("finished", "running")]
    ended = [points for trial, points in curves if trial.status not in ("finished", "running")]
    handles: list[Artist] = []
    for i, (trial, points) in enumerate(active[:NAMED]):
        handles += axes.plot(*points.T, label=trial.title, **curve_style(i))
    others = [points for _, points in active[NAMED:]]
    for crowd, colour, word in ((others, PALE, "others"), (ended, GREY, "stopped or failed")):
        if crowd:
            style: Style = {"colors": colour, "linewidths": 0.7 if len(curves) < CROWD else 0.3}
            axes.add_collection(LineCollection(crowd, zorder=1.8 - len(handles) / 100, **style))
            handles.append(Line2D([], [], color=colour, label=f"{word} ({len(crowd):,})"))
    return handles


def _losses(trial: Trial) -> dict[int, float]:
    """Return the trial's common losses by step, without those that are not finite or too large."""
    pairs = [(one["step"], one.get("loss")) for one in trial.validation_losses]
    return {step: loss for step, loss in pairs if loss is not None and abs(loss) < MOST}


def _finite(curves: Iterable[Curve]) -> list[Curve]:
    """Drop points that are not finite or too large, and curves without points."""
    known = [(trial, points[(np.abs(points) < MOST).all(axis=1)]) for trial, points in curves]
    return [(trial, points) for trial, points in known if len(points)]


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials with a validation loss: finished first, then by last common loss."""
    compared = {trial.number: trial for trial in trials if trial.validation_losses}
    return [compared[row.number] for row in standings([*compared.values()], "")]
