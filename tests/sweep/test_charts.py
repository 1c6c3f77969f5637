"""Charts show what trials differ in, take whatever a trial lacks, and stay of a size to look at."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from ddpm_ray.sweep import chart_style, charts
from ddpm_ray.sweep.standings import STATUSES
from ddpm_ray.sweep.trial_store import Status, Trial

pytestmark = pytest.mark.xdist_group("charts")  # a minute that needs neither Ray nor MLflow

METRIC = "eval/fid"
PLOT = 860  # below that pixel row is the legend
LEVELS = [-4.5, -1.5, 1.5, 4.5]
Chart = Callable[[list[Trial]], Image.Image | None]
CHARTS: dict[str, Chart] = {
    "score_against_T": lambda trials: charts.score_against_T(trials, METRIC),
    "loss_against_T": lambda trials: charts.loss_against_T(trials, METRIC),
    "common_loss": charts.common_loss,
    "loss_by_log_snr": lambda trials: charts.loss_by_log_snr(trials, LEVELS, [0.5, 0.4, 0.3, 0.2]),
    "cost_bars": charts.cost_bars,
}
every_chart = pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)


def sweep(count: int, seed: int = 0) -> list[Trial]:
    """Trials of three schedules and four T; each third is stopped, the odd one fails."""
    draw = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        values = {
            "schedule.kind": ("linear", "cosine", "sigmoid")[number // 4 % 3],
            "schedule.num_steps": (50, 200, 1000, 4000)[number % 4],
            "optimizer.lr": 1e-4 * (1 + number // 12),
        }
        status: Status = (
            "stopped" if number % 3 == 2 else "failed" if number % 11 == 7 else "finished"
        )
        looks = {"finished": 4, "stopped": 2}.get(status, 1)
        quality = float(draw.uniform(1, 3))
        validation_losses = [
            {"order": i, "step": 3**i * 100, "loss": quality / (i + 1), "spectrum": [quality] * 4}
            for i in range(looks)
        ]
        outcome: dict[str, Any] = {"worker_s": 90.0 + quality, "busy_s": 60.0 * quality / 3}
        if status == "finished":
            outcome["metrics"] = {
                METRIC: quality,
                f"{METRIC}_low": 0.9 * quality,
                f"{METRIC}_high": 1.1 * quality,
            }
        trials.append(
            Trial(
                number, values, status=status, validation_losses=validation_losses, outcome=outcome
            )
        )
    return trials


def ink(picture: Image.Image | None, colour: str) -> int:
    """How many pixels have exactly that colour, as in "#D55E00"."""
    assert picture is not None
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.asarray(picture) == wanted).all(axis=2).sum())


def alike(one: Image.Image | None, other: Image.Image | None) -> bool:
    assert one is not None
    assert other is not None
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


@every_chart
@pytest.mark.parametrize("count", [1, 4, 12, 60, 1000])
def test_a_chart_is_a_square_picture(chart: Chart, count: int) -> None:
    """Whatever the number of trials; a warning of matplotlib would fail the test."""
    picture = chart(sweep(count))
    assert picture is not None
    assert picture.mode == "RGB"
    assert picture.size == (chart_style.PIXELS, chart_style.PIXELS)


@every_chart
def test_a_chart_shows_its_trials_and_nothing_else(chart: Chart) -> None:
    assert alike(chart(sweep(12)), chart(sweep(12)))
    assert not alike(chart(sweep(12)), chart(sweep(12, seed=1)))
    assert not alike(chart(sweep(12)), chart(sweep(11)))


@every_chart
def test_nothing_to_show_is_none(chart: Chart) -> None:
    assert chart([]) is None
    assert chart([Trial(0, {}), Trial(1, {"lr": 1e-4}, status="failed", reason="x")]) is None


NUMBERS = st.none() | st.floats() | st.floats(0.1, 9)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@every_chart
def test_what_a_trial_lacks_breaks_no_chart(chart: Chart, data: st.DataObject) -> None:
    """Half an outcome, no interval, no probe, a loss that is no number, a name full of formulas."""
    trials = sweep(5)
    for trial in trials:
        trial.status = data.draw(st.sampled_from(STATUSES))
        kept = data.draw(st.sets(st.sampled_from(sorted(trial.outcome))))
        trial.outcome = {key: trial.outcome[key] for key in kept}
        scores = {f"{METRIC}{end}": data.draw(NUMBERS) for end in ("", "_low", "_high")}
        if data.draw(st.booleans()):
            trial.outcome["metrics"] = scores
        trial.validation_losses = trial.validation_losses[: data.draw(st.integers(0, 2))]
        for validation_loss in trial.validation_losses:
            validation_loss |= {
                "loss": data.draw(NUMBERS),
                "spectrum": data.draw(st.lists(NUMBERS)),
            }
        trial.values["optimizer.name"] = data.draw(st.text(max_size=60) | st.just("$x_{$ _y"))
        if data.draw(st.booleans()):
            del trial.values["schedule.num_steps"]
    picture = chart(trials)
    assert picture is None or ink(picture, "#FFFFFF") > picture.width


@pytest.mark.parametrize("chart", ["common_loss", "cost_bars"])
def test_a_failed_trial_has_its_own_colour(chart: str) -> None:
    trials = sweep(4)
    for trial in trials:
        trial.status = "finished"
    trials[0].status = "stopped"
    before = ink(CHARTS[chart](trials), chart_style.STATUS_COLOURS["failed"])
    trials[3].status = "failed"
    assert ink(CHARTS[chart](trials), chart_style.STATUS_COLOURS["failed"]) > before


def test_cost_bars_are_as_long_as_their_cost_and_split_where_work_ends() -> None:
    """Two trials, one of twice the seconds and half of them spent on training."""
    dear = Trial(0, {}, status="finished", outcome={"worker_s": 400.0, "busy_s": 200.0})
    cheap = Trial(1, {}, status="failed", outcome={"worker_s": 200.0, "busy_s": 200.0})
    picture = charts.cost_bars([dear, cheap])
    assert picture is not None
    pixels = np.asarray(picture).astype(int)[:800]  # above the legend
    colours = (chart_style.STATUS_COLOURS[status] for status in ("finished", "failed"))
    blue, red = (
        (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2)
        for colour in colours
    )
    assert blue.any(axis=0).sum() == pytest.approx(red.any(axis=0).sum(), abs=2)
    end = np.flatnonzero(blue.any(axis=0)).max()
    row = pixels[np.flatnonzero(blue.any(axis=1)).mean().astype(int)]
    pale = (row[end + 4 :, 0] < 250) & (row[end + 4 :, 2] > row[end + 4 :, 0] + 30)
    assert pale.sum() == pytest.approx(blue.any(axis=0).sum(), rel=0.05)


def test_a_better_score_stands_lower_and_a_larger_t_further_right() -> None:
    trials = [trial for trial in sweep(12) if trial.status == "finished"][:2]
    for trial, T, score in zip(trials, (100, 1000), (9.0, 3.0), strict=True):
        trial.values = {"schedule.kind": f"at {T}", "schedule.num_steps": T}
        trial.outcome = {"metrics": {METRIC: score}}
    picture = charts.score_against_T(trials, METRIC)
    assert picture is not None
    best, other = chart_style.COLOURS[:2]
    assert ink(picture.crop((500, PLOT // 2, 1000, PLOT)), best)
    assert ink(picture.crop((0, 0, 500, PLOT // 2)), other)
    assert not ink(picture.crop((0, 0, 500, PLOT)), best)
    assert not ink(picture.crop((0, PLOT // 2, 1000, PLOT)), other)


def test_intervals_are_drawn_to_scale() -> None:
    """One is ten times as wide as the other; cut off at the frame it would look shorter."""
    trials = [Trial(i, {"schedule.kind": f"k{i}"}, status="finished") for i in (0, 1)]
    for trial, T, half in zip(trials, (100, 1000), (30.0, 3.0), strict=True):
        metrics = {METRIC: 50.0, f"{METRIC}_low": 50 - half, f"{METRIC}_high": 50 + half}
        trial.outcome = {"metrics": metrics, "num_steps": T}
    picture = charts.score_against_T(trials, METRIC)
    assert picture is not None
    wide, narrow = (
        [y for y in range(PLOT) if ink(picture.crop((0, y, 1000, y + 1)), colour)]
        for colour in chart_style.COLOURS[:2]
    )
    score = (narrow[0] + narrow[-1]) / 2
    assert wide[-1] - score == pytest.approx(10 * (narrow[-1] - score), rel=0.1)


def test_t_may_come_from_what_the_trial_reported() -> None:
    trials = sweep(4)
    for trial in trials:
        trial.outcome["num_steps"] = trial.values["schedule.num_steps"]
    reported = charts.score_against_T(trials, METRIC)
    for trial in trials:
        del trial.values["schedule.num_steps"]
    assert alike(charts.score_against_T(trials, METRIC), reported)


def test_a_sweep_that_stops_all_trials_early_compares_them_by_loss() -> None:
    """One of each schedule, stopped at step 300 and 100: none has a score, all are drawn."""
    trials = sweep(12)[::4]
    for trial in trials:
        trial.status, trial.outcome = "stopped", {}
    trials[0].validation_losses = sweep(1)[0].validation_losses
    picture = charts.loss_against_T(trials, METRIC)
    assert picture is not None
    plot = picture.crop((0, 0, 1000, PLOT))
    assert all(ink(plot, colour) for colour in chart_style.COLOURS[: len(trials)])
    assert charts.score_against_T(trials, METRIC) is None


def test_a_schedule_has_one_colour_in_both_charts_against_t() -> None:
    """The scored schedule, the only one in the first chart, has not the lowest loss."""
    trials = [Trial(i, {"schedule.kind": f"k{i}", "schedule.num_steps": 100}) for i in (0, 1)]
    for trial, loss in zip(trials, (2.0, 1.0), strict=True):
        trial.validation_losses = [{"order": 0, "step": 50, "loss": loss}]
    trials[0].status, trials[1].status = "finished", "stopped"
    trials[0].outcome = {"metrics": {METRIC: 1.0}}
    score, loss_chart = (
        chart(trials, METRIC) for chart in (charts.score_against_T, charts.loss_against_T)
    )
    assert score is not None
    assert loss_chart is not None
    colour = chart_style.COLOURS[0]
    assert ink(score.crop((0, 0, 1000, PLOT)), colour)
    assert not ink(score, chart_style.COLOURS[1])
    assert ink(loss_chart.crop((0, 0, 1000, PLOT // 3)), colour)  # the higher of the two


STEPS = st.lists(st.sampled_from([50, 100, 150, 200]), unique=True)


@given(st.lists(STEPS, max_size=5))
def test_the_shared_step_is_the_last_that_all_compared_trials_reached(
    runs: list[list[int]],
) -> None:
    trials = [
        Trial(i, {}, validation_losses=[{"step": step, "loss": 1.0} for step in steps])
        for i, steps in enumerate(runs)
    ]
    compared = [steps for steps in runs if steps]
    shared = charts.shared_step(trials)
    of_all = [step for step in (50, 100, 150, 200) if all(step in steps for steps in compared)]
    assert shared == (of_all[-1] if compared and of_all else None)


def test_a_spectrum_is_drawn_with_and_without_the_linear_guess() -> None:
    plain = charts.loss_by_log_snr(sweep(4), LEVELS)
    assert not alike(plain, charts.loss_by_log_snr(sweep(4), LEVELS, [0.5, 0.4, 0.3, 0.2]))
    assert charts.loss_by_log_snr(sweep(4), LEVELS[1:]) is None, "the losses are of other levels"


def test_charts_may_be_drawn_in_threads() -> None:
    alone = {name: chart(sweep(12)) for name, chart in CHARTS.items()}
    together: dict[str, Image.Image | None] = {}

    def draw(name: str) -> None:
        together[name] = CHARTS[name](sweep(12))

    threads = [threading.Thread(target=draw, args=[name]) for name in CHARTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(alike(alone[name], together[name]) for name in CHARTS)


def test_nothing_shares_pyplot() -> None:
    """Its figures live until someone closes them, and a driver draws for days."""
    script = "import sys, ddpm_ray.sweep.charts; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
