"""Tests of coroutines: bounded in time, and threads that a coroutine waits for."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

from tests.limits import ENDS_S


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine to its end."""

    async def bounded() -> None:
        async with asyncio.timeout(ENDS_S):
            await work()

    asyncio.run(bounded())


async def released(waits: threading.Event | threading.Semaphore) -> None:
    """Wait until another thread has set the event, or released the semaphore."""
    wait = waits.wait if isinstance(waits, threading.Event) else waits.acquire
    assert await asyncio.to_thread(wait, timeout=ENDS_S)
