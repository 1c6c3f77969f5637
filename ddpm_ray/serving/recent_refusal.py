"""The last refusals of a server without room: for a moment they hold for all new jobs."""

import time
from collections.abc import Callable

from ddpm_ray.serving.limits import OverloadedError
from ddpm_ray.serving.request_errors import OVERLOADED, RequestError, overloaded

# To plan and refuse an order takes a process that draws some milliseconds of CPU. At ten times the
# work that a server can do, that was more than half of its time: it drew 0.38 of its images.
HOLD_S = 1.0  # as the least Retry-After


class RecentRefusal:
    """Remembers for HOLD_S which models have no room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, tuple[float, float]] = {}  # model -> (until, and its Retry-After)

    def note(self, model: str, error: RequestError) -> None:
        """Take an error of an order; only that of a model without room for any job counts."""
        if error.code == OVERLOADED:
            self._held[model] = self._clock() + HOLD_S, float(error.headers["Retry-After"])

    def require_room(self, model: str) -> None:
        """Raise RequestError if the model had no room within HOLD_S; `note` ignores that error."""
        until_s, wait_s = self._held.get(model, (0.0, 0.0))
        if self._clock() < until_s:
            raise overloaded(OverloadedError("there was no room for a job a moment ago", wait_s))
