"""Writer leases (fencing): each start of a run takes the next number and supersedes earlier starts.

    <url>/writers/00000007.json     start 7: owner, host, time

A driver takes a number, and so does each worker group that it starts. A worker that was frozen or
partitioned finds the next number taken when it resumes, and commits nothing more; so does a second
job that was given the same name by mistake. With conditional writes (`If-None-Match`: AWS, local
disk) each number has one owner. Without them, two simultaneous starts may both take a number: the
last writer owns it, and the other one finds out when it checks before its next commit.
"""

import os
import secrets
import socket
import time
from dataclasses import dataclass, field, replace

from ddpm_ray.storage import checksummed_json, object_store


class SupersededError(RuntimeError):
    """A later worker group of the same driver has taken over; args are (url, its number)."""

    def __str__(self) -> str:
        url, epoch = self.args
        return f"{url}: start {epoch} of this run goes on with it; this process commits no more"


class LeaseLostError(SupersededError):
    """Another driver has taken over the run."""

    def __str__(self) -> str:
        return f"{super().__str__()}. Another job has the same name=: give one of the two another"


def _token() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Lease:
    """The right to commit below `url` until a later start takes the next number."""

    url: str
    epoch: int = 0
    owner: str = field(default_factory=_token)  # a driver and all workers it starts
    token: str = field(default_factory=_token)  # one start

    @classmethod
    def first(cls, url: str, after: int = 0) -> "Lease":
        """Take a driver's lease: the first free number above `after`. Raises StorageError."""
        return cls(url, after)._next(refuse_others=False)

    def renewed(self) -> "Lease":
        """Take the next free number for a new worker group of the same owner.

        Raises LeaseLostError if a later number has another owner, and StorageError.
        """
        return self._next(refuse_others=True)

    def check(self) -> None:
        """Raise SupersededError if a later start took over, LeaseLostError if of another job."""
        if object_store.exists(self._place(1)):
            self._refuse_others(self.epoch + 1)
            raise SupersededError(self.url, self.epoch + 1)
        if checksummed_json.read(self._place())["token"] != self.token:
            self._refuse_others(self.epoch)
            raise SupersededError(self.url, self.epoch)

    def other_owner(self) -> str:
        """Return host and process of another job that has taken over the run, or ""."""
        later = 0
        while object_store.exists(self._place(later)):
            holder = checksummed_json.read(self._place(later))
            if holder["owner"] != self.owner:
                return f"process {holder['pid']} on {holder['host']}"
            later += 1
        return ""

    def _next(self, refuse_others: bool) -> "Lease":
        lease = replace(self, token=_token())
        who = {"host": socket.gethostname(), "pid": os.getpid(), "unix_s": time.time()}
        while True:
            lease = replace(lease, epoch=lease.epoch + 1)
            claim = {"owner": lease.owner, "token": lease.token} | who
            # Checked first, because most stores would overwrite it.
            if not object_store.exists(lease._place()) and checksummed_json.write_new(
                lease._place(), claim
            ):
                return lease
            if refuse_others:
                self._refuse_others(lease.epoch)

    def _refuse_others(self, epoch: int) -> None:
        if checksummed_json.read(self._place(epoch - self.epoch))["owner"] != self.owner:
            raise LeaseLostError(self.url, epoch)

    def _place(self, later: int = 0) -> str:
        return object_store.join(self.url, "writers", f"{self.epoch + later:08d}.json")
