"""Trying again what a store refuses now and then: 5xx, resets, time-outs, short bodies.

The clients below us give up after a handful of tries, or wait for seconds after the first: with
5 % of answers 503 a sequence of reads fell to 14 % of its speed. Here the first pause is short, and
drawn at random so that a thousand readers do not come back together; what bounds it is time.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from ddpm_ray.redaction import sanitize

log = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
TELL_AFTER_S = 5.0
# What no second try mends: it is told at once.
PERMANENT = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    ImportError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
PERMANENT_NUMBERS = {errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.ENOSYS, errno.EPERM}


def passes(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, OSError) and error.errno in PERMANENT_NUMBERS:
        return False
    # botocore's lack of credentials is a plain Exception; its ValueErrors are about parameters.
    return not isinstance(error, PERMANENT) and "Credential" not in type(error).__name__


def persistently(act: Callable[[], Result], what: str, patience_s: float) -> Result:
    """`act()`, tried again until about `patience_s` have gone; then, or if it must, it raises."""
    began_s, warned = time.monotonic(), False
    for attempt in count():
        try:
            return act()
        except Exception as error:
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)
            gone_s = time.monotonic() - began_s
            if not passes(error) or gone_s + pause_s > patience_s:
                raise
            if gone_s > TELL_AFTER_S and not warned:
                place = sanitize(f"{what}: {error}")
                log.warning("%s; tried again for up to %.0f s", place, patience_s)
                warned = True
        time.sleep(pause_s)
    raise AssertionError("count() has no end")
