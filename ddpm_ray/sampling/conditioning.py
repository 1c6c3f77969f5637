"""Build the conditioning of a network, for training, sampling and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ddpm_ray.data.low_resolution import downscaled
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import NO_TEXT, Conditioning

NO_EMBEDDING_MODEL = (
    "image embeddings are for models trained with them (embedding.encoder); this one was not"
)
NO_TEXT_MODEL = "prompts are for models trained with text (text.encoder); this one was not"


@dataclass(frozen=True)
class SampleInputs:
    """Labels, texts and images of samples: sample i has labels[i % len] and prompts[i % len].

    Without labels it has the class i % num_classes, without prompts no text, and without
    embeddings none.
    """

    labels: Sequence[int] = ()
    prompts: Sequence[str] = ()
    low_resolution: Tensor | None = None  # [M, C, H, W]: sample i has image i % M
    embeddings: Tensor | None = None  # [M, D] of images: sample i has row i % M


NO_INPUTS = SampleInputs()


class ImageEmbedder(Protocol):
    """The encoder of images; TrainedEncoders (image_text.py) is one."""

    @property
    def width(self) -> int:
        """D, the width of the embeddings."""
        ...

    def embed(self, x_0: Tensor) -> Tensor:
        """Embed images x_0 [B, C, H, W] in [-1, 1] as vectors [B, D] of length 1."""
        ...


@dataclass(frozen=True)
class ConditioningSpec:
    """The conditioning that a network takes."""

    num_classes: int = 0  # 0: no labels
    self_conditioning: bool = False  # its own estimate of x_0
    low_resolution_pixels: int = 0  # side of the low-resolution image; 0: no super-resolution
    known_pixels: bool = False  # the known part of the image, for inpainting
    tokenizer: Tokenizer | None = None  # of the texts; None: no text
    image_encoder: ImageEmbedder | None = None  # of the image embeddings; None: no embedding

    def of_data(
        self,
        x_0: Tensor,
        labels: Tensor,
        tokens: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Conditioning:
        """The conditioning of images x_0 [B, C, H, W] of a data set, their labels [B] and tokens.

        A network of embeddings is given `embeddings` [B, D]; without them the encoder embeds x_0,
        which must be pixels then. There is no estimate of x_0, which takes a call of the network,
        and no known part.
        """
        pixels = self.low_resolution_pixels
        return Conditioning(
            labels=labels if self.num_classes else None,
            tokens=tokens if self.tokenizer else None,
            low_resolution=downscaled(x_0, pixels) if pixels else None,
            embedding=self._embedding_of(x_0, embeddings),
        )

    def _embedding_of(self, x_0: Tensor, embeddings: Tensor | None) -> Tensor | None:
        if self.image_encoder is None:
            return None
        return self.image_encoder.embed(x_0) if embeddings is None else embeddings.float()

    def of_samples(self, index: Tensor, inputs: SampleInputs = NO_INPUTS) -> Conditioning:
        """The conditioning of the samples `index` [B], each a function of its index alone.

        Raises ValueError for prompts of a network without text.
        """
        known: Tensor | None = None
        if inputs.labels:
            known = torch.tensor(inputs.labels, device=index.device)[index % len(inputs.labels)]
        elif self.num_classes:
            known = index % self.num_classes
        low_resolution = inputs.low_resolution
        if low_resolution is not None:
            low_resolution = low_resolution[index.to(low_resolution.device) % len(low_resolution)]
        return Conditioning(
            labels=known,
            tokens=self._tokens(index, inputs.prompts),
            low_resolution=low_resolution,
            embedding=self._embedding(index, inputs.embeddings),
        )

    def with_negative_prompt(self, null: Conditioning, prompt: str) -> Conditioning:
        """`null`, an unconditional input, with the text `prompt` for each of its images."""
        tokens = null.tokens
        if self.tokenizer is None or tokens is None:
            raise ValueError(NO_TEXT_MODEL)
        return replace(null, tokens=self.tokenizer.encode([prompt]).to(tokens).expand_as(tokens))

    def _tokens(self, index: Tensor, prompts: Sequence[str]) -> Tensor | None:
        """The tokens [B, L] of the samples `index`; None without text."""
        if self.tokenizer is None:
            if prompts:
                raise ValueError(NO_TEXT_MODEL)
            return None
        if not prompts:
            return index.new_full((len(index), self.tokenizer.length), NO_TEXT)
        chosen = [prompts[i % len(prompts)] for i in index.tolist()]
        return self.tokenizer.encode(chosen).to(index.device)

    def _embedding(self, index: Tensor, embeddings: Tensor | None) -> Tensor | None:
        """The embeddings [B, D] of the samples `index`; None for a network without them."""
        if self.image_encoder is None:
            if embeddings is not None:
                raise ValueError(NO_EMBEDDING_MODEL)
            return None
        if embeddings is None:
            return torch.zeros(len(index), self.image_encoder.width, device=index.device)
        return embeddings[index.to(embeddings.device) % len(embeddings)].to(index.device)

    def taken(self, conditioning: Conditioning) -> Conditioning:
        """The part of `conditioning` that the network takes."""
        return Conditioning(
            labels=conditioning.labels if self.num_classes else None,
            tokens=conditioning.tokens if self.tokenizer else None,
            low_resolution=conditioning.low_resolution if self.low_resolution_pixels else None,
            known=conditioning.known if self.known_pixels else None,
            embedding=conditioning.embedding if self.image_encoder else None,
        )

    def completed(self, conditioning: Conditioning, x_t: Tensor) -> Conditioning:
        """`conditioning` for x_t [B, C, H, W]; a missing known part becomes 0: nothing is known."""
        if not self.known_pixels or conditioning.known is not None:
            return conditioning
        count, channels, *size = x_t.shape
        return replace(conditioning, known=x_t.new_zeros(count, channels + 1, *size))


NO_CONDITIONING = ConditioningSpec()
