"""Scores of a run's EMA weights while it trains."""

from dataclasses import replace

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.assembly.prompts import with_prompts
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.ceiling import Ceiling
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.reference_statistics import Reference, reference
from ddpm_ray.runs.kept_scores import keep_scores
from ddpm_ray.training.sample_grids import SampleGridLogger
from ddpm_ray.training.state import TrainingState


class PeriodicEvaluator:
    """Scores the EMA weights; builds feature network and reference statistics at first use."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        state: TrainingState,
        grid_logger: SampleGridLogger,
    ) -> None:
        self._config, self._dataset = config, dataset
        self._state, self._grid_logger = state, grid_logger
        self._tools: tuple[FeatureNet, Reference, Ceiling | None] | None = None

    def evaluate(self, step: int) -> None:
        """Evaluate, store the scores of `step` in the state and pass them to the sink."""
        wanted, grid_logger = self._config.evaluation, self._grid_logger
        if not wanted.num_images:
            return
        if self._tools is None:
            cache = training_run.cache_dir(self._config.data, "weights")
            net = scoring.feature_net(wanted, cache, grid_logger.workers.device)
            kept = wanted.kernel_distance_images if wanted.kernel_distance else 0
            kept = min(kept, wanted.num_images)
            codec, workers = grid_logger.denoiser.codec, grid_logger.workers
            data = scoring.reference_data(wanted, self._dataset)
            known = reference(data, net, workers, kernel_images=kept, codec=codec)
            highest = scoring.ceiling(
                self._dataset, codec, net, known, wanted, workers, self._state.scores
            )
            self._tools = net, known, highest
        net, known, highest = self._tools
        plan = grid_logger.plan
        if not self._config.sampling.prompts:  # those of the grid are too few
            plan = replace(plan, settings=replace(plan.settings, prompts=()))
            data = scoring.reference_data(wanted, self._dataset)
            plan = with_prompts(plan, grid_logger.denoiser, data, wanted.num_images)
        scores = sample_quality.evaluate_samples(
            sample_quality.SampleSet(
                grid_logger.denoiser,
                plan,
                image_shape=grid_logger.image_shape,
                num_images=wanted.num_images,
                batch_size=grid_logger.batch_size,
                weights=scoring.ema_provenance(self._config, step, facts=self._state.facts),
                arithmetic=scoring.arithmetic_of_samples(wanted),
                alignment=scoring.alignment(
                    wanted, plan.settings.clean_prompts, grid_logger.workers.device
                ),
            ),
            net,
            known,
            grid_logger.workers,
            optional_metrics=scoring.optional_metrics(wanted),
            held_out=scoring.held_out(wanted, net, grid_logger.workers, grid_logger.denoiser.codec),
            ceiling=highest,
        )
        keep_scores(scores, step, wanted, self._state, grid_logger.sink)
