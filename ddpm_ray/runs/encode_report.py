"""The end of an encoding job: its result for JSON, and lines for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ddpm_ray.data import encoding_record
from ddpm_ray.data.manifest import ENCODED_BY, Manifest
from ddpm_ray.redaction import counted
from ddpm_ray.runs.encode import EncodeResult


def encoding_summary(result: EncodeResult) -> dict[str, Any]:
    """Return the result of an encoding job for JSON; None: unknown, or nothing was encoded."""
    cost = encoding_record.read_cost(result.dataset)
    manifest, record = result.dataset.manifest, encoding_record.read_encoding(result.dataset)
    network, preview = ENCODED_BY[manifest.codec], record.preview if record else None
    of_latents = {
        "latent_shape": list(manifest.latent_shape or ()),
        "views": list(manifest.views),
        "latent_mean": list(manifest.latent_mean),
        "latent_std": list(manifest.latent_std),
        "preview_r_squared": preview.r_squared if preview else None,
    }
    return {
        "destination": result.dataset.url,
        "codec": manifest.codec,
        "samples": manifest.samples,
        "shards": manifest.shards,
        "image_shape": list(manifest.image_shape),
        **(of_latents if manifest.codec == "latents" else _of_embeddings(manifest)),
        network: record.network if record else None,
        f"{network}_sha256": manifest.network_sha256,
        "core_seconds": cost.encoding if cost else None,
        f"{network}_core_seconds": cost.network if cost else None,
        "encoded": result.encoded,
        "seconds": round(result.seconds, 3),
        "images_per_second": result.images_per_second and round(result.images_per_second, 3),
        "fingerprint": result.dataset.fingerprint,
    }


def encoding_lines(result: EncodeResult) -> Iterator[str]:
    """Yield the last lines that an encoding job prints."""
    manifest, record = result.dataset.manifest, encoding_record.read_encoding(result.dataset)
    if record is not None and record.preview is not None:
        yield (
            f"preview: a linear map from latents to colours explains "
            f"{record.preview.r_squared:.0%} of the variance of mean colours"
        )
    if manifest.codec == "embeddings":
        found = _of_embeddings(manifest)
        yield (
            f"embeddings: root mean square length {found['embedding_length']:.3g}; length of their "
            f"mean {found['mean_embedding_length']:.3g}"
        )
        if constant := sum(std == 0 for std in manifest.embedding_std):
            yield f"embeddings: {counted(constant, 'dimension')} equal in all images"
        yield (
            f"encoded: {counted(manifest.samples, 'sample')}, images {manifest.image_shape}, "
            f"embeddings of width {manifest.embedding_width}"
        )
        return
    means, stds = (
        ", ".join(f"{value:.3g}" for value in values)
        for values in (manifest.latent_mean, manifest.latent_std)
    )
    yield f"latents per channel: mean {means}; standard deviation {stds}"
    yield (
        f"encoded: {counted(manifest.samples, 'sample')}, {' and '.join(manifest.views)}, images "
        f"{manifest.image_shape}, latents {manifest.latent_shape}"
    )


def _of_embeddings(manifest: Manifest) -> dict[str, Any]:
    """Width and lengths of embeddings; a mean as long as they are means that all are equal."""
    of_mean = sum(value**2 for value in manifest.embedding_mean)
    spread = sum(value**2 for value in manifest.embedding_std)
    return {
        "embedding_width": manifest.embedding_width,
        "embedding_length": math.sqrt(of_mean + spread),  # root mean square over the images
        "mean_embedding_length": math.sqrt(of_mean),
        "constant_dimensions": sum(std == 0 for std in manifest.embedding_std),
    }
