"""What can be trained, and what the rest of the code asks about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Task: TypeAlias = Literal["denoiser", "classifier"]


@dataclass(frozen=True)
class TaskTraits:
    """What a model of one task can do. Code asks for these, never for the task's name."""

    draws_images: bool = False  # has sample grids, image scores, and a model in MLflow
    predicts_labels: bool = False  # needs the label of each training image


TRAITS: Mapping[Task, TaskTraits] = {
    "denoiser": TaskTraits(draws_images=True),
    "classifier": TaskTraits(predicts_labels=True),
}
