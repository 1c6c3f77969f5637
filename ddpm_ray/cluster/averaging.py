"""Which width of average is best: made of what a run kept, each scored by a group of workers."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm_ray.average_config import AverageConfig
from ddpm_ray.cluster.evaluation_run import evaluate
from ddpm_ray.config import RunConfig
from ddpm_ray.data import storage
from ddpm_ray.knobs import ConfigError, from_dict
from ddpm_ray.training import checkpoints
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointError, CheckpointStore
from ddpm_ray.training.snapshots import SNAPSHOTS, SnapshotStore, averaged
from ddpm_ray.training.state import Snapshot

log = logging.getLogger(__name__)

SCRATCH = "average-"  # starts folders below a run's, which are there while they are scored
POOR = 0.1  # misfit from which an average is hardly the one that was asked for


@dataclass(frozen=True)
class KeptAverages:
    """The averages that a run kept, as its newest checkpoint vouches for them."""

    run: str  # its folder's URL
    facts: dict[str, Any]  # of that checkpoint
    widths: tuple[float, ...]
    steps: list[int]

    @classmethod
    def of(cls, run: str) -> "KeptAverages":
        """Those of the run in the folder `run`; raises CheckpointError where it kept none."""
        found = CheckpointStore(storage.join(run, CHECKPOINTS)).load()
        facts = found[1].facts if found else {}
        if not facts.get("kept_at"):
            remedy = (
                "train with training.ema_snapshot_widths=[0.05,0.1] and "
                "training.ema_snapshot_every_steps=..., then name the run's folder"
            )
            raise CheckpointError(run, "no averages were kept here", remedy)
        widths = from_dict(RunConfig, facts["config"]).training.ema_snapshot_widths
        return cls(run, facts, widths, [int(step) for step in facts["kept_at"]])

    def write(self, sigma_rel: float, step: int, url: str) -> float:
        """Put the average of that width at `step` into the folder `url`, as a checkpoint.

        It can be sampled from, not trained on. The answer is the misfit of its profile.
        """
        store = SnapshotStore(storage.join(self.run, SNAPSHOTS))
        tensors, misfit = averaged(store, self.steps, self.widths, sigma_rel, step)
        made_of = {"sigma_rel": sigma_rel, "misfit": misfit, "widths": list(self.widths)}
        made_of["steps"] = [at for at in self.steps if at <= step]
        facts = self.facts | {"step": step, "average": made_of, "kept_at": [], "unsent_rows": []}
        for name, data in checkpoints.objects(Snapshot({"ema": tensors}, facts)).items():
            storage.write_bytes(storage.join(url, name), data)
        return misfit


def sweep(run: str, config: AverageConfig, home: Path, out: str = "") -> dict[str, Any]:
    """Scores by width and the best of them, which is left in the folder `out` where one is named.

    Raises CheckpointError where the run kept no averages or they are damaged, ConfigError for a
    step without any, and what evaluating raises. Relative paths lie below `home`.
    """
    kept = KeptAverages.of(storage.absolute(run, home))
    step = config.step or kept.steps[-1]
    if step not in kept.steps:
        near = min(kept.steps, key=lambda at: abs(at - step))
        raise ConfigError(f"step is {step}; no averages were kept then: try step={near}")
    found = []
    for width in config.widths:
        found.append(_scored(kept, width, step, config, home))
        metric = _distance(found[-1]["metrics"])
        score, misfit = found[-1]["metrics"][metric], found[-1]["misfit"]
        if len(found) == 1:
            log.info("  width  %14s  misfit", metric)
        log.info("%7.4g  %14.5g  %6.2g", width, score, misfit)
        if misfit > POOR:
            log.warning(
                "width %g is out of reach of what was kept (misfit %.2f of its profile); keep "
                "widths nearer to it, or keep them more often", width, misfit,
            )  # fmt: skip
    scores = [one["metrics"][metric] for one in found]
    best = scores.index(min(scores, key=lambda score: (math.isnan(score), score)))
    result: dict[str, Any] = {
        "run": kept.run, "step": step, "metric": metric, "widths": list(config.widths),
        "scores": scores, "misfits": [one["misfit"] for one in found],
        "best": config.widths[best], "certificate": found[best]["certificate"],
    }  # fmt: skip
    if out:
        result["checkpoint"] = storage.absolute(out, home)
        kept.write(config.widths[best], step, result["checkpoint"])
    return result


def _scored(
    kept: KeptAverages, width: float, step: int, config: AverageConfig, home: Path
) -> dict[str, Any]:
    """Metrics and certificate of one average, and its misfit."""
    where = storage.join(kept.run, f"{SCRATCH}{width!r}-step-{step:08d}")
    try:
        misfit = kept.write(width, step, where)  # where all workers can read it
        return evaluate(where, config.scoring, home) | {"misfit": misfit}
    finally:
        storage.delete_folder(where)


def _distance(metrics: dict[str, float]) -> str:
    """The name of the Frechet distance among `metrics`, the first of them."""
    return next(name for name in metrics if name.startswith(("eval/fid", "eval/fd_")))
