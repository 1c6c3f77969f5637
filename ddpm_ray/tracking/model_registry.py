"""Trained models in MLflow: log them with their run, download them, promote the best one."""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ddpm_ray.assembly.checkpoint_loading import CASCADE
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.tracking.mlflow_client import BoundedClient
from ddpm_ray.tracking.mlflow_runs import TrackingError, answering
from ddpm_ray.tracking.run_info import TrackedRun
from ddpm_ray.training.checkpoint_folder import MANIFEST

log = logging.getLogger(__name__)

CHAMPION = "champion"  # alias of the best version of a registered model


def log_model(run: TrackedRun, checkpoint_url: str, loader_module: str) -> None:
    """Log the checkpoint folder as the run's model `model`: its files, without pickle or code.

    A model of latents is logged with its autoencoder, and a model of texts with a text encoder that
    is trained elsewhere, so that it loads on any machine. If one has moved or changed, a warning
    says so, and the model is logged without it.
    `loader_module` is the module of this package whose `_load_pyfunc(folder)` loads it. Does
    nothing if the run has a model already.
    """
    with answering(run.uri), tempfile.TemporaryDirectory() as scratch:
        mlflow.set_tracking_uri(run.uri)
        client = BoundedClient(run.uri)
        known = client.get_run(run.run_id)
        if known.outputs and known.outputs.model_outputs:
            return
        folder = Path(scratch) / "checkpoint"
        for missing in copy_model(checkpoint_url, folder):
            log.warning("model in MLflow: %s", missing)
        _log_folder(run, folder, loader_module)


def log_cascade(run: TrackedRun, folder: Path, loader_module: str) -> None:
    """Log the local folder of a cascade with copies of its models as the run's model `model`.

    Does nothing if the run has a model already. Raises TrackingError.
    """
    with answering(run.uri):
        mlflow.set_tracking_uri(run.uri)
        known = BoundedClient(run.uri).get_run(run.run_id)
        if not (known.outputs and known.outputs.model_outputs):
            _log_folder(run, folder, loader_module)


def _log_folder(run: TrackedRun, folder: Path, loader_module: str) -> None:
    with mlflow.start_run(run_id=run.run_id):
        mlflow.pyfunc.log_model(
            name="model",
            loader_module=loader_module,
            data_path=str(folder),
            pip_requirements=[f"ddpm-ray=={version('ddpm-ray')}"],
        )


def download_model(uri: str, model_uri: str, destination: Path) -> Path:
    """Download the MLflow model at runs:/... or models:/...; return its checkpoint or cascade."""
    with answering(uri):
        root = Path(
            mlflow.artifacts.download_artifacts(
                model_uri, dst_path=str(destination), tracking_uri=uri, registry_uri=uri
            )
        )
    found = sorted(root.rglob(CASCADE)) or sorted(
        root.rglob(MANIFEST), key=lambda file: len(file.parts)
    )
    if not found:
        remedy = "name a model that `ddpm-ray train` or `ddpm-ray cascade` logged"
        raise TrackingError(model_uri, "this model has no ddpm_ray checkpoint", remedy)
    return found[0].parent  # deeper in it may be that of its autoencoder


def promote(
    uri: str,
    name: str,
    run_id: str,
    metric: str,
    metrics: Mapping[str, float],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Give the run's model the alias `champion` of `name` if its score beats the champion's.

    It does if its interval is below the champion's under the same protocol, or if there is no
    champion. `provenance` is that of the score. Returns the champion's version and the
    reason. Raises TrackingError.
    """
    own = {
        "run_id": run_id,
        "metric": metric,
        "score": repr(metrics[metric]),
        "low": repr(metrics.get(f"{metric}_low")),
        "high": repr(metrics.get(f"{metric}_high")),
        "protocol": _protocol(provenance),
    }
    with answering(uri):
        mlflow.set_tracking_uri(uri)  # create_model_version ignores the client's URI
        client = BoundedClient(uri)
        present = _champion(client, name)
        if present is not None:
            unchanged = {"name": name, "version": str(present.version), "promoted": False}
            if present.tags.get("run_id") == run_id:
                return unchanged | {"reason": "it is the champion already"}
            if reason := _why_not(own, present.tags):
                return unchanged | {"reason": reason}
        version = _make_champion(client, name, run_id, own)
    reason = "there was none" if present is None else f"it beats version {present.version}"
    return {"name": name, "version": version, "promoted": True, "reason": reason}


def register(uri: str, name: str, run_id: str) -> dict[str, Any]:
    """Make the run's model the `champion` of `name`, without a score; return its version.

    A warning names a champion with a score that it replaces. Raises TrackingError.
    """
    with answering(uri):
        mlflow.set_tracking_uri(uri)  # create_model_version ignores the client's URI
        client = BoundedClient(uri)
        present = _champion(client, name)
        if present is not None and present.run_id == run_id:
            return {"name": name, "version": str(present.version)}
        if present is not None and "score" in present.tags:
            log.warning(
                "%s: version %s was champion by its score and is no longer; the new champion has "
                "no score",
                name,
                present.version,
            )
        return {"name": name, "version": _make_champion(client, name, run_id, {})}


def version_uri(uri: str, model_uri: str) -> str:
    """The version that models:/<name>@<alias> means now: models:/<name>/<version>.

    Raises TrackingError.
    """
    name, _, alias = model_uri.removeprefix("models:").strip("/").partition("@")
    with answering(uri):
        found = BoundedClient(uri).get_model_version_by_alias(name, alias)
    return f"models:/{name}/{found.version}"


def _make_champion(client: BoundedClient, name: str, run_id: str, tags: dict[str, str]) -> str:
    """Add the run's model to `name` as a version with the alias `champion`; return its number."""
    logged = client.get_run(run_id).outputs.model_outputs[0].model_id
    with contextlib.suppress(MlflowException):  # the name exists
        client.create_registered_model(name)
    made = client.create_model_version(name, f"models:/{logged}", run_id, tags, model_id=logged)
    version = str(made.version)  # a number from a database, text from a server
    client.set_registered_model_alias(name, CHAMPION, version)
    return version


def _champion(client: BoundedClient, name: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _why_not(own: Mapping[str, str], present: Mapping[str, str]) -> str:
    """Return why the new model does not replace the champion; "" if it does."""
    if (own["metric"], own["protocol"]) != (present.get("metric"), present.get("protocol")):
        return (
            "the champion was scored under another protocol; score it under this one with "
            "`ddpm-ray evaluate`"
        )
    if "None" in (own["high"], present.get("low", "None")):
        return "a score has no interval; draw at least 20 images"
    if float(own["high"]) >= float(present["low"]):
        return (
            f"its interval reaches {float(own['high']):.4g}, and the champion's begins at "
            f"{float(present['low']):.4g}"
        )
    return ""


# Keys of the provenance that do not affect the protocol; early champions lack some of them.
OF_THE_MODEL = "model", "versions", "arithmetic"


def _protocol(provenance: Mapping[str, Any]) -> str:
    """Return the sha256 of what a score depends on, without model, software and device."""
    same = {key: value for key, value in provenance.items() if key not in OF_THE_MODEL}
    samples = {k: v for k, v in same.get("samples", {}).items() if k != "num_steps"}
    text = json.dumps(same | {"samples": samples}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
