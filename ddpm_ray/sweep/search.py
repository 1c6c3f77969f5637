"""Search: the next trial's values as a function of the sweep's seed and of the trials so far.

Nothing here has state, so a resumed sweep proposes the values that it would have proposed without
the interruption. The only importer of Optuna.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any, TypeAlias, assert_never

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from ddpm_ray.config.jobs.search_space import Branch, is_range
from ddpm_ray.config.jobs.sweep import HIGHER_IS_BETTER, SearchConfig
from ddpm_ray.config.loading import flat
from ddpm_ray.config.run import RunConfig
from ddpm_ray.sweep.trial_store import Trial

Proposal: TypeAlias = tuple[int, dict[str, Any]]
"""Index of the mapping of the space that a trial is drawn from, and its values by dotted key."""

BRANCH = "branch"  # Optuna's parameter for that index; keys of a mapping are <index>.<key>
STATES = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,  # TPE ignores failed trials: the cause need not be their values
}
DEFAULTS = flat(RunConfig())
optuna.logging.set_verbosity(optuna.logging.WARNING)


def total_trials(space: Sequence[Branch], search: SearchConfig) -> int:
    """Return the number of trials of the whole sweep."""
    if search.kind != "grid":
        return search.trials
    every = sum(math.prod(len(choices) for choices in branch.values()) for branch in space)
    return min(every, search.trials or every)


def propose(
    space: Sequence[Branch], search: SearchConfig, trials: Sequence[Trial], score: str
) -> Proposal | None:
    """Return the values of trial number len(trials); None if the sweep has no more trials.

    `score` is the final metric. TPE's proposals depend on which trials have ended,
    so on timing unless trials run one at a time.
    """
    number = len(trials)
    if number >= total_trials(space, search):
        return None
    match search.kind:
        case "grid":
            return next(itertools.islice(_combinations(space), number, None))
        case "random":
            generator = np.random.Generator(np.random.Philox(key=(search.seed, number)))
            branch = int(generator.integers(len(space)))
            candidates = space[branch].items()
            return branch, {key: _draw(key, among, generator) for key, among in candidates}
        case "tpe":
            return _propose_by_tpe(space, search.seed, trials, score)
        case _:
            assert_never(search.kind)


def _combinations(space: Sequence[Branch]) -> Iterator[Proposal]:
    """Yield every combination of each mapping's choices; the last key varies fastest."""
    for number, branch in enumerate(space):
        for values in itertools.product(*branch.values()):
            yield number, dict(zip(branch, values, strict=True))


def _draw(key: str, candidates: Any, generator: np.random.Generator) -> Any:
    """Draw one candidate uniformly, on a logarithmic scale if the range has `log`."""
    match _distribution(key, candidates):
        case CategoricalDistribution(choices=choices):
            return candidates[int(generator.integers(len(choices)))]
        case IntDistribution(low=low, high=high, log=False, step=step):
            return int(low + step * generator.integers((high - low) // step + 1))
        case IntDistribution(low=low, high=high):  # each integer covers +-0.5 of the scale
            ends = math.log(low - 0.5), math.log(high + 0.5)
            return min(high, max(low, round(math.exp(generator.uniform(*ends)))))
        case FloatDistribution(low=low, high=high, log=True):
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        case FloatDistribution(low=low, high=high, step=None):
            return float(generator.uniform(low, high))
        case FloatDistribution(low=low, high=high, step=step):
            assert step is not None
            return float(low + step * generator.integers(round((high - low) / step) + 1))
        case other:
            raise AssertionError(other)


def _propose_by_tpe(
    space: Sequence[Branch], seed: int, trials: Sequence[Trial], score: str
) -> Proposal:
    """Return what Optuna's tree-structured Parzen estimator proposes after `trials`."""
    trial_seed = int(np.random.SeedSequence((seed, len(trials))).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(
        seed=trial_seed,
        constant_liar=True,  # do not propose the values of running trials again
    )
    higher = score in HIGHER_IS_BETTER
    study = optuna.create_study(sampler=sampler, direction="maximize" if higher else "minimize")
    study.add_trials([_optuna_trial(space, trial, score) for trial in trials])
    asked = study.ask()
    chosen: Any = asked.suggest_categorical(BRANCH, range(len(space)))
    branch = int(chosen)
    values: dict[str, Any] = {}
    for key, candidates in space[branch].items():
        name, among = f"{branch}.{key}", _distribution(key, candidates)
        if isinstance(among, CategoricalDistribution):
            chosen = asked.suggest_categorical(name, among.choices)
            values[key] = candidates[int(chosen)]
        elif isinstance(among, IntDistribution):
            values[key] = asked.suggest_int(
                name, among.low, among.high, step=among.step, log=among.log
            )
        else:
            values[key] = asked.suggest_float(
                name, among.low, among.high, step=among.step, log=among.log
            )
    return branch, values


def _optuna_trial(space: Sequence[Branch], trial: Trial, score: str) -> FrozenTrial:
    """Convert a trial to Optuna's form."""
    parameters: dict[str, Any] = {BRANCH: trial.branch}
    distributions: dict[str, BaseDistribution] = {
        BRANCH: CategoricalDistribution(range(len(space)))
    }
    for key, candidates in space[trial.branch].items():
        name, value = f"{trial.branch}.{key}", trial.values[key]
        distributions[name] = _distribution(key, candidates)
        parameters[name] = value if is_range(candidates) else candidates.index(value)
    return optuna.trial.create_trial(
        params=parameters,
        distributions=distributions,
        state=STATES[trial.status],
        value=trial.metrics.get(score),
        intermediate_values={one["step"]: one["loss"] for one in trial.validation_losses},
    )


def _distribution(
    key: str, candidates: Any
) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    """Convert a key's candidates to an Optuna distribution; choices become their indices."""
    if not is_range(candidates):
        return CategoricalDistribution(range(len(candidates)))
    low, high, log = candidates["low"], candidates["high"], bool(candidates.get("log"))
    step = candidates.get("step")
    if step:  # end on a step, else Optuna warns; Decimal, because 0.1 is no exact float
        first, by = Decimal(str(low)), Decimal(str(step))
        last = first + (Decimal(str(high)) - first) // by * by
        high = type(DEFAULTS[key])(last)  # a range of floats may start at the integer 0
    if isinstance(DEFAULTS[key], int):
        return IntDistribution(low, high, log, step or 1)
    return FloatDistribution(low, high, log, step)
