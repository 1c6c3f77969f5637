"""Fast samplers: solvers of the flow from noise to images that remember or correct.

Each method is a plan of network calls, worked out beforehand in float64. A call at step t may first
correct the guess x_t by what the network now says, and may then advance to the next step; both are
fixed blends of an x and of the latest estimates. One walk runs every plan, with one buffer for each
estimate that is remembered. lambda is half the log-SNR, and h its rise from a step to the next: it
is infinite at t = 0, and at T where a schedule leaves no signal, but the blends never are.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import Denoise, NoiseSchedule
from ddpm_ray.diffusion.samplers import Noise, OnStep
from ddpm_ray.diffusion.timestep_spacing import require_falling
from ddpm_ray.diffusion.x0_estimator import Clip, X0Estimator, clip_to_range

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def dpm_solver_pp(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    order: int = 2,
    noise: Noise | None = None,
    parameterization: Parameterization | None = None,
    clip: Clip | None = clip_to_range,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...] by multistep DPM-Solver++: one network call a step.

    (Lu et al. 2022, arXiv:2211.01095, algorithm 2.) Order 1 is `ddim` at eta = 0. Order 2 also
    looks at the estimate before; the first and the last transition are of order 1, and so is the
    second after an alpha_bar of 0. With `noise` it solves the SDE of the same marginals instead
    (their SDE-DPM-Solver++), of which order 1 is `ancestral` with `fixed_small`.

    `steps`, `parameterization`, `clip` and `noise` are as in `samplers.ancestral`. Raises
    ValueError for other `steps` or another order.
    """
    _require_order(order, 2, "DPM-Solver++")
    plan = _multistep(schedule, steps, order, corrected=False, stochastic=noise is not None)
    return _walk(schedule, plan, denoise, x_T, noise, parameterization, clip, on_step)


def unipc(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    order: int = 2,
    parameterization: Parameterization | None = None,
    clip: Clip | None = clip_to_range,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...] by UniPC with B(h) = expm1(h): one network call a step.

    (Zhao et al. 2023, arXiv:2302.04867, multistep, x_0 prediction.) The predictor, at order 2 the
    one of `dpm_solver_pp`, gives x_t; the call there serves to correct x_t, raising the order by
    one, and to predict on. `order` is the predictor's, 1 to 3, less at the start, where fewer
    estimates are known, and towards the end; the last transition has order 1.

    `steps`, `parameterization` and `clip` are as in `samplers.ancestral`; `on_step` sees the
    prediction of x_t that the network saw. Raises ValueError for other `steps` or another order.
    """
    _require_order(order, 3, "UniPC")
    plan = _multistep(schedule, steps, order, corrected=True, stochastic=False)
    return _walk(schedule, plan, denoise, x_T, None, parameterization, clip, on_step)


def heun(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    parameterization: Parameterization | None = None,
    clip: Clip | None = clip_to_range,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...] by Heun's method: two network calls a step, one for the last.

    (Karras et al. 2022, arXiv:2206.00364, algorithm 1, in x / sqrt(alpha_bar) as a function of
    sigma = sqrt((1 - alpha_bar) / alpha_bar), whose slope is the noise.) The last transition is
    Euler's, to sigma = 0. `on_step` sees the first call of each step. sigma is 20,000 at the end of
    the cosine schedule, and few evenly spaced steps overshoot from there: start lower, or take
    another method.

    `steps`, `parameterization` and `clip` are as in `samplers.ancestral`. Raises ValueError for
    other `steps` and for a start where alpha_bar is 0.
    """
    plan = []
    for t, s, kept, gain in _legs(schedule, steps, "heun"):
        if s == 0:
            plan.append(_Call(t, advance=_Blend(0.0, (1.0,))))
        else:
            plan.append(_Call(t, advance=_Blend(kept, (gain,)), as_noise=True))
            plan.append(_Call(s, correct=_Blend(kept, (gain / 2, gain / 2)), as_noise=True))
    return _walk(schedule, plan, denoise, x_T, None, parameterization, clip, on_step)


