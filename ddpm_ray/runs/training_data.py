"""The data set of a training run: open or pack it, and check that the model fits it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ddpm_ray.assembly import diffusion, latents, networks, scoring
from ddpm_ray.assembly.autoencoder import require_fitting
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TaskTraits
from ddpm_ray.data.dataset import MANIFEST, Dataset, DatasetError, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing import builtin_datasets
from ddpm_ray.models.lpips_distance import require_lpips
from ddpm_ray.models.unet_spec import require_divisible
from ddpm_ray.redaction import counted
from ddpm_ray.runs.pack import pack_dataset
from ddpm_ray.storage import object_store


def checked_data(config: RunConfig) -> tuple[Dataset, dict[str, Any]]:
    """Open all data sets of a run; return that of training, and what its workers know of the rest.

    That is fingerprints by URL, and the checkpoint that scores alignment. Raises ConfigError or
    DatasetError if one is missing, or if the model, its autoencoder or that encoder does not fit.
    """
    dataset = open_or_pack(config)
    check_model(config, dataset)
    latents.codec_of_data(config.data, dataset)
    fingerprints = _fingerprints(config, dataset)
    wanted, prompts = config.evaluation, config.sampling.prompts
    pinned = scoring.alignment_checkpoint(wanted, config.draws_captions, prompts, dataset)
    return dataset, {"fingerprints": fingerprints, "alignment_checkpoint": pinned}


def open_or_pack(config: RunConfig) -> Dataset:
    """Open the data set at data.url; pack the built-in data.source there if there is none.

    Raises ConfigError if data.url holds another data set than data.source.
    """
    source, url = config.data.source, config.data.url
    if source and not object_store.exists(object_store.join(url, MANIFEST)):
        pack_dataset(source, url, PackConfig())
    dataset = open_dataset(url)
    if source and dataset.manifest.source_sha256 != builtin_datasets.SOURCE_SHA256[source]:
        raise ConfigError(
            f"data.source is {source!r}, but data.url {url!r} holds another data set; set "
            f"data.source= to train on that one, or choose another data.url"
        )
    return dataset


def check_model(config: RunConfig, dataset: Dataset) -> None:
    """Check that schedule, network and data fit, on the meta device. Raises ConfigError."""
    reconstructs, shape = config.traits.reconstructs, dataset.manifest.diffused_shape
    require_codec(config.traits, dataset, "data.url")
    if not config.traits.has_noise and dataset.manifest.codec != "pixels":
        raise ConfigError(
            f"data.url {config.data.url!r} holds {dataset.manifest.codec}; {config.traits.name} is "
            f"trained on images: name the images that they were encoded from"
        )
    if reconstructs and config.autoencoder.perceptual == "lpips":
        require_lpips()  # before Ray starts
    if dataset.manifest.codec != "pixels":
        _require_rangeless_options(config)
    try:
        schedule = diffusion.noise_schedule(config.schedule)
        diffusion.model_parameterization(config.objective, schedule)
    except ValueError as error:
        raise ConfigError(f"schedule: {error}") from error
    try:
        with torch.device("meta"):
            networks.network(config, shape)
        if reconstructs:
            require_fitting(config, shape)
    except ValueError as error:
        group = "model" if config.traits.has_noise else config.task
        raise ConfigError(f"{group}: with the images of {config.data.url}: {error}") from error
    _require_crop(config, shape)
    known = len(dataset.manifest.label_names)
    if config.model.num_classes not in (0, known):
        raise ConfigError(
            f"model.num_classes is {config.model.num_classes}, but the data in {config.data.url} "
            f"has {counted(known, 'label')}; set model.num_classes={known}"
        )
    try:
        config.sampling.numbered(dataset.manifest.label_names)
    except ValueError as error:
        raise ConfigError(f"sampling.{error}") from error


def require_codec(traits: TaskTraits, dataset: Dataset, key: str) -> None:
    """Raise ConfigError, which names the option `key`, unless this set is of what models train on.

    That is embeddings for a task that draws them, and pixels or latents for all others.
    """
    held = dataset.manifest.codec
    if traits.draws_embeddings == (held == "embeddings"):
        return
    wanted = (
        "embeddings: encode the images with `ddpm-ray encode` and a run with task=contrastive"
        if traits.draws_embeddings
        else "images: name those that the embeddings were made of"
    )
    raise ConfigError(
        f"{key} is {dataset.url!r}, which holds {held}, and {traits.name} takes {wanted}"
    )


def require_scored_data(
    traits: TaskTraits, data_url: str, wanted: EvaluationConfig, keys: Sequence[str]
) -> None:
    """Open the set at `data_url` and those of the options `keys` of `wanted`, where given.

    `traits` is that of the model to score. Raises ConfigError as `require_codec`, DatasetError.
    """
    named = {f"evaluation.{key}": getattr(wanted, key) for key in keys}
    for key, url in ({"data_url": data_url} | named).items():
        if url:
            require_codec(traits, open_dataset(url), key)


def _require_rangeless_options(config: RunConfig) -> None:
    """Raise ConfigError for options that a run on latents or embeddings cannot have."""
    if pixels := config.objective.low_resolution_pixels:
        raise ConfigError(
            f"objective.low_resolution_pixels is {pixels}, but {config.data.url} holds latents, "
            "and the small image is made of pixels: set it to 0, or train on pixels"
        )
    model = dataclasses.replace(config.sampled_model, has_range=False)
    if problems := list(config.sampling.problems("sampling", model)):
        raise ConfigError("\n".join(problems))


def _require_crop(config: RunConfig, shape: ImageShape) -> None:
    """Raise ConfigError for crops that are too large, or that the levels do not halve."""
    side, height, width = config.objective.low_resolution_crop, *shape[:2]
    if side and (kind := config.model.network) != "unet":
        raise ConfigError(
            f"objective.low_resolution_crop is {side}, but model.network is {kind}, which takes "
            f"images of one size: use model.network=unet, or leave it out"
        )
    if side > min(height, width):
        raise ConfigError(
            f"objective.low_resolution_crop is {side}, but the images of {config.data.url} are "
            f"{height} x {width}: use {min(height, width) // 2}, a quarter of their pixels"
        )
    if side:
        try:
            require_divisible((side, side), len(config.model.channel_mults))
        except ValueError as error:
            raise ConfigError(f"objective.low_resolution_crop is {side}: {error}") from error


def _fingerprints(config: RunConfig, dataset: Dataset) -> dict[str, str]:
    """Fingerprint of each data set that the run opens, by its URL. Raises ConfigError."""
    found = {dataset.url: dataset.fingerprint}
    for key in ("held_out_url", "reference_url"):
        if url := getattr(config.evaluation, key):
            try:
                named = open_dataset(url)
            except DatasetError as error:
                raise ConfigError(f"evaluation.{key}: {error}") from error
            require_codec(config.traits, named, f"evaluation.{key}")
            found[url] = named.fingerprint
    return found
