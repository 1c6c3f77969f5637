"""Models of 8 x 8 grey pixels for tests of the web page, whose network calls can be held."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion import schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from tests.limits import ENDS_S

SCHEDULE = NoiseSchedule(schedules.cosine(40))
LABELS = ("dark", "medium", "bright")
SHAPE = ImageShape(8, 8, 1)


class Gate:
    """Lets network calls through: all, or so many."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._allowed: int | None = None
        self.calls = 0  # that were let through

    def open(self) -> None:
        """Let all calls through."""
        with self._changed:
            self._allowed = None
            self._changed.notify_all()

    def allow(self, calls: int) -> None:
        """Let so many calls through from now on."""
        with self._changed:
            self._allowed = calls
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until one more call is let through."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._allowed != 0, ENDS_S)
            self.calls += 1
            if self._allowed is not None:
                self._allowed -= 1


class MeanEmbedder:
    """Embeds an image as its mean."""

    width = 1

    def embed(self, x_0: Tensor) -> Tensor:
        return x_0.mean((1, 2, 3))[:, None]


class PageModels:
    """A model of three classes, and one of texts that also draws variations."""

    def __init__(self) -> None:
        self.gate = Gate()
        settings = SamplingSettings(steps=6)
        classes = ConditioningSpec(num_classes=len(LABELS))
        tokenizer = Tokenizer.trained([*LABELS] * 9, 300, 4)
        texts = ConditioningSpec(tokenizer=tokenizer, image_encoder=MeanEmbedder())
        model = TrainedModel(
            Denoiser(self._noise, Parameterization.of("epsilon", SCHEDULE), takes=classes),
            SHAPE,
            provenance={},
            settings=settings,
            find_label_names=lambda: LABELS,
        )
        self.models = {
            "classes": model,
            "texts": replace(
                model,
                denoiser=replace(model.denoiser, takes=texts),
                find_label_names=lambda: None,
            ),
        }

    def _noise(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """E[epsilon | x_t] where pixels are N(mean of the condition, 0.3^2)."""
        self.gate.wait()
        mean = torch.tensor(_means(conditioning, len(x_t))).view(-1, 1, 1, 1)
        a = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1)
        noise = (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * 0.3**2 + 1 - a)
        return noise.to(x_t)


def _means(conditioning: Conditioning, count: int) -> Sequence[float]:
    if conditioning.labels is not None:
        return [(label - 1) / 2 for label in conditioning.labels.tolist()]
    if conditioning.tokens is not None:
        return [sum(row) % 7 / 7 - 0.5 for row in conditioning.tokens.tolist()]
    return [0.0] * count
