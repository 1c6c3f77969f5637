"""Identity of a run or sweep: a random id and its first config, stored in its folder.

    <folder>/run.json            {"identity", "folder", "config" or "sweep", "data_fingerprint",
                                 "version": of ddpm_ray, "init_from": initial weights, if any,
                                 "text_encoder": one that is trained elsewhere, if any,
                                 "image_encoder", "embeddings_fingerprint": likewise}
    <folder>/claims/<id>.json    in a bucket: the proposal of each driver that started it at once

The MLflow run is found by the identity, so drivers that start a new name at once must agree on one.
"""

import logging
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

from ddpm_ray.assembly.image_embeddings import EMBEDDINGS_FINGERPRINT, named_set
from ddpm_ray.assembly.run_config import saved_config
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.storage.file_formats import package_version
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore

log = logging.getLogger(__name__)

IDENTITY = "run.json"  # in the run's folder
CLAIMS = "claims"
TRIALS = "trials"  # below a sweep's folder
SETTLE_S = 1.0  # see _agree
SETTLE_TRIES = 10  # then the run starts anyway: simultaneous starts of one name are rare
FROM_FACTS = (  # that a checkpoint holds, too
    "init_from",
    "text_encoder",
    "image_encoder",
    EMBEDDINGS_FINGERPRINT,
)
STALE_S = 60.0  # a claim that is this much older than ours is of a driver that died


def claim(
    folder: str, begun: dict[str, Any], changed_keys: Callable[[dict[str, Any]], list[str]]
) -> str:
    """Return the id of the run or sweep in `folder`; create one in a new folder.

    A new id is stored with `begun`. `changed_keys(stored)` returns a line for each option that must
    not change but differs from the stored one. Drivers that start at once get the same id; a copy
    of a folder gets its own. Raises ConfigError with these lines, CheckpointError if the stored
    config cannot be recovered, and StorageError.
    """
    where, lost = object_store.join(folder, IDENTITY), None
    if object_store.exists(where):
        found = _read(where)
    elif lost := _from_checkpoints(folder):
        found = lost
    else:
        mine = {"identity": uuid.uuid4().hex, "folder": folder} | begun
        mine["version"] = package_version()
        found = _agree(folder, mine)
        if found["identity"] == mine["identity"]:
            return str(found["identity"])
    lines = changed_keys(found)
    if begun["data_fingerprint"] != found["data_fingerprint"]:
        lines.append(
            f"data.url holds data set {begun['data_fingerprint'][:12]}, but the run began with "
            f"{found['data_fingerprint'][:12]}"
        )
    mine, theirs = (one.get(EMBEDDINGS_FINGERPRINT, "") for one in (begun, found))
    if mine != theirs:
        lines.append(
            f"embedding.url holds {named_set(mine)}, but the run began with {named_set(theirs)}"
        )
    if lines:
        remedy = f"{folder} holds another run; choose another name=, or restore these values"
        raise ConfigError("\n".join([*lines, remedy]))
    found = _relocate(found, folder)
    if lost:
        found = _agree(folder, found)
    log.info("continuing %s", folder)
    return str(found["identity"])


def stored_identity(folder: str) -> dict[str, Any]:
    """The stored identity of the run or sweep in `folder`; empty if there is none."""
    where = object_store.join(folder, IDENTITY)
    return _read(where) if object_store.exists(where) else {}


def trial_file(number: int) -> str:
    """Name of the file of trial `number`, below TRIALS in a sweep's folder."""
    return f"{number:05d}.json"


def _from_checkpoints(folder: str) -> dict[str, Any] | None:
    """Recover a lost IDENTITY from the newest checkpoint; None if there is no checkpoint."""
    if object_store.exists(object_store.join(folder, TRIALS, trial_file(0))):
        raise ConfigError(
            f"{folder} holds trials of a sweep, but its {IDENTITY} is lost; put it back, or choose "
            f"another name="
        )
    loaded = CheckpointStore(object_store.join(folder, CHECKPOINTS)).load(groups=())
    if loaded is None:
        return None
    where, facts = loaded[0], loaded[1].facts
    log.warning("%s/%s is lost; restoring it from %s", folder, IDENTITY, where)
    config = saved_config(facts, where)
    return {
        "identity": facts.get("identity") or uuid.uuid4().hex,
        "folder": object_store.join(config.storage, config.name),
        "config": facts["config"],
        "data_fingerprint": facts["data_fingerprint"],
        "version": facts.get("version", ""),
        **{key: facts[key] for key in FROM_FACTS if key in facts},
    }


def _agree(folder: str, mine: dict[str, Any]) -> dict[str, Any]:
    """Agree on the content of IDENTITY with drivers that start at once: `mine` or theirs.

    A local disk creates a file exclusively. Most buckets do not: they overwrite, whatever condition
    a request has. There each driver writes a claim under its own name, and all choose the lowest
    one. A driver whose claim comes after that choice checks for IDENTITY SETTLE_S later, when it is
    written; a driver that took longer to write it lists the claims again, a few times.
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
        lowest = next(url for url in urls if written_s - object_store.modified_s(url) < STALE_S)
        chosen = _read(lowest)
        tries, took_s = tries + 1, time.monotonic() - listed_s
        if tries == SETTLE_TRIES:
            log.warning(
                "%s: the storage takes %.1f s to read the claims on this name; another driver that "
                "started it at once may continue as a separate run",
                folder,
                took_s,
            )
        if took_s < SETTLE_S / 2 or tries == SETTLE_TRIES:
            checksummed_json.write(where, chosen)
            return chosen


def _relocate(found: dict[str, Any], folder: str) -> dict[str, Any]:
    """Adapt `found` if its folder was moved or copied; a copy gets an identity of its own.

    Files of earlier versions have no "folder" and stay as they are.
    """
    before = found.get("folder", folder)
    if before == folder:
        return found
    original, identity = object_store.join(before, IDENTITY), found["identity"]
    try:
        if not object_store.exists(original) or _read(original)["identity"] != identity:
            log.info("%s was moved from %s", folder, before)
            placed = found | {"folder": folder}
        elif _same_folder(before, folder):  # under another name
            return found
        else:
            log.warning(
                "%s is a copy of the run in %s, which still exists: it continues as a separate run "
                "with its own MLflow run",
                folder,
                before,
            )
            # Equal for all drivers that find the copy at once.
            own = uuid.uuid5(uuid.NAMESPACE_URL, f"{identity} {folder}").hex
            placed = found | {"identity": own, "copied_from": before, "folder": folder}
    except StorageError as error:
        log.warning(
            "%s: cannot check whether it is a copy (%s); it continues as the same run",
            folder,
            error,
        )
        return found
    checksummed_json.write(object_store.join(folder, IDENTITY), placed)
    return placed


def _same_folder(one: str, other: str) -> bool:
    """Whether both URLs name one folder: links, mounts, or a bucket under two schemes."""
    name = f"test-{secrets.token_hex(8)}"
    test_object = object_store.join(other, name)
    object_store.write_bytes(test_object, b"")
    try:
        return object_store.exists(object_store.join(one, name))
    finally:
        object_store.delete(test_object)


def _read(url: str) -> dict[str, Any]:
    found: dict[str, Any] = checksummed_json.read(url)
    return found
