"""All that a sweep knows of its trials, one small JSON object each, safe in storage before it acts.

    <folder>/trials/00007.json      trial 7: its values, what it reported and when, how it ended

The driver alone writes. Killed at any time and started again it reads the trials back in the order
in which things happened, and so brings searcher and early stopping to where they were: neither
keeps a state of its own. Trials are numbered without gaps, so nothing is ever listed.
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
from ddpm_ray.storage.object_store import StorageError

Status: TypeAlias = Literal["running", "finished", "stopped", "pruned", "failed"]
"""running: not over, also while nobody works on it; stopped: early, by comparison with others;
pruned: its schedule was hopeless before it took a worker."""

COSTS = "worker_s", "busy_s"  # of an outcome


@dataclass
class Trial:
    """One trial: what it varies, how far it came, what it cost, how it ended."""

    number: int
    values: dict[str, Any]  # dotted keys of the run, as {"schedule.num_steps": 1000}
    branch: int = 0  # the mapping of the sweep's space that they were drawn from
    status: Status = "running"
    reason: str = ""  # why it was stopped or pruned, or how it failed; one line
    losses: int = 0  # times that its driver died under it
    probes: list[dict[str, Any]] = field(default_factory=list)  # order, step, loss, spectrum
    appraisal: dict[str, float] = field(default_factory=dict)  # of its schedule, before training
    ended_order: int = -1  # when it ended, on the same count as the probes' order
    outcome: dict[str, Any] = field(default_factory=dict)  # see sweep/trial.py
    earlier: dict[str, float] = field(default_factory=dict)  # costs of lives before the last one
    closed: bool = False  # MLflow knows how it ended

    @property
    def name(self) -> str:
        """Of its training run, so of its folder."""
        return f"trial-{self.number:05d}"

    @property
    def label(self) -> str:
        """Its values for a person, as `kind=cosine num_steps=1000`."""
        return " ".join(f"{key.rpartition('.')[2]}={_text(v)}" for key, v in self.values.items())

    @property
    def metrics(self) -> dict[str, float]:
        """Its final scores; empty unless it finished."""
        return dict(self.outcome.get("metrics", {})) if self.status == "finished" else {}


class Ledger:
    """The trials of one sweep, in memory and below `folder`; one process writes.

    Within it Tune's thread notes what happens to trials while the main thread tells MLflow of those
    that are over: a trial's status is set after all that belongs to it, and a lock keeps its object
    from changing while it is written. Raises StorageError where a file of theirs holds no trial.
    """

    def __init__(self, folder: str) -> None:
        self._folder = object_store.join(folder, TRIALS)
        self._lock = threading.RLock()
        self.trials: list[Trial] = []
        while object_store.exists(self._url(len(self.trials))):
            self.trials.append(_read(self._url(len(self.trials))))
        self._order = 1 + max((order for order, _, _ in self.events()), default=-1)

    def add(self, values: dict[str, Any], branch: int = 0, **facts: Any) -> Trial:
        """A new trial, written down before anything is done about it."""
        with self._lock:
            trial = Trial(len(self.trials), values, branch, **facts)
            status, trial.status = trial.status, "running"
            self.trials.append(trial)
            if status == "running":
                self.write(trial)
            else:
                self.end(trial, status, trial.reason)
            return trial

    def probe(self, trial: Trial, probe: dict[str, Any]) -> bool:
        """Note a loss at a step; False for a step that it has reported before."""
        with self._lock:
            if trial.probes and probe["step"] <= trial.probes[-1]["step"]:
                return False
            trial.probes.append({"order": self._tick()} | probe)
            self.write(trial)
            return True

    def end(self, trial: Trial, status: Status, reason: str = "", **outcome: Any) -> None:
        """Note how the trial ended; once ended it stays so."""
        with self._lock:
            if trial.ended_order >= 0:
                return
            earlier = trial.earlier
            costs = {key: outcome[key] + earlier.get(key, 0.0) for key in COSTS if key in outcome}
            trial.outcome |= outcome | costs
            trial.reason, trial.ended_order = reason, self._tick()
            trial.status = status  # last: whoever sees it may read the rest
            self.write(trial)

    def interrupted(self, trial: Trial, outcome: dict[str, Any]) -> None:
        """Note, once, what a life cost whose trial goes on; one that is killed tells nothing."""
        ended = outcome.get("ended", 0.0)
        with self._lock:
            if ended > trial.earlier.get("ended", -1.0):
                costs = {k: outcome.get(k, 0.0) + trial.earlier.get(k, 0.0) for k in COSTS}
                trial.earlier = costs | {"ended": ended}
                self.write(trial)

    def write(self, trial: Trial) -> None:
        """Make what is known of `trial` durable; raises StorageError."""
        with self._lock:
            checksummed_json.write(self._url(trial.number), asdict(trial))

    def events(self) -> Iterator[tuple[int, Trial, dict[str, Any] | None]]:
        """Probes and ends (None) of all trials, in the order in which they happened."""
        probes = [(p["order"], trial, p) for trial in self.trials for p in trial.probes]
        ends = [(t.ended_order, t, None) for t in self.trials if t.ended_order >= 0]
        yield from sorted([*probes, *ends], key=lambda event: event[0])

    def _tick(self) -> int:
        self._order += 1
        return self._order - 1

    def _url(self, number: int) -> str:
        return object_store.join(self._folder, trial_file(number))


def _read(url: str) -> Trial:
    try:
        trial = Trial(**checksummed_json.read(url))
        trial.values = current_values(RunConfig, trial.values)
        return trial
    except (ChecksumError, TypeError, AttributeError) as error:  # also keys too few or too many
        told = error.args[1] if isinstance(error, ChecksumError) else str(error)
        reason = told.removeprefix("Trial.__init__() ").splitlines()[0]
        remedy = "put a whole copy of it back, or begin the sweep under another name"
        raise StorageError(
            url, f"this file holds no trial of a sweep ({reason})", remedy
        ) from error


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
