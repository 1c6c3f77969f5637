"""Copies batches to the device; on CUDA each during the step before it, on a stream of its own."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ddpm_ray import fault_injection
from ddpm_ray.data.loader import Batch

log = logging.getLogger(__name__)


class Batches(Protocol):
    """Global batches by number."""

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        """Wait for this worker's share of the global batch of `step`.

        It is put into `out`, which is then returned, if the loader can and its shapes are the same.
        """
        ...


@dataclass
class _Buffers:
    """Memory for one batch on the host and on the device, used for every second step."""

    on_host: Batch  # pinned, where that is possible
    on_device: Batch
    copied: torch.cuda.Event  # from the host's to the device's
    used: torch.cuda.Event  # by the step

    @classmethod
    def of(cls, on_host: Batch, device: torch.device) -> "_Buffers":
        """Allocate the device's memory for `on_host`; the launched work is the first use of it."""
        on_device = on_host.map(partial(torch.empty_like, device=device))
        copied, used = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        buffers = cls(on_host, on_device, copied, used)
        # Work that is launched may still use this memory for what was there before.
        buffers.used.record(torch.cuda.current_stream(device))
        return buffers

    def fit(self, batch: Batch) -> bool:
        """Whether `batch` has the shapes and types of the memory."""
        return _forms(batch) == _forms(self.on_host)


class BatchCopier:
    """Batches on `device`. Elsewhere than on CUDA they are those of the data loader."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffers: dict[int, _Buffers] = {}  # by step % 2
        self._prepared: tuple[int, _Buffers | Exception] | None = None
        self._pins = True  # until it is refused

    def batch(self, batches: Batches, step: int) -> Batch:
        """Return batch `step` on the device; valid until that of step + 2 is prepared.

        Raises the errors of `batches`.
        """
        if self._stream is None:
            return batches.batch(step)
        if self._prepared is None or self._prepared[0] != step:
            self.prepare(batches, step)
        assert self._prepared is not None
        _, found = self._prepared
        self._prepared = None
        if isinstance(found, Exception):
            raise found
        torch.cuda.current_stream(self._device).wait_event(found.copied)
        return found.on_device

    def prepare(self, batches: Batches, step: int) -> None:
        """Begin to copy batch `step`; call it when the work of the step before is launched.

        Errors of `batches` are raised by `batch`: the step before may still be saved.
        """
        if self._stream is None:
            return
        place = step % 2
        if (before := self._buffers.get(place)) is not None:
            before.copied.synchronize()  # two steps ago
        try:
            with fault_injection.during("batch"):
                batch = batches.batch(step, before.on_host if before else None)
        except Exception as error:  # noqa: BLE001  # of any kind, and raised one step later
            self._prepared = step, error
            return
        if place not in self._buffers or not self._buffers[place].fit(batch):
            self._buffers[place] = _Buffers.of(self._pinned(batch), self._device)
        buffers, others = self._buffers[place], self._buffers.get(1 - place)
        if others is not None:
            others.used.record(torch.cuda.current_stream(self._device))
        if batch is not buffers.on_host:
            for held, part in _pairs(buffers.on_host, batch):
                held.copy_(part)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(buffers.used)
            for target, held in _pairs(buffers.on_device, buffers.on_host):
                target.copy_(held, non_blocking=True)
            buffers.copied.record(self._stream)
        self._prepared = step, buffers

    def _pinned(self, batch: Batch) -> Batch:
        """Memory of the host for `batch` that the device reads by itself, or else any memory."""
        if self._pins:
            try:
                return batch.map(partial(torch.empty_like, pin_memory=True))
            except RuntimeError as error:
                self._pins = False
                log.warning(
                    "no pinned memory for batches (%s): copies to the device are slower. Raise the "
                    "container's limit of locked memory (ulimit -l)",
                    str(error).partition("\n")[0].partition(". ")[0],
                )
        return batch.map(torch.empty_like)


def _forms(batch: Batch) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor."""
    return [(part.shape, part.dtype) for part in _parts(batch)]


def _pairs(to: Batch, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two batches of the same forms."""
    return zip(_parts(to), _parts(batch), strict=True)


def _parts(batch: Batch) -> list[Tensor]:
    return [*batch.tensors, *(part for part in batch.inputs if part is not None)]
