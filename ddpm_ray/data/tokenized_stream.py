"""A stream of images with the tokens of one caption each."""

from dataclasses import dataclass

import torch

from ddpm_ray.data.caption_choice import choose
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.loader import Batch, ShardStream
from ddpm_ray.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizedStream:
    """The batches of a stream with the tokens of a caption in place of all captions.

    Which caption a sample has is a function of (seed, step, position in the global batch). A sample
    without captions has the text "".
    """

    stream: ShardStream | EmbeddedStream
    tokenizer: Tokenizer
    seed: int

    @property
    def waited_s(self) -> float:
        """Total time that `batch` waited for the reader."""
        return self.stream.waited_s

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        """Return the samples of the 0-based `step`, as ShardStream.batch does."""
        found = self.stream.batch(step, out)
        positions = torch.tensor(self.stream.positions)
        captions = found.captions or [()] * len(positions)
        tokens = self.tokenizer.encode(choose(captions, self.seed, step, positions))
        if out is not None and out.tokens is not None and out.tokens.shape == tokens.shape:
            tokens = out.tokens.copy_(tokens)  # memory that the device reads by itself
        return found._replace(captions=None, tokens=tokens)

    def keys(self, step: int) -> list[str]:
        """Return the keys of the samples of `batch(step)`. Slow: reads their shards again."""
        return self.stream.keys(step)

    def close(self) -> None:
        """Stop reading ahead."""
        self.stream.close()
