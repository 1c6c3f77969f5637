"""Options of the job cascade: the models that draw together."""

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_ray.config.option_fields import option

MOST_CANDIDATES = 4096


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

    def problems(self) -> Iterator[str]:
        """Yield a line for a missing model."""
        for key in ("prior", "decoder"):
            if not getattr(self, key):
                yield f"{key} is empty; name the run of the {key}, as in {key}=runs/{key}"
        if not all(self.upsamplers):
            yield "upsamplers has an empty name; leave it out"
