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

from ddpm_ray.sampling.image_grid import GUTTER_PIXELS, grid
from ddpm_ray.sweep import charts
from ddpm_ray.sweep.standings import STATUSES, standings
from ddpm_ray.sweep.trial_store import Status, Trial

pytestmark = pytest.mark.xdist_group("charts")  # a minute that needs neither Ray nor MLflow

METRIC = "eval/fid"
LEVELS = [-4.5, -1.5, 1.5, 4.5]
Chart = Callable[[list[Trial]], Image.Image | None]
CHARTS: dict[str, Chart] = {
    "fid_against_T": lambda trials: charts.fid_against_T(trials, METRIC),
    "score_curves": charts.score_curves,
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
def test_a_chart_is_a_picture_of_one_screen(chart: Chart, count: int) -> None:
    """Whatever the number of trials; a warning of matplotlib would fail the test."""
    picture = chart(sweep(count))
    assert picture is not None
    assert picture.mode == "RGB"
    assert picture.width == 1200
    assert 300 <= picture.height <= 900


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


@pytest.mark.parametrize("chart", ["score_curves", "cost_bars"])
def test_a_failed_trial_has_its_own_colour(chart: str) -> None:
    trials = sweep(4)
    for trial in trials:
        trial.status = "finished"
    trials[0].status = "stopped"
    before = ink(CHARTS[chart](trials), charts.STATUS_COLOURS["failed"])
    trials[3].status = "failed"
    assert ink(CHARTS[chart](trials), charts.STATUS_COLOURS["failed"]) > before


def test_cost_bars_are_as_long_as_their_cost_and_split_where_work_ends() -> None:
    """Two trials, one of twice the seconds and half of them spent on training."""
    dear = Trial(0, {}, status="finished", outcome={"worker_s": 400.0, "busy_s": 200.0})
    cheap = Trial(1, {}, status="failed", outcome={"worker_s": 200.0, "busy_s": 200.0})
    picture = charts.cost_bars([dear, cheap])
    assert picture is not None
    pixels = np.asarray(picture).astype(int)[:, :900]  # left of the legend
    blue, red = (
        (pixels == [int(charts.STATUS_COLOURS[s][i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2)
        for s in ("finished", "failed")
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
    picture = charts.fid_against_T(trials, METRIC)
    assert picture is not None
    best, other = charts.COLOURS[:2]
    low_right, high_left = (600, 290, 1200, 580), (0, 0, 600, 290)  # the legend is high and right
    assert ink(picture.crop(low_right), best)
    assert ink(picture.crop(high_left), other)
    assert not ink(picture.crop((0, 0, 600, 580)), best)
    assert not ink(picture.crop((0, 290, 1200, 580)), other)


def test_intervals_are_drawn_to_scale() -> None:
    """One is ten times as wide as the other; cut off at the frame it would look shorter."""
    trials = [Trial(i, {"schedule.kind": f"k{i}"}, status="finished") for i in (0, 1)]
    for trial, T, half in zip(trials, (100, 1000), (30.0, 3.0), strict=True):
        metrics = {METRIC: 50.0, f"{METRIC}_low": 50 - half, f"{METRIC}_high": 50 + half}
        trial.outcome = {"metrics": metrics, "num_steps": T}
    picture = charts.fid_against_T(trials, METRIC)
    assert picture is not None
    wide, narrow = (
        [y for y in range(100, 580) if ink(picture.crop((0, y, 1200, y + 1)), colour)]
        for colour in charts.COLOURS[:2]  # from 100 on: the legend is above
    )
    score = (narrow[0] + narrow[-1]) / 2
    assert wide[-1] - score == pytest.approx(10 * (narrow[-1] - score), rel=0.1)


def test_t_may_come_from_what_the_trial_reported() -> None:
    trials = sweep(4)
    for trial in trials:
        trial.outcome["num_steps"] = trial.values["schedule.num_steps"]
    reported = charts.fid_against_T(trials, METRIC)
    for trial in trials:
        del trial.values["schedule.num_steps"]
    assert alike(charts.fid_against_T(trials, METRIC), reported)


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


def sample_grids(trials: list[Trial], side: int, channels: int) -> dict[int, Image.Image]:
    draw = np.random.default_rng(0)
    shape = 64, side, side, channels
    return {t.number: grid(draw.integers(0, 256, shape, dtype=np.uint8)) for t in trials}


@pytest.mark.parametrize("columns, channels", [(8, 1), (3, 3), (12, 3)])
def test_a_contact_sheet_holds_the_images_of_the_grids(columns: int, channels: int) -> None:
    trials = sweep(7)
    grids = sample_grids(trials[1:], 32, channels)  # trial 0 has none
    sheet = charts.contact_sheet(trials, grids, METRIC, columns)
    assert sheet is not None
    order = [row.number for row in standings(trials, METRIC) if row.number in grids]
    cell = 64 + GUTTER_PIXELS
    left, top = charts.CAPTION_PIXELS, sheet.height % (cell + GUTTER_PIXELS)
    assert sheet.height == top + len(order) * (cell + GUTTER_PIXELS)
    for row, number in enumerate(order):
        for i in range(columns):
            x, y = GUTTER_PIXELS + i % 8 * cell, GUTTER_PIXELS + i // 8 * cell
            image = grids[number].convert("RGB").crop((x, y, x + 64, y + 64))
            x = left + GUTTER_PIXELS + i * cell
            y = top + GUTTER_PIXELS + row * (cell + GUTTER_PIXELS)
            assert alike(sheet.crop((x, y, x + 64, y + 64)), image)


def test_a_contact_sheet_stays_of_a_size_to_open() -> None:
    trials = sweep(100)
    small = charts.contact_sheet(trials, sample_grids(trials, 8, 1), METRIC)
    large = charts.contact_sheet(trials[:9], sample_grids(trials[:9], 256, 3), METRIC)
    assert small is not None
    assert large is not None
    assert small.height < 3000
    assert large.width < 1600
    forty = [row.number for row in standings(trials, METRIC)][:40]
    few = charts.contact_sheet([trials[i] for i in forty], sample_grids(trials, 8, 1), METRIC)
    assert not alike(few, small), "it says how many are left out"
    assert few is not None
    assert few.size == small.size
    assert charts.contact_sheet(trials, {}, METRIC) is None


def test_nothing_shares_pyplot() -> None:
    """Its figures live until someone closes them, and a driver draws for days."""
    script = "import sys, ddpm_ray.sweep.charts; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
