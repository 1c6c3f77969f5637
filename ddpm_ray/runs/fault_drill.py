"""Fault-injection drill: repeat a short run with one fault each, and compare it with a clean run.

Runs are equal if weights, EMA and optimiser state have the same bytes, and MLflow holds the same
loss rows, each once.
"""

import os
import secrets
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ddpm_ray import fault_injection
from ddpm_ray.config.jobs.fault_drill import DrillConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.redaction import sanitize
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.train import run_training
from ddpm_ray.tracking import mlflow_runs
from ddpm_ray.training.checkpoint_folder import GROUPS, weights_sha256


@dataclass(frozen=True)
class FaultResult:
    """Result of one repetition of the run."""

    fault: str  # empty: the clean run
    seconds: float  # wall-clock time, the start of the workers included
    starts: list[int]  # step of each start of the worker group; the first is 0
    seen_steps: int  # progress that the driver saw before the last start
    end: list[str]  # sha256 of weights, EMA and optimiser state
    losses: list[tuple[int, float]]
    reason: str = ""  # why the run failed

    @property
    def repeated_steps(self) -> int:
        """Steps that were trained twice; a lower bound, because progress is seen once a second."""
        return max(0, self.seen_steps - self.starts[-1]) if len(self.starts) > 1 else 0

    def equals(self, other: "FaultResult") -> bool:
        """Whether both runs finished with equal state and loss rows."""
        return not self.reason and (self.end, self.losses) == (other.end, other.losses)


def run_drill(
    config: DrillConfig, home: Path, on_progress: Callable[[int, int, str], None]
) -> list[FaultResult]:
    """Run without a fault, then once with each fault; results in that order.

    `on_progress` gets the number of runs done, the number of runs, and the fault of the next one.
    The runs are named `run.name`, a random token and a number, and are not deleted. Raises what the
    clean run raises.
    """
    token = secrets.token_hex(3)
    markers = Path(tempfile.gettempdir(), f"ddpm-ray-drill-{token}")
    done: list[FaultResult] = []
    for number, fault in enumerate(["", *config.faults]):
        on_progress(number, len(config.faults) + 1, fault or "without a fault")
        run = replace(config.run, name=f"{config.run.name}-{token}-{number}")
        os.environ.pop(fault_injection.VARIABLE, None)
        if fault:
            os.environ[fault_injection.VARIABLE] = f"{markers / str(number)} {fault}"
        try:
            done.append(_run_once(run, home, fault))
        finally:
            os.environ.pop(fault_injection.VARIABLE, None)
    on_progress(len(done), len(done), "done")
    return done


def _run_once(config: RunConfig, home: Path, fault: str) -> FaultResult:
    starts: list[int] = []
    newest, seen, began_s = 0, 0, time.monotonic()

    def on_progress(progress: Progress) -> None:
        """Store the progress."""
        nonlocal newest
        newest = progress.step

    def on_start(step: int, _: str) -> None:
        """Store the step of the start, and the progress before it."""
        nonlocal seen
        starts.append(step)
        seen = newest

    try:
        report = run_training(config, home, on_progress, on_start=on_start).report
    except Exception as error:
        if not fault:
            raise
        reason = " ".join(str(error).split())
        return FaultResult(fault, time.monotonic() - began_s, starts, seen, [], [], reason)
    losses = mlflow_runs.history(report["run_id"], report["tracking_uri"], "train/loss")
    end = [weights_sha256(report["checkpoint"], group) for group in GROUPS]
    return FaultResult(fault, time.monotonic() - began_s, starts, seen, end, losses)


def show_table(done: list[FaultResult]) -> None:
    """Print a table on stderr, a row for each fault."""
    clean, *faulted = done
    table = Table("fault", "starts", "steps lost", "seconds lost", "end", box=None, pad_edge=False)
    for one in faulted:
        verdict = "equal" if one.equals(clean) else escape(sanitize(one.reason)) or "DIFFERENT"
        starts, steps = str(len(one.starts)), str(one.repeated_steps)
        table.add_row(one.fault, starts, steps, f"{one.seconds - clean.seconds:.1f}", verdict)
    Console(stderr=True).print(table)
