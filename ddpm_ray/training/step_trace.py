"""Record a few training steps with torch.profiler, for Perfetto (ui.perfetto.dev)."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Sink
from ddpm_ray.training import step_clock
from ddpm_ray.training.step_clock import Part

log = logging.getLogger(__name__)


class _NamedParts:
    """Names the parts of a step in the trace: a range from each mark to the next."""

    def __init__(self, step: ExitStack) -> None:
        self._part = step.enter_context(ExitStack())

    def mark(self, part: Part) -> None:
        """End the range of the part before, and begin that of `part`."""
        self._part.close()
        self._part.enter_context(record_function(part))


class StepTrace:
    """A trace of the main worker's steps `first` to `last`, which the sink gets after `last`.

    Perfetto shows a range "step N" for each step, and in it a range for each part of
    step_clock.PARTS. A run that continues after `first` traces the remaining steps. If the worker
    is killed before `last`, its trace is lost; the next start traces the steps that it repeats.
    """

    def __init__(self, steps: Sequence[int], sink: Sink | None, device: torch.device) -> None:
        """`steps`: first and last; empty: no trace. Workers without a sink trace nothing."""
        self._steps = range(steps[0], steps[1] + 1) if steps and sink is not None else range(0)
        self._sink = sink
        self._on_cuda = device.type == "cuda"
        self._profiler: profile | None = None
        self._first = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Take step number `step` (from 1) inside, traced if it is in the range."""
        if step in self._steps and self._profiler is None:
            self._profiler, self._first = self._started(), step
        with ExitStack() as named:
            if self._profiler is not None:
                named.enter_context(record_function(f"step {step}"))
                named.enter_context(step_clock.followed_by(_NamedParts(named)))
            yield
        if self._profiler is not None and step >= self._steps[-1]:
            self._finish(self._profiler, step)
            self._profiler = None

    def close(self) -> None:
        """Stop a trace whose last step was not reached: a profiler keeps each operation."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _started(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(ProfilerActivity.CUDA)
        profiler = profile(activities=activities)
        profiler.start()
        return profiler

    def _finish(self, profiler: profile, last: int) -> None:
        profiler.stop()
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "trace.json"
            profiler.export_chrome_trace(str(path))
            content = json.loads(path.read_bytes())
        name = f"profile/steps-{self._first:08d}-{last:08d}.json"
        assert self._sink is not None  # else no step is in the range
        self._sink.document(name, content)
        traced = counted(last - self._first + 1, "step")
        log.info("%s traced; artifact %s, for ui.perfetto.dev", traced, name)
