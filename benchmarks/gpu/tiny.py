"""Runs small enough to be taken a hundred times, without a driver: no Ray, no MLflow, no disk.

Networks of some thousand weights for images of 8 x 8 x 3, and what a run needs beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.tiny_keys import AUTOENCODER, CONTRASTIVE, DENOISER, DIT, PRIOR, TINY
from ddpm_ray.assembly import diffusion, networks, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data import shards
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.dataset import Dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.reporting import Command, Progress, Row
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.divergence_guard import DivergenceGuard
from ddpm_ray.training.run import Run, TrainingObjective
from ddpm_ray.training.state import TrainingState

SIDE = 8
WIDTH = 8  # of embeddings
CHANNELS = 4  # of latents, at half the side
SHAPE = ImageShape(SIDE, SIDE, 3)


class SameImages:
    """An image stream of one batch, for ever."""

    waited_s = 0.0

    def __init__(self, config: RunConfig, side: int) -> None:
        count, length = config.training.global_batch_size, config.text.length
        tokens = torch.arange(count * length).reshape(count, length) % 99
        vectors = embeddings(count, config.embedding.width)
        self._batch = Batch(
            stored(config.data.url, count, side),
            torch.arange(count) % 4,
            tokens=tokens if config.takes_text else None,
            embeddings=vectors if config.embedding.url else None,
        )

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        return self._batch

    def keys(self, step: int) -> list[str]:
        return [f"image {i}" for i in range(len(self._batch.images))]

    def close(self) -> None: ...


@dataclass
class Notes:
    """A sink that keeps rows and forgets the rest."""

    taken: list[Row] = field(default_factory=list)

    def rows(self, rows: list[Row]) -> None:
        self.taken.extend(rows)

    def image(self, key: str, step: int, image: Any) -> None: ...

    def document(self, path: str, content: dict[str, Any]) -> None: ...

    def unsent(self) -> list[Row]:
        return []

    def close(self, patience_s: float) -> int:
        return 0


def pixels(count: int, side: int = SIDE) -> Tensor:
    """Noise, uint8 [count, side, side, 3]: the same at each call."""
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    )


def embeddings(count: int, width: int) -> Tensor:
    """Vectors of length 1, float16 [count, width]: the same at each call."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=1).half()


def stored(kind: str, count: int, side: int = SIDE) -> Tensor:
    """The contents of shards of that kind, for `count` images: pixels, latents or embeddings."""
    if kind == "embeddings":
        return embeddings(count, WIDTH)
    if kind == "latents":
        shape = count, 2, 2, CHANNELS, side // 2, side // 2  # mean and log variance, two views
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    return pixels(count, side)


def facts_of(kind: str) -> dict[str, Any]:
    """The facts of a run on data of that kind that say what it diffuses."""
    network = {"url": "none", "sha256": "0"}
    if kind == "embeddings":
        held = {"width": WIDTH, "mean": [0.1] * WIDTH, "std": [0.5] * WIDTH}
        return {"codec": kind, "embeddings": held, "image_encoder": network}
    if kind == "latents":
        scale = {"mean": [0.1] * CHANNELS, "std": [1.0] * CHANNELS}
        held = {"channels": CHANNELS, "factor": 2, "views": ["plain", "flipped"], **scale}
        return {"codec": kind, "latents": held, "autoencoder": network}
    return {}


