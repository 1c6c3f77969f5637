"""Run one Ray task or actor call per shard, a bounded number at a time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import ray

Submit: TypeAlias = Callable[[int], "ray.ObjectRef[Any]"]
"""Starts the work on one shard."""


def as_completed(
    numbers: Iterable[int],
    idle: Iterable[Submit],
    starting: Mapping[ray.ObjectRef[Any], Submit] | None = None,
) -> Iterator[Any]:
    """Yield the results of shards `numbers` as they are done, one shard at a time per `Submit`.

    `idle` workers take shards at once, `starting` ones when their reference is ready, so that no
    shard waits for an actor that the cluster cannot place. Raises the error of a task, after which
    the others are cancelled.
    """
    waiting, free, starts = deque(numbers), deque(idle), dict(starting or {})
    running: dict[ray.ObjectRef[Any], Submit] = {}
    try:
        while waiting or running:
            while waiting and free:
                submit = free.popleft()
                running[submit(waiting.popleft())] = submit
            (first,), _ = ray.wait([*running, *starts])
            result = _result(first)
            if first in starts:
                free.append(starts.pop(first))
            else:
                free.append(running.pop(first))
                yield result
    finally:  # after an error or Ctrl-C; finished shards stay for the next run
        for reference in running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference)


def _result(reference: ray.ObjectRef[Any]) -> Any:
    """Return a task's result, or raise its own error without Ray's wrapper."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
