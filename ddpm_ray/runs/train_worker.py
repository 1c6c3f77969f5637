"""One Ray Train worker of a run: restore the newest checkpoint, train, evaluate."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from ddpm_ray import fault_injection
from ddpm_ray.assembly import (
    initial_weights,
    latents,
    operations,
    run_config,
    training_run,
    wrapping,
)
from ddpm_ray.assembly.initial_weights import InitialWeights
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import from_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.distributed import fatal_errors, placement_groups, startup
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.heartbeat import HeartbeatSender
from ddpm_ray.distributed.worker_context import distributed_context
from ddpm_ray.reporting import Command, Progress, Row
from ddpm_ray.runs.spare_evaluator import evaluate_on_workers, spare_evaluations
from ddpm_ray.runs.training_outputs import training_outputs
from ddpm_ray.runs.worker_process import (
    configure_process,
    facts_of_run,
    opened_data,
    require_same_sets,
)
from ddpm_ray.storage import object_store
from ddpm_ray.tracking import mlflow_settings
from ddpm_ray.tracking.async_logger import Tracker
from ddpm_ray.tracking.run_info import RunMetadata, TrackedRun
from ddpm_ray.training import checkpoint_space, shared_reading, step_clock
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.divergence_guard import DivergenceGuard
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.step_trace import StepTrace
from ddpm_ray.training.writer_lease import Lease

log = logging.getLogger(__name__)


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as one worker; return the final step, the checkpoint's URL, scores and Unix times."""
    mlflow_settings.apply()
    control: RunControl = settings["control"]
    if control.status().fatal is not None:  # an earlier group met an error that would recur
        startup.mark_done(control)
        return {}
    with fatal_errors.report_fatal_errors(control):
        return _train(from_dict(RunConfig, settings["config"]), settings, control)


def _train(config: RunConfig, settings: dict[str, Any], control: RunControl) -> dict[str, Any]:
    workers, group = distributed_context(), placement_groups.current_group()
    fault_injection.set_position(workers.rank, 0, "open")
    sender = HeartbeatSender(workers.rank, partial(control.heartbeat, group=group), workers.count)
    sender.start()
    startup.stop_heartbeat()
    try:
        run = assemble(config, settings, control.report, workers)
        if workers.is_main:
            checkpoint_space.warn_of_shortage(config.training, run.state, run.checkpoints.store.url)
            control.record_start(run.state.step, group, workers.count)
        began = time.time()
        fault_injection.at("begin")
        try:
            with step_clock.running(run.log.use.clock if run.log.use else None):
                finished = train_loop(run)
        finally:
            undelivered = close_all(run, config.tracking.last_rows_s)
    finally:
        sender.stop()
        control.mark_done(workers.rank, group)
    return {
        "step": run.state.step,
        "finished": finished,
        "core_seconds": run.log.core_s,
        "checkpoint": run.checkpoints.committed,
        "scores": run.state.scores,
        "validation_losses": run.state.validation_losses,
        "undelivered": undelivered,  # metric rows that MLflow has not acknowledged
        "trained_from": began,
        "trained_to": time.time(),
    }


def close_all(run: Run, last_rows_s: float) -> int:
    """Close trace, stream, spare process and sink; return the number of undelivered rows.

    An error of one does not keep the others from being closed: rows would be lost, and a process
    would keep its resources.
    """
    try:
        run.stream.close()
        run.end_trace()
    finally:
        try:
            if run.spare is not None:
                run.spare.close()
        finally:
            undelivered = 0 if run.sink is None else run.sink.close(last_rows_s)
    return undelivered


