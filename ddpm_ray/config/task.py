"""Tasks that can be trained, and their traits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Task: TypeAlias = Literal["denoiser", "classifier", "autoencoder", "contrastive", "prior"]


@dataclass(frozen=True)
class TaskTraits:
    """The abilities of a model of one task. Code asks for these, never for the task's name."""

    draws_images: bool = False  # has sample grids, image scores, and a model in MLflow
    predicts_labels: bool = False  # needs the label of each training image
    reconstructs: bool = False  # encodes images to latents and decodes them
    embeds: bool = False  # embeds images and texts in one space
    draws_embeddings: bool = False  # is trained on embeddings of images, and on nothing else
    name: str = ""  # of such a model, with its article

    @property
    def has_noise(self) -> bool:
        """Whether the network sees noisy images, and so has a noise schedule and an objective."""
        return not (self.reconstructs or self.embeds)


TRAITS: Mapping[Task, TaskTraits] = {
    "denoiser": TaskTraits(draws_images=True, name="a denoiser"),
    "classifier": TaskTraits(predicts_labels=True, name="a classifier"),
    "autoencoder": TaskTraits(reconstructs=True, name="an autoencoder"),
    "contrastive": TaskTraits(embeds=True, name="a contrastive model"),
    "prior": TaskTraits(draws_embeddings=True, name="a prior"),
}
