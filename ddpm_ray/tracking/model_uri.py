"""Checks of model URIs given by the user, without importing torch or MLflow."""

import re
from pathlib import Path

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.storage import object_store

IN_MLFLOW = ("runs:/", "models:/")


def resolve_model_uri(uri: str, home: Path) -> str:
    """Return `uri`, a relative folder resolved against `home`.

    Raises ConfigError where a part is missing, or a local folder does not exist.
    """
    if uri.startswith(IN_MLFLOW):
        require_whole_name(uri)
        return uri
    location = object_store.absolute(uri, home)
    if object_store.is_local(location) and not object_store.local_path(location).exists():
        raise ConfigError(
            f"{location}: there is no such folder; name a run's folder, its checkpoints folder, "
            f"one checkpoint in it, runs:/<run id>/model or models:/<name>@<alias>"
        )
    return location


def require_whole_name(uri: str) -> None:
    """Raise ConfigError where a part of an MLflow model URI is missing.

    MLflow would read another URI, or show an error of its database.
    """
    form = r"runs:/+([^/]+)/(.*[^/])/*" if uri.startswith("runs:") else r"models:/+([^/@]+)(.*)"
    name, part = match.groups() if (match := re.fullmatch(form, uri)) else ("", "")
    if uri.startswith("runs:") and not name:
        missing = "a run's id" if uri.strip("/") == "runs:" else "the model's name in that run"
        raise ConfigError(f"{uri} lacks {missing}; write runs:/<run id>/model")
    if uri.startswith("models:") and not re.fullmatch("[@/][^/@]+(/.*)?", part):
        if (
            re.fullmatch("m-[0-9a-f]{8,}", name) and not part
        ):  # the id of a logged model is complete
            return
        missing = "an alias or a version" if name else "a name"
        raise ConfigError(
            f"{uri} lacks {missing}; write models:/<name>@<alias> or models:/<name>/<version>"
        )


def shown_name(uri: str) -> str:
    """A short name for the model at `uri`: of its registered model, or of the folder of its run."""
    if uri.startswith("models:"):
        return re.split("[@/]", uri.removeprefix("models:").strip("/"))[0]
    parts = [part for part in uri.rstrip("/").split("/") if part]
    if uri.startswith("runs:"):
        return parts[1][:8]
    inside = ("checkpoints", "checkpoint")  # a run has its checkpoints in a folder
    named = [part for part in parts if part not in inside and not part.startswith("step-")]
    return re.sub(r"[^A-Za-z0-9_.-]", "-", named[-1] if named else "model").lstrip("-._")[:64]
