"""A sweep seen from its driver: check, find where it stands, run trials on Ray Tune, tell.

Tune starts the trials' drivers and carries their reports; what is to be done stands in the book
(sweep/trial_scheduler.py), which outlives any crash. Tune's own snapshots are not used: they are
taken every ten seconds, and start trials that were at work from their beginning.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from ddpm_ray.assembly import diffusion
from ddpm_ray.config.loading import flat, from_dict, to_dict, with_values
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sweep import SweepConfig
from ddpm_ray.data.shards import Dataset
from ddpm_ray.data.transforms import mean_square
from ddpm_ray.diffusion.schedule_diagnostics import Appraisal, appraise
from ddpm_ray.distributed import worker_group
from ddpm_ray.distributed.placement_groups import HEAD
from ddpm_ray.distributed.signals import Interrupts
from ddpm_ray.distributed.worker_group import RunFailedError
from ddpm_ray.redaction import counted
from ddpm_ray.runs.run_identity import claim
from ddpm_ray.runs.train import check_model, open_or_pack, with_absolute_paths
from ddpm_ray.storage import object_store
from ddpm_ray.sweep import capacity
from ddpm_ray.sweep.mlflow_report import SweepPlace
from ddpm_ray.sweep.trial import Board, run_trial
from ddpm_ray.sweep.trial_scheduler import Book
from ddpm_ray.sweep.trial_store import Ledger, Trial
from ddpm_ray.sweep.tune_searcher import Candidates

log = logging.getLogger(__name__)

POLL_S = 0.5
PUBLISH_EVERY_S = 60.0  # while trials run; to draw all pictures takes seconds
# What may change when a sweep is continued: who computes it, where it is shown, how long it is.
FREE = (
    "trials_at_once", "max_starts", "register_as", "run_from", "search.trials", "run.name",
    "run.cluster.", "run.tracking.", "run.storage", "run.data.url", "run.data.cache",
    "run.evaluation.weights",
)  # fmt: skip
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",  # its snapshots of all trials are not used
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
TRIAL_DRIVER = {HEAD: 0.001}  # no CPU: one that took a CPU of two would wait for its workers' place


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep leaves behind, or how far it came."""

    finished: bool
    trials: list[Trial]
    report: dict[str, Any]  # plain JSON


def sweep(
    config: SweepConfig,
    home: Path,
    show: Callable[[int, int, str], None],
    trial: Callable[..., None] = run_trial,
) -> SweepOutcome:
    """Run, or continue, the sweep `config.name`; relative places lie below `home`.

    `show(trials that are over, trials in all, note)` sees its progress; `trial` is what Tune runs.
    The first Ctrl-C lets trials commit a checkpoint, and the same command continues. Raises
    ConfigError before a trial starts, RunFailedError, StorageError, DatasetError, TrackingError.
    """
    config = replace(config, run=with_absolute_paths(config.run, home))
    dataset = open_or_pack(config.run)
    check_model(config.run, dataset)
    folder = object_store.join(config.run.storage, config.name)
    identity = claim(
        folder,
        {"sweep": to_dict(config), "data_fingerprint": dataset.fingerprint},
        lambda begun: _differing(config, begun),
    )
    cluster = config.run.cluster
    workers = cluster.num_workers * max(1, config.trials_at_once)
    worker_group.connect(cluster.address, workers * cluster.cpus_per_worker,
                  workers * cluster.gpus_per_worker)  # fmt: skip
    at_once = capacity.trials_at_once(cluster, config.trials_at_once)
    place = SweepPlace.find_or_create(config, folder, identity, dataset)
    log.info("MLflow run %s of the sweep; %s at once", place.run.run_id, counted(at_once, "trial"))
    board, ledger = Board(), Ledger(folder)
    book = Book(config, ledger, lambda values: worth(config, values, dataset), board.stop)

    def brief(of: Trial) -> dict[str, Any]:
        """What the driver of that trial is told."""
        run = _run_config(config, of.values, of.name)
        run = replace(run, name=of.name, storage=place.runs)
        label = f"{of.name} {of.label}"
        return {"number": of.number, "label": label, "values": of.values, "config": to_dict(run)}

    candidates = Candidates(book, brief, at_once)
    function = tune.with_parameters(trial, board=board, sweep_run_id=place.run.run_id)
    began = time.monotonic()
    object_store.set_retry_timeout(cluster.storage_timeout_s)
    try:
        _watch(lambda: _run_tune(function, candidates), book, board, place, show)
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        place.finish(status, str(error))
        raise
    finished = not book.closing
    wall_s = time.monotonic() - began
    report = place.conclude(ledger, finished, wall_s * at_once * cluster.num_workers)
    return SweepOutcome(finished, ledger.trials, report)


