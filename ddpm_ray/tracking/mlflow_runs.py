"""MLflow runs: one per training run, each row once, never on the step path.

A metric row's primary key in MLflow holds its time stamp and its value. Ours are a function of
(run start, step), so a step that is replayed after a crash writes the row that is already there.
Rates are clocks and would differ: of those the first stays, and later ones are dropped.
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
from ddpm_ray.tracking.run_info import MetricRow, RunCard, TrackedRun
from ddpm_ray.tracking.tracking_uri import database_file

__all__ = ["TrackingError", "TrackingOutageError", "TrackingServerError", "answering"]

log = logging.getLogger(__name__)

RUN_TAG = "ddpm_ray.run"  # identity of the run's folder: what a restarted job finds its run by
OWNER_TAG = "ddpm_ray.driver"  # who opened the run last: only that driver ends it
TWIN_TAG = "ddpm_ray.twin_of"  # of a run that a lost answer made twice, and that is deleted
MAX_PARAMS, MAX_TAG = 100, 5000  # that the server takes in one call
MAX_EXPERIMENTS = 500  # that are searched in one call


class RunLog:
    """Idempotent writer of one run's rows, pictures and documents. Raises TrackingError."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        with answering(run.uri):
            self._client = BoundedClient(run.uri)
            self._files = BoundedClient(run.uri, FILE_S)

    def newest_steps(self) -> dict[str, int]:
        """The newest step of each metric that has a row; one call, however long the run is."""
        with answering(self._run.uri):
            found: Run = self._client.get_run(self._run.run_id)
            return {metric.key: int(metric.step) for metric in found.data.to_proto().metrics}

    def rows(self, rows: Iterable[MetricRow]) -> None:
        """At most MAX_METRICS of them."""
        start_ms = self._run.start_ms
        metrics = [Metric(key, value, start_ms + step, step) for key, value, step in rows]
        with answering(self._run.uri):
            self._client.log_batch(self._run.run_id, metrics=metrics)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        """As MlflowClient.log_image, under names that a step which is replayed writes over."""
        run_id = self._run.run_id
        number = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id} {key} {step}")
        stem = f"{key}+step+{step}+timestamp+{self._run.start_ms + step}+{number}"
        preview = image.copy()
        preview.thumbnail((256, 256))  # what the UI shows before a click
        with tempfile.TemporaryDirectory() as scratch:
            image.save(Path(scratch) / f"{stem}.png")
            preview.save(Path(scratch) / f"{stem}+compressed.webp")
            with answering(self._run.uri):
                self._files.log_artifacts(run_id, scratch, "images")
                self._files.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def document(self, path: str, content: dict[str, Any]) -> None:
        """A JSON file below the run's artifacts."""
        with answering(self._run.uri):
            self._files.log_dict(self._run.run_id, content, path)


def open_run(card: RunCard) -> TrackedRun:
    """The MLflow run that `card` tells of: found or created, described, RUNNING. TrackingError."""
    run = find_or_create_run(
        card.uri, card.experiment, card.name, card.identity, card.artifacts, card.parent, card.owner
    )
    if run.is_new and card.begun_step:
        log.warning(
            "%s: there is no MLflow run of this training run, which is at step %d; a new one, %s, "
            "begins here, and metrics up to that step are not in it",
            run.uri, card.begun_step, run.run_id,
        )  # fmt: skip
    describe(
        run,
        params=card.params,
        tags=card.tags,
        config_yaml=card.config_yaml,
        dataset_url=card.dataset_url,
        dataset_fingerprint=card.dataset_fingerprint,
    )
    return run


def known_run(card: RunCard) -> TrackedRun:
    """The run that `card` tells of, as whoever opened it last left it; opened where there is none.

    For a driver that could not ask before: its workers may have opened the run for it, or another
    driver for itself. Raises TrackingError.
    """
    with answering(card.uri):
        hits = _runs_of(BoundedClient(card.uri), card.identity, card.experiment)
    if not hits:
        return open_run(card)
    info = min(hits, key=lambda hit: str(hit.info.run_id)).info
    return TrackedRun(card.uri, info.run_id, info.experiment_id, info.start_time, card.owner)


