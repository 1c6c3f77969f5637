"""Exponential moving averages (EMA) of a network's weights, in float32."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ddpm_ray.training.masked_updates import lerp_


class EMA:
    """EMA of the weights of `model`, initialised with its current weights.

    `self.model` is a copy in eval mode with the averaged weights, for sampling. Parameters are
    float32, independent of the training precision; buffers are copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float, accepted: Tensor | None = None) -> None:
        """Set the mean to decay * mean + (1 - decay) * weights, for a decay in 0..1.

        (Ho et al. 2020, appendix B.) `model`: the unwrapped network, with the same parameter order
        as at construction. `accepted`, bool [] on its device: no change where it is false.
        """
        mean: list[Tensor] = list(self.model.parameters())
        weights = [parameter.float() for parameter in model.parameters()]
        if accepted is None:
            accepted = torch.ones((), dtype=torch.bool, device=mean[0].device)
        lerp_(mean, weights, 1.0 - decay, accepted)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights (no copy) by parameter name."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a `state_dict`. Raises RuntimeError that names keys that do not match."""
        self.model.load_state_dict(state)


@dataclass(frozen=True)
class Averages:
    """Additional EMAs of one network by name; a decay is a function of the update number from 0."""

    means: dict[str, EMA] = field(default_factory=dict)
    decays: Mapping[str, Callable[[int], float]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, decays: Mapping[str, Callable[[int], float]]) -> "Averages":
        """Create one EMA for each name in `decays`, initialised with the weights of `model`."""
        return cls({name: EMA(model) for name in decays}, decays)

    def update(self, model: nn.Module, step: int, accepted: Tensor | None = None) -> None:
        """Update each EMA with the decay of update number `step` (from 0), as `EMA.update`."""
        for name, mean in self.means.items():
            mean.update(model, self.decays[name](step), accepted)


def decay_group(decay_per_step: float) -> str:
    """Name of the EMA with this decay in a checkpoint: ema-0.999."""
    return f"ema-{float(decay_per_step)!r}"


def width_group(sigma_rel: float) -> str:
    """Name of the power-function EMA of this relative width: ema-width-0.05."""
    return f"ema-width-{float(sigma_rel)!r}"


def decay_from_half_life(half_life_images: float, batch_images: int) -> float:
    """Decay per update with a half-life of `half_life_images` images."""
    if half_life_images <= 0 or batch_images < 1:
        raise ValueError(
            f"half_life_images is {half_life_images} and batch_images is {batch_images}; "
            "both must be positive"
        )
    return math.exp2(-batch_images / half_life_images)


def ramped(decay: float, step: int) -> float:
    """Decay of update number `step` (from 0): min(decay, (1 + step) / (10 + step)).

    A low decay at the start forgets the initial weights, as in TensorFlow's moving averages.
    """
    return min(decay, (1 + step) / (10 + step))