def _watch(
    run: Callable[[], None],
    book: Book,
    board: Board,
    place: SweepPlace,
    show: Callable[[int, int, str], None],
) -> None:
    """Return once `run`, in a thread of its own, has; raises what it raised.

    Meanwhile this thread hears Ctrl-C, which in the main thread Tune would take for itself, and
    tells MLflow and the terminal how far things are.
    """
    errors: list[BaseException] = []

    def guarded() -> None:
        """`run`; what it raises waits for the main thread."""
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            errors.append(error)

    thread = threading.Thread(target=guarded, name="tune", daemon=True)
    published, told = time.monotonic(), -1
    with Interrupts() as interrupts:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_S)
            if interrupts.count and not book.closing:
                log.info("stopping: trials at work commit a checkpoint ...")
                book.closing = True
                board.close()
            ended = len(book.ended)
            show(ended, book.total, f"{len(book.active)} at work")
            place.close_trials(book.ledger)
            if ended != told and time.monotonic() - published > PUBLISH_EVERY_S:
                place.publish(book.ledger)
                published, told = time.monotonic(), ended
    if errors:
        own: BaseException | None = errors[0]
        while own is not None and not type(own).__module__.startswith("ddpm_ray"):
            own = own.__context__  # Tune wraps what its searcher raises in a traceback's text
        if own is not None:
            raise own
        reason = " ".join(str(errors[0]).split()) or type(errors[0]).__name__
        raise RunFailedError(f"Ray Tune failed: {reason}") from errors[0]


def _run_tune(function: Any, candidates: Candidates) -> None:
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # It misses the result files that nobody reads.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="ddpm-ray-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(function, TRIAL_DRIVER),
            tune_config=tune.TuneConfig(
                search_alg=candidates,
                num_samples=-1,  # as many as the candidates give
                reuse_actors=True,  # a trial's driver is 3 s of imports away from the next one's
                trial_dirname_creator=lambda one: str(one.trial_id),  # not its whole config
            ),
            run_config=tune.RunConfig(name="sweep", storage_path=scratch, verbose=0),
        ).fit()


def worth(config: SweepConfig, values: dict[str, Any], dataset: Dataset) -> Appraisal:
    """What the schedule of these values is worth; raises ConfigError where no run can have them."""
    run = _run_config(config, values, "trial")
    check_model(run, dataset)
    schedule = diffusion.noise_schedule(run.schedule)
    manifest = dataset.manifest
    height, width, _ = manifest.image_shape
    squares = mean_square(manifest.pixel_mean, manifest.pixel_std)
    return appraise(schedule, squares, height * width)


def _run_config(config: SweepConfig, values: dict[str, Any], where: str) -> RunConfig:
    """The run that a trial with these values is, but for its name and place."""
    run = replace(config.run, name=config.run.name or where)
    probed = {"evaluation.spectrum_every_steps": config.stopping.every_steps, "data.source": ""}
    return with_values(run, values | probed, where)


def _differing(config: SweepConfig, begun: dict[str, Any]) -> list[str]:
    """One line for each key that a sweep keeps for life and whose value is not the one it has."""
    if "sweep" not in begun:
        return [f"name is {config.name!r}, and a training run of that name is there"]
    saved_by, where = begun.get("version", ""), begun.get("folder", "")
    now, then = flat(config), flat(from_dict(SweepConfig, begun["sweep"], saved_by, where))
    return [
        f"{key} is {now[key]}, but the sweep began with {then[key]}"
        for key in now
        if not key.startswith(FREE) and now[key] != then[key]
    ]
