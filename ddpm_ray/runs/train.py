"""Driver of one training run: check the config, claim the run, run the workers, report."""

import contextlib
import dataclasses
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ddpm_ray.config.loading import flat, to_dict, to_yaml
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.distributed import worker_group
from ddpm_ray.redaction import counted
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.absolute_paths import with_absolute_paths
from ddpm_ray.runs.run_description import (
    own_command,
    run_description,
    score_tags,
    with_picture,
)
from ddpm_ray.runs.run_start import RunStart, begin_run, settled_run
from ddpm_ray.runs.run_tags import history_tags, run_tags
from ddpm_ray.runs.run_text_model import RunTexts, run_texts
from ddpm_ray.runs.train_worker import train_worker
from ddpm_ray.runs.training_data import checked_data
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.tracking import mlflow_runs, model_registry
from ddpm_ray.tracking.run_info import RunMetadata, TrackedRun
from ddpm_ray.tracking.run_log import RunLog, image_path
from ddpm_ray.tracking.tracking_uri import artifact_root, warn_of_another_host
from ddpm_ray.training import determinism
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.reconstruction_grids import RECONSTRUCTIONS
from ddpm_ray.training.sample_grids import picture_url
from ddpm_ray.training.writer_lease import Lease

log = logging.getLogger(__name__)

# MLflow shows a run's parameters above its images, so more than these push the images out of sight.
# The whole config is the artifact config.yaml.
PARAMS = (
    "schedule.kind",
    "schedule.num_steps",
    "training.global_batch_size",
    "training.learning_rate",
)
AUTOENCODER_PARAMS = (
    "autoencoder.latent_channels",
    "autoencoder.channel_mults",
    "autoencoder.base_channels",
    "autoencoder.kl_weight",
    *PARAMS[-2:],
)
CONTRASTIVE_PARAMS = (
    "contrastive.loss",
    "contrastive.width",
    "contrastive.base_channels",
    "text.width",
    *PARAMS[-2:],
)
PRIOR_PARAMS = ("prior.width", "prior.depth", *PARAMS)
WIDTH = {"unet": "model.base_channels", "dit": "model.hidden_size"}  # one more, by network


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a training run, finished or stopped."""

    finished: bool
    report: dict[str, Any]  # plain JSON; URLs of checkpoint, images and run page
    ended: dict[str, Any]  # rank 0's report: see train_worker.train_worker


@dataclasses.dataclass(frozen=True)
class ParentSweep:
    """The sweep of which a run is a trial, for MLflow."""

    run_id: str  # MLflow run of the sweep
    label: str  # name of the trial
    values: dict[str, Any]  # values of the searched options, by dotted key


def run_training(
    config: RunConfig,
    home: Path,
    on_progress: Callable[[Progress], bool | None],
    parent: ParentSweep | None = None,
    on_start: Callable[[int, str], None] = lambda *_: None,
) -> Outcome:
    """Train or continue the run `config.name`. Relative paths are relative to `home`.

    `on_progress` and `on_start`: see `worker_group.run`. Raises ConfigError, before Ray starts, if
    the config does not fit the data or the existing run of that name; later RunFailedError,
    StorageError, DatasetError, CheckpointError or TrackingError.
    """
    config = with_absolute_paths(config, home)
    warn_of_another_host(config.tracking.uri)
    dataset, checked = checked_data(config)
    folder = object_store.join(config.storage, config.name)
    config, encoder = settled_run(config, dataset, folder)
    texts = run_texts(config, dataset, folder)
    of_data = {**encoder, **texts.settings, **checked}
    start = begin_run(config, dataset, folder, texts.tokenizer, encoder, texts.model)
    describe = _describer(config, dataset, folder, texts, parent)
    metadata = _metadata(config, dataset, start, parent, describe({}))
    tracked, lease = _tracked(metadata), None
    try:
        lease = _lease(folder)
        settings = {
            "config": to_dict(config),
            "folder": folder,
            "identity": start.identity,
            "init_from": vars(start.initial_weights) if start.initial_weights else None,
            **of_data,
            "lease": vars(lease),
            "metadata": vars(metadata),
            "tracked": vars(tracked) if tracked else None,
            "environment": determinism.environment(config.training.deterministic),
        }
        more = on_progress, on_start, config.worker_counts, config.spare_processes
        ended = worker_group.run(train_worker, settings, config.cluster, *more)
        finished = ended["finished"]
        if finished and (count := ended["undelivered"]):
            raise mlflow_runs.TrackingOutageError(
                config.tracking.uri,
                f"{counted(count, 'metric row')} undelivered; stored in the checkpoint",
                "run the same command once MLflow answers: it sends them and finishes the run",
            )
        tracked = tracked or mlflow_runs.open_run(metadata)
        if finished and (config.traits.draws_images or config.traits.draws_embeddings):
            model_registry.log_model(tracked, ended["checkpoint"], "ddpm_ray.tracking.pyfunc_model")
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        with contextlib.suppress(mlflow_runs.TrackingError):  # `error` matters more
            if not _is_taken_over(lease):
                mlflow_runs.finish(tracked or mlflow_runs.known_run(metadata), status, str(error))
        raise
    if not _is_taken_over(lease):
        final = _final_description(config, tracked, describe(ended["scores"]))
        status, tags = "FINISHED" if finished else "KILLED", score_tags(config, ended["scores"])
        mlflow_runs.finish(tracked, status, description=final, tags=tags)
    return Outcome(finished, _report(config, folder, tracked, ended), ended)


def _describer(
    config: RunConfig,
    dataset: Dataset,
    folder: str,
    texts: RunTexts,
    parent: ParentSweep | None,
) -> Callable[[Mapping[str, Any]], str]:
    """The description of the run as a function of its scores."""
    own = "" if parent else own_command()
    described = partial(run_description, config, dataset, folder, texts.tokenizer, own)
    return partial(described, text_model=texts.model)


def _metadata(
    config: RunConfig,
    dataset: Dataset,
    start: RunStart,
    parent: ParentSweep | None,
    description: str,
) -> RunMetadata:
    shown: tuple[str, ...] = *PARAMS, WIDTH[config.model.network]
    if config.traits.reconstructs:
        shown = AUTOENCODER_PARAMS
    if config.traits.embeds:
        shown = CONTRASTIVE_PARAMS
    if config.traits.draws_embeddings:
        shown = PRIOR_PARAMS
    return RunMetadata(
        config.tracking.uri,
        config.tracking.experiment,
        parent.label if parent else config.name,
        start.identity,
        artifact_root(config.tracking.uri),
        parent.run_id if parent else "",
        params={key: flat(config)[key] for key in shown} | (parent.values if parent else {}),
        tags=run_tags(dataset) | history_tags(start.history),
        config_yaml=to_yaml(config),
        dataset_url=config.data.url,
        dataset_fingerprint=dataset.fingerprint,
        owner=uuid.uuid4().hex,
        description=description,
        begun_step=start.step,
    )


def _final_description(config: RunConfig, tracked: TrackedRun, text: str) -> str:
    """The description `text` with the run's newest picture."""
    if (key := _picture_key(config)) and RunLog(tracked).has_image(key):
        text = with_picture(text, key, tracked.run_id, image_path(tracked, key))
    return text


