"""Rows are a function of the steps alone: not of when they are collected, nor by how many."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.reporting import RATES, Row
from ddpm_ray.training.metrics_buffer import BAND_EDGES, BANDS, StepLog

OnWorkers = Callable[[int, Callable[[Workers], Any]], list[Any]]
STEPS, BATCH = 12, 96


YES, ONE = torch.tensor(True), torch.tensor(1.0)


def images_of(step: int) -> tuple[Tensor, Tensor]:
    """Losses of a batch, so different that no sum is exact by luck, and its log-SNR."""
    generator = torch.Generator().manual_seed(step)
    losses = (-20 * torch.randn(BATCH, generator=generator).abs()).exp()
    return losses, torch.randn(BATCH, generator=generator).double() * 5


def logged(workers: Workers, ends: set[int], window: int = 4, begin: int = 0) -> list[Row]:
    """Rows of steps begin+1..STEPS, collected after the steps in `ends`."""
    log, rows = StepLog(workers, window), []
    for step in range(begin + 1, STEPS + 1):
        share = workers.share(BATCH)
        losses, log_snr = (values[share.start : share.stop] for values in images_of(step))
        log.record(
            losses,
            log_snr,
            grad_norm=torch.tensor(step / 4),
            accepted=YES,
            learning_rate=1 / step,
        )
        if step in ends | {STEPS}:
            rows += log.collect(step, waited_s=0.0)
    return rows


def timeless(rows: list[Row]) -> list[tuple[int, dict[str, float]]]:
    return [(row.step, {k: v for k, v in row.metrics.items() if k not in RATES}) for row in rows]


@given(ends=st.sets(st.integers(1, STEPS)))
def test_rows_do_not_depend_on_when_they_are_collected(ends: set[int]) -> None:
    assert timeless(logged(Workers(), ends)) == timeless(logged(Workers(), set()))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_rows_do_not_depend_on_the_number_of_workers(count: int, on_workers: OnWorkers) -> None:
    alone = timeless(logged(Workers(), {5}))
    for rows in on_workers(count, lambda workers: logged(workers, {5})):
        assert timeless(rows) == alone  # on each of them, so that all agree


@pytest.mark.parametrize("count", [1, 3])
def test_core_seconds_are_those_of_all_workers_and_starts(
    count: int, on_workers: OnWorkers
) -> None:
    """Each look at the clock is 1 s later: a step takes 1 s of each worker."""

    def two_steps(workers: Workers) -> tuple[float, list[Row]]:
        log, seconds = StepLog(workers, 2), itertools.count(0.0)
        log._core_clock = seconds.__next__
        log.resume(log.window(), core_s=40.0)
        for step in (1, 2):
            with log.timed():
                losses, log_snr = images_of(step)
                log.record(losses, log_snr, grad_norm=ONE, accepted=YES, learning_rate=1.0)
        rows = log.collect(2, 0.0)
        log.resume(log.window())  # as a rewind does
        return log.core_s, rows

    for core_s, rows in on_workers(count, two_steps):
        assert core_s == 40.0 + 2 * count
        assert [row.metrics.get("train/core_seconds") for row in rows] == [None, core_s]


def test_each_step_has_its_row_and_the_loss_is_its_mean() -> None:
    rows = logged(Workers(), {3, 7})
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        mean = images_of(row.step)[0].double().mean().item()
        assert row.metrics["train/loss"] == pytest.approx(mean, abs=2**-40)
        assert row.metrics["train/grad_norm"] == row.step / 4
        assert row.metrics["train/lr"] == 1 / row.step


def test_bands_of_a_window_average_its_images() -> None:
    """Weighted by their images, the bands of steps 5..8 give the mean loss of these steps."""
    (row,) = [row for row in logged(Workers(), set()) if row.step == 8]
    losses, log_snr = (torch.cat(v) for v in zip(*map(images_of, range(5, 9)), strict=True))
    total = 0.0
    for name, low, high in zip(
        BANDS, (-math.inf, *BAND_EDGES), (*BAND_EDGES, math.inf), strict=True
    ):
        inside = losses[(log_snr > low) & (log_snr <= high)]
        mean = row.metrics.get(f"train/loss_logsnr/{name}")
        assert (mean is None) == (len(inside) == 0)
        total += (mean or 0.0) * len(inside)
    assert total / len(losses) == pytest.approx(losses.double().mean().item(), rel=1e-12)


def test_bands_and_rates_come_once_a_window() -> None:
    for row in logged(Workers(), {2, 3, 9}):
        has = {key.partition("/")[2].partition("/")[0] for key in row.metrics}
        assert ({"loss_logsnr", "images_per_s", "data_wait_share"} <= has) == (row.step % 4 == 0)


@pytest.mark.parametrize(
    "log_snr, band",
    [(-40.0, "below_-8"), (-7.9, "-8_to_-6"), (0.1, "0_to_2"), (7.9, "6_to_8"), (8.1, "above_8")],
)
def test_a_band_is_named_by_its_edges(log_snr: float, band: str) -> None:
    log = StepLog(Workers(), 1)
    log.record(
        torch.tensor([2.5]),
        torch.tensor([log_snr]).double(),
        grad_norm=ONE,
        accepted=YES,
        learning_rate=1.0,
    )
    (row,) = log.collect(1, 0.0)
    assert [key for key in row.metrics if "logsnr" in key] == [f"train/loss_logsnr/{band}"]
    assert row.metrics[f"train/loss_logsnr/{band}"] == 2.5


def test_a_window_that_a_checkpoint_cuts_goes_on_after_it() -> None:
    """Steps 9..12 are one window: cut after step 10, its row is still that of all four."""
    log = StepLog(Workers(), 4)
    for step in range(1, 11):
        log.record(*images_of(step), grad_norm=ONE, accepted=YES, learning_rate=1.0)
    log.collect(10, 0.0)
    resumed = StepLog(Workers(), 4)
    resumed.resume(log.window())
    for step in (11, 12):
        resumed.record(*images_of(step), grad_norm=3 * ONE, accepted=YES, learning_rate=1 / 12)
    last = timeless(resumed.collect(12, 0.0))[-1]
    assert last == timeless(logged(Workers(), set()))[-1]


def test_rates_count_images_and_waiting_over_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows of 4 steps at 1.5 s a step of 96 images, of which 0.3 s are waiting."""
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    log = StepLog(Workers(), 4)
    for step in range(1, 9):
        clock[0] += 1.5
        log.record(*images_of(step), grad_norm=ONE, accepted=YES, learning_rate=1.0)
        for row in log.collect(step, waited_s=0.3 * step):
            if step % 4 == 0:
                assert row.metrics["train/images_per_s"] == pytest.approx(64.0)
                assert row.metrics["train/data_wait_share"] == pytest.approx(0.2)