def diffused(kind: str, side: int = SIDE) -> ImageShape:
    """The shape (h, w, c) of what a network of data of that kind sees."""
    shapes = {
        "embeddings": ImageShape(1, 1, WIDTH),
        "latents": ImageShape(side // 2, side // 2, CHANNELS),
    }
    return shapes.get(kind, ImageShape(side, side, 3))


def config_of(keys: list[str]) -> RunConfig:
    """A run of a tiny network, with `keys`; those of other tasks have their own sizes."""
    network = DIT if "model.network=dit" in keys else DENOISER
    network = [] if {AUTOENCODER[0], CONTRASTIVE[0], PRIOR[0]} & {*keys} else network
    return load_config(RunConfig, None, [*TINY, *network, *keys])


def run_of(
    config: RunConfig, device: torch.device, side: int = SIDE, url: str = "memory://none"
) -> Run:
    """One worker's run without a driver; its checkpoints lie below `url`."""
    workers, kind = Workers(0, 1, device), config.data.url
    facts = {"config": to_dict(config), "image_shape": [side, side, 3], "data_fingerprint": "none"}
    state = training_run.training_state(
        config, diffused(kind, side), device, facts | facts_of(kind)
    )
    nothing: Callable[[int], None] = lambda step: None  # noqa: E731
    return Run(
        plan=training_run.plan(config, 1),
        state=state,
        network=state.network,
        objective=objective_of(config, state, device),
        guard=DivergenceGuard.of(config.training.on_divergence, config.training.spike_factor),
        stream=SameImages(config, side),
        workers=workers,
        log=training_run.step_log(config, ImageShape(side, side, 3), workers),
        checkpoints=CheckpointWriter(CheckpointStore(url)),
        sink=Notes(),
        show_progress=_watch,
        draw_grid=nothing,
        draw_strip=nothing,
        evaluate=nothing,
        validate=nothing,
    )


def objective_of(
    config: RunConfig, state: TrainingState, device: torch.device
) -> TrainingObjective:
    """The objective of `state`, which is given its tokens and embeddings."""
    if not (config.traits.has_noise and (config.takes_text or config.embedding.encoder)):
        return training_run.training_objective(config, state, device)
    objective = diffusion.objective(config, state, device)
    return replace(objective, noising=replace(objective.noising, takes=takes_of(config, device)))


def takes_of(config: RunConfig, device: torch.device) -> ConditioningSpec:
    """The conditioning of a network, with a tokenizer and an image encoder if it needs any."""
    tokenizer = WORDS if config.takes_text else None
    encoder = encoders(device) if config.embedding.encoder else None
    return diffusion.conditioning_spec(config, tokenizer, encoder)


def encoders(device: torch.device) -> TrainedEncoders:
    """An image and a text encoder with random weights."""
    torch.manual_seed(0)
    network = networks.network(config_of(CONTRASTIVE), SHAPE).to(device)
    assert isinstance(network, ContrastiveEncoders)
    return TrainedEncoders(network.eval().requires_grad_(False), WORDS, SHAPE, "none", "0")


class Words:
    """A tokenizer of words that needs no library: the token of a word is a number below 99."""

    length = 6
    vocabulary = 99
    end_token = 1
    null_tokens = (0, 1, 1, 1, 1, 1)
    sha256 = "0"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 [n, length] of the texts."""
        rows = [[0, *(2 + len(word) % 97 for word in text.split())][:5] for text in texts]
        return torch.tensor([row + [1] * (self.length - len(row)) for row in rows])

    def too_long(self, texts: Sequence[str]) -> list[tuple[str, int]]:
        """No text: none of these cases has a long one."""
        return []


WORDS = cast(Tokenizer, Words())


def denoiser_of(
    config: RunConfig, device: torch.device, codec: Codec = PIXELS
) -> tuple[TrainingState, Denoiser]:
    """A state and its averaged weights, ready to sample: random ones, none of them 0."""
    kind = config.data.url
    state = training_run.training_state(config, diffused(kind), device, facts_of(kind))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.ema.model.parameters():
            parameter.add_((0.02 * torch.randn(parameter.shape, generator=generator)).to(device))
    of = diffusion.denoiser(config, state.ema.model, device, codec)
    return state, replace(of, takes=takes_of(config, device))


def packed(folder: str) -> Dataset:
    """24 images in two shards below `folder`."""
    images, rows = pixels(24).numpy(), []
    for number in range(2):
        part, name = images[12 * number : 12 * (number + 1)], shards.shard_name(number)
        data = shards.shard_bytes(part, [i % 4 for i in range(12)], [str(i) for i in range(12)])
        Path(folder, name).write_bytes(data)
        sums = shards.pixel_sums(part)
        rows.append(ShardRow(name, 12, len(data), sha256(data).hexdigest(), *sums))
    recipe = Recipe(
        image_shape=ImageShape(SIDE, SIDE, 3),
        encoding="raw",
        resize="none",
        label_names=(),
        source_sha256="",
    )
    return write_index(folder, recipe, rows)


def _watch(progress: Progress) -> Command:
    return Command.NONE
