"""The training loop of one worker, in plain torch; the same for one worker and for many."""

import logging
import math
import time
from functools import partial

import torch

from ddpm_ray import fault_injection
from ddpm_ray.reporting import Command, Progress
from ddpm_ray.training import step_clock
from ddpm_ray.training.rejected_steps import handle_rejected
from ddpm_ray.training.run import Run
from ddpm_ray.training.spare_evaluations import MAX_OUTSTANDING, SpareEvaluations

log = logging.getLogger(__name__)

WAIT_S = 1.0  # for an evaluation, between reports
REPORT_EVERY_S = 1.0  # of sums over workers: rows, progress, and whether somebody asked to stop


def train_loop(run: Run) -> bool:
    """Train `run` from its current step to the last. Return False if asked to stop before.

    On return the state is in a committed checkpoint. Raises DivergedError instead of applying a
    gradient that is not finite or a spike, and StorageError if checkpoints cannot be written.
    """
    state, plan = run.state, run.plan
    command = begin(run)
    if command is not Command.NONE:
        save(run)
    while not run.is_finished() and command is not Command.STOP:
        with run.log.timed(), run.traced(state.step + 1):
            take_step(run)
            reports = plan.uses_weights(state.step) or is_report_due(run)
            decisions = run.log.read() if reports else []
        command = Command.NONE
        fault_injection.at("between")
        rewound = handle_rejected(run, decisions)
        step = state.step
        last = step == plan.steps
        scores = last or plan.is_due(plan.evaluate_every_steps, step)
        saves = scores or rewound or plan.is_due(plan.checkpoint_every_steps, step)
        every = plan.validate_every_steps
        validates = plan.is_due(every, every if last else step)
        if validates:
            run.validate(step)
        if reports:
            command = report(run)
            fault_injection.at("between")
        run.snapshot_ema(step)  # before the checkpoint that will reference them
        command = save_and_evaluate(run, saves, command)
    return end(run, command)


def begin(run: Run) -> Command:
    """Do what is due before the first step of this start; return a command of the driver."""
    state, plan = run.state, run.plan
    run.reported = (state.step, time.perf_counter())
    if state.step == 0 and plan.grid_every_steps:
        run.draw_grid(0)  # samples of the untrained network
    if run.saves_first:
        commit(run)  # no row of a step under the new values exists before they are committed
    if run.spare is not None:
        run.spare.resume()
    else:
        run.evaluate_outstanding(partial(commit, run))
    # An earlier start may have ended before it did this.
    return draw_and_evaluate(run) if state.step > 0 else Command.NONE


def save_and_evaluate(run: Run, saves: bool, command: Command) -> Command:
    """Save this step if `saves`, or for `command`; draw and evaluate. Return the latest command."""
    if run.spare is not None:  # before the checkpoint, which lists what is outstanding
        command = max(command, draw_and_evaluate(run))
    if saves or run.is_finished() or command is not Command.NONE:
        save(run)
    if run.spare is None:
        draw_and_evaluate(run)
    return command


def draw_and_evaluate(run: Run) -> Command:
    """Draw sample grids and evaluate at this step, if due and not done before.

    On the workers this is after the step's checkpoint, so that an error here loses no training.
    Scores are saved by a second checkpoint of the step. If the run ends in between, a continued run
    does this first. Returns a command of the driver that arrived meanwhile.
    """
    state, due, command = run.state, due_outputs(run), Command.NONE
    scores_before = state.scores
    if run.spare is None:
        draw_in_step(run, due)
    elif due:
        command = request_evaluation(run, run.spare, due)
    state.shown = state.step
    if run.spare is None and (state.scores is not scores_before or "strip" in due):
        save(run)
    return command


def due_outputs(run: Run) -> list[str]:
    """Return which of "grid", "strip" and "scores" are due at this step and not done before."""
    state, plan = run.state, run.plan
    step, last, due = state.step, run.is_finished(), list[str]()
    pictures = state.shown < step and plan.grid_every_steps > 0
    if pictures and (last or plan.is_due(plan.grid_every_steps, step)):
        due.append("grid")
    if pictures and last:
        due.append("strip")
    scores = last or plan.is_due(plan.evaluate_every_steps, step)
    if scores and state.scores.get("step") != step:
        due.append("scores")
    if run.spare is not None and "scores" in due:
        asked = any("scores" in one["outputs"] and one["step"] == step for one in state.outstanding)
        if asked or not run.spare.has_scores:
            due.remove("scores")
    return due


def draw_in_step(run: Run, due: list[str]) -> None:
    """Draw and evaluate on the workers, which wait for each other."""
    step = run.state.step
    if "grid" in due:
        run.draw_grid(step)
    if "strip" in due:
        run.draw_strip(step)
    if "scores" in due:
        run.settle()
        run.evaluate(step)


def request_evaluation(run: Run, spare: SpareEvaluations, due: list[str]) -> Command:
    """Queue the evaluation of this step for the spare process.

    Where the queue is full, the workers draw grids themselves, and wait with scores. Returns a
    command of the driver that arrived meanwhile.
    """
    step, command = run.state.step, Command.NONE
    if spare.free_slots() < 1:
        if due == ["grid"]:
            spare.warn_queue_full("the workers draw the grid of step %d themselves", step)
            draw_in_step(run, due)
            return command
        spare.warn_queue_full("training waits at step %d", step)
        commit(run)  # an error or a crash meanwhile loses no training; raises that of a write
        command = wait_for_evaluations(run, spare, free_slots=1)
        due = due_outputs(run)  # reports may have found that all core-seconds are used
    spare.request(step, due)
    return command


