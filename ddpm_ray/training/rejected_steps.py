"""Steps that the device rejected: skipped, rewound, or the end of the run."""

import logging

from ddpm_ray import fault_injection
from ddpm_ray.training.divergence_guard import DivergedError, diverged
from ddpm_ray.training.metrics_buffer import Decision
from ddpm_ray.training.run import Run
from ddpm_ray.training.shared_reading import read_together

log = logging.getLogger(__name__)


def handle_rejected(run: Run, decisions: list[Decision]) -> bool:
    """Skip, rewind or stop as the decisions ask for, on the steps up to now; True if rewound.

    All workers have the same decisions. The first rejected step that stops or rewinds the run is
    the last: what was computed after it is dropped, and the device has left its updates out.
    Raises DivergedError if training.on_divergence=stop, or after too many skipped steps.
    """
    first = run.state.step - len(decisions) + 1
    for step, decision in enumerate(decisions, first):
        run.guard.record(decision.grad_norm, accepted=decision.accepted)
        if not decision.accepted and skip_step(run, step, decision):
            return True
    return False


def skip_step(run: Run, step: int, decision: Decision) -> bool:
    """Report a step that was not taken, or rewind to earlier weights. Return True if rewound."""
    keys = run.stream.keys(step - 1)
    norm, limit = decision.grad_norm, run.guard.limit
    error = diverged(step, norm, limit, decision.losses, keys, run.workers)
    if run.guard.exhausted:
        go_back(run, step - 1)
        run.settle()
        raise error
    if run.sink is not None:
        named = error.args[3]
        facts = {"step": step, "grad_norm": str(norm), "limit": str(limit), "keys": named}
        run.sink.document(f"skipped/step-{step:08d}.json", facts)
        log.warning("%s. Skipped (training.on_divergence)", str(error).partition(";")[0])
    if run.guard.rewinds:
        go_back(run, step)
        fault_injection.set_position(run.workers.rank, step)
        rewind(run, error)
    return run.guard.rewinds


def go_back(run: Run, step: int) -> None:
    """Drop the steps after `step`: they were computed before the host knew of a rejected one."""
    state = run.state
    run.log.forget(state.step - step)
    state.step, state.shown = step, min(state.shown, step - 1)


def rewind(run: Run, error: DivergedError) -> None:
    """Restore weights, EMA and optimiser moments of the last scheduled checkpoint.

    The caller saves the result. Raises `error` if that checkpoint no longer exists. The step count
    continues, so that the batches since then are not repeated: they would diverge again. Only a
    scheduled checkpoint is used: one saved on request would make an interrupted run differ from an
    uninterrupted one.
    """
    state, every = run.state, run.plan.checkpoint_every_steps
    step, scores, losses, shown = state.step, state.scores, state.validation_losses, state.shown
    outstanding = state.outstanding
    run.send_rows()  # of steps that are given up, as they were
    run.checkpoints.wait()
    store = run.checkpoints.store
    (where, *_) = run.workers.gather(
        store.at((step - 1) // every * every) if run.workers.is_main else None
    )
    if where is None:
        raise error
    snapshot, skipped = read_together(where, run.workers), run.guard.skipped
    state.restore(snapshot)
    state.step, state.scores, state.validation_losses = step, scores, losses
    state.shown, state.outstanding = shown, outstanding
    run.log.resume(snapshot.facts["bands"])
    run.guard.resume(snapshot.facts["guard"] | {"skipped": skipped})
    log.warning("rewound: step %d continues from the weights of %s", step + 1, where)
