"""MLflow runs: one per training run, each row once, never on the step path.

A metric row's primary key in MLflow holds its time stamp and its value. Ours are a function of
(run start, step), so a step that is replayed after a crash writes the row that is already there.
Rates are clocks and would differ: of those the first stays, and later ones are dropped.
"""

import contextlib
import logging
import os
import tempfile
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE
from PIL import Image

from ddpm_ray.cluster.tracked_run import MetricRow, RunCard, TrackedRun
from ddpm_ray.data import storage
from ddpm_ray.telling import brief, told

log = logging.getLogger(__name__)

RUN_TAG = "ddpm_ray.run"  # identity of the run's folder: what a restarted job finds its run by
MAX_PARAMS, MAX_TAG = 100, 5000  # that the server takes in one call

# A dead server must cost a thread seconds, not the two minutes of the defaults (7 tries of 120 s).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # jobs tell the run
logging.getLogger("mlflow").setLevel(logging.WARNING)  # not how a database is made
logging.getLogger("urllib3").setLevel(logging.ERROR)  # an outage is told once, not per try


class TrackingError(RuntimeError):
    """An MLflow that does not do what it should; args are (place, reason, remedy)."""

    def __str__(self) -> str:
        place, reason, remedy = self.args
        return told(f"{place}: {reason}; {remedy}")


class TrackingOutageError(TrackingError):
    """A server that does not answer now: it may later."""


class RunLog:
    """What is told of one run again and again; told twice, it is there once."""

    def __init__(self, run: TrackedRun) -> None:
        self._run, self._client = run, MlflowClient(tracking_uri=run.uri)

    def last_steps(self, keys: Iterable[str]) -> dict[str, int]:
        """The newest step at which each of these metrics has a row; 0 where it has none."""
        histories = {key: self._client.get_metric_history(self._run.run_id, key) for key in keys}
        return {key: max((row.step for row in rows), default=0) for key, rows in histories.items()}

    def rows(self, rows: Iterable[MetricRow]) -> None:
        """At most MAX_METRICS of them."""
        start_ms = self._run.start_ms
        metrics = [Metric(key, value, start_ms + step, step) for key, value, step in rows]
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
            self._client.log_artifacts(run_id, scratch, "images")
        self._client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def document(self, path: str, content: dict[str, Any]) -> None:
        """A JSON file below the run's artifacts."""
        self._client.log_dict(self._run.run_id, content, path)


def open_run(card: RunCard) -> TrackedRun:
    """The MLflow run that `card` tells of: found or created, described, RUNNING. TrackingError."""
    run = find_or_create_run(
        card.uri, card.experiment, card.name, card.identity, card.artifacts, card.parent
    )
    describe(
        run,
        params=card.params,
        tags=card.tags,
        config_yaml=card.config_yaml,
        dataset_url=card.dataset_url,
        dataset_fingerprint=card.dataset_fingerprint,
    )
    return run


def find_or_create_run(
    uri: str,
    experiment: str,
    name: str,
    identity: str,
    artifacts: str | None,
    parent: str = "",
) -> TrackedRun:
    """The MLflow run of the training run `identity`, set to RUNNING; created where there is none.

    `artifacts` and `parent` are as in RunCard. Raises TrackingError.
    """
    with answering(uri):
        client = MlflowClient(tracking_uri=uri)
        experiment_id = _experiment(client, experiment, artifacts)
        query = f"tags.`{RUN_TAG}` = '{identity}'"
        tags = {RUN_TAG: identity} | ({MLFLOW_PARENT_RUN_ID: parent} if parent else {})
        if not (hits := client.search_runs([experiment_id], query)):
            client.create_run(experiment_id, None, tags, name)
            hits = client.search_runs([experiment_id], query)
        # Where the answer to a creation is lost, the client below asks for another one.
        run, *twins = sorted(hits, key=lambda hit: str(hit.info.run_id))
        for twin in twins:
            client.delete_run(twin.info.run_id)
        client.update_run(run.info.run_id, status="RUNNING")
        return TrackedRun(uri, run.info.run_id, experiment_id, run.info.start_time)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Its id; created where there is none."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:  # by another run, or by us, and the answer was lost
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
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
        client = MlflowClient(tracking_uri=run.uri)
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
                name=storage.name_of(dataset_url),
                digest=dataset_fingerprint[:36],  # the database's column is 36 wide
            )
            training = InputTag("mlflow.data.context", "training")
            entity = DatasetInput(dataset._to_mlflow_entity(), tags=[training])
            client.log_inputs(run.run_id, [entity])


def finish(run: TrackedRun, status: str, reason: str = "") -> None:
    """Close the run as FINISHED, FAILED or KILLED; the reason becomes a tag and its description."""
    with answering(run.uri):
        client = MlflowClient(tracking_uri=run.uri)
        if reason:
            text = told(reason)[:MAX_TAG]
            tags = [RunTag("reason", text), RunTag(MLFLOW_RUN_NOTE, text)]
            client.log_batch(run.run_id, tags=tags)
        client.set_terminated(run.run_id, status)


def history(run_id: str, uri: str, key: str) -> list[tuple[int, float]]:
    """Step and value of each row of `key`, by step. Raises TrackingError."""
    with answering(uri):
        rows = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
        return sorted((row.step, row.value) for row in rows)


def log_ended(
    parent: TrackedRun, name: str, identity: str, params: dict[str, Any], status: str, reason: str
) -> str:
    """The id of a run below `parent` that ended before it began: its parameters and the reason."""
    with answering(parent.uri):
        client = MlflowClient(tracking_uri=parent.uri)
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
        client = MlflowClient(tracking_uri=run.uri)
        for key, picture in pictures.items():
            RunLog(run).image(key, 0, picture)
        for path, text in texts.items():
            client.log_text(run.run_id, text, path)
        rows = [Metric(key, value, run.start_ms + step, step) for key, value in metrics.items()]
        client.log_batch(run.run_id, rows, tags=[RunTag(MLFLOW_RUN_NOTE, note[:MAX_TAG])])


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """MLflow's errors, and those of the way to it, as a TrackingError of one line."""
    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        reason, remedy = "MLflow does not answer", "start it, or correct tracking.uri"
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            reason, remedy = "MLflow has no such thing", "check the run's id or the model's name"
        kind = TrackingOutageError if _may_pass(uri, error) else TrackingError
        raise kind(uri, f"{reason} ({brief(error)})", remedy) from error


def _may_pass(uri: str, error: Exception) -> bool:
    """Whether a server, and not what is asked of it, is at fault; a local database never is."""
    passing = "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"
    return uri.startswith("http") and getattr(error, "error_code", passing[0]) in passing
