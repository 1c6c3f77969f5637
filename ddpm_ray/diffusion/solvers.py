"""Fast samplers: multistep and predictor-corrector solvers of the probability flow ODE.

Each method is a plan of network calls with coefficients computed beforehand in float64. A call at
step t may first correct the predicted x_t, and may then advance to the next step; both are linear
combinations of an x and of the latest estimates. One loop runs every plan, with one buffer for each
stored estimate. lambda is half the log-SNR, and h its increase from a step to the next: it is
infinite at t = 0, and at T if alpha_bar is 0 there, but the coefficients are always finite.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.samplers import Noise, OnStep
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import X0Estimator

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def dpm_solver_pp(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    order: int = 2,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Multistep DPM-Solver++: images like x_T [B, ...] with one network call per step.

    (Lu et al. 2022, arXiv:2211.01095, algorithm 2.) Order 1 is `ddim` at eta = 0. Order 2 also
    uses the previous estimate; the first and the last transition are of order 1, and so is the
    second after an alpha_bar of 0. With `noise` it solves the SDE of the same marginals instead
    (their SDE-DPM-Solver++), of which order 1 is `ancestral` with `fixed_small`.

    `steps` and `noise` are as in `samplers.ancestral`. Raises ValueError for other `steps` or
    another order.
    """
    _require_order(order, 2, "DPM-Solver++")
    plan = _multistep(
        estimate.schedule, steps, order, corrected=False, stochastic=noise is not None
    )
    return _walk(plan, estimate, x_T, noise, on_step)