def find_or_create_run(
    uri: str,
    experiment: str,
    name: str,
    identity: str,
    artifacts: str | None,
    parent: str = "",
    owner: str = "",
) -> TrackedRun:
    """The MLflow run of the training run `identity`, set to RUNNING; created where there is none.

    It is looked for in all experiments, because people rename them. `artifacts`, `parent` and
    `owner` are as in RunCard. Raises TrackingError, also where the run was deleted: a second one
    would hold a part of its rows.
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
        # Where the answer to a creation is lost, the client below asks for another one.
        run, *twins = sorted(hits, key=lambda hit: str(hit.info.run_id))
        for twin in twins:
            client.set_tag(twin.info.run_id, TWIN_TAG, run.info.run_id)
            client.delete_tag(twin.info.run_id, RUN_TAG)  # not taken for the run if it is deleted
            client.delete_run(twin.info.run_id)
        if owner:
            client.set_tag(run.info.run_id, OWNER_TAG, owner)
        client.update_run(run.info.run_id, status="RUNNING")
        info = run.info
        return TrackedRun(uri, info.run_id, info.experiment_id, info.start_time, owner, is_new)


def _runs_of(client: BoundedClient, identity: str, experiment: str) -> list[Run]:
    """Runs with that identity: of the experiment of that name, else of any other."""
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
    """The ids of all experiments."""
    ids, token = [], None
    while True:
        page = client.search_experiments(view, MAX_EXPERIMENTS, page_token=token)
        ids += [str(one.experiment_id) for one in page]
        if not (token := page.token):
            return ids


def _refuse_deleted(client: BoundedClient, uri: str, identity: str) -> None:
    """Raise TrackingError where a deleted run, or one of a deleted experiment, has `identity`."""
    everywhere = _experiments(client, ViewType.ALL)
    deleted = _runs_with(client, identity, everywhere, ViewType.DELETED_ONLY)
    if not deleted:
        return
    run_id, of = deleted[0].info.run_id, deleted[0].info.experiment_id
    if client.get_experiment(of).lifecycle_stage == LifecycleStage.DELETED:
        reason = f"the experiment {of}, with the MLflow run of this training run, was deleted"
        raise TrackingError(uri, reason, f"bring it back by `{restore('experiment', of, uri)}`")
    raise TrackingError(
        uri,
        f"the MLflow run {run_id} of this training run was deleted",
        f"bring it back by `{restore('run', run_id, uri)}`; or, to do without its rows, remove it "
        f"for good by `mlflow gc --run-ids {run_id}` beside MLflow's database",
    )


def _experiment(client: BoundedClient, uri: str, name: str, artifacts: str | None) -> str:
    """Its id; created where there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:  # by another run, or by us, and the answer was lost
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if not found.experiment_id:  # some server that answers {} to everything
        raise MlflowException("not an MLflow answer: an experiment without an id")
    if found.lifecycle_stage == LifecycleStage.DELETED:
        command = restore("experiment", found.experiment_id, uri)
        remedy = f"bring it back by `{command}`, or give another tracking.experiment"
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
    """Log what the run is: new parameters, tags, the whole config as a file, and its data set."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        known = client.get_run(run.run_id)
        new = [Param(k, str(v)) for k, v in params.items() if k not in known.data.params]
        for start in range(0, len(new), MAX_PARAMS):
            client.log_batch(run.run_id, params=new[start : start + MAX_PARAMS])
        client.log_batch(run.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        client.log_text(run.run_id, config_yaml, "config.yaml")
        if not (known.inputs and known.inputs.dataset_inputs):
            with warnings.catch_warnings():  # two of its sources claim a local path; either will do
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
            except MlflowException:  # a driver that began at once logged the same between the two
                if not client.get_run(run.run_id).inputs.dataset_inputs:
                    raise


def finish(run: TrackedRun, status: str, reason: str = "") -> None:
    """Close the run as FINISHED, FAILED or KILLED; the reason becomes a tag and its description.

    A driver that another one has followed leaves the run alone: it is that one's to end.
    """
    with answering(run.uri):
        file = database_file(run.uri)
        if file is not None and not file.exists():  # SQLite would write on to a file without a name
            remedy = "put it back, or run the same command again, for a run without those metrics"
            raise TrackingError(run.uri, "the database was deleted while the run went on", remedy)
        client = BoundedClient(run.uri)
        owner = client.get_run(run.run_id).data.tags.get(OWNER_TAG, "")
        if run.owner and owner != run.owner:
            log.warning("MLflow run %s: another driver has taken it over; not closed", run.run_id)
            return
        if reason:
            text = sanitize(reason)[:MAX_TAG]
            tags = [RunTag("reason", text), RunTag(MLFLOW_RUN_NOTE, text)]
            client.log_batch(run.run_id, tags=tags)
        client.set_terminated(run.run_id, status)


def history(run_id: str, uri: str, key: str) -> list[tuple[int, float]]:
    """Step and value of each row of `key`, by step. Raises TrackingError."""
    with answering(uri):
        rows = BoundedClient(uri).get_metric_history(run_id, key)
        return sorted((row.step, row.value) for row in rows)


def log_ended(
    parent: TrackedRun, name: str, identity: str, params: dict[str, Any], status: str, reason: str
) -> str:
    """The id of a run below `parent` that ended before it began: its parameters and the reason."""
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
    """Put these in the run: pictures and texts over what stood there, metrics at `step`, a note."""
    with answering(run.uri):
        client = BoundedClient(run.uri)
        for key, picture in pictures.items():
            RunLog(run).image(key, 0, picture)
        for path, text in texts.items():
            client.log_text(run.run_id, text, path)
        rows = [Metric(key, value, run.start_ms + step, step) for key, value in metrics.items()]
        client.log_batch(run.run_id, rows, tags=[RunTag(MLFLOW_RUN_NOTE, note[:MAX_TAG])])
