"""What leads a denoiser sees the images' labels, and bends the answer as its paper says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS, Codec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.diffusion import Denoise, NoiseSchedule, Parameterization, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.sampling import guidance_models
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser, GuidanceModel
from ddpm_ray.sampling.sampling import SamplingPlan, draw

LINEAR = NoiseSchedule(schedules.linear(40, 1e-3, 0.3))
EPSILON = Parameterization.of("epsilon", LINEAR)
X, T = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.full((4,), 9)


def by_label(share: float, num_classes: int = 3) -> Denoiser:
    """Answers with that share of x_t, plus the label's number (0 for none)."""

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels = conditioning.labels
        number = 0 if labels is None else labels.view(-1, 1, 1, 1)
        return share * x_t + number

    return Denoiser(network, EPSILON, takes=ConditioningSpec(num_classes))


LATENTS = LatentCodec(1, 2, ("plain",), (1.0,), (2.0,), autoencoder_sha256="a" * 64)


@pytest.mark.parametrize(
    "codec, difference",
    [
        (PIXELS, "trained on pixels, and the guided model on latents"),
        (
            replace(LATENTS, autoencoder_sha256="b" * 64),
            "of the autoencoder of sha256 bbbbbbbbbbbb, and .* on those of aaaaaaaaaaaa",
        ),
        (replace(LATENTS, mean=(1.5,)), "standardised by another mean or standard deviation"),
        (replace(LATENTS, std=(2.5,)), "standardised by another mean or standard deviation"),
    ],
)
def test_a_model_of_other_latents_does_not_guide(codec: Codec, difference: str) -> None:
    strong = replace(by_label(0.5), codec=LATENTS)
    with pytest.raises(ValueError, match=f"{difference}; take one trained on the same data set"):
        guidance_models.autoguidance(strong, replace(by_label(0.2), codec=codec), 3)


def test_a_model_guides_one_of_the_same_latents_whatever_views_it_has_seen() -> None:
    weak = replace(by_label(0.2), codec=replace(LATENTS, views=("plain", "flipped")))
    guidance_models.autoguidance(replace(by_label(0.5), codec=LATENTS), weak, 3)


def guided(denoiser: Denoiser, guidance_model: GuidanceModel, labels: Tensor | None) -> Tensor:
    of = replace(denoiser, guidance_model=guidance_model)
    return of.bind_conditioning(Conditioning(labels))(X, T)


def test_a_weaker_model_is_kept_away_from_with_the_same_labels() -> None:
    """weak + 3 (strong - weak) for shares 0.5 and 0.2; the label's number is in both."""
    strong, weak, labels = by_label(0.5), by_label(0.2), torch.tensor([0, 1, 2, 0])
    found = guided(strong, guidance_models.autoguidance(strong, weak, 3), labels)
    torch.testing.assert_close(found, 1.1 * X + labels.view(-1, 1, 1, 1))


def test_a_weaker_model_may_know_no_labels() -> None:
    strong, weak, labels = by_label(0.5), by_label(0.2, 0), torch.tensor([0, 1, 2, 0])
    found = guided(strong, guidance_models.autoguidance(strong, weak, 3), labels)
    torch.testing.assert_close(found, 1.1 * X + 3.0 * labels.view(-1, 1, 1, 1))


def test_a_weaker_model_gets_the_low_resolution_images_that_it_takes() -> None:
    def of(share: float, pixels: int) -> Denoiser:
        def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            return share * x_t + sum(conditioning.images)

        return Denoiser(network, EPSILON, takes=ConditioningSpec(low_resolution_pixels=pixels))

    low = torch.arange(4.0).view(4, 1, 1, 1).expand_as(X)
    for pixels, expected in ((1, 1.1 * X + low), (0, 1.1 * X + 3 * low)):
        guidance_model = guidance_models.autoguidance(of(0.5, 1), of(0.2, pixels), 3)
        denoise = replace(of(0.5, 1), guidance_model=guidance_model).bind_conditioning(
            Conditioning(low_resolution=low)
        )
        torch.testing.assert_close(denoise(X, T), expected)


@pytest.mark.parametrize(
    "other", [Parameterization.of("v", LINEAR), Parameterization.of("epsilon", LINEAR)]
)
def test_two_that_answer_differently_are_refused(other: Parameterization) -> None:
    strong = by_label(0.5)
    if other.w.equal(EPSILON.w):
        cosine = NoiseSchedule(schedules.cosine(40))
        other = Parameterization.of("epsilon", cosine)
    weak = Denoiser(strong.network, other)
    with pytest.raises(ValueError, match="another parameterization or noise schedule"):
        guidance_models.autoguidance(strong, weak, 2)


def test_a_classifier_leads_each_image_to_its_own_label_even_without_a_class_network() -> None:
    """Logits +-s: the slope of log p(y) is +-(1 - p(y)), summed over the pixels it looks at."""

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        s = x_t[:, 0, 0, 0]
        return torch.stack([s, -s], 1)

    labels = torch.tensor([0, 1, 0, 1])
    plain = by_label(0.5, 0)
    moved = (
        guided(plain, guidance_models.classifier_guidance(classifier, plain, 2.0), labels) - 0.5 * X
    )
    p = torch.sigmoid(2 * X[:, 0, 0, 0])
    slope = torch.where(labels == 0, 2 * (1 - p), -2 * p)
    sigma = (1 - LINEAR.alpha_bar[9]).sqrt()
    torch.testing.assert_close(moved[:, 0, 0, 0], (-2.0 * sigma * slope).float())
    assert not moved.flatten(1)[:, 1:].any()


def test_a_classifier_needs_labels() -> None:
    plain = by_label(0.5, 0)
    guidance_model = guidance_models.classifier_guidance(lambda x, t: x.flatten(1), plain, 1.0)
    with pytest.raises(ValueError, match=r"classifier guidance needs labels; give labels=\[...\]"):
        guided(plain, guidance_model, None)


def test_labels_of_a_plan_reach_the_classifier_of_a_network_without_classes() -> None:
    seen: list[Tensor] = []
    plain = by_label(0.5, 0)

    def guidance_model(denoise: Denoise, conditioning: Conditioning) -> Denoise:
        assert conditioning.labels is not None
        seen.append(conditioning.labels)
        return denoise

    denoiser = Denoiser(plain.network, plain.parameterization, guidance_model=guidance_model)
    plan = SamplingPlan((40, 0), SamplingSettings(labels=(5, 6)))
    draw(denoiser, plan, torch.arange(3), ImageShape(2, 2, 1), "cpu")
    assert [labels.tolist() for labels in seen] == [[5, 6, 5]]
