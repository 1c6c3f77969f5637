"""A cluster of several Ray nodes on this one machine, each as far from the others as a real one.

They meet at a bridge alone, on the head, which also serves a bucket and MLflow.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.node import BOOT_S, INTERFACE, ROOT, Node, NodeError, end

HEAD = "10.77.0.1"
S3_PORT, MLFLOW_PORT = 9000, 5000
# What jobs need to know: it travels in their runtime environment.
JOB_ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://{HEAD}:{S3_PORT}",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "MLFLOW_TRACKING_URI": f"http://{HEAD}:{MLFLOW_PORT}",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
ANSWERS = """
until exec 3<> /dev/tcp/$0/$1 && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r <&3
do sleep 0.2; done 2> /dev/null
"""
ACTORS = """
import json, sys
from ray.util.state import list_actors, list_jobs, list_nodes
jobs = {job.job_id: job.submission_id for job in list_jobs()}
addresses = {node.node_id: node.node_ip for node in list_nodes()}
print(json.dumps([
    {"kind": a.class_name, "job": jobs.get(a.job_id), "address": addresses.get(a.node_id),
     "alive": a.state == "ALIVE"}
    for a in list_actors(limit=10_000)
]))
"""

NODE_AT = """
import sys
from ray.util.state import list_nodes
print(next(node.node_id for node in list_nodes()
           if node.node_ip == sys.argv[1] and node.state == "ALIVE"))
