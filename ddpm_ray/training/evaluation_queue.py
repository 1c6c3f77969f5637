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

CLOSE_S = 30.0  # how long the end of the process waits for the thread

Request: TypeAlias = dict[str, Any]
"""Plain JSON: step, outputs ("grid", "strip", "scores"), history (facts of the provenance)."""


class Evaluator(Protocol):
    """Evaluates in another process, which leaves the result in the EvaluationStore."""

    def call(self, request: Request) -> str:
        """Return the digest of the stored result; raises the error of the evaluation."""
        ...

    def activity(self) -> str:
        """Return what the process does, and for how long: `computes scores (for 290 s)`."""
        ...

    def release(self) -> None:
        """Free the resources: nothing waits for an evaluation."""
        ...

    def close(self) -> None:
        """End what still runs, so that `call` raises; called from another thread."""
        ...


@dataclass(frozen=True)
class FinishedEvaluation:
    """An evaluation with its result, or with the error after which it is not tried again."""

    request: Request
    outcome: EvaluationResult | Exception


@dataclass
class EvaluationQueue:
    """Evaluates requests in order; the caller collects the finished ones."""

    evaluator: Evaluator
    store: EvaluationStore  # where the evaluator leaves the results
    is_transient: Callable[[Exception], bool]
    retries: int  # of one evaluation, after transient errors
    _waiting: deque[Request] = field(default_factory=deque)  # the first one runs
    _finished: deque[FinishedEvaluation] = field(default_factory=deque)
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

    def collect(self, wait_s: float = 0.0) -> list[FinishedEvaluation]:
        """Return those finished since the last call, in order; wait up to `wait_s` for one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._finished), wait_s)
            finished = list(self._finished)
            self._finished.clear()
            return finished

    def current(self) -> str:
        """Return the step that is evaluated now, and what the evaluator does, in words."""
        with self._changed:
            steps = [request["step"] for request in self._waiting]
        return f"step {steps[0]} {self.evaluator.activity()}" if steps else "none is evaluated"

    def close(self) -> None:
        """End the evaluator and the thread; requests that wait are not evaluated.

        A thread that does not end within CLOSE_S, as one that reads from a store without an answer,
        is left to the end of the process.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.evaluator.close()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.warning(
                    "evaluations: their thread has not ended within %g s; the process ends without "
                    "it, and the next start evaluates what is outstanding",
                    CLOSE_S,
                )

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
                self._finished.append(FinishedEvaluation(request, outcome))
                self._changed.notify_all()
                is_idle = not self._waiting
            if is_idle:
                self.evaluator.release()

    def _evaluate(self, request: Request) -> EvaluationResult | Exception:
        """Evaluate, again after transient errors; return the result, or the error that is left."""
        for tried in range(self.retries + 1):
            try:
                digest = self.evaluator.call(request)
                return self.store.result(request["step"], digest)
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
