"""Priors and cascades on a joint Gaussian of text and image, whose conditionals are known."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.embedding_codec import EmbeddingCodec
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.schedules import cosine
from ddpm_ray.sampling.cascade import Cascade, stage_seed
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.prior import TrainedPrior

STEPS, WIDTH = 100, 3
SCHEDULE = NoiseSchedule(cosine(STEPS))
PROMPTS = ["left", "right"]
TOKENIZER = Tokenizer.trained(PROMPTS, 300, 6)
ROWS = TOKENIZER.encode(PROMPTS)
# z_image = A z_text + N(0, B B^T): what a caption leaves open about an image.
A = torch.tensor([[0.5, 0.2, 0.0], [-0.3, 0.6, 0.1], [0.0, 0.4, 0.7]], dtype=torch.float64)
B = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.3, 0.0], [0.1, -0.1, 0.4]], dtype=torch.float64)
Z_TEXT = F.normalize(torch.tensor([[1.0, 2, 0], [0, -1, 1]], dtype=torch.float64), dim=1)
MEAN, STD = (0.3, -0.2, 0.1), (0.7, 0.5, 0.9)
CODEC = EmbeddingCodec(WIDTH, MEAN, STD, "b" * 64)


class Texts:
    """The text encoder of the joint distribution."""

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        return Z_TEXT[[PROMPTS.index(one) for one in prompts]].float()


def conditional(prompt: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of the standardised image embedding, given a text."""
    scale = torch.tensor(STD, dtype=torch.float64)
    mean = (A @ Z_TEXT[prompt] - torch.tensor(MEAN, dtype=torch.float64)) / scale
    return mean, (B @ B.T) / scale[:, None] / scale[None]


def exact_x_0(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """E[x_0 | x_t, text] of the joint Gaussian: what a prior that has learned all predicts."""
    assert conditioning.tokens is not None
    a = SCHEDULE.alpha_bar.double()[t[0]]
    found = torch.empty_like(x_t)
    for prompt, row in enumerate(ROWS):
        mean, covariance = conditional(prompt)
        noisy = a * covariance + (1 - a) * torch.eye(WIDTH, dtype=torch.float64)
        gain = a.sqrt() * covariance @ torch.linalg.inv(noisy)
        x_0 = mean + (x_t.flatten(1).double() - a.sqrt() * mean) @ gain.T
        here = (conditioning.tokens == row).all(1)
        found[here] = x_0.to(x_t)[:, :, None, None][here]
    return found


def exact_prior() -> TrainedPrior:
    of = Denoiser(
        exact_x_0,
        Parameterization.of("x_0", SCHEDULE),
        takes=ConditioningSpec(tokenizer=TOKENIZER),
        codec=CODEC,
    )
    chosen = SamplingSettings(sampler="ancestral", steps=STEPS, batch_size=512)
    return TrainedPrior(of, CODEC, Texts(), {"checkpoint": "here", "step": 1}, settings=chosen)


def test_embeddings_have_the_conditional_mean_and_covariance() -> None:
    """Within Monte Carlo error, for each of two prompts; cosine rewards the mean instead.

    cos(sample, truth) is below cos(mean, truth): a blurred mean scores higher than samples of the
    right distribution. So a prior is scored by moments.
    """
    count = 2000
    drawn = exact_prior().draw(PROMPTS, range(2 * count), seed=3).double()
    for prompt in (0, 1):
        of = drawn[prompt::2]
        mean, covariance = A @ Z_TEXT[prompt], B @ B.T
        variances = covariance.diagonal()
        assert ((of.mean(0) - mean).abs() < 5 * (variances / count).sqrt()).all()
        found = torch.cov(of.T)
        spread = ((variances.outer(variances) + covariance**2) / count).sqrt()
        # 100 ancestral steps draw a variance that is a few per cent off.
        assert ((found - covariance).abs() < 5 * spread + 0.04 * covariance.abs()).all()
        noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(9)).double()
        truths = mean + noise @ B.T
        cosine_of_samples = F.cosine_similarity(of, truths).mean()
        assert cosine_of_samples < F.cosine_similarity(mean[None], truths).mean() - 0.02


class FixedPrior(TrainedPrior):
    """A prior that draws what it is given."""

    def draw(self, prompts: Sequence[str], indices: range, seed: int) -> Tensor:
        return DRAWN[indices.start : indices.stop]


DRAWN = F.normalize(
    torch.ones(1, WIDTH)
    + 0.01 * torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(0)),
    dim=1,
)


def test_the_best_of_two_is_nearer_to_its_text_by_sd_over_root_pi() -> None:
    """The larger of two normals exceeds their mean by sd / sqrt(pi)."""
    plain, text, count = exact_prior(), Z_TEXT[0].float(), len(DRAWN) // 2
    prior = FixedPrior(plain.denoiser, CODEC, Texts(), {})
    dots = (DRAWN @ text).double()
    best = prior.embeddings(["left"], range(count), 0) @ text
    lift, expected = best.double().mean() - dots.mean(), dots.std() / math.sqrt(math.pi)
    assert abs(lift - expected) < 5 * dots.std() / math.sqrt(count)
    torch.testing.assert_close(best, dots.float().reshape(-1, 2).amax(1))
    one = prior.embeddings(["left"], range(count), 0, candidates=1)
    torch.testing.assert_close(one, DRAWN[:count])


