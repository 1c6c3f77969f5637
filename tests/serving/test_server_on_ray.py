"""The job serve on a Ray of its own: killed processes, clients that come back, and its end."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests

from tests.limits import ENDS_S, JOB_S
from tests.noise import pack_noise
from tests.test_cascade_job import trained
from tests.training.test_loop import TINY_UNET

pytestmark = pytest.mark.xdist_group("Ray or MLflow")  # one cluster at a time
SERVE = Path(__file__).parents[2] / "jobs" / "serve.py"
LONG = {"steps": 1000, "n": 4, "seed": 5}


class Served(NamedTuple):
    """A server that runs."""

    url: str
    process: subprocess.Popen[str]
    said: list[str]  # lines of stderr
    reader: threading.Thread  # of these

    def end(self) -> str:
        """Wait for its end, with all that it says; return its stdout."""
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        self.process.wait(JOB_S)
        self.reader.join(ENDS_S)
        return out

    def processes(self, deployment: str) -> list[int]:
        """Ids of the processes of a deployment."""
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [one.pid for one in mine if f"ServeReplica:ddpm-ray:{deployment}" in name_of(one)]

    def put(self, job: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Submit a job, as a client does that goes on until it is there."""
        return self._until_ok(lambda: requests.put(f"{self.url}v1/jobs/{job}", json=fields))

    def wait(self, job: str) -> dict[str, Any]:
        """A job that has ended."""
        place = f"{self.url}v1/jobs/{job}?wait=20"
        while (found := self._until_ok(lambda: requests.get(place)))["status"] in OPEN:
            pass
        return found

    def wait_for(self, line: str) -> None:
        """Wait for a line of the metrics."""
        until_s = time.monotonic() + ENDS_S
        while line not in requests.get(f"{self.url}metrics", timeout=ENDS_S).text:
            assert time.monotonic() < until_s
            threading.Event().wait(0.2)

    def wait_for_steps(self, job: str) -> None:
        """Wait until network calls of a job have been computed."""
        events = f"{self.url}v1/jobs/{job}/events"
        with requests.get(events, stream=True, timeout=ENDS_S) as answer:
            for line in answer.iter_lines(decode_unicode=True):
                name, _, data = str(line).partition(": ")
                if name == "data" and json.loads(data).get("computed_rows"):
                    return

    def _until_ok(self, ask: Callable[[], requests.Response]) -> dict[str, Any]:
        until_s = time.monotonic() + ENDS_S
        while True:
            try:
                answer = ask()
                if answer.status_code in (200, 202):
                    found: dict[str, Any] = answer.json()
                    return found
                problem = answer.text
            except requests.ConnectionError as error:
                problem = str(error)
            assert time.monotonic() < until_s, problem
            threading.Event().wait(0.2)


OPEN = ("queued", "running")


