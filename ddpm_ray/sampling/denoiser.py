"""A trained network with its parameterization, and its conditioning inputs.

Samplers and losses call denoise(x_t, t). `Denoiser` binds all other inputs of the network: labels
with guidance, the last estimate of x_0 (self-conditioning), a low-resolution image, input scaling.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from ddpm_ray.choices import ModelVariance
from ddpm_ray.diffusion.guidance import classifier_free, or_null
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule

Network: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(x_t [B, C, H, W], t [B], labels [B] or None, condition [B, ., H, W] or None) -> model output."""
GuidanceModel: TypeAlias = Callable[[Denoise, Tensor | None], Denoise]
"""(denoise, labels [B] or None) -> denoise guided by another network; see guidance_models.py."""


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance; see guidance.classifier_free."""

    scale: float = 1.0
    rescale: float = 0.0
    above_sigma: float = 0.0
    below_sigma: float = 0.0  # 0: no upper limit

    @property
    def interval(self) -> tuple[float, float] | None:
        """The sigmas (low, high) between which guidance is applied; None: everywhere."""
        if not (self.above_sigma or self.below_sigma):
            return None
        return self.above_sigma, self.below_sigma or float("inf")


UNGUIDED = Guidance()


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A trained network, its parameterization and the conditioning inputs that it takes."""

    network: Network
    parameterization: Parameterization
    variance: ModelVariance = "fixed"  # of the model output
    num_classes: int = 0
    self_conditioned: bool = False
    low_resolution_pixels: int = 0  # side of the low-resolution input; 0: no super-resolution
    low_resolution_images: Tensor | None = None  # [M, C, H, W]: image i takes i % M
    guidance_model: GuidanceModel | None = None
    guidance_classes: int = 0  # number of labels that the guidance classifier knows; 0: unknown

    @classmethod
    def of_noise(cls, denoise: Denoise, schedule: NoiseSchedule) -> "Denoiser":
        """The denoiser of a callable that predicts the noise from x_t and t alone."""
        return cls(
            lambda x_t, t, labels, condition: denoise(x_t, t),
            Parameterization.of("epsilon", schedule),
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the parameterization."""
        return self.parameterization.schedule

    def bind_conditioning(
        self,
        labels: Tensor | None = None,
        guidance: Guidance = UNGUIDED,
        low_resolution: Tensor | None = None,
    ) -> Denoise:
        """Return denoise(x_t, t) with `labels` [B] and `low_resolution` [B, C, H, W] bound.

        A label of -1 means no label and becomes the null label, as in training. With a learned
        variance the output is [B, 2C, H, W]. Use the result for one sampling run only: with
        self-conditioning it remembers the last estimate of x_0. Raises ValueError for inputs that
        the network was not trained with.
        """
        if bool(self.low_resolution_pixels) != (low_resolution is not None):
            raise ValueError(
                f"this model is {'' if self.low_resolution_pixels else 'not '}for super-resolution "
                "(objective.low_resolution_pixels): give low-resolution images to such models, "
                "and only to them"
            )
        guidance_model, known = self.guidance_model, labels if self.num_classes else None
        stray = labels is not None and known is None and guidance_model is None
        if stray or (self.num_classes == 0 and guidance.scale != 1):
            raise ValueError(
                f"labels and guidance_scale {guidance.scale:g} are for models trained with labels; "
                "this one was not: leave both out"
            )
        network = _ConditionedNetwork(self, low_resolution)
        if known is None:
            denoise: Denoise = lambda x_t, t: network(x_t, t, None)  # noqa: E731
        else:
            denoise = classifier_free(
                network,
                or_null(known, self.num_classes),
                self.num_classes,
                guidance.scale,
                rescale=guidance.rescale,
                interval=guidance.interval,
                parameterization=self.parameterization,
            )
        return denoise if guidance_model is None else guidance_model(denoise, labels)

    def unguided(self, labels: Tensor | None = None) -> Denoise:
        """Return denoise(x_t, t) of the network itself, for bits per dimension and likelihoods.

        It depends on x_t, t and `labels` [B] only. `guidance_model` is ignored, and so are `labels`
        if the network has no classes. The self-conditioning input is 0 in every call: an estimate
        from an earlier call would make the output depend on the path to x_t, or reveal x_0.
        """
        own, known = replace(self, guidance_model=None), labels if self.num_classes else None
        return lambda x_t, t: own.bind_conditioning(known)(x_t, t)

    def low_resolution_of(self, index: Tensor) -> Tensor | None:
        """The low-resolution inputs [B, C, H, W] of the images `index` [B]; None without any."""
        images = self.low_resolution_images
        return None if images is None else images[index.to(images.device) % len(images)]

    def noise(self, labels: Tensor | None = None, low_resolution: Tensor | None = None) -> Denoise:
        """Return denoise(x_t, t) that predicts the noise, whatever the parameterization."""
        denoise = self.without_variance(self.bind_conditioning(labels, UNGUIDED, low_resolution))
        return lambda x_t, t: self.parameterization.noise(x_t, t, denoise(x_t, t))

    def without_variance(self, denoise: Denoise) -> Denoise:
        """`denoise` without the channels of a learned variance."""
        return denoise if self.variance == "fixed" else lambda x, t: denoise(x, t).chunk(2, 1)[0]


class _ConditionedNetwork:
    """The network with its conditioning inputs bound: a function of (x_t, t, labels)."""

    def __init__(self, denoiser: Denoiser, low_resolution: Tensor | None) -> None:
        self._denoiser, self._low_resolution = denoiser, low_resolution
        self._estimate: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        of, conditioning = self._denoiser, []
        if of.self_conditioned:
            conditioning.append(self._last(x_t))
        if self._low_resolution is not None:
            conditioning.append(_as_many(self._low_resolution, len(x_t)))
        condition = torch.cat(conditioning, 1) if conditioning else None
        model_output = of.network(of.parameterization.scaled(x_t, t), t, labels, condition)
        if of.self_conditioned:
            mean = model_output if of.variance == "fixed" else model_output.chunk(2, 1)[0]
            self._estimate = of.parameterization.x_0(x_t, t, mean).detach().clamp_(-1, 1)
        return model_output

    def _last(self, x_t: Tensor) -> Tensor:
        if self._estimate is None:
            self._estimate = torch.zeros_like(x_t)
        return _as_many(self._estimate, len(x_t))


def _as_many(images: Tensor, count: int) -> Tensor:
    """Repeat or cut images to `count`: classifier-free guidance passes each image twice."""
    return images[:count] if len(images) >= count else images.repeat(count // len(images), 1, 1, 1)