def unipc(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    order: int = 2,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC with B(h) = expm1(h): images like x_T [B, ...] with one network call per step.

    (Zhao et al. 2023, arXiv:2302.04867, multistep, x_0 prediction.) The predictor, at order 2 that
    of `dpm_solver_pp`, gives x_t; one network call there serves both to correct x_t, which raises
    the order by one, and to predict the next. `order` is the predictor's, 1 to 3; it is lower in
    the first transitions, which have fewer estimates, and in the last ones, down to 1.

    `steps` is as in `samplers.ancestral`; `on_step` gets the predicted x_t, before the correction.
    Raises ValueError for other `steps` or another order.
    """
    _require_order(order, 3, "UniPC")
    plan = _multistep(estimate.schedule, steps, order, corrected=True, stochastic=False)
    return _walk(plan, estimate, x_T, None, on_step)


def heun(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method: images like x_T [B, ...] with two network calls per step, one for the last.

    (Karras et al. 2022, arXiv:2206.00364, algorithm 1, in x / sqrt(alpha_bar) as a function of
    sigma = sqrt((1 - alpha_bar) / alpha_bar), whose derivative is the noise.) The last transition
    is Euler's, to sigma = 0. `on_step` is called at the first call of each step. sigma is 20,000 at
    the end of the cosine schedule, where a few evenly spaced steps overshoot: start at a lower
    sigma or use another method.

    `steps` is as in `samplers.ancestral`. Raises ValueError for other `steps` and for a start
    where alpha_bar is 0.
    """
    plan = []
    for t, s, kept, gain in _legs(estimate.schedule, steps, "heun"):
        if s == 0:
            plan.append(_Call(t, advance=_Blend(0.0, (1.0,))))
        else:
            plan.append(_Call(t, advance=_Blend(kept, (gain,)), as_noise=True))
            plan.append(_Call(s, correct=_Blend(kept, (gain / 2, gain / 2)), as_noise=True))
    return _walk(plan, estimate, x_T, None, on_step)


def plms(
    estimate: X0Estimator,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """PLMS (pseudo linear multistep): images like x_T [B, ...] with one network call per step.

    (Liu et al. 2022, arXiv:2202.09778, eq. 12.) Each transition is DDIM's with the fourth-order
    Adams-Bashforth combination of the last four noise predictions. The first three use the formulas
    of order 1, 2 and 3, where the paper spends four calls on each; the order of the method stays 2.
    The last transition does so too, so images can exceed the range of the estimator's clip: by a
    factor of 2 to 4 at 10 or 20 steps.

    `steps` is as in `samplers.ancestral`. Raises ValueError for other `steps` and for a start
    where alpha_bar is 0.
    """
    plan = []
    for i, (t, _, kept, gain) in enumerate(_legs(estimate.schedule, steps, "plms")):
        weights = tuple(gain * w for w in _ADAMS_BASHFORTH[min(i, 3)])
        plan.append(_Call(t, advance=_Blend(kept, weights), as_noise=True))
    return _walk(plan, estimate, x_T, None, on_step)


class _Blend(NamedTuple):
    """A linear combination: kept x + sum of weights times estimates (newest first) + noise."""

    kept: float
    weights: tuple[float, ...]
    noise: float = 0.0


class _Call(NamedTuple):
    """One network call at step t and the updates that follow it."""

    t: int
    correct: _Blend | None = None  # applied to the x before the last advance
    advance: _Blend | None = None  # applied to x_t
    as_noise: bool = False  # store the noise that corresponds to the clipped x_0 instead of x_0


def _legs(
    schedule: NoiseSchedule, steps: Sequence[int], method: str
) -> Iterator[tuple[int, int, float, float]]:
    """Each t, s and DDIM's two coefficients of that transition: of x_t and of the noise."""
    require_falling(steps, schedule.num_steps)
    alpha: list[float] = schedule.alpha_bar.sqrt().tolist()
    sigma: list[float] = (1 - schedule.alpha_bar).sqrt().tolist()
    if alpha[steps[0]] == 0:
        raise ValueError(
            f"steps start at {steps[0]}, where alpha_bar is 0, by which {method} would divide: "
            f"start at {steps[0] - 1} or below, or take dpm_solver_pp, unipc or ddim"
        )
    for t, s in pairwise(steps):
        kept = alpha[s] / alpha[t]
        yield t, s, kept, sigma[s] - kept * sigma[t]


def _multistep(
    schedule: NoiseSchedule, steps: Sequence[int], order: int, *, corrected: bool, stochastic: bool
) -> list[_Call]:
    """The plan of DPM-Solver++ and UniPC: they extrapolate x_0 as a polynomial in lambda."""
    require_falling(steps, schedule.num_steps)
    alpha: list[float] = schedule.alpha_bar.sqrt().tolist()
    sigma: list[float] = (1 - schedule.alpha_bar).sqrt().tolist()
    half_log_snr: list[float] = (schedule.log_snr(torch.arange(len(alpha))) / 2).tolist()
    plan: list[_Call] = []
    correct = None
    for i, (t, s) in enumerate(pairwise(steps)):
        h = half_log_snr[s] - half_log_snr[t]
        shrink = sigma[s] * alpha[t] / (alpha[s] * sigma[t])  # exp(-h)
        lost = 1 - shrink  # 1 - exp(-h)
        kept, spread = sigma[s] / sigma[t], 0.0
        if stochastic:
            kept, lost = kept * shrink, 1 - shrink**2
            spread = sigma[s] * math.sqrt(lost)
        most = min(order, len(steps) - 1 - i) - 1  # 0 for the last transition
        known = [k for k in reversed(steps[max(0, i - most) : i]) if half_log_snr[k] > -math.inf]
        behind = [(half_log_snr[k] - half_log_snr[t]) / h for k in known]  # in units of h, below 0
        weights = _weights(behind, h)
        advance = _Blend(kept, tuple(alpha[s] * lost * w for w in weights), spread)
        plan.append(_Call(t, correct, advance))
        if corrected:
            first, newest, *others = _weights([1.0, *behind], h)
            correct = _Blend(kept, tuple(alpha[s] * lost * w for w in (newest, first, *others)))
    return plan


def _weights(nodes: Sequence[float], h: float) -> tuple[float, ...]:
    """Weights, of sum 1, of the estimate at the step and those at `nodes` (offsets over h).

    They integrate the interpolating polynomial over [0, 1] with a density proportional to exp(h r),
    as in the exact solution (Zhao et al. 2023, theorem 3.1: R rho = phi / B). A single node has the
    share 1/2 of h = 0, as in the paper.
    """
    p = len(nodes)
    if p < 2:
        shares = [0.5] * p
    else:
        moments = _moments(h, p)
        r = torch.tensor(nodes, dtype=torch.float64)
        powers = r ** torch.arange(p, dtype=torch.float64)[:, None]
        wanted = torch.tensor(moments[1:], dtype=torch.float64) / moments[0]
        shares = torch.linalg.solve(powers, wanted).tolist()
    away = [share / node for share, node in zip(shares, nodes, strict=True)]
    return (1 - sum(away), *away)


def _moments(h: float, most: int) -> list[float]:
    """h times the integral of exp(-h (1 - r)) r^n over [0, 1], for n = 0 to `most`.

    Integration by parts gives each from the one before, but loses digits below h = 1, by a factor
    of n / h at each n (an error of 8e-3 in the weights of order 3 at h = 3e-4). There the series in
    h is summed.
    """
    if h < 1:
        terms = range(20)  # the last is below 1e-18 of the first
        return [
            h * math.fsum((-h) ** k * math.factorial(n) / math.factorial(n + k + 1) for k in terms)
            for n in range(most + 1)
        ]
    moments = [-math.expm1(-h)]
    for n in range(1, most + 1):
        moments.append(1 - n * moments[-1] / h)
    return moments


def _walk(
    plan: Sequence[_Call],
    estimate: X0Estimator,
    x_T: Tensor,
    noise: Noise | None,
    on_step: OnStep | None,
) -> Tensor:
    """Run `plan` from x_T in preallocated buffers; return the final x."""
    x = x_T.detach().clone()
    before = torch.empty_like(x)
    blends = [blend for call in plan for blend in (call.correct, call.advance) if blend is not None]
    estimates = [torch.empty_like(x) for _ in range(max(len(b.weights) for b in blends))]
    alpha_bar: list[float] = estimate.schedule.alpha_bar.tolist()
    with torch.inference_mode():
        for call in plan:
            estimates.insert(0, estimates.pop())  # reuse the buffer of the oldest
            newest = estimate(x, call.t, out=estimates[0])
            if on_step is not None and call.advance is not None:
                on_step(call.t, x, newest)
            if call.as_noise:
                a = alpha_bar[call.t]
                newest.mul_(-math.sqrt(a / (1 - a))).add_(x, alpha=1 / math.sqrt(1 - a))
            if call.correct is not None:
                _blend(call.correct, before, estimates, out=x)
            if call.advance is not None:
                x, before = before, x
                _blend(call.advance, before, estimates, out=x)
                if call.advance.noise > 0:
                    assert noise is not None  # `dpm_solver_pp` plans noise only if it is given
                    x.add_(noise(call.t), alpha=call.advance.noise)
    return x


def _blend(blend: _Blend, x: Tensor, estimates: Sequence[Tensor], out: Tensor) -> None:
    torch.mul(x, blend.kept, out=out)
    for weight, estimate in zip(blend.weights, estimates, strict=False):
        out.add_(estimate, alpha=weight)


def _require_order(order: int, most: int, method: str) -> None:
    if not 1 <= order <= most:
        raise ValueError(f"order is {order}; {method} is of order 1 to {most} here")