def wait_for_evaluations(run: Run, spare: SpareEvaluations, free_slots: int) -> Command:
    """Wait until `free_slots` more evaluations may be outstanding, or the driver wants a stop.

    Returns the driver's command. Reports go on meanwhile, so no collective operation waits long.
    """
    command, began_s = Command.NONE, time.monotonic()
    while spare.free_slots() < free_slots and command is not Command.STOP:
        spare.deliver(last_step=run.is_finished(), wait_s=WAIT_S)
        command = max(command, report(run))
        spare.log_long_wait(time.monotonic() - began_s)
    return command


def end(run: Run, command: Command) -> bool:
    """Wait for what runs in the background; return whether the run is complete.

    A run that the driver stops, with `command` or later, leaves evaluations outstanding; the next
    start queues them again.
    """
    spare, complete = run.spare, run.is_finished()
    if spare is not None and complete and spare.free_slots() < MAX_OUTSTANDING:
        run.settle()
        if command is not Command.STOP:
            spare.log_wait_at_end()
            wait_for_evaluations(run, spare, free_slots=MAX_OUTSTANDING)
            save(run)
        complete = spare.free_slots() == MAX_OUTSTANDING
    run.checkpoints.wait()
    return complete


def commit(run: Run) -> None:
    """Save this step and wait until it is committed; all workers must call it."""
    save(run)
    run.settle()


def is_report_due(run: Run) -> bool:
    """Whether about REPORT_EVERY_S have passed since the last report; the same on all workers."""
    return run.state.step - run.reported[0] >= run.report_every_steps


def take_step(run: Run) -> None:
    """Take one optimiser step on all workers, without waiting for the device.

    The device itself leaves the update out where the gradient is not finite or a spike. The host
    reads its decisions at the next report: see `handle_rejected`.
    """
    state, plan = run.state, run.plan
    fault_injection.set_position(run.workers.rank, state.step + 1)
    fault_injection.at("batch")
    step_clock.mark("data")
    batch = run.copier.batch(run.stream, state.step)
    losses, t, terms = run.objective.backward(
        run.network, batch, state.step, run.workers, plan.micro_batch_size
    )
    step_clock.mark("optimizer")
    norm = state.clip_gradients(plan.max_grad_norm)
    accepted = run.guard.accept(norm)
    fault_injection.at("update")
    learning_rate = plan.learning_rate(state.step)
    state.step_optimizers(learning_rate, accepted)
    state.ema.update(state.model, plan.ema_decay(state.step), accepted)
    state.averages.update(state.model, state.step, accepted)
    state.step += 1
    if state.moments is not None:  # losses of all workers, in order of position
        seen = run.workers.gather_rows(torch.stack([t.double(), losses.double()], 1))
        state.moments.update(seen[:, 0].long(), seen[:, 1], accepted)
    run.log.record(
        losses,
        run.objective.log_snr(t),
        terms,
        grad_norm=norm,
        accepted=accepted,
        learning_rate=learning_rate,
    )
    if state.step < plan.steps:
        step_clock.mark("data")
        run.copier.prepare(run.stream, state.step)  # while the device is busy with this one
    step_clock.mark("other")


def report(run: Run) -> Command:
    """Report rows and progress. Return the driver's command, the same on all workers."""
    if run.spare is not None:
        run.spare.deliver(last_step=run.is_finished())
    step, (last_step, last_time) = run.state.step, run.reported
    rows = run.send_rows()
    elapsed_s = max(time.perf_counter() - last_time, 1e-9)
    steps_per_s = (step - last_step) / elapsed_s
    agreed = torch.zeros(2, dtype=torch.float64)
    if run.sink is not None:
        rate = steps_per_s * run.plan.global_batch_size
        loss = rows[-1].metrics.get("train/loss", math.nan) if rows else math.nan  # NaN: skipped
        saved = run.checkpoints.committed or ""
        losses, core_s = run.state.validation_losses, run.log.core_s
        progress = Progress(step, run.plan.steps, loss, rate, losses, saved, core_s)
        agreed[0] = run.show_progress(progress)
        agreed[1] = max(1, round(steps_per_s * REPORT_EVERY_S))
    run.workers.sum_(agreed)  # only rank 0's is not 0: all workers report and stop together
    run.report_every_steps = int(agreed[1])
    run.reported = (step, time.perf_counter())
    return Command(int(agreed[0]))


def save(run: Run) -> None:
    """Copy the state; background threads of the workers write the checkpoint."""
    fault_injection.at("snapshot")
    run.state.facts["bands"] = run.log.window()
    run.state.facts["core_seconds"] = run.log.core_s
    run.state.facts["guard"] = run.guard.facts()
    unsent, then = [], None
    if run.sink is not None:
        unsent = [vars(row) for row in run.sink.unsent()]
        then = run.spare.forget_delivered() if run.spare is not None else None
    run.checkpoints.save(run.state, unsent, run.workers, then)
