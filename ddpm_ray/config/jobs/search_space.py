"""The search space of a sweep: which keys of a run it may vary, by choices or in a range."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ddpm_ray.config.loading import complaint
from ddpm_ray.config.run import RunConfig

Branch = Mapping[str, Any]  # dotted key of the run -> a list of choices, or a range

# Keys that must be equal in all trials, or their scores are not comparable. The first matching
# prefix gives the reason.
FIXED = {
    "name": "the sweep names its trials",
    "task": "models of different tasks have no score in common",
    "storage": "the sweep's folder holds its trials",
    "tracking.": "all runs of a sweep are in one MLflow experiment",
    "cluster.": "every trial's workers are checked against the cluster before the first starts",
    "evaluation.": "scores are comparable under one protocol only",
    "sampling.seed": "all trials sample from the same noise",
    "sampling.steps": "trials are compared at an equal number of network calls",
    "training.steps": "trials are compared after an equal number of optimiser steps",
    "training.core_seconds": "trials are compared at equal core-seconds",
    "data.source": "scores against different data cannot be compared",
}


def is_list(candidates: Any) -> bool:
    """Whether the candidates of a key are a list of choices."""
    return isinstance(candidates, list | tuple)


def is_range(candidates: Any) -> bool:
    """Whether the candidates of a key are a range, not a list of choices."""
    return isinstance(candidates, Mapping)


def space_problems(space: tuple[Branch, ...], search: str) -> Iterator[str]:
    """Yield one line for each key that cannot be searched."""
    if not space or not all(space):
        yield "space is empty; give it at least one key of the run with choices to try"
    reported = set()
    for branch in space:
        for key, candidates in branch.items():
            for line in _key_problems(key, candidates, search):
                if line not in reported:
                    yield f"space.{line}"
                reported.add(line)


def _key_problems(key: str, candidates: Any, search: str) -> Iterator[str]:
    if reason := next((FIXED[prefix] for prefix in FIXED if key.startswith(prefix)), ""):
        yield f"{key} cannot be varied: {reason}; set run.{key} for all trials"
    elif is_range(candidates):
        yield from _range_problems(key, candidates, search)
    elif not is_list(candidates) or not candidates:
        yield f"{key} is {candidates!r}; give choices, as [a, b], or a range, as {{low: , high: }}"
    else:
        yield from filter(None, (complaint(RunConfig, key, value) for value in candidates))


def _range_problems(key: str, bounds: Mapping[str, Any], search: str) -> Iterator[str]:
    if unknown := sorted(set(bounds) - {"low", "high", "log", "step"}):
        yield f"{key} has {unknown}; a range knows low, high, log and step"
        return
    ends = [bounds.get("low"), bounds.get("high")]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in ends):
        yield f"{key} goes from {ends[0]!r} to {ends[1]!r}; a range needs the numbers low and high"
        return
    if wrong := next(filter(None, (complaint(RunConfig, key, x) for x in ends)), ""):
        yield wrong
    elif search == "grid":
        yield f"{key} is a range, and a grid needs choices; list them, or use search.kind=tpe"
    elif ends[0] >= ends[1]:  # type: ignore[operator]  # both are numbers
        yield f"{key} goes from {ends[0]} to {ends[1]}; low must be below high"
    elif bounds.get("log") and ends[0] <= 0:  # type: ignore[operator]
        yield f"{key} begins at {ends[0]}; a range on a log scale must begin above 0"
    elif bounds.get("log") and bounds.get("step"):
        yield f"{key} has log and step; a range knows one of the two"
    elif (step := bounds.get("step")) is not None:
        yield from _step_problems(key, ends[0], step)


def _step_problems(key: str, low: Any, step: object) -> Iterator[str]:
    if not isinstance(step, int | float) or not 0 < step < math.inf:
        yield f"{key} goes by steps of {step!r}; a step is a number above 0"
    elif complaint(RunConfig, key, low + step):
        yield f"{key} goes by steps of {step!r}; its values are whole numbers: so is a step"
