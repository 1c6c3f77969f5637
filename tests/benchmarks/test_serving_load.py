"""The load test of the server: its requests, the images of the contestants, its table."""

import math
import re
import statistics

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from benchmarks import serving
from benchmarks.serving_load import arrivals_part, leaving_part, overhead_part, traffic
from benchmarks.serving_load.contestants import CONTESTANTS, RequestBatching
from benchmarks.serving_load.models import model_of
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import (
    IMAGES,
    STEPS,
    Arrival,
    lindley_waits,
    poisson_trace,
    pollaczek_khinchine,
    typical_times,
)
from benchmarks.serving_load.waits_part import waits_rows
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling.pipeline import TrainedModel

KINDS = [(1, 3), (2, 6), (1, 6), (2, 3), (2, 6)]
REQUESTS = [Arrival(0.0, images, steps, seed) for seed, (images, steps) in enumerate(KINDS)]


def tiny(_: str = "") -> TrainedModel:
    torch.manual_seed(0)
    spec = UNetSpec(
        image_channels=1,
        base_channels=4,
        channel_mults=(1, 2),
        blocks_per_level=1,
        attention_factors=(),
        groups=2,
    )
    network = UNet(spec)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    return model_of(network.eval(), ImageShape(4, 4, 1))


def test_a_trace_is_a_poisson_process_and_a_function_of_its_seed() -> None:
    trace = poisson_trace(50.0, 100.0, seed=1)
    assert trace == poisson_trace(50.0, 100.0, seed=1)
    assert trace != poisson_trace(50.0, 100.0, seed=2)
    low, high = stats.poisson.interval(0.9999, 50 * 100)
    assert low <= len(trace) <= high
    gaps = np.diff([one.at_s for one in trace])
    assert stats.kstest(gaps, stats.expon(scale=1 / 50).cdf).pvalue > 1e-3
    for found, kinds in (("steps", STEPS), ("images", IMAGES)):
        counts = [sum(getattr(one, found) == kind for one in trace) for kind in kinds]
        assert stats.chisquare(counts).pvalue > 1e-3
    assert len({one.seed for one in trace}) == len(trace)


def test_waits_of_equal_jobs_are_those_of_a_simulated_queue_and_of_the_formula() -> None:
    arrivals_s = np.cumsum(np.random.default_rng(0).exponential(1 / 8, 200))
    free_s, waits = 0.0, []
    for at_s in arrivals_s:
        waits.append(max(0.0, free_s - at_s))
        free_s = max(free_s, at_s) + 0.1
    np.testing.assert_allclose(lindley_waits(arrivals_s, 0.1), waits, atol=1e-9)
    assert pollaczek_khinchine(0.8, 0.1) == pytest.approx(0.2)
    assert pollaczek_khinchine(0.5, 1.0) == pytest.approx(0.5)
    typical = lindley_waits(typical_times(8.0, 5000, 0.1, range(32)), 0.1)
    assert typical.mean() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("name", ["ours", "batch, equal steps", "one at a time"])
def test_a_contestant_draws_the_images_of_the_model_alone(name: str) -> None:
    """To one grey level: a convolution sums in another order for another batch."""
    model = tiny()
    contestant = CONTESTANTS[name](model)
    try:
        tickets = [contestant.submit(request) for request in REQUESTS]
        for ticket, one in zip(tickets, REQUESTS, strict=True):
            alone = model.sample(one.images, steps=one.steps, seed=one.seed)
            assert np.abs(ticket.result().astype(int) - alone).max() <= 1
            assert ticket.steps == one.steps
    finally:
        contestant.close()


def test_a_batch_of_requests_takes_the_largest_number_of_steps_and_stops_at_its_width() -> None:
    model = tiny()
    contestant = RequestBatching(model, width=4, wait_s=5.0)
    try:
        tickets = [contestant.submit(request) for request in REQUESTS]
        images = [ticket.result() for ticket in tickets[:3]]
    finally:
        contestant.close()  # the last batch does not wait for more
    assert [ticket.steps for ticket in tickets] == [6, 6, 6, 6, 6]
    assert [len(one) for one in images] == [1, 2, 1]
    alone = model.sample(1, steps=6, seed=0)
    assert np.abs(images[0].astype(int) - alone).max() <= 1


def test_a_request_that_leaves_the_queue_is_not_drawn() -> None:
    contestant = RequestBatching(tiny(), width=2, wait_s=0.0)
    try:
        tickets = [contestant.submit(Arrival(0.0, 2, 50, seed)) for seed in range(4)]
        tickets[3].cancel()
        assert tickets[2].result().shape == (2, 4, 4, 1)
    finally:
        contestant.close()
    assert tickets[3].steps == 0
    assert tickets[2].steps == 50


def test_a_row_has_its_goal_median_and_extremes() -> None:
    text = Row("a ratio", [1.4, 1.2, 3.0], at_least=1.3).text()
    assert re.split(r"\s{2,}", text) == ["a ratio", ">= 1.3", "1.4 (1.2-3)", "yes"]
    assert Row("x", [1.0, 0.9], at_least=0.96, at_most=1.05).reached == "NO"
    assert Row("x", [2.0]).reached == ""
    assert percentile([*range(100)], 95) == 95
    assert math.isnan(percentile([], 95))


def test_a_short_run_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (arrivals_part, leaving_part, overhead_part):
        monkeypatch.setattr(module, "drawing_model", tiny)
    monkeypatch.setitem(overhead_part.STEPS, "digits", 5)
    monkeypatch.setattr(traffic, "STEPS", (1, 2, 4))
    threads = torch.get_num_threads()
    parts = ["arrivals", "overhead", "leaving", "preview"]
    given = ["--rounds", "1", "--seconds", "0.1", "--models", "digits", "--parts", *parts]
    try:
        serving.main(given)
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert [line.split(",")[0] for line in text.splitlines() if ", digits" in line] == parts
    rows = [line for line in text.splitlines() if line and ", digits" not in line]
    assert len(rows) > 25
    for row in rows:
        assert re.search(r" \d\S* \(\S+-\S+\)", row), row
    assert "throughput, ours / batch, largest steps" in text


def test_waits_are_measured_in_units_of_the_time_of_service() -> None:
    rows = waits_rows(1, seconds=0.2, call_s=0.001)
    assert statistics.median(rows[0].values) >= 1.0  # ms
    assert [row.at_most for row in rows if "rho" in row.title] == [1.05, 1.05]
