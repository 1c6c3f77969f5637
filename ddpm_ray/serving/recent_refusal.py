"""The last refusal of a server without room: for a moment it holds for all new jobs."""

import time
from collections.abc import Callable

from ddpm_ray.serving.request_errors import OVERLOADED, RequestError

# To plan and refuse an order takes a process that draws some milliseconds of CPU. At ten times the
# work that a server can do, that was more than half of its time: it drew 0.38 of its images.
HOLD_S = 1.0  # as the least Retry-After


class RecentRefusal:
    """Remembers for HOLD_S that there is no room."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: RequestError | None = None
        self._until_s = 0.0

    def note(self, error: RequestError) -> None:
        """Take an error of an order; only that of a server without room counts."""
        if error.code == OVERLOADED:
            self._last, self._until_s = error, self._clock() + HOLD_S

    def require_room(self) -> None:
        """Raise the RequestError of the last refusal, if that was within HOLD_S."""
        if self._last is not None and self._clock() < self._until_s:
            error = self._last
            raise RequestError(
                error.message, status=error.status, code=error.code, headers=error.headers
            )
