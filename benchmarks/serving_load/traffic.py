"""Requests that arrive at random: open loop, as clients send them who do not know each other."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

STEPS, IMAGES = (5, 20, 50), (1, 2)  # of a request, each equally often
MEAN_ROWS = sum(STEPS) / len(STEPS) * sum(IMAGES) / len(IMAGES)  # network rows of a request
Times = npt.NDArray[np.float64]


class Arrival(NamedTuple):
    """A request, and when it comes."""

    at_s: float
    images: int
    steps: int
    seed: int


def poisson_trace(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of `rate` per second: a function of the arguments alone."""
    draw, at_s, trace = random.Random(seed), 0.0, list[Arrival]()
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        trace.append(Arrival(at_s, draw.choice(IMAGES), draw.choice(STEPS), len(trace)))
    return trace


def offered_trace(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """A Poisson trace of about 10 requests at least, for short runs of slow models."""
    return poisson_trace(rate, max(seconds, 10 / rate), seed)


def backlog(count: int, seed: int) -> list[Arrival]:
    """Requests of the same kinds, all at time 0."""
    draw = random.Random(seed)
    return [Arrival(0.0, draw.choice(IMAGES), draw.choice(STEPS), n) for n in range(count)]


def lindley_waits(arrivals_s: Times, service_s: float) -> Times:
    """Waits before service of jobs that one server takes in turn, each for `service_s`.

    Lindley's recursion W_n+1 = max(0, W_n + S - gap) in closed form: a walk over its minimum.
    """
    walk = np.concatenate([[0.0], np.cumsum(service_s - np.diff(arrivals_s))])
    waits: Times = walk - np.minimum.accumulate(walk)
    return waits


def pollaczek_khinchine(load: float, service_s: float) -> float:
    """Mean wait of M/D/1 at this load (rho): rho S / (2 (1 - rho))."""
    return load * service_s / (2 * (1 - load))


def typical_times(rate: float, count: int, service_s: float, seeds: Sequence[int]) -> Times:
    """Arrival times of a Poisson process, of the seed whose M/D/1 waits are nearest to the mean.

    The mean wait of some thousand arrivals varies by several percent from one seed to another.
    """
    wanted = pollaczek_khinchine(rate * service_s, service_s)
    traces = [np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)) for seed in seeds]
    return min(traces, key=lambda one: abs(lindley_waits(one, service_s).mean() - wanted))
