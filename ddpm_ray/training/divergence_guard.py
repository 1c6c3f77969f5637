"""Divergence guard: rejects gradients that are not finite or whose norm is a spike.

The decision uses the norm of the all-reduced gradient, which is equal on all workers, and the norms
of previous steps, which are saved in checkpoints: all workers decide alike, and a replayed step is
decided as before.
"""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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
    """The limit of the gradient norm, and what to do with a step that exceeds it."""

    spike_factor: float = 0.0  # limit as a multiple of the median; 0: accept any finite norm
    skips: bool = False  # skip the step and continue
    rewinds: bool = False  # also restore the weights of the previous checkpoint
    norms: list[float] = field(default_factory=list)  # of the newest WINDOW_STEPS steps taken
    skipped: int = 0  # in a row

    @property
    def limit(self) -> float:
        """The largest accepted norm."""
        if not self.spike_factor or len(self.norms) < FEWEST_STEPS:
            return math.inf
        return self.spike_factor * median(self.norms)

    def accept(self, norm: float) -> bool:
        """Decide whether to take the step, and record its norm."""
        if math.isfinite(norm) and norm <= self.limit:
            self.norms = [*self.norms[1 - WINDOW_STEPS :], norm]
            self.skipped = 0
            return True
        self.skipped += 1
        return False

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
