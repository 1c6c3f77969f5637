"""What a sweep does next: which trial begins, which one stops, how each ended. Without Tune.

It acts on events alone, and each is written down before anything follows from it. A sweep that is
started again after a crash reads them and stands where it stood.
"""

import logging
from collections.abc import Callable
from typing import Any

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.sweep import PruningConfig, SweepConfig
from ddpm_ray.diffusion.schedule_diagnostics import Appraisal
from ddpm_ray.redaction import counted
from ddpm_ray.sweep.early_stopping import EarlyStopping
from ddpm_ray.sweep.search import propose, total_trials
from ddpm_ray.sweep.trial_store import Ledger, Trial

log = logging.getLogger(__name__)


class Book:
    """The trials of one sweep and what becomes of them.

    `appraise` says what the schedule of a trial's values is worth, or raises ConfigError; `stop`
    asks the trial of that number to stop.
    """

    def __init__(
        self,
        config: SweepConfig,
        ledger: Ledger,
        appraise: Callable[[dict[str, Any]], Appraisal],
        stop: Callable[[int], None],
    ) -> None:
        self.ledger = ledger
        self.closing = False  # nothing new is begun
        self.active: set[int] = set()  # numbers of the trials at work
        self._config, self._appraise, self._stop = config, appraise, stop
        self._reasons: dict[int, str] = {}  # why a trial was asked to stop
        self._rule = EarlyStopping(config.stopping, config.run.training.steps)
        for _, trial, probe in ledger.events():
            if probe is not None:
                self._judge(trial, probe)

    @property
    def total(self) -> int:
        """Trials that the sweep has in all."""
        return total_trials(self._config.space, self._config.search)

    @property
    def ended(self) -> list[Trial]:
        """Trials that are over, however."""
        return [trial for trial in self.ledger.trials if trial.status != "running"]

    def next(self) -> Trial | None:
        """The trial that is to be worked on now; None while, or for ever if, there is none.

        One that an earlier driver left behind comes before new ones. Those that cannot be run, or
        whose schedule is hopeless, end here, without a worker.
        """
        if self.closing:
            return None
        waiting = (t for t in self.ledger.trials if t.status == "running")
        trial = next((t for t in waiting if t.number not in self.active), None) or self._new()
        if trial is not None:
            self.active.add(trial.number)
            if trial.number in self._reasons:  # decided before the crash
                self._stop(trial.number)
        return trial

    def heard(self, event: dict[str, Any]) -> None:
        """Act on an event of sweep/trial.py; one that comes twice is taken once."""
        trial = self.ledger.trials[event["number"]]
        if trial.status != "running":
            return
        match event["kind"]:
            case "probe":
                if self.ledger.probe(trial, event["probe"]):
                    self._judge(trial, event["probe"])
            case "failed":
                self.ledger.end(trial, "failed", event["reason"], **event["outcome"])
            case "ended":
                self._end(trial, event["finished"], event["outcome"])

    def left(self, number: int, error: str = "") -> None:
        """Trial `number` is no longer worked on; `error`: its driver died, in a line."""
        self.active.discard(number)
        trial = self.ledger.trials[number]
        if not error or trial.status != "running":
            return
        trial.losses += 1
        if trial.losses < self._config.max_starts:
            log.warning("%s: its driver died (%s); it is started again", trial.name, error)
            self.ledger.write(trial)
        else:
            self.ledger.end(
                trial, "failed", f"its driver died {counted(trial.losses, 'time')}: {error}"
            )

    def _new(self) -> Trial | None:
        while proposal := propose(
            self._config.space, self._config.search, self.ledger.trials, self._config.score
        ):
            branch, values = proposal
            try:
                worth = self._appraise(values)
            except ConfigError as error:
                reason = " ".join(str(error).split())
                self.ledger.add(values, branch, status="failed", reason=reason)
                continue
            appraisal = vars(worth)
            if reason := hopeless(worth, self._config.pruning):
                self.ledger.add(values, branch, status="pruned", reason=reason, appraisal=appraisal)
                continue
            return self.ledger.add(values, branch, appraisal=appraisal)
        return None

    def _judge(self, trial: Trial, probe: dict[str, Any]) -> None:
        reason = self._rule.decide(trial.number, probe["step"], probe["loss"])
        if reason and trial.status == "running":
            self._reasons[trial.number] = reason
            if trial.number in self.active:
                self._stop(trial.number)

    def _end(self, trial: Trial, finished: bool, outcome: dict[str, Any]) -> None:
        score, reason = self._config.score, self._reasons.get(trial.number, "")
        if finished and score not in outcome["metrics"]:
            known = ", ".join(outcome["metrics"]) or "nothing"
            self.ledger.end(trial, "failed", f"it reported {known}, but no {score}", **outcome)
        elif finished:
            self.ledger.end(trial, "finished", **outcome)
        elif reason:
            self.ledger.end(trial, "stopped", reason, **outcome)
        else:  # it stopped because the sweep did: the same command goes on with it
            self.ledger.interrupted(trial, outcome)


def hopeless(worth: Appraisal, limits: PruningConfig) -> str:
    """Why no training could make samples of this schedule good, in a line; empty: it could."""
    if worth.prior_bits_per_dim > limits.max_prior_bits_per_dim:
        return (
            f"x_T keeps {worth.prior_bits_per_dim:.3g} bits/dim of the image (alpha_bar_T "
            f"{worth.alpha_bar_T:.3g}) that samples start without, above "
            f"pruning.max_prior_bits_per_dim={limits.max_prior_bits_per_dim:g}"
        )
    if worth.useless_share > limits.max_useless_share:
        return (
            f"{worth.useless_share:.0%} of its steps are at noise levels where nothing can be "
            f"learnt, above pruning.max_useless_share={limits.max_useless_share:g}"
        )
    return ""
