"""Early stopping of trials by Ray Tune's own rules, called outside Tune's loop.

Inside its loop Tune kills a stopped trial in the middle of a step: its last rows are lost, its
MLflow run stays open, and its placement group is removed only if Ray's State API can be reached.
Here the trial is asked to stop, commits a checkpoint and ends by itself.
"""

import math
from collections import defaultdict
from typing import Any, assert_never

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from ddpm_ray.config.jobs.sweep import StoppingConfig

STEP, LOSS = "step", "loss"


class EarlyStopping:
    """A stopping rule that compares the common losses of trials at equal optimiser steps.

    Its decisions depend only on the losses and their order, so a replay after a crash restores its
    state. Common loss: validation loss over the log-SNR range that all trials share.
    """

    def __init__(self, config: StoppingConfig, total_steps: int) -> None:
        self._kind, self._total_steps = config.kind, total_steps
        self._rule: Any = _rule(config, total_steps)
        self._trials: dict[int, _TuneTrial] = {}
        self._stopped: set[int] = set()
        self._losses: dict[int, list[float]] = defaultdict(list)  # by step

    def decide(self, number: int, step: int, loss: float) -> str:
        """Return why trial `number` should stop after `step`, in a line; "" if it continues.

        A trial is stopped once, and never at its last step.
        """
        if self._rule is None or number in self._stopped or step >= self._total_steps:
            return ""
        if not math.isfinite(loss):
            self._stopped.add(number)
            return f"its common loss is {loss} at step {step}"
        self._losses[step].append(loss)
        if number not in self._trials:
            self._trials[number] = _TuneTrial(number)
            self._rule.on_trial_add(None, self._trials[number])
        trial, result = self._trials[number], {STEP: step, LOSS: loss}
        decision = self._rule.on_trial_result(_Controller(), trial, result)
        if decision != TrialScheduler.STOP:
            return ""
        self._stopped.add(number)
        losses = self._losses[step]
        rank = 1 + sum(other < loss for other in losses)
        return f"{self._kind}: common loss {loss:.4g} at step {step}, {rank} of {len(losses)}"


class _TuneTrial:
    """Stands for a trial of Tune: the rules use its id alone."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:05d}"


class _Controller:
    """Stands for Tune's loop: the median rule asks it for paused trials."""

    def get_live_trials(self) -> list[_TuneTrial]:
        """Return no trial: trials never pause here."""
        return []


def _rule(config: StoppingConfig, total_steps: int) -> TrialScheduler | None:
    match config.kind:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr=STEP,
                metric=LOSS,
                mode="min",
                max_t=total_steps,
                grace_period=config.grace_steps,
                reduction_factor=config.reduction_factor,
            )
        case "median":
            return MedianStoppingRule(
                time_attr=STEP,
                metric=LOSS,
                mode="min",
                grace_period=config.grace_steps,
                min_samples_required=config.min_trials,
            )
        case "none" | "pbt":  # the config rejects "pbt"
            return None
        case _:
            assert_never(config.kind)
