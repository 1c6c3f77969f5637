"""Clients that leave, and clients that wait for a first preview."""

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from benchmarks.serving_load.contestants import (
    CONTESTANTS,
    WIDTH,
    Contestant,
    StepBatching,
    Ticket,
)
from benchmarks.serving_load.models import drawing_model
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import Arrival, backlog, offered_trace
from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.sampling.pipeline import TrainedModel

LEAVING = 0.3  # share of the clients
LOAD = 0.8
PEER = "batch, largest steps"


class CountedCalls:
    """A network that counts the calls that have begun."""

    def __init__(self, network: Network) -> None:
        self.begun, self._network = 0, network

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.begun += 1
        return self._network(x_t, t, conditioning)


def saturation(
    make: Callable[[TrainedModel], Contestant], model: TrainedModel, count: int
) -> float:
    """Requests a second, of so many that are there at once."""
    contestant = make(model)
    try:
        contestant.submit(Arrival(0.0, 1, 5, 0)).result()
        begun_s = time.perf_counter()
        for ticket in [contestant.submit(arrival) for arrival in backlog(count, 0)]:
            ticket.result()
        return count / (time.perf_counter() - begun_s)
    finally:
        contestant.close()


def leaving_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Steps that are computed for requests after their clients have left."""
    model = drawing_model(name)
    rate = LOAD * saturation(CONTESTANTS[PEER], model, 4 * WIDTH)
    found: dict[str, list[list[int]]] = {"ours": [], PEER: []}
    for number in range(rounds):
        for one, steps in found.items():
            contestant = CONTESTANTS[one](model)
            try:
                steps.append(steps_after(contestant, rate, seconds, number))
            finally:
                contestant.close()
    rows = []
    for one, steps in found.items():
        most = [float(max(each)) for each in steps]
        rows += [
            Row(
                f"most steps after a client left, {one}", most, at_most=1 if one == "ours" else None
            ),
            Row("  mean of those who left", [statistics.mean(each) for each in steps]),
        ]
    sums = [[sum(each) for each in steps] for steps in found.values()]
    ratios = [own / max(1, its) for own, its in zip(*sums, strict=True)]
    return [*rows, Row(f"all steps after clients left, ours / {PEER}", ratios)]


def steps_after(contestant: Contestant, rate: float, seconds: float, seed: int) -> list[int]:
    """Return, for each request whose client left before its end, the steps computed after that.

    A client leaves within the time in which 8 requests arrive.
    """
    draw, trace = random.Random(seed), offered_trace(rate, seconds, seed)
    events = [(one.at_s, number, True) for number, one in enumerate(trace)]
    for number, one in enumerate(trace):
        if draw.random() < LEAVING:
            events.append((one.at_s + draw.uniform(0, WIDTH / rate), number, False))
    tickets, ended, left = dict[int, Ticket](), set[int](), dict[int, int]()
    begun_s = time.perf_counter()
    for at_s, number, comes in sorted(events):
        time.sleep(max(0.0, at_s - (time.perf_counter() - begun_s)))
        if comes:
            tickets[number] = contestant.submit(trace[number])
            tickets[number].when_done(partial(ended.add, number))
        elif number not in ended:
            left[number] = tickets[number].steps
            tickets[number].cancel()
    for number, ticket in tickets.items():
        if number not in left:
            ticket.result()
    contestant.submit(Arrival(0.0, 1, 1, 0)).result()  # after it, all that left have ended
    return [tickets[number].steps - steps for number, steps in left.items()] or [0]


def preview_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Network calls that begin after a request was submitted, up to that of its first preview."""
    model = drawing_model(name)
    network = CountedCalls(model.denoiser.network)
    model = replace(model, denoiser=replace(model.denoiser, network=network))
    rate = LOAD * saturation(StepBatching, model, 4 * WIDTH)
    found = []
    for number in range(rounds):
        contestant, trace = StepBatching(model), offered_trace(rate, seconds, number)
        try:
            found.append(calls_to_preview(contestant, network, trace))
        finally:
            contestant.close()
    within = [100 * sum(calls < 2 for calls in one) / len(one) for one in found]
    return [
        Row("first preview within 1 call", within, unit="% of requests"),
        Row("calls to the first preview, mean", [statistics.mean(one) for one in found], at_most=2),
        Row("  p95", [percentile(one, 95) for one in found]),
        Row("  most", [max(one) for one in found]),
    ]


def calls_to_preview(
    contestant: StepBatching, network: CountedCalls, trace: Sequence[Arrival]
) -> list[float]:
    """Return the calls that begin between the submission of a request and its first step."""
    found, lock, tickets = list[float](), threading.Lock(), []

    def first_step(before: int, seen: list[int], *_: int | Tensor) -> None:
        if not seen:
            seen.append(network.begun - before)
            with lock:
                found.append(float(seen[0]))

    begun_s = time.perf_counter()
    for arrival in trace:
        time.sleep(max(0.0, arrival.at_s - (time.perf_counter() - begun_s)))
        on_step = partial(first_step, network.begun, list[int]())
        tickets.append(contestant.submit(arrival, on_step))
    for ticket in tickets:
        ticket.result()
    return found or [0.0]
