"""Import the weights of another library as a run with one checkpoint."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddpm_ray.assembly import other_libraries
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.config.jobs.import_weights import ImportConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.models.interop import autoencoder_kl, diffusers_folders
from ddpm_ray.models.interop.diffusers_files import read_tensors
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore


def import_weights(
    weights: str, destination: str, config: ImportConfig, given: Sequence[str]
) -> dict[str, Any]:
    """Write the run folder `destination`, and return its checkpoint and what is in it.

    `given`: the keys of `config` that the user set; a diffusers folder sets all others. Raises
    ConfigError, UnsupportedModelError and StorageError, with nothing written.
    """
    require_new(destination)
    source = {"layout": config.layout, "file": object_store.name_of(weights)}
    if config.layout == "diffusers":
        if not Path(weights).is_dir():
            raise ConfigError(
                f"weights is {weights}; layout=diffusers reads a folder of this machine: name one, "
                f"or set layout=guided-diffusion or layout=ho for a file"
            )
        _require_no_run(weights)
        model = other_libraries.of_diffusers(Path(weights))
        values = {
            key.removeprefix("sampling."): getattr(config.sampling, key.removeprefix("sampling."))
            for key in given
            if key.startswith("sampling.")
        }
        sampling = model.config.sampling.overridden(values, model.config.schedule.num_steps)
        model = model._replace(config=replace(model.config, sampling=sampling))
        ranged = replace(model.config.sampled_model, has_range=model.codec.clip() is not None)
        if problems := list(sampling.problems("sampling", ranged)):
            raise ConfigError("\n".join(problems))
    else:
        data = object_store.read_bytes(weights)
        source["sha256"] = hashlib.sha256(data).hexdigest()
        model = other_libraries.of_weights(config, weights, read_tensors(weights, data))
    parent, _, name = destination.rstrip("/").rpartition("/")
    model = model._replace(config=replace(model.config, name=name, storage=parent))
    snapshot = other_libraries.snapshot(model, source)
    try:
        checkpoint = CheckpointStore(object_store.join(destination, CHECKPOINTS)).save(snapshot)
    except StorageError:  # it was new, so nothing else is lost
        object_store.delete_folder(destination)
        raise
    autoencoder = snapshot.facts.get("autoencoder")  # it stays in the folder of diffusers
    return {
        "run": destination,
        "checkpoint": checkpoint,
        "image_shape": list(model.image_shape),
        "parameters": sum(one.numel() for one in model.tensors.values()),
        "weights_sha256": checkpoint_folder.weights_sha256(checkpoint),
        **({"autoencoder": autoencoder} if autoencoder else {}),
    }


def require_new(destination: str) -> None:
    """Raise ConfigError if the folder `destination` holds a file, at any depth."""
    if held := _held_names(destination):
        raise ConfigError(
            f"destination is {destination}, which holds {', '.join(held[:3])}: name a new folder"
        )


def _require_no_run(folder: str) -> None:
    """Raise ConfigError for a local folder that holds a checkpoint of ours."""
    if diffusers_folders.holds_model(folder) or autoencoder_kl.in_folder(folder):
        return
    try:
        newest_checkpoint(folder)
    except (CheckpointError, StorageError):
        return
    raise ConfigError(
        f"weights is {folder}, which is a run of ddpm_ray and needs no import: give it to the "
        "other jobs as it is"
    )


def _held_names(url: str) -> list[str]:
    """Names directly below `url` of files, and of folders that hold one, at any depth."""
    folders = object_store.folders(url)
    inside = [name for name in folders if _held_names(object_store.join(url, name))]
    return sorted([*object_store.file_names(url), *inside])
