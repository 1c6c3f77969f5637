"""A short run again and again, each time with another fault, compared with one without.

Equal means equal: the same bytes in weights, their average and the optimiser's moments, and the
same rows of the loss in MLflow, each once.
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
from ddpm_ray.config.fault_drill import DrillConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.redaction import sanitize
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.train import train
from ddpm_ray.tracking import mlflow_runs
from ddpm_ray.training.checkpoints import GROUPS, weights_sha256


@dataclass(frozen=True)
class Drilled:
    """What one repetition came to."""

    fault: str  # empty: the one without
    seconds: float  # of all of it, the start of the workers too
    starts: list[int]  # the steps at which workers started; the first is 0
    seen_steps: int  # the newest that was told before the last start
    end: list[str]  # sha256 of weights, average and moments
    losses: list[tuple[int, float]]
    reason: str = ""  # why it did not end

    @property
    def repeated_steps(self) -> int:
        """Steps that were done twice, by what the driver saw of them: told once a second."""
        return max(0, self.seen_steps - self.starts[-1]) if len(self.starts) > 1 else 0

    def equals(self, other: "Drilled") -> bool:
        """Whether both ended alike."""
        return not self.reason and (self.end, self.losses) == (other.end, other.losses)


def drill(config: DrillConfig, home: Path, show: Callable[[int, int, str], None]) -> list[Drilled]:
    """The run without a fault, then with each of them; `show` is told how many are done.

    Runs are named after `run.name`, a token of this drill and a number, and stay where they are.
    Raises what a run without a fault raises.
    """
    token = secrets.token_hex(3)
    marks = Path(tempfile.gettempdir(), f"ddpm-ray-drill-{token}")
    done: list[Drilled] = []
    for number, fault in enumerate(["", *config.faults]):
        show(number, len(config.faults) + 1, fault or "without a fault")
        run = replace(config.run, name=f"{config.run.name}-{token}-{number}")
        os.environ.pop(fault_injection.VARIABLE, None)
        if fault:
            os.environ[fault_injection.VARIABLE] = f"{marks / str(number)} {fault}"
        try:
            done.append(_once(run, home, fault))
        finally:
            os.environ.pop(fault_injection.VARIABLE, None)
    show(len(done), len(done), "done")
    return done


def _once(config: RunConfig, home: Path, fault: str) -> Drilled:
    starts: list[int] = []
    newest, seen, began_s = 0, 0, time.monotonic()

    def note(progress: Progress) -> None:
        """How far the run is."""
        nonlocal newest
        newest = progress.step

    def started(step: int, _: str) -> None:
        """Where workers begin, and how far those before them were seen to be."""
        nonlocal seen
        starts.append(step)
        seen = newest

    try:
        report = train(config, home, note, on_start=started).report
    except Exception as error:
        if not fault:
            raise
        reason = " ".join(str(error).split())
        return Drilled(fault, time.monotonic() - began_s, starts, seen, [], [], reason)
    losses = mlflow_runs.history(report["run_id"], report["tracking_uri"], "train/loss")
    end = [weights_sha256(report["checkpoint"], group) for group in GROUPS]
    return Drilled(fault, time.monotonic() - began_s, starts, seen, end, losses)


def show_table(done: list[Drilled]) -> None:
    """A table on stderr: a line for each fault."""
    clean, *struck = done
    table = Table("fault", "starts", "steps lost", "seconds lost", "end", box=None, pad_edge=False)
    for one in struck:
        verdict = "equal" if one.equals(clean) else escape(sanitize(one.reason)) or "DIFFERENT"
        table.add_row(
            one.fault, str(len(one.starts)), str(one.repeated_steps),
            f"{one.seconds - clean.seconds:.1f}", verdict,
        )  # fmt: skip
    Console(stderr=True).print(table)
