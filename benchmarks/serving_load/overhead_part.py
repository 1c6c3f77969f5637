"""The engine's own time: jobs that share all calls, against the bare network."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from benchmarks.serving_load.contestants import WIDTH, StepBatching
from benchmarks.serving_load.models import drawing_model
from benchmarks.serving_load.table import Row
from benchmarks.serving_load.traffic import Arrival
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.sampling.pipeline import TrainedModel

STEPS = {"digits": 50, "mnist": 20}
GOAL = 1.03
T = TypeVar("T")


class Cost(NamedTuple):
    cpu_s: float  # of all threads of the process
    wall_s: float

    def __truediv__(self, parts: float) -> "Cost":
        return Cost(self.cpu_s / parts, self.wall_s / parts)


def timed(act: Callable[[], T]) -> tuple[T, Cost]:
    """Return what `act` returns, and its time."""
    cpu_s, wall_s = time.process_time(), time.perf_counter()
    value = act()
    return value, Cost(time.process_time() - cpu_s, time.perf_counter() - wall_s)


def bare_calls(model: TrainedModel, calls: int) -> None:
    x_t = torch.randn(WIDTH, *model.denoiser.codec.shape(model.image_shape))
    t = torch.full((WIDTH,), 500)
    with torch.inference_mode():
        for _ in range(calls):
            model.denoiser.network(x_t, t, UNCONDITIONAL)


def eight_jobs(contestant: StepBatching, steps: int) -> int:
    """Draw 8 images by as many jobs; return the number of network calls."""
    before = contestant.engine.batches
    tickets = [contestant.submit(Arrival(0.0, 1, steps, seed)) for seed in range(WIDTH)]
    for ticket in tickets:
        ticket.result()
    return contestant.engine.batches - before


def overhead_rows(name: str, rounds: int, steps: int = 0) -> list[Row]:
    """Time of a call in 8 jobs of one image and in `sample(8)`, over that of the bare network."""
    model, steps = drawing_model(name), steps or STEPS[name]
    contestant = StepBatching(model)
    found: list[tuple[Cost, Cost, Cost]] = []
    try:
        for _ in range(rounds + 1):  # the first calls of a process are slow
            calls, jobs = timed(partial(eight_jobs, contestant, steps))
            _, bare = timed(partial(bare_calls, model, calls))
            _, alone = timed(partial(model.sample, WIDTH, steps=steps))
            found.append((jobs / calls, bare / calls, alone / steps))
    finally:
        contestant.close()
    found = found[1:]
    rows = [Row("a bare call of 8 images", [1e3 * bare.wall_s for _, bare, _ in found], unit="ms")]
    for kind, at in (("CPU", 0), ("wall", 1)):
        to_bare = [jobs[at] / bare[at] for jobs, bare, _ in found]
        alone_to_bare = [alone[at] / bare[at] for _, bare, alone in found]
        to_alone = [jobs[at] / alone[at] for jobs, _, alone in found]
        rows += [
            Row(f"8 jobs / bare calls, {kind} time", to_bare, at_most=GOAL),
            Row(f"  sample(8) without engine / bare calls, {kind}", alone_to_bare),
            Row(f"  8 jobs / sample(8) without engine, {kind}", to_alone),
        ]
    return rows
