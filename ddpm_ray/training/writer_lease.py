"""Who may commit: each start of a run takes the next number, and ends the starts before it.

    <url>/writers/00000007.json     the seventh start: whose, where, when

A driver takes a number, and so does each group of workers that it starts. A worker that was frozen,
or cut off from the cluster, and comes back while others go on finds the next number taken and
commits nothing more; so does a second job that was given the same name by mistake. Where the store
knows `If-None-Match` (AWS, a local disk) a number has one owner. Where it does not, two that start
in the same moment may both think so: who wrote last keeps it, the other learns it in time.
"""

import os
import secrets
import socket
import time
from dataclasses import dataclass, field, replace

from ddpm_ray.storage import checksummed_json, object_store


class SupersededError(RuntimeError):
    """A later group of workers of the same driver goes on; args are (url, its number)."""

    def __str__(self) -> str:
        url, epoch = self.args
        return f"{url}: start {epoch} of this run goes on with it; this process commits no more"


class LeaseLostError(SupersededError):
    """Another driver goes on with the run."""

    def __str__(self) -> str:
        return f"{super().__str__()}. Another job has the same name=: give one of the two another"


def _token() -> str:
    return secrets.token_hex(8)


@dataclass(frozen=True)
class Lease:
    """The right to commit below `url` until somebody takes the next number; plain values."""

    url: str
    epoch: int = 0
    owner: str = field(default_factory=_token)  # of the driver and of all workers that it starts
    token: str = field(default_factory=_token)  # of this start

    @classmethod
    def first(cls, url: str, after: int = 0) -> "Lease":
        """A driver's: the first free number beyond `after`, whoever had that. StorageError."""
        return cls(url, after)._next(refuse_others=False)

    def renewed(self) -> "Lease":
        """The next free number, for workers of the same owner.

        Raises LeaseLostError where one after this has another owner, and StorageError.
        """
        return self._next(refuse_others=True)

    def check(self) -> None:
        """Raises SupersededError once somebody else goes on, LeaseLostError if with another job."""
        if object_store.exists(self._place(1)):
            self._refuse_others(self.epoch + 1)
            raise SupersededError(self.url, self.epoch + 1)
        if checksummed_json.read(self._place())["token"] != self.token:
            self._refuse_others(self.epoch)
            raise SupersededError(self.url, self.epoch)

    def other_owner(self) -> str:
        """Host and process of another job that goes on with the run; empty where none does."""
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
            # Asked first, because most stores would write over what is there.
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
