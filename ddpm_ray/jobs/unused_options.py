"""A warning for options of the group `evaluation` that a job accepts and does not use."""

import logging

from ddpm_ray.config.evaluation import OF_DENOISERS, OF_EVALUATE, OF_RUNS, EvaluationConfig
from ddpm_ray.config.run import RunConfig

log = logging.getLogger(__name__)


def warn_of_unused(config: RunConfig) -> None:
    """Log the options that are set, but that the scores of a run do not use.

    They are no errors, since configs of earlier versions name them.
    """
    _warn(config.evaluation, OF_EVALUATE, "give them to `ddpm-ray evaluate` when the run has ended")
    if not config.traits.has_noise:
        _warn(config.evaluation, OF_DENOISERS, "they belong to scores of denoisers: leave them out")


def warn_of_options_of_runs(config: EvaluationConfig) -> None:
    """Log the options that are set, but that only a run uses, while it trains."""
    _warn(config, OF_RUNS, "they are options of runs, used while they train: leave them out")


def _warn(config: EvaluationConfig, keys: tuple[str, ...], remedy: str) -> None:
    if line := config.unused(keys, remedy):
        log.warning("%s", line)