@pytest.mark.parametrize("bad", [math.nan, 1.0])
def test_a_rejected_step_has_a_row_of_its_own_and_no_share_in_the_window(bad: float) -> None:
    log = StepLog(Workers(), 4)
    for step in range(1, 5):
        losses, log_snr = images_of(step)
        accepted = torch.tensor(step != 2)
        losses = torch.where(accepted, losses, bad)
        norm = torch.where(accepted, step, math.nan)
        log.record(losses, log_snr, grad_norm=norm, accepted=accepted, learning_rate=1.0)
    decisions = log.read()
    assert [decision.accepted for decision in decisions] == [True, False, True, True]
    assert [decision.grad_norm for decision in decisions] == pytest.approx(
        [1, math.nan, 3, 4], nan_ok=True
    )
    rows = log.collect(4, 0.0)
    assert rows[1].metrics == {"train/skipped": 1.0}
    kept = torch.cat([images_of(step)[0] for step in (1, 3, 4)]).double()
    of_bands = [value for key, value in rows[3].metrics.items() if "logsnr" in key]
    assert all(map(math.isfinite, of_bands))
    assert sum(row.metrics.get("train/loss", 0.0) for row in rows) / 3 == pytest.approx(
        float(kept.mean())
    )


def test_steps_that_are_forgotten_leave_no_row() -> None:
    log = StepLog(Workers(), 4)
    for step in range(1, 8):
        log.record(*images_of(step), grad_norm=step * ONE, accepted=YES, learning_rate=1 / step)
    assert len(log.read()) == 7
    assert log.read() == []
    log.forget(2)
    for step in range(6, STEPS + 1):
        log.record(
            *images_of(step), grad_norm=torch.tensor(step / 4), accepted=YES, learning_rate=1 / step
        )
    assert timeless(log.collect(STEPS, 0.0))[5:] == timeless(logged(Workers(), set()))[5:]
