"""Retries with exponential backoff for transient errors: 5xx, resets, time-outs, short bodies.

The clients below stop after a few attempts, or wait for seconds after the first: with 5 % of
answers 503, sequential reads fell to 14 % of their speed. Here the first pause is short and has
jitter, so that many readers do not retry at the same moment; total time is what limits retries.
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
WARN_AFTER_S = 5.0
# Errors that no retry mends: raised at once.
PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
PERMANENT_NUMBERS = {errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.ENOSYS, errno.EPERM}


def is_retryable(error: Exception) -> bool:
    """Return whether the same request may succeed a moment later."""
    if isinstance(error, OSError) and error.errno in PERMANENT_NUMBERS:
        return False
    # botocore raises a plain Exception for missing credentials, ValueError for wrong parameters.
    return not isinstance(error, PERMANENT) and "Credential" not in type(error).__name__


def retry(act: Callable[[], Result], what: str, timeout_s: float) -> Result:
    """Call `act` until it succeeds; raises its error if permanent, or after about `timeout_s`.

    `what` names the object in the log.
    """
    began_s, warned = time.monotonic(), False
    for attempt in count():
        try:
            return act()
        except Exception as error:
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1)
            elapsed_s = time.monotonic() - began_s
            if not is_retryable(error) or elapsed_s + pause_s > timeout_s:
                raise
            if elapsed_s > WARN_AFTER_S and not warned:
                log.warning(
                    "%s; retrying for up to %.0f s", sanitize(f"{what}: {error}"), timeout_s
                )
                warned = True
        time.sleep(pause_s)
    raise AssertionError("count() has no end")
