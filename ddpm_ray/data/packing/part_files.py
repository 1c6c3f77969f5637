"""Part files: one record per finished shard, from which an interrupted job continues.

A part file is written after its shard and holds the shard's row of the index. Its `identity` names
everything that the shard's bytes depend on, so parts of another source or of other options are not
used. The part files are deleted once the manifest is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from ddpm_ray.data import shards
from ddpm_ray.storage import object_store

PARTS = "parts"  # folder of the part files
NAME = re.compile(r"shard-([0-9]{5,})\.arrow\.json")


@dataclass(frozen=True)
class PartFiles:
    """The part files of the data set at `destination`, written by a job of this identity."""

    destination: str
    identity: str

    def numbers(self) -> list[int]:
        """Return the numbers of all parts in order, also of other jobs. Raises StorageError."""
        names = object_store.file_names(object_store.join(self.destination, PARTS))
        return [int(match[1]) for name in names if (match := NAME.fullmatch(name))]

    def find(self, number: int) -> dict[str, Any] | None:
        """Return the part of shard `number`, or None if the shard is not finished.

        Raises StorageError.
        """
        url = self._url(number)
        if not object_store.exists(url):
            return None
        part: dict[str, Any] = json.loads(object_store.read_bytes(url))
        shard = object_store.join(self.destination, shards.shard_name(number))
        complete = part["row"] is None or object_store.exists(shard)
        return part if part["identity"] == self.identity and complete else None

    def write(self, number: int, part: dict[str, Any]) -> None:
        """Store the part of shard `number`, whose "row" is None if the shard is empty."""
        held = {"identity": self.identity, **part}
        object_store.write_bytes(self._url(number), json.dumps(held).encode())

    def delete(self) -> None:
        """Delete all part files."""
        object_store.delete_folder(object_store.join(self.destination, PARTS))

    def _url(self, number: int) -> str:
        return object_store.join(self.destination, PARTS, f"{shards.shard_name(number)}.json")
