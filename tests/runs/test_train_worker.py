"""The end of a worker: each object is closed, also after an error of another."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from ddpm_ray.runs.train_worker import close_all

UNDELIVERED = 3


@dataclass
class Closing:
    """Something that is closed; `fails`: with an error."""

    name: str
    closed: list[str]
    fails: bool

    def close(self, *_: float) -> int:
        self.closed.append(self.name)
        if self.fails:
            raise OSError(f"{self.name} cannot be closed")
        return UNDELIVERED


@pytest.mark.parametrize("fails", ["", "stream", "spare", "sink"])
def test_an_error_of_one_does_not_keep_the_others_from_being_closed(fails: str) -> None:
    """Else the spare process keeps a GPU, and the last rows are lost."""
    closed, names = list[str](), ("stream", "spare", "sink")
    parts = {name: Closing(name, closed, name == fails) for name in names}
    run: Any = SimpleNamespace(**parts, end_trace=lambda: None)
    if fails:
        with pytest.raises(OSError, match=f"{fails} cannot be closed"):
            close_all(run, 1.0)
    else:
        assert close_all(run, 1.0) == UNDELIVERED
    assert closed == list(names)


def test_other_workers_have_only_a_stream_to_close() -> None:
    closed = list[str]()
    stream = Closing("stream", closed, False)
    run: Any = SimpleNamespace(stream=stream, spare=None, sink=None, end_trace=lambda: None)
    assert close_all(run, 1.0) == 0
    assert closed == ["stream"]