def plms(
    schedule: NoiseSchedule,
    denoise: Denoise,
    x_T: Tensor,
    steps: Sequence[int],
    *,
    parameterization: Parameterization | None = None,
    clip: Clip | None = clip_to_range,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images like x_T [B, ...] by the pseudo linear multistep method: one network call a step.

    (Liu et al. 2022, arXiv:2202.09778, eq. 12.) Each transition is DDIM's with a blend of the last
    four predictions of the noise, that of the fourth-order Adams-Bashforth method. The first three
    take the formulas of order 1, 2 and 3, which need no more predictions than there are, where the
    paper spends four calls on each; the method keeps its order, 2. The last transition is no
    exception, so images can leave the range of `clip`: by a factor of 2 to 4 at 10 or 20 steps.

    `steps`, `parameterization` and `clip` are as in `samplers.ancestral`. Raises ValueError for
    other `steps` and for a start where alpha_bar is 0.
    """
    plan = []
    for i, (t, _, kept, gain) in enumerate(_legs(schedule, steps, "plms")):
        weights = tuple(gain * w for w in _ADAMS_BASHFORTH[min(i, 3)])
        plan.append(_Call(t, advance=_Blend(kept, weights), as_noise=True))
    return _walk(schedule, plan, denoise, x_T, None, parameterization, clip, on_step)


class _Blend(NamedTuple):
    """kept times an x, plus each estimate, newest first, times its weight, plus fresh noise."""

    kept: float
    weights: tuple[float, ...]
    noise: float = 0.0


class _Call(NamedTuple):
    """One network call at step t and what follows from it."""

    t: int
    correct: _Blend | None = None  # of the x that was advanced last
    advance: _Blend | None = None  # of x_t
    as_noise: bool = False  # remember the noise that belongs to the clipped x_0, not x_0


def _legs(
    schedule: NoiseSchedule, steps: Sequence[int], method: str
) -> Iterator[tuple[int, int, float, float]]:
    """Each t, s and the two weights of DDIM's way between them, of x_t and of the noise in it."""
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
        most = min(order, len(steps) - 1 - i) - 1  # none for the last transition
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
    """Of the estimate at the step and of those at `nodes`, in units of h from it; they sum to 1.

    The mean over [0, 1] under the density of exp(h r) of the polynomial in r through them all: what
    the exact solution asks for (Zhao et al. 2023, theorem 3.1: R rho = phi / B). A single node has
    the share 1/2 that h = 0 gives, as theirs.
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

    By parts each follows from the one before, which below h = 1 would lose digits: a factor of
    n / h at each n (8e-3 of the weights of order 3 at h = 3e-4). There the series in h is summed.
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
    schedule: NoiseSchedule,
    plan: Sequence[_Call],
    denoise: Denoise,
    x_T: Tensor,
    noise: Noise | None,
    parameterization: Parameterization | None,
    clip: Clip | None,
    on_step: OnStep | None,
) -> Tensor:
    """x at the end of `plan`, in one of the buffers that all calls share."""
    x = x_T.detach().clone()
    before = torch.empty_like(x)
    blends = [blend for call in plan for blend in (call.correct, call.advance) if blend is not None]
    estimates = [torch.empty_like(x) for _ in range(max(len(b.weights) for b in blends))]
    alpha_bar: list[float] = schedule.alpha_bar.tolist()
    estimate = X0Estimator(
        denoise, parameterization or Parameterization.of("epsilon", schedule), x, clip
    )
    with torch.inference_mode():
        for call in plan:
            estimates.insert(0, estimates.pop())  # the oldest makes room
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
                    assert noise is not None  # only `dpm_solver_pp` plans any, where it has it
                    x.add_(noise(call.t), alpha=call.advance.noise)
    return x


def _blend(blend: _Blend, x: Tensor, estimates: Sequence[Tensor], out: Tensor) -> None:
    torch.mul(x, blend.kept, out=out)
    for weight, estimate in zip(blend.weights, estimates, strict=False):
        out.add_(estimate, alpha=weight)


def _require_order(order: int, most: int, method: str) -> None:
    if not 1 <= order <= most:
        raise ValueError(f"order is {order}; {method} is of order 1 to {most} here")
