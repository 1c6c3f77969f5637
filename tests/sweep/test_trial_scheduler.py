"""A sweep's scheduler reaches the same end however often its driver dies, with the reasons."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from ddpm_ray.config.jobs.sweep import StoppingConfig, SweepConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.diffusion.schedule_diagnostics import ScheduleDiagnostics
from ddpm_ray.storage import object_store
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import TrialStore

KEY = "schedule.num_steps"
IMPOSSIBLE, BLIND, WASTED = 1, 3, 4  # values of KEY


class Killed(BaseException):
    """The sweep's driver is no more."""


def config(*choices: int) -> SweepConfig:
    """ASHA with rungs at 10, 20 and 40."""
    training = dataclasses.replace(RunConfig().training, steps=40)
    stopping = StoppingConfig(every_steps=10, reduction_factor=2)
    run = dataclasses.replace(RunConfig(), training=training)
    return SweepConfig(space=({KEY: list(choices)},), metric="eval/fid", stopping=stopping, run=run)


class Driver:
    """A scheduler, and what it asked of the world."""

    def __init__(self, folder: Path, sweep: SweepConfig) -> None:
        self.asked, self.stopped, self.begun = list[int](), list[int](), list[int]()
        self.scheduler = TrialScheduler(
            sweep, TrialStore(str(folder)), self._diagnose_schedule, self.stopped.append
        )

    def _diagnose_schedule(self, values: dict[str, Any]) -> ScheduleDiagnostics:
        self.asked.append(values[KEY])
        if values[KEY] == IMPOSSIBLE:
            raise ConfigError("schedule.num_steps is 1;\n  give it 2")
        return ScheduleDiagnostics(
            3.9e-4, 0.5 * (values[KEY] == BLIND), 0.75 * (values[KEY] == WASTED)
        )

    def fill(self) -> None:
        """Begin trials as long as there are any and one of two slots is free."""
        while len(busy := set(self.scheduler.active)) < 2 and (trial := self.scheduler.next()):
            assert trial.number not in busy
            self.begun.append(trial.number)


def measured(number: int, step: int, loss: float) -> dict[str, Any]:
    return {
        "number": number,
        "kind": "validation_loss",
        "validation_loss": {"step": step, "loss": loss},
    }


def ended(number: int, finished: bool = True, **metrics: float) -> dict[str, Any]:
    outcome = {"metrics": {f"eval/{name}": value for name, value in metrics.items()}}
    return {"number": number, "kind": "ended", "finished": finished, "outcome": outcome}


def left(number: int, error: str = "") -> dict[str, Any]:
    return {"number": number, "kind": "left", "error": error}


SWEEP = config(10, 20, 30, BLIND, IMPOSSIBLE, 40, 50, WASTED)
SCRIPT = [
    measured(0, 10, 0.1),
    measured(1, 10, 0.5),
    measured(0, 10, 0.1),  # 1 is stopped, 0 repeats
    ended(1, finished=False),
    left(1),  # 2 begins
    left(2, "died"),  # and begins again
    measured(2, 10, 0.05),
    ended(0, fid=7.0),
    left(0),  # 3 and 4 end at once, 5 begins
    {"number": 2, "kind": "failed", "reason": "no memory", "outcome": {}},
    left(2),  # 6 begins
    measured(5, 10, math.nan),
    ended(5, finished=False),
    left(5),  # is stopped
    ended(6, finished=False),
    left(6),  # nobody asked it to stop: it begins again
    ended(6, kid=1.0),
    left(6),
]
ENDS = [
    ("finished", ""),
    ("stopped", "asha: common loss 0.5 at step 10, 2 of 2"),
    ("failed", "no memory"),
    (
        "pruned",
        "x_T keeps 0.5 bits/dim of the image (alpha_bar_T 0.00039) that samples start "
        "without, above pruning.max_prior_bits_per_dim=0.01",
    ),
    ("failed", "schedule.num_steps is 1; give it 2"),
    ("stopped", "its common loss is nan at step 10"),
    ("failed", "it reported eval/kid, but not eval/fid"),
    (
        "pruned",
        "75% of its steps are at noise levels where nothing can be learnt, above "
        "pruning.max_wasted_fraction=0.6",
    ),
]


def take(driver: Driver, event: dict[str, Any]) -> None:
    """Begin what there is to begin, then hear of one event."""
    driver.fill()
    number = event["number"]
    if event["kind"] == "left":
        return driver.scheduler.on_exit(number, event["error"])
    if event["kind"] == "ended" and driver.scheduler.store.trials[number].status == "running":
        assert (number in driver.stopped) == (number in (1, 5)), "else it would not end so"
    return driver.scheduler.on_event(event)


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "trials").iterdir())}


