"""The number of rows of a network call with which an engine computes the most rows per second."""

import time
from collections.abc import Callable
from typing import NamedTuple

Clock = Callable[[], float]
ROUNDS = 5  # timed calls of each width, after one that is not timed
LEAST_GAIN = 1.05  # of the rate; with less, a wider call only lets each job wait longer
PATIENCE = 2  # widths in a row without that gain, after which no wider one is tried


NO_MEMORY = "out of memory"  # in torch's errors, of a GPU and of a CPU


class WidthProfile(NamedTuple):
    """The measured times of calls of one shape, and the width that follows."""

    width: int  # rows of a call
    rows_per_s: float
    seconds: dict[int, float]  # of a call, by its rows


def profiled_width(
    call: Callable[[int], object], most: int, *, clock: Clock = time.perf_counter
) -> WidthProfile:
    """Find the width, a power of two up to `most` (at least 1), from which more rows gain nothing.

    `call(rows)` computes a call of that many rows and waits for its end. A wider call has more rows
    per second, and each job waits longer for its step: a wider one is taken if it has LEAST_GAIN
    times the rate, also where one between them has not, as on a busy machine. A width at which
    memory runs out is too wide. Raises the other errors of `call`, and any of a single row.
    """
    if most < 1:
        raise ValueError(f"most is {most}; a call has at least 1 row")
    seconds: dict[int, float] = {}
    best, width = 1, 1
    while width <= most:
        try:
            seconds[width] = _best_s(call, width, clock)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if width == 1 or not (isinstance(error, MemoryError) or NO_MEMORY in str(error)):
                raise
            break
        if width == 1 or width / seconds[width] >= LEAST_GAIN * best / seconds[best]:
            best = width
        elif width >= best * 2**PATIENCE:
            break
        width *= 2
    return WidthProfile(best, best / seconds[best], seconds)


def _best_s(call: Callable[[int], object], rows: int, clock: Clock) -> float:
    """Seconds of the fastest call: others were held up by other work of the machine."""
    call(rows)
    took = []
    for _ in range(ROUNDS):
        begun_s = clock()
        call(rows)
        took.append(clock() - begun_s)
    return min(took)
