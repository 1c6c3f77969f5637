"""The validation loss by log-SNR: the same for any workers and batches, and reported once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray import counter_rng
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.loader import Batch
from ddpm_ray.diffusion import NoiseSchedule, schedules
from ddpm_ray.evaluation.loss_by_snr import linear_guess, validation_loss
from ddpm_ray.reporting import Row
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.validation_loss import LEVELS, Validator
from tests.fixtures.threaded_workers import OnWorkers

GROUPS = 6  # images per level
IMAGES = torch.randint(
    0,
    256,
    (GROUPS * len(LEVELS), 4, 4, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(1),
)
VARIANCE = 0.3
LINEAR = NoiseSchedule(schedules.linear(1000))


class Mixture(nn.Module):
    """Says `share` of what it sees is noise, so its loss depends on images, noise and step."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.share * x_t


class Notebook:
    """A sink that keeps the rows."""

    def __init__(self) -> None:
        self.kept: list[Row] = []

    def rows(self, rows: list[Row]) -> None:
        self.kept += rows


def validator(
    workers: Workers,
    share: float = 0.0,
    schedule: NoiseSchedule = LINEAR,
    sink: Any = None,
    batch_size: int = 64,
) -> Validator:
    part = workers.share(GROUPS)
    first, end = part.start * len(LEVELS), part.stop * len(LEVELS)
    model = Mixture(share)
    state = TrainingState(model, EMA(model), torch.optim.Adam(model.parameters()), {})
    denoiser = Denoiser.of_noise(state.ema.model, schedule)
    labels = torch.full((end - first,), -1)
    images = IMAGES[first:end]
    samples = Batch(images, labels)
    return Validator(state, denoiser, samples, first, VARIANCE, workers, sink, batch_size)


def looked(made: Validator, step: int = 7) -> dict[str, Any]:
    made.validate(step)
    (found,) = made.state.validation_losses
    return found


def test_who_says_nothing_is_wrong_by_the_noise_itself() -> None:
    """Image i is at level i % K with the noise of its own number; both steps around see it."""
    count, shape = len(IMAGES), (3, 4, 4)
    noise = counter_rng.normal(0, Purpose.VALIDATION, 0, torch.arange(count), shape)
    by_level = noise.double().square().flatten(1).mean(1).view(GROUPS, len(LEVELS)).mean(0)
    found = looked(validator(Workers()))["spectrum"]
    assert found == pytest.approx(by_level.tolist(), rel=1e-6)
    assert len({round(value, 6) for value in found}) == len(LEVELS)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_any_number_of_workers_sees_what_one_sees(count: int, on_workers: OnWorkers) -> None:
    one = looked(validator(Workers(), 0.4))
    for found in on_workers(count, lambda workers: looked(validator(workers, 0.4))):
        assert found["spectrum"] == pytest.approx(one["spectrum"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 40, 10_000])
def test_it_does_not_matter_how_many_images_are_seen_at_once(batch_size: int) -> None:
    expected = looked(validator(Workers(), 0.4))["spectrum"]
    found = looked(validator(Workers(), 0.4, batch_size=batch_size))["spectrum"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_schedules_are_judged_on_the_same_images_and_noise() -> None:
    """Who says nothing does as well under each, but where a schedule never comes."""
    wide, short = (
        looked(validator(Workers())),
        looked(validator(Workers(), schedule=NoiseSchedule(schedules.linear(100)))),
    )
    guess = linear_guess(torch.tensor(LEVELS, dtype=torch.float64), VARIANCE).tolist()
    for level, one, other, charged in zip(
        LEVELS, wide["spectrum"], short["spectrum"], guess, strict=True
    ):
        # Linear of 100 steps ends in the noise of log-SNR -0.56: (alpha_bar_100 = 0.363).
        assert other == pytest.approx(one if level > -0.56 else charged, rel=1e-6)


def test_the_weights_are_those_that_samples_come_from() -> None:
    made = validator(Workers(), 0.4)
    expected = looked(validator(Workers(), 0.4))
    with torch.no_grad():
        made.state.model.share.fill_(5.0)  # type: ignore[operator]
    assert looked(made) == expected


def test_a_validation_loss_is_reported_as_metrics_of_its_step() -> None:
    sink = Notebook()
    found = looked(validator(Workers(), 0.4, sink=sink), step=7)
    (row,) = sink.kept
    assert row.step == found["step"] == 7
    assert row.metrics["eval/loss_common"] == found["loss"]
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    assert found["loss"] == validation_loss(
        torch.tensor(found["spectrum"], dtype=torch.float64), levels
    )
    reported = [row.metrics[f"eval/loss_logsnr/{level}"] for level in LEVELS]
    assert reported == found["spectrum"]
    assert len(row.metrics) == 1 + len(LEVELS)


def test_only_the_main_worker_reports(on_workers: OnWorkers) -> None:
    """The others have no sink; all of them know the result."""
    sink = Notebook()
    found = on_workers(
        2, lambda workers: looked(validator(workers, 0.4, sink=sink if workers.is_main else None))
    )
    assert found[0] == found[1]
    assert len(sink.kept) == 1
