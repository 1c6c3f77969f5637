"""Gradients that must not reach the weights: not finite, or a spike among those before them.

Judged by the norm of the summed gradient, which is equal on all workers, and by the norms of the
steps before, which travel in the checkpoint: all workers decide alike in the same step, and a step
that is replayed after a crash is judged as it was the first time.
"""

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from ddpm_ray.collectives import Workers
from ddpm_ray.redaction import counted, sanitize

WINDOW_STEPS = 128  # whose norms a spike is compared with
FEWEST_STEPS = 16  # before there is a median worth a name: the first steps are the wildest
MOST_SKIPS = 10  # in a row; then it is not a bad batch but a bad run
SHOWN_KEYS = 8  # of an error that could name a whole batch


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
class Guard:
    """What a gradient's norm must be, and what happens to one that is not so."""

    spike_factor: float = 0.0  # times the median; 0: any finite norm passes
    skips: bool = False  # leave out the step and go on
    rewinds: bool = False  # with the weights of the checkpoint before it
    norms: list[float] = field(default_factory=list)  # of the newest WINDOW_STEPS steps taken
    skipped: int = 0  # in a row

    @property
    def limit(self) -> float:
        """The largest norm that passes."""
        if not self.spike_factor or len(self.norms) < FEWEST_STEPS:
            return math.inf
        return self.spike_factor * median(self.norms)

    def passes(self, norm: float) -> bool:
        """Whether this step may be taken; what it says is remembered."""
        if math.isfinite(norm) and norm <= self.limit:
            self.norms = [*self.norms[1 - WINDOW_STEPS :], norm]
            self.skipped = 0
            return True
        self.skipped += 1
        return False

    @property
    def gives_up(self) -> bool:
        """Whether the step that did not pass ends the run."""
        return not self.skips or self.skipped > MOST_SKIPS

    @classmethod
    def of(cls, policy: str, spike_factor: float) -> "Guard":
        """As training.on_divergence and training.spike_factor have it."""
        return cls(spike_factor, skips=policy != "stop", rewinds=policy == "rewind")

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, plain JSON."""
        return {"norms": list(self.norms), "skipped": self.skipped}

    def resume(self, facts: dict[str, Any]) -> None:
        """Go on with the memory of a checkpoint."""
        self.norms, self.skipped = list(facts["norms"]), int(facts["skipped"])


def diverged(
    step: int, norm: float, limit: float, losses: Tensor, keys: list[str], workers: Workers
) -> DivergedError:
    """The error for step `step` (from 1), the same on all workers; all must call it.

    `keys` name the images of losses [b]. It names those whose own loss is not finite, or all of the
    batch's if there is none.
    """
    guilty = [key for key, bad in zip(keys, ~losses.isfinite().cpu(), strict=True) if bad]
    everyone = workers.gather((guilty, keys))
    named = [key for bad, _ in everyone for key in bad] or [k for _, own in everyone for k in own]
    return DivergedError(step, norm, limit, named)
