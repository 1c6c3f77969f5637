"""Network calls of several sampling jobs, computed as one batch.

A job runs the usual samplers and edits in a thread of its own. Its network is a `SharedNetwork`,
whose calls wait for an engine to compute them together with those of other jobs. t, labels, texts
and known pixels are rows of a batch, so jobs may differ in all of them; only the shapes of the rows
and the kinds of conditioning have to agree. B: images of a call; N: images of a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning, Network


class Caller(Protocol):
    """Answers the calls of a shared network, as Engine (engine.py) does."""

    def answer(self, network: Network, x_t: Tensor, t: Tensor, inputs: Conditioning) -> Tensor:
        """The output of `network`, once it is computed."""
        ...


class SharedNetwork:
    """A network whose calls are computed by an engine; it has the attributes of the network."""

    def __init__(self, network: Network, engine: Caller) -> None:
        self._network, self._engine = network, engine

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The model output; raises what the engine does, as JobCancelledError."""
        return self._engine.answer(self._network, x_t, t, conditioning)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the network: samplers use its text encoder."""
        return getattr(self._network, name)


@dataclass(eq=False)
class NetworkCall:
    """A call that waits to be computed."""

    network: Network
    x_t: Tensor  # [B, C, H, W]
    t: Tensor  # int64 [B]
    conditioning: Conditioning
    deadline_s: float  # of its job, on the monotonic clock

    @property
    def rows(self) -> int:
        """B."""
        return len(self.x_t)

    def kind(self) -> Hashable:
        """A key that is equal for calls that one batch can hold."""
        x = self.x_t
        return id(self.network), x.shape[1:], x.dtype, self.conditioning.signature


def fitting(calls: Sequence[NetworkCall], width: int) -> list[NetworkCall]:
    """The calls of the next batch: the most urgent one, and others of its kind, up to `width` rows.

    A call is never divided: one of more than `width` rows is computed alone.
    """
    ordered = sorted(calls, key=lambda call: call.deadline_s)
    first, *others = ordered
    chosen, rows, kind = [first], first.rows, first.kind()
    for call in others:
        if rows + call.rows <= width and call.kind() == kind:
            chosen.append(call)
            rows += call.rows
    return chosen


def compute(calls: Sequence[NetworkCall], width: int | None = None) -> list[Tensor]:
    """The output of each call, from one call of their network.

    With `width` each batch has exactly that many rows, filled by copies of the first row, and more
    rows take several batches: a convolution may sum in another order for another batch size, so the
    bits of a row depend on the size of its batch, and on nothing else of the other rows.
    """
    network, counts = calls[0].network, [call.rows for call in calls]
    x_t, t = (torch.cat([getattr(call, name) for call in calls]) for name in ("x_t", "t"))
    conditioning = calls[0].conditioning
    for call in calls[1:]:
        conditioning = conditioning.concat(call.conditioning)
    if width is None:
        return list(torch.split(network(x_t, t, conditioning), counts))
    rows = len(x_t)
    places = torch.arange(-(-rows // width) * width, device=x_t.device)
    places = torch.where(places < rows, places, 0)
    outputs = [
        network(x_t[part], t[part], conditioning.take(part)) for part in torch.split(places, width)
    ]
    return list(torch.split(torch.cat(outputs)[:rows], counts))
