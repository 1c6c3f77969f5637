"""Tasks that can be trained, and their traits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Task: TypeAlias = Literal["denoiser", "classifier", "autoencoder"]


@dataclass(frozen=True)
class TaskTraits:
    """The abilities of a model of one task. Code asks for these, never for the task's name."""

    draws_images: bool = False  # has sample grids, image scores, and a model in MLflow
    predicts_labels: bool = False  # needs the label of each training image
    reconstructs: bool = False  # encodes images to latents and decodes them; has no noise schedule


TRAITS: Mapping[Task, TaskTraits] = {
    "denoiser": TaskTraits(draws_images=True),
    "classifier": TaskTraits(predicts_labels=True),
    "autoencoder": TaskTraits(reconstructs=True),
}
