"""Runs small enough to be taken a hundred times, without a driver: no Ray, no MLflow, no disk.

Networks of some thousand weights for images of 8 x 8 x 3, and what a run needs beside them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.tiny_keys import AUTOENCODER, CONTRASTIVE, DENOISER, DIT, TINY
from ddpm_ray.assembly import diffusion, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data import shards
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset, write_index
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.manifest import Recipe, ShardRow
from ddpm_ray.reporting import Command, Progress, Row
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.divergence_guard import DivergenceGuard
from ddpm_ray.training.run import Run
from ddpm_ray.training.state import TrainingState

SIDE = 8
SHAPE = ImageShape(SIDE, SIDE, 3)


class SameImages:
    """An image stream of one batch, for ever."""

    waited_s = 0.0

    def __init__(self, count: int, side: int, text_length: int) -> None:
        tokens = torch.arange(count * text_length).reshape(count, text_length) % 99
        texts = tokens if text_length else None
        self._batch = Batch(pixels(count, side), torch.arange(count) % 4, tokens=texts)

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


def config_of(keys: list[str]) -> RunConfig:
    """A run of a tiny network, with `keys`; those of other tasks have their own sizes."""
    network = DIT if "model.network=dit" in keys else DENOISER
    network = [] if {AUTOENCODER[0], CONTRASTIVE[0]} & {*keys} else network
    return load_config(RunConfig, None, [*TINY, *network, *keys])


def run_of(
    config: RunConfig, device: torch.device, side: int = SIDE, url: str = "memory://none"
) -> Run:
    """One worker's run without a driver; its checkpoints lie below `url`."""
    workers, count = Workers(0, 1, device), config.training.global_batch_size
    facts = {"config": to_dict(config), "image_shape": [side, side, 3], "data_fingerprint": "none"}
    state = training_run.training_state(config, ImageShape(side, side, 3), device, facts)
    nothing: Callable[[int], None] = lambda step: None  # noqa: E731
    return Run(
        plan=training_run.plan(config, 1),
        state=state,
        network=state.network,
        objective=training_run.training_objective(config, state, device),
        guard=DivergenceGuard.of(config.training.on_divergence, config.training.spike_factor),
        stream=SameImages(count, side, config.text.length if config.takes_text else 0),
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


def denoiser_of(config: RunConfig, device: torch.device) -> tuple[TrainingState, Denoiser]:
    """A state and its averaged weights, ready to sample: random ones, none of them 0."""
    state = training_run.training_state(config, ImageShape(SIDE, SIDE, 3), device, {})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.ema.model.parameters():
            parameter.add_((0.02 * torch.randn(parameter.shape, generator=generator)).to(device))
    return state, diffusion.denoiser(config, state.ema.model, device, PIXELS)


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
