"""Options of the jobs on a trained model: sample, export, evaluate and doctor."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm_ray.config.cluster import ClusterConfig
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.sampling import SamplingConfig


@dataclass(frozen=True)
class GuidanceModelConfig:
    """Guidance by a second network."""

    weak_model: str = option("", "autoguidance: URI of a weaker model of the same data; empty: off")
    weak_scale: float = option(2.0, "autoguidance scale; 1: no effect", at_least=0)
    classifier: str = option(
        "", "classifier guidance to sampling.labels: run folder, task=classifier; empty: off"
    )
    classifier_scale: float = option(1.0, "classifier guidance scale; 0: no effect", at_least=0)
    classifier_form: Literal["score", "mean"] = option(
        "score", "apply its gradient to the score (any sampler) or to the mean (ancestral)"
    )

    def problems(self, sampling: SamplingConfig) -> Iterator[str]:
        """Yield a line if two networks are given, or if the sampler lacks the form."""
        if self.weak_model and self.classifier:
            yield (
                f"lead.classifier is {self.classifier!r} and lead.weak_model {self.weak_model!r}; "
                f"only one can guide: leave one of them empty"
            )
        has_mean = sampling.sampler == "ancestral" and sampling.variance != "learned"
        if self.classifier and self.classifier_form == "mean" and not has_mean:
            yield (
                f"lead.classifier_form is 'mean', that of ancestral's fixed variances, and "
                f"sampling.sampler {sampling.sampler!r} with variance {sampling.variance!r}: use "
                f"lead.classifier_form=score"
            )


@dataclass(frozen=True)
class SampleConfig:
    """Images from a trained model: `jobs/sample.py MODEL_URI`."""

    num_images: int = option(64, "images to draw", at_least=1)
    film: str = option("", "GIF file of the x_0 estimates, one frame per step; empty: none")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    lead: GuidanceModelConfig = field(default_factory=GuidanceModelConfig)

    def problems(self) -> Iterator[str]:
        """Yield a line for a wrong file name; sampling is checked after the run's own is read."""
        if self.film and not self.film.lower().endswith(".gif"):
            yield f"film is {self.film!r}; it is a GIF: call it {self.film}.gif"

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of the complete `sampling` group."""
        yield from self.sampling.problems("sampling")
        yield from self.lead.problems(self.sampling)


@dataclass(frozen=True)
class ExportConfig:
    """A trained model for another library: `jobs/export.py MODEL_URI`."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def problems(self) -> Iterator[str]:
        """Yield nothing: sampling is checked after the run's own settings are read."""
        yield from ()

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of `sampling`; variance and clip are written to the scheduler."""
        yield from self.sampling.problems("sampling")


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores of a trained model against a data set: `jobs/evaluate.py MODEL_URI`."""

    data_url: str = option("", "folder or URL of the reference shards; empty: the training data")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    lead: GuidanceModelConfig = field(default_factory=GuidanceModelConfig)
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(num_images=10_000)
    )
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self) -> Iterator[str]:
        """Yield the problems of evaluation, and a line if nothing is to be scored."""
        yield from self.evaluation.problems()
        wanted = self.evaluation
        others = (wanted.bits_per_dim_images, wanted.likelihood_images, wanted.memorisation_images)
        if wanted.num_images < 2 and not any(others):
            yield (
                f"evaluation.num_images is {wanted.num_images}; score at least 2, or set one of "
                f"bits_per_dim_images, likelihood_images, memorisation_images"
            )

    def sampling_problems(self) -> Iterator[str]:
        """Yield the problems of the complete `sampling` group."""
        yield from self.sampling.problems("sampling")
        yield from self.lead.problems(self.sampling)


@dataclass(frozen=True)
class DoctorConfig:
    """Services that a run needs, to be checked before it starts: `jobs/doctor.py`."""

    storage: str = option(
        "runs", "folder or fsspec URL for runs; checked by writing a small object"
    )
    tracking_uri: str = option(
        "", "MLflow server or database; empty: $MLFLOW_TRACKING_URI or ./mlflow.db"
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    timeout_s: float = option(12, "timeout of each check in seconds", at_least=1, at_most=600)

    def problems(self) -> Iterator[str]:
        """Yield a line if storage is empty."""
        if not self.storage:
            yield "storage is empty; give it a value, as in storage=s3://bucket/runs"
