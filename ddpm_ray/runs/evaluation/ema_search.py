"""Post-hoc EMA search: build EMAs of several widths from a run's snapshots and score each."""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpm_ray.assembly import checkpoint_loading, diffusion, run_config, scoring, training_run
from ddpm_ray.assembly.inference import inference_network
from ddpm_ray.assembly.inputs_of_data import with_inputs_of_data
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.ema_search import AverageConfig
from ddpm_ray.config.loading import ConfigError, from_dict, to_dict
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.distributed import fatal_errors, startup, worker_group
from ddpm_ray.distributed.control_actor import RunControl
from ddpm_ray.distributed.worker_context import distributed_context
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.reporting import Progress
from ddpm_ray.runs.absolute_paths import absolute_evaluation_paths
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.training_data import require_scored_data
from ddpm_ray.storage import object_store
from ddpm_ray.storage.file_formats import package_version
from ddpm_ray.training import checkpoint_folder
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.ema_snapshots import SNAPSHOTS, SnapshotStore, averaged
from ddpm_ray.training.state import Snapshot

log = logging.getLogger(__name__)

PROFILE_ERROR = "misfit"  # its key in checkpoints and results that users have stored

POOR = 0.1  # profile error above which the EMA is not a good approximation of the requested width


@dataclass(frozen=True)
class EmaSnapshots:
    """The EMA snapshots of a run that its newest checkpoint lists."""

    run: str  # URL of the run's folder
    facts: dict[str, Any]  # of that checkpoint
    widths: tuple[float, ...]
    steps: list[int]

    @classmethod
    def of(cls, run: str) -> "EmaSnapshots":
        """Read the list of the run in the folder `run`.

        Raises CheckpointError if it is empty, and ConfigError for a model that draws no images.
        """
        found = CheckpointStore(object_store.join(run, CHECKPOINTS)).load(groups=())
        facts = found[1].facts if found else {}
        if found:
            checkpoint_loading.require_denoiser(run_config.saved_config(facts, run), run)
        if not facts.get("kept_at"):
            remedy = (
                "train with training.ema_snapshot_widths=[0.05,0.1] and "
                "training.ema_snapshot_every_steps=..., then name the run's folder"
            )
            raise CheckpointError(run, "no EMA snapshots in this run", remedy)
        widths = run_config.saved_config(facts, run).training.ema_snapshot_widths
        return cls(run, facts, widths, [int(step) for step in facts["kept_at"]])

    def build(self, sigma_rel: float, step: int) -> Snapshot:
        """Build the EMA of width `sigma_rel` at `step`, as a checkpoint for sampling only.

        facts["average"] records the snapshots it is built from and the error of its profile.
        """
        store = SnapshotStore(object_store.join(self.run, SNAPSHOTS))
        tensors, profile_error = averaged(store, self.steps, self.widths, sigma_rel, step)
        made_of = {
            "sigma_rel": sigma_rel,
            PROFILE_ERROR: profile_error,
            "widths": list(self.widths),
        }
        made_of["steps"] = [at for at in self.steps if at <= step]
        facts = self.facts | {
            "config": to_dict(run_config.saved_config(self.facts)),
            "version": package_version(),
            "step": step,
            "average": made_of,
            "kept_at": [],
            "unsent_rows": [],
        }
        return Snapshot({"ema": tensors}, facts)


