"""Waits at an engine of width 1 against M/D/1: one server, equal jobs, Poisson arrivals."""

import statistics
import time
from functools import partial

import numpy as np
import torch

from benchmarks.serving_load.models import FixedTime, model_of
from benchmarks.serving_load.table import Row
from benchmarks.serving_load.traffic import (
    Times,
    lindley_waits,
    pollaczek_khinchine,
    typical_times,
)
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.serving.engine import Engine
from ddpm_ray.serving.engine_settings import EngineSettings

LOADS = 0.5, 0.8  # rho
CALL_S = 0.002  # of the network
SEEDS = 64  # of arrival times for each round and load


class FixedJobs:
    """Jobs of one call of a network that sleeps, at an engine of width 1."""

    def __init__(self, call_s: float) -> None:
        self.engine = Engine(EngineSettings(width=1))
        own = self.engine.shared(model_of(FixedTime(call_s), ImageShape(1, 1, 1)))
        x_t, t = torch.zeros(1, 1, 1, 1), torch.ones(1, dtype=torch.int64)
        self._act = partial(own.denoiser.network, x_t, t, UNCONDITIONAL)

    def stays_s(self, arrivals_s: Times) -> tuple[Times, Times]:
        """Submit jobs at these times; return when each was submitted, and the seconds to its end"""
        begun_s, ended_s = time.perf_counter(), np.zeros(len(arrivals_s))
        sent_s, jobs = np.zeros(len(arrivals_s)), []

        def note(number: int) -> None:
            ended_s[number] = time.perf_counter() - begun_s

        for number, at_s in enumerate(arrivals_s):
            if (left_s := at_s - (time.perf_counter() - begun_s)) > 0:
                time.sleep(left_s)
            sent_s[number] = time.perf_counter() - begun_s
            job = self.engine.submit(self._act, images=1, cost=1)
            job.when_done(partial(note, number))
            jobs.append(job)
        for job in jobs:
            job.result()
        return sent_s, ended_s - sent_s

    def service_s(self, count: int) -> float:
        """Seconds between the ends of two jobs, of many that wait."""
        sent_s, stays_s = self.stays_s(np.zeros(count))
        ends_s, first = np.sort(sent_s + stays_s), count // 10
        return float(ends_s[-1] - ends_s[first]) / (count - 1 - first)

    def lone_s(self, count: int) -> float:
        """Median seconds of a job that waits for no other."""
        return statistics.median(float(self.stays_s(np.zeros(1))[1][0]) for _ in range(count))


def waits_rows(rounds: int, seconds: float, call_s: float = CALL_S) -> list[Row]:
    """Mean waits over the formula's, and over the exact ones at the same times of arrival.

    A wait is the stay of a job less that of a job alone; S is measured before and after.
    """
    jobs, services = FixedJobs(call_s), list[float]()
    to_formula: dict[float, list[float]] = {load: [] for load in LOADS}
    to_trace: dict[float, list[float]] = {load: [] for load in LOADS}
    count = max(20, round(seconds / 20 / call_s))
    try:
        jobs.service_s(20)
        for number in range(rounds):
            for load in LOADS:
                before_s, lone_s = jobs.service_s(count), jobs.lone_s(max(10, count // 5))
                rate, seeds = load / before_s, range(SEEDS * number, SEEDS * (number + 1))
                arrivals_s = typical_times(rate, max(50, round(rate * seconds)), before_s, seeds)
                sent_s, stays_s = jobs.stays_s(arrivals_s)
                service_s = (before_s + jobs.service_s(count)) / 2
                services.append(1e3 * service_s)
                wait_s = float(np.mean(stays_s)) - lone_s
                to_formula[load].append(wait_s / pollaczek_khinchine(rate * service_s, service_s))
                to_trace[load].append(wait_s / float(lindley_waits(sent_s, service_s).mean()))
    finally:
        jobs.engine.close()
    rows = [Row("time of service S", services, unit="ms")]
    for load in LOADS:
        title = f"rho {load:g}: mean wait / (rho S / (2 (1 - rho)))"
        rows.append(Row(title, to_formula[load], at_least=0.95, at_most=1.05))
        rows.append(Row("  / M/D/1 at the same arrival times", to_trace[load]))
    return rows
