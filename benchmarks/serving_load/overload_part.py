"""The job serve at 10 times its saturation, over HTTP, on a Ray of its own."""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.serving_load.contestants import WIDTH
from benchmarks.serving_load.http_client import HttpAnswer, closed_loop, open_loop
from benchmarks.serving_load.models import untrained_run
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import Arrival, backlog, poisson_trace

PORT = 18_601
START_S = 300.0
QUEUED_S = 5.0  # of accepted work: the server refuses more
FULL, OVER = 1.2, 10.0  # offered requests, by the saturation
CLIENTS = WIDTH  # with which the saturation is measured


class Server:
    """The job serve on a Ray of its own."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url, self._process = url + "v1/images/generations", process

    @property
    def megabytes(self) -> float:
        """Resident memory of all processes of its deployments."""
        mine = self._process.children(recursive=True)
        found = 0
        for one in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += one.memory_info().rss if "ServeReplica" in " ".join(one.cmdline()) else 0
        return found / 1e6


@contextlib.contextmanager
def started(name: str) -> Iterator[Server]:
    """A server of an untrained model, until the end of the context."""
    with tempfile.TemporaryDirectory() as folder:
        run = untrained_run(name, Path(folder) / name)
        options = [f"port={PORT}", f"batch.width={WIDTH}", f"limits.max_queued_s={QUEUED_S:g}"]
        process = subprocess.Popen(
            [sys.executable, "jobs/serve.py", run, *options, "drain_s=1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stderr is not None
        limit = threading.Timer(START_S, process.kill)
        limit.start()
        try:
            if not any("is ready, for" in line for line in process.stderr):
                raise RuntimeError("the server did not start")
            limit.cancel()
            reader = threading.Thread(target=process.stderr.read, daemon=True)
            reader.start()
            yield Server(f"http://127.0.0.1:{PORT}/", psutil.Process(process.pid))
        finally:
            limit.cancel()
            process.terminate()
            process.wait(60)


@dataclass
class Overload:
    """Measurements of a round."""

    saturation: float
    full: list[tuple[Arrival, HttpAnswer]]  # without the first seconds, in which the queue fills
    over: list[tuple[Arrival, HttpAnswer]]
    megabytes: list[float]  # resident memory before and after the overload

    def p95_s(self, answers: list[tuple[Arrival, HttpAnswer]]) -> float:
        return percentile([one.seconds for _, one in answers if one.status == 200], 95)

    def rows_per_s(self, answers: list[tuple[Arrival, HttpAnswer]], seconds: float) -> float:
        """Network rows of the accepted requests; a full queue has more room for short ones."""
        return sum(a.images * a.steps for a, one in answers if one.status == 200) / seconds

    @property
    def refusals(self) -> list[HttpAnswer]:
        return [one for _, one in self.over if one.status != 200]


def overloaded(server: Server, seconds: float, seed: int) -> Overload:
    """Measure the saturation, then the answers at full load, then those at overload."""
    asyncio.run(closed_loop(server.url, backlog(CLIENTS, seed), CLIENTS))
    count = 6 * CLIENTS
    rate = asyncio.run(closed_loop(server.url, backlog(count, seed), CLIENTS))

    def answers(load: float) -> list[tuple[Arrival, HttpAnswer]]:
        trace = poisson_trace(load * rate, seconds + QUEUED_S, seed)
        found = asyncio.run(open_loop(server.url, trace))
        return [pair for pair in found if pair[0].at_s > QUEUED_S]

    full, before = answers(FULL), server.megabytes
    return Overload(rate, full, answers(OVER), [before, server.megabytes])


def overload_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Refusals, memory and the latency of accepted requests at 10 times the saturation."""
    with started(name) as server:
        found = [overloaded(server, seconds, number) for number in range(rounds)]
    wrong = [
        100.0
        * sum(o.status != 429 or "retry-after" not in o.headers for o in one.refusals)
        / max(1, len(one.refusals))
        for one in found
    ]
    refused_ms = [[1e3 * o.seconds for o in one.refusals] for one in found]
    tails = [(one.p95_s(one.full), one.p95_s(one.over)) for one in found]
    done = [one.rows_per_s(one.over, seconds) / one.rows_per_s(one.full, seconds) for one in found]
    grown = [one.megabytes[1] / one.megabytes[0] for one in found]
    return [
        Row("saturation, 8 clients", [one.saturation for one in found], unit="requests/s"),
        Row(
            "requests refused", [100 * len(one.refusals) / len(one.over) for one in found], unit="%"
        ),
        Row("refusals other than 429 with Retry-After", wrong, at_most=0, unit="%"),
        Row("time to refusal, p50", [percentile(one, 50) for one in refused_ms], unit="ms"),
        Row(
            "time to refusal, p99",
            [percentile(one, 99) for one in refused_ms],
            at_most=100,
            unit="ms",
        ),
        Row(
            "p95 of accepted, overload / full load",
            [over / full for full, over in tails],
            at_most=1.2,
        ),
        Row("  at full load", [full for full, _ in tails], unit="s"),
        Row("network rows a second, overload / full load", done),
        Row("resident memory, after / before the overload", grown, at_most=1.02),
        Row("  before", [one.megabytes[0] for one in found], unit="MB"),
        Row("  after", [one.megabytes[1] for one in found], unit="MB"),
    ]
