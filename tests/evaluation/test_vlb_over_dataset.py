"""The bound of a whole data set: closed forms, fair sampling of steps, the same for all workers."""

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_ray.choices import ReverseVariance
from ddpm_ray.collectives import Workers
from ddpm_ray.diffusion import NoiseSchedule, Parameterization, posterior, schedules
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.evaluation.vlb_over_dataset import BitsPerDim, vlb_bits_per_dim
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser
from tests.fixtures.threaded_workers import OnWorkers

T = 30
SCHEDULE = NoiseSchedule(schedules.linear(T, rescale=True))
IMAGES = torch.randint(
    0, 256, (11, 2, 3, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)
IMAGES[0, 0, 0, 0], IMAGES[1, 0, 0, 0] = 0, 255  # the open ends
X_0 = IMAGES.double() / 127.5 - 1


def grey(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Takes every image for the same grey: what it costs depends on no noise."""
    return torch.full_like(x_t, 0.1)


def some_noise(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return 0.7 * x_t


GREY = Denoiser(grey, Parameterization.of("x_0", SCHEDULE))
NOISE = Denoiser(some_noise, Parameterization.of("epsilon", SCHEDULE))


def found(
    workers: Workers,
    denoiser: Denoiser = NOISE,
    images: Tensor = IMAGES,
    batch_size: int = 4,
    variance: ReverseVariance = "fixed_small",
    **chosen: Any,
) -> BitsPerDim:
    share = workers.share(len(images))
    index = torch.arange(share.start, share.stop).split(batch_size)
    batches = [(part, images[part], part % 3) for part in index]
    return vlb_bits_per_dim(denoiser, batches, variance=variance, workers=workers, **chosen)


def in_closed_form() -> Tensor:
    """Each term [T, N] of the grey denoiser in bits per dimension, by torch's and scipy's laws."""
    x_0, terms = X_0.flatten(1), []
    _, small = posterior(SCHEDULE, x_0[:1], x_0[:1], torch.tensor([2]))
    law = scipy.stats.norm(float(torch.tensor(0.1)), small.sqrt().item())
    low = (x_0 - 1 / 255).where(x_0 > -1, -math.inf)
    high = (x_0 + 1 / 255).where(x_0 < 1, math.inf)
    left, right = (torch.minimum(e, 0.2 - s) for e, s in ((low, high), (high, low)))
    beyond = x_0 > 0.1  # the upper tail, mirrored to where cumulative values keep their digits
    upper, lower = right.where(beyond, high), left.where(beyond, low)
    mass = torch.from_numpy(law.logcdf(upper)), torch.from_numpy(law.logcdf(lower))
    terms.append(-(mass[0] + torch.log1p(-torch.exp(mass[1] - mass[0]))).mean(1))
    for step in range(2, T + 1):
        t = torch.full((len(x_0),), step)
        mean, small = posterior(SCHEDULE, x_0, x_0, t)
        guess, _ = posterior(SCHEDULE, torch.full_like(x_0, 0.1), x_0, t)
        terms.append(kl_divergence(Normal(mean, small.sqrt()), Normal(guess, small.sqrt())).mean(1))
    return torch.stack(terms) / math.log(2)


def prior() -> Tensor:
    a = SCHEDULE.alpha_bar[-1]
    nats = kl_divergence(Normal(a.sqrt() * X_0, (1 - a).sqrt()), Normal(0.0, 1.0))
    return nats.flatten(1).mean(1) / math.log(2)


def test_who_sees_only_grey_costs_what_the_closed_form_says() -> None:
    """Terms, prior, total, its interval by scipy, and the rate and distortion at each step."""
    result, terms = found(Workers(), GREY), in_closed_form()
    assert result.terms == pytest.approx(terms.mean(1).tolist(), rel=1e-5)
    totals = prior() + terms.sum(0)
    low, high = scipy.stats.t.interval(0.95, 10, totals.mean(), scipy.stats.sem(totals))
    assert result.metrics == pytest.approx(
        {
            "eval/bits_per_dim": float(totals.mean()),
            "eval/bits_per_dim_low": low,
            "eval/bits_per_dim_high": high,
            "eval/prior_bits_per_dim": float(prior().mean()),
        },
        rel=1e-5,
    )
    assert result.steps == list(range(1, T + 1))
    sent = [float(prior().mean() + terms[t:].sum(0).mean()) for t in result.steps]
    assert result.rate == pytest.approx(sent, rel=1e-5)
    levels = IMAGES.double() - 1.1 * 127.5
    root = float(levels.square().mean().sqrt())
    assert result.distortion == pytest.approx([root] * T, rel=1e-5)


def test_the_estimate_is_clipped_where_images_are() -> None:
    far = replace(GREY, network=lambda x_t, t, _: torch.full_like(x_t, 7.0))
    near = replace(GREY, network=lambda x_t, t, _: torch.full_like(x_t, 1.0))
    assert found(Workers(), far).terms == found(Workers(), near).terms
    assert found(Workers(), far, clip=False).terms[0] > found(Workers(), near).terms[0]


@pytest.mark.parametrize("terms", [None, 7])
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_finds_what_one_finds(
    count: int, terms: int | None, on_workers: OnWorkers
) -> None:
    one = asdict(found(Workers(), terms=terms, batch_size=11))
    others = on_workers(count, lambda workers: found(workers, terms=terms, batch_size=3))
    for other in map(asdict, others):
        assert other["provenance"] == one["provenance"]
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-12)
        for name in ("terms", "steps", "rate", "distortion"):
            assert other[name] == pytest.approx(one[name], rel=1e-12)


def test_a_seed_is_a_choice_of_noise_and_of_steps() -> None:
    assert found(Workers(), seed=1).terms != found(Workers(), seed=2).terms
    assert found(Workers(), terms=7, seed=1).steps == found(Workers(), terms=7, seed=1).steps
    first, second = (found(Workers(), GREY, terms=3, seed=s).terms for s in (1, 2))
    assert first != second


@pytest.mark.parametrize("terms", [2, 7, 29])
def test_few_terms_estimate_the_whole_bound_without_bias(terms: int) -> None:
    """Of one image many times over, so only the choice of steps differs; 4 standard errors."""
    images = IMAGES[:1].expand(3000, -1, -1, -1)
    whole, part = found(Workers(), GREY), found(Workers(), GREY, images, 3000, terms=terms)
    truth = found(Workers(), GREY, IMAGES[:1].expand(2, -1, -1, -1))
    assert whole.provenance["terms"] == T
    assert part.provenance["terms"] == terms
    assert part.steps == list(range(1, T + 1))  # each has its turn
    bits = part.metrics["eval/bits_per_dim"]
    error = (part.metrics["eval/bits_per_dim_high"] - bits) / scipy.stats.t.ppf(0.975, 2999)
    assert 0 < error < 0.2 * bits
    assert abs(bits - truth.metrics["eval/bits_per_dim"]) < 4 * error
    assert part.terms[0] == pytest.approx(truth.terms[0], rel=1e-9)  # L_0 is always taken
    for step in range(1, T):  # each step's share of the images is binomial
        chance = (terms - 1) / (T - 1)
        spread = math.sqrt((1 / chance - 1) / 3000)
        assert abs(part.terms[step] / truth.terms[step] - 1) < 4.5 * spread
    total = part.metrics["eval/prior_bits_per_dim"] + sum(part.terms)
    assert total == pytest.approx(bits, rel=1e-9)


def test_steps_that_none_was_seen_at_are_left_out_of_the_curve() -> None:
    result = found(Workers(), GREY, IMAGES[:2], terms=2)
    assert result.steps[0] == 1
    assert len(result.steps) <= 3
    assert len(result.terms) == T
    assert len(result.rate) == len(result.distortion) == len(result.steps)
    assert all(math.isfinite(value) for value in result.distortion)


def test_a_learned_variance_is_read_from_behind_the_answer() -> None:
    """At its ends it is one of the fixed ones, but for beta at t = 1."""

    def network(raw: float, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.cat([0.7 * x_t, torch.full_like(x_t, raw)], 1)

    learned = replace(NOISE, variance="learned_range")
    small, large = (
        found(Workers(), replace(learned, network=partial(network, raw)), variance="learned_range")
        for raw in (-1.0, 1.0)
    )
    assert small.terms == pytest.approx(found(Workers()).terms, rel=1e-6)
    expected = found(Workers(), variance="fixed_large").terms
    assert large.terms[1:] == pytest.approx(expected[1:], rel=1e-6)
    ignored = replace(learned, network=partial(network, 0.3))
    assert found(Workers(), ignored).terms == pytest.approx(small.terms, rel=1e-6)


def test_labels_reach_the_network_and_its_own_estimates_do_not() -> None:
    """An estimate from other noise on the same image would say more than x_t does."""
    seen: list[tuple[list[int], float]] = []

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        labels, (condition,) = conditioning.labels, conditioning.images
        assert labels is not None
        seen.append((labels.tolist(), float(condition.abs().max())))
        return 0.7 * x_t

    of = replace(NOISE, network=network, takes=ConditioningSpec(3, self_conditioning=True))
    found(Workers(), of, IMAGES[:5])
    assert seen == [([0, 1, 2, 0], 0.0)] * T + [([1], 0.0)] * T


def test_the_interval_of_two_images_holds_the_mean_as_often_as_it_says() -> None:
    """300 pairs of images, all terms; 1.96 standard errors hold it in about 70 %."""
    shape, generator = (600, 6, 6, 1), torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    short = replace(
        GREY,
        parameterization=Parameterization.of("x_0", NoiseSchedule(schedules.linear(2, 0.1, 0.9))),
    )
    truth = found(Workers(), short, images, 600).metrics["eval/bits_per_dim"]
    pairs = [found(Workers(), short, pair).metrics for pair in images.split(2)]
    held = [p["eval/bits_per_dim_low"] <= truth <= p["eval/bits_per_dim_high"] for p in pairs]
    assert 0.92 <= sum(held) / 300 <= 0.98


def test_what_leads_samples_is_left_out() -> None:
    guided = replace(
        NOISE, guidance_model=lambda denoise, labels: lambda x_t, t: 9 + denoise(x_t, t)
    )
    assert asdict(found(Workers(), guided)) == asdict(found(Workers()))
    assert found(Workers(), guided).provenance["guidance"] == "none"


@pytest.mark.parametrize(
    "chosen, reason",
    [
        ({"terms": 1}, "terms is 1 of T = 30; take 2, which is L_0 and one other, to T"),
        ({"terms": 31}, "terms is 31 of T = 30"),
        ({"images": IMAGES[:1]}, "1 image; an interval needs at least 2"),
        ({"images": IMAGES[:0]}, "0 images; an interval needs at least 2"),
        ({"variance": "learned_range"}, "learned_range, but the network predicts fixed; use"),
    ],
)
def test_what_cannot_be_bounded_is_refused(chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        found(Workers(), **chosen)
