"""A network together with what its answers mean, and the denoiser it is for images of given labels.

Samplers and losses know one callable, denoise(x_t, t). Whatever else a network wants beside x_t is
bound here: labels and their guidance, its own last estimate, an image of lower resolution, the
scale of its input.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.diffusion.guidance import classifier_free, or_null
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule

Network: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""(x_t [B, C, H, W], t [B], labels [B] or None, condition [B, ., H, W] or None) -> the answer."""
GuidanceModel: TypeAlias = Callable[[Denoise, Tensor | None], Denoise]
"""(denoise, labels [B] or None) -> denoise as another network bends it; see leading.py."""


@dataclass(frozen=True)
class Guidance:
    """How strongly samples are drawn towards their labels; see guidance.classifier_free."""

    scale: float = 1.0
    rescale: float = 0.0
    above_sigma: float = 0.0
    below_sigma: float = 0.0  # 0: no end

    @property
    def interval(self) -> tuple[float, float] | None:
        """The noise levels at which it is felt; None: at all of them."""
        if not (self.above_sigma or self.below_sigma):
            return None
        return self.above_sigma, self.below_sigma or float("inf")


UNGUIDED = Guidance()


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A trained network, what it predicts, and what it must be told."""

    network: Network
    parameterization: Parameterization
    variance: Literal["fixed", "learned", "learned_range"] = "fixed"  # what it answers beside
    num_classes: int = 0
    self_conditioned: bool = False
    low_resolution_pixels: int = 0  # of what a network for super-resolution sees; 0: it sees none
    low_resolution_images: Tensor | None = None  # [M, C, H, W]: that of image i is the one at i % M
    guidance_model: GuidanceModel | None = None
    guidance_classes: int = (
        0  # labels that `guidance_model` knows, of a network that knows none; 0: not said
    )

    @classmethod
    def of_noise(cls, denoise: Denoise, schedule: NoiseSchedule) -> "Denoiser":
        """Of a callable that predicts the noise and wants x_t and t alone."""
        return cls(
            lambda x_t, t, labels, condition: denoise(x_t, t),
            Parameterization.of("epsilon", schedule),
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """That of what it predicts."""
        return self.parameterization.schedule

    def bind_conditioning(
        self,
        labels: Tensor | None = None,
        guidance: Guidance = UNGUIDED,
        low_resolution: Tensor | None = None,
    ) -> Denoise:
        """denoise(x_t, t) for images of these `labels` [B], where the network knows labels.

        A label of -1 is none: the network is told its null label, as in training.
        `low_resolution` [B, C, H, W] is what a network for super-resolution sees. It answers with
        the variance behind where one is learned. Made for one walk: a self-conditioned network
        remembers its last estimate. Raises ValueError for labels that it was not trained with.
        """
        if bool(self.low_resolution_pixels) != (low_resolution is not None):
            raise ValueError(
                f"this model is {'' if self.low_resolution_pixels else 'not '}for super-resolution "
                "(objective.low_resolution_pixels): give images of low resolution to such models, "
                "and to them alone"
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
        """denoise(x_t, t), a function of (x_t, t) and `labels` [B] alone, of the network itself.

        What bits and likelihoods are taken of. `guidance_model` is left out, and `labels` where the
        network knows none. A self-conditioned network is shown the estimate 0 in every call: the
        one of the call before would make the answer depend on the way to x_t, or give x_0 away.
        """
        own, known = replace(self, guidance_model=None), labels if self.num_classes else None
        return lambda x_t, t: own.bind_conditioning(known)(x_t, t)

    def low_resolution_of(self, index: Tensor) -> Tensor | None:
        """What it is shown at low resolution for the images `index` [B]."""
        return (
            None
            if self.low_resolution_images is None
            else self.low_resolution_images[
                index.to(self.low_resolution_images.device) % len(self.low_resolution_images)
            ]
        )

    def noise(self, labels: Tensor | None = None, low_resolution: Tensor | None = None) -> Denoise:
        """What it thinks of the noise in x_t [B, ...], whatever it predicts."""
        denoise = self.without_variance(self.bind_conditioning(labels, UNGUIDED, low_resolution))
        return lambda x_t, t: self.parameterization.noise(x_t, t, denoise(x_t, t))

    def without_variance(self, denoise: Denoise) -> Denoise:
        """`denoise` without the learned variance that this network answers behind."""
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
    """The images, repeated or cut to `count`: guidance shows each of them twice."""
    return images[:count] if len(images) >= count else images.repeat(count // len(images), 1, 1, 1)