def name_of(process: psutil.Process) -> str:
    """The title of a process; empty for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def images(found: dict[str, Any]) -> list[str]:
    assert found["status"] == "succeeded", found
    return [one["b64_json"] for one in found["data"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    pack_noise(str(root / "data"), 8, 4)
    trained(root / "digits", str(root / "data"), *TINY_UNET, "schedule.num_steps=1000")
    return root / "digits"


@pytest.fixture
def start(run: Path) -> Iterator[Callable[..., Served]]:
    """Start a server with these options, and wait until it is ready."""
    started: list[subprocess.Popen[str]] = []

    def make(*options: str) -> Served:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        words = [sys.executable, str(SERVE), str(run), f"port={port}", *options]
        process = subprocess.Popen(
            words,
            cwd=run.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        said: list[str] = []
        ready = threading.Event()

        def read() -> None:
            """Note what it says, to its end."""
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if "is ready, for" in line:
                    ready.set()
            ready.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert ready.wait(JOB_S)
        assert process.poll() is None, "".join(said)
        return Served(f"http://127.0.0.1:{port}/", process, said, reader)

    yield make
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def kill(served: Served, deployment: str) -> None:
    """Kill one process of a deployment, once there is one."""
    until_s = time.monotonic() + ENDS_S
    while not (found := served.processes(deployment)):
        assert time.monotonic() < until_s
        threading.Event().wait(0.1)
    os.kill(found[0], signal.SIGKILL)


def test_killed_processes_lose_no_job_and_a_signal_drains(
    start: Callable[..., Served],
) -> None:
    """That of the engine and then that of the table, while one client waits and one has left.

    A client that leaves at once costs no whole job: it is cancelled, long before its lease is over.
    """
    served = start()
    assert requests.get(f"{served.url}readyz", timeout=ENDS_S).status_code == 200
    undisturbed = images(served.wait(served.put("first", LONG)["id"]))
    with pytest.raises(requests.ReadTimeout, match="Read timed out"):  # this client leaves
        requests.post(f"{served.url}v1/images/generations", json=LONG | {"n": 10}, timeout=0.5)
    served.wait_for('ended_jobs_total{kind="generation",state="cancelled"} 1.0')
    for victim in ("engine", "table"):
        served.put(f"job-{victim}", LONG)
        waiting: list[requests.Response] = []

        def wait(waiting: list[requests.Response] = waiting) -> None:
            """Wait for images in one request."""
            place = f"{served.url}v1/images/generations"
            waiting.append(requests.post(place, json=LONG, timeout=ENDS_S))

        client = threading.Thread(target=wait)
        client.start()
        served.wait_for_steps(f"job-{victim}")
        kill(served, victim)
        client.join(ENDS_S)
        (answer,) = waiting
        assert answer.status_code == 200, answer.text
        assert [one["b64_json"] for one in answer.json()["data"]] == undisturbed
        served.put(f"job-{victim}", LONG)  # a client that comes back
        assert images(served.wait(f"job-{victim}")) == undisturbed
    served.put("last", LONG)
    served.process.send_signal(signal.SIGTERM)
    out = served.end()
    assert served.process.returncode == 0, "".join(served.said)
    result = json.loads(out.splitlines()[-1])
    assert result["jobs_cut_off"] == 0
    assert list(result["models"]) == ["digits"]
    assert "no more jobs are taken; those that run have 60 s to end\n" in served.said


@pytest.mark.slow
def test_processes_are_added_and_taken_away_by_the_work_that_waits(
    start: Callable[..., Served],
) -> None:
    """No job is lost by it, and none has other images."""
    sizes = ("replicas.min=1", "replicas.max=2", "replicas.cpus=0.5")
    served = start(*sizes, "replicas.target_queued_s=2")
    wanted = images(served.wait(served.put("alone", LONG)["id"]))
    assert len(served.processes("engine")) == 1
    until_s, number = time.monotonic() + JOB_S, 0
    jobs: list[str] = []
    while len(served.processes("engine")) < 2:  # more work comes than one process does
        assert time.monotonic() < until_s
        jobs += [served.put(f"many-{number}-{n}", LONG)["id"] for n in range(4)]
        number += 1
        served.wait(jobs[number])
    assert all(images(served.wait(job)) == wanted for job in jobs)
    until_s = time.monotonic() + JOB_S
    while len(served.processes("engine")) > 1:  # a little work goes on meanwhile
        assert time.monotonic() < until_s
        number += 1
        assert images(served.wait(served.put(f"few-{number}", LONG)["id"])) == wanted
    text = requests.get(f"{served.url}metrics", timeout=ENDS_S).text
    assert "ddpm_ray_restarted_jobs_total 0.0" in text


@pytest.mark.slow
def test_twenty_kills_under_load_change_no_image(start: Callable[..., Served]) -> None:
    served = start("replicas.min=2", "replicas.max=2", "replicas.cpus=0.5")
    seeds = range(6)
    fields = [{**LONG, "seed": seed} for seed in seeds]
    wanted = [images(served.wait(served.put(f"alone-{n}", fields[n])["id"])) for n in seeds]
    ended = threading.Event()
    done: queue.SimpleQueue[bool] = queue.SimpleQueue()  # for each job: whether it is right

    def client(number: int) -> None:
        """Submit one job after the other, until all kills are done."""
        turn = 0
        while not ended.is_set():
            job, turn = f"load-{number}-{turn}", turn + 1
            served.put(job, fields[number])
            done.put(images(served.wait(job)) == wanted[number])

    clients = [threading.Thread(target=client, args=(number,)) for number in seeds]
    for one in clients:
        one.start()
    try:
        right = []
        for _ in range(20):
            kill(served, "engine")
            right += [done.get(timeout=JOB_S) for _ in fields]  # the load goes on meanwhile
    finally:
        ended.set()
        for one in clients:
            one.join(JOB_S)
    assert all(right)
    text = requests.get(f"{served.url}metrics", timeout=ENDS_S).text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(counts["ddpm_ray_restarted_jobs_total"]) > 0
    assert not [key for key in counts if 'state="failed"' in key and "ended_jobs_total" in key]
