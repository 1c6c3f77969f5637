"""From noise to images: free functions over any `denoise` callable.

Every sampler here is the same walk down `steps`: estimate x_0 from the predicted noise, then take a
fixed blend of that estimate, x_t and fresh noise. They differ in the three weights of the blend,
which are worked out beforehand in float64. Guidance and inpainting wrap `denoise` or `noise` and so
need no sampler of their own.

Samplers run in inference mode: nothing is recorded for gradients. What they hand out are ordinary
tensors all the same, so a `denoise` that needs a gradient with respect to x_t can leave the mode.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias, assert_never

import torch
from torch import Tensor

from ddpm_ray.diffusion.process import Denoise, NoiseSchedule

Variance: TypeAlias = Literal["fixed_small", "fixed_large"]
Noise: TypeAlias = Callable[[int], Tensor]
"""t -> the fresh noise, of x_T's shape, of the transition that leaves step t."""
OnStep: TypeAlias = Callable[[int, Tensor, Tensor], object]
"""(t, x_t, estimate of x_0); both tensors are overwritten afterwards, so clone what you keep."""


def ancestral(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    noise: Noise,
    variance: Variance = "fixed_large",
    clip: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...], drawn step by step from the learned reverse chain.

    (Ho et al. 2020, arXiv:2006.11239, algorithm 2 and eq. 7.) `steps` falls strictly from at most
    T to 0. Where it skips, the chain is the coarser one with beta = 1 - alpha_bar_t / alpha_bar_s
    from t to the next step s (Nichol and Dhariwal 2021, arXiv:2102.09672, section 4). The added
    noise has `variance` beta (`fixed_large`) or the posterior's (`fixed_small`). With few steps
    take `fixed_small`; the other leaves noise in the images (FID 367 against 41 at 10 steps: Song
    et al. 2021, arXiv:2010.02502, table 1). The last transition adds none.

    `clip` keeps the estimate of x_0 in [-1, 1], as images are, and thereby re-derives the noise.
    Raises ValueError for other `steps`.
    """
    _require_falling(steps, schedule.num_steps)
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    transitions = []
    for t, s in pairwise(steps):
        a, a_s = alpha_bar[t], alpha_bar[s]
        beta = 1 - a / a_s
        match variance:
            case "fixed_small":
                sigma = math.sqrt(beta * (1 - a_s) / (1 - a))
            case "fixed_large":
                sigma = math.sqrt(beta)
            case _:
                assert_never(variance)
        transitions.append(
            _Transition(
                t,
                a,
                x_0=math.sqrt(a_s) * beta / (1 - a),
                x_t=math.sqrt(1 - beta) * (1 - a_s) / (1 - a),
                noise=sigma if s > 0 else 0.0,
            )
        )
    return _walk(transitions, denoise, x_T, noise, clip, on_step)


def ddim(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    variance: Variance = "fixed_small",
    clip: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...] in few steps; at eta = 0 a function of x_T alone, without `noise`.

    (Song et al. 2021, arXiv:2010.02502, eq. 12 with the sigma of eq. 16.) eta in [0, 1] scales
    sigma; eta = 1 is `ancestral` with `fixed_small`. `fixed_large` is their sigma-hat: more noise
    than eq. 16 at eta = 1, and only where every step from T is taken.

    `steps`, `clip` and the last transition are as in `ancestral`. Raises ValueError for other
    `steps` or eta, for eta > 0 without `noise` and for `fixed_large` elsewhere.
    """
    _require_falling(steps, schedule.num_steps)
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
                a,
                x_0=math.sqrt(a_s) - direction * math.sqrt(a),
                x_t=direction,
                noise=sigma if s > 0 else 0.0,
            )
        )
    return _walk(transitions, denoise, x_T, noise, clip, on_step)


def uniform_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 evenly spaced steps from T = num_steps to 0, as 1000, 500, 0 for a count of 2.

    (Song et al. 2021, appendix D.2, linear.) Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(num_steps * i // count for i in range(count, -1, -1))


def quadratic_steps(num_steps: int, count: int) -> tuple[int, ...]:
    """count + 1 steps from T = num_steps to 0, denser towards 0, as 1000, 250, 0 for a count of 2.

    Step i is T (i / count)^2 rounded down, or i where that would repeat a step (Song et al. 2021,
    appendix D.2, which takes it for CIFAR-10). Raises ValueError unless count is in 1..T.
    """
    _require_count(num_steps, count)
    return tuple(max(i, num_steps * i**2 // count**2) for i in range(count, -1, -1))


class _Transition(NamedTuple):
    """From step t to the next: a blend of the estimate of x_0, x_t and fresh noise."""

    t: int
    alpha_bar: float  # at t
    x_0: float
    x_t: float
    noise: float  # sigma; at 0 no noise is asked for


def _walk(
    transitions: Sequence[_Transition],
    denoise: Denoise,
    x_T: Tensor,
    noise: Noise | None,
    clip: bool,
    on_step: OnStep | None,
) -> Tensor:
    """x at the end of `transitions`, in buffers of its own that all of them share."""
    x = x_T.detach().clone()
    x_0 = torch.empty_like(x)
    t = torch.empty(len(x), dtype=torch.int64, device=x.device)
    with torch.inference_mode():
        for transition in transitions:
            a = transition.alpha_bar
            predicted = denoise(x, t.fill_(transition.t))
            torch.mul(x, 1 / math.sqrt(a), out=x_0)
            x_0.sub_(predicted, alpha=math.sqrt((1 - a) / a))  # Ho et al. 2020, eq. 15
            if clip:
                x_0.clamp_(-1, 1)
            if on_step is not None:
                on_step(transition.t, x, x_0)
            x.mul_(transition.x_t).add_(x_0, alpha=transition.x_0)
            if transition.noise > 0:
                assert noise is not None  # `ddim` has checked it, `ancestral` always has it
                x.add_(noise(transition.t), alpha=transition.noise)
    return x


def _require_falling(steps: Sequence[int], num_steps: int) -> None:
    if len(steps) < 2 or steps[-1] != 0:
        raise ValueError(f"steps are {_brief(steps)}; they must fall from at most T to 0")
    if steps[0] > num_steps:
        raise ValueError(f"steps start at {steps[0]}, but the schedule has T = {num_steps} steps")
    for t, s in pairwise(steps):
        if s >= t:
            raise ValueError(f"steps go from {t} to {s}; they must fall strictly, down to 0")


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


def _require_count(num_steps: int, count: int) -> None:
    if not 1 <= count <= num_steps:
        raise ValueError(f"{count} sampling steps of T = {num_steps}; take 1 to {num_steps}")


def _brief(steps: Sequence[int]) -> str:
    shown = [str(t) for t in steps]
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "...", *shown[-2:]]) or "empty"