def search(
    run: str,
    config: AverageConfig,
    home: Path,
    out: str = "",
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Score the EMA of each width; write the best one to the folder `out`, if given.

    Returns the scores as plain JSON. Relative paths are relative to `home`. `on_progress` gets the
    number of images that are scored, about once a second. Raises CheckpointError if snapshots are
    missing or damaged, ConfigError if run and config do not fit, and RunFailedError, DatasetError
    or StorageError.
    """
    run = object_store.absolute(run, home)
    snapshots = EmaSnapshots.of(run)
    step = config.step or snapshots.steps[-1]
    if step not in snapshots.steps:
        near = min(snapshots.steps, key=lambda at: abs(at - step))
        raise ConfigError(f"step is {step}; no EMA snapshots at that step: try step={near}")
    begun = run_config.saved_config(snapshots.facts)
    if problems := list(config.sampling.problems("sampling", begun.sampled_model)):
        raise ConfigError("\n".join(problems))
    config = dataclasses.replace(
        config,
        data_url=object_store.absolute(config.data_url or begun.data.url, home),
        evaluation=absolute_evaluation_paths(config.evaluation, home),
    )
    others = ("held_out_url",)
    require_scored_data(begun.traits, config.data_url, config.evaluation, others)
    settings = {"run": run, "step": step, "config": to_dict(config)}
    found = worker_group.run(ema_search_worker, settings, config.cluster, on_progress)
    result = _result(found, list(config.widths)) | {"run": run, "step": step}
    if out:
        result["checkpoint"] = object_store.absolute(out, home)
        average = snapshots.build(result["best"], step)
        checkpoint_folder.write_checkpoint(result["checkpoint"], average)
    where = f"written to {result['checkpoint']}" if out else "not written; --out FOLDER writes it"
    best, metric = result["best"], result["metric"]
    log.info("the EMA of width %g has the lowest %s; it is %s", best, metric, where)
    return result


def ema_search_worker(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Search as one worker; return metrics, provenance and profile error of each width."""
    config = from_dict(AverageConfig, settings["config"])
    control: RunControl = settings["control"]
    startup.mark_done(control)
    if control.status().fatal is not None:
        return []
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    object_store.set_retry_timeout(config.cluster.storage_timeout_s)
    with fatal_errors.report_fatal_errors(control):
        workers = distributed_context()
        total = config.evaluation.num_images * len(config.widths)
        progress = ImageProgress(total, workers, control.report)
        return list(score_widths(settings["run"], settings["step"], config, workers, progress))


def score_widths(
    run: str, step: int, config: AverageConfig, workers: Workers, progress: ImageProgress
) -> Iterator[dict[str, Any]]:
    """Yield metrics, provenance and profile error of the EMA of each width at `step` of `run`.

    All workers must iterate to the end. The noise is the same for each width.
    """
    snapshots, wanted = EmaSnapshots.of(run), config.evaluation
    begun, dataset = run_config.saved_config(snapshots.facts), open_dataset(config.data_url)
    model = checkpoint_loading.trained_model(
        run, workers.device, autoencoder=config.autoencoder, text_model=config.text_model
    )
    count = min(wanted.num_images, int(dataset.counts.sum()))
    denoiser = with_inputs_of_data(model.denoiser, begun.data, dataset, count, workers.device)
    net = scoring.feature_net(wanted, training_run.cache_dir(begun.data, "weights"), workers.device)
    kernel_images = min(wanted.kernel_distance_images, wanted.num_images) * wanted.kernel_distance
    codec, data = denoiser.codec, scoring.reference_data(wanted, dataset)
    known = reference(data, net, workers, kernel_images=kernel_images, codec=codec)
    held_out = scoring.held_out(wanted, net, workers, codec)
    ceiling = scoring.ceiling(dataset, codec, net, known, wanted, workers)
    plan = diffusion.sampling_plan(config.sampling, denoiser.schedule)
    network = model.denoiser.network
    assert isinstance(network, nn.Module)
    runs = inference_network(network, wanted, workers.device)  # with the weights of `network`
    denoiser = dataclasses.replace(denoiser, network=runs)
    for width in config.widths:
        average = snapshots.build(width, step)
        network.load_state_dict(average.tensors["ema"])
        files = checkpoint_folder.tensor_files(average.tensors)
        sha256 = checkpoint_folder.group_sha256(checkpoint_folder.described(files))
        scores = sample_quality.evaluate_samples(
            sample_quality.SampleSet(
                denoiser,
                plan,
                image_shape=model.image_shape,
                num_images=wanted.num_images,
                batch_size=config.sampling.batch_size,
                weights=scoring.ema_provenance(
                    begun, step, average.facts["average"], model.provenance
                )
                | {"model_sha256": sha256},
                arithmetic=scoring.arithmetic_of_samples(wanted),
            ),
            net,
            known,
            workers,
            optional_metrics=scoring.optional_metrics(wanted),
            held_out=held_out,
            ceiling=ceiling,
            counted=progress.counted,
        )
        yield scores.to_json() | {PROFILE_ERROR: average.facts["average"][PROFILE_ERROR]}
    progress.finish()


def _result(found: list[dict[str, Any]], widths: list[float]) -> dict[str, Any]:
    """Log a table of the scores; return them and the best width as plain JSON."""
    metric = next(name for name in found[0]["metrics"] if name.startswith(("eval/fid", "eval/fd_")))
    scores = [one["metrics"][metric] for one in found]
    ends = [[one["metrics"].get(f"{metric}_{end}") for end in ("low", "high")] for one in found]
    profile_errors = [one[PROFILE_ERROR] for one in found]
    log.info("  width  %14s  %20s  profile error", metric, "95 % interval")
    for width, score, (low, high), profile_error in zip(
        widths, scores, ends, profile_errors, strict=True
    ):
        interval = "-" if low is None else f"{low:.5g} .. {high:.5g}"
        log.info("%7.4g  %14.5g  %20s  %13.2g", width, score, interval, profile_error)
        if profile_error > POOR:
            log.warning(
                "the EMA of width %g is only approximated by the run's snapshots (profile error "
                "%.2f); save snapshots of closer widths (training.ema_snapshot_widths) or more "
                "often (training.ema_snapshot_every_steps)",
                width,
                profile_error,
            )
    best = scores.index(min(scores, key=lambda score: (math.isnan(score), score)))
    return {
        "metric": metric,
        "widths": widths,
        "scores": scores,
        "intervals": ends,
        f"{PROFILE_ERROR}s": profile_errors,
        "best": widths[best],
        "certificate": found[best]["certificate"],
    }