def _picture_key(config: RunConfig) -> str:
    """Key of the pictures of a training run in MLflow; empty if its task has none."""
    if config.traits.reconstructs:
        return RECONSTRUCTIONS
    return "samples" if config.traits.draws_images else ""


def _tracked(metadata: RunMetadata) -> TrackedRun | None:
    """Open the run in MLflow; None, with a warning, if the server does not answer now."""
    try:
        found = mlflow_runs.open_run(metadata)
    except mlflow_runs.TrackingOutageError as error:
        log.warning(
            "%s. Training continues; metric rows are kept and sent once MLflow answers", error
        )
        return None
    log.info("MLflow run %s", found.run_id)
    return found


def _lease(folder: str) -> Lease:
    """Take the run's lease for this driver; its workers renew it."""
    checkpoints = object_store.join(folder, CHECKPOINTS)
    return Lease.first(checkpoints, CheckpointStore(checkpoints).pointer().epoch)


def _is_taken_over(lease: Lease | None) -> bool:
    """Whether another job has taken over the run, and with it the MLflow run; logs a warning.

    This driver may have been frozen or cut off while the other one finished.
    """
    other = ""
    if lease is not None:
        with contextlib.suppress(StorageError):  # then this driver reports to MLflow
            other = lease.other_owner()
            if other:
                log.warning("%s has taken over this run; its MLflow run is not changed", other)
    return bool(other)


def _report(
    config: RunConfig, folder: str, tracked: TrackedRun, ended: dict[str, Any]
) -> dict[str, Any]:
    folder, step = object_store.join(folder, "pictures"), ended["step"]
    key = _picture_key(config) if config.training.grid_every_steps > 0 else ""
    draws = config.traits.draws_images and bool(key)
    return {
        "name": config.name,
        "run_id": tracked.run_id,
        "step": step,
        "steps": config.training.steps,
        "core_seconds": round(ended["core_seconds"], 3),
        "checkpoint": ended["checkpoint"],
        "samples": picture_url(folder, key, step) if key else None,
        "denoising": picture_url(folder, "denoising", step) if draws else None,
        "metrics": ended["scores"].get("metrics", {}),
        "tracking_uri": tracked.uri,
        "page": tracked.page,
    }
