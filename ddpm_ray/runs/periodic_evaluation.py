"""Scores of a run's EMA weights while it trains."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from ddpm_ray.assembly import scoring, training_run
from ddpm_ray.assembly.prompts import with_prompts
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.evaluation import sample_quality
from ddpm_ray.evaluation.alignment import Alignment
from ddpm_ray.evaluation.ceiling import Ceiling
from ddpm_ray.evaluation.features.feature_extractor import FeatureNet
from ddpm_ray.evaluation.reference_statistics import Reference, reference
from ddpm_ray.runs.kept_scores import keep_scores
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.training.sample_grids import SampleGridLogger
from ddpm_ray.training.state import TrainingState


class _Tools(NamedTuple):
    """The tools that all evaluations of a run share."""

    net: FeatureNet
    known: Reference
    ceiling: Ceiling | None
    encoders: TrainedEncoders | None  # of the alignment


class PeriodicEvaluator:
    """Scores the EMA weights; loads networks and builds reference statistics at first use."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        state: TrainingState,
        grid_logger: SampleGridLogger,
        alignment_checkpoint: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._config, self._dataset = config, dataset
        self._state, self._grid_logger = state, grid_logger
        self._alignment_checkpoint = alignment_checkpoint
        self._tools: _Tools | None = None

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
            checkpoint, device = self._alignment_checkpoint, workers.device
            encoders = scoring.alignment_encoders(wanted, checkpoint, device)
            self._tools = _Tools(net, known, highest, encoders)
        net, known, highest, encoders = self._tools
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
                alignment=Alignment.of(encoders, plan.settings.clean_prompts),
            ),
            net,
            known,
            grid_logger.workers,
            optional_metrics=scoring.optional_metrics(wanted),
            held_out=scoring.held_out(wanted, net, grid_logger.workers, grid_logger.denoiser.codec),
            ceiling=highest,
        )
        keep_scores(scores, step, wanted, self._state, grid_logger.sink)
