"""Small sets of embeddings with chosen values."""

import hashlib
from pathlib import Path

import numpy as np

from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.config.jobs.encode import EncodeConfig
from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, open_dataset, write_index
from ddpm_ray.data.embedding_sums import embedding_sums
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_sums import Float16s
from ddpm_ray.data.manifest import EmbeddingShardRow, Recipe
from ddpm_ray.data.packing import encoded_packer
from ddpm_ray.data.packing.embedding_encoder import EmbeddingEncoder


def random_embeddings(samples: int, width: int = 5, seed: int = 0) -> Float16s:
    """Embeddings [samples, width] of length 1, with another mean in each dimension."""
    drawn = np.random.default_rng(seed).standard_normal((samples, width)) + np.arange(width)
    unit: Float16s = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float16)
    return unit


def embed_images(url: str, encoders: str, folder: Path) -> Dataset:
    """Embed the set of pixels at `url` by the run `encoders`, as `ddpm-ray encode` does."""
    encoder = EmbeddingEncoder(trained_encoders(encoders))
    plan = encoded_packer.make_encoding_plan(
        open_dataset(url), str(folder), encoder, EncodeConfig()
    )
    encoded = [encoded_packer.encode_shard(plan, n, encoder) for n in range(plan.shards)]
    return encoded_packer.finish_encoded(plan, encoded)


def write_embeddings(
    folder: Path,
    embeddings: Float16s,
    shard_samples: int,
    *,
    captioned: bool = False,
    encoder_sha256: str = "b" * 64,
    source_sha256: str = "0" * 64,
) -> Dataset:
    """Write a set of embeddings of images of 4 x 8; sample n has label n % 7, caption `n`."""
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(embeddings), shard_samples)):
        part, name = embeddings[start : start + shard_samples], shards.shard_name(number)
        numbers = range(start, start + len(part))
        texts = [[str(n)] for n in numbers] if captioned else None
        keys = [f"n-{n}" for n in numbers]
        data = shards.shard_bytes(part, [n % 7 for n in numbers], keys, texts)
        (folder / name).write_bytes(data)
        digest, sums = hashlib.sha256(data).hexdigest(), embedding_sums(part)
        count = len(part) if captioned else 0
        row = EmbeddingShardRow(name, len(part), len(data), digest, [9], [9], *sums, captions=count)
        rows.append(row)
    recipe = Recipe(
        ImageShape(4, 8, 1),
        "raw",
        "none",
        tuple("abcdefg"),
        source_sha256,
        codec="embeddings",
        embedding_width=embeddings.shape[1],
        encoder_sha256=encoder_sha256,
        captioned=captioned,
    )
    return write_index(str(folder), recipe, rows)
