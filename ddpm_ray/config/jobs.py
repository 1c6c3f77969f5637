"""Options of the jobs other than training: pack, sample, export, evaluate and doctor."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from ddpm_ray.config.diffusion import SamplingConfig
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.loading import option
from ddpm_ray.config.run import MIB, ClusterConfig


@dataclass(frozen=True)
class PackConfig:
    """One data set to be packed: `jobs/pack_shards.py SOURCE DESTINATION`."""

    image_size: int = option(0, "pixels of the square images; 0: as they are", at_least=0)
    resize: Literal["none", "centre-crop-box-bicubic"] = option(
        "none", "recipe, recorded in the manifest; the second is guided-diffusion's"
    )
    channels: int = option(0, "1 grey, 3 RGB; 0: as the first image has it", at_least=0, at_most=3)
    encoding: Literal["raw", "png", "jpeg", "webp"] = option("raw", "of images inside a shard")
    shard_bytes: int = option(
        32 * MIB, "decoded bytes per shard", at_least=3 * MIB // 2, at_most=1024 * MIB
    )
    split: Literal["train", "test"] = option("train", "half of mnist, fashion-mnist and cifar10")
    url: str = option("", "where mnist, fashion-mnist or cifar10 lie; empty: their public address")
    sha256: str = option(
        "", "of the files at url, comma-separated: images, labels; of cifar10 the archive"
    )
    image_key: str = option(
        "", "image of a sample that has several: suffix in a tar (left.png), or column of a table"
    )
    label_key: str = option(
        "", "column of a table or metadata file, or key of .json files; empty: label"
    )
    on_bad_image: Literal["stop", "skip"] = option("stop", "skip counts and names what it skips")
    max_pixels: int = option(64_000_000, "larger images are refused before decoding", at_least=1)
    max_file_bytes: int = option(256 * MIB, "larger files are refused before reading", at_least=1)
    num_workers: int = option(0, "Ray tasks at once; 0: one per CPU of the cluster", at_least=0)
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")

    def problems(self) -> Iterator[str]:
        """A size without a recipe or the other way round, and channels that are no picture."""
        if self.channels == 2:
            yield "channels is 2; use 1 (grey) or 3 (RGB)"
        if (self.resize == "none") != (self.image_size == 0):
            yield (
                f"image_size is {self.image_size} and resize {self.resize!r}; a size needs a "
                f"recipe: resize=centre-crop-box-bicubic image_size=64, or neither"
            )


@dataclass(frozen=True)
class GuidanceModelConfig:
    """Another network that leads samples."""

    weak_model: str = option(
        "", "autoguidance: a worse model of the same data, to be led away from; empty: none"
    )
    weak_scale: float = option(2.0, "how far: 1 not at all", at_least=0)
    classifier: str = option(
        "", "folder of a run of model.kind=classifier that leads to sampling.labels; empty: none"
    )
    classifier_scale: float = option(1.0, "how strongly: 0 not at all", at_least=0)
    classifier_form: Literal["score", "mean"] = option(
        "score", "its slope moves the noise, with any sampler, or ancestral's mean"
    )

    def problems(self, sampling: SamplingConfig) -> Iterator[str]:
        """Two leaders at once, and a form that the sampler does not have."""
        if self.weak_model and self.classifier:
            yield (
                f"lead.classifier is {self.classifier!r} and lead.weak_model {self.weak_model!r}; "
                f"one network leads: leave one of them empty"
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
    film: str = option("", "GIF file of the estimates of x_0, a frame per step; empty: none")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    lead: GuidanceModelConfig = field(default_factory=GuidanceModelConfig)

    def problems(self) -> Iterator[str]:
        """A film that is none; what sampling rules out is known once the run's own is read."""
        if self.film and not self.film.lower().endswith(".gif"):
            yield f"film is {self.film!r}; it is a GIF: call it {self.film}.gif"

    def sampling_problems(self) -> Iterator[str]:
        """What the whole of `sampling` rules out."""
        yield from self.sampling.problems("sampling")
        yield from self.lead.problems(self.sampling)


@dataclass(frozen=True)
class ExportConfig:
    """A trained model for another library: `jobs/export.py MODEL_URI`."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def problems(self) -> Iterator[str]:
        """None before the run's own settings are read."""
        yield from ()

    def sampling_problems(self) -> Iterator[str]:
        """What the whole of `sampling` rules out: variance and clip go into the scheduler."""
        yield from self.sampling.problems("sampling")


@dataclass(frozen=True)
class EvaluateConfig:
    """A trained model's score against a data set: `jobs/evaluate.py MODEL_URI`."""

    data_url: str = option("", "reference shards; empty: what the model was trained on")
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    lead: GuidanceModelConfig = field(default_factory=GuidanceModelConfig)
    evaluation: EvaluationConfig = field(
        default_factory=lambda: EvaluationConfig(num_images=10_000)
    )
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self) -> Iterator[str]:
        """What its scores say, and too few images for one."""
        yield from self.evaluation.problems()
        wanted = self.evaluation
        others = (
            wanted.bits_per_dim_images, wanted.likelihood_images, wanted.memorisation_images
        )  # fmt: skip
        if wanted.num_images < 2 and not any(others):
            yield (
                f"evaluation.num_images is {wanted.num_images}; score at least 2, or ask for "
                f"something else: bits_per_dim_images, likelihood_images, memorisation_images"
            )

    def sampling_problems(self) -> Iterator[str]:
        """What the whole of `sampling` rules out."""
        yield from self.sampling.problems("sampling")
        yield from self.lead.problems(self.sampling)


@dataclass(frozen=True)
class DoctorConfig:
    """What a run would lean on, to be tried before it: `jobs/doctor.py`."""

    storage: str = option("runs", "folder for runs, on any fsspec URL; tried with a small object")
    tracking_uri: str = option(
        "", "MLflow server or database; empty: $MLFLOW_TRACKING_URI or ./mlflow.db"
    )
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")
    timeout_s: float = option(
        12, "seconds after which a check that has not ended is a failure", at_least=1, at_most=600
    )

    def problems(self) -> Iterator[str]:
        """A storage that is not named."""
        if not self.storage:
            yield "storage is empty; give it a value, as in storage=s3://bucket/runs"
