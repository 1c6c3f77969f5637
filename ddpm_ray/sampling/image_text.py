"""A trained image and text encoder: uint8 images and prompts to embeddings in one space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer, warn_of_cut_prompts
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.models.unet_spec import require_divisible
from ddpm_ray.redaction import counted
from ddpm_ray.sampling.array_arguments import as_images

BATCH = 256  # images or texts that are embedded at once


@dataclass(frozen=True, eq=False)
class TrainedEncoders:
    """An image and a text encoder ready for use; returned by `ddpm_ray.load_encoders`."""

    model: ContrastiveEncoders  # in eval mode, parameters frozen
    tokenizer: Tokenizer
    image_shape: ImageShape  # of the images that it was trained on; it takes others too
    url: str
    sha256: str  # of its weights file
    core_seconds: float | None = None  # of its training (training.core_seconds); None: unknown

    def __repr__(self) -> str:
        """URL, image shape and width of the embeddings, in one line."""
        return f"TrainedEncoders({self.url}, {self.image_shape}, width {self.width})"

    @property
    def width(self) -> int:
        """E, the width of the embeddings."""
        return self.model.spec.width

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.image_projection.weight.device

    def require_fitting(self, image_shape: ImageShape) -> None:
        """Raise ValueError for other channels, and for sides that do not halve evenly."""
        if image_shape.channels != (wanted := self.model.spec.image_channels):
            raise ValueError(
                f"images have {counted(image_shape.channels, 'channel')}, but the encoder "
                f"{self.url} takes {wanted}"
            )
        require_divisible(image_shape[:2], len(self.model.spec.channel_mults))

    @torch.no_grad()
    def embed(self, x_0: Tensor) -> Tensor:
        """Embeddings float32 [B, E] of length 1 of images x_0 [B, C, H, W] in [-1, 1].

        More than BATCH images are embedded in parts, as the encoder's activations take memory.
        """
        return torch.cat([self.model.embed_images(part) for part in torch.split(x_0, BATCH)])

    @torch.no_grad()
    def image_embeddings(self, images: Any, *, batch_size: int = BATCH) -> Tensor:
        """Embeddings float32 [N, E] of length 1 of uint8 images [N, H, W, C], an array or a tensor.

        Raises ValueError for other images, and for sides that the encoder does not halve evenly.
        """
        found = torch.from_numpy(as_images(images, self.model.spec.image_channels))
        parts = (PIXELS.encode(part.to(self.device)) for part in torch.split(found, batch_size))
        return torch.cat([self.model.embed_images(part) for part in parts])

    def text_embeddings(self, prompts: Sequence[str], *, batch_size: int = BATCH) -> Tensor:
        """Embeddings float32 [n, E] of length 1 of n prompts, which follow the rule of captions.

        Longer prompts are cut with a warning, as captions are in training. Raises ValueError for no
        prompt or another type, and CaptionError, which names the prompt's number.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        if not prompts:
            raise ValueError("prompts is empty; give at least one text, as in ['a red apple']")
        settings = SamplingSettings().overridden({"prompts": list(prompts)})
        cleaned = settings.clean_prompts
        warn_of_cut_prompts(self.tokenizer, cleaned)
        return self.token_embeddings(self.tokenizer.encode(cleaned), batch_size=batch_size)

    @torch.no_grad()
    def token_embeddings(self, tokens: Tensor, *, batch_size: int = BATCH) -> Tensor:
        """Embeddings float32 [n, E] of rows of the tokenizer, int64 [n, L]; n may be 0."""
        parts = torch.split(tokens.to(self.device), batch_size)
        return torch.cat([self.model.embed_texts(part) for part in parts])

    def similarity(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """Cosines float32 [N, n], in -1..1, of the embeddings of N images and n prompts."""
        return self.image_embeddings(images) @ self.text_embeddings(prompts).T
