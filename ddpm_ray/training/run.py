"""One worker's training: its settings, its state and the objects that act on it."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from ddpm_ray.collectives import Workers
from ddpm_ray.data.loader import Batch
from ddpm_ray.reporting import Command, Progress, Row, Sink
from ddpm_ray.training.batch_copier import BatchCopier
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.divergence_guard import DivergenceGuard
from ddpm_ray.training.gradient_accumulation import Losses
from ddpm_ray.training.metrics_buffer import StepLog
from ddpm_ray.training.spare_evaluations import SpareEvaluations
from ddpm_ray.training.state import TrainingState


class ImageStream(Protocol):
    """Global batches by number; see ddpm_ray/data/loader.py."""

    @property
    def waited_s(self) -> float:
        """Total time that `batch` waited."""
        ...

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        """Wait for this worker's share of the global batch of `step`; it may be put into `out`."""
        ...

    def keys(self, step: int) -> list[str]:
        """Return the keys of the images of `batch(step)`."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


class TrainingObjective(Protocol):
    """The losses of a task and their gradient."""

    def backward(
        self,
        network: nn.Module,
        batch: Batch,
        step: int,
        workers: Workers,
        micro_batch: int,
    ) -> Losses:
        """Add the gradient of the global batch's mean loss to all parameters that are trained.

        `batch`, with samples as the data set stores them, is this worker's share of global batch
        `step` (from 0); each forward pass takes `micro_batch` samples of it. A loss that is not
        finite makes the gradient of all workers NaN.
        """
        ...

    def log_snr(self, t: Tensor) -> Tensor | None:
        """Log-SNR [b] float64 at the noise levels of losses; None if there are none."""
        ...


@dataclass(frozen=True)
class Plan:
    """Settings of the training loop; steps are optimiser steps."""

    steps: int  # at most
    global_batch_size: int
    micro_batch_size: int
    max_grad_norm: float
    learning_rate: Callable[[int], float]  # of the update that takes step s to s + 1
    ema_decay: Callable[[int], float]
    checkpoint_every_steps: int
    grid_every_steps: int = 0
    evaluate_every_steps: int = 0
    validate_every_steps: int = 0
    snapshot_every_steps: int = 0  # of the EMA, see ema_snapshots.py
    core_seconds: float = 0.0  # after which the run ends; 0: only `steps` ends it

    def is_due(self, every_steps: int, step: int) -> bool:
        """Whether an action with period `every_steps` (0: never) is due after `step`."""
        return every_steps > 0 and step % every_steps == 0

    def uses_weights(self, step: int) -> bool:
        """Whether anything is due after `step` for which its weights must be known to be good."""
        periods = (
            self.checkpoint_every_steps,
            self.grid_every_steps,
            self.evaluate_every_steps,
            self.validate_every_steps,
            self.snapshot_every_steps,
        )
        return step == self.steps or any(self.is_due(every, step) for every in periods)


@dataclass
class Run:
    """State of one worker's training, and the objects that act on it."""

    plan: Plan
    state: TrainingState
    network: nn.Module  # state.model, wrapped by DDP and torch.compile as configured
    objective: TrainingObjective
    guard: DivergenceGuard
    stream: ImageStream
    workers: Workers
    log: StepLog
    checkpoints: CheckpointWriter
    sink: Sink | None  # on the main worker
    show_progress: Callable[[Progress], Command]  # on the main worker
    draw_grid: Callable[[int], None]
    draw_strip: Callable[[int], None]
    evaluate: Callable[[int], None]  # leaves its scores in state.scores
    validate: Callable[[int], None]  # adds its losses to state.validation_losses
    snapshot_ema: Callable[[int], None] = lambda step: None  # see ema_snapshots.py
    traced: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()
    end_trace: Callable[[], None] = lambda: None
    spare: SpareEvaluations | None = None  # None: the workers draw and evaluate in the step
    # Without a spare process: what one of an earlier start left. Its argument commits a checkpoint.
    evaluate_outstanding: Callable[[Callable[[], None]], None] = lambda commit: None
    saves_first: bool = False  # save before the first step, to record changed options
    report_every_steps: int = 1
    reported: tuple[int, float] = field(default_factory=lambda: (0, time.perf_counter()))
    copier: BatchCopier = field(init=False)

    def __post_init__(self) -> None:
        self.copier = BatchCopier(self.workers.device)

    def is_finished(self) -> bool:
        """Whether all steps are taken, or all core-seconds used; the same on all workers."""
        core_seconds = self.plan.core_seconds
        return self.state.step >= self.plan.steps or 0 < core_seconds <= self.log.core_s

    def settle(self) -> None:
        """Wait on all workers until the last checkpoint is committed; all must call it.

        An error of one worker ends all of them, and would abort an upload of rank 0.
        """
        self.checkpoints.wait()
        self.workers.gather(None)

    def send_rows(self) -> list[Row]:
        """Send the rows of the steps since the last call to the sink; none right after a rewind."""
        rows = self.log.collect(self.state.step, self.stream.waited_s)
        if self.sink is not None:
            self.sink.rows(rows)
        return rows