class OfMeans:
    """An image encoder; a cascade that draws from a prior does not call it."""

    width = WIDTH

    def embed(self, x_0: Tensor) -> Tensor:
        means = x_0.mean((2, 3)).expand(-1, WIDTH)
        return F.normalize(means + torch.tensor([1.5, 0, 0]), dim=1)


def of_embedding(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Predict x_0 [1, 2, 3] as a decoder: each column a component of the embedding, and noise."""
    assert conditioning.embedding is not None
    wanted = conditioning.embedding[:, None, None, :].expand(-1, 1, 2, -1)
    return 0.7 * wanted + 0.05 * x_t.tanh()


def of_small(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Predict x_0 as an upsampler: the enlarged image, and a little noise."""
    assert conditioning.low_resolution is not None
    return 0.9 * conditioning.low_resolution + 0.02 * x_t.tanh()


def cascade(**settings: Any) -> Cascade:
    """2 x 3 pixels from the decoder, 4 x 6 from the upsampler."""
    parameterization = Parameterization.of("x_0", SCHEDULE)
    chosen = SamplingSettings(steps=10, **settings)
    takes = ConditioningSpec(image_encoder=OfMeans())
    decoder = Denoiser(of_embedding, parameterization, takes=takes)
    up = Denoiser(of_small, parameterization, takes=ConditioningSpec(low_resolution_pixels=2))
    upsampler = TrainedModel(up, ImageShape(4, 6, 1), {}, settings=chosen)
    return Cascade(
        decoder,
        ImageShape(2, 3, 1),
        {"checkpoint": "here"},
        settings=chosen,
        prior=exact_prior(),
        upsamplers=(upsampler,),
    )


def test_each_image_is_a_function_of_the_seed_and_its_number() -> None:
    """In batches of any size, and in parts: as several workers draw it."""
    whole = cascade().sample(5, prompts=PROMPTS, seed=4)
    assert whole.shape == (5, 4, 6, 1)
    for part in (range(3), range(2, 5), range(4, 5)):
        some = cascade().sample(len(part), first=part.start, prompts=PROMPTS, seed=4)
        np.testing.assert_array_equal(some, whole[part.start : part.stop])
    small = cascade(batch_size=2)
    prior = replace(small.prior, settings=replace(small.prior.settings, batch_size=3))
    parted = replace(small, prior=prior).sample(5, prompts=PROMPTS, seed=4)
    assert np.abs(parted.astype(int) - whole).max() <= 1
    other = cascade().sample(5, prompts=PROMPTS, seed=5)
    assert (other != whole).reshape(5, -1).any(1).all()


def test_stages_draw_from_their_own_seeds() -> None:
    """With one seed the noise of all stages would begin with the same numbers."""
    seeds = {4, *(stage_seed(4, stage) for stage in range(5))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_images_are_those_of_the_priors_embeddings() -> None:
    of, prompts = cascade(), ["right", "left"]
    embeddings = of.prior.embeddings(prompts, range(4), stage_seed(7, 0), candidates=3)
    drawn = of.sample(4, prompts=prompts, seed=7, candidates=3)
    columns = PIXELS.encode(torch.from_numpy(drawn)).mean(2)[:, 0]  # two of each component
    components = columns.reshape(4, WIDTH, 2).mean(2)
    near = F.normalize(components, dim=1) @ embeddings.T
    assert (near.argmax(1) == torch.arange(4)).all()
    assert near.diagonal().min() > 0.95


def test_an_interpolation_ends_at_the_images_of_its_prompts() -> None:
    of = cascade()
    found = of.interpolate("left", "right", 4, seed=2)
    assert found.shape == (4, 4, 6, 1)
    for place, prompt in ((0, "left"), (3, "right")):
        alone = of.sample(1, prompts=[prompt], seed=2, candidates=2)[0]
        np.testing.assert_array_equal(found[place], alone)
    apart = [np.abs(found[n + 1].astype(int) - found[n]).mean() for n in range(3)]
    assert max(apart) < np.abs(found[3].astype(int) - found[0]).mean()


def test_variations_need_no_prompt_and_keep_the_embedding() -> None:
    images = np.zeros((2, 2, 3, 1), np.uint8)
    images[1] = 255
    drawn = cascade().variations(images, per_image=2)
    assert drawn.shape == (4, 4, 6, 1)
    same = [np.abs(drawn[i].astype(int) - drawn[i + 1]).max() for i in (0, 2)]
    assert 0 < max(same) < np.abs(drawn[0].astype(int) - drawn[2]).max()


def test_what_a_cascade_cannot_draw_is_refused() -> None:
    of = cascade()
    with pytest.raises(ValueError, match="prompts is empty; a cascade draws images of texts"):
        of.sample(2)
    with pytest.raises(ValueError, match="candidates is 0"):
        of.sample(2, prompts=["left"], candidates=0)
    with pytest.raises(ValueError, match=r"prompt 1 holds the control character U\+000A"):
        of.sample(2, prompts=["a\nb"])
    with pytest.raises(ValueError, match="but the decoder takes no text: leave it out"):
        of.sample(1, prompts=["left"], negative_prompt="right", guidance_scale=2.0)
    with pytest.raises(ValueError, match="second cannot be used"):
        of.interpolate("left", "a\nb")
    with pytest.raises(ValueError, match="the texts of interpolate are first and second"):
        of.interpolate("left", "right", prompts=["left"])
    with pytest.raises(ValueError, match="prompts is empty; a prior draws the embedding"):
        of.prior.draw([], range(2), 0)
