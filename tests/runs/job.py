"""A job as a person runs it, in a process of its own, and what it left in MLflow."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient

from ddpm_ray.cli.job import DONE, PARTLY_FAILED
from ddpm_ray.reporting import RATES
from tests.limits import JOB_S

ROOT = Path(__file__).parents[2]
# A network of 0.1 M parameters, and samples that cost as little.
TINY_RUN = (
    "model.base_channels=16",
    "model.channel_mults=[1,2]",
    "model.groups=4",
    "model.attention_resolutions=[4]",
    "training.global_batch_size=64",
    "training.warmup_steps=10",
    "sampling.steps=5",
    "evaluation.num_images=32",
)

UNITS = ("step ", "trials ", "images ")  # a line of progress begins with one of them


@dataclass
class Job:
    """A job as a person runs it, watched line by line."""

    folder: Path
    arguments: tuple[str, ...]
    script: str = "train.py"
    config: str = "train/digits.yaml"
    limit_s: float = JOB_S
    lines: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    code: int = -1

    def run(self, at: int | None = None, strike: Callable[[int], None] | None = None) -> "Job":
        """Run to the end; `strike(pid)` once when progress first shows `at` or more."""
        command = [
            sys.executable,
            str(ROOT / "jobs" / self.script),
            str(ROOT / "conf" / self.config),
            *self.arguments,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)  # MLflow itself puts there what a test set
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        assert process.stdout is not None
        limit = threading.Timer(self.limit_s, lambda: os.killpg(process.pid, signal.SIGKILL))
        limit.start()
        try:
            for line in process.stderr:
                self.lines.append(line.rstrip())
                if strike and line.startswith(UNITS) and shown(line) >= (at or 0):
                    strike(process.pid)
                    strike = None
            output = process.stdout.read()
            self.code = process.wait()
        finally:
            limit.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stderr.close()
            process.stdout.close()
        assert strike is None, f"it ended before its fault:\n{self.reported}"
        if self.code in (DONE, PARTLY_FAILED):  # else stdout has at most what Ray's workers print
            self.result = json.loads(output.splitlines()[-1])
        return self

    @property
    def reported(self) -> str:
        return "\n".join(self.lines)


def shown(line: str) -> int:
    """How far a line of progress says that things are: `step 20/400 ...`, `images 1/4 ...`."""
    return int(line.split()[1].split("/")[0])


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it ended since it was listed
        return ""


def rows(result: dict[str, Any], key: str) -> list[tuple[int, float]]:
    client = MlflowClient(tracking_uri=result["tracking_uri"])
    return [(m.step, m.value) for m in client.get_metric_history(result["run_id"], key)]


def check_rows(result: dict[str, Any], wanted: dict[str, list[tuple[int, float]]]) -> None:
    """The rows of a run are (step, value) of `wanted` by key; of clocks, the steps alone."""
    for key, expected in wanted.items():
        found = rows(result, key)
        if key in RATES:
            assert [step for step, _ in found] == [step for step, _ in expected]
        else:
            assert found == expected, key
