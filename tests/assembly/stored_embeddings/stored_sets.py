"""Options, data and starts of runs that read the embeddings of their images from a set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.image_encoders import settled_embedding
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.loader import ShardStream, read_images
from ddpm_ray.data.tokenized_stream import TokenizedStream
from ddpm_ray.runs.run_start import begin_run, settled_run
from tests.data.embedding_sets import embed_images, write_embeddings
from tests.data.latent_sets import TINY_UNET, encode_pixels
from tests.noise import pack
from tests.test_cascade_job import CONTRASTIVE, DIFFUSION, trained

CPU = torch.device("cpu")
IMAGES, SIDE = 23, 8
ROUNDING = 2.0**-12  # of float16, for values below 1
KINDS = ("pixels", "latents")


def write_pixels(folder: Path) -> None:
    """Images of large squares: an encoder with random weights gives them distinct embeddings."""
    drawn = np.random.default_rng(0).integers(0, 256, (IMAGES, 2, 2, 1)).astype(np.uint8)
    half = SIDE // 2
    pack(folder, drawn.repeat(half, 1).repeat(half, 2), [8, 8, 7])


def write_sets(root: Path) -> dict[str, str]:
    """Pixels, latents, two contrastive runs, and the embeddings that they give; their URLs."""
    write_pixels(root / "pixels")
    found = {"latents": encode_pixels(root, SIDE), "pixels": str(root / "pixels")}
    for number, name in enumerate(("encoder", "other encoder")):
        found[name] = trained(root / name, found["pixels"], *CONTRASTIVE, seed=number, std=1)
    found["embeddings"] = embed_images(found["pixels"], found["encoder"], root / "of encoder").url
    of_other = embed_images(found["pixels"], found["other encoder"], root / "of other")
    return found | {"of other encoder": of_other.url}


def embeddings_by_key(sets: dict[str, str]) -> dict[str, Tensor]:
    """The embedding of each image, by its key, as the encoder gives it in one batch."""
    keys = [f"{shard}-{row}" for shard, count in enumerate((8, 8, 7)) for row in range(count)]
    images = torch.cat([one.images for one in read_images(open_dataset(sets["pixels"]), range(3))])
    vectors = trained_encoders(sets["encoder"]).embed(PIXELS.encode(images))
    return dict(zip(keys, vectors, strict=True))


def trained_decoder(folder: Path, sets: dict[str, str]) -> str:
    """A run of a decoder of latents; its URL."""
    _, *keys = keys_of(sets, "latents")
    return trained(folder, sets["latents"], *keys)


def keys_of(sets: dict[str, str], kind: str, *overrides: str) -> list[str]:
    named = ("encoder", sets["encoder"]), ("url", sets["embeddings"])
    given = [f"embedding.{key}={value}" for key, value in named]
    return ["name=x", f"data.url={sets[kind]}", *TINY_UNET, *DIFFUSION, *given, *overrides]


def settled(keys: list[str]) -> tuple[RunConfig, Dataset, dict[str, Any]]:
    """Config, data and facts of a run, as its driver finds them."""
    config = load_config(RunConfig, None, keys)
    dataset = open_dataset(config.data.url)
    config, facts = settled_embedding(config, dataset)
    return config, dataset, facts


def opened(keys: list[str], workers: Workers) -> ShardStream | EmbeddedStream | TokenizedStream:
    config, dataset, facts = settled(keys)
    return training_run.stream_with_inputs(config, dataset, workers, facts)


def started(keys: list[str], folder: Path) -> dict[str, Any]:
    """Start the run in `folder` as a driver does; its facts."""
    config = load_config(RunConfig, None, keys)
    dataset = open_dataset(config.data.url)
    config, facts = settled_run(config, dataset, str(folder))
    begin_run(config, dataset, str(folder), encoder=facts)
    return facts


def again_embedded(sets: dict[str, str], folder: Path) -> str:
    """Another set of embeddings of the same images by the same encoder, to the last bit but one."""
    right = open_dataset(sets["embeddings"])
    (vectors,) = [torch.cat([one.images for one in read_images(right, range(3))]).numpy()]
    vectors[0, 0] += np.float16(2**-9)
    held = right.manifest.encoder_sha256, right.manifest.source_sha256
    return write_embeddings(folder, vectors, 8, encoder_sha256=held[0], source_sha256=held[1]).url