def assemble(
    config: RunConfig,
    settings: dict[str, Any],
    show_progress: Callable[[Progress], Command],
    workers: Workers,
) -> Run:
    """Build this worker's part of the run, restored from the newest intact checkpoint."""
    configure_process(config)
    dataset = opened_data(config, settings)
    codec = latents.codec_of_data(config.data, dataset, workers.device)
    facts = facts_of_run(settings, dataset, codec)
    state = training_run.training_state(
        config, dataset.manifest.diffused_shape, workers.device, facts
    )
    use = operations.device_use(config, dataset.manifest.diffused_shape, workers)
    log = training_run.step_log(config, dataset.manifest.image_shape, workers, use)
    guard = DivergenceGuard.of(config.training.on_divergence, config.training.spike_factor)
    writer = _writer(config, settings, workers)
    unsent, saves_first = list[Row](), False
    if found := shared_reading.load_newest(writer.store, workers):
        writer.committed, snapshot = found
        require_same_sets(config, dataset, facts, snapshot.facts)
        state.restore(snapshot)
        saves_first = _record_changes(config, dataset, state, snapshot.facts)
        log.resume(snapshot.facts["bands"], snapshot.facts.get("core_seconds", 0.0))
        guard.resume(snapshot.facts["guard"])
        unsent = [Row(**row) for row in snapshot.facts["unsent_rows"]]
    elif source := settings.get("init_from"):
        initial_weights.load_initial_weights(state, InitialWeights(**source), config.training)
        state.facts["init_from"] = source
    writer.store.lease = workers.gather(writer.store.lease)[0]  # all write checkpoints under it
    sink = _tracker(config, settings, unsent, writer.store.check_lease) if workers.is_main else None
    outputs = training_outputs(config, settings, dataset, codec, state, workers, sink)
    left = partial(evaluate_on_workers, state, outputs, workers, writer, settings["folder"])
    trace = StepTrace(config.training.profile_steps, sink, workers.device)
    return Run(
        plan=training_run.plan(config, workers.count),
        state=state,
        network=wrapping.wrapped(state, config.training, workers, use.clock if use else None),
        objective=training_run.training_objective(config, state, workers.device),
        guard=guard,
        stream=training_run.stream_with_inputs(config, dataset, workers, state.facts),
        workers=workers,
        log=log,
        checkpoints=writer,
        sink=sink,
        show_progress=show_progress,
        draw_grid=outputs.draw_grid,
        draw_strip=outputs.draw_strip,
        evaluate=outputs.evaluate,
        validate=outputs.validate,
        snapshot_ema=training_run.ema_snapshotter(
            config, state, writer, settings["folder"], workers
        ),
        traced=trace.step,
        end_trace=trace.close,
        saves_first=saves_first,
        spare=spare_evaluations(config, settings, state, workers, writer, sink),
        evaluate_outstanding=left,
    )


def _record_changes(
    config: RunConfig, dataset: Dataset, state: TrainingState, facts: dict[str, Any]
) -> bool:
    """Carry over the history in the checkpoint's `facts`, add the changes of `config`, report any.

    The workers do this, not the driver: if a checkpoint is damaged, they continue from an older one
    than the driver saw.
    """
    state.facts |= run_config.run_history(facts)
    made = run_config.run_changes(config, facts, dataset.manifest.diffused_shape)
    if made:
        state.facts["changes"] = made
    return len(made) > len(facts.get("changes", []))


def _tracker(
    config: RunConfig, settings: dict[str, Any], unsent: list[Row], check: Callable[[], None]
) -> Tracker:
    """Build the MLflow logger of rows and images; `check` raises once the lease is lost."""
    return Tracker(
        partial(_tracked_run, settings),
        config.tracking.flush_every_s,
        unsent,
        config.tracking.every_steps,
        config.training.steps,
        check,
    )


def _tracked_run(settings: dict[str, Any]) -> TrackedRun:
    """MLflow run that the driver opened; open it now if MLflow did not answer then."""
    if settings["tracked"] is not None:
        return TrackedRun(**settings["tracked"])
    from ddpm_ray.tracking import mlflow_runs  # takes 1 s to import, here in the logger's thread

    return mlflow_runs.open_run(RunMetadata(**settings["metadata"]))


def _writer(config: RunConfig, settings: dict[str, Any], workers: Workers) -> CheckpointWriter:
    """Build the checkpoint writer; the main worker acquires the lease from earlier starts."""
    checkpoints = object_store.join(settings["folder"], CHECKPOINTS)
    fault_injection.at("restore")
    training = config.training
    store = CheckpointStore(
        checkpoints,
        training.keep_checkpoints,
        planned_every=training.checkpoint_every_steps,
        milestone_every=training.keep_every_steps,
    )
    if workers.is_main:
        store.acquire_lease(Lease(**settings["lease"]).renewed())
    return CheckpointWriter(store)
