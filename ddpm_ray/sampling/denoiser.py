"""A trained network with its parameterization, and its conditioning inputs.

Samplers and losses call denoise(x_t, t). `Denoiser` binds the conditioning, with guidance, the last
estimate of x_0 (self-conditioning) and input scaling.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.choices import ModelVariance
from ddpm_ray.config.sampling import SampledModel
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning, Network
from ddpm_ray.diffusion.guidance import classifier_free
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.x0_estimator import Clip, X0Estimator, self_conditioning_estimate
from ddpm_ray.sampling.conditioning import NO_CONDITIONING, ConditioningSpec, SampleInputs

GuidanceModel: TypeAlias = Callable[[Denoise, Conditioning], Denoise]
"""(denoise, conditioning) -> denoise guided by another network; see guidance_models.py."""


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance; see guidance.classifier_free."""

    scale: float = 1.0
    rescale: float = 0.0
    above_sigma: float = 0.0
    below_sigma: float = 0.0  # 0: no upper limit
    negative_prompt: str = ""  # empty: no text

    @property
    def interval(self) -> tuple[float, float] | None:
        """The sigmas (low, high) between which guidance is applied; None: everywhere."""
        if not (self.above_sigma or self.below_sigma):
            return None
        return self.above_sigma, self.below_sigma or float("inf")

    def facts(self) -> dict[str, Any]:
        """The settings as plain JSON; without a negative prompt, as earlier versions stored."""
        held = vars(self)
        return held if self.negative_prompt else {k: v for k, v in held.items() if v != ""}


UNGUIDED = Guidance()


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A trained network, its parameterization and the conditioning that it takes."""

    network: Network
    parameterization: Parameterization
    variance: ModelVariance = "fixed"  # of the model output
    takes: ConditioningSpec = NO_CONDITIONING
    low_resolution_images: Tensor | None = None  # [M, C, H, W]: image i takes i % M
    embeddings: Tensor | None = None  # [M, D], of images: image i takes i % M
    guidance_model: GuidanceModel | None = None
    guidance_classes: int = 0  # number of labels that the guidance classifier knows; 0: unknown
    codec: Codec = PIXELS

    @classmethod
    def of_noise(cls, denoise: Denoise, schedule: NoiseSchedule) -> "Denoiser":
        """The denoiser of a callable that predicts the noise from x_t and t alone."""
        return cls(
            lambda x_t, t, conditioning: denoise(x_t, t),
            Parameterization.of("epsilon", schedule),
        )

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the parameterization."""
        return self.parameterization.schedule

    def sampled_model(
        self, drops_labels: bool, guided_by_model: bool | None = None
    ) -> SampledModel:
        """The facts that sampling settings depend on; None: guided if `guidance_model` is set."""
        guided = self.guidance_model is not None if guided_by_model is None else guided_by_model
        return SampledModel(
            self.schedule.num_steps,
            self.takes.num_classes,
            drops_labels,
            self.variance != "fixed",
            guided,
            self.guidance_classes,
            has_range=self.codec.clip() is not None,
            takes_text=self.takes.tokenizer is not None,
            takes_embedding=self.takes.image_encoder is not None,
        )

    def conditioning(
        self, index: Tensor, labels: Sequence[int] = (), prompts: Sequence[str] = ()
    ) -> Conditioning:
        """The conditioning of the samples `index` [B]; see SampleInputs."""
        inputs = SampleInputs(labels, prompts, self.low_resolution_images, self.embeddings)
        return self.takes.of_samples(index, inputs)

    def model_output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The output of the network for x_t, after input scaling."""
        conditioning = self.takes.completed(conditioning, x_t)
        return self.network(self.parameterization.scaled(x_t, t), t, conditioning)

    def bind_conditioning(
        self,
        conditioning: Conditioning = UNCONDITIONAL,
        guidance: Guidance = UNGUIDED,
    ) -> Denoise:
        """Return denoise(x_t, t) with `conditioning` bound, for its batch of images.

        With a learned variance the output is [B, 2C, H, W]. Use the result for one sampling run
        only: with self-conditioning it remembers the last estimate of x_0. Raises ValueError for
        conditioning that the network was not trained with.
        """
        takes, guidance_model = self.takes, self.guidance_model
        if bool(takes.low_resolution_pixels) != (conditioning.low_resolution is not None):
            raise ValueError(
                f"this model is {'' if takes.low_resolution_pixels else 'not '}for "
                "super-resolution (objective.low_resolution_pixels): give low-resolution images to "
                "such models, and only to them"
            )
        if conditioning.known is not None and not takes.known_pixels:
            raise ValueError(
                "this model was not trained to see known pixels (objective.inpainting_masks): give "
                "them to such models only, or inpaint with method='repaint'"
            )
        stray = conditioning.labels is not None and guidance_model is None
        unguided = guidance.scale == 1 or bool(takes.tokenizer or takes.image_encoder)
        if takes.num_classes == 0 and (stray or not unguided):
            raise ValueError(
                f"labels and guidance_scale {guidance.scale:g} are for models trained with labels; "
                "this one was not: leave both out"
            )
        taken, null = takes.taken(conditioning), None
        if guidance.negative_prompt:
            null = takes.with_negative_prompt(taken.null(), guidance.negative_prompt)
        of = self if takes.tokenizer is None else replace(self, network=_EncodedOnce(self.network))
        denoise = classifier_free(
            _SelfConditioned(of) if takes.self_conditioning else of.model_output,
            taken,
            guidance.scale,
            rescale=guidance.rescale,
            interval=guidance.interval,
            parameterization=self.parameterization,
            null=null,
        )
        return denoise if guidance_model is None else guidance_model(denoise, conditioning)

    def unguided(self, conditioning: Conditioning = UNCONDITIONAL) -> Denoise:
        """Return denoise(x_t, t) of the network itself, for bits per dimension and likelihoods.

        It depends on x_t, t and the part of `conditioning` that the network takes. There is no
        `guidance_model`. The self-conditioning input is 0 in every call: an estimate from an
        earlier call would make the output depend on the path to x_t, or reveal x_0.
        """
        own, taken = replace(self, guidance_model=None), self.takes.taken(conditioning)
        return lambda x_t, t: own.bind_conditioning(taken)(x_t, t)

    def noise(self, conditioning: Conditioning = UNCONDITIONAL) -> Denoise:
        """Return denoise(x_t, t) that predicts the noise, whatever the parameterization."""
        denoise = self.without_variance(self.bind_conditioning(conditioning))
        return lambda x_t, t: self.parameterization.noise(x_t, t, denoise(x_t, t))

    def without_variance(self, denoise: Denoise) -> Denoise:
        """`denoise` without the channels of a learned variance."""
        return denoise if self.variance == "fixed" else lambda x, t: denoise(x, t).chunk(2, 1)[0]

    def estimator(self, denoise: Denoise, clip: Clip | None) -> X0Estimator:
        """The samplers' estimator of x_0; `denoise` is this denoiser with its inputs bound."""
        return X0Estimator(self.schedule, denoise, self.parameterization, clip)


