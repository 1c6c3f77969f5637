"""The parts of a step add up to its time, whatever the marks, and are read once."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.reporting import STEP_MS
from ddpm_ray.training import step_clock
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.step_clock import PARTS, Part, StepClock
from ddpm_ray.training.throughput import DeviceUse
from tests.noise import pack_noise
from tests.training.test_loop import RecordingSink, begin, configured

CPU = torch.device("cpu")
MARKS = st.lists(st.tuples(st.sampled_from(PARTS), st.integers(0, 1000)), max_size=30)


@given(marks=MARKS, reads=st.sets(st.integers(0, 29)))
def test_each_moment_is_counted_once_in_the_part_that_was_marked_last(
    marks: list[tuple[Part, int]], reads: set[int]
) -> None:
    now = 0.0
    total = dict.fromkeys(PARTS, 0.0)
    wanted = dict.fromkeys(PARTS, 0.0)
    part: Part = "other"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: now)
        clock = StepClock(CPU)
        for number, (following, passed) in enumerate(marks):
            now += passed
            wanted[part] += passed
            clock.mark(following)
            part = following
            if number in reads:
                total = {name: total[name] + seconds for name, seconds in clock.collect().items()}
        total = {name: total[name] + seconds for name, seconds in clock.collect().items()}
    assert total == wanted


class DeviceEvent:
    """A CUDA event of a device whose queue has come as far as `reached`, in milliseconds."""

    reached = 0.0
    times: Iterator[float] = iter(())

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(self.times)

    def query(self) -> bool:
        return self.at <= DeviceEvent.reached

    def elapsed_time(self, later: "DeviceEvent") -> float:
        return later.at - self.at


def test_on_cuda_only_what_the_device_has_passed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    monkeypatch.setattr(DeviceEvent, "times", iter([10.0, 13.0, 20.0, 24.0, 25.0]))
    clock = StepClock(torch.device("cuda"))
    for part in ("data", "forward", "backward", "optimizer", "other"):
        clock.mark(part)
    monkeypatch.setattr(DeviceEvent, "reached", 20.0)
    found = clock.collect()
    assert (found["data"], found["forward"], found["backward"]) == (0.003, 0.007, 0.0)
    monkeypatch.setattr(DeviceEvent, "reached", 30.0)
    found = clock.collect()
    assert (found["forward"], found["backward"], found["optimizer"]) == (0.0, 0.004, 0.001)


class MarkedClock(StepClock):
    """Keeps the marks instead of their times."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.marked: list[Part] = []

    def mark(self, part: Part) -> None:
        self.marked.append(part)


def test_each_part_has_a_metric() -> None:
    assert tuple(f"train/step_ms/{part}" for part in PARTS) == STEP_MS


def test_marks_belong_to_the_loop_of_their_thread() -> None:
    clocks = [MarkedClock(CPU) for _ in range(2)]

    def train(clock: StepClock, part: Part) -> None:
        with step_clock.running(clock):
            step_clock.mark(part)
        step_clock.mark("other")  # no loop runs any more

    parts: tuple[Part, Part] = ("data", "forward")
    threads = [
        threading.Thread(target=train, args=pair) for pair in zip(clocks, parts, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [clock.marked for clock in clocks] == [["other", "data"], ["other", "forward"]]


def test_a_training_run_tells_where_its_time_goes(tmp_path: Path) -> None:
    """Of a real loop: each part of a step has taken time, and together all of it."""
    data = str(tmp_path / "data")
    pack_noise(data, 29, 4)
    use = DeviceUse(StepClock(CPU), CPU, operations=10**9, peak_tflops=2.0)
    sink = RecordingSink()
    run = begin(configured(data), tmp_path / "checkpoints", sink)
    run.log.use = use
    with step_clock.running(use.clock):
        assert train_loop(run)
    windows = [step for key, step in sink.values if key == "train/tflops"]
    assert windows == [4, 8]
    for step in windows:
        parts = {key: sink.values[key, step] for key in STEP_MS}
        assert all(parts[f"train/step_ms/{part}"] > 0 for part in ("data", "forward", "backward"))
        assert parts["train/step_ms/communication"] == 0  # of one worker
        images_per_s = sink.values["train/images_per_s", step]
        assert sink.values["train/tflops", step] == pytest.approx(images_per_s * 1e-3)
        assert sink.values["train/mfu", step] == pytest.approx(images_per_s * 5e-4)
        assert 0.01 < sink.values["train/peak_memory_gb", step] < 1000
