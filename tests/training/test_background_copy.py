"""The state is copied while training goes on, and changes only once the copy is complete."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.training import background_copy
from ddpm_ray.training.background_copy import BackgroundCopy
from ddpm_ray.training.tensor_file import copy_all, file_bytes

WAIT_S = 0.05  # in which an update that does not wait has long happened


def groups(value: float) -> dict[str, dict[str, Tensor]]:
    return {"model": {"w": torch.full((8,), value), "b": torch.full((2, 3), value)}, "ema": {}}


def test_an_update_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = threading.Event()

    def slow(*arguments: Any) -> None:
        updated.wait(WAIT_S)
        copy_all(*arguments)

    monkeypatch.setattr(background_copy, "copy_all", slow)
    copy, state = BackgroundCopy(), groups(1.0)
    copies = copy.start(state)
    copy.before_update()
    updated.set()
    state["model"]["w"].fill_(2.0)
    copy.finish()
    assert torch.equal(copies["model"]["w"], torch.full((8,), 1.0))


def test_the_next_copy_takes_the_same_memory() -> None:
    """Pages of new memory cost five times the copy. Another layout gets another block."""
    copy, places = BackgroundCopy(), list[int]()
    for value in (1.0, 2.0):
        copies = copy.start(groups(value))
        copy.finish()
        assert torch.equal(copies["model"]["b"], torch.full((2, 3), value))
        places.append(copies["model"]["w"].data_ptr())
    assert places[0] == places[1]
    grown = groups(3.0)
    grown["model"]["w"] = torch.zeros(9)
    copies = copy.start(grown)
    copy.finish()
    assert torch.equal(copies["model"]["w"], grown["model"]["w"])


def test_memory_of_files_that_are_no_longer_copied_is_freed() -> None:
    """Adam's moments come with the first step, and split a group that was whole before."""
    copy = BackgroundCopy()
    for name in ("optimizer", "optimizer-00001-of-00002"):
        copy.start({name: {"w": torch.ones(8)}})
    copy.finish()
    assert [*copy._blocks] == ["optimizer-00001-of-00002"]


def test_the_error_of_a_copy_is_raised_where_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(background_copy, "copy_all", fails)
    copy = BackgroundCopy()
    copy.start(groups(1.0))
    for wait in (copy.before_update, copy.finish):
        with pytest.raises(RuntimeError, match="out of memory"):
            wait()


class Calls:
    """Streams and events of a GPU that note what is asked of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.main, self.side, self.event = (self._made(n) for n in ("main", "side", "event"))
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "Stream", lambda: self.side)
        patch.setattr(torch.cuda, "Event", lambda: self.event)
        patch.setattr(torch.cuda, "current_stream", lambda: self.main)
        patch.setattr(torch.cuda, "stream", self._inside)
        patch.setattr(background_copy, "copy_all", self._copy)

    def _made(self, name: str) -> Any:
        log = self.log

        class Noting:
            def __getattr__(self, method: str) -> Any:
                return lambda *_: log.append(f"{name}.{method}")

        return Noting()

    @contextlib.contextmanager
    def _inside(self, stream: Any) -> Iterator[None]:
        assert stream is self.side
        yield

    def _copy(self, targets: Any, sources: Any, non_blocking: bool) -> None:
        assert non_blocking
        self.log.append("copy")
        copy_all(targets, sources)


def test_a_gpu_copies_on_another_stream_between_two_updates(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The host waits in `finish` alone. Without pinned memory a line says what it costs."""
    calls, copy = Calls(monkeypatch), BackgroundCopy()
    with caplog.at_level(logging.WARNING):
        copies = copy.start({"model": {"w": torch.ones(8)}})
    assert calls.log == ["side.wait_stream", "copy", "event.record"]
    copy.before_update()
    copy.before_update()  # once is enough: a stream that waits cannot be captured in a graph
    copy.finish()
    assert calls.log[3:] == ["main.wait_event", "event.synchronize"]
    assert len(file_bytes(copies["model"])) > 32
    (line,) = caplog.messages
    assert line.startswith("no pinned memory of 0 MiB for checkpoints (")
    assert "ulimit -l" in line
