"""Scheduling of a sweep's trials, without Ray Tune: which starts, which is stopped, how each ended.

Events alone change its state, and each is stored before it has an effect. After a crash the sweep
replays the stored events and has the state it had.
"""

import logging
from collections.abc import Callable
from typing import Any

from ddpm_ray.config.jobs.sweep import PruningConfig, SweepConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.diffusion.schedule_diagnostics import ScheduleDiagnostics
from ddpm_ray.redaction import counted
from ddpm_ray.sweep.early_stopping import EarlyStopping
from ddpm_ray.sweep.search import propose, total_trials
from ddpm_ray.sweep.trial_store import Trial, TrialStore

log = logging.getLogger(__name__)


class TrialScheduler:
    """Decides which trial of a sweep runs next and which one stops early.

    `diagnose_schedule(values)` measures the noise schedule of a trial, if it has one, or raises
    ConfigError; `stop(number)` asks a running trial to stop.
    """

    def __init__(
        self,
        config: SweepConfig,
        store: TrialStore,
        diagnose_schedule: Callable[[dict[str, Any]], ScheduleDiagnostics | None],
        stop: Callable[[int], None],
    ) -> None:
        self.store = store
        self.closing = False  # start no more trials
        self.active: set[int] = set()  # numbers of the trials that run now
        self._config, self._diagnose_schedule, self._stop = config, diagnose_schedule, stop
        self._reasons: dict[int, str] = {}  # why a trial was asked to stop
        self._rule = EarlyStopping(config.stopping, config.run.training.steps)
        for _, trial, loss in store.events():
            if loss is not None:
                self._apply_early_stopping(trial, loss)

    @property
    def total(self) -> int:
        """Number of trials of the whole sweep."""
        return total_trials(self._config.space, self._config.search)

    @property
    def ended(self) -> list[Trial]:
        """Trials that have ended, for any reason."""
        return [trial for trial in self.store.trials if trial.status != "running"]

    def next(self) -> Trial | None:
        """Return the next trial, or None: none for now, or the sweep is complete.

        Trials that an earlier driver did not finish come first. Trials with an invalid config are
        stored as failed, those with a rejected schedule as pruned; neither takes a worker.
        """
        if self.closing:
            return None
        waiting = (t for t in self.store.trials if t.status == "running")
        trial = next((t for t in waiting if t.number not in self.active), None) or self._new()
        if trial is not None:
            self.active.add(trial.number)
            if trial.number in self._reasons:  # decided before the crash
                self._stop(trial.number)
        return trial

    def on_event(self, event: dict[str, Any]) -> None:
        """Handle an event of sweep/trial.py; a repeated one has no effect."""
        trial = self.store.trials[event["number"]]
        if trial.status != "running":
            return
        match event["kind"]:
            case "validation_loss":
                if self.store.add_validation_loss(trial, event["validation_loss"]):
                    self._apply_early_stopping(trial, event["validation_loss"])
            case "failed":
                self.store.record_end(trial, "failed", event["reason"], **event["outcome"])
            case "ended":
                self._end(trial, event["finished"], event["outcome"])

    def on_exit(self, number: int, error: str = "") -> None:
        """Handle the exit of the driver of trial `number`; `error` says in a line why it died."""
        self.active.discard(number)
        trial = self.store.trials[number]
        if not error or trial.status != "running":
            return
        trial.driver_failures += 1
        if trial.driver_failures < self._config.max_starts:
            log.warning("%s: its driver died (%s); the trial is restarted", trial.name, error)
            self.store.write(trial)
        else:
            self.store.record_end(
                trial,
                "failed",
                f"its driver died {counted(trial.driver_failures, 'time')}: {error}",
            )

    def _new(self) -> Trial | None:
        while proposal := propose(
            self._config.space, self._config.search, self.store.trials, self._config.score
        ):
            branch, values = proposal
            try:
                diagnostics = self._diagnose_schedule(values)
            except ConfigError as error:
                reason = " ".join(str(error).split())
                self.store.add(values, branch, status="failed", reason=reason)
                continue
            if diagnostics is None:
                return self.store.add(values, branch)
            facts = diagnostics.stored()
            if reason := rejection_reason(diagnostics, self._config.pruning):
                self.store.add(values, branch, status="pruned", reason=reason, diagnostics=facts)
                continue
            return self.store.add(values, branch, diagnostics=facts)
        return None

    def _apply_early_stopping(self, trial: Trial, validation_loss: dict[str, Any]) -> None:
        reason = self._rule.decide(trial.number, validation_loss["step"], validation_loss["loss"])
        if reason and trial.status == "running":
            self._reasons[trial.number] = reason
            if trial.number in self.active:
                self._stop(trial.number)

    def _end(self, trial: Trial, finished: bool, outcome: dict[str, Any]) -> None:
        score, reason = self._config.score, self._reasons.get(trial.number, "")
        if finished and score not in outcome["metrics"]:
            known = ", ".join(outcome["metrics"]) or "nothing"
            self.store.record_end(
                trial, "failed", f"it reported {known}, but not {score}", **outcome
            )
        elif finished:
            self.store.record_end(trial, "finished", **outcome)
        elif reason:
            self.store.record_end(trial, "stopped", reason, **outcome)
        else:  # the whole sweep was stopped: the same command continues the trial
            self.store.record_interruption(trial, outcome)


def rejection_reason(diagnostics: ScheduleDiagnostics, limits: PruningConfig) -> str:
    """Return why this schedule cannot give good samples, in a line; "" if it can."""
    if diagnostics.prior_bits_per_dim > limits.max_prior_bits_per_dim:
        return (
            f"x_T keeps {diagnostics.prior_bits_per_dim:.3g} bits/dim of the image (alpha_bar_T "
            f"{diagnostics.alpha_bar_T:.3g}) that samples start without, above "
            f"pruning.max_prior_bits_per_dim={limits.max_prior_bits_per_dim:g}"
        )
    if diagnostics.wasted_step_fraction > limits.max_wasted_fraction:
        return (
            f"{diagnostics.wasted_step_fraction:.0%} of its steps are at noise levels where "
            f"nothing can be learnt, above pruning.max_wasted_fraction="
            f"{limits.max_wasted_fraction:g}"
        )
    return ""
