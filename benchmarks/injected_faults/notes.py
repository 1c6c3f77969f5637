"""Notes of workers about their steps, and numbers from them; light, because workers import it."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

NOTES = "notes"
SLACK_S = 0.5  # after a fault the main worker may still end the step before


@dataclass(frozen=True)
class Note:
    """A worker has ended a step."""

    at_s: float
    pid: int
    rank: int
    step: int
    durable: int  # the newest step of which it knows that its checkpoint is whole in storage


def note(home: Path, rank: int, step: int, durable: int) -> None:
    """Append a note to the file that all workers share."""
    line = json.dumps(asdict(Note(time.time(), os.getpid(), rank, step, durable)))
    with (home / NOTES).open("a") as notes:
        notes.write(line + "\n")


@dataclass
class FaultedRun:
    """A run with injected faults: `home` holds its notes, and the marks of faults at points."""

    home: Path
    every: int = 0  # steps from checkpoint to checkpoint
    rows: int = 0  # of the loss in MLflow
    orphans: int = 0  # checkpoint folders that nobody points to
    hits_s: list[float] = field(default_factory=list)  # by the clock instead of at points

    def notes(self) -> list[Note]:
        """The main worker's notes, by time."""
        return [one for one in noted(self.home) if one.rank == 0]

    def fault_times_s(self) -> list[float]:
        """Time of each fault."""
        return self.hits_s or sorted(mark.stat().st_mtime for mark in marks(self.home).iterdir())

    def before(self, fault_s: float) -> list[Note]:
        """The main worker's notes up to then."""
        return [one for one in self.notes() if one.at_s <= fault_s + SLACK_S]

    def after(self, fault_s: float) -> list[Note]:
        """The main worker's notes since then."""
        return [one for one in self.notes() if one.at_s > fault_s + SLACK_S]

    @property
    def repeated(self) -> int:
        """Steps that were done again."""
        return len(self.notes()) - len({one.step for one in self.notes()})

    @property
    def least(self) -> int:
        """Steps that no checkpoint can save: since the last that was due."""
        return sum(self.before(at_s)[-1].step % self.every for at_s in self.fault_times_s())

    @property
    def ignored(self) -> int:
        """Kills after which a whole checkpoint was passed over for an older one."""
        return sum(
            self.after(at_s)[0].step - 1 < self.before(at_s)[-1].durable
            for at_s in self.fault_times_s()
        )

    def to_new_step_s(self) -> list[float]:
        """Seconds from each fault to the end of the first new step."""
        took_s = []
        for at_s in self.fault_times_s():
            newest = max(one.step for one in self.before(at_s))
            took_s.append(next(o.at_s for o in self.after(at_s) if o.step > newest) - at_s)
        return took_s

    def useful(self) -> tuple[float, int]:
        """Share of the time between first and last fault spent on new steps, and their number."""
        first_s, *_, last_s = times_s = self.fault_times_s()
        useful_s, count, newest = 0.0, 0, 0
        for last, one in pairwise(self.notes()):
            hit = any(last.at_s < at_s <= one.at_s for at_s in times_s)
            newest = max(newest, last.step)
            inside = one.at_s > first_s and last.at_s < last_s
            if one.pid == last.pid and one.step > newest and inside and not hit:
                useful_s += one.at_s - last.at_s
                count += 1
        return useful_s / (last_s - first_s), count


def noted(home: Path) -> list[Note]:
    """All notes so far."""
    if not (home / NOTES).exists():
        return []
    return [Note(**json.loads(line)) for line in (home / NOTES).read_text().splitlines()]


def marks(home: Path) -> Path:
    """Folder of the marker files of fired faults."""
    return home / "marks"
