"""Options of a prior: the transformer that denoises image embeddings."""

from collections.abc import Iterator
from dataclasses import dataclass

from ddpm_ray.config.option_fields import option


@dataclass(frozen=True)
class PriorConfig:
    """The network of task=prior; `text` has its text encoder."""

    width: int = option(256, "width of the transformer", at_least=1, defines_run=True)
    depth: int = option(6, "number of its blocks", at_least=1, defines_run=True)
    heads: int = option(4, "heads of each attention", at_least=1, defines_run=True)

    def problems(self) -> Iterator[str]:
        """Yield a line for sizes that do not fit together."""
        if self.width % self.heads:
            yield f"prior.width is {self.width}; it must be a multiple of prior.heads {self.heads}"
