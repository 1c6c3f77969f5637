"""The set of embeddings that a run reads in step with its images (embedding.url)."""

from collections.abc import Mapping
from typing import Any

from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.redaction import counted, sanitize

EMBEDDINGS_FINGERPRINT = "embeddings_fingerprint"  # fact of a run that reads such a set


def checked_embeddings(config: RunConfig, dataset: Dataset, encoder_sha256: str) -> Dataset | None:
    """The set at embedding.url, of the images of `dataset`; None if images are embedded in steps.

    `encoder_sha256` is that of the weights of embedding.encoder. Raises ConfigError, in one line,
    for latents without such a set, and for a set of other images, of another encoder or of another
    kind, and StorageError.
    """
    url, wanted = config.embedding.url, config.embedding
    remedy = f"encode the images with `ddpm-ray encode {sanitize(wanted.encoder)} IMAGES SET`"
    if not url:
        if dataset.manifest.codec == "pixels":
            return None
        raise ConfigError(
            f"embedding.encoder is {sanitize(wanted.encoder)}, which embeds images, but data.url "
            f"holds {dataset.manifest.codec}: {remedy}, and set embedding.url=SET"
        )
    try:
        found = open_dataset(url)
    except DatasetError as error:
        raise ConfigError(f"embedding.url: {error}") from error
    if problem := _incompatibility(found, dataset, encoder_sha256, wanted.width):
        given = f"embedding.url is {sanitize(url)}"
        raise ConfigError(f"{given}, which {problem}: {remedy}, and name that set")
    return found


def stored_embeddings(config: RunConfig, facts: Mapping[str, Any]) -> Dataset | None:
    """The set of embeddings of a run with these facts, opened anew; None if it reads none.

    Raises DatasetError, which names it, unless it is the one that the driver opened.
    """
    if not config.embedding.url:
        return None
    found = open_dataset(config.embedding.url)
    if found.fingerprint != (wanted := facts[EMBEDDINGS_FINGERPRINT]):
        raise DatasetError(
            found.url,
            f"this is {named_set(found.fingerprint)}, and the run has {named_set(wanted)}",
            "put that one back, or start a run with another name=",
        )
    return found


def named_set(fingerprint: str) -> str:
    """The set of embeddings with this fingerprint, in words; empty: none."""
    return f"the set of embeddings {fingerprint[:12]}" if fingerprint else "no set of embeddings"


def _incompatibility(found: Dataset, dataset: Dataset, encoder_sha256: str, width: int) -> str:
    """The reason why `found` does not hold the embeddings of `dataset`; empty: it does."""
    held = found.manifest
    if held.codec != "embeddings":
        return f"holds {held.codec}, not embeddings"
    if held.encoder_sha256 != encoder_sha256:
        return (
            f"has embeddings of the encoder of sha256 {held.encoder_sha256[:12]}, and that of "
            f"embedding.encoder is {encoder_sha256[:12]}"
        )
    if held.embedding_width != width:
        return f"has embeddings of width {held.embedding_width}, not {width}"
    if (mine := found.images_fingerprint) != (wanted := dataset.images_fingerprint):
        return f"has embeddings of the images {mine[:12]}, and data.url those of {wanted[:12]}"
    if found.counts.tolist() != dataset.counts.tolist():
        return (
            f"has {counted(held.samples, 'sample')} in {counted(held.shards, 'shard')}, and "
            f"data.url {dataset.manifest.samples} in {dataset.manifest.shards}, of the same sizes"
        )
    return ""
