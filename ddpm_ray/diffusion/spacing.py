"""Which steps a sampler visits on its way from T to 0."""

from collections.abc import Sequence
from itertools import pairwise


def uniform_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 evenly spaced steps from T = num_steps to 0, as 1000, 500, 0 for a count of 2.

    (Song et al. 2021, appendix D.2, linear.) Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(num_steps * i // count for i in range(count, -1, -1))


def quadratic_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 steps from T = num_steps to 0, denser towards 0, as 1000, 250, 0 for a count of 2.

    Step i is T (i / count)^2 rounded down, or i where that would repeat a step (Song et al. 2021,
    appendix D.2, which takes it for CIFAR-10). Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(max(i, num_steps * i**2 // count**2) for i in range(count, -1, -1))


def require_falling(steps: Sequence[int], num_steps: int) -> None:
    """Raises ValueError unless `steps` falls strictly from at most T = num_steps to 0."""
    if len(steps) < 2 or steps[-1] != 0:
        raise ValueError(f"steps are {_brief(steps)}; they must fall from at most T to 0")
    if steps[0] > num_steps:
        raise ValueError(f"steps start at {steps[0]}, but the schedule has T = {num_steps} steps")
    for t, s in pairwise(steps):
        if s >= t:
            raise ValueError(f"steps go from {t} to {s}; they must fall strictly, down to 0")


def _require_count(num_steps: int, count: int) -> None:
    if not 1 <= count <= num_steps:
        raise ValueError(f"{count} sampling steps of T = {num_steps}; take 1 to {num_steps}")


def _brief(steps: Sequence[int]) -> str:
    shown = [str(t) for t in steps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", *shown[-2:]]) or "empty"
