"""Who a run or sweep is: the id that its folder keeps, and what it began with.

    <folder>/run.json            {"identity", "folder", "config" or "sweep", "data_fingerprint",
                                 "version": of ddpm_ray}
    <folder>/claims/<id>.json    in a bucket: what each driver that began it at the same time wants

MLflow's run is found by the identity, so that two drivers of one new name must get the same one.
"""

import logging
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

from ddpm_ray.assembly.training_run import saved_config
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.file_formats import package_version
from ddpm_ray.storage.object_store import StorageError
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore

log = logging.getLogger(__name__)

IDENTITY = "run.json"  # in the run's folder
CLAIMS = "claims"
TRIALS = "trials"  # below a sweep's folder
SETTLE_S = 1.0  # see _settled
SETTLE_TRIES = 10  # then a run begins all the same: few names are begun twice at one moment
FORGOTTEN_S = 60.0  # a claim so much older than ours is of a driver that died of something


def claim(
    folder: str, begun: dict[str, Any], changed_keys: Callable[[dict[str, Any]], list[str]]
) -> str:
    """The id of the run or sweep in `folder`: a new one in a new folder, else the one found there.

    `begun` is written down with a new one; `changed_keys` compares with what was found, a line for
    each key that is kept for life and differs now. Drivers that begin at the same time get one id.
    A copy of a folder gets an id of its own. Raises ConfigError with these lines, CheckpointError
    where what was begun can no longer be known, and StorageError.
    """
    where, lost = object_store.join(folder, IDENTITY), None
    if object_store.exists(where):
        found = _read(where)
    elif lost := _of_checkpoints(folder):
        found = lost
    else:
        mine = {"identity": uuid.uuid4().hex, "folder": folder} | begun
        mine["version"] = package_version()
        found = _settled(folder, mine)
        if found["identity"] == mine["identity"]:
            return str(found["identity"])
    lines = changed_keys(found)
    if begun["data_fingerprint"] != found["data_fingerprint"]:
        lines.append(
            f"data.url holds data set {begun['data_fingerprint'][:12]}, but the run began with "
            f"{found['data_fingerprint'][:12]}"
        )
    if lines:
        remedy = f"{folder} holds another run; choose another name=, or go back to its values"
        raise ConfigError("\n".join([*lines, remedy]))
    found = _placed(found, folder)
    if lost:
        found = _settled(folder, found)
    log.info("continuing %s", folder)
    return str(found["identity"])


def trial_file(number: int) -> str:
    """Name of the file of trial `number`, below TRIALS in a sweep's folder."""
    return f"{number:05d}.json"


def _of_checkpoints(folder: str) -> dict[str, Any] | None:
    """What the newest checkpoint says of a run whose IDENTITY is lost; None where none is there."""
    if object_store.exists(object_store.join(folder, TRIALS, trial_file(0))):
        raise ConfigError(
            f"{folder} holds trials of a sweep, but its {IDENTITY} is lost; put it back, or choose "
            f"another name="
        )
    loaded = CheckpointStore(object_store.join(folder, CHECKPOINTS)).load(groups=())
    if loaded is None:
        return None
    where, facts = loaded[0], loaded[1].facts
    log.warning("%s/%s is lost; taking what %s says of the run", folder, IDENTITY, where)
    config = saved_config(facts, where)
    return {
        "identity": facts.get("identity") or uuid.uuid4().hex,
        "folder": object_store.join(config.storage, config.name),
        "config": facts["config"],
        "data_fingerprint": facts["data_fingerprint"],
        "version": facts.get("version", ""),
    }


def _settled(folder: str, mine: dict[str, Any]) -> dict[str, Any]:
    """What IDENTITY holds from now on: `mine`, or that of a driver that began at the same time.

    A local disk creates a file once. Most buckets do not: they write over, whatever condition they
    are asked to keep. There each driver writes its claim under a name of its own, and all take the
    lowest of those that are there. One that comes after that list was made also looks SETTLE_S
    after its own claim, and by then IDENTITY is written: a driver for which that took longer begins
    again with the list, a few times.
    """
    where, claims = object_store.join(folder, IDENTITY), object_store.join(folder, CLAIMS)
    if object_store.is_local(folder):
        return mine if checksummed_json.write_new(where, mine) else _read(where)
    own = object_store.join(claims, f"{mine['identity']}.json")
    checksummed_json.write(own, mine)
    written_s, tries = object_store.modified_s(own), 0
    while True:
        time.sleep(SETTLE_S)
        if object_store.exists(where):
            return _read(where)
        listed_s = time.monotonic()
        urls = [object_store.join(claims, name) for name in sorted(object_store.list_files(claims))]
        lowest = next(url for url in urls if written_s - object_store.modified_s(url) < FORGOTTEN_S)
        chosen = _read(lowest)
        tries, took_s = tries + 1, time.monotonic() - listed_s
        if tries == SETTLE_TRIES:
            log.warning(
                "%s: the storage takes %.1f s to read the claims of this name; another driver that "
                "began it at the same moment may go on as another run",
                folder,
                took_s,
            )
        if took_s < SETTLE_S / 2 or tries == SETTLE_TRIES:
            checksummed_json.write(where, chosen)
            return chosen


def _placed(found: dict[str, Any], folder: str) -> dict[str, Any]:
    """`found` as it is for the folder in which it lies: moved with it, or a copy's own.

    What earlier versions wrote names no folder, and stays as it is.
    """
    before = found.get("folder", folder)
    if before == folder:
        return found
    original, identity = object_store.join(before, IDENTITY), found["identity"]
    try:
        if not object_store.exists(original) or _read(original)["identity"] != identity:
            log.info("%s was moved there from %s", folder, before)
            placed = found | {"folder": folder}
        elif _same_place(before, folder):  # by another name
            return found
        else:
            log.warning(
                "%s is a copy of the run in %s, which is still there: it goes on as a run of its "
                "own, in an MLflow run of its own",
                folder,
                before,
            )
            # The same for each driver that finds the copy at the same time.
            own = uuid.uuid5(uuid.NAMESPACE_URL, f"{identity} {folder}").hex
            placed = found | {"identity": own, "copied_from": before, "folder": folder}
    except StorageError as error:
        log.warning("%s: whether it is a copy is not known (%s); it goes on as the run that it is "
                    "called", folder, error)  # fmt: skip
        return found
    checksummed_json.write(object_store.join(folder, IDENTITY), placed)
    return placed


def _same_place(one: str, other: str) -> bool:
    """Whether both URLs lead to one folder: by links, mounts, or a bucket under two schemes."""
    name = f"place-{secrets.token_hex(8)}"
    probe = object_store.join(other, name)
    object_store.write_bytes(probe, b"")
    try:
        return object_store.exists(object_store.join(one, name))
    finally:
        object_store.delete(probe)


def _read(url: str) -> dict[str, Any]:
    found: dict[str, Any] = checksummed_json.read(url)
    return found
