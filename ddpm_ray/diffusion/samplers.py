"""Ancestral (DDPM) and DDIM sampling, for any `denoise` callable.

Both samplers run the same loop over `steps`: estimate x_0 from the model output, then combine that
estimate, x_t and new noise linearly. They differ in the three coefficients, computed beforehand in
float64. The caller's `X0Estimator` holds the schedule and the denoiser. Guidance and inpainting
wrap `denoise` or `noise`. Multistep solvers are in solvers.py.

Samplers run in inference mode, without gradients. `denoise` gets ordinary tensors, so that it can
leave the mode for a gradient with respect to x_t.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.choices import LearnedVariance, ReverseVariance
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import X0Estimator

Noise: TypeAlias = Callable[[int], Tensor]
"""t -> noise, shaped like x_T, for the transition that starts at step t."""
OnStep: TypeAlias = Callable[[int, Tensor, Tensor], object]
"""(t, x_t, estimate of x_0); both are overwritten afterwards: clone what you keep."""


def ancestral(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    noise: Noise,
    variance: ReverseVariance = "fixed_large",
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling: draw images like x_T [B, ...] from the learned reverse process.

    (Ho et al. 2020, arXiv:2006.11239, algorithm 2 and eq. 7.) `steps` decreases strictly from at
    most T to 0. If it skips steps, the process is the coarser one with beta = 1 - alpha_bar_t /
    alpha_bar_s from t to the next step s (Nichol and Dhariwal 2021, arXiv:2102.09672, section 4).
    The `variance` of the added noise is beta (`fixed_large`) or the posterior's (`fixed_small`).
    Use `fixed_small` with few steps: `fixed_large` leaves noise in the images (FID 367 against 41
    at 10 steps: Song et al. 2021, arXiv:2010.02502, table 1). With a learned variance the model
    output is [B, 2C, ...], the second half as in `learned_log_variance`. The last transition adds
    no noise. Raises ValueError for other `steps`.
    """
    schedule = estimate.schedule
    require_falling(steps, schedule.num_steps)
    if variance == "learned" and len(steps) - 1 < schedule.num_steps:
        raise ValueError(
            f"variance is learned with {len(steps) - 1} of {schedule.num_steps} steps; the network "
            "learned it for single steps only: take every step, or train learned_range"
        )
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    transitions = []
    for t, s in pairwise(steps):
        a, a_s = alpha_bar[t], alpha_bar[s]
        beta = 1 - a / a_s
        small = beta * (1 - a_s) / (1 - a)
        sigma = math.sqrt(small if variance == "fixed_small" else beta)
        transitions.append(
            _Transition(
                t,
                x_0=math.sqrt(a_s) * beta / (1 - a),
                x_t=math.sqrt(1 - beta) * (1 - a_s) / (1 - a),
                noise=sigma if s > 0 else 0.0,
                bounds=(small, beta),
            )
        )
    learned = variance if variance in ("learned", "learned_range") else None
    return _walk(transitions, estimate, x_T, noise, on_step, learned)


def ddim(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    variance: ReverseVariance = "fixed_small",
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM: images like x_T [B, ...] in few steps; deterministic, without `noise`, at eta = 0.

    (Song et al. 2021, arXiv:2010.02502, eq. 12 with the sigma of eq. 16.) eta in [0, 1] scales
    sigma; eta = 1 is `ancestral` with `fixed_small`. `fixed_large` is their sigma-hat: more noise
    than eq. 16, for eta = 1 and `steps` with every step from T only.

    `steps` and the last transition are as in `ancestral`. Raises ValueError for other `steps` or
    eta, for eta > 0 without `noise` and for an unsupported `fixed_large`.
    """
    schedule = estimate.schedule
    require_falling(steps, schedule.num_steps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta:g}; it lies between 0 (no noise) and 1 (as much as DDPM)")
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta:g}, so DDIM adds noise; pass noise=, or take eta=0")
    if variance == "fixed_large":
        _require_full_chain(len(steps) - 1, schedule.num_steps, eta)
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    transitions = []
    for t, s in pairwise(steps):
        a, a_s = alpha_bar[t], alpha_bar[s]
        beta = 1 - a / a_s
        sigma = eta * math.sqrt(beta * (1 - a_s) / (1 - a))  # eq. 16
        # eq. 12 in x_0 and x_t: epsilon is (x_t - sqrt(a) x_0) / sqrt(1 - a), clipped x_0 or not
        direction = math.sqrt(1 - a_s - sigma**2) / math.sqrt(1 - a)
        if variance == "fixed_large":
            sigma = math.sqrt(beta)
        transitions.append(
            _Transition(
                t,
                x_0=math.sqrt(a_s) - direction * math.sqrt(a),
                x_t=direction,
                noise=sigma if s > 0 else 0.0,
            )
        )
    return _walk(transitions, estimate, x_T, noise, on_step)


def learned_log_variance(
    raw: Tensor, variance: LearnedVariance, small: Tensor, large: Tensor
) -> Tensor:
    """The logarithm of the learned reverse variance, shaped like the model output `raw`.

    learned: `raw` itself. learned_range: interpolated between the logarithms of the posterior
    variance `small`, at raw = -1, and of beta, `large`, at raw = 1 (Nichol and Dhariwal 2021,
    arXiv:2102.09672, eq. 15, with v = (raw + 1) / 2).
    """
    if variance == "learned":
        return raw
    share = (raw + 1) / 2
    return share * large.log().to(raw) + (1 - share) * small.log().to(raw)


class _Transition(NamedTuple):
    """Coefficients of the transition from step t to the next."""

    t: int
    x_0: float
    x_t: float
    noise: float  # sigma; at 0 no noise is drawn
    bounds: tuple[float, float] = (0.0, 0.0)  # of a learned variance: small and large


def _walk(
    transitions: Sequence[_Transition],
    estimate: X0Estimator,
    x_T: Tensor,
    noise: Noise | None,
    on_step: OnStep | None,
    learned: LearnedVariance | None = None,
) -> Tensor:
    """Apply `transitions` to x_T in preallocated buffers; return the final x."""
    x = x_T.detach().clone()
    x_0 = torch.empty_like(x)
    with torch.inference_mode():
        for step in transitions:
            model_output = estimate.model_output(x, step.t)
            if learned is not None:
                model_output, raw = model_output.chunk(2, dim=1)
            estimate.x_0(x, step.t, model_output, out=x_0)
            if on_step is not None:
                on_step(step.t, x, x_0)
            x.mul_(step.x_t).add_(x_0, alpha=step.x_0)
            if step.noise > 0:
                assert noise is not None  # checked by `ddim`, required by `ancestral`
                fresh = noise(step.t)
                if learned is None:
                    x.add_(fresh, alpha=step.noise)
                else:
                    small, large = raw.new_tensor(step.bounds, dtype=torch.float64)
                    x.add_((learned_log_variance(raw, learned, small, large) / 2).exp() * fresh)
    return x


def _require_full_chain(transitions: int, num_steps: int, eta: float) -> None:
    if transitions < num_steps:
        raise ValueError(
            f"variance is fixed_large with {transitions} of {num_steps} steps; DDIM then leaves "
            "noise in the images (FID 367 at 10 steps, Song et al. 2021, table 1): take every step "
            "or fixed_small"
        )
    if eta != 1:
        raise ValueError(
            f"variance is fixed_large with eta {eta:g}; sigma-hat is defined for eta = 1 only: "
            "take eta=1 or fixed_small"
        )
