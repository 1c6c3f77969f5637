"""The driver of a sweep: checks it, restores its state, runs trials on Ray Tune, reports results.

Tune starts the trials' drivers and passes on their reports. What runs next is decided by
sweep/trial_scheduler.py, whose state survives a crash. Tune's own snapshots are not used: they are
taken every ten seconds, and restart running trials from their first step.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from ddpm_ray.assembly import data_order, diffusion
from ddpm_ray.assembly.run_config import comparable
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import flat, from_dict, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.schedule_diagnostics import ScheduleDiagnostics, diagnose_schedule
from ddpm_ray.distributed import connection
from ddpm_ray.distributed.failures import RunFailedError
from ddpm_ray.distributed.placement_groups import HEAD
from ddpm_ray.distributed.signals import Interrupts
from ddpm_ray.redaction import counted
from ddpm_ray.runs.absolute_paths import with_absolute_paths
from ddpm_ray.runs.run_identity import claim, stored_identity
from ddpm_ray.runs.training_data import check_model
from ddpm_ray.storage import object_store
from ddpm_ray.sweep import capacity
from ddpm_ray.sweep.mlflow_report import SweepRun
from ddpm_ray.sweep.trial import StopSignals, run_trial
from ddpm_ray.sweep.trial_data import SweepData
from ddpm_ray.sweep.trial_scheduler import TrialScheduler
from ddpm_ray.sweep.trial_store import Trial, TrialStore
from ddpm_ray.sweep.tune_searcher import TuneSearcher

log = logging.getLogger(__name__)

POLL_S = 0.5
PUBLISH_EVERY_S = 60.0  # while trials run; drawing all pictures takes seconds
# Keys that may change when a sweep is continued: resources, tracking, number of trials.
FREE = (
    "trials_at_once",
    "max_starts",
    "register_as",
    "run_from",
    "search.trials",
    "run.name",
    "run.cluster.",
    "run.tracking.",
    "run.storage",
    "run.data.url",
    "run.data.cache",
    "run.evaluation.weights",
)
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # no snapshots of all trials
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
TRIAL_DRIVER = {HEAD: 0.001}  # no CPU: on a machine of two it would leave too few for its workers


@dataclass(frozen=True)
class SweepOutcome:
    """Result of a sweep, or its state when it was interrupted."""

    finished: bool
    trials: list[Trial]
    report: dict[str, Any]  # plain JSON


def run_sweep(
    config: SweepConfig,
    home: Path,
    show: Callable[[int, int, str], None],
    trial: Callable[..., None] = run_trial,
) -> SweepOutcome:
    """Run, or continue, the sweep `config.name`; relative paths are below `home`.

    `show(trials ended, trials in all, note)` is called with the progress; `trial` is what Tune
    runs. At the first Ctrl-C trials commit a checkpoint and end; the same command continues them.
    Raises ConfigError before a trial starts, RunFailedError, StorageError, DatasetError,
    TrackingError.
    """
    data = SweepData(config, home)
    dataset = data.first
    config = replace(config, run=with_absolute_paths(config.run, home))
    if not data.fingerprints:  # else trials may differ in what fits their data
        check_model(config.run, dataset)
    folder = object_store.join(config.run.storage, config.name)
    begun = _begun_run(folder)
    identity = _claimed(config, data, folder)
    cluster = config.run.cluster
    processes = (cluster.num_workers + config.run.spare_processes) * max(1, config.trials_at_once)
    connection.connect(
        cluster.address, processes * cluster.cpus_per_worker, processes * cluster.gpus_per_worker
    )
    at_once = capacity.trials_at_once(cluster, config.trials_at_once, config.run.spare_processes)
    sweep_run = SweepRun.find_or_create(config, folder, identity, dataset)
    log.info(
        "MLflow run %s of the sweep; %s at once", sweep_run.run.run_id, counted(at_once, "trial")
    )
    stop_signals, store = StopSignals(), TrialStore(folder)
    diagnose = partial(schedule_diagnostics, data)
    scheduler = TrialScheduler(config, store, diagnose, stop_signals.set)

    def assignment(of: Trial) -> dict[str, Any]:
        """Return the arguments of that trial's driver."""
        run = data.trial_run(of.values, of.name)
        run = replace(run, name=of.name, storage=sweep_run.runs)
        run = data_order.continued(run, begun) if begun else run
        facts = {"number": of.number, "label": of.title, "values": of.values}
        facts["earlier_core_s"] = data.of(run).core_s or 0.0
        return facts | {"config": to_dict(run)}

    searcher = TuneSearcher(scheduler, assignment, at_once)
    function = tune.with_parameters(
        trial, stop_signals=stop_signals, sweep_run_id=sweep_run.run.run_id
    )
    began = time.monotonic()
    object_store.set_retry_timeout(cluster.storage_timeout_s)
    try:
        _watch(lambda: _run_tune(function, searcher), scheduler, stop_signals, sweep_run, show)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        sweep_run.finish(status, str(error))
        raise
    finished = not scheduler.closing
    wall_s = time.monotonic() - began
    report = sweep_run.conclude(store, finished, wall_s * at_once * cluster.num_workers)
    return SweepOutcome(finished, store.trials, report)


