"""Network calls of several sampling jobs, computed as one batch.

A job runs the usual samplers and edits in a thread of its own. Its network is a `SharedNetwork`,
whose calls wait for an engine to compute them together with those of other jobs. t, labels, texts
and known pixels are rows of a batch, so jobs may differ in all of them; only the shapes of the rows
and the kinds of conditioning have to agree. B: rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning, Network
from ddpm_ray.sampling.cascade import Cascade
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.drawing_model import DrawingModel

Answer: TypeAlias = Callable[[Network, Tensor, Tensor, Conditioning], Tensor]
"""(network, x_t, t, conditioning) -> its output, once an engine has computed it."""
CUDA_ERROR = "CUDA error"  # in torch's errors after which a process cannot use the GPU
Model = TypeVar("Model", bound=DrawingModel)


class SharedNetwork:
    """A network whose calls are computed by an engine; it has the attributes of the network."""

    def __init__(self, network: Network, answer: Answer) -> None:
        self._network, self._answer = network, answer

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The model output; raises what the engine does, as JobCancelledError."""
        return self._answer(self._network, x_t, t, conditioning)

    def __getattr__(self, name: str) -> Any:
        """An attribute of the network: samplers use its text encoder."""
        if name.startswith("_"):  # of this object, before it is complete: copies ask for some
            raise AttributeError(name)
        return getattr(self._network, name)


def with_shared_networks(model: Model, answer: Answer) -> Model:
    """A copy of `model` whose networks, of all stages of a cascade, are `SharedNetwork`s.

    Models that guide it (autoguidance, classifiers) compute in the job's own thread.
    """
    changes: dict[str, Any] = {"denoiser": _with_shared(model.denoiser, answer)}
    if isinstance(model, Cascade):
        prior, larger = model.prior, model.upsamplers
        changes["prior"] = replace(prior, denoiser=_with_shared(prior.denoiser, answer))
        changes["upsamplers"] = tuple(
            replace(one, denoiser=_with_shared(one.denoiser, answer)) for one in larger
        )
    return replace(model, **changes)


def _with_shared(denoiser: Denoiser, answer: Answer) -> Denoiser:
    return replace(denoiser, network=SharedNetwork(denoiser.network, answer))


@dataclass(eq=False)
class NetworkCall:
    """A call that waits to be computed, in one batch or, part by part, in several."""

    network: Network
    x_t: Tensor  # [B, C, H, W]
    t: Tensor  # int64 [B]
    conditioning: Conditioning
    deadline_s: float  # of its job, on the monotonic clock
    parts: list[Tensor] = field(default_factory=list)  # outputs of its first rows

    @property
    def computed(self) -> int:
        """Rows that are computed."""
        return sum(map(len, self.parts))

    @property
    def left(self) -> int:
        """Rows that are not."""
        return len(self.x_t) - self.computed

    def output(self) -> Tensor | BaseException:
        """The whole output, once no row is left; or the error, as where memory runs out."""
        try:
            return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        except BaseException as error:  # noqa: BLE001 - the job raises it
            return error

    def kind(self) -> Hashable:
        """A key that is equal for calls that one batch can hold."""
        x = self.x_t
        return id(self.network), x.shape[1:], x.dtype, self.conditioning.signature


class CallRows(NamedTuple):
    """Some rows of a call."""

    call: NetworkCall
    first: int
    length: int


def next_batch(calls: Iterable[NetworkCall], width: int) -> list[CallRows]:
    """The next `width` rows: of the most urgent call, then of others of its kind."""
    first, *others = sorted(calls, key=lambda call: call.deadline_s)
    kind, room, chosen = first.kind(), width, list[CallRows]()
    for call in (first, *others):
        if room and call.kind() == kind:
            chosen.append(CallRows(call, call.computed, min(room, call.left)))
            room -= chosen[-1].length
    return chosen


def outputs_of(rows: Sequence[CallRows], width: int | None) -> list[Tensor | BaseException]:
    """The output of the rows of each call, or its own error for one that fails alone as well.

    `width` is that of computed_rows. On a GPU, the outputs are there, not only asked for.
    """
    with torch.inference_mode():
        try:
            outputs = computed_rows(rows, width)
            if outputs[0].is_cuda:  # else errors and times would be those of later calls
                torch.cuda.synchronize(outputs[0].device)
            return [*outputs]
        except BaseException as error:  # noqa: BLE001 - the job raises it
            if len(rows) == 1:
                return [error]
        return [output for one in rows for output in outputs_of([one], width)]


def gpu_fault(outputs: Sequence[Tensor | BaseException]) -> str:
    """Why this process cannot use its GPU any longer; empty: no error says so."""
    errors = [str(one) for one in outputs if isinstance(one, BaseException)]
    return next((f"the GPU has failed ({text})" for text in errors if CUDA_ERROR in text), "")


def computed_rows(rows: Sequence[CallRows], width: int | None = None) -> list[Tensor]:
    """The output of these rows of each call, from one call of their network.

    With `width` the batch has that many rows, filled by copies of the first: a convolution may sum
    in another order for another batch size, so the bits of a row depend on the size of its batch,
    and on nothing else of the other rows.
    """
    parts = [_part(one) for one in rows]
    x_t, t = torch.cat([x_t for x_t, _, _ in parts]), torch.cat([t for _, t, _ in parts])
    conditioning = parts[0][2]
    for _, _, other in parts[1:]:
        conditioning = conditioning.concat(other)
    count = len(x_t)
    if width is not None and count < width:
        places = torch.arange(width, device=x_t.device)
        places = torch.where(places < count, places, 0)
        x_t, t, conditioning = x_t[places], t[places], conditioning.take(places)
    output = rows[0].call.network(x_t, t, conditioning)[:count]
    return list(torch.split(output, [one.length for one in rows]))


def _part(rows: CallRows) -> tuple[Tensor, Tensor, Conditioning]:
    """The inputs of these rows."""
    call, first, count = rows
    if count == len(call.x_t):
        return call.x_t, call.t, call.conditioning
    part = torch.arange(first, first + count, device=call.x_t.device)
    return call.x_t[part], call.t[part], call.conditioning.take(part)
