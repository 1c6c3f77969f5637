"""The width of an engine's batches, for machines whose calls take a known time."""

from collections.abc import Callable

import pytest

from ddpm_ray.serving.batch_width import profiled_width


class Machine:
    """Computes a call of n rows, at most `room`, in `seconds(n)` on a clock of its own."""

    def __init__(self, seconds: Callable[[int], float], room: int = 10**9) -> None:
        self.seconds, self.room, self.now_s = seconds, room, 0.0
        self.first: set[int] = set()

    def __call__(self, rows: int) -> None:
        if rows > self.room:
            raise RuntimeError("CUDA out of memory")
        warm_up_s = 0 if rows in self.first else 5.0  # of the first call of a shape
        self.first.add(rows)
        self.now_s += self.seconds(rows) + warm_up_s


def test_a_machine_that_computes_rows_one_by_one_gets_width_1() -> None:
    machine = Machine(lambda n: 0.01 * n)
    found = profiled_width(machine, 64, clock=lambda: machine.now_s)
    assert found.width == 1
    assert found.rows_per_s == pytest.approx(100)


def test_a_machine_that_is_full_at_16_rows_gets_16() -> None:
    machine = Machine(lambda n: 0.01 * max(1, n / 16))
    found = profiled_width(machine, 64, clock=lambda: machine.now_s)
    assert found.width == 16
    assert found.rows_per_s == pytest.approx(1600)
    wanted = {1: 0.01, 2: 0.01, 4: 0.01, 8: 0.01, 16: 0.01, 32: 0.02, 64: 0.04}
    assert found.seconds == pytest.approx(wanted)


def test_one_slow_width_between_faster_ones_ends_nothing() -> None:
    """On a busy machine a call may take twice its time."""
    machine = Machine(lambda n: 0.02 if n == 2 else 0.01)
    assert profiled_width(machine, 16, clock=lambda: machine.now_s).width == 16


def test_the_most_rows_are_a_limit() -> None:
    machine = Machine(lambda n: 0.01)
    assert profiled_width(machine, 12, clock=lambda: machine.now_s).width == 8


def test_what_does_not_fit_into_memory_is_too_wide() -> None:
    machine = Machine(lambda n: 0.01, room=5)
    assert profiled_width(machine, 64, clock=lambda: machine.now_s).width == 4
    with pytest.raises(RuntimeError, match="out of memory"):
        profiled_width(Machine(lambda n: 0.01, room=0), 64)


def test_another_error_is_no_limit_of_memory() -> None:
    def call(rows: int) -> None:
        if rows > 1:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        profiled_width(call, 8)
    with pytest.raises(ValueError, match="most is 0; a call has at least 1 row"):
        profiled_width(call, 0)
