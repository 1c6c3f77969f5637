"""Which errors of a worker end the run at once, and which have the workers started again.

An error of the program, of the data or of the config comes again at the same place: three more
starts cost minutes and say nothing new. What passes is named here, and all else counts as fatal:
the loss of a peer, of the storage, of an actor, a fault of the device. To take a passing error for
a fatal one would lose a night; so where one class holds both kinds, as RuntimeError does ("expected
all tensors to be on the same device", and Gloo's "Connection closed by peer"), its text decides.
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
from ddpm_ray.storage.object_store import StorageError
from ddpm_ray.training.writer_lease import LeaseLostError, SupersededError

log = logging.getLogger(__name__)

TRANSIENT = (
    StorageError,  # an outage that was longer than cluster.storage_timeout_s
    OSError,  # a connection, or this node's own disk: the next start may be on another
    ray.exceptions.RayError,  # an actor or a node died
    dist.DistError,  # NCCL's, and those of the store in which workers meet
    SupersededError,  # of an earlier group that woke up: the newer one goes on. See LeaseLostError
    InjectedFaultError,  # stands for any of them
)
# Gloo raises plain RuntimeErrors; those in its pairs of sockets begin with the source file's path.
LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|aborted)|broken pipe|timed? ?out|socket", re.I
)
DEVICE = re.compile(r"(cuda|cudnn|hip) error|(cudnn|cublas)_status", re.I)
# A device reports mistakes of the program as well: an index out of range, a build without its
# architecture, a size that no kernel takes. ECC errors, launch failures and lost devices pass.
DEVICE_MISUSE = re.compile(
    r"device-side assert|no kernel image|invalid|not[ _]supported|bad_param|out of memory", re.I
)
SELF_EXPLANATORY = ValueError, MemoryError, torch.OutOfMemoryError  # their text needs no place


def is_transient(error: Exception) -> bool:
    """Whether workers that are started again need not meet `error` again."""
    if isinstance(error, (torch.OutOfMemoryError, LeaseLostError)):
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
    """Whether `error` only says that another worker is gone."""
    return type(error) is RuntimeError and bool(LOST_PEER.search(str(error)))


@contextmanager
def report_fatal_errors(control: RunControl) -> Iterator[None]:
    """Tell the driver, and the workers of another start, of an error that would come again."""
    try:
        yield
    except Exception as error:
        if not is_transient(error):
            control.report_fatal(reason(error))
        raise


def reason(error: Exception) -> str:
    """`error` in one line for a person; where it is none of ours, with its class and its place."""
    if isinstance(error, SELF_EXPLANATORY) or type(error).__module__.startswith("ddpm_ray"):
        return str(error) or type(error).__name__  # MemoryError has no text
    log.error("this error would come again", exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "ddpm_ray" in frame.filename] or list(frames)
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
