"""Warns at a run's start if the checkpoints that it keeps for ever do not fit on the disk."""

import logging
import shutil

from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.redaction import counted
from ddpm_ray.storage import object_store
from ddpm_ray.training.state import TrainingState

log = logging.getLogger(__name__)


def warn_of_shortage(config: TrainingConfig, state: TrainingState, url: str) -> None:
    """Log the arithmetic if training.keep_every_steps keeps more than the local disk of `url` has.

    Buckets have no limit that could be asked for.
    """
    every = config.keep_every_steps
    if not every or not object_store.is_local(url):
        return
    milestones = config.steps // every - state.step // every
    size, free = state.checkpoint_bytes(), shutil.disk_usage(_existing(url)).free
    recent = config.keep_checkpoints if state.step == 0 else 0  # later starts have them on the disk
    needed = (milestones + recent) * size
    if needed > free:
        log.warning(
            "%s: training.keep_every_steps=%d keeps %s of %s for ever%s: %s, and the disk has %s "
            "left; free space, or set a larger multiple of training.checkpoint_every_steps",
            url,
            every,
            counted(milestones, "more checkpoint"),
            _gigabytes(size),
            f", and the newest {recent}" if recent else "",
            _gigabytes(needed),
            _gigabytes(free),
        )


def _existing(url: str) -> str:
    """Return the nearest folder of `url` that exists."""
    path = object_store.local_path(url).absolute()
    return str(next(parent for parent in (path, *path.parents) if parent.exists()))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
