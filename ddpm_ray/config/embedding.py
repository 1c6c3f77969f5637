"""Options of image embeddings as conditioning."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from ddpm_ray.config.option_fields import option, shown


@dataclass(frozen=True)
class EmbeddingConfig:
    """The embedding of its image that the network is given, as DALL-E 2's decoder."""

    encoder: str = option(
        "",
        "folder or URL of a run with task=contrastive, whose image encoder embeds each training "
        "image for the network; empty: no embedding",
    )
    url: str = option(
        "",
        "folder or URL of the embeddings of the images in data.url, as `ddpm-ray encode` wrote "
        "them with that encoder; empty: images are embedded in each step, which latents cannot be",
    )
    width: int = option(
        0,
        "width of its embeddings; 0: that of the encoder, as found at the run's first start",
        at_least=0,
        defines_run=True,
    )
    dropout: float = option(
        0.1,
        "fraction of images trained without their embedding, for guidance",
        at_least=0,
        at_most=1,
        defines_run=True,
    )

    def problems(self, num_classes: int, flip: bool) -> Iterator[str]:
        """Yield a line for options that nothing uses, for labels or flips next to embeddings."""
        if self.encoder and self.url and flip:
            yield (
                f"data.flip is true, and embedding.url is {shown(self.url)}, whose embeddings are "
                f"of images as they are stored: set data.flip to false"
            )
        if self.encoder and num_classes:
            # Variations of an image and its embedding would need its label, too.
            yield (
                f"model.num_classes is {num_classes}, and embedding.encoder is "
                f"{shown(self.encoder)}; a network is given labels or embeddings: leave one out"
            )
        for item in fields(self):
            value = getattr(self, item.name)
            if not self.encoder and value != item.default:
                yield (
                    f"embedding.{item.name} is {shown(value)}, which nothing uses without "
                    f"embedding.encoder: leave it out, or name the encoder"
                )
