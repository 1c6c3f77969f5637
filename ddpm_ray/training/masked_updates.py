"""Updates of weights that a decision on the device applies or leaves out; the host does not wait.

`accepted` is a bool tensor [] on the device of the weights. An update that is left out changes no
bit, and one that is applied has the bits of an update without a decision.
"""

import torch
from torch import Tensor


def step_optimizer(
    optimizer: torch.optim.Optimizer, learning_rate: float, accepted: Tensor
) -> None:
    """Step a fused Adam or AdamW where `accepted`; its moments and step counts stay else."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # What torch's GradScaler sets: fused kernels read it on the device.
    optimizer.found_inf = (~accepted).float()  # type: ignore[attr-defined]
    optimizer.step()


def lerp_(means: list[Tensor], ends: list[Tensor], weight: float, accepted: Tensor) -> None:
    """Add weight * (ends - means) to float32 `means`, in place, where `accepted`."""
    share = accepted * weight  # [] float32
    if means[0].is_cpu:
        torch._foreach_lerp_(means, ends, [share] * len(means))
    else:  # which would be a launch for each tensor; so it is a few for all of them
        steps = torch._foreach_sub(ends, means)
        torch._foreach_mul_(steps, share)
        torch._foreach_add_(means, steps)
