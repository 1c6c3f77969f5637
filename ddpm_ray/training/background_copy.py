"""Copies the training state to host memory while the next step computes its gradients."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.tensor_file import FileLayout, copy_all

log = logging.getLogger(__name__)


class BackgroundCopy:
    """A copy of tensor groups in host memory, which the next copy overwrites.

    Copies from a GPU go to pinned memory on a stream of their own, others run in a thread. Between
    `start` and `before_update` the tensors must not change; after `finish` the copy is complete.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}  # uint8, by group
        self._pool = ThreadPoolExecutor(1, "snapshot")  # starts its thread at the first copy
        self._thread_copy: Future[None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None  # on that stream
        self._unordered: torch.cuda.Event | None = None  # the same, until an update is after it

    def start(self, groups: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Begin to copy `groups`; return the copies, which are not complete before `finish`.

        Each group is laid out as its file. The earlier copy must no longer be in use.
        """
        self.finish()
        self._blocks = {name: block for name, block in self._blocks.items() if name in groups}
        on_cuda = any(tensor.is_cuda for group in groups.values() for tensor in group.values())
        copies = {}
        for name, group in groups.items():
            layout = FileLayout.of(group)
            copies[name] = layout.place(group, self._memory(name, layout.size, on_cuda))
        if on_cuda:
            self._copy_on_stream(copies, groups)
        else:
            self._thread_copy = self._pool.submit(_copy, copies, groups)
        return copies

    def before_update(self) -> None:
        """Order later changes of the tensors after the copy; a GPU waits, not the host."""
        copied, self._unordered = self._unordered, None
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        if self._thread_copy is not None:
            self._thread_copy.result()

    def finish(self) -> None:
        """Wait until the copy is complete; may be called in any thread. Raises its error."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._thread_copy is not None:
            self._thread_copy.result()

    def _copy_on_stream(self, copies: Mapping[str, Tensors], groups: Mapping[str, Tensors]) -> None:
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())  # the update before this
        with torch.cuda.stream(self._stream):
            _copy(copies, groups, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)
        self._unordered = self._copied

    def _memory(self, name: str, size: int, on_cuda: bool) -> Tensor:
        """The group's block of `size` bytes: that of the last copy, if it has this size."""
        block = self._blocks.pop(name, None)
        if block is None or block.numel() != size:
            block = _pinned(size) if on_cuda else torch.empty(size, dtype=torch.uint8)
        self._blocks[name] = block
        return block


def _copy(
    copies: Mapping[str, Tensors], groups: Mapping[str, Tensors], non_blocking: bool = False
) -> None:
    for name, group in copies.items():
        copy_all(group, groups[name], non_blocking)


def _pinned(size: int) -> Tensor:
    """Allocate `size` bytes of pinned memory; pageable where a limit, as a container's, forbids."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        log.warning(
            "no pinned memory of %d MiB for checkpoints (%s); each one stalls training for its "
            "copy: raise the limit of locked memory (ulimit -l)",
            size >> 20,
            reason,
        )
        return torch.empty(size, dtype=torch.uint8)
