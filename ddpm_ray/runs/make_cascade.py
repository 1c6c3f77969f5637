"""Driver of the job cascade: load the models, write their folder, log it in MLflow."""

import contextlib
import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from ddpm_ray.assembly import cascades
from ddpm_ray.assembly.checkpoint_loading import CASCADE
from ddpm_ray.assembly.frozen_text import TEXT_ENCODER_COPY
from ddpm_ray.config.jobs.cascade import CascadeConfig
from ddpm_ray.config.loading import ConfigError, to_yaml
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.run_info import RunMetadata
from ddpm_ray.tracking.tracking_uri import (
    artifact_root,
    require_database_folder,
    resolve_tracking_uri,
    source_of,
    warn_of_another_host,
)

log = logging.getLogger(__name__)


def make_cascade(out: str, config: CascadeConfig, home: Path) -> dict[str, Any]:
    """Write the cascade to the folder `out` and, if it has a name there, to MLflow's registry.

    Returns the parts, and run and version in MLflow, as plain JSON. Raises ConfigError for models
    that do not fit together, what loading them raises, StorageError, and TrackingError.
    """
    uri = resolve_tracking_uri(home, config.tracking.uri) if config.register_as else ""
    if uri:
        warn_of_another_host(uri)
        require_database_folder(uri, source_of(config.tracking.uri))
    cascades.require_no_run(out)
    models = config.prior, config.decoder, config.upsamplers
    cascade, parts = cascades.joined(*models, config.candidates)
    if not (config.copies or config.register_as):
        cascades.write_cascade(out, parts)
        cascades.warn_of_unused_copies(out, parts)
        return {"cascade": out, **parts}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copied = cascades.write_copies(folder, parts)
        if config.copies:
            _upload(folder, out)
        cascades.write_cascade(out, copied if config.copies else parts)
        cascades.warn_of_unused_copies(out, copied if config.copies else parts)
        made = {"cascade": out, **(copied if config.copies else parts)}
        if not config.register_as:
            return made
        return made | _registered(uri, config, cascade, parts, folder)


def _upload(folder: Path, out: str) -> None:
    """Write the models' files below `out`; the caller writes cascade.json, which completes it.

    Raises ConfigError for a text encoder of transformers or open_clip, which is read from local
    folders alone.
    """
    if not object_store.is_local(out) and any(folder.glob(f"*/{TEXT_ENCODER_COPY}/*config.json")):
        raise ConfigError(
            f"copies is true and --out is {out}, but a text encoder of transformers or open_clip "
            f"loads from a local folder only: write to one"
        )
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
        name = file.relative_to(folder).as_posix()
        if name != CASCADE:
            object_store.write_bytes(object_store.join(out, name), file.read_bytes())


def _registered(
    uri: str, config: CascadeConfig, cascade: Cascade, parts: cascades.Parts, folder: Path
) -> dict[str, Any]:
    """Log `folder` as the model of an MLflow run; return run and version of the registered model.

    The same models give the same run: the job may be repeated.
    """
    from ddpm_ray.tracking import mlflow_runs, model_registry  # import MLflow, which takes seconds

    same = json.dumps(parts, sort_keys=True)
    models = (parts["prior"], parts["decoder"], *parts["upsamplers"])
    run = mlflow_runs.open_run(
        RunMetadata(
            uri,
            config.tracking.experiment,
            config.register_as,
            f"cascade-{hashlib.sha256(same.encode()).hexdigest()[:32]}",
            artifact_root(uri),
            parent="",
            params={"candidates": config.candidates},
            tags={},
            config_yaml=to_yaml(config),
            dataset_url=cascade.provenance["config"]["data"]["url"],
            dataset_fingerprint=cascade.provenance["data_fingerprint"],
            description="\n".join(["A cascade of", *(f"- {one['url']}" for one in models)]),
        )
    )
    try:
        model_registry.log_cascade(run, folder, "ddpm_ray.tracking.pyfunc_model")
    except BaseException as error:
        with contextlib.suppress(mlflow_runs.TrackingError):  # `error` matters more
            mlflow_runs.finish(run, "FAILED", str(error))
        raise
    mlflow_runs.finish(run, "FINISHED")
    version = model_registry.register(uri, config.register_as, run.run_id)
    log.info("MLflow run %s: %s, version %s", run.run_id, version["name"], version["version"])
    return {"run_id": run.run_id, "registered": version}
