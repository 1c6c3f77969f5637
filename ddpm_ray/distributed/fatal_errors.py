"""Classify a worker's errors: transient ones restart the group, all others end the run.

Errors of the program, the data or the config recur at the same step: three restarts cost minutes
and add nothing. Transient errors are listed here (a lost peer, storage, actor or device); all
others are fatal. Ending a run for a transient error would lose a night. Some classes hold both
kinds, as RuntimeError does ("expected all tensors to be on the same device", and Gloo's "Connection
closed by peer"); there the message decides.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import ray.exceptions
import torch
import torch.distributed as dist

from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.fault_injection import InjectedFaultError
from ddpm_ray.storage.errors import PermanentStorageError, StorageError
from ddpm_ray.training.writer_lease import LeaseLostError, SupersededError

log = logging.getLogger(__name__)

TRANSIENT = (
    StorageError,  # an outage longer than cluster.storage_timeout_s
    OSError,  # a connection, or this node's disk: the restart may use another node
    ray.exceptions.RayError,  # an actor or a node died
    dist.DistError,  # NCCL, and the rendezvous store
    SupersededError,  # an earlier group woke up while a newer one runs; see LeaseLostError
    InjectedFaultError,  # simulates any of them
)
FATAL = (  # of these classes' subclasses
    PermanentStorageError,  # a full disk: the restart would write to the same folder
    LeaseLostError,
    torch.OutOfMemoryError,
)
# Gloo raises plain RuntimeErrors; socket errors begin with the path of its source file.
LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|aborted)|broken pipe|timed? ?out|socket", re.I
)
DEVICE = re.compile(r"(cuda|cudnn|hip) error|(cudnn|cublas)_status", re.I)
# Device errors that are errors of the program: an index out of range, a build without this
# architecture, an unsupported size. ECC errors, launch failures and lost devices are transient.
DEVICE_MISUSE = re.compile(
    r"device-side assert|no kernel image|invalid|not[ _]supported|bad_param|out of memory", re.I
)
SELF_EXPLANATORY = (
    ValueError,
    MemoryError,
    torch.OutOfMemoryError,
)  # whose message needs no source line


def is_transient(error: Exception) -> bool:
    """Whether a restart of the workers may avoid `error`."""
    if isinstance(error, FATAL):
        return False
    if isinstance(error, TRANSIENT):
        return True
    if type(error) not in (RuntimeError, torch.AcceleratorError):
        return False
    text = str(error)
    if isinstance(error, torch.AcceleratorError) or DEVICE.search(text):
        return not DEVICE_MISUSE.search(text)
    return is_lost_peer(error)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` only follows from the loss of another worker."""
    return type(error) is RuntimeError and bool(LOST_PEER.search(str(error)))


@contextmanager
def report_fatal_errors(control: RunControl) -> Iterator[None]:
    """Report an error that would recur to the driver and to later groups, and re-raise it."""
    try:
        yield
    except Exception as error:
        if not is_transient(error):
            control.report_fatal(fatal_reason(error))
        raise


def fatal_reason(error: Exception) -> str:
    """Summarise `error` in one line; with class and source line if ddpm_ray did not raise it."""
    if isinstance(error, SELF_EXPLANATORY) or type(error).__module__.startswith("ddpm_ray"):
        return str(error) or type(error).__name__  # MemoryError has no text
    log.error("fatal error: a restart would fail again", exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "ddpm_ray" in frame.filename] or list(frames)
    source = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{source}"
