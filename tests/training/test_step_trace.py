"""The trace holds the operations of the steps that were named, and of no others."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ddpm_ray.training import step_clock
from ddpm_ray.training.step_trace import StepTrace
from tests.training.test_loop import RecordingSink

CPU = torch.device("cpu")
# A step number is an operation of its own, so that a trace tells which steps it holds.
OPERATIONS = (torch.sin, torch.cos, torch.exp, torch.tan, torch.abs, torch.neg)


@dataclass
class KeepingSink(RecordingSink):
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)

    def document(self, path: str, content: dict[str, Any]) -> None:
        self.kept[path] = content


def traced(steps: tuple[int, ...], taken: range) -> dict[str, set[str]]:
    """Names of the operations in each document of a run of the steps `taken`."""
    sink = KeepingSink()
    trace = StepTrace(steps, sink, CPU)
    for step in taken:
        with trace.step(step):
            OPERATIONS[step - 1](torch.ones(3))
    trace.close()
    return {
        path: {str(event.get("name")) for event in content["traceEvents"]}
        for path, content in sink.kept.items()
    }


@pytest.mark.parametrize(
    "taken, path, inside, outside",
    [
        (range(1, 7), "steps-00000002-00000004", "cos exp tan", "sin abs neg"),
        (range(3, 7), "steps-00000003-00000004", "exp tan", "sin cos abs neg"),
    ],
)
def test_a_trace_holds_the_named_steps_alone(
    taken: range, path: str, inside: str, outside: str
) -> None:
    ((name, found),) = traced((2, 4), taken).items()
    assert name == f"profile/{path}.json"
    assert {f"aten::{operation}" for operation in inside.split()} <= found
    assert not {f"aten::{operation}" for operation in outside.split()} & found
    assert {"step 4"} <= found


def test_a_trace_names_each_part_of_a_step_around_its_operations() -> None:
    sink = KeepingSink()
    trace = StepTrace((1, 2), sink, CPU)
    for step in (1, 2):
        with trace.step(step):
            step_clock.mark("forward")
            torch.sin(torch.ones(3))
            step_clock.mark("backward")
            torch.cos(torch.ones(3))
    step_clock.mark("other")  # after the trace
    ((_, content),) = sink.kept.items()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in content["traceEvents"]:
        if event.get("ph") == "X":
            span = event["ts"], event["ts"] + event["dur"]
            spans.setdefault(event["name"], []).append(span)
    assert "other" not in spans
    for inner, outer in (("aten::sin", "forward"), ("aten::cos", "backward")):
        for index in range(2):
            (whole,) = spans[f"step {index + 1}"]
            nested = [whole, sorted(spans[outer])[index], sorted(spans[inner])[index]]
            assert nested == sorted(nested)
            assert [end for _, end in nested] == sorted((end for _, end in nested), reverse=True)


@pytest.mark.parametrize(
    "steps, taken",
    [
        pytest.param((), range(1, 7), id="none asked for"),
        pytest.param((2, 4), range(5, 7), id="continued after them"),
        pytest.param((2, 4), range(1, 4), id="ended before"),
    ],
)
def test_there_is_no_trace_without_its_last_step(steps: tuple[int, ...], taken: range) -> None:
    assert traced(steps, taken) == {}
    assert not torch._C._autograd._profiler_enabled()  # it would keep each operation
