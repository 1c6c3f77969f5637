"""MLflow runs of training runs and sweeps: opened, described, published, closed.

All of it may be repeated: a restarted job leaves one run with each parameter, tag and file once.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import (
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from PIL import Image

from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.errors import (
    TrackingError,
    TrackingOutageError,
    TrackingServerError,
    answering,
)
from ddpm_ray.tracking.mlflow_client import BoundedClient
from ddpm_ray.tracking.run_info import RunMetadata, TrackedRun
from ddpm_ray.tracking.run_log import RunLog
from ddpm_ray.tracking.run_lookup import OWNER_TAG, RUN_TAG, find_or_create_run, runs_of
from ddpm_ray.tracking.run_note import with_block, without_former_note
from ddpm_ray.tracking.tracking_uri import database_file

__all__ = ["TrackingError", "TrackingOutageError", "TrackingServerError", "answering"]

log = logging.getLogger(__name__)

MAX_PARAMS, MAX_TAG = 100, 5000  # limits of the server: parameters in one call, letters of a tag


def open_run(metadata: RunMetadata) -> TrackedRun:
    """Find or create the MLflow run of `metadata`, log its description, set it to RUNNING.

    Raises TrackingError.
    """
    run = find_or_create_run(
        metadata.uri,
        metadata.experiment,
        metadata.name,
        metadata.identity,
        metadata.artifacts,
        metadata.parent,
        metadata.owner,
    )
    if run.is_new and metadata.begun_step:
        log.warning(
            "%s: the MLflow run of this training run, which is at step %d, does not exist; created "
            "a new one, %s, without the metrics up to that step",
            run.uri,
            metadata.begun_step,
            run.run_id,
        )
    describe(
        run,
        params=metadata.params,
        tags=metadata.tags,
        config_yaml=metadata.config_yaml,
        dataset_url=metadata.dataset_url,
        dataset_fingerprint=metadata.dataset_fingerprint,
        description=metadata.description,
    )
    return run


def known_run(metadata: RunMetadata) -> TrackedRun:
    """Return the MLflow run of `metadata` unchanged; open it if it does not exist.

    For a driver that could not reach MLflow at its start: since then its workers, or another
    driver, may have opened the run. Raises TrackingError.
    """
    with answering(metadata.uri):
        hits = runs_of(BoundedClient(metadata.uri), metadata.identity, metadata.experiment)
    if not hits:
        return open_run(metadata)
    info = min(hits, key=lambda hit: str(hit.info.run_id)).info
    return TrackedRun(
        metadata.uri, info.run_id, info.experiment_id, info.start_time, metadata.owner
    )


def describe(
    run: TrackedRun,
    *,
    params: dict[str, Any],
    tags: dict[str, str],
    config_yaml: str,
    dataset_url: str,
    dataset_fingerprint: str,
    description: str = "",
) -> None:
    """Log the run's new parameters, tags, config file, data set and description."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        known = client.get_run(run.run_id)
        new = [Param(k, str(v)) for k, v in params.items() if k not in known.data.params]
        for start in range(0, len(new), MAX_PARAMS):
            client.log_batch(run.run_id, params=new[start : start + MAX_PARAMS])
        tags = tags | {MLFLOW_RUN_NOTE: _note(known, description=description, end="")}
        client.log_batch(run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.log_text(run.run_id, config_yaml, "config.yaml")
        if not (known.inputs and known.inputs.dataset_inputs):
            with warnings.catch_warnings():  # MLflow warns where two kinds of source match a path
                warnings.simplefilter("ignore", UserWarning)
                source = resolve_dataset_source(dataset_url)
            dataset = MetaDataset(
                source,
                name=object_store.name_of(dataset_url),
                digest=dataset_fingerprint[:36],  # the database's column is 36 wide
            )
            training = InputTag("mlflow.data.context", "training")
            entity = DatasetInput(dataset._to_mlflow_entity(), tags=[training])
            try:
                client.log_inputs(run.run_id, [entity])
            except MlflowException:  # another driver may have logged it just now
                if not client.get_run(run.run_id).inputs.dataset_inputs:
                    raise


def finish(
    run: TrackedRun,
    status: str,
    reason: str = "",
    *,
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> None:
    """Close the run as FINISHED, FAILED or KILLED.

    `reason` becomes a tag and the first lines of its description, `description` the rest; empty:
    as it was. Does nothing if another driver has opened the run since: that driver ends it.
    """
    with answering(run.uri):
        file = database_file(run.uri)
        if file is not None and not file.exists():  # SQLite would go on writing to it
            remedy = "restore it, or run the same command again, for a run without those metrics"
            raise TrackingError(run.uri, "the database was deleted during the run", remedy)
        client = BoundedClient(run.uri)
        known = client.get_run(run.run_id)
        owner = known.data.tags.get(OWNER_TAG, "")
        if run.owner and owner != run.owner:
            log.warning("MLflow run %s: another driver has taken it over; left open", run.run_id)
            return
        new, text = dict(tags or {}), sanitize(reason)[:MAX_TAG]
        if reason:
            new["reason"] = text
        if reason or description:
            end = f"**{status.capitalize()}**: {text}" if reason else ""
            new[MLFLOW_RUN_NOTE] = _note(known, description=description, end=end)
        client.log_batch(run.run_id, tags=[RunTag(key, value) for key, value in new.items()])
        client.set_terminated(run.run_id, status)


def _note(run: Run, *, description: str, end: str) -> str:
    """Return the run's description with new blocks; an empty `description` leaves it as it is."""
    tags = run.data.tags
    note = without_former_note(tags.get(MLFLOW_RUN_NOTE, ""), tags.get("reason", ""))
    if description:
        note = with_block(note, "description", description)
    return with_block(note, "end", end)


def history(run_id: str, uri: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of each row of `key`, by step. Raises TrackingError."""
    with answering(uri):
        rows = BoundedClient(uri).get_metric_history(run_id, key)
        return sorted((row.step, row.value) for row in rows)


def log_ended(
    parent: TrackedRun, name: str, identity: str, params: dict[str, Any], status: str, reason: str
) -> str:
    """Log a trial that ended without a training run, below `parent`; returns its run id."""
    with answering(parent.uri):
        client = BoundedClient(parent.uri)
        query = f"tags.`{RUN_TAG}` = '{identity}'"
        hits = client.search_runs([parent.experiment_id], query, max_results=1)
        tags = {RUN_TAG: identity, MLFLOW_PARENT_RUN_ID: parent.run_id}
        run = hits[0] if hits else client.create_run(parent.experiment_id, None, tags, name)
        if not hits:
            shown = [Param(key, str(value)) for key, value in params.items()]
            client.log_batch(run.info.run_id, params=shown[:MAX_PARAMS])
    finish(TrackedRun(parent.uri, run.info.run_id, parent.experiment_id, 0), status, reason)
    return str(run.info.run_id)


def publish(
    run: TrackedRun,
    *,
    pictures: Mapping[str, Image.Image],
    texts: Mapping[str, str],
    metrics: Mapping[str, float],
    step: int,
    description: str,
) -> None:
    """Log pictures and texts, replacing earlier ones, metrics at `step`, and the description."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        for key, picture in pictures.items():
            RunLog(run).image(key, 0, picture)
        for path, text in texts.items():
            client.log_text(run.run_id, text, path)
        rows = [Metric(key, value, run.start_ms + step, step) for key, value in metrics.items()]
        note = _note(client.get_run(run.run_id), description=description, end="")
        client.log_batch(run.run_id, rows, tags=[RunTag(MLFLOW_RUN_NOTE, note)])
