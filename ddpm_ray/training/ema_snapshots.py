"""EMA snapshots: power-function averages saved during training for post-hoc EMA (post_hoc_ema.py).

    <run>/snapshots/step-00000500/
        ema-width-0.05.safetensors ema-width-0.1.safetensors
        manifest.json       checksummed JSON: step, sizes and sha256 of these, written last

File names and contents depend on the step alone, so a restarted run overwrites its own snapshots.
The list of snapshot steps is stored in the checkpoints, which are committed after the snapshots:
readers never list folders, and files that a crash left incomplete are not read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray import fault_injection
from ddpm_ray.storage import checksummed, checksummed_json, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.checksummed_json import ChecksumError
from ddpm_ray.storage.errors import MissingObjectError
from ddpm_ray.training.background_writer import BackgroundWriter
from ddpm_ray.training.checkpoint_folder import MANIFEST, TENSORS, CheckpointError, described
from ddpm_ray.training.checkpoint_pointers import PREFIX
from ddpm_ray.training.ema import width_group
from ddpm_ray.training.optimizer_moments import Tensors
from ddpm_ray.training.post_hoc_ema import gamma_of, profile_error, reconstruct_ema, weights
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.tensor_file import file_bytes, packed

SNAPSHOTS = "snapshots"  # below a run's folder


@dataclass(frozen=True)
class SnapshotStore:
    """The EMA snapshots below `url`."""

    url: str
    remedy: str = "leave its step or its width out, or restore it from a backup"  # of errors

    def save(self, step: int, groups: dict[str, Tensors]) -> None:
        """Write the averages of `step`, overwriting an earlier attempt. Raises StorageError."""
        where = self._folder(step)
        files = {f"{name}{TENSORS}": file_bytes(group) for name, group in groups.items()}
        for name, data in files.items():
            fault_injection.at("object")
            object_store.write_bytes(object_store.join(where, name), data)
        fault_injection.at("manifest")
        manifest = {"step": step, "files": described(files.items())}
        checksummed_json.write(object_store.join(where, MANIFEST), manifest)

    def read(self, step: int, group: str) -> Tensors:
        """Read and verify one average of `step`.

        Raises CheckpointError if it is damaged, missing or was not saved, and StorageError.
        """
        sha256, url = self.sha256(step, group), self._file(step, f"{group}{TENSORS}")
        with self._problems_named(url):
            return safetensors.load(checksummed.read_verified(url, sha256))

    def sha256(self, step: int, group: str) -> str:
        """The sha256 of one average of `step`, by its manifest. Raises the same errors."""
        name = f"{group}{TENSORS}"
        with self._problems_named(self._file(step, name)):
            manifest = checksummed_json.read(self._file(step, MANIFEST))
            return str(manifest["files"][name]["sha256"])

    @contextmanager
    def _problems_named(self, url: str) -> Iterator[None]:
        """Raise CheckpointError for a file at `url` that can never be read; not in an outage."""
        try:
            yield
        except MissingObjectError as error:
            raise CheckpointError(url, "is missing", self.remedy) from error
        except (DamagedError, ChecksumError, SafetensorError) as error:
            raise CheckpointError(url, "is damaged", self.remedy) from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(url, "was not kept", self.remedy) from error

    def _file(self, step: int, name: str) -> str:
        return object_store.join(self._folder(step), name)

    def _folder(self, step: int) -> str:
        return object_store.join(self.url, f"{PREFIX}{step:08d}")


def averaged(
    store: SnapshotStore, steps: Sequence[int], widths: Sequence[float], sigma_rel: float, step: int
) -> tuple[Tensors, float]:
    """Return the average of relative width `sigma_rel` at `step`, and its profile error.

    Combines the snapshots of `widths` at those of `steps` that are not after `step`, one in memory
    at a time. The profile error is relative, 0 for an exact match. Raises
    ValueError if `step` is not one of `steps`, and CheckpointError or StorageError.
    """
    if step not in steps:
        raise ValueError(
            f"step is {step}; EMA snapshots exist at {', '.join(map(str, steps)) or 'none'}"
        )
    kept = [(at, width) for width in widths for at in steps if at <= step]
    ts, gammas, gamma = [at for at, _ in kept], [gamma_of(w) for _, w in kept], gamma_of(sigma_rel)
    tensors = reconstruct_ema(
        (store.read(at, width_group(width)) for at, width in kept),
        weights(ts, gammas, step, gamma),
    )
    return tensors, profile_error(ts, gammas, step, gamma)


@dataclass(frozen=True)
class EmaSnapshotter:
    """Saves EMA snapshots every `every_steps` steps and at the last step."""

    state: TrainingState
    groups: Sequence[str]  # of state.averages
    every_steps: int  # 0: no snapshots
    last_step: int
    store: SnapshotStore | None  # on rank 0 only
    writer: BackgroundWriter  # that of checkpoints: a snapshot is complete before it is named

    def snapshot(self, step: int) -> None:
        """Copy the averages of `step` if due; a background thread writes them.

        All workers must call it. Raises the error of an earlier write.
        """
        if not self.every_steps or (step % self.every_steps and step != self.last_step):
            return
        self.state.ema_snapshot_steps.append(step)
        if self.store is not None:
            means = self.state.averages.means
            now = {name: packed(means[name].state_dict()) for name in self.groups}
            self.writer.start(partial(self.store.save, step, now))
