"""Which trials are stopped early: Ray Tune's own rules, told of one loss after the other.

The rules run beside Tune's loop instead of inside it. Inside, a decision makes Tune kill the trial
in the middle of a step: its last rows are lost, its MLflow run stays open, and its workers' place
is given back only where Ray's State API can be reached. Here the trial is asked to stop, commits
its checkpoint and ends by itself.
"""

import math
from collections import defaultdict
from typing import Any, assert_never

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from ddpm_ray.config.sweep import StoppingConfig

STEP, LOSS = "step", "loss"


class EarlyStopping:
    """A rule over the common losses of a sweep's trials, by optimiser step, not by report.

    Its decisions depend on what it is told and on the order alone: told again in that order, after
    a crash, it stands where it stood.
    """

    def __init__(self, config: StoppingConfig, total_steps: int) -> None:
        self._kind, self._total_steps = config.kind, total_steps
        self._rule: Any = _rule(config, total_steps)
        self._known: dict[int, _Known] = {}
        self._stopped: set[int] = set()
        self._losses: dict[int, list[float]] = defaultdict(list)  # by step

    def decide(self, number: int, step: int, loss: float) -> str:
        """Why trial `number` is to be stopped after `step`, in a line; empty: it goes on.

        A trial is stopped once; at the last step there is nothing left to stop.
        """
        if self._rule is None or number in self._stopped or step >= self._total_steps:
            return ""
        if not math.isfinite(loss):
            self._stopped.add(number)
            return f"its common loss is {loss} at step {step}"
        self._losses[step].append(loss)
        if number not in self._known:
            self._known[number] = _Known(number)
            self._rule.on_trial_add(None, self._known[number])
        trial, told = self._known[number], {STEP: step, LOSS: loss}
        decision = self._rule.on_trial_result(_Controller(), trial, told)
        if decision != TrialScheduler.STOP:
            return ""
        self._stopped.add(number)
        losses = self._losses[step]
        rank = 1 + sum(other < loss for other in losses)
        return f"{self._kind}: common loss {loss:.4g} at step {step}, {rank} of {len(losses)}"


class _Known:
    """What the rules ask of one of Tune's trials: an identity."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:05d}"


class _Controller:
    """What the median rule asks of Tune's loop before it would make a trial wait for others."""

    def get_live_trials(self) -> list[_Known]:
        """None that waits: trials never pause here."""
        return []


def _rule(config: StoppingConfig, total_steps: int) -> TrialScheduler | None:
    match config.kind:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr=STEP, metric=LOSS, mode="min", max_t=total_steps,
                grace_period=config.grace_steps, reduction_factor=config.reduction_factor,
            )  # fmt: skip
        case "median":
            return MedianStoppingRule(
                time_attr=STEP, metric=LOSS, mode="min", grace_period=config.grace_steps,
                min_samples_required=config.min_trials,
            )  # fmt: skip
        case "none" | "pbt":  # the config refuses the latter
            return None
        case _:
            assert_never(config.kind)
