"""Divergence guard: rejects gradients that are not finite or whose norm is a spike.

The decision uses the norm of the all-reduced gradient, which is equal on all workers, and the norms
of previous steps, which are saved in checkpoints: all workers decide alike, and a replayed step is
decided as before. The decision is made on the device, so that a step does not make the host wait
for it; the host reads it at the next report (loop.py).
"""

import math
import sys
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.redaction import counted, sanitize

WINDOW_STEPS = 128  # whose norms a spike is compared with
FEWEST_STEPS = 16  # norms needed before spikes are detected: the first steps vary most
MOST_SKIPS = 10  # consecutive skipped steps after which the run ends
SHOWN_KEYS = 8  # sample keys shown in an error


class DivergedError(RuntimeError):
    """A step that was not taken; args are (step, gradient norm, its limit, sample keys)."""

    def __str__(self) -> str:
        step, norm, limit, keys = self.args
        names = ", ".join(keys[:SHOWN_KEYS]) + (" ..." if len(keys) > SHOWN_KEYS else "")
        over = f", over {limit:.3g}" if math.isfinite(norm) else ""
        return sanitize(
            f"step {step}: the gradient's norm is {norm:.4g}{over}, from "
            f"{counted(len(keys), 'sample')}: {names}; nothing was updated. Look at "
            "these images; lower training.learning_rate and go back to an older checkpoint; or "
            "set training.on_divergence=skip or rewind"
        )


@dataclass
class DivergenceGuard:
    """The limit of the gradient norm, and what to do with a step that exceeds it.

    Its values are those of the last step that was recorded; the device is ahead of them.
    """

    spike_factor: float = 0.0  # limit as a multiple of the median; 0: accept any finite norm
    skips: bool = False  # skip the step and continue
    rewinds: bool = False  # also restore the weights of the previous checkpoint
    norms: list[float] = field(default_factory=list)  # of the newest WINDOW_STEPS steps taken
    skipped: int = 0  # in a row
    _on_device: "_DeviceGuard | None" = field(default=None, init=False, repr=False, compare=False)

    def accept(self, norm: Tensor) -> Tensor:
        """Decide on the device of `norm` [] whether to take the step: bool [].

        After a rejected step that stops or rewinds the run, all are rejected until `resume`: they
        would be taken from weights at which the run does not go on.
        """
        if self._on_device is None:
            self._on_device = _DeviceGuard.of(self, norm.device)
        return self._on_device.accept(norm)

    def record(self, norm: float, *, accepted: bool) -> None:
        """Note the decision on the next step, as the device made it."""
        if accepted:
            self.norms, self.skipped = [*self.norms[1 - WINDOW_STEPS :], norm], 0
        else:
            self.skipped += 1

    @property
    def limit(self) -> float:
        """The largest accepted norm."""
        if not self.spike_factor or len(self.norms) < FEWEST_STEPS:
            return math.inf
        return self.spike_factor * median(self.norms)

    @property
    def exhausted(self) -> bool:
        """Whether the rejected step ends the run."""
        return not self.skips or self.skipped > MOST_SKIPS

    @classmethod
    def of(cls, policy: str, spike_factor: float) -> "DivergenceGuard":
        """Create a guard from training.on_divergence and training.spike_factor."""
        return cls(spike_factor, skips=policy != "stop", rewinds=policy == "rewind")

    def facts(self) -> dict[str, Any]:
        """Return the state for a checkpoint, plain JSON."""
        return {"norms": list(self.norms), "skipped": self.skipped}

    def resume(self, facts: dict[str, Any]) -> None:
        """Continue with the state of a checkpoint."""
        self.norms, self.skipped = list(facts["norms"]), int(facts["skipped"])
        self._on_device = None  # made anew by the next decision


@dataclass
class _DeviceGuard:
    """The guard's values on the device, at the newest step."""

    spike_factor: float
    norms: Tensor  # [WINDOW_STEPS] float64, the newest last; infinite before the first
    count: Tensor  # [] int64, of finite norms
    rejected: Tensor  # [] int64, in a row
    most_rejected: int  # in a row; one more, and all further ones are

    @classmethod
    def of(cls, guard: DivergenceGuard, device: torch.device) -> "_DeviceGuard":
        """Copy the values of `guard`, which is up to date, to the device."""
        norms = [math.inf] * (WINDOW_STEPS - len(guard.norms)) + guard.norms
        goes_on = guard.skips and not guard.rewinds
        return cls(
            guard.spike_factor,
            torch.tensor(norms, dtype=torch.float64, device=device),
            torch.tensor(len(guard.norms), device=device),
            torch.tensor(guard.skipped if goes_on else 0, device=device),
            MOST_SKIPS if goes_on else 0,
        )

    def accept(self, norm: Tensor) -> Tensor:
        """Decide on the next step as `DivergenceGuard.accept`, and append its norm if taken."""
        norm = norm.double()
        accepted = (norm <= self._limit()) & (self.rejected <= self.most_rejected)
        appended = torch.cat([self.norms[1:], norm[None]])
        self.norms = torch.where(accepted, appended, self.norms)
        self.count = (self.count + accepted).clamp_(max=WINDOW_STEPS)
        self.rejected = (self.rejected + 1) * ~accepted
        return accepted

    def _limit(self) -> float | Tensor:
        """The limit as of DivergenceGuard, with its bits; the largest float instead of infinity."""
        largest = sys.float_info.max
        if not self.spike_factor:
            return largest
        middle = torch.stack([self.count - 1, self.count]).clamp_(min=0) // 2
        median = self.norms.sort().values[middle].sum() / 2
        limit = torch.where(self.count < FEWEST_STEPS, largest, self.spike_factor * median)
        return limit.clamp_(max=largest)


def diverged(
    step: int, norm: float, limit: float, losses: Tensor, keys: list[str], workers: Workers
) -> DivergedError:
    """Create the error of step `step` (from 1), the same on all workers; all must call it.

    `keys`: sample keys of the losses [b]. The error lists those with a loss that is not finite, or
    the whole batch if all losses are finite.
    """
    guilty = [key for key, bad in zip(keys, ~losses.isfinite().cpu(), strict=True) if bad]
    everyone = workers.gather((guilty, keys))
    named = [key for bad, _ in everyone for key in bad] or [k for _, own in everyone for k in own]
    return DivergedError(step, norm, limit, named)
