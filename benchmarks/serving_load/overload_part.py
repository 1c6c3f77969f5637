"""The server at 10 times its saturation, over HTTP; the server is a process of its own."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.serving_load.contestants import WIDTH
from benchmarks.serving_load.http_client import HttpAnswer, closed_loop, open_loop
from benchmarks.serving_load.models import drawing_model
from benchmarks.serving_load.table import Row, percentile
from benchmarks.serving_load.traffic import Arrival, backlog, poisson_trace
from ddpm_ray.serving.image_service import ServiceSettings
from tests.serving.local_server import local_server, served

PATH = "v1/images/generations"
QUEUED_S = 5.0  # of accepted work: the server refuses more
FULL, OVER = 1.2, 10.0  # offered requests, by the saturation
CLIENTS = WIDTH  # with which the saturation is measured
START_S = 120.0


def serve(name: str, url_file: Path) -> None:
    """Serve a model until the standard input ends; write the URL to a file."""
    torch.set_num_threads(1)
    models = served({name: drawing_model(name)}, width=WIDTH)
    with local_server(models, service=ServiceSettings(max_queued_s=QUEUED_S)) as (url, _):
        url_file.write_text(url)
        sys.stdin.read()


@contextlib.contextmanager
def server_process(name: str) -> Iterator[tuple[str, psutil.Process]]:
    """The URL and process of a server."""
    with tempfile.TemporaryDirectory() as folder:
        url_file = Path(folder) / "url"
        command = [
            sys.executable,
            "-m",
            "benchmarks.serving_load.overload_part",
            name,
            str(url_file),
        ]
        threads = {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env=os.environ | threads,
            cwd=Path(__file__).parents[2],
        )
        try:
            until_s = time.monotonic() + START_S
            while not (url_file.exists() and url_file.read_text()):
                if process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError("the server did not start")
                time.sleep(0.1)
            yield url_file.read_text(), psutil.Process(process.pid)
        finally:
            assert process.stdin is not None
            process.stdin.close()
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


def overloaded(url: str, process: psutil.Process, seconds: float, seed: int) -> Overload:
    """Measure the saturation, then the answers at full load, then those at overload."""
    url += PATH
    asyncio.run(closed_loop(url, backlog(CLIENTS, seed), CLIENTS))
    count = 6 * CLIENTS
    rate = asyncio.run(closed_loop(url, backlog(count, seed), CLIENTS))

    def answers(load: float) -> list[tuple[Arrival, HttpAnswer]]:
        trace = poisson_trace(load * rate, seconds + QUEUED_S, seed)
        found = asyncio.run(open_loop(url, trace))
        return [pair for pair in found if pair[0].at_s > QUEUED_S]

    full, before = answers(FULL), process.memory_info().rss / 1e6
    return Overload(rate, full, answers(OVER), [before, process.memory_info().rss / 1e6])


def overload_rows(name: str, rounds: int, seconds: float) -> list[Row]:
    """Refusals, memory and the latency of accepted requests at 10 times the saturation."""
    with server_process(name) as (url, process):
        found = [overloaded(url, process, seconds, number) for number in range(rounds)]
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


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
