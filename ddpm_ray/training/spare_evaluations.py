"""Evaluations by a spare process: the main worker stores the EMA weights, training goes on.

All workers hold a SpareEvaluations and call `free_slots` and `request` at the same steps; the main
worker alone has the queue. Requests, of which a step may have several, are facts of the checkpoint
(`state.outstanding`) from that of their step on, until a later one holds their scores and rows
instead. So each is evaluated and its rows are sent, whenever the process ends.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ddpm_ray.collectives import Workers
from ddpm_ray.redaction import brief, counted
from ddpm_ray.reporting import Sink
from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.evaluation_queue import EvaluationQueue, FinishedEvaluation, Request
from ddpm_ray.training.evaluation_store import EvaluationResult, EvaluationStore
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.tensor_file import packed

log = logging.getLogger(__name__)

MAX_OUTSTANDING = 3  # evaluations: one runs, two wait; each stores an EMA in the run's folder
STILL_WAITING_S = 300.0  # between lines of a wait for evaluations


class EvaluationFailedError(RuntimeError):
    """The evaluation of a run's last step failed; args are (step, reason)."""

    def __str__(self) -> str:
        step, reason = self.args
        return (
            f"evaluation of the last step, {step}, failed: {reason}; the checkpoint is complete, "
            f"and the same command evaluates it again (evaluation.where=workers: without a spare "
            f"process)"
        )


@dataclass
class SpareEvaluations:
    """The evaluations of a run that are computed outside its workers."""

    state: TrainingState
    workers: Workers
    store: EvaluationStore
    writer: BackgroundWriter  # that of checkpoints: weights are stored before they are listed
    history: Mapping[str, Any]  # facts of the provenance
    has_scores: bool  # whether anything is scored
    queue: EvaluationQueue | None  # on the main worker
    sink: Sink | None  # on the main worker
    check_lease: Callable[[], None] = lambda: None  # raises once another process continues the run
    _logged: set[str] = field(default_factory=set)
    _periods: int = 0  # of STILL_WAITING_S, in the present wait
    _delivered: list[int] = field(default_factory=list)  # steps since the last save

    def resume(self) -> None:
        """Queue the evaluations that the checkpoint lists; all workers call it, before training.

        The weights of the run's own step are stored again: the stored ones may be damaged.
        """
        if self.queue is None:
            return
        step, requests = self.state.step, list(self.state.outstanding)
        steps = {one["step"] for one in requests}
        weights = packed(self.state.ema.state_dict()) if step in steps else None
        if requests:
            log.info("%s outstanding from an earlier start", self._listed())

        def queue_all(queue: EvaluationQueue) -> None:
            """Queue the requests, once their weights are stored."""
            self.check_lease()
            self.store.delete_finished(steps, step)
            if weights is not None:
                self.store.save_weights(step, weights)
            for request in requests:
                queue.add(request)

        self.writer.start(partial(queue_all, self.queue))

    def free_slots(self) -> int:
        """Return how many more may be outstanding, on all workers; all of them must call it."""
        taken = torch.zeros(1)
        if self.queue is not None:
            taken[0] = len(self.state.outstanding)
        return MAX_OUTSTANDING - int(self.workers.sum_(taken))

    def request(self, step: int, outputs: list[str]) -> None:
        """Store the weights of `step` and queue its evaluation; all workers call it.

        Waits for the previous write of the background writer, and raises its error.
        """
        if self.queue is None:
            return
        request: Request = {"step": step, "outputs": outputs, "history": dict(self.history)}
        self.state.outstanding.append(request)
        weights = packed(self.state.ema.state_dict())

        def write(queue: EvaluationQueue) -> None:
            self.check_lease()  # the other process may have other weights of this step
            self.store.save_weights(step, weights)
            queue.add(request)

        self.writer.start(partial(write, self.queue))

    def deliver(self, last_step: bool, wait_s: float = 0.0) -> None:
        """Pass finished evaluations to the sink and the state; only the main worker has any.

        Waits up to `wait_s` for the first. An evaluation that failed for good is given up with a
        line, unless it has the scores of the run's last step (`last_step`: the run is there), which
        raises EvaluationFailedError: they are the run's result.
        """
        if self.queue is None or self.sink is None:
            return
        for finished in self.queue.collect(wait_s):
            self._deliver(finished, self.sink, last_step)

    def _deliver(self, finished: FinishedEvaluation, sink: Sink, last_step: bool) -> None:
        step, outcome = finished.request["step"], finished.outcome
        if isinstance(outcome, EvaluationResult):
            outcome.pass_on(sink)
            self.state.scores = outcome.scores or self.state.scores
        elif last_step and step == self.state.step and "scores" in finished.request["outputs"]:
            raise EvaluationFailedError(step, brief(outcome)) from outcome
        else:
            log.warning(
                "evaluation of step %d is given up: %s; the run goes on without its %s",
                step,
                brief(outcome),
                " and ".join(finished.request["outputs"]),
            )
        others = [one for one in self.state.outstanding if one is not finished.request]
        self.state.outstanding = others
        self._delivered.append(step)

    def forget_delivered(self) -> Callable[[], None]:
        """Return what deletes the folders of delivered evaluations, for after the next commit.

        The folder of a step stays while another evaluation of it is outstanding.
        """
        steps = set(self._delivered) - {one["step"] for one in self.state.outstanding}
        self._delivered = []

        def delete() -> None:
            for step in steps:
                self.store.delete(step)

        return delete

    def warn_queue_full(self, consequence: str, step: int) -> None:
        """Log, the first time, that evaluations take longer than the steps between them."""
        if self.queue is not None and consequence not in self._logged:
            self._logged.add(consequence)
            log.warning(
                "%s outstanding, the most there may be (%s): %s; to avoid it, evaluate fewer "
                "images or less often",
                self._listed(),
                self.queue.current(),
                consequence % step,
            )

    def log_long_wait(self, waited_s: float) -> None:
        """Log every STILL_WAITING_S of a wait for evaluations which one runs, and since when."""
        periods = int(waited_s / STILL_WAITING_S)
        if self.queue is not None and periods > self._periods:
            log.info(
                "still waiting, for %.0f s, for %s: %s",
                waited_s,
                self._listed(),
                self.queue.current(),
            )
        self._periods = periods

    def log_wait_at_end(self) -> None:
        """Log that the run's end waits for evaluations."""
        if self.queue is not None:
            log.info("training is complete; waiting for %s", self._listed())

    def _listed(self) -> str:
        steps = ", ".join(str(one["step"]) for one in self.state.outstanding)
        return f"{counted(len(self.state.outstanding), 'evaluation')} (steps {steps})"

    def close(self) -> None:
        """End the spare process; a line names what is outstanding."""
        if self.queue is None:
            return
        self.queue.close()
        if self.state.outstanding:
            log.warning("%s outstanding: the same command finishes them", self._listed())
