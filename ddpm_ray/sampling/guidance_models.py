"""Other networks that lead samples: a weaker model to keep away from, a classifier to please."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ddpm_ray.diffusion.guidance import autoguided, classifier_guided
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.sampling.denoiser import Denoiser, GuidanceModel


def autoguidance(strong: Denoiser, weak: Denoiser, scale: float) -> GuidanceModel:
    """Away from `weak`, a worse model of the same data (Karras et al. 2024, arXiv:2406.02507).

    Raises ValueError where the two do not answer alike: predict the same under the same schedule.
    """
    same = torch.equal(strong.schedule.alpha_bar, weak.schedule.alpha_bar) and torch.equal(
        strong.parameterization.u, weak.parameterization.u
    )
    if not same:
        raise ValueError(
            "the weaker model predicts something else or has another schedule; take one that "
            "differs in size or in training alone"
        )

    def guidance_model(denoise: Denoise, labels: Tensor | None) -> Denoise:
        """`denoise` away from the weaker one, which is told the same labels if it knows any."""
        known = labels if weak.num_classes else None
        return autoguided(denoise, weak.without_variance(weak.bind_conditioning(known)), scale)

    return guidance_model


def classifier_guidance(
    classifier: Callable[[Tensor, Tensor], Tensor],
    denoiser: Denoiser,
    scale: float,
    *,
    steps: Sequence[int] | None = None,
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small",
) -> GuidanceModel:
    """Towards each image's label, by `classifier` (x_t, t) -> logits [B, K].

    As `guidance.classifier_guided`, whose algorithm 1 the ancestral sampler's `steps` and
    `variance` choose (Dhariwal and Nichol 2021, arXiv:2105.05233).
    """

    def guidance_model(denoise: Denoise, labels: Tensor | None) -> Denoise:
        """`denoise` towards these labels; raises ValueError without any."""
        if labels is None:
            raise ValueError("a classifier leads to labels; give labels=[...] for it to lead to")

        def log_probability(x_t: Tensor, t: Tensor) -> Tensor:
            """log p(label | x_t) of each image, [B]."""
            return classifier(x_t, t).log_softmax(1).gather(1, labels[:, None]).squeeze(1)

        return classifier_guided(
            denoise,
            log_probability,
            denoiser.parameterization,
            scale,
            steps=steps,
            variance=variance,
        )

    return guidance_model