def unbroken(folder: Path, times: int = 1) -> Driver:
    """The whole script, with each event of a trial delivered `times` times."""
    driver = Driver(folder, SWEEP)
    for event in SCRIPT:
        take(driver, event)
        for _ in range(times - 1 if event["kind"] != "left" else 0):
            driver.scheduler.on_event(event)
    return driver


def test_a_trial_costs_what_all_its_lives_cost(tmp_path: Path) -> None:
    """The first ended because the sweep was interrupted; the second is another driver's."""
    for life, (finished, worker_s) in enumerate([(False, 10.0), (True, 4.0)], 1):
        driver = Driver(tmp_path, config(10))
        driver.fill()
        event = ended(0, finished, fid=7.0)
        event["outcome"] |= {"ended": float(life), "worker_s": worker_s}
        driver.scheduler.on_event(event)
        driver.scheduler.on_exit(0)
    (trial,) = driver.scheduler.ended
    assert trial.outcome["worker_s"] == 14.0


def test_each_end_has_its_reason_and_no_doomed_schedule_is_begun(tmp_path: Path) -> None:
    driver = unbroken(tmp_path)
    assert [(trial.status, trial.reason) for trial in driver.scheduler.ended] == ENDS
    assert driver.scheduler.total == len(ENDS)
    assert driver.scheduler.next() is None
    assert driver.begun == [0, 1, 2, 2, 5, 6, 6]
    assert driver.stopped == [1, 5]


@pytest.mark.parametrize("crash", range(len(SCRIPT) + 1))
def test_a_crash_at_any_event_changes_no_end_and_repeats_nothing(
    crash: int, tmp_path: Path
) -> None:
    whole, first = unbroken(tmp_path / "unbroken"), Driver(tmp_path / "broken", SWEEP)
    for event in SCRIPT[:crash]:
        take(first, event)
    over = {trial.number for trial in first.scheduler.ended}
    second = Driver(tmp_path / "broken", SWEEP)
    for event in SCRIPT[crash:]:
        take(second, event)
    assert files(tmp_path / "broken") == files(tmp_path / "unbroken")
    assert not over & set(second.begun)
    assert first.asked + second.asked == whole.asked


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_changes_no_end(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver dies just before, or just after, a fact is safe; what was going on is retried."""
    write, fatal, writes = object_store.write_bytes, -1, 0

    def fragile(url: str, data: bytes) -> None:
        nonlocal writes
        writes += 1
        if writes != fatal or written:
            write(url, data)
        if writes == fatal:
            raise Killed

    monkeypatch.setattr(object_store, "write_bytes", fragile)
    unbroken(tmp_path / "unbroken")
    assert writes > len(ENDS)
    for doomed in range(1, writes + 1):
        folder, fatal, writes = tmp_path / str(doomed), doomed, 0
        driver = Driver(folder, SWEEP)
        for event in SCRIPT:
            try:
                take(driver, event)
            except Killed:
                driver = Driver(folder, SWEEP)
                if event != left(2, "died") or not any(
                    t.driver_failures for t in driver.scheduler.store.trials
                ):
                    take(driver, event)
        assert files(folder) == files(tmp_path / "unbroken")


def test_a_trial_fails_whose_driver_dies_each_time(tmp_path: Path) -> None:
    """The count outlives the sweep's driver."""
    for losses in range(3):
        driver = Driver(tmp_path, config(10, 20))
        driver.fill()
        assert driver.scheduler.store.trials[0].driver_failures == losses
        driver.scheduler.on_exit(0, "node lost")
    (trial,) = driver.scheduler.ended
    assert (trial.number, trial.status) == (0, "failed")
    assert trial.reason == "its driver died 3 times: node lost"
    driver.fill()
    assert driver.scheduler.active == {1}


def test_closing_begins_nothing(tmp_path: Path) -> None:
    driver = Driver(tmp_path, config(10, 20, 30))
    driver.fill()
    driver.scheduler.closing = True
    driver.scheduler.on_exit(0, "died")
    assert driver.scheduler.next() is None
    driver.scheduler.on_event(ended(1, fid=1.0))
    assert [trial.status for trial in driver.scheduler.store.trials] == ["running", "finished"]


def test_an_event_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    whole, driver = unbroken(tmp_path / "once"), unbroken(tmp_path / "twice", times=2)
    assert files(tmp_path / "twice") == files(tmp_path / "once")
    assert (driver.stopped, driver.begun) == (whole.stopped, whole.begun)
