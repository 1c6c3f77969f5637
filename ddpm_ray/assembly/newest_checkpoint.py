"""Find the newest checkpoint of a run, and a device for its network."""

import json
from collections.abc import Sequence

import torch

from ddpm_ray.config.option_fields import shown
from ddpm_ray.data.dataset import NUMBERED
from ddpm_ray.storage import object_store
from ddpm_ray.training import checkpoint_folder, checkpoints
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.state import Snapshot


def usable_device(device: torch.device | str | None = None) -> torch.device:
    """Return `device`, or if it is empty or None, the GPU if there is one, else the CPU.

    Raises ValueError for a device that this process cannot use.
    """
    if device is None or device == "":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason: Exception | None = None
    try:
        found = torch.device(device)
        if found.type != "meta":  # has shapes but no values
            torch.empty(1, device=found)
            return found
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = error  # one of four types, by the kind of device
    gpus = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    raise ValueError(
        f"device is {shown(device)}, which is not usable here; choose from "
        f"{', '.join(['cpu', *gpus])}, or leave it out"
    ) from reason


def newest_checkpoint(url: str, *groups: str) -> tuple[str, Snapshot]:
    """URL and contents (only `groups`) of the checkpoint at `url`, or of the newest below it.

    Raises CheckpointError if there is none, or if it lacks a group.
    """
    where, snapshot = _newest(url, groups)
    if missing := [group for group in groups if group not in snapshot.tensors]:
        known = ", ".join(name for name in checkpoint_folder.group_names(where) if "ema" in name)
        raise CheckpointError(where, f"it has no average {missing[0]!r}", f"it has {known}")
    return where, snapshot


def _newest(url: str, groups: Sequence[str]) -> tuple[str, Snapshot]:
    remedy = "name a run's folder, its checkpoints folder, or one checkpoint in it"
    if object_store.exists(object_store.join(url, checkpoint_folder.MANIFEST)):
        try:
            return url, checkpoint_folder.read_checkpoint(url, groups=groups)
        except CheckpointError:
            if not holds_dataset(url):
                raise
            raise CheckpointError(url, "this is a data set and not a model", remedy) from None
    for candidate in (url, object_store.join(url, checkpoints.CHECKPOINTS)):
        if found := checkpoints.CheckpointStore(candidate).load(groups):
            return found
    # HTTP has no folders, and a bucket only those that contain an object.
    gone = not url.startswith(("http://", "https://")) and not object_store.exists(url)
    reason = "there is no such folder" if gone else "there is no committed checkpoint here"
    raise CheckpointError(url, reason, remedy)


def holds_dataset(url: str) -> bool:
    """Whether the manifest in the folder `url` is that of a data set."""
    manifest = checkpoint_folder.read_manifest(url)
    return bool(manifest and NUMBERED.fullmatch(str(json.loads(manifest).get("format"))))
