"""MLflow runs: one per training run, each metric row stored once, never on the step path.

MLflow's key of a metric row includes its time stamp and value. Time stamps here are a function of
(run start, step), so a step that is replayed after a crash writes the row that is already stored.
Rates depend on the clock and would differ: the first value is kept, later ones are dropped.
"""

import logging
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import (
    DatasetInput,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from PIL import Image

from ddpm_ray.redaction import sanitize
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.errors import (
    TrackingError,
    TrackingOutageError,
    TrackingServerError,
    answering,
    restore,
)
from ddpm_ray.tracking.mlflow_client import FILE_S, BoundedClient
from ddpm_ray.tracking.run_info import MetricRow, RunMetadata, TrackedRun
from ddpm_ray.tracking.tracking_uri import database_file

__all__ = ["TrackingError", "TrackingOutageError", "TrackingServerError", "answering"]

log = logging.getLogger(__name__)

RUN_TAG = "ddpm_ray.run"  # identity of the run's folder, by which a restarted job finds its run
OWNER_TAG = "ddpm_ray.driver"  # driver that opened the run last: it alone may end the run
TWIN_TAG = "ddpm_ray.twin_of"  # marks a duplicate, created after a lost answer and then deleted
MAX_PARAMS, MAX_TAG = 100, 5000  # limits of the server: parameters in one call, letters of a tag
MAX_EXPERIMENTS = 500  # experiments searched in one call


class RunLog:
    """Idempotent writer of one run's rows, pictures and documents. Raises TrackingError."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        with answering(run.uri):
            self._client = BoundedClient(run.uri)
            self._files = BoundedClient(run.uri, FILE_S)

    def newest_steps(self) -> dict[str, int]:
        """Return the newest stored step of each metric, in one call."""
        with answering(self._run.uri):
            found: Run = self._client.get_run(self._run.run_id)
            return {metric.key: int(metric.step) for metric in found.data.to_proto().metrics}

    def rows(self, rows: Iterable[MetricRow]) -> None:
        """Log metric rows, at most MAX_METRICS."""
        start_ms = self._run.start_ms
        metrics = [Metric(key, value, start_ms + step, step) for key, value, step in rows]
        with answering(self._run.uri):
            self._client.log_batch(self._run.run_id, metrics=metrics)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """Log an image as MlflowClient.log_image does; a replayed step overwrites its own files."""
        run_id = self._run.run_id
        number = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id} {key} {step}")
        stem = f"{key}+step+{step}+timestamp+{self._run.start_ms + step}+{number}"
        preview = image.copy()
        preview.thumbnail((256, 256))  # the UI's preview
        with tempfile.TemporaryDirectory() as scratch:
            image.save(Path(scratch) / f"{stem}.png")
            preview.save(Path(scratch) / f"{stem}+compressed.webp")
            with answering(self._run.uri):
                self._files.log_artifacts(run_id, scratch, "images")
                self._files.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def document(self, path: str, content: dict[str, Any]) -> None:
        """Log a JSON file as an artifact of the run."""
        with answering(self._run.uri):
            self._files.log_dict(self._run.run_id, content, path)


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
            run.uri, metadata.begun_step, run.run_id,
        )  # fmt: skip
    describe(
        run,
        params=metadata.params,
        tags=metadata.tags,
        config_yaml=metadata.config_yaml,
        dataset_url=metadata.dataset_url,
        dataset_fingerprint=metadata.dataset_fingerprint,
    )
    return run


def known_run(metadata: RunMetadata) -> TrackedRun:
    """Return the MLflow run of `metadata` unchanged; open it if it does not exist.

    For a driver that could not reach MLflow at its start: since then its workers, or another
    driver, may have opened the run. Raises TrackingError.
    """
    with answering(metadata.uri):
        hits = _runs_of(BoundedClient(metadata.uri), metadata.identity, metadata.experiment)
    if not hits:
        return open_run(metadata)
    info = min(hits, key=lambda hit: str(hit.info.run_id)).info
    return TrackedRun(
        metadata.uri, info.run_id, info.experiment_id, info.start_time, metadata.owner
    )


def find_or_create_run(
    uri: str,
    experiment: str,
    name: str,
    identity: str,
    artifacts: str | None,
    parent: str = "",
    owner: str = "",
) -> TrackedRun:
    """Find or create the MLflow run of the training run `identity`, and set it to RUNNING.

    All experiments are searched, because users rename them. `artifacts`, `parent` and `owner` are
    as in RunMetadata. Raises TrackingError, also where the run was deleted: a second one would hold
    only some of its rows.
    """
    with answering(uri):
        client = BoundedClient(uri)
        hits, is_new = _runs_of(client, identity, experiment), False
        if not hits:
            _refuse_deleted(client, uri, identity)
            experiment_id = _experiment(client, uri, experiment, artifacts)
            tags = {RUN_TAG: identity} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
            client.create_run(experiment_id, None, tags, name)
            hits, is_new = _runs_with(client, identity, [experiment_id]), True
        # MLflow's client repeats a creation whose answer was lost: keep one run, delete the others.
        run, *twins = sorted(hits, key=lambda hit: str(hit.info.run_id))
        for twin in twins:
            client.set_tag(twin.info.run_id, TWIN_TAG, run.info.run_id)
            client.delete_tag(
                twin.info.run_id, RUN_TAG
            )  # else a deleted twin would look like the deleted run
            client.delete_run(twin.info.run_id)
        if owner:
            client.set_tag(run.info.run_id, OWNER_TAG, owner)
        client.update_run(run.info.run_id, status="RUNNING")
        info = run.info
        return TrackedRun(uri, info.run_id, info.experiment_id, info.start_time, owner, is_new)


def _runs_of(client: BoundedClient, identity: str, experiment: str) -> list[Run]:
    """Return the runs with that identity in the named experiment, else in any other."""
    found = client.get_experiment_by_name(experiment)
    if found is not None and (hits := _runs_with(client, identity, [found.experiment_id])):
        return hits
    return _runs_with(client, identity, _experiments(client, ViewType.ACTIVE_ONLY))


def _runs_with(
    client: BoundedClient, identity: str, experiments: list[str], view: int = ViewType.ACTIVE_ONLY
) -> list[Run]:
    query, hits = f"tags.`{RUN_TAG}` = '{identity}'", []
    for start in range(0, len(experiments), MAX_EXPERIMENTS):
        hits += client.search_runs(experiments[start : start + MAX_EXPERIMENTS], query, view)
    return hits


def _experiments(client: BoundedClient, view: int) -> list[str]:
    """Return the ids of all experiments."""
    ids, token = [], None
    while True:
        page = client.search_experiments(view, MAX_EXPERIMENTS, page_token=token)
        ids += [str(one.experiment_id) for one in page]
        if not (token := page.token):
            return ids


def _refuse_deleted(client: BoundedClient, uri: str, identity: str) -> None:
    """Raise TrackingError if the run `identity`, or its experiment, was deleted."""
    everywhere = _experiments(client, ViewType.ALL)
    deleted = _runs_with(client, identity, everywhere, ViewType.DELETED_ONLY)
    if not deleted:
        return
    run_id, of = deleted[0].info.run_id, deleted[0].info.experiment_id
    if client.get_experiment(of).lifecycle_stage == LifecycleStage.DELETED:
        reason = f"the experiment {of}, with the MLflow run of this training run, was deleted"
        raise TrackingError(uri, reason, f"restore it with `{restore('experiment', of, uri)}`")
    raise TrackingError(
        uri,
        f"the MLflow run {run_id} of this training run was deleted",
        f"restore it with `{restore('run', run_id, uri)}`; or, to continue without its rows, "
        f"delete it with `mlflow gc --run-ids {run_id}` on the host of MLflow's database",
    )


def _experiment(client: BoundedClient, uri: str, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment `name`; create it if it does not exist."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:  # by another process, or by a call whose answer was lost
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if not found.experiment_id:  # a server that is not MLflow and answers {}
        raise MlflowException("not an MLflow answer: an experiment without an id")
    if found.lifecycle_stage == LifecycleStage.DELETED:
        command = restore("experiment", found.experiment_id, uri)
        remedy = f"restore it with `{command}`, or set another tracking.experiment"
        raise TrackingError(uri, f"the experiment {name!r} was deleted in MLflow", remedy)
    return str(found.experiment_id)


def describe(
    run: TrackedRun,
    *,
    params: dict[str, Any],
    tags: dict[str, str],
    config_yaml: str,
    dataset_url: str,
    dataset_fingerprint: str,
) -> None:
    """Log the run's new parameters, tags, config file and data set."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        known = client.get_run(run.run_id)
        new = [Param(k, str(v)) for k, v in params.items() if k not in known.data.params]
        for start in range(0, len(new), MAX_PARAMS):
            client.log_batch(run.run_id, params=new[start : start + MAX_PARAMS])
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


def finish(run: TrackedRun, status: str, reason: str = "") -> None:
    """Close the run as FINISHED, FAILED or KILLED; `reason` becomes a tag and its description.

    Does nothing if another driver has opened the run since: that driver ends it.
    """
    with answering(run.uri):
        file = database_file(run.uri)
        if file is not None and not file.exists():  # SQLite would go on writing to it
            remedy = "restore it, or run the same command again, for a run without those metrics"
            raise TrackingError(run.uri, "the database was deleted during the run", remedy)
        client = BoundedClient(run.uri)
        owner = client.get_run(run.run_id).data.tags.get(OWNER_TAG, "")
        if run.owner and owner != run.owner:
            log.warning("MLflow run %s: another driver has taken it over; left open", run.run_id)
            return
        if reason:
            text = sanitize(reason)[:MAX_TAG]
            tags = [RunTag("reason", text), RunTag(MLFLOW_RUN_NOTE, text)]
            client.log_batch(run.run_id, tags=tags)
        client.set_terminated(run.run_id, status)


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
    note: str,
) -> None:
    """Log pictures and texts, replacing earlier ones, metrics at `step`, and the description."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        for key, picture in pictures.items():
            RunLog(run).image(key, 0, picture)
        for path, text in texts.items():
            client.log_text(run.run_id, text, path)
        rows = [Metric(key, value, run.start_ms + step, step) for key, value in metrics.items()]
        client.log_batch(run.run_id, rows, tags=[RunTag(MLFLOW_RUN_NOTE, note[:MAX_TAG])])
