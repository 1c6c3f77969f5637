"""Waits at an engine of width 1 against M/D/1: one server, equal jobs, Poisson arrivals."""

import time

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.serving_load.models import model_of
from benchmarks.serving_load.table import Row
from benchmarks.serving_load.traffic import (
    Times,
    lindley_waits,
    pollaczek_khinchine,
    typical_times,
)
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning
from ddpm_ray.serving.engine import Engine
from ddpm_ray.serving.engine_settings import EngineSettings

LOADS = 0.5, 0.8  # rho
CALL_S = 0.05  # of the network: long against the time that a job takes to begin
SEEDS = 64  # of arrival times for each round and load
FIRST_JOBS = 50  # of the first estimate of S


class SleepingNetwork(nn.Module):
    """Takes a fixed time and no CPU; notes when the call with t = n began, at n."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.begun_s: dict[int, float] = {}

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.begun_s[int(t)] = time.perf_counter()
        time.sleep(self.seconds)
        return x_t


class FixedJobs:
    """Jobs of one call of a network that sleeps, at an engine of width 1."""

    def __init__(self, call_s: float) -> None:
        self.engine, self._network = Engine(EngineSettings(width=1)), SleepingNetwork(call_s)
        own = self.engine.shared(model_of(self._network, ImageShape(1, 1, 1)))
        self._shared = own.denoiser.network

    def served(self, arrivals_s: Times) -> tuple[Times, Times]:
        """Submit jobs at these times; return when each was submitted, and when its call began."""
        begun_s, sent_s, jobs = time.perf_counter(), np.zeros(len(arrivals_s)), []
        x_t = torch.zeros(1, 1, 1, 1)
        for number, at_s in enumerate(arrivals_s):
            t = torch.full((1,), number)
            if (left_s := at_s - (time.perf_counter() - begun_s)) > 0:
                time.sleep(left_s)
            sent_s[number] = time.perf_counter() - begun_s
            jobs.append(
                self.engine.submit(
                    lambda t=t: self._shared(x_t, t, UNCONDITIONAL),  # type: ignore[misc]
                    images=1,
                    cost=1,
                )
            )
        for job in jobs:
            job.result()
        calls_s = np.array([self._network.begun_s[number] for number in range(len(jobs))])
        return sent_s, calls_s - begun_s


def service_s(sent_s: Times, calls_s: Times) -> float:
    """Mean time from one call to the next, of jobs that waited for the whole of the first."""
    waited = sent_s[1:] < calls_s[:-1]
    return float(np.diff(calls_s)[waited].mean())


def idle_s(sent_s: Times, calls_s: Times, call_s: float) -> float:
    """Median time to the call of a job that finds the engine idle: M/D/1 has none."""
    idle = sent_s[1:] > calls_s[:-1] + 1.5 * call_s
    return float(np.median((calls_s - sent_s)[1:][idle]))


def waits_rows(rounds: int, seconds: float, call_s: float = CALL_S) -> list[Row]:
    """Mean waits over the formula's, and over the exact ones at the same times of arrival.

    A wait is the time from the submission of a job to the beginning of its call; the time of
    service is measured in the same jobs.
    """
    jobs, services, starts = FixedJobs(call_s), list[float](), list[float]()
    to_formula: dict[float, list[float]] = {load: [] for load in LOADS}
    to_trace: dict[float, list[float]] = {load: [] for load in LOADS}
    try:
        expected_s = service_s(*jobs.served(np.zeros(FIRST_JOBS)))
        for number in range(rounds):
            for load in LOADS:
                rate, seeds = load / expected_s, range(SEEDS * number, SEEDS * (number + 1))
                count = max(FIRST_JOBS, round(rate * seconds))
                sent_s, calls_s = jobs.served(typical_times(rate, count, expected_s, seeds))
                services.append(expected_s := service_s(sent_s, calls_s))
                starts.append(idle_s(sent_s, calls_s, call_s))
                wait_s = float((calls_s - sent_s).mean())
                formula_s = pollaczek_khinchine(rate * expected_s, expected_s)
                to_formula[load].append(wait_s / formula_s)
                to_trace[load].append(wait_s / float(lindley_waits(sent_s, expected_s).mean()))
    finally:
        jobs.engine.close()
    rows = [
        Row("time of service S", [1e3 * one for one in services], unit="ms"),
        Row("time to the call at an idle engine", [1e3 * one for one in starts], unit="ms"),
    ]
    for load in LOADS:
        title = f"rho {load:g}: mean wait / (rho S / (2 (1 - rho)))"
        rows.append(Row(title, to_formula[load], at_least=0.95, at_most=1.05))
        rows.append(Row("  / M/D/1 at the same arrival times", to_trace[load]))
    return rows
