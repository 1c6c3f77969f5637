"""Progress of a job on stderr."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_ray import reporting


class ProgressLine:
    """Progress on stderr: a live bar on a terminal, else plain lines at growing intervals."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: tuple[float, int] | None = None  # when, and how far it was then
        self._logged = (float("-inf"), -1)
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn(unit),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units are done."""
        now = time.monotonic()
        if self._first is None or done < self._logged[1]:  # a restart went back
            self._first = now, done
        since, start = self._first
        if done == self._logged[1]:
            return
        if self._bar is not None:
            if not self._bar.tasks:
                self._bar.start()
                self._bar.add_task(note, total=total)
            self._bar.update(self._bar.task_ids[0], completed=done, description=note)
            if done == total:
                self._bar.stop()
        elif done == total or now - self._logged[0] >= min(30.0, max(1.0, (now - since) / 10)):
            left = (now - since) / (done - start) * (total - done) if done > start else None
            ahead = f"  {_duration(left)} left" if left is not None and done < total else ""
            text = f"{self._unit} {done}/{total}  {note}".rstrip() + ahead
            print(text, file=sys.stderr, flush=True)
        else:
            return
        self._logged = (now, done)


def image_line() -> Callable[[reporting.Progress], None]:
    """Return a function that shows a job's progress in images, with their rate."""
    line = ProgressLine("images")
    return lambda p: line(p.step, p.steps, f"{p.images_per_s:.3g} images/s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
