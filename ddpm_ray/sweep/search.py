"""Which values the next trial gets: a function of the sweep's seed and of the trials so far.

Nothing here has a state of its own, so a sweep that is started again goes on with the values that
it would have tried. The only importer of Optuna.
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

from ddpm_ray.config.loading import flat
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sweep import Branch, SearchConfig, is_range
from ddpm_ray.sweep.trial_store import Trial

Proposal: TypeAlias = tuple[int, dict[str, Any]]
"""The mapping of the space that a trial is drawn from, and its values by dotted key."""

BRANCH = "branch"  # Optuna's name for that mapping's number; its keys are named <number>.<key>
STATES = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,  # says nothing of its values: TPE leaves it out
}
DEFAULTS = flat(RunConfig())
optuna.logging.set_verbosity(optuna.logging.WARNING)


def total_trials(space: Sequence[Branch], search: SearchConfig) -> int:
    """How many trials the sweep has in all."""
    if search.kind != "grid":
        return search.trials
    every = sum(math.prod(len(choices) for choices in branch.values()) for branch in space)
    return min(every, search.trials or every)


def propose(
    space: Sequence[Branch], search: SearchConfig, trials: Sequence[Trial], score: str
) -> Proposal | None:
    """What trial number len(trials) is to try; None where the sweep has no more.

    `score` is the final metric, lower is better. What TPE proposes depends on which trials had
    ended by then, so on their timing, unless they run one at a time.
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
            return branch, {key: _drawn(key, among, generator) for key, among in candidates}
        case "tpe":
            return _learnt(space, search.seed, trials, score)
        case _:
            assert_never(search.kind)


def _combinations(space: Sequence[Branch]) -> Iterator[Proposal]:
    """Every combination of every branch, the last key fastest."""
    for number, branch in enumerate(space):
        for values in itertools.product(*branch.values()):
            yield number, dict(zip(branch, values, strict=True))


def _drawn(key: str, candidates: Any, generator: np.random.Generator) -> Any:
    """One of the candidates, each alike: on a logarithmic scale where the range says so."""
    match _distribution(key, candidates):
        case CategoricalDistribution(choices=choices):
            return candidates[int(generator.integers(len(choices)))]
        case IntDistribution(low=low, high=high, log=False, step=step):
            return int(low + step * generator.integers((high - low) // step + 1))
        case IntDistribution(low=low, high=high):  # each whole number has its share of the scale
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


def _learnt(space: Sequence[Branch], seed: int, trials: Sequence[Trial], score: str) -> Proposal:
    """What Optuna's tree-structured Parzen estimator proposes after `trials`."""
    drawn_by = int(np.random.SeedSequence((seed, len(trials))).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(
        seed=drawn_by,
        constant_liar=True,  # a trial that still runs is not proposed again
    )
    study = optuna.create_study(sampler=sampler)
    study.add_trials([_known(space, trial, score) for trial in trials])
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


def _known(space: Sequence[Branch], trial: Trial, score: str) -> FrozenTrial:
    """A trial as Optuna knows it."""
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
        intermediate_values={probe["step"]: probe["loss"] for probe in trial.probes},
    )


def _distribution(
    key: str, candidates: Any
) -> CategoricalDistribution | IntDistribution | FloatDistribution:
    """The candidates of a key in Optuna's terms; choices go by their number, whatever they are."""
    if not is_range(candidates):
        return CategoricalDistribution(range(len(candidates)))
    low, high, log = candidates["low"], candidates["high"], bool(candidates.get("log"))
    step = candidates.get("step")
    if step:  # end on a step: Optuna warns of a range that does not; in decimals, as 0.1 is one
        first, by = Decimal(str(low)), Decimal(str(step))
        last = first + (Decimal(str(high)) - first) // by * by
        high = type(DEFAULTS[key])(last)  # 0 may well be the low end of a range of floats
    if isinstance(DEFAULTS[key], int):
        return IntDistribution(low, high, log, step or 1)
    return FloatDistribution(low, high, log, step)
