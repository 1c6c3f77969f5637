"""Set-up of a process that trains or evaluates: threads, data, facts of the run."""

from collections.abc import Mapping
from typing import Any

import torch

from ddpm_ray import fault_injection
from ddpm_ray.assembly import latents
from ddpm_ray.assembly.image_embeddings import EMBEDDINGS_FINGERPRINT, named_set
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import package_version
from ddpm_ray.training import determinism


def configure_process(config: RunConfig) -> None:
    """Set the number of threads, the storage time-out and deterministic algorithms."""
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    object_store.set_retry_timeout(config.cluster.storage_timeout_s)
    if config.training.deterministic:
        determinism.configure()


def opened_data(config: RunConfig, settings: dict[str, Any]) -> Dataset:
    """Open the data set; check that all sets of the run are those that the driver opened."""
    fault_injection.at("open")
    dataset = open_dataset(config.data.url)
    named = filter(None, [config.evaluation.held_out_url, config.evaluation.reference_url])
    seen = settings.get("fingerprints", {})
    for one in (dataset, *map(open_dataset, named)):
        require_same_data(one, seen.get(one.url, one.fingerprint), "driver saw")
    return dataset


def require_same_data(dataset: Dataset, wanted: str, whose: str) -> None:
    """Raise DatasetError unless the fingerprint of the data set is `wanted`.

    It may have been packed again since the driver opened it, or since the run began.
    """
    if dataset.fingerprint != wanted:
        raise DatasetError(
            dataset.url,
            f"this is data set {dataset.fingerprint[:12]}, and the {whose} {wanted[:12]}",
            "put that one back, or start a run with another name=",
        )


def require_same_sets(
    config: RunConfig, dataset: Dataset, facts: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Raise DatasetError unless a run has the data and embeddings of a checkpoint.

    `facts` are those of the run, `stored` those of the checkpoint.
    """
    require_same_data(dataset, stored["data_fingerprint"], "checkpoint was trained on")
    mine, theirs = (one.get(EMBEDDINGS_FINGERPRINT, "") for one in (facts, stored))
    if mine != theirs:
        raise DatasetError(
            config.embedding.url or "embedding.url",
            f"{named_set(mine)}, and the checkpoint was trained on {named_set(theirs)}",
            "put that one back, or start a run with another name=",
        )


def facts_of_run(settings: dict[str, Any], dataset: Dataset, codec: Codec) -> dict[str, Any]:
    """Facts on the run that each checkpoint stores."""
    named = ("image_encoder", EMBEDDINGS_FINGERPRINT)
    return {
        "config": settings["config"],
        "version": package_version(),
        "image_shape": list(dataset.manifest.image_shape),
        "data_fingerprint": dataset.fingerprint,
        **latents.codec_facts(codec),
        **settings.get("tokenizer", {}),
        **{key: settings[key] for key in named if settings.get(key)},
        "identity": settings["identity"],
        "label_names": list(dataset.manifest.label_names),
    }
