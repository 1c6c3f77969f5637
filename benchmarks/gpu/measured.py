"""Timing of operations on a device, which works asynchronously to the host."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 3  # calls that are not counted: allocations, choices of kernels


class Rate(NamedTuple):
    """Times of a repeated call."""

    calls: int
    seconds: float  # of all of them, the device's work included

    @property
    def ms(self) -> float:
        """Time of one call."""
        return 1e3 * self.seconds / self.calls


class Busy(NamedTuple):
    """Use of the device's time during a measurement."""

    idle_share: float  # of the time from the first kernel's begin to the last one's end
    kernels: int


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, torch refuses operations that may end in other bits the next time."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(action: Callable[[], object], device: torch.device, seconds: float) -> Rate:
    """`action` for about so many seconds, at least three times, after a warm-up."""
    for _ in range(WARM_UP):
        action()
    wait(device)
    calls, begun = 0, time.perf_counter()
    while calls < 3 or time.perf_counter() - begun < seconds:
        action()
        calls += 1
        if calls % 10 == 0:
            wait(device)  # else thousands of calls could be queued when the time is over
    wait(device)
    return Rate(calls, time.perf_counter() - begun)


def busy(action: Callable[[], object], device: torch.device, calls: int) -> Busy:
    """The device's gaps during `calls` of `action`; on the CPU those between its operations."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    action()
    wait(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            action()
        wait(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == device.type.upper()
        and not event.is_user_annotation  # these span what they name, gaps included
        and (on_cuda or event.cpu_parent is None)
    ]
    return Busy(gaps(spans), len(spans) // calls)


def gaps(spans: Iterable[tuple[float, float]]) -> float:
    """The share that none of `spans` (begin, end) covers, from the first begin to the last end."""
    covered, until, first = 0.0, float("-inf"), None
    for begin, end in sorted(spans):
        first = begin if first is None else first
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    if first is None or until <= first:
        raise ValueError("the profiler saw nothing on the device; may this user profile it?")
    return 1 - covered / (until - first)


def flops(action: Callable[[], Tensor]) -> int:
    """Floating-point operations of `action`, which gives a loss, and of its backward pass."""
    # Attention as plain products: the counter does not know every fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.autograd.backward(action())
    return int(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int, seconds: float) -> float:
    """Floating-point operations a second of square products of that size."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / (repeated(lambda: a @ b, device, seconds).ms / 1e3)
