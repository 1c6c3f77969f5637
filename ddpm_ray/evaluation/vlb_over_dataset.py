"""The variational bound of a model on a data set, in total and per step, by all workers.

Noise is keyed by the image's index, so the result does not depend on the number of workers. Sums
are in float64. Per-step results are in the order of t = 1..T.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray import counter_rng
from ddpm_ray.choices import ReverseVariance
from ddpm_ray.collectives import Workers
from ddpm_ray.counter_rng import Purpose
from ddpm_ray.data.codec import PixelCodec, require_pixels
from ddpm_ray.diffusion import vlb
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import add_noise
from ddpm_ray.diffusion.x0_estimator import clip_to_range
from ddpm_ray.evaluation.confidence_interval import interval_of_mean
from ddpm_ray.sampling.denoiser import Denoiser


@dataclass(frozen=True)
class BitsPerDim:
    """The bound and its terms in bits per dimension; equal on every worker."""

    metrics: dict[str, float]  # eval/bits_per_dim, its _low and _high, eval/prior_bits_per_dim
    terms: list[float]  # [T]: L_{t-1}, a mean over images; 0 at a step without a sample
    steps: list[int]  # those with a sample
    rate: list[float]  # at each of `steps`: bits sent to a receiver of x_t
    distortion: list[float]  # at each of `steps`: RMSE of its estimate of x_0, in grey levels
    provenance: dict[str, Any]  # plain JSON: what the metrics depend on

    def to_json(self) -> dict[str, Any]:
        """Return the stored form; the key of the provenance is "certificate" there."""
        plain = dict(vars(self))
        return plain | {"certificate": plain.pop("provenance")}


def vlb_bits_per_dim(
    denoiser: Denoiser,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    variance: ReverseVariance,
    workers: Workers,
    terms: int | None = None,
    clip: bool = True,
    seed: int = 0,
) -> BitsPerDim:
    """The bound (Ho et al. 2020, arXiv:2006.11239, eq. 5) on the images of all workers' `batches`.

    A batch is indices int64 [n] among all workers' images, images uint8 [n, H, W, C] and labels
    int64 [n]; the batches of all workers together hold each image once. All must call it.

    By default all T terms of each image are computed. With fewer `terms` they are L_0, by far the
    largest, and others at even strides over 2..T from an offset per image; each counts for its
    stride. Every step is then equally likely and the estimate is unbiased. The 95 % interval is
    Student's over images.

    The bound is that of the network itself, without guidance (`Denoiser.unguided`). Rate and
    distortion are those of section 4.3 and figure 5: L_T plus the terms above t, and the root mean
    squared error. `clip` clips estimates of x_0 to [-1, 1]. Raises ValueError for other `terms`, a
    variance that the network does not predict, a super-resolution network, a model of latents, and
    fewer than 2 images.
    """
    codec = require_pixels(denoiser.codec, "bits_per_dim")
    num_steps = denoiser.schedule.num_steps
    count = num_steps if terms is None else terms
    if not min(2, num_steps) <= count <= num_steps:
        raise ValueError(
            f"terms is {count} of T = {num_steps}; take {min(2, num_steps)}, which is L_0 and one "
            "other, to T"
        )
    if variance in ("learned", "learned_range") and variance != denoiser.variance:
        raise ValueError(
            f"variance is {variance}, but the network predicts {denoiser.variance}; use fixed_small"
        )
    terms_of = _Terms(denoiser, variance, clip, seed, count)
    device = workers.device
    # Per step: weighted bits, squared error, number of samples. In total: images, their bits,
    # squares of these, L_T.
    by_step = torch.zeros(3, num_steps, dtype=torch.float64, device=device)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for index, images, labels in batches:
            index, x_0 = index.to(device), codec.encode(images.to(device))
            terms_of.add(index, x_0, labels.to(device), by_step, totals)
    sums = workers.sum_(by_step).cpu(), workers.sum_(totals).cpu()
    return _found(*sums, terms_of.facts(), codec)


@dataclass(frozen=True, eq=False)
class _Terms:
    """Computes the terms of one batch."""

    denoiser: Denoiser
    variance: ReverseVariance
    clip: bool
    seed: int
    count: int  # terms per image

    def add(
        self, index: Tensor, x_0: Tensor, labels: Tensor, by_step: Tensor, totals: Tensor
    ) -> None:
        """Adds a batch to the sums."""
        prior = vlb.prior_term(self.denoiser.schedule, x_0.double())
        total, one = prior.clone(), torch.ones_like(prior)
        for k in range(self.count):
            t, weight = self._steps(k, index)
            bits, error = self._term(x_0, t, k, index, labels)
            total += weight * bits
            by_step.index_add_(1, t - 1, torch.stack([weight * bits, error, one]))
        totals += torch.stack([one, total, total.square(), prior]).sum(1)

    def _steps(self, k: int, index: Tensor) -> tuple[Tensor, float]:
        """The k-th step [n] of each image, and how many steps it stands for."""
        if k == 0:
            return torch.ones_like(index), 1.0
        others, taken = self.denoiser.schedule.num_steps - 1, self.count - 1
        # Whole numbers below others * taken, of which each step has `taken`: exactly fair.
        offset = counter_rng.uniform_int(self.seed, Purpose.BOUND, 0, index, others)
        return 2 + (offset + (k - 1) * others) // taken, others / taken

    def _term(
        self, x_0: Tensor, t: Tensor, k: int, index: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_{t-1} in bits per dimension and the mean squared error of x_0, [n] float64 each."""
        of, schedule = self.denoiser, self.denoiser.schedule
        noise = counter_rng.normal(self.seed, Purpose.BOUND, 1 + k, index, tuple(x_0.shape[1:]))
        x_t = add_noise(schedule, x_0, t, noise)
        model_output = of.unguided(Conditioning(labels))(x_t, t)
        raw = None
        if of.variance != "fixed":
            model_output, raw = model_output.chunk(2, 1)
            raw = raw.double()
        x_0, x_t = x_0.double(), x_t.double()
        estimate = of.parameterization.x_0(x_t, t, model_output.double())
        if self.clip:
            clip_to_range(estimate)
        log_variance = vlb.reverse_log_variance(schedule, t, self.variance, x_0, raw)
        image = Parameterization.of("x_0", schedule)
        bits = vlb.term(image, x_0, x_t, t, estimate, log_variance)
        return bits, (x_0 - estimate).square().flatten(1).mean(1)

    def facts(self) -> dict[str, Any]:
        """Facts that the terms depend on, plain JSON."""
        return {
            "terms": self.count,
            "num_steps": self.denoiser.schedule.num_steps,
            "variance": self.variance,
            "clip": self.clip,
            "seed": self.seed,
            "decoder": "discretised Gaussian, bins of half width 1/255, open ends",
            "guidance": "none",
            "interval": "95 %, Student's t over images",
        }


def _found(by_step: Tensor, totals: Tensor, facts: dict[str, Any], codec: PixelCodec) -> BitsPerDim:
    images, bits, squares, prior = totals.tolist()
    mean, low, high = interval_of_mean(images, bits, squares)
    terms, seen = by_step[0] / images, by_step[2] > 0
    above = terms.flip(0).cumsum(0).flip(0) - terms  # the sum over s > t
    error = (by_step[1, seen] / by_step[2, seen]).sqrt() * codec.levels_per_unit
    return BitsPerDim(
        metrics={
            "eval/bits_per_dim": mean,
            "eval/bits_per_dim_low": low,
            "eval/bits_per_dim_high": high,
            "eval/prior_bits_per_dim": prior / images,
        },
        terms=terms.tolist(),
        steps=(1 + seen.nonzero().flatten()).tolist(),
        rate=(prior / images + above)[seen].tolist(),
        distortion=error.tolist(),
        provenance={"images": int(images), **facts},
    )
