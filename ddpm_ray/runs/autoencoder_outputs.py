"""Pictures and scores of an autoencoder while it trains."""

from collections.abc import Callable

import torch

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.evaluation.reconstruction_quality import Distances, reconstruction_quality
from ddpm_ray.evaluation.reference_statistics import reference
from ddpm_ray.evaluation.sample_quality import Batches, Scores
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.reporting import Sink
from ddpm_ray.runs.kept_scores import keep_scores
from ddpm_ray.training.reconstruction_grids import GRID_IMAGES, ReconstructionGridLogger
from ddpm_ray.training.state import TrainingState


def scored_data(config: RunConfig, dataset: Dataset) -> Dataset:
    """The data set whose images are reconstructed for pictures and scores: the held-out one."""
    url = config.evaluation.held_out_url
    return open_dataset(url) if url else dataset


def reconstruction_scores(
    config: RunConfig,
    wanted: EvaluationConfig,
    dataset: Dataset,
    model: Autoencoder,
    weights: dict[str, object],
    workers: Workers,
    counted: Callable[[Batches], Batches] = iter,
) -> Scores:
    """Scores of `wanted.num_images` fixed images of `dataset`; all workers must call it.

    `weights` is the provenance of the model's weights. `counted` passes each batch on and counts
    it, for a job's progress.
    """
    distances = None
    if wanted.features != "none":
        cache = training_run.cache_dir(config.data, "weights")
        net = scoring.feature_net(wanted, cache, workers.device)
        distances = Distances(net, reference(dataset, net, workers))
    total = min(wanted.num_images, dataset.manifest.samples)
    mine, size = workers.share(total), config.sampling.batch_size
    images = training_run.fixed_images(config.data, dataset, mine, total).images
    index = torch.arange(mine.start, mine.stop)
    pairs = zip(torch.split(index, size), torch.split(images, size), strict=True)
    batches = counted(iter(pairs if mine else ()))
    provenance = weights | {"data": dataset.fingerprint}
    return reconstruction_quality(model, batches, total, workers, distances, provenance)


class AutoencoderOutputs:
    """Draws grids and computes scores of the EMA weights; reads its images at first use."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        state: TrainingState,
        workers: Workers,
        url: str,
        sink: Sink | None,
    ) -> None:
        assert isinstance(state.ema.model, Autoencoder)
        self._model = state.ema.model
        self._config, self._state, self._workers = config, state, workers
        self._dataset, self._url, self._sink = scored_data(config, dataset), url, sink
        self._logger: ReconstructionGridLogger | None = None

    def draw_grid(self, step: int) -> None:
        """Log images above their reconstructions; all workers must call it."""
        if self._logger is None:
            total = min(GRID_IMAGES, self._dataset.manifest.samples)
            share = self._workers.share(total)
            images = training_run.fixed_images(self._config.data, self._dataset, share, total)
            self._logger = ReconstructionGridLogger(
                self._model,
                images.images,
                self._workers,
                self._url,
                self._sink,
                self._config.sampling.batch_size,
            )
        self._logger.log_grid(step)

    def evaluate(self, step: int) -> None:
        """Evaluate, store the scores of `step` in the state and pass them to the sink."""
        wanted = self._config.evaluation
        if not wanted.num_images:
            return
        weights = scoring.ema_provenance(self._config, step)
        scores = reconstruction_scores(
            self._config, wanted, self._dataset, self._model, weights, self._workers
        )
        keep_scores(scores, step, wanted, self._state, self._sink)
