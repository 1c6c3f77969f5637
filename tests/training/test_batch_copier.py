"""Batches that are copied ahead are the loader's, in any order; its errors come when it is due."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.gpu.fake_cuda import NoEvent, NoStream
from ddpm_ray.data.loader import Batch
from ddpm_ray.training.batch_copier import BatchCopier

CPU = torch.device("cpu")


class Loader:
    """A loader whose batch 5 cannot be read; which batches it was asked for."""

    has_text = False

    def __init__(self) -> None:
        self.asked: list[int] = []

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        self.asked.append(step)
        if step == 5:
            raise OSError("batch 5 is damaged")
        size = 3 if step == 7 else 4
        images = torch.full((size, 2), step, dtype=torch.uint8)
        tokens = torch.full((size, 3), step) if self.has_text else None
        return Batch(images, torch.full((size,), step), tokens=tokens)


@pytest.fixture
def copier(monkeypatch: pytest.MonkeyPatch) -> BatchCopier:
    """As on CUDA, with the CPU for the device: operations end before they return."""
    replaced: dict[str, Any] = {
        "Stream": NoStream,
        "Event": NoEvent,
        "stream": nullcontext,
        "current_stream": NoStream,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    made = BatchCopier(torch.device("cuda"))
    made._device = CPU
    return made


def test_the_next_batch_is_read_while_this_one_is_used(copier: BatchCopier) -> None:
    loader = Loader()
    for step in (0, 1, 2, 3, 1, 2, 7, 8):  # goes back after 3, as a rewound run does
        found = copier.batch(loader, step)
        copier.prepare(loader, step + 1)
        wanted = Loader().batch(step)
        assert equal(found, wanted)
    assert loader.asked == [0, 1, 2, 3, 4, 1, 2, 3, 7, 8, 9]


def test_an_error_of_the_next_batch_waits_until_it_is_due(copier: BatchCopier) -> None:
    loader = Loader()
    copier.batch(loader, 4)
    copier.prepare(loader, 5)
    with pytest.raises(OSError, match="batch 5 is damaged"):
        copier.batch(loader, 5)
    assert loader.asked == [4, 5]


def test_on_a_cpu_nothing_is_read_ahead() -> None:
    loader, copier = Loader(), BatchCopier(CPU)
    copier.batch(loader, 0)
    copier.prepare(loader, 1)
    assert loader.asked == [0]


def equal(one: Batch, other: Batch) -> bool:
    """Whether both hold the same samples and labels."""
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_tokens_come_with_the_batch_that_they_belong_to(copier: BatchCopier) -> None:
    """Also where they are put into memory of two steps ago."""
    loader = Loader()
    loader.has_text = True
    for step in (0, 1, 2, 3, 1):
        found = copier.batch(loader, step)
        copier.prepare(loader, step + 1)
        assert found.tokens is not None
        assert found.tokens.tolist() == [[step] * 3] * 4


class Filler(Loader):
    """A loader that fills memory of the right shape, as ShardStream does."""

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        found = super().batch(step)
        if out is None:
            return found
        out.images.numpy()[...] = found.images.numpy()
        out.labels.numpy()[...] = found.labels.numpy()
        return out


def test_a_loader_writes_to_the_memory_that_the_device_reads(
    copier: BatchCopier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second use of each buffer on, no batch is copied on the host after it is loaded."""
    copy, copies, loader = torch.Tensor.copy_, list[int](), Filler()

    def counted(self: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        copies.append(step)
        return copy(self, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    for step in range(4):
        assert equal(copier.batch(loader, step), Loader().batch(step))
        copier.prepare(loader, step + 1)
    # Of images and labels: in step 0 batches 0 and 1 are copied to pinned memory and the device.
    assert [copies.count(step) for step in range(4)] == [8, 2, 2, 2]


def test_without_pinned_memory_one_line_says_so(
    copier: BatchCopier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty_like = torch.empty_like

    def refused(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return empty_like(*arguments, **options)

    monkeypatch.setattr(torch, "empty_like", refused)
    loader = Loader()
    for step in range(4):
        assert torch.equal(copier.batch(loader, step).labels, Loader().batch(step).labels)
        copier.prepare(loader, step + 1)
    (line,) = caplog.messages
    assert line == (
        "no pinned memory for batches (CUDA error: out of memory): copies to the device are "
        "slower. Raise the container's limit of locked memory (ulimit -l)"
    )
