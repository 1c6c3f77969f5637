"""State dicts of a network in the layout of another library, and back.

A layout names the tensors of another code base. One of our fused tensors, such as query, key and
value, may be several of theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.state_dict_names import Table

Tensors: TypeAlias = Mapping[str, Tensor]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Layout(Generic[AnyModule]):
    """Names and shapes that another code base gives to the tensors of a network."""

    name: str
    table: Callable[[AnyModule], Table]
    attention_axes: int = (
        0  # axes of length 1 behind the weights of attention layers (convolutions)
    )


def gathered(layout: Layout[AnyModule], network: AnyModule, tensors: Tensors) -> dict[str, Tensor]:
    """The state_dict of `network` from tensors in `layout`, all of which must be used.

    `network` may be on the meta device. Raises UnsupportedModelError for missing or extra names and
    for other shapes.
    """
    table, left = layout.table(network), dict(tensors)
    ours, missing = dict[str, Tensor](), list[str]()
    for name, expected in network.state_dict().items():
        module, _, part = name.rpartition(".")
        names = [f"{theirs}.{part}" for theirs in table.get(module, (f"(no place for {module})",))]
        missing += [name for name in names if name not in left]
        if missing:
            continue
        joined = torch.cat([left.pop(name) for name in names])
        if _without_ones(joined.shape) != _without_ones(expected.shape):
            raise UnsupportedModelError(
                layout.name,
                f"{names[0]} makes {list(joined.shape)} where this spec has {list(expected.shape)}",
            )
        ours[name] = joined.reshape(expected.shape)
    for problem, names in (("the file lacks", missing), ("there is no place for", [*left])):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UnsupportedModelError(layout.name, f"{problem} {', '.join(names[:3])}{more}")
    return ours


def scattered(layout: Layout[AnyModule], network: AnyModule, tensors: Tensors) -> dict[str, Tensor]:
    """Tensors in `layout` from the state_dict `tensors` of `network`; see `gathered`."""
    table, theirs = layout.table(network), dict[str, Tensor]()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in table:
            raise UnsupportedModelError(layout.name, f"there is no place for {name}")
        if tensor.ndim == 2 and ".attention." in name:
            tensor = tensor.reshape(*tensor.shape, *[1] * layout.attention_axes)
        for other, piece in zip(table[module], tensor.chunk(len(table[module])), strict=True):
            theirs[f"{other}.{part}"] = piece.clone(memory_format=torch.contiguous_format)
    return theirs


def on_meta_device(build: Callable[[], AnyModule]) -> AnyModule:
    """The network that `build` returns, on the meta device: shapes without values.

    Raises UnsupportedModelError where it cannot be built.
    """
    try:
        with torch.device("meta"):
            return build()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError("this spec", f"does not build a network: {error}") from error


def _without_ones(shape: torch.Size) -> list[int]:
    """The shape without its trailing 1s."""
    lengths = list(shape)
    while lengths and lengths[-1] == 1:
        lengths.pop()
    return lengths
