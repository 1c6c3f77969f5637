"""Guidance by another network: autoguidance by a weaker model, classifier guidance."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddpm_ray.choices import FixedVariance
from ddpm_ray.data.codec import Codec
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.guidance import autoguided, classifier_guided
from ddpm_ray.diffusion.process import Denoise
from ddpm_ray.sampling.denoiser import Denoiser, GuidanceModel


def require_same_x_0(guided: Codec, guiding: Codec) -> None:
    """Raise ValueError unless models with these codecs see the same noisy x_0 of an image."""
    difference = ""
    if guided.name != guiding.name:
        difference = f"it is trained on {guiding.name}, and the guided model on {guided.name}"
    elif not (isinstance(guided, LatentCodec) and isinstance(guiding, LatentCodec)):
        return
    elif (sha256 := guiding.autoencoder_sha256) != (wanted := guided.autoencoder_sha256):
        difference = (
            f"it is trained on latents of the autoencoder of sha256 {sha256[:12]}, and the guided "
            f"model on those of {wanted[:12]}"
        )
    elif (guiding.mean, guiding.std) != (guided.mean, guided.std):
        difference = "its latents are standardised by another mean or standard deviation"
    if difference:
        raise ValueError(f"{difference}; take one trained on the same data set")


def autoguidance(strong: Denoiser, weak: Denoiser, scale: float) -> GuidanceModel:
    """Guide `strong` away from `weak`, a worse model of the same data.

    (Karras et al. 2024, arXiv:2406.02507.) Raises ValueError unless both have the same codec,
    parameterization and noise schedule.
    """
    require_same_x_0(strong.codec, weak.codec)
    same = torch.equal(strong.schedule.alpha_bar, weak.schedule.alpha_bar) and torch.equal(
        strong.parameterization.u, weak.parameterization.u
    )
    if not same:
        raise ValueError(
            "the weaker model has another parameterization or noise schedule; take one that "
            "differs only in size or training"
        )

    def guidance_model(denoise: Denoise, conditioning: Conditioning) -> Denoise:
        """Autoguided `denoise`; the weaker model gets what it takes of the same conditioning."""
        bound = weak.bind_conditioning(weak.takes.taken(conditioning))
        return autoguided(denoise, weak.without_variance(bound), scale)

    return guidance_model


def classifier_guidance(
    classifier: Callable[[Tensor, Tensor], Tensor],
    denoiser: Denoiser,
    scale: float,
    *,
    steps: Sequence[int] | None = None,
    variance: FixedVariance = "fixed_small",
) -> GuidanceModel:
    """Guide each image towards its label with `classifier`: (x_t, t) -> logits [B, K].

    (Dhariwal and Nichol 2021, arXiv:2105.05233.) With `steps` and `variance` of the ancestral
    sampler it is their algorithm 1, otherwise algorithm 2; see `guidance.classifier_guided`.
    """

    def guidance_model(denoise: Denoise, conditioning: Conditioning) -> Denoise:
        """`denoise` guided towards the labels of `conditioning`; raises ValueError without any."""
        if (labels := conditioning.labels) is None:
            raise ValueError("classifier guidance needs labels; give labels=[...]")

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
