"""Options of a training run; each group has its own file.

Imports nothing heavy: an invalid config is reported within two seconds, before torch or Ray load.
Configs are read by loading.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from ddpm_ray.config.autoencoder import AutoencoderConfig
from ddpm_ray.config.changes import change_problems
from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.contrastive import ContrastiveConfig
from ddpm_ray.config.data import DataConfig
from ddpm_ray.config.embedding import EmbeddingConfig
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.model import ModelConfig, NetworkKind
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.option_fields import option, shown, walk
from ddpm_ray.config.prior import PriorConfig
from ddpm_ray.config.reading.former_keys import Former
from ddpm_ray.config.sampling import SampledModel, SamplingSettings
from ddpm_ray.config.schedule import ScheduleConfig
from ddpm_ray.config.task import TRAITS, Task, TaskTraits
from ddpm_ray.config.text import TextConfig
from ddpm_ray.config.tracking import TrackingConfig
from ddpm_ray.config.training import TrainingConfig

OF_TASKS: Mapping[str, Sequence[Task]] = {  # groups that not all tasks use
    "schedule": ("denoiser", "classifier", "prior"),
    "objective": ("denoiser", "classifier", "prior"),
    "model": ("denoiser", "classifier"),
    "text": ("denoiser", "classifier", "contrastive", "prior"),  # `_classifier_problems` refuses it
    "embedding": ("denoiser",),
    "autoencoder": ("autoencoder",),
    "contrastive": ("contrastive",),
    "prior": ("prior",),
    "sampling": ("denoiser", "classifier", "prior"),
}
Architecture: TypeAlias = NetworkKind | Literal["autoencoder", "contrastive", "prior"]
SHARED = ("sampling.batch_size",)  # also the batch of grids and scores of the other tasks


@dataclass(frozen=True)
class RunConfig:
    """One training run: its name, where it is stored, and what is trained."""

    shipped_in: ClassVar = "train"  # folder of conf/

    name: str = option("", "name of the run; the same name in the same storage continues it")
    storage: str = option("runs", "folder or fsspec URL of the runs and their checkpoints")
    task: Task = option(
        "denoiser",
        "what is trained: a denoiser, a classifier of noisy images for guidance, an autoencoder; "
        "contrastive: an image and a text encoder with embeddings in one space; prior: a denoiser "
        "of image embeddings, given a text",
        defines_run=True,
        formerly=Former("model.kind", {"unet": "denoiser"}),
    )
    seed: int = option(
        0, "random seed of weights, data order, timesteps and noise", at_least=0, defines_run=True
    )
    change: tuple[str, ...] = option(
        (), "keys whose new values a continued run takes, as [training.learning_rate]"
    )
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def traits(self) -> TaskTraits:
        """The abilities of the trained model."""
        return TRAITS[self.task]

    @property
    def architecture(self) -> Architecture:
        """The kind of network; a classifier's is half of a U-Net."""
        match self.task:
            case "autoencoder" | "contrastive" | "prior":
                return self.task
            case _:
                return self.model.network

    @property
    def sampled_model(self) -> SampledModel:
        """The facts of the trained model that sampling settings depend on."""
        objective = self.objective
        learns = objective.variance != "fixed"
        shares = [objective.label_dropout] if self.takes_text or self.model.num_classes else []
        shares += [self.embedding.dropout] if self.embedding.encoder else []
        drops = min(shares, default=objective.label_dropout) > 0  # each input, for guidance
        return SampledModel(
            self.schedule.num_steps,
            self.model.num_classes,
            drops,
            learns,
            takes_text=self.takes_text,
            takes_embedding=bool(self.embedding.encoder),
        )

    @property
    def takes_text(self) -> bool:
        """Whether the network is given texts."""
        return self.text.encoder != "none"

    @property
    def draws_captions(self) -> bool:
        """Whether its samples have captions of the data as prompts, where none are given."""
        return self.takes_text and not self.embedding.encoder

    @property
    def spare_processes(self) -> int:
        """Processes outside the worker group, each with the resources of a worker."""
        return int(self.evaluation.where == "spare")

    @property
    def worker_counts(self) -> list[int]:
        """Allowed numbers of workers, ascending: those that divide the batch evenly."""
        most = self.cluster.num_workers
        elastic = self.training.reduction == "elastic"
        parts = self.training.reduction_slots if elastic else self.training.global_batch_size
        fewest = self.cluster.min_workers or most
        return [count for count in range(fewest, most + 1) if parts % count == 0]

    def problems(self) -> Iterator[str]:
        """Yield the problems of all groups, and of rules about several groups."""
        for key, value in (("name", self.name), ("data.url", self.data.url)):
            if not value:
                yield f"{key} is empty; give it a value, as in {key}=..."
        if "/" in self.name or self.name.startswith("."):
            yield f"name is {self.name!r}; it names a folder: no '/' and no leading '.'"
        yield from change_problems(self, self.change)
        yield from self.schedule.problems()
        yield from self.objective.problems(self.schedule)
        yield from self.model.problems()
        yield from self.text.problems(self.model.transformer_depth)
        yield from self.embedding.problems(self.model.num_classes, self.data.flip)
        yield from self.autoencoder.problems()
        yield from self.contrastive.problems()
        yield from self.prior.problems()
        yield from self.training.problems()
        yield from self.sampling.problems("sampling", self.sampled_model)
        yield from self.evaluation.problems()
        yield from self._task_problems()
        batch, workers, lanes = (
            self.training.global_batch_size,
            self.cluster.num_workers,
            self.data.lanes,
        )
        elastic = self.training.reduction == "elastic"
        if elastic and workers > 0 and self.training.reduction_slots % workers:
            yield (
                f"cluster.num_workers is {workers}; with training.reduction=elastic it must divide "
                f"training.reduction_slots {self.training.reduction_slots}"
            )
        if self.cluster.min_workers > workers:
            yield (
                f"cluster.min_workers is {self.cluster.min_workers}; it cannot exceed "
                f"cluster.num_workers {workers}"
            )
        unit = math.lcm(workers, 1 if lanes is None else lanes)
        if unit > 0 and (rest := batch % unit):
            and_lanes = "" if lanes is None else f" and data.lanes={lanes}"
            yield (
                f"training.global_batch_size is {batch}; cluster.num_workers={workers}{and_lanes} "
                f"must divide it: try {batch - rest or unit}"
            )

    def _task_problems(self) -> Iterator[str]:
        yield from self._unused_options()
        traits = self.traits
        if traits.predicts_labels:
            yield from self._classifier_problems()
        if traits.embeds or traits.draws_embeddings:
            yield from self._own_text_problems()
        if traits.draws_embeddings:
            yield from self._prior_problems()
        if self.task not in OF_TASKS["model"] and self.training.gradient_checkpointing:
            yield (
                f"training.gradient_checkpointing is true, which {traits.name} does not have: use "
                "training.micro_batch_size to save memory"
            )
        if not traits.draws_images:
            yield from self.evaluation.problems_of_arithmetic(f"{traits.name} draws no samples")
        if self.training.compile != "off" and self.autoencoder.discriminator_from_step:
            # The adversarial weight needs a second backward pass over part of the graph.
            yield (
                f"training.compile is {self.training.compile}, which "
                f"autoencoder.discriminator_from_step does not support: set one of the two to its "
                f"default"
            )
        yield from self._output_problems()

    def _output_problems(self) -> Iterator[str]:
        """Yield a line for each score and picture that the trained model does not have."""
        traits = self.traits
        if self.evaluation.features == "none" and traits.has_noise:
            yield (
                f"evaluation.features is 'none'; the scores of {traits.name} need a feature "
                f"network: choose inception or digits"
            )
        if encoder := self.evaluation.alignment_encoder:
            key = "evaluation.alignment_encoder"
            given = f"{key} is {shown(encoder)}; it compares images with texts"
            if not (traits.draws_images and self.takes_text):
                yield f"{given}, and this model draws no images of texts: leave it out"
            elif self.embedding.encoder and not self.sampling.prompts:
                yield f"{given}, and samples of embeddings have none: set sampling.prompts"
        pictures = traits.draws_images or traits.reconstructs
        for key, value, fits in (
            ("evaluation.num_images", self.evaluation.num_images, pictures or traits.embeds),
            (
                "evaluation.validation_every_steps",
                self.evaluation.validation_every_steps,
                traits.draws_images or traits.draws_embeddings,
            ),
            ("training.grid_every_steps", self.training.grid_every_steps, pictures),
        ):
            if value and not fits:
                yield f"{key} is {value}; {traits.name} draws no images: set it to 0"

    def _own_text_problems(self) -> Iterator[str]:
        if not self.takes_text:
            yield (
                f"text.encoder is none; {self.traits.name} reads the captions of its images: set "
                f"text.encoder=transformer"
            )
        if not self.text.pooled:
            name = self.traits.name
            yield f"text.pooled is false; {name} needs the vector of the whole text: leave it out"
        if self.text.frozen and self.traits.embeds:
            yield (
                f"text.encoder is {self.text.encoder}; {self.traits.name} trains its own: set "
                f"text.encoder=transformer"
            )

    def _prior_problems(self) -> Iterator[str]:
        """Yield a line for each option of the objective that only images have."""
        wanted = self.objective
        for key in ("self_conditioning", "low_resolution_pixels", "inpainting_masks"):
            if value := getattr(wanted, key):
                yield (
                    f"objective.{key} is {shown(value)}; {self.traits.name} sees no image: leave "
                    f"it out"
                )
        if wanted.weighting == "uncertainty":
            yield (
                f"objective.weighting is uncertainty; {self.traits.name} learns no loss: choose "
                f"another"
            )
        if wanted.variance != "fixed":
            yield (
                f"objective.variance is {wanted.variance}; {self.traits.name} predicts no "
                f"variance: use objective.variance=fixed"
            )

    def _classifier_problems(self) -> Iterator[str]:
        if self.model.network != "unet":
            yield (
                f"model.network is {self.model.network}; a {self.task} is half of a U-Net: use "
                f"model.network=unet"
            )
        if self.objective.inpainting_masks:
            yield (
                f"objective.inpainting_masks is true; a {self.task} paints nothing: leave it out"
            )
        if self.model.num_classes < 2:
            yield (
                f"model.num_classes is {self.model.num_classes}; a {self.task} needs the number of "
                f"labels in the data, at least 2"
            )
        if self.takes_text:
            yield f"text.encoder is {self.text.encoder}; a {self.task} reads no text: leave it out"

    def _unused_options(self) -> Iterator[str]:
        """Yield a line for each option that is set and has no effect in this task."""
        for name, tasks in OF_TASKS.items():
            if self.task in tasks:
                continue
            group = getattr(self, name)
            remedy = f"{self.traits.name} has none"
            if len(tasks) == 1:
                remedy = f"only task={tasks[0]} uses it"
            defaults = {key: value for key, value, _ in walk(type(group)())}
            for key, value, _ in walk(group):
                if value != defaults[key] and f"{name}.{key}" not in SHARED:
                    yield f"{name}.{key} is {shown(value)}; {remedy}: leave it out"
