"""Post-hoc EMA: power-function averages of the weights, and others reconstructed from them.

After update t, a power-function average weights the parameters at times 0..t by the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),

whose width relative to t is constant: sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).
A linear combination of snapshots at several t and gamma, whose profiles approximate another one in
the least-squares sense, gives that average without further training. (Karras et al. 2024,
arXiv:2312.02696, sections 3.1 and 3.2, appendix C.)
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

WIDEST = 12**-0.5  # sigma_rel of the plain mean, gamma = 0


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of a profile of relative width `sigma_rel` in 0..0.2887.

    The largest root of sigma_rel^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, in float64. Raises
    ValueError for other widths. (Appendix C.1.)
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(
            f"sigma_rel is {sigma_rel}; a profile's width is above 0 and at most {WIDEST:.4f} of "
            "the run, that of the plain mean: try 0.1"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])  # all three are real
    return max(0.0, float(roots.real.max()))


def power_decay(gamma: float, step: int) -> float:
    """The decay of update number `step` (from 0) that keeps the profile: (1 - 1/t)^(gamma + 1).

    t = step + 1, so the first update forgets what the network began with. (Eq. 2.)
    """
    return float((step / (step + 1)) ** (gamma + 1))


def weights(
    ts: Sequence[int], gammas: Sequence[float], target_t: int, target_gamma: float
) -> Tensor:
    """Coefficients [n] float64 of n snapshots whose sum best approximates the target profile.

    Snapshot i was taken after update ts[i] >= 1 with exponent gammas[i]. Least squares over
    profiles (algorithm 3). Raises ValueError without snapshots, or if `target_t` > max(ts).
    """
    times, exponents = _checked(ts, gammas, target_t)
    known = _inner_products(times[:, None], exponents[:, None], times, exponents)
    wanted = _inner_products(times, exponents, *_column(target_t, target_gamma))
    size = known.diagonal().rsqrt()  # profiles of length 1: early ones are tall, late ones flat
    scaled = size[:, None] * known * size
    # By singular values: neighbours are almost parallel, and a plain solution may be all rounding.
    found: Tensor = torch.linalg.lstsq(scaled, (size * wanted)[:, None], driver="gelsd").solution
    return size * found[:, 0]


def profile_error(
    ts: Sequence[int], gammas: Sequence[float], target_t: int, target_gamma: float
) -> float:
    """Relative L2 error of the profile that `weights` reconstructs: 0: exact, 1: orthogonal.

    Same arguments and errors as `weights`.
    """
    times, exponents = _checked(ts, gammas, target_t)
    x = weights(ts, gammas, target_t, target_gamma)
    known = _inner_products(times[:, None], exponents[:, None], times, exponents)
    target = _column(target_t, target_gamma)
    wanted = _inner_products(times, exponents, *target)
    whole = _inner_products(*target, *target).item()
    rest = whole - 2 * float(x @ wanted) + float(x @ known @ x)
    return math.sqrt(max(rest, 0.0) / whole)


def reconstruct_ema(snapshots: Iterable[dict[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """Sum of `snapshots` weighted by `weights` [n], in the snapshots' dtypes.

    Summed in float64 with one snapshot in memory at a time; integer tensors are taken from the last
    snapshot. Raises ValueError if there are not n snapshots, or if their tensor names differ.
    """
    total: dict[str, Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for snapshot, weight in zip(snapshots, weights.tolist(), strict=True):
        if total and snapshot.keys() != total.keys():
            names = sorted(snapshot.keys() ^ total.keys())
            raise ValueError(f"snapshots differ in {names[0]!r}; give those of one network")
        for name, tensor in snapshot.items():
            types[name] = tensor.dtype
            if not tensor.is_floating_point():
                total[name] = tensor
            elif name in total:
                total[name].add_(tensor, alpha=weight)
            else:
                total[name] = tensor.double() * weight
    return {name: tensor.to(types[name]) for name, tensor in total.items()}


def _inner_products(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of p_a p_b over 0..min(t_a, t_b), broadcast (eq. 19 and 20 integrated).

    By logarithms: t^gamma of a long run and a narrow profile leaves float64's range.
    """
    both = gamma_a + gamma_b + 1
    power = both * torch.minimum(t_a, t_b).log()
    power = power - (gamma_a + 1) * t_a.log() - (gamma_b + 1) * t_b.log()
    return (gamma_a + 1) * (gamma_b + 1) / both * power.exp()


def _checked(ts: Sequence[int], gammas: Sequence[float], target_t: int) -> tuple[Tensor, Tensor]:
    if not ts or len(ts) != len(gammas) or min(ts) < 1:
        raise ValueError(
            f"ts has {len(ts)} entries and gammas {len(gammas)}; give one of each, with t of at "
            "least 1, for every average that was kept"
        )
    if not 1 <= target_t <= max(ts):
        raise ValueError(
            f"target_t is {target_t}; it must be in 1..{max(ts)}, where averages were kept"
        )
    return _column(ts, gammas)


def _column(t: Sequence[int] | int, gamma: Sequence[float] | float) -> tuple[Tensor, Tensor]:
    return torch.tensor(t, dtype=torch.float64), torch.tensor(gamma, dtype=torch.float64)
