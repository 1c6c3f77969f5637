"""Storage of a sweep's trials: one small JSON object each, written before the sweep acts on it.

    <folder>/trials/00007.json      trial 7: its values, what it reported and when, how it ended

Only the driver writes. After a crash it reads the trials and replays their events in order, which
restores search and early stopping: neither has a state of its own. Trials are numbered without
gaps, so nothing is ever listed.
"""

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from ddpm_ray.config.loading import current_values
from ddpm_ray.config.run import RunConfig
from ddpm_ray.runs.run_identity import TRIALS, trial_file
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.checksummed_json import ChecksumError
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.sweep.trial_names import short_name

Status: TypeAlias = Literal["running", "finished", "stopped", "pruned", "failed"]
"""running: not ended, also while no process runs it; stopped: early, by comparison with others;
pruned: rejected for its schedule before it took a worker."""

COSTS = "worker_s", "busy_s"  # of an outcome
# Names in the stored JSON that differ from those of the fields.
STORED_NAMES = {
    "driver_failures": "losses",
    "earlier_costs": "earlier",
    "logged": "closed",
    "diagnostics": "appraisal",
    "validation_losses": "probes",
}
FIELD_NAMES = {stored: field for field, stored in STORED_NAMES.items()}


@dataclass
class Trial:
    """One trial: the values it varies, its progress, its cost and how it ended."""

    number: int
    values: dict[str, Any]  # dotted keys of the run, as {"schedule.num_steps": 1000}
    branch: int = 0  # index of the mapping of the sweep's space that they were drawn from
    status: Status = "running"
    reason: str = ""  # why it was stopped or pruned, or how it failed; one line
    driver_failures: int = 0  # how often its driver died
    # Each has order, step, loss, and the loss by log-SNR as "spectrum".
    validation_losses: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: dict[str, float] = field(default_factory=dict)  # schedule diagnostics
    ended_order: int = -1  # when it ended, in the numbering of the losses' order
    outcome: dict[str, Any] = field(default_factory=dict)  # see sweep/trial.py
    earlier_costs: dict[str, float] = field(default_factory=dict)  # before it was interrupted
    logged: bool = False  # its end is in MLflow

    @property
    def name(self) -> str:
        """Name of its training run and folder."""
        return f"trial-{self.number:05d}"

    @property
    def label(self) -> str:
        """The values it varies, as `T=1000 linear rescaled`."""
        return short_name(self.values)

    @property
    def title(self) -> str:
        """Its number and values: the name of its MLflow run."""
        return f"{self.number}: {self.label}"

    @property
    def metrics(self) -> dict[str, float]:
        """Its final scores; empty unless it finished."""
        return dict(self.outcome.get("metrics", {})) if self.status == "finished" else {}

    def to_json(self) -> dict[str, Any]:
        """Return the trial as plain JSON, under its stored names."""
        return {STORED_NAMES.get(name, name): value for name, value in asdict(self).items()}


class TrialStore:
    """The trials of one sweep, in memory and below `folder`; one process writes.

    Tune's thread records events while the main thread sends ended trials to MLflow. So a trial's
    status is set after the fields that belong to it, and a lock is held while a trial is written.
    Raises StorageError where a stored file is not a trial.
    """

    def __init__(self, folder: str) -> None:
        self._folder = object_store.join(folder, TRIALS)
        self._lock = threading.RLock()
        self.trials: list[Trial] = []
        while object_store.exists(self._url(len(self.trials))):
            self.trials.append(_read(self._url(len(self.trials))))
        self._order = 1 + max((order for order, _, _ in self.events()), default=-1)

    def add(self, values: dict[str, Any], branch: int = 0, **facts: Any) -> Trial:
        """Create and store a new trial."""
        with self._lock:
            trial = Trial(len(self.trials), values, branch, **facts)
            status, trial.status = trial.status, "running"
            self.trials.append(trial)
            if status == "running":
                self.write(trial)
            else:
                self.record_end(trial, status, trial.reason)
            return trial

    def add_validation_loss(self, trial: Trial, loss: dict[str, Any]) -> bool:
        """Record a validation loss; returns False for a step that was reported before."""
        with self._lock:
            known = trial.validation_losses
            if known and loss["step"] <= known[-1]["step"]:
                return False
            known.append({"order": self._tick()} | loss)
            self.write(trial)
            return True

    def record_end(self, trial: Trial, status: Status, reason: str = "", **outcome: Any) -> None:
        """Record how the trial ended; only the first end counts."""
        with self._lock:
            if trial.ended_order >= 0:
                return
            earlier = trial.earlier_costs
            costs = {key: outcome[key] + earlier.get(key, 0.0) for key in COSTS if key in outcome}
            trial.outcome |= outcome | costs
            trial.reason, trial.ended_order = reason, self._tick()
            trial.status = status  # last: other threads read the rest once they see it
            self.write(trial)

    def record_interruption(self, trial: Trial, outcome: dict[str, Any]) -> None:
        """Record, once, the cost of a trial that was stopped and will continue."""
        ended = outcome.get("ended", 0.0)
        with self._lock:
            if ended > trial.earlier_costs.get("ended", -1.0):
                costs = {k: outcome.get(k, 0.0) + trial.earlier_costs.get(k, 0.0) for k in COSTS}
                trial.earlier_costs = costs | {"ended": ended}
                self.write(trial)

    def write(self, trial: Trial) -> None:
        """Write `trial` to storage. Raises StorageError."""
        with self._lock:
            checksummed_json.write(self._url(trial.number), trial.to_json())

    def events(self) -> Iterator[tuple[int, Trial, dict[str, Any] | None]]:
        """Yield (order, trial, loss) of all trials in order of time; loss is None for an end."""
        losses = [(p["order"], t, p) for t in self.trials for p in t.validation_losses]
        ends = [(t.ended_order, t, None) for t in self.trials if t.ended_order >= 0]
        yield from sorted([*losses, *ends], key=lambda event: event[0])

    def _tick(self) -> int:
        self._order += 1
        return self._order - 1

    def _url(self, number: int) -> str:
        return object_store.join(self._folder, trial_file(number))


def _read(url: str) -> Trial:
    try:
        stored = dict(**checksummed_json.read(url))
        trial = Trial(**{FIELD_NAMES.get(name, name): value for name, value in stored.items()})
        trial.values = current_values(RunConfig, trial.values)
        return trial
    except (ChecksumError, TypeError, AttributeError) as error:  # also missing or unknown keys
        text = error.args[1] if isinstance(error, ChecksumError) else str(error)
        reason = text.removeprefix("Trial.__init__() ").splitlines()[0]
        remedy = "restore a complete copy, or start the sweep under another name"
        raise StorageError(
            url, f"this file is not a trial of a sweep ({reason})", remedy
        ) from error
