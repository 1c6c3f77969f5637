"""An optimiser's moments as tensors under parameter names, for checkpoints."""

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the moments (no copy) by `<parameter name>.<moment>`."""
    names = _optimised_names(model, optimizer)
    return {
        f"{names[index]}.{key}": value
        for index, of_parameter in optimizer.state_dict()["state"].items()
        for key, value in of_parameter.items()
    }


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Continue from `moments`. Raises RuntimeError that names an unknown parameter."""
    parameters = dict(model.named_parameters())
    indices = {name: index for index, name in enumerate(_optimised_names(model, optimizer))}
    found: dict[int, Tensors] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        if name not in indices:
            raise RuntimeError(
                f"the checkpoint has moments of {name}, which is not a parameter here"
            )
        if value.shape == parameters[name].shape:
            # In the weights' own layout: fused Adam pairs elements by their place in memory.
            value = torch.empty_like(parameters[name], requires_grad=False).copy_(value)
        found.setdefault(indices[name], {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def _optimised_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimiser's order, one parameter group after the other.

    torch's state_dict numbers parameters in this order. It equals the model's order only if there
    is a single parameter group.
    """
    names = {id(value): name for name, value in model.named_parameters()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]