def _watch(
    run: Callable[[], None],
    scheduler: TrialScheduler,
    stop_signals: StopSignals,
    sweep_run: SweepRun,
    show: Callable[[int, int, str], None],
) -> None:
    """Call `run` in a thread and wait for it; raises what it raises.

    This thread handles Ctrl-C, which Tune would handle itself if it ran here, and reports the
    progress to MLflow and the terminal.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        """Call `run`; keep its error for the main thread."""
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            errors.append(error)

    thread = threading.Thread(target=guarded, name="tune", daemon=True)
    published_at, published = time.monotonic(), -1
    with Interrupts() as interrupts:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if interrupts.count and not scheduler.closing:
                log.info("stopping: running trials commit a checkpoint ...")
                scheduler.closing = True
                stop_signals.set_all()
            ended = len(scheduler.ended)
            show(ended, scheduler.total, f"{len(scheduler.active)} running")
            sweep_run.close_trials(scheduler.store)
            if ended != published and time.monotonic() - published_at > PUBLISH_EVERY_S:
                sweep_run.publish(scheduler.store)
                published_at, published = time.monotonic(), ended
    if errors:
        own: BaseException | None = errors[0]
        while own is not None and not type(own).__module__.startswith("ddpm_ray"):
            own = own.__context__  # Tune wraps its searcher's errors in the text of a traceback
        if own is not None:
            raise own
        reason = " ".join(str(errors[0]).split()) or type(errors[0]).__name__
        raise RunFailedError(f"Ray Tune failed: {reason}") from errors[0]


def _run_tune(function: Any, searcher: TuneSearcher) -> None:
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # It warns that result files, which nobody reads, are missing.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(function, TRIAL_DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,  # as many as the searcher suggests
                reuse_actors=True,  # a new driver process costs 3 s of imports
                trial_dirname_creator=lambda one: str(one.trial_id),  # not the whole config
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=scratch, verbose=0),
        ).fit()


def schedule_diagnostics(data: SweepData, values: dict[str, Any]) -> ScheduleDiagnostics | None:
    """Return the diagnostics of these values' schedule; None for a task without noise.

    Raises ConfigError for an invalid run.
    """
    run = data.trial_run(values, "trial")
    dataset = data.of(run).dataset
    check_model(run, dataset)
    if not run.traits.has_noise:
        return None
    schedule = diffusion.noise_schedule(run.schedule)
    manifest = dataset.manifest
    squares = codec_of(manifest).mean_square(manifest.pixel_mean, manifest.pixel_std)
    shape = manifest.diffused_shape
    return diagnose_schedule(schedule, squares, shape.height * shape.width)


def _claimed(config: SweepConfig, data: SweepData, folder: str) -> str:
    """Return the identity of the sweep in `folder`. Raises ConfigError if another one is there."""
    first, sets = data.first, data.fingerprints
    begins_with = {
        "sweep": to_dict(config),
        "data_fingerprint": first.fingerprint,
        "data_fingerprints": sets,
    }
    return claim(
        folder,
        begins_with,
        lambda begun: [
            *_changed_keys(config, begun, first.manifest.diffused_shape),
            *_changed_data(sets, begun.get("data_fingerprints", {})),
        ],
    )


def _begun_run(folder: str) -> RunConfig | None:
    """Return the run's options that the sweep in `folder` was started with; None for a new one."""
    begun = stored_identity(folder)
    if "sweep" not in begun:
        return None
    return from_dict(SweepConfig, begun["sweep"], begun.get("version", ""), folder).run


def _changed_keys(config: SweepConfig, begun: dict[str, Any], image_shape: ImageShape) -> list[str]:
    """Return one line for each key that may not change in a sweep and did."""
    if "sweep" not in begun:
        return [f"name is {config.name!r}, and a training run has that name"]
    saved_by, where = begun.get("version", ""), begun.get("folder", "")
    saved = from_dict(SweepConfig, begun["sweep"], saved_by, where)
    runs = (
        data_order.continued(config.run, saved.run),
        data_order.continued(saved.run, config.run),
    )
    now, then = (
        flat(replace(one, run=comparable(run, image_shape)))
        for one, run in zip((config, saved), runs, strict=True)
    )
    return [
        f"{key} is {now[key]}, but the sweep was started with {then[key]}"
        for key in now
        if not key.startswith(FREE) and now[key] != then[key]
    ]


def _changed_data(now: dict[str, str], then: dict[str, str]) -> list[str]:
    """Return one line for each data set that is another one than when the sweep was started."""
    return [
        f"{url} holds data set {now[url][:12]}, but the sweep was started with {then[url][:12]}"
        for url in now
        if url in then and now[url] != then[url]
    ]