"""


@dataclass(frozen=True)
class Actor:
    """One of Ray's actors: its class, the submitted job that made it, where it lies or lay."""

    kind: str
    job: str | None
    address: str | None
    alive: bool


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it."""

    id: str
    parent: str  # the sweep's run, of a trial's
    name: str
    status: str
    steps: list[int]  # of its rows of train/loss, as stored


class Nodes:
    """A head and workers under token authentication, one entry of `cpus` each, the head's first.

    Used in a `with`, which ends with the cluster. `folder` holds all that they leave: logs, each
    node's temporary folder, the bucket, MLflow's database; it is removed unless an error ends the
    `with`, which then names it.
    """

    def __init__(self, cpus: tuple[int, ...]) -> None:
        self._cpus = cpus
        # Short, and not below a test's own folder: Ray's sockets lie in it (107 bytes at most).
        self.folder = Path(tempfile.mkdtemp(prefix="ddpm-ray-"))
        self.bucket = self.folder / "s3" / "bucket"
        self.database = f"sqlite:///{self.folder / 'mlflow.db'}"
        self._all: list[Node] = []
        self._token = secrets.token_hex(32)

    def __enter__(self) -> "Nodes":
        try:
            self._boot()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for node in reversed(self._all):  # the head, which has the bridge, last
            node.close()
        if error is None:
            shutil.rmtree(self.folder)
        else:
            print(f"logs of every process: {self.logs}", file=sys.stderr)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._all)

    @property
    def head(self) -> Node:
        """The node with the job server, the bucket and MLflow."""
        return self._all[0]

    @property
    def logs(self) -> Path:
        """The folder of all logs; Ray's own are below each node's folder beside it."""
        return self.folder / "logs"

    def at(self, address: str) -> Node:
        """The node of that address."""
        return next(node for node in self if node.address == address)

    def submit(
        self,
        name: str,
        *command: str,
        watch: Callable[[str], None] = lambda _: None,
        timeout_s: float = 300,
    ) -> int:
        """The exit code of `ray job submit` of that command; `watch` sees each line as it is told.

        Its log is kept; a job that takes longer than `timeout_s` is cut off.
        """
        environment = {"env_vars": JOB_ENVIRONMENT, "excludes": ["tests", "benchmarks"]}
        process = self.head.start(
            "bash",
            "-c",
            'exec "$@" 2>&1',
            "bash",
            "ray",
            "job",
            "submit",
            "--submission-id",
            name,
            "--working-dir",
            str(ROOT),
            "--runtime-env-json",
            json.dumps(environment),
            "--",
            *command,
        )
        limit = threading.Timer(timeout_s, end, (process,))
        limit.start()
        try:
            assert process.stdout is not None
            with self.head.log(f"job-{name}").open("w") as log, process.stdout as lines:
                for line in lines:
                    log.write(line)
                    log.flush()
                    watch(line.rstrip())
            return process.wait(BOOT_S)
        finally:
            limit.cancel()
            end(process)

    def reported(self, job: str) -> list[str]:
        """What that job told, by lines."""
        return self.head.log(f"job-{job}").read_text().splitlines()

    def result(self, job: str) -> dict[str, Any]:
        """The JSON object that the job told last; empty if there is none."""
        objects = [line for line in self.reported(job) if line.startswith("{")]
        return dict(json.loads(objects[-1])) if objects else {}

    def actors(self) -> list[Actor]:
        """All actors of jobs so far, those that have ended as well."""
        return [Actor(**facts) for facts in json.loads(self.head.run("python", "-c", ACTORS))]

    def runs(self) -> list[TrackedRun]:
        """All of MLflow's runs, the oldest first; read from its database, past the server."""
        with warnings.catch_warnings():  # of SQLAlchemy, for what MLflow does as it is imported
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self.database)
        experiments = [one.experiment_id for one in client.search_experiments()]
        return [
            TrackedRun(
                run.info.run_id,
                run.data.tags.get("mlflow.parentRunId", ""),
                run.info.run_name,
                run.info.status,
                [row.step for row in client.get_metric_history(run.info.run_id, "train/loss")],
            )
            for run in client.search_runs(experiments, order_by=["attributes.start_time"])
        ]

    def _boot(self) -> None:
        tmp = self.folder / "tmp"
        for folder in (tmp, self.logs, self.bucket):
            folder.mkdir(parents=True)
        for number in range(len(self._cpus)):
            name, address = f"node{number}", f"10.77.0.{number + 1}"
            own = self.folder / name
            self._all.append(Node(name, address, own, tmp, self.logs))
            (own / "token").touch(mode=0o600)
            (own / "token").write_text(self._token)
        self._join()
        self._serve()
        started = []
        for node in self:
            ray = self._start(node)
            if node is self.head:
                self._finish(node, ray)
            else:
                started.append((node, ray))
        for node, ray in started:
            self._finish(node, ray)
        for port in (S3_PORT, MLFLOW_PORT):
            self.head.run("bash", "-c", ANSWERS, HEAD, str(port))

    def rejoin(self, address: str) -> None:
        """Start Ray again on the node of that address, whose raylet was killed."""
        self._finish(self.at(address), self._start(self.at(address)))

    def announce_loss(self, address: str) -> None:
        """Tell Ray that the node of that address will be taken away, as a cloud does."""
        command = ("ray", "drain-node", "--address", f"{HEAD}:6379", "--node-id")
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
        node = self.head.run("python", "-c", NODE_AT, address).strip()
        self.head.run(*command, node, *reason, "--deadline-remaining-seconds", "600")

    def _start(self, node: Node) -> subprocess.Popen[str]:
        role = ["--address", f"{HEAD}:6379"]
        if node is self.head:
            role = ["--head", "--port", "6379", "--dashboard-host", "127.0.0.1"]
        cpus = self._cpus[self._all.index(node)]
        return node.start(
            "ray",
            "start",
            *role,
            "--node-ip-address",
            node.address,
            "--num-cpus",
            str(cpus),
            "--object-store-memory",
            str(200 * 1024**2),
            "--disable-usage-stats",
            log="ray-start",
        )

    def _join(self) -> None:
        """Lay a line from each node to a bridge on the head."""
        inside = ["nsenter", "--target", str(self.head.pid), "--net"]
        commands = [f"add {INTERFACE} type bridge", f"set {INTERFACE} up"]
        for node in self._all[1:]:
            commands.append(f"add {node.name} type veth peer name {INTERFACE} netns {node.pid}")
            commands.append(f"set {node.name} master {INTERFACE} up")
        for command in commands:
            subprocess.run([*inside, "ip", "link", *command.split()], check=True)
        for node in self._all:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            node.run("ip", "link", "set", INTERFACE, "up")

    def _serve(self) -> None:
        """Start the bucket and MLflow, whose artifacts lie in it, on the head."""
        self.head.start(
            "rclone",
            "serve",
            "s3",
            "--config",
            os.devnull,
            "--auth-key",
            "key,secret",
            "--addr",
            f"{HEAD}:{S3_PORT}",
            str(self.bucket.parent),
            log="s3",
        )
        settings = [f"{name}={value}" for name, value in JOB_ENVIRONMENT.items()]
        self.head.start(
            "env",
            *settings,
            f"MLFLOW_S3_ENDPOINT_URL={JOB_ENVIRONMENT['AWS_ENDPOINT_URL']}",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",  # else 8 more processes
            "python",
            "-m",
            "mlflow",
            "server",
            "--host",
            HEAD,
            "--port",
            str(MLFLOW_PORT),
            "--workers",
            "1",
            "--backend-store-uri",
            self.database,
            "--artifacts-destination",
            "s3://bucket/mlflow",
            log="mlflow",
        )

    def _finish(self, node: Node, ray: subprocess.Popen[str]) -> None:
        if ray.wait(BOOT_S):
            text = node.log("ray-start").read_text().strip()
            raise NodeError(f"{node.name}: `ray start` ended with {ray.returncode}:\n{text}")
