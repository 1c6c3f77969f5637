"""An outage costs a trial time, not its life."""

from typing import Any

import pytest

from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.runs.train import Outcome
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.sweep import trial
from ddpm_ray.tracking.mlflow_runs import TrackingError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's and MLflow's
OUT = TrackingError("http://mlflow", "MLflow does not answer", "start it")
FULL = StorageError("s3://bucket", "no answer", "try again")
DONE = Outcome(True, {}, {})


class Weather:
    """What each attempt meets, and how long was waited after it."""

    def __init__(self, *attempts: Any) -> None:
        self.attempts, self.waited_s = list(attempts), list[float]()

    def train(self) -> Outcome:
        met = self.attempts.pop(0)
        if isinstance(met, Exception):
            raise met
        assert isinstance(met, Outcome)
        return met

    def sleep(self, wait_s: float) -> bool:
        self.waited_s.append(wait_s)
        return True


@pytest.mark.parametrize("outages", [0, 1, 2, 3])
def test_it_goes_on_when_the_outage_is_over(outages: int) -> None:
    weather = Weather(*[OUT, FULL, OUT][:outages], DONE)
    assert trial.retry_outages(weather.train, weather.sleep) is DONE
    assert weather.waited_s == list(trial.RETRY_S[:outages])
    assert weather.waited_s == sorted(weather.waited_s), "each time longer"


def test_it_fails_where_the_outage_does_not_end() -> None:
    weather = Weather(OUT, FULL, OUT, FULL)
    with pytest.raises(StorageError, match="s3://bucket: no answer; try again"):
        trial.retry_outages(weather.train, weather.sleep)


def test_a_trial_that_fails_by_itself_is_not_tried_again() -> None:
    weather = Weather(RunFailedError("the loss is nan"), DONE)
    with pytest.raises(RunFailedError, match="the loss is nan"):
        trial.retry_outages(weather.train, weather.sleep)
    assert not weather.waited_s


def test_who_is_to_stop_does_not_wait() -> None:
    weather = Weather(OUT, DONE)
    with pytest.raises(TrackingError, match="MLflow does not answer"):
        trial.retry_outages(weather.train, lambda _: False)
