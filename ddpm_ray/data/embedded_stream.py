"""A stream of images with their embeddings, from a second set of the same images."""

from dataclasses import astuple, dataclass

import torch

from ddpm_ray.data.loader import Batch, ShardStream


@dataclass(frozen=True)
class EmbeddedStream:
    """The batches of a ShardStream, with the embedding of each image.

    Shard n of a set that `ddpm-ray encode` wrote holds the samples of pixel shard n, in their
    order. The order of samples depends on the sizes of the shards, seed, batch size, lanes and
    window alone: where these are equal, both streams have the same samples at each position.
    """

    stream: ShardStream  # of pixels or latents
    embeddings: ShardStream  # of a set of embeddings of the same images

    def __post_init__(self) -> None:
        """Raise ValueError unless both streams have the same samples in each batch."""
        mine, theirs = (
            (astuple(one.order), one.positions) for one in (self.stream, self.embeddings)
        )
        if mine != theirs:
            raise ValueError("images and embeddings are read in different orders")

    @property
    def positions(self) -> range:
        """The positions of this worker's samples in each global batch."""
        return self.stream.positions

    @property
    def waited_s(self) -> float:
        """Total time that `batch` waited for both readers."""
        return self.stream.waited_s + self.embeddings.waited_s

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        """Return the samples of the 0-based `step`, as ShardStream.batch does."""
        found, vectors = self.stream.batch(step, out), None
        if out is not None and out.embeddings is not None:  # memory that the device reads by itself
            vectors = Batch(out.embeddings, torch.empty_like(found.labels))
        return found._replace(embeddings=self.embeddings.batch(step, vectors).images)

    def keys(self, step: int) -> list[str]:
        """Return the keys of the samples of `batch(step)`. Slow: reads their shards again."""
        return self.stream.keys(step)

    def close(self) -> None:
        """Stop reading ahead."""
        self.stream.close()
        self.embeddings.close()