class _EncodedOnce:
    """A network whose texts are encoded at the first call with each conditioning, not at each step.

    A sampling run has two: with guidance and, outside of its interval, without.
    """

    def __init__(self, network: Network) -> None:
        self._network, self._text = network, getattr(network, "text", None)
        self._encoded: deque[tuple[Conditioning, Conditioning]] = deque(maxlen=2)

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        if self._text is None or conditioning.tokens is None:
            return self._network(x_t, t, conditioning)
        tokens = conditioning.tokens
        found = next((made for seen, made in self._encoded if seen.tokens is tokens), None)
        if found is None:
            found = self._text.encoded(conditioning)
            self._encoded.append((conditioning, found))
        encoded = replace(
            conditioning,
            tokens=None,
            text_states=found.text_states,
            text_pooled=found.text_pooled,
        )
        return self._network(x_t, t, encoded)


class _SelfConditioned:
    """The network with its estimate of x_0 from the previous call as an input, 0 at first.

    Classifier-free guidance passes each image twice; each of the two keeps its own estimate.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._estimate: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        of, estimate = self._denoiser, self._estimate
        if estimate is None:
            estimate = torch.zeros_like(x_t)
        conditioning = replace(conditioning, estimate=_as_many(estimate, len(x_t)))
        model_output = of.model_output(x_t, t, conditioning)
        self._estimate = self_conditioning_estimate(
            of.parameterization, x_t, t, model_output, of.codec.clip()
        )
        return model_output


def _as_many(images: Tensor, count: int) -> Tensor:
    """Repeat or cut images to `count`: outside its interval guidance passes each image once."""
    return images[:count] if len(images) >= count else images.repeat(count // len(images), 1, 1, 1)
