"""The models of a process that draws: loaded, their batch width measured, and warm."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.config.jobs.serve import ServeConfig
from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.redaction import counted
from ddpm_ray.runs.model_sources import ModelSources
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.drawing_model import DrawingModel
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.serving.batch_width import profiled_width
from ddpm_ray.serving.engine_settings import EngineSettings
from ddpm_ray.serving.image_service import ImageService, ServiceSettings
from ddpm_ray.serving.job_plans import RequestLimits
from ddpm_ray.serving.ray_serve.server_setup import ServerSetup
from ddpm_ray.serving.served_models import LoadedModel, ServedModels
from ddpm_ray.serving.shared_calls import (
    CallRows,
    NetworkCall,
    computed_rows,
    with_shared_networks,
)

log = logging.getLogger(__name__)


def engine_models(setup: ServerSetup) -> ServedModels:
    """Load the models of a server and warm them up."""
    config = setup.config
    device = "cuda" if config.replicas.gpus else "cpu"
    loader = ModelSources(Path(setup.home), setup.tracking_uri, device)
    batch = config.batch
    engine = EngineSettings(batch.width or 1, batch.exact, batch.max_images)

    def warm(served: LoadedModel) -> None:
        """Measure the width, if it is not given, and the rate of network calls."""
        _, known_rate = served.engine.load
        if not batch.width and not known_rate:  # later ones come while jobs run: not to be timed
            width = _profiled(served, batch.most_width)
            served.engine.settings = replace(served.engine.settings, width=width)
        count = served.engine.settings.width
        served.engine.submit(lambda: _drawn(served.model, count), images=count, cost=0).result()
        _, rate = served.engine.load
        rows = counted(served.engine.settings.width, "row")
        log.info(
            "%s: %s is loaded; %s a network call, %.4g rows a second",
            served.name,
            served.source,
            rows,
            rate,
        )

    return ServedModels(setup.uris, loader, engine, warm)


def engine_service(config: ServeConfig, models: ServedModels) -> ImageService:
    """The service of these models, with the configured limits."""
    limits = RequestLimits(config.limits.max_steps, config.limits.max_pixels)
    return ImageService(
        models, ServiceSettings(config.limits.max_queued_s, config.limits.max_job_s, limits)
    )


def _profiled(served: LoadedModel, most: int) -> int:
    """The width of the largest network call of the model."""
    calls: list[NetworkCall] = []

    def answer(network: Network, x_t: Tensor, t: Tensor, inputs: Conditioning) -> Tensor:
        """Note the call, and compute it."""
        calls.append(NetworkCall(network, x_t, t, inputs, 0.0))
        return network(x_t, t, inputs)

    _drawn(with_shared_networks(served.model, answer), 1)
    call = max(calls, key=lambda one: one.x_t.numel())

    def compute(rows: int) -> None:
        """A call of so many rows: copies of the first."""
        with torch.inference_mode():
            output = computed_rows([CallRows(call, 0, 1)], rows)[0]
            output.sum().item()  # on a GPU, waits for its end

    return profiled_width(compute, most).width


def _drawn(model: DrawingModel, count: int) -> Images:
    """Images of two steps, without a text."""
    takes_text = isinstance(model, Cascade) or model.denoiser.takes.tokenizer is not None
    prompts: dict[str, Any] = {"prompts": [""]} if takes_text else {}
    return model.sample(count, seed=0, steps=2, batch_size=count, **prompts)
