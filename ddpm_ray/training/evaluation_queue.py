"""Evaluations one after the other in a background thread, each tried again after a transient error.

The order of steps is kept: a restarted run takes the newest row of a key in MLflow as a sign that
all earlier ones are there (tracking/row_queue.py).
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ddpm_ray.redaction import brief, counted
from ddpm_ray.training.evaluation_store import EvaluationResult, EvaluationStore

log = logging.getLogger(__name__)

Request: TypeAlias = dict[str, Any]
"""Plain JSON: step, outputs ("grid", "strip", "scores"), history (facts of the provenance)."""


class Evaluator(Protocol):
    """Evaluates elsewhere and leaves the result in the EvaluationStore."""

    def evaluate(self, request: Request) -> None:
        """Return once the result is stored; raises what went wrong."""
        ...

    def release(self) -> None:
        """Free the resources: nothing waits for an evaluation."""
        ...

    def close(self) -> None:
        """End what still runs, so that `evaluate` raises; called from another thread."""
        ...


@dataclass(frozen=True)
class Ended:
    """One evaluation that is over: done with a result, or failed."""

    request: Request
    outcome: EvaluationResult | Exception


@dataclass
class EvaluationQueue:
    """Evaluates requests in order; the caller collects those that have ended."""

    evaluator: Evaluator
    store: EvaluationStore  # where the evaluator leaves the results
    is_transient: Callable[[Exception], bool]
    retries: int  # of one evaluation, after transient errors
    _waiting: deque[Request] = field(default_factory=deque)  # the first one runs
    _ended: deque[Ended] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closing: bool = False
    _thread: threading.Thread | None = None

    def add(self, request: Request) -> None:
        """Queue one evaluation; its weights are stored."""
        with self._changed:
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="evaluations", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def collect(self, wait_s: float = 0.0) -> list[Ended]:
        """Return what has ended since the last call, in order; wait up to `wait_s` for one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ended), wait_s)
            ended = list(self._ended)
            self._ended.clear()
            return ended

    def close(self) -> None:
        """End the evaluator and the thread; what is waiting stays undone."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.evaluator.close()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
                if self._closing:
                    return
                request = self._waiting[0]
            outcome = self._evaluate(request)
            with self._changed:
                if self._closing:
                    return
                self._waiting.popleft()
                self._ended.append(Ended(request, outcome))
                self._changed.notify_all()
                is_idle = not self._waiting
            if is_idle:
                self.evaluator.release()

    def _evaluate(self, request: Request) -> EvaluationResult | Exception:
        """Evaluate, again after transient errors; return the result, or the error that is left."""
        for tried in range(self.retries + 1):
            try:
                self.evaluator.evaluate(request)
                return self.store.result(request["step"])
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                last = error
            if self._closing or not self.is_transient(last):
                break
            if tried < self.retries:
                log.warning(
                    "evaluation of step %d: %s; trying again (%d of %s)",
                    request["step"],
                    brief(last),
                    tried + 1,
                    counted(self.retries, "retry", "retries"),
                )
        return last
