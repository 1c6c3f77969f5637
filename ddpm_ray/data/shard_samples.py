"""Copy samples out of a shard in memory: pixels, latents, embeddings, or files to decode."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from ddpm_ray.data.dataset import Dataset, DatasetError, UInt8s
from ddpm_ray.data.image_decoders import DecoderDiedError, ImageDecoders, UndecodableError
from ddpm_ray.data.latent_sums import Float16s
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.shards import Latents, Shard
from ddpm_ray.data.shuffle_order import Int64s


def image_decoders(manifest: Manifest) -> ImageDecoders:
    """Return decoders for `gather`: as many as torch has threads.

    These are cluster.cpus_per_worker in a run, all cores in a notebook.
    """
    return ImageDecoders(manifest.encoding, manifest.image_shape, torch.get_num_threads())


def sample_views(
    shard: Shard, rows: Int64s, dataset: Dataset, decoders: ImageDecoders, max_held_bytes: int
) -> list[UInt8s]:
    """Return the bytes of the samples of these rows, [sample_bytes] each.

    Of raw pixels and embeddings they are views of the shard, which then stays in memory, if it has
    at most `max_held_bytes` or the rows are at least half of it; others are copied or decoded. At
    most the larger of `max_held_bytes` and twice the samples is kept so. Raises the errors of
    `gather`.
    """
    if isinstance(shard.images, np.ndarray) and (
        shard.images.nbytes <= max_held_bytes or 2 * len(rows) >= len(shard)
    ):
        return list(map(_bytes_of(shard.images).__getitem__, rows.tolist()))
    samples = np.empty((len(rows), dataset.manifest.sample_bytes), dtype=np.uint8)
    gather(shard, rows, samples, dataset, decoders)
    return list(samples)


def gather(
    shard: Shard, rows: Int64s, out: UInt8s, dataset: Dataset, decoders: ImageDecoders
) -> None:
    """Copy the samples of these rows of a shard into `out` [rows, sample_bytes].

    Raises DatasetError for an image that cannot be decoded, DecoderDiedError.
    """
    if isinstance(shard.images, Latents):
        halves = out.view(np.float16).reshape(len(rows), 2, -1)
        for half, values in enumerate(shard.images):
            halves[:, half] = values.reshape(len(shard), -1)[rows]
        return
    if isinstance(shard.images, np.ndarray):
        # The rows are in range; mode="clip" avoids the buffer of the default mode.
        np.take(_bytes_of(shard.images), rows, axis=0, out=out, mode="clip")
        return
    files: pa.BinaryArray = shard.images

    def name(at: int) -> str:
        """Return the data set and key of the image of a row."""
        return f"{dataset.url}: {shard.keys[int(rows[at])]}"

    try:
        decoders.decode([files[row].as_buffer() for row in rows.tolist()], out)
    except UndecodableError as error:  # permanent: a restarted worker would fail again
        at, problem, remedy = error.args
        raise DatasetError(name(at), problem, remedy) from None
    except DecoderDiedError as error:
        raise DecoderDiedError(name(error.args[0]), *error.args[1:]) from None


def _bytes_of(values: UInt8s | Float16s) -> UInt8s:
    """View an array [n, ...] as the bytes of each row, [n, bytes]."""
    return values.reshape(len(values), -1).view(np.uint8)
