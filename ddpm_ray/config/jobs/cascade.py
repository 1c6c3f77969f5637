"""Options of the job cascade: the models that draw together."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.tracking import TrackingConfig

MOST_CANDIDATES = 4096
NAME = re.compile(r"(?=.*\S)[^/:]+")  # of a registered model


@dataclass(frozen=True)
class CascadeConfig:
    """A cascade of trained models, each the folder or URL of a run or of one checkpoint."""

    prior: str = option("", "run with task=prior: from a text to the embedding of an image")
    decoder: str = option("", "run with embedding.encoder: from that embedding to an image")
    upsamplers: tuple[str, ...] = option(
        (), "runs with objective.low_resolution_pixels, each enlarging the images before it"
    )
    candidates: int = option(
        2,
        "embeddings that the prior draws for each image; the nearest to the text is taken",
        at_least=1,
        at_most=MOST_CANDIDATES,
    )
    copies: bool = option(
        False, "copy the models and their encoders to the folder, so that it can be moved"
    )
    register_as: str = option(
        "", "MLflow model name: log the cascade with its models, as `champion` of that name"
    )
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def problems(self) -> Iterator[str]:
        """Yield a line for a missing model."""
        for key in ("prior", "decoder"):
            if not getattr(self, key):
                yield f"{key} is empty; name the run of the {key}, as in {key}=runs/{key}"
        if self.tracking != TrackingConfig() and not self.register_as:
            yield (
                "tracking is set, but register_as is empty, so that nothing is logged in MLflow: "
                "set register_as, or leave it out"
            )
        if self.register_as and not NAME.fullmatch(self.register_as):
            yield (
                f"register_as is {self.register_as!r}; MLflow takes names without / and :, and not "
                f"of blanks alone"
            )
        if not all(self.upsamplers):
            yield "upsamplers has an empty name; leave it out"
