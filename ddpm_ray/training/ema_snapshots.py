"""Averages that a run keeps on its way, for others to be made of them (training/post_hoc_ema.py).

    <run>/snapshots/step-00000500/
        ema-width-0.05.safetensors ema-width-0.1.safetensors
        manifest.json       checksummed JSON: step, sizes and sha256 of these, written last

A step's objects have fixed names and, made again from a checkpoint, the same bytes, so a run that
was killed writes over its own. Which steps belong to the run is said by its checkpoints, which are
committed after them: readers never list, and what a crash left half written is not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from safetensors import SafetensorError
from safetensors import torch as safetensors

from ddpm_ray import fault_injection
from ddpm_ray.storage import checksummed, checksummed_json, object_store
from ddpm_ray.storage.checksummed import DamagedError
from ddpm_ray.storage.checksummed_json import ChecksumError
from ddpm_ray.training.background_writer import Background
from ddpm_ray.training.checkpoint_pointers import PREFIX
from ddpm_ray.training.checkpoints import MANIFEST, TENSORS, CheckpointError, described
from ddpm_ray.training.ema import width_group
from ddpm_ray.training.post_hoc_ema import gamma_of, misfit, reconstruct, weights
from ddpm_ray.training.state import Tensors, TrainingState, copied

SNAPSHOTS = "snapshots"  # below a run's folder


@dataclass(frozen=True)
class SnapshotStore:
    """The kept averages below `url`."""

    url: str

    def save(self, step: int, groups: dict[str, Tensors]) -> None:
        """Write the averages of `step`, over an earlier attempt's; raises StorageError."""
        where = self._folder(step)
        files = {f"{name}{TENSORS}": safetensors.save(group) for name, group in groups.items()}
        for name, data in files.items():
            fault_injection.at("object")
            object_store.write_bytes(object_store.join(where, name), data)
        fault_injection.at("manifest")
        manifest = {"step": step, "files": described(files)}
        checksummed_json.write(object_store.join(where, MANIFEST), manifest)

    def read(self, step: int, group: str) -> Tensors:
        """One average of `step`, every byte verified.

        Raises CheckpointError where it is damaged or was not kept, and StorageError.
        """
        where, name = self._folder(step), f"{group}{TENSORS}"
        remedy = "leave its step or its width out, or restore it from a backup"
        try:
            sha256 = checksummed_json.read(object_store.join(where, MANIFEST))["files"][name][
                "sha256"
            ]
            return safetensors.load(checksummed.read(object_store.join(where, name), sha256))
        except (DamagedError, ChecksumError, SafetensorError) as error:
            raise CheckpointError(object_store.join(where, name), "is damaged", remedy) from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(object_store.join(where, name), "was not kept", remedy) from error

    def _folder(self, step: int) -> str:
        return object_store.join(self.url, f"{PREFIX}{step:08d}")


def averaged(
    store: SnapshotStore, steps: Sequence[int], widths: Sequence[float], sigma_rel: float, step: int
) -> tuple[Tensors, float]:
    """The average of relative width `sigma_rel` at `step`, and how far its profile is off (0: not).

    Made of those of `widths` that were kept at `steps`, none of them later; one is in memory at a
    time. Raises ValueError where `step` is not one of them, and CheckpointError or StorageError.
    """
    if step not in steps:
        raise ValueError(
            f"step is {step}; averages were kept at {', '.join(map(str, steps)) or 'none'}"
        )
    kept = [(at, width) for width in widths for at in steps if at <= step]
    ts, gammas, gamma = [at for at, _ in kept], [gamma_of(w) for _, w in kept], gamma_of(sigma_rel)
    tensors = reconstruct(
        (store.read(at, width_group(width)) for at, width in kept),
        weights(ts, gammas, step, gamma),
    )
    return tensors, misfit(ts, gammas, step, gamma)


@dataclass(frozen=True)
class Keeper:
    """Keeps some of a run's averages every so many steps, and those of its last one."""

    state: TrainingState
    groups: Sequence[str]  # of state.averages
    every_steps: int  # 0: none are kept
    last_step: int
    store: SnapshotStore | None  # on the leader
    writer: Background  # the checkpoints': an average is whole before a checkpoint names it

    def keep(self, step: int) -> None:
        """Note the averages of `step`, where they are due; they are written in the background.

        All workers must call it. Raises what writing earlier ones raised.
        """
        if not self.every_steps or (step % self.every_steps and step != self.last_step):
            return
        self.state.kept_at.append(step)
        if self.store is not None:
            means = self.state.averages.means
            now = copied({name: means[name].state_dict() for name in self.groups})
            self.writer.start(partial(self.store.save, step, now))
