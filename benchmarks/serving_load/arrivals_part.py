"""Throughput and latency with one model, of our engine and of request batching, in turn."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from benchmarks.serving_load.contestants import CONTESTANTS, WIDTH, Contestant
from benchmarks.serving_load.models import call_s, drawing_model
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import MEAN_ROWS, Arrival, backlog, offered_trace
from ddpm_ray.sampling.pipeline import TrainedModel

PEERS = tuple(name for name in CONTESTANTS if name != "ours")
GOAL_PEER = "batch, largest steps"
LOAD = 0.8  # of the saturation of the peer
Make = Callable[[TrainedModel], Contestant]


@dataclass
class Replay:
    """Times and counts of a trace that was served."""

    latencies_s: list[float] = field(default_factory=list)
    seconds: float = 0.0  # until the last request had ended
    cpu_s: float = 0.0  # of all threads
    submitted_late_s: float = 0.0  # the most that a request was sent after its time


def replayed(contestant: Contestant, trace: Sequence[Arrival]) -> Replay:
    """Submit each request at its time, and wait for all."""
    found, lock, tickets = Replay(), threading.Lock(), []
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()

    def note(sent_s: float) -> None:
        with lock:
            found.latencies_s.append(time.perf_counter() - begun_s - sent_s)

    for arrival in trace:
        now_s = time.perf_counter() - begun_s
        if arrival.at_s > now_s:
            time.sleep(arrival.at_s - now_s)
        else:
            found.submitted_late_s = max(found.submitted_late_s, now_s - arrival.at_s)
        ticket = contestant.submit(arrival)
        tickets.append(ticket)
        ticket.when_done(partial(note, arrival.at_s))
    for ticket in tickets:
        ticket.result()
    found.seconds = time.perf_counter() - begun_s
    found.cpu_s = time.process_time() - begun_cpu_s
    return found


def run(make: Make, model: TrainedModel, trace: Sequence[Arrival]) -> Replay:
    """A trace on a new contestant, after one request that is not counted."""
    contestant = make(model)
    try:
        contestant.submit(Arrival(0.0, 1, 5, 0)).result()
        return replayed(contestant, trace)
    finally:
        contestant.close()


def arrivals_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Ratios of saturation rates, and of latencies at 0.8 of that of each peer."""
    model = drawing_model(name)
    rate = WIDTH / (call_s(model, WIDTH) * MEAN_ROWS)
    count = max(2 * WIDTH, round(rate * seconds / 2))
    rates: dict[str, list[float]] = {one: [] for one in CONTESTANTS}
    per_cpu: dict[str, list[float]] = {one: [] for one in CONTESTANTS}
    tails: dict[str, list[tuple[Replay, Replay]]] = {one: [] for one in PEERS}
    kept_up: list[float] = []
    for number in range(rounds):
        trace = backlog(count, number)
        for one, make in CONTESTANTS.items():
            whole = run(make, model, trace)
            rates[one].append(count / whole.seconds)
            per_cpu[one].append(count / whole.cpu_s)
        for peer in PEERS:
            offered = offered_trace(LOAD * rates[peer][-1], seconds, number)
            own = run(CONTESTANTS["ours"], model, offered)
            tails[peer].append((own, run(CONTESTANTS[peer], model, offered)))
        beyond = offered_trace(1.3 * rates[GOAL_PEER][-1], seconds, number)
        kept_up.append(run(CONTESTANTS["ours"], model, beyond).seconds / beyond[-1].at_s)
    rows = [Row(f"{one}: saturation", rates[one], unit="requests/s") for one in CONTESTANTS]
    for peer in PEERS:
        rows += peer_rows(peer, rates, tails[peer])
        gains = [own / its for own, its in zip(per_cpu["ours"], per_cpu[peer], strict=True)]
        rows.append(Row(f"requests per CPU second, ours / {peer}", gains))
    title = f"ours at 1.3 x saturation of {GOAL_PEER}: s/s"
    return [*rows, Row(title, kept_up)]


def peer_rows(
    peer: str, rates: dict[str, list[float]], tails: Sequence[tuple[Replay, Replay]]
) -> list[Row]:
    """The ratios to one peer; those to GOAL_PEER have goals."""
    has_goal = peer == GOAL_PEER
    gains = [own / its for own, its in zip(rates["ours"], rates[peer], strict=True)]
    rows = [Row(f"throughput, ours / {peer}", gains, at_least=1.3 if has_goal else None)]
    for percent in (50, 95):
        pairs = [
            (percentile(own.latencies_s, percent), percentile(its.latencies_s, percent))
            for own, its in tails
        ]
        goal = 0.7 if has_goal and percent == 95 else None
        title = f"p{percent} at {LOAD:g} of its saturation, ours / {peer}"
        rows.append(Row(title, [own / its for own, its in pairs], at_most=goal))
        if percent == 95:
            rows += [
                Row("  ours", [1e3 * own for own, _ in pairs], unit="ms"),
                Row(f"  {peer}", [1e3 * its for _, its in pairs], unit="ms"),
            ]
    return rows
